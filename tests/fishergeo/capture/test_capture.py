"""The pass leaves the model as it was, works on models as they come, and refuses by name what it cannot do."""

import copy

import pytest
import torch
from fisher_oracle import NAMES, assert_close, collate, make_examples, oracle_objective, tiny_llama
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import fishergeo as fg


def gram(model, batches, **options):
    return fg.estimate_fisher(model, batches, structure="gram", **options)


def test_the_model_is_left_exactly_as_it_was():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    marker = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = marker
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    gram(model, [collate(make_examples([5, 7]))], kind="mc")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert model.lm_head.weight.grad is marker and bool((marker == 1).all())
    assert all(p.grad is None for n, p in model.named_parameters() if n != "lm_head.weight")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(not m._forward_hooks for m in model.modules())


def test_the_model_is_restored_after_an_error():
    model = tiny_llama().train()
    with pytest.raises(ValueError, match="labels"):
        gram(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(not m._forward_hooks for m in model.modules())


def test_frozen_models_and_no_grad_callers_give_the_same():
    model, batches = tiny_llama(), [collate(make_examples([5, 7]))]
    expected = gram(model, batches)
    with torch.no_grad():
        actual = gram(model.requires_grad_(False), batches)
    for name in expected:
        assert_close(actual[name].to_dense(), expected[name].to_dense(), 1e-13)


def test_the_fisher_of_an_adapted_model_is_that_of_its_merged_weights():
    model, batches = tiny_llama(), [collate(make_examples([5, 7]))]
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).double()
    names = [f"base_model.model.{name}.base_layer" for name in NAMES]
    actual = gram(adapted, batches, layers=names)
    merged = gram(copy.deepcopy(adapted).merge_and_unload(), batches, layers=list(NAMES))
    for name in NAMES:
        assert_close(actual[f"base_model.model.{name}.base_layer"].to_dense(), merged[name].to_dense())
    assert not any("lora_" in name for name in gram(adapted, batches))


def test_bfloat16_models_are_summed_in_float32():
    model = tiny_llama().to(torch.bfloat16)
    fisher = gram(model, [collate(make_examples([5, 7]))])
    assert all(op.dtype == torch.float32 for op in fisher.values())
    exact = gram(tiny_llama(), [collate(make_examples([5, 7]))])
    for name in NAMES:
        assert_close(fisher[name].to_dense().double(), exact[name].to_dense(), 0.1)


class Checkpointed(torch.nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)
        self.mode = mode

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        if self.mode == "plain":
            return self.second(torch.tanh(hidden))
        return checkpoint(lambda h: self.second(torch.tanh(h)), hidden, use_reentrant=self.mode == "reentrant")


@pytest.mark.parametrize("mode", ["nonreentrant", "reentrant"])
def test_activation_checkpointing_changes_nothing(mode):
    torch.manual_seed(0)
    plain, checked = Checkpointed("plain").double(), Checkpointed(mode).double()
    checked.load_state_dict(plain.state_dict())
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    loss = lambda model, batch: model(batch).sin().sum((1, 2))
    expected, actual = gram(plain, [x], loss=loss), gram(checked, [x], loss=loss)
    for name in expected:
        assert_close(actual[name].to_dense(), expected[name].to_dense())


class Deep(torch.nn.Module):
    """Blocks of norm, linear and experts, each run under one kind of checkpoint."""

    def __init__(self, mode):
        super().__init__()
        config = MixtralConfig(hidden_size=6, intermediate_size=5, num_local_experts=3)
        config._experts_implementation = "eager"
        self.first = torch.nn.Linear(4, 6)
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(6) for _ in range(2))
        self.inner = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(2))
        self.experts = torch.nn.ModuleList(MixtralExperts(config) for _ in range(2))
        self.mode = mode

    def block(self, x, i):
        x = x + torch.tanh(self.inner[i](self.norms[i](x)))
        rows = x.flatten(0, 1)
        weights, chosen = rows[:, :3].softmax(1).topk(2, 1)
        return x + self.experts[i](rows, chosen, weights).view_as(x)

    def forward(self, x):
        x = self.first(x)
        for i in range(2):
            if self.mode == "plain":
                x = self.block(x, i)
            else:
                x = checkpoint(self.block, x, i, use_reentrant=self.mode == "reentrant")
        return x


def deep_pair(mode):
    plain, checked = Deep("plain").double(), Deep(mode).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one, other in zip(plain.parameters(), checked.parameters(), strict=True):
            one.copy_(0.5 * torch.randn(one.shape, generator=generator))
            other.copy_(one)
    return plain, checked, torch.randn(3, 5, 4, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("mode", ["nonreentrant", "reentrant"])
def test_checkpointed_blocks_of_norms_linears_and_experts(mode):
    plain, checked, x = deep_pair(mode)
    layers = ["first", "norms.*", "inner.*", "inner.*bias", "experts.*"]
    loss = lambda model, batch: model(batch).sin().sum((1, 2))
    for structure in ("gram", "kfac"):
        expected, actual = (
            fg.estimate_fisher(model, [x], structure=structure, layers=layers, loss=loss) for model in (plain, checked)
        )
        assert len(expected) == 1 + 2 + 2 + 2 + 12
        for name in expected:
            for key, value in expected.accumulators[name].sums.items():
                assert_close(actual.accumulators[name].sums[key], value)


def test_a_reentrant_checkpoint_whose_input_needs_no_gradient_is_refused():
    _, checked, x = deep_pair("reentrant")
    checked.head = torch.nn.Linear(6, 2).double()
    loss = lambda model, batch: model.head(model(batch)).sin().sum((1, 2))
    with pytest.raises(RuntimeError, match=r"'inner\.0' ran without a graph.*use_reentrant=False"):
        gram(checked, [x], layers=["inner.0", "head"], loss=loss)


def test_bfloat16_norms_embeddings_and_experts_follow_the_float64_model():
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
        )
    ).double().eval()  # fmt: skip
    layers = ["model.layers.0.input_layernorm", "model.norm", "model.embed_tokens", "model.layers.0.self_attn.q_proj"]
    batches = [collate(make_examples([5, 7]))]
    exact = gram(model, batches, layers=layers)
    examples = make_examples([5, 7])
    gradients = {name: [] for name in layers}
    for ids, labels in examples:
        model.zero_grad()
        oracle_objective(model(input_ids=ids[None]).logits[0], labels, "empirical")[0].backward()
        for name in layers:
            gradients[name].append(model.get_parameter(f"{name}.weight").grad.clone())
    model.zero_grad()
    rough = gram(model.to(torch.bfloat16), batches, layers=layers)
    for name in layers:
        g = torch.stack(gradients[name])
        g = g[..., None] if g.ndim == 2 else g.mT if "embed" in name else g
        # These norms and this softmax compute in float32 whatever the dtype.
        assert_close(exact[name].to_dense(), (g @ g.mT).mean(0), 1e-5)
        assert rough[name].dtype == torch.float32
        assert_close(rough[name].to_dense().double(), exact[name].to_dense(), 0.15)


def test_a_module_called_twice_sums_its_calls():
    torch.manual_seed(0)

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4).double()

        def forward(self, x):
            return self.linear(self.linear(x).tanh())

    model, x = Twice(), torch.randn(3, 4, dtype=torch.float64)
    loss = lambda model, batch: model(batch).sin().sum(1)
    rows = []
    for row in x:
        model.zero_grad()
        loss(model, row[None]).sum().backward()
        rows.append(model.linear.weight.grad.clone())
    g = torch.stack(rows)
    assert_close(gram(model, [x], loss=loss)["linear"].to_dense(), (g @ g.mT).mean(0))


def test_outputs_changed_in_place_are_captured_before_the_change():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(inplace=True), torch.nn.Linear(5, 2)).double()
    plain = torch.nn.Sequential(model[0], torch.nn.ReLU(), model[2])
    x = torch.randn(6, 4, dtype=torch.float64)
    loss = lambda model, batch: model(batch).sin().sum(1)
    expected, actual = gram(plain, [x], loss=loss), gram(model, [x], loss=loss)
    for name in expected:
        assert_close(actual[name].to_dense(), expected[name].to_dense())


def test_inputs_changed_in_place_are_refused():
    class Bad(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            x = x.clone()
            y = self.linear(x)
            x += 1
            return y + x

    with pytest.raises(RuntimeError, match=r"'linear'.*in place"):
        gram(Bad(), [torch.ones(2, 4)], loss=lambda m, b: m(b).sum(1))


def test_layers_by_name_glob_and_predicate():
    model, batches = tiny_llama(), [collate(make_examples([5]))]
    assert list(gram(model, batches, layers="*.q_proj")) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert list(gram(model, batches, layers=[NAMES[1], NAMES[0]])) == [NAMES[0], NAMES[1]]
    chosen = gram(model, batches, layers=lambda name, module: name.endswith("v_proj"))
    assert all(name.endswith("v_proj") for name in chosen) and len(chosen) == 2
    assert "lm_head" not in gram(model, batches) and len(gram(model, batches)) == 14


@pytest.mark.parametrize("layers", ["nothing.*", ["*.q_proj", "nothing.*"]])
def test_a_pattern_that_matches_nothing_is_named(layers):
    with pytest.raises(ValueError, match=r"'nothing\.\*'.*model\.layers\.0\.self_attn\.q_proj"):
        gram(tiny_llama(), [], layers=layers)


def test_kinds_of_layer_that_are_not_known_are_refused_by_name():
    with pytest.raises(ValueError, match=r"model\.rotary_emb.*LlamaRotaryEmbedding"):
        gram(tiny_llama(), [], layers=["model.rotary_emb"])


def test_not_a_number_stops_with_batch_and_layer():
    model = tiny_llama()
    good = collate(make_examples([5]))

    def poison(module, inputs, output):
        return output * float("nan") if poison.armed else output

    model.lm_head.register_forward_hook(poison)
    poison.armed = True
    with pytest.raises(FloatingPointError, match="batch 0"):
        gram(model, [good])
    poison.armed = False
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda m, i: (torch.where(torch.arange(12 + 8) == 0, torch.inf, i[0]),)
    )
    with pytest.raises(FloatingPointError, match="batch 0"):
        gram(model, [good])
    handle.remove()


def test_examples_without_supervision_are_no_data():
    model, examples = tiny_llama(), make_examples([5, 7, 6])
    empty = (examples[2][0], torch.full_like(examples[2][1], -100))
    for structure in ("gram", "kfac"):
        expected = fg.estimate_fisher(model, [collate(examples[:2])], structure=structure, layers=list(NAMES))
        actual = fg.estimate_fisher(model, [collate([*examples[:2], empty])], structure=structure, layers=list(NAMES))
        for name in NAMES:
            assert_close(actual[name].to_dense(), expected[name].to_dense())
    with pytest.raises(ValueError, match="no example"):
        gram(model, [collate([empty])])


def test_layers_that_read_the_same_input_share_one_factor():
    model, batches = tiny_llama(), [collate(make_examples([5, 7])), collate(make_examples([6], 1))]
    shared = fg.estimate_fisher(model, batches, structure="kfac")
    apart = fg.estimate_fisher(model, batches, structure="kfac", share_inputs=False)
    prefix = "model.layers.0.self_attn."
    assert shared.accumulators[prefix + "q_proj"].sums["input"] is shared.accumulators[prefix + "v_proj"].sums["input"]
    assert (
        apart.accumulators[prefix + "q_proj"].sums["input"] is not apart.accumulators[prefix + "v_proj"].sums["input"]
    )
    for name in shared:
        assert_close(shared[name].input_factor, apart[name].input_factor, 1e-14)


def test_a_single_batch_in_place_of_batches_is_refused():
    with pytest.raises(TypeError, match="wrap a single batch"):
        gram(tiny_llama(), collate(make_examples([5])))


@pytest.mark.parametrize("argument", ["structure", "kind", "unit", "side"])
def test_unknown_choices_are_named(argument):
    with pytest.raises(ValueError, match=f"{argument}='nonsense'"):
        fg.estimate_fisher(tiny_llama(), [], **{argument: "nonsense"})


class Towers(torch.nn.Module):
    """One layer that reads two sequences, of which ``attention_mask`` is the first one's."""

    def __init__(self):
        super().__init__()
        self.emb, self.ff = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8)

    def pool(self, ids, mask):
        h, w = torch.tanh(self.ff(torch.tanh(self.emb(ids)))), mask[..., None].double()
        return (h * w).sum(1) / w.sum(1)

    def forward(self, b):
        return (self.pool(b["input_ids"], b["attention_mask"]) * self.pool(b["doc_ids"], b["doc_mask"])).sum(1)


class Captioned(torch.nn.Module):
    """A tower that reads as many patches as the text has tokens."""

    def __init__(self):
        super().__init__()
        self.emb, self.text = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8)
        self.patches, self.out = torch.nn.Linear(3, 8), torch.nn.Linear(8, 4)

    def forward(self, b):
        text = torch.tanh(self.text(self.emb(b["input_ids"]))) * b["attention_mask"][..., None]
        return self.out(torch.tanh(self.patches(b["pixel_values"])).mean(1) + text.sum(1)).square().mean(1)


@pytest.mark.parametrize(("model", "layers"), [(Towers, ["ff"]), (Captioned, ["patches", "text"])])
def test_the_mask_of_a_text_is_not_laid_on_another_sequence_of_its_length(model, layers):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (3, 7), generator=generator)
    mask, other = torch.ones_like(ids), torch.ones_like(ids)
    mask[1:, 3:], other[0, 5:] = 0, 0
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "doc_ids": ids.flip(0),
        "doc_mask": other,
        "pixel_values": torch.randn(3, 7, 3, dtype=torch.float64, generator=generator),
    }
    torch.manual_seed(0)
    model, loss = model().double(), lambda m, b: (m(b) - 1).square()
    for verify in (True, False):
        found = gram(model, [batch], layers=layers, loss=loss, verify=verify)
        for name in layers:
            weight, want = model.get_submodule(name).weight, 0
            for value in loss(model, batch):
                (g,) = torch.autograd.grad(value, weight, retain_graph=True)
                want = want + g @ g.T / 3
            assert_close(found[name].to_dense(), want, 1e-12)
