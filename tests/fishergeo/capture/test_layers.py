"""Every kind of layer against ``param.grad`` of single examples, one at a time, in float64."""

import dataclasses
import itertools

import pytest
import torch
from architectures import MODELS
from architectures import VOCABULARY as VOCABULARY_OF_MODELS
from fisher_oracle import VOCABULARY, assert_close, collate, make_examples, oracle_objective
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import fishergeo as fg

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def randomised(model, seed=0):
    """Float64, and every parameter random: initial ones and zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def llama(**options):
    return randomised(LlamaForCausalLM(LlamaConfig(**SMALL, **options)))


def mixtral():
    torch.manual_seed(1)  # every expert has to be chosen by some token
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))
    model.set_experts_implementation("eager")  # the default, grouped_mm, knows no float64
    return randomised(model)


def gpt_oss():
    config = GptOssConfig(
        **SMALL, head_dim=6, num_local_experts=3, num_experts_per_tok=2, sliding_window=64, pad_token_id=0
    )
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config)
    model.set_experts_implementation("eager")
    return randomised(model)


def gpt2():
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=12, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0, embd_pdrop=0
    )
    return randomised(GPT2LMHeadModel(config))


def objectives(model, ids, labels, kind):
    """(weight, objective) of one example: its Fisher is the weighted sum of the squares of their gradients."""
    if kind not in ("type2", "ggn"):
        return [(1.0, lambda: oracle_objective(model(input_ids=ids[None]).logits[0], labels, kind)[0])]
    places = [t for t in range(len(ids) - 1) if int(labels[t + 1]) != -100]
    p = model(input_ids=ids[None]).logits[0].detach().softmax(1)
    power = len(places) ** (1 if kind == "type2" else 0.5)

    def surprise(t, c):
        row = model(input_ids=ids[None]).logits[0, t]
        return (torch.log(torch.exp(row).sum()) - row[c]) / power

    return [(float(p[t, c]), lambda t=t, c=c: surprise(t, c)) for t in places for c in range(VOCABULARY)]


def language_gradients(model, views, examples, kind="empirical"):
    """Layer -> (N, p, q) from single, unpadded examples; ``views`` maps a layer to its view of the gradients.

    Of kinds that weigh several objectives an example: (M, p, q), scaled so that the mean of their squares is the Fisher.
    """
    flags = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(True)
    found = {name: [] for name in views}
    weighted = [one for ids, labels in examples for one in objectives(model, ids, labels, kind)]
    for weight, objective in weighted:
        model.zero_grad(set_to_none=True)
        objective().backward()
        for name, view in views.items():
            found[name].append(view() * (weight * len(weighted) / len(examples)) ** 0.5)
    model.zero_grad(set_to_none=True)
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    return {name: torch.stack(g) for name, g in found.items()}


def gradient(model, name, index=None):
    """The gradient of a parameter, or of one matrix of it; zeros where there is none."""
    parameter = model.get_parameter(name)
    whole = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return whole if index is None else whole[index]


def agrees(estimate, gradients, tolerance=1e-10):
    """Every structure against dense formulas; of KFAC and EKFAC what the gradients alone determine."""
    asked = {f"gram {side}": fg.Structure("gram", side=side) for side in ("output", "input")}
    asked |= {f"sketch {side}": fg.Structure("sketch", side=side, rank=48) for side in ("output", "input")}
    found = estimate(structure={**asked, **{name: name for name in ("diagonal", "exact", "kfac", "ekfac")}})
    output, inputs, sketch, sketch_in, diagonal, exact, kfac, ekfac = found.values()
    assert set(output) == set(gradients)
    for name, g in gradients.items():
        assert output.header.shapes[name] == tuple(g.shape[1:])
        assert_close(output[name].to_dense(), (g @ g.mT).mean(0), tolerance)
        assert_close(inputs[name].to_dense(), (g.mT @ g).mean(0), tolerance)
        assert_close(diagonal[name].diagonal(), g.square().mean(0).flatten(), tolerance)
        assert_close(sketch[name].to_dense(), (g @ g.mT).mean(0), tolerance)
        assert_close(sketch_in[name].to_dense(), (g.mT @ g).mean(0), tolerance)
        flat = g.flatten(1)
        block = torch.randn(flat.shape[1], 2, dtype=g.dtype, generator=torch.Generator().manual_seed(0))
        assert_close(exact[name] @ block, flat.T @ (flat @ block) / len(g), tolerance)
        assert_close(exact[name].diagonal(), flat.square().mean(0), tolerance)
        u, v = ekfac[name].output_basis, ekfac[name].input_basis
        assert_close(ekfac[name].values, (u.T @ g @ v).square().mean(0), tolerance)
        for basis, factor in ((u, kfac[name].output_factor), (v, kfac[name].input_factor)):
            assert_close(basis.T @ basis, torch.eye(len(basis), dtype=g.dtype), tolerance)
            inside = basis.T @ factor @ basis
            assert_close(inside, torch.diag(inside.diagonal()), tolerance)


def language_case(model, views, order, cuts, padding, gradients=None):
    examples = make_examples([5, 9, 7, 9, 4, 6])
    gradients = language_gradients(model, views, examples) if gradients is None else gradients
    shuffled = [examples[i] for i in order]
    batches = [collate(shuffled[a:b], padding) for a, b in itertools.pairwise([0, *sorted(cuts), 6])]
    agrees(lambda **options: fg.estimate_fisher(model, batches, layers=list(views), **options), gradients)


@pytest.mark.parametrize(
    "family, kind",
    [("gpt2", "margin"), ("gpt2", "type2"), ("gpt2", "ggn"), ("mixtral", "margin"), ("mixtral", "ggn"),
     ("lora", "margin"), ("lora", "type2")],
)  # fmt: skip
def test_other_objectives_reach_every_kind_of_layer(family, kind):
    if family == "gpt2":
        model, mlp = gpt2(), "transformer.h.0.mlp.c_fc"
        views = {
            "transformer.wte": lambda: gradient(model, "transformer.wte.weight").T,
            "transformer.h.0.ln_2": lambda: gradient(model, "transformer.h.0.ln_2.weight")[:, None],
            mlp: lambda: gradient(model, f"{mlp}.weight").T,
            f"{mlp}.bias": lambda: gradient(model, f"{mlp}.bias")[:, None],
        }
    elif family == "mixtral":
        model = mixtral()
        views = expert_views(model, [f"model.layers.1.mlp.experts.{p}.2" for p in ("gate_up_proj", "down_proj")])
    else:
        model = randomised(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)))
        name = "base_model.model.model.layers.1.self_attn.q_proj"
        layers = [f"{name}.lora_A.default", f"{name}.lora_B.default", f"{name}.base_layer"]
        views = {layer: lambda layer=layer: gradient(model, f"{layer}.weight") for layer in layers}
    examples = make_examples([3, 4] if kind != "margin" else [5, 9, 4])
    gradients = language_gradients(model, views, examples, kind)
    batches = [collate(examples[:1]), collate(examples[1:], "left")]
    # The norms of Llama and Mixtral compute in float32, so that a scaled gradient rounds to another one.
    tolerance = 1e-10 if family == "gpt2" else 1e-6
    agrees(
        lambda **options: fg.estimate_fisher(model, batches, layers=list(views), kind=kind, **options),
        gradients,
        tolerance,
    )


SPLITS = {
    "order": st.permutations(range(6)),
    "cuts": st.sets(st.integers(1, 5), max_size=5),
    "padding": st.sampled_from(["left", "right"]),
}


def linear_views(model, name):
    """The weight, the bias and both together of a linear map stored (p, q)."""
    return {
        name: lambda: gradient(model, f"{name}.weight"),
        f"{name}.bias": lambda: gradient(model, f"{name}.bias")[:, None],
        f"{name}+bias": lambda: torch.cat(
            [gradient(model, f"{name}.weight"), gradient(model, f"{name}.bias")[:, None]], 1
        ),
    }


@settings(max_examples=4)
@given(**SPLITS)
def test_llama_norms_embedding_weights_and_biases(order, cuts, padding):
    model = llama(attention_bias=True, pad_token_id=3)
    attention, norm = "model.layers.1.self_attn.", "model.layers.0.post_attention_layernorm"
    views = {
        "model.embed_tokens": lambda: gradient(model, "model.embed_tokens.weight").T,
        norm: lambda: gradient(model, f"{norm}.weight")[:, None],
        **linear_views(model, attention + "q_proj"),
        **linear_views(model, attention + "v_proj"),
        "model.norm": lambda: gradient(model, "model.norm.weight")[:, None],
        "lm_head": lambda: gradient(model, "lm_head.weight"),
    }
    language_case(model, views, order, cuts, padding)


@settings(max_examples=4)
@given(**SPLITS)
def test_gpt2_transposed_linears_layer_norms_and_the_tied_embedding(order, cuts, padding):
    model = gpt2()
    name = "transformer.h.0.mlp.c_fc"
    views = {
        "transformer.wte": lambda: gradient(model, "transformer.wte.weight").T,
        "transformer.h.0.ln_2": lambda: gradient(model, "transformer.h.0.ln_2.weight")[:, None],
        "transformer.h.0.ln_2.bias": lambda: gradient(model, "transformer.h.0.ln_2.bias")[:, None],
        name: lambda: gradient(model, f"{name}.weight").T,
        f"{name}.bias": lambda: gradient(model, f"{name}.bias")[:, None],
        f"{name}+bias": lambda: torch.cat(
            [gradient(model, f"{name}.weight").T, gradient(model, f"{name}.bias")[:, None]], 1
        ),
    }
    language_case(model, views, order, cuts, padding)


def test_a_tied_weight_is_one_layer_under_either_name():
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    views = {"lm_head": lambda: gradient(model, "lm_head.weight")}
    language_case(model, views, range(6), {2, 3}, "left")
    with pytest.raises(ValueError, match=r"'model\.embed_tokens' and 'lm_head' are one tied parameter"):
        fg.estimate_fisher(model, [], layers=["lm_head", "model.embed_tokens"])


def expert_views(model, names, transposed=False):
    views = {}
    for name in names:
        parameter, _, index = name.rpartition(".")
        views[name] = lambda p=parameter, i=int(index): gradient(model, p, i).T if transposed else gradient(model, p, i)
    return views


@settings(max_examples=4)
@given(implementation=st.sampled_from(["eager", "batched_mm"]), **SPLITS)
def test_experts_of_mixtral(implementation, order, cuts, padding):
    model = mixtral()
    experts = "model.layers.1.mlp.experts."
    names = [f"{experts}{parameter}.{e}" for parameter in ("gate_up_proj", "down_proj") for e in range(4)]
    views = {**expert_views(model, names), "model.norm": lambda: gradient(model, "model.norm.weight")[:, None]}
    gradients = language_gradients(model, views, make_examples([5, 9, 7, 9, 4, 6]))
    model.set_experts_implementation(implementation)
    language_case(model, {name: views[name] for name in names}, order, cuts, padding, {n: gradients[n] for n in names})
    assert model.config._experts_implementation == implementation
    assert "forward" not in vars(model.get_submodule(experts[:-1]))


def test_experts_stored_transposed_with_biases():
    model = gpt_oss()
    experts = "model.layers.0.mlp.experts."
    names = [f"{experts}{parameter}.{e}" for parameter in ("gate_up_proj", "down_proj") for e in range(3)]
    language_case(model, expert_views(model, names, transposed=True), [3, 1, 0, 2, 5, 4], {2}, "right")


def test_kfac_of_an_expert_counts_its_own_tokens():
    model, examples = mixtral(), make_examples([5, 9, 7])
    path, name = "model.layers.1.mlp.experts", "model.layers.1.mlp.experts.down_proj.2"
    counts, moment = [], torch.zeros(20, 20, dtype=torch.float64)

    def hook(module, inputs):
        hidden, chosen, _ = inputs
        rows = hidden[(chosen == 2).any(1)]
        gate, up = (rows @ module.gate_up_proj[2].T).chunk(2, 1)
        inner = module.act_fn(gate) * up
        counts.append(len(rows))
        moment.add_(inner.T @ inner)

    handle = model.get_submodule(path).register_forward_pre_hook(hook)
    with torch.no_grad():
        for ids, _ in examples:
            model(input_ids=ids[None])
    handle.remove()
    fisher = fg.estimate_fisher(model, [collate(examples)], structure="kfac", layers=[name])
    assert float(fisher.accumulators[name].sums["tokens"]) == sum(counts)
    assert_close(fisher[name].input_factor, moment / sum(counts))


def test_an_expert_that_no_token_chose_has_a_fisher_of_zero():
    model = mixtral()
    names = [f"model.layers.0.mlp.experts.down_proj.{e}" for e in range(4)]
    ids = torch.tensor([5, 7])
    fisher = fg.estimate_fisher(model, [collate([(ids, ids)])], structure="gram", layers=names)
    chosen = set()
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda m, i: chosen.update(i[1][0].tolist()))
    model(input_ids=ids[None])
    handle.remove()
    assert len(chosen) == 2
    assert {e for e, name in enumerate(names) if fisher[name].to_dense().any()} == chosen


def test_experts_under_the_default_implementation_in_float32():
    model, examples = mixtral(), make_examples([5, 9, 7])
    names = [f"model.layers.0.mlp.experts.gate_up_proj.{e}" for e in range(4)]
    exact = fg.estimate_fisher(model, [collate(examples)], structure="gram", layers=names)
    model.set_experts_implementation("grouped_mm")
    actual = fg.estimate_fisher(model.float(), [collate(examples)], structure="gram", layers=names)
    for name in names:
        assert_close(actual[name].to_dense().double(), exact[name].to_dense(), 1e-4)


def test_the_halves_of_lora_and_the_layer_under_them():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model = randomised(model)
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    layers = [f"{name}.lora_A.default", f"{name}.lora_B.default", f"{name}.base_layer"]
    views = {layer: lambda layer=layer: gradient(model, f"{layer}.weight") for layer in layers}
    language_case(model, views, range(6), {1, 4}, "left")


@pytest.fixture(scope="module")
def adapted_experts():
    config = LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    return randomised(get_peft_model(mixtral(), config))


def test_experts_under_lora_on_parameters(adapted_experts):
    model = adapted_experts
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    path = "base_model.model.model.layers.0.mlp.experts.base_layer.base_layer"
    names = [f"{path}.{parameter}.{e}" for parameter in ("gate_up_proj", "down_proj") for e in range(4)]
    language_case(model, expert_views(model, names), range(6), {3}, "right")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_lora_on_parameters_is_refused_by_name(adapted_experts):
    name = "base_model.model.model.layers.0.mlp.experts.lora_A.default"
    with pytest.raises(ValueError, match=rf"'{name}'.*target_parameters"):
        fg.estimate_fisher(adapted_experts, [], layers=[name])


# Modules of one's own, with a loss of one's own over batches of any structure.


class OnePlusNorm(nn.Module):
    """Gemma's form of RMSNorm, in float64."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x, gate=None):
        x = x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        x = x * (1 + self.weight)
        return x if gate is None else x * gate.sigmoid()


OnePlusNorm.__name__ = "GemmaLikeRMSNorm"


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3.5


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = ScaledEmbedding(11, 6, padding_idx=2)
        self.norm, self.root, self.gated = nn.LayerNorm(6), nn.RMSNorm(6), OnePlusNorm(6)
        self.up, self.down = Conv1D(8, 6), nn.Linear(8, 6)

    def forward(self, ids):
        x = self.norm(self.table(ids))
        x = x + self.down(self.up(self.root(x)).tanh())
        x = self.gated(x, gate=x) + self.gated(x)
        return self.down(self.up(x).tanh()).sin()


@dataclasses.dataclass(frozen=True)
class Batch:
    ids: torch.Tensor
    extra: tuple = ()


def mixed_loss(model, batch):
    ids = batch.ids if isinstance(batch, Batch) else batch[0] if isinstance(batch, tuple) else batch
    output = model(ids)
    return (output * output.cumsum(1)).sum((1, 2))


def example_gradients(model, views, items, loss):
    found = {name: [] for name in views}
    for item in items:
        model.zero_grad(set_to_none=True)
        loss(model, item[None]).sum().backward()
        for name, view in views.items():
            found[name].append(view().clone())
    model.zero_grad(set_to_none=True)
    return {name: torch.stack(g) for name, g in found.items()}


@settings(max_examples=6)
@given(
    cuts=st.sets(st.integers(1, 5), max_size=5),
    length=st.integers(1, 7),
    wrap=st.sampled_from([Batch, lambda ids: (ids, "text"), lambda ids: ids]),
    seed=st.integers(0, 5),
)
def test_modules_called_twice_in_batches_of_any_structure(cuts, length, wrap, seed):
    model = randomised(Mixed(), seed)
    ids = torch.randint(0, 11, (6, length), generator=torch.Generator().manual_seed(seed))
    views = {
        "table": lambda: gradient(model, "table.weight").T,
        **{f"{n}": lambda n=n: gradient(model, f"{n}.weight")[:, None] for n in ("norm", "root", "gated")},
        "norm.bias": lambda: gradient(model, "norm.bias")[:, None],
        "up": lambda: gradient(model, "up.weight").T,
        "up.bias": lambda: gradient(model, "up.bias")[:, None],
        **linear_views(model, "down"),
    }
    gradients = example_gradients(model, views, ids, mixed_loss)
    batches = [wrap(ids[a:b]) for a, b in itertools.pairwise([0, *sorted(cuts), 6])]
    agrees(
        lambda **options: fg.estimate_fisher(model, batches, layers=list(views), loss=mixed_loss, **options), gradients
    )


CONVOLUTIONS = {
    "strided": lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2)),
    "dilated": lambda: nn.Conv2d(3, 4, 2, dilation=2, bias=False),
    "same, reflected": lambda: nn.Conv2d(3, 4, (2, 3), padding="same", padding_mode="reflect"),
    "one-dimensional": lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2),
    "one-dimensional, circular": lambda: nn.Conv1d(3, 4, 3, padding="same", padding_mode="circular"),
}


@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_convolutions(shape):
    torch.manual_seed(0)
    first = CONVOLUTIONS[shape]()
    second = type(first)(4, 5, 1)
    model = randomised(nn.Sequential(first, nn.Tanh(), second))
    images = torch.randn(5, 3, *([7, 6] if isinstance(first, nn.Conv2d) else [8]), dtype=torch.float64)
    views = {name: lambda name=name: gradient(model, f"{name}.weight").flatten(1) for name in ("0", "2")}
    if first.bias is not None:
        views["0.bias"] = lambda: gradient(model, "0.bias")[:, None]
        views["0+bias"] = lambda: torch.cat([views["0"](), views["0.bias"]()], 1)
    loss = lambda model, batch: model(batch).sin().flatten(1).sum(1)
    gradients = example_gradients(model, views, images, loss)
    batches = [images[:2], images[2:]]
    agrees(lambda **options: fg.estimate_fisher(model, batches, layers=list(views), loss=loss, **options), gradients)


def test_kfac_factors_of_convolutions_embeddings_and_transposed_linears():
    """S from plain hooks on outputs; A from patches cut out by torch, from one-hot rows, from the inputs themselves."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 6), Conv1D(8, 6), nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 4, (2, 3), stride=2))
    model, ids = randomised(net), torch.randint(0, 7, (4, 5))
    loss = lambda model, batch: model(batch).sin().flatten(1).sum(1)
    taken, handles = {}, []
    for name in ("0", "1", "3"):

        def hook(module, inputs, output, name=name):
            output.register_hook(lambda g: taken.__setitem__(name, (inputs[0].detach(), g)))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    loss(model, ids).sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    one_hot = nn.functional.one_hot(taken["0"][0], 7).double().flatten(0, 1)
    patches = nn.functional.unfold(taken["3"][0], (2, 3), stride=2).mT.flatten(0, 1)
    inputs = {"0": one_hot, "1": taken["1"][0].flatten(0, 1), "3": patches}
    outputs = {name: taken[name][1].flatten(0, 1) for name in ("0", "1")}
    outputs["3"] = taken["3"][1].flatten(2).mT.flatten(0, 1)
    fisher = fg.estimate_fisher(model, [ids[:1], ids[1:]], "kfac", layers=["0", "1", "3"], loss=loss)
    for name, a in inputs.items():
        assert_close(fisher[name].input_factor, a.T @ a / len(a))
        assert_close(fisher[name].output_factor, outputs[name].T @ outputs[name] / len(ids))


def test_a_decoder_as_long_as_its_padded_encoder_keeps_its_tokens():
    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = randomised(T5ForConditionalGeneration(config))
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(1, 20, (3, 6), generator=generator) for _ in range(2))
    lengths = [3, 6, 4]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    stack = "block.0.layer."
    names = [
        f"encoder.{stack}0.SelfAttention.q", f"encoder.{stack}0.layer_norm", f"decoder.{stack}0.SelfAttention.v",
        f"decoder.{stack}1.EncDecAttention.k", f"decoder.{stack}1.EncDecAttention.q", f"decoder.{stack}2.layer_norm",
    ]  # fmt: skip
    views = {
        name: lambda name=name: gradient(model, f"{name}.weight").reshape(-1, 1 if "norm" in name else 8)
        for name in names
    }
    found = {name: [] for name in names}
    for row, target, length in zip(ids, labels, lengths, strict=True):
        model.zero_grad(set_to_none=True)
        model(input_ids=row[None, :length], labels=target[None]).loss.backward()
        for name in names:
            found[name].append(views[name]().clone())
    model.zero_grad(set_to_none=True)
    batch = {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}
    agrees(
        lambda **options: fg.estimate_fisher(model, [batch], layers=names, **options),
        {name: torch.stack(g) for name, g in found.items()},
    )


# Refusals, and how layers are named.


class Cube(nn.Module):
    """An RMSNorm by name whose output is not affine in its scales."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.weight**3


Cube.__name__ = "CubedRMSNorm"


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """Scales along the second of three dimensions."""

    def forward(self, x):
        return super().forward(x.mT).mT


class Offset(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (nn.Embedding(4, 3, max_norm=1.0), "0", r"'0' is a Embedding that has max_norm"),
        (nn.Embedding(4, 3, scale_grad_by_freq=True), "0", "scale_grad_by_freq"),
        (nn.LayerNorm((2, 3)), "0", "2 dimensions"),
        (nn.PReLU(4), "0", r"'0' is a PReLU"),
        (nn.BatchNorm1d(4, track_running_stats=False), "0", r"'0' is a BatchNorm1d that has no running"),
        (nn.Linear(3, 3, bias=False), "0.bias", r"'0\.bias' matches no layer"),
        (nn.LayerNorm(3), "0+bias", r"'0\+bias' matches no layer"),
    ],
)
def test_what_cannot_be_captured_is_refused_before_the_pass(module, name, message):
    with pytest.raises(ValueError, match=message):
        fg.estimate_fisher(nn.Sequential(module), [], layers=[name])


@pytest.mark.parametrize(
    ("module", "batch"),
    [
        (Cube(), torch.rand(2, 4)),
        (ChannelsFirstLayerNorm(4), torch.rand(2, 4, 4)),
        (Offset(4, 4), torch.ones(2, 3).long()),
    ],
)
def test_modules_that_compute_something_else_are_refused_by_name(module, batch):
    loss = lambda model, batch: model(batch).flatten(1).sum(1)
    with pytest.raises(ValueError, match=rf"'0' is a {type(module).__name__}"):
        fg.estimate_fisher(nn.Sequential(module), [batch], layers=["0"], loss=loss)


def test_rows_shared_by_all_examples_are_refused_by_name():
    class Distances(nn.Module):
        """An embedding of more positions than the batch has."""

        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(20, 3), nn.Linear(3, 2)

        def forward(self, x):
            near = self.embed(torch.arange(2 * x.shape[1] - 1))
            return self.out(x + near[: x.shape[1]] * near[-x.shape[1] :])

    loss = lambda model, batch: model(batch).square().sum((1, 2))
    with pytest.raises(ValueError, match=r"'embed'.*told apart"):
        fg.estimate_fisher(Distances(), [torch.randn(2, 5, 3)], layers=["embed"], loss=loss)


def test_experts_are_named_one_by_one_or_by_glob():
    model = mixtral()
    with pytest.raises(ValueError, match=r"MixtralExperts; name its experts.*gate_up_proj\.0"):
        fg.estimate_fisher(model, [], layers=["model.layers.0.mlp.experts"])
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.gate' is a MixtralTopKRouter"):
        fg.estimate_fisher(model, [], layers=["model.layers.0.mlp.gate"])
    batch = collate(make_examples([5]))
    assert len(fg.estimate_fisher(model, [batch], layers="*.experts.down_proj.*")) == 8
    named = fg.estimate_fisher(
        model, [batch], layers=lambda name, module: name.endswith("layers.0.mlp.experts.down_proj.1")
    )
    assert list(named) == ["model.layers.0.mlp.experts.down_proj.1"]


class Stacked(nn.Module):
    """Experts whose products cannot be told apart."""

    def __init__(self, form):
        super().__init__()
        self.num_experts, self.form = 2, form
        self.up_proj = nn.Parameter(torch.rand(2, 3, 3))

    def forward(self, x):
        rows = x[torch.tensor([0, 1])]
        if self.form == "batched":
            return torch.bmm(x[None].expand(2, -1, -1), self.up_proj).sum(0)
        if self.form == "computed":
            return x @ (self.up_proj[0] * 2)
        return rows.sum(0, keepdim=True) @ self.up_proj[1] + x


@pytest.mark.parametrize(
    ("form", "message"), [("batched", "never sliced"), ("computed", "plain product"), ("mixed", "traced to tokens")]
)
def test_experts_that_cannot_be_followed_are_refused_by_name(form, message):
    model = nn.Sequential(nn.Linear(3, 3), Stacked(form))
    with pytest.raises(ValueError, match=rf"'1'.*up_proj.*{message}"):
        fg.estimate_fisher(
            model, [torch.rand(4, 3)], layers=["1.up_proj.0", "1.up_proj.1"], loss=lambda m, b: m(b).sum(1)
        )
    assert "forward" not in vars(model[1]) and all(p.requires_grad for p in model.parameters())


def test_globs_mean_weights_unless_they_end_in_bias():
    model, batch = llama(attention_bias=True), collate(make_examples([5]))
    names = lambda layers: list(fg.estimate_fisher(model, [batch], layers=layers))
    prefix = "model.layers.0."
    heads = [f"{prefix}self_attn.{letter}_proj" for letter in "qkvo"]
    mlp = [f"{prefix}mlp.{part}_proj" for part in ("gate", "up", "down")]
    norms = [f"{prefix}input_layernorm", f"{prefix}post_attention_layernorm"]
    assert set(names("*layers.0.*")) == {*heads, *mlp, *norms}
    assert names("*layers.0.*.bias") == [f"{name}.bias" for name in heads]
    assert names("*layers.0.*+bias") == [f"{name}+bias" for name in heads]


def test_a_weight_tied_to_something_unknown_is_refused_by_name():
    class Foreign(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return x @ self.weight

    first = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"'0' shares its weight with '1' \(Foreign\)"):
        fg.estimate_fisher(nn.Sequential(first, Foreign(first.weight)), [], layers=["0"])
    with pytest.raises(ValueError, match=r"'0\+bias' has a parameter that is tied \(0, 1\)"):
        second = nn.Linear(3, 3)
        second.weight = first.weight
        fg.estimate_fisher(nn.Sequential(first, second), [], layers=["0+bias"])


def test_two_linears_that_share_a_weight_are_one_layer():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = randomised(nn.Sequential(first, nn.Tanh(), second))
    x = torch.randn(5, 4, dtype=torch.float64)
    loss = lambda model, batch: model(batch).sin().sum(1)
    gradients = example_gradients(model, {"0": lambda: gradient(model, "0.weight")}, x, loss)
    agrees(lambda **options: fg.estimate_fisher(model, [x[:3], x[3:]], layers=["0"], loss=loss, **options), gradients)


def test_a_head_tied_to_an_embedding_beside_its_own_bias():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids).tanh())

    model = randomised(Tied())
    ids = torch.randint(0, 7, (5, 3), generator=torch.Generator().manual_seed(0))
    views = {
        "table": lambda: gradient(model, "table.weight").T,
        "head.bias": lambda: gradient(model, "head.bias")[:, None],
    }
    loss = lambda model, batch: model(batch).sin().sum((1, 2))
    gradients = example_gradients(model, views, ids, loss)
    agrees(
        lambda **options: fg.estimate_fisher(model, [ids[:3], ids[3:]], layers=list(views), loss=loss, **options),
        gradients,
    )


def test_layers_are_selected_and_shaped_on_the_meta_device():
    from fishergeo.capture import select_layers

    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))
    chosen = select_layers(model, ["*.q_proj", "*.gate_up_proj.1", "model.norm", "model.embed_tokens"])
    shapes = {name.removeprefix("model."): layer.shape for name, layer in chosen.items()}
    assert shapes["embed_tokens"] == (12, VOCABULARY) and shapes["norm"] == (12, 1)
    assert shapes["layers.0.mlp.experts.gate_up_proj.1"] == (40, 12)
    assert shapes["layers.1.self_attn.q_proj"] == (12, 12)


@pytest.mark.parametrize("widths", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("structure", ["kfac", "kfac-sketch"])
def test_the_second_moment_of_a_decoders_inputs_holds_no_padding_that_only_its_labels_tell(widths, structure):
    torch.manual_seed(0)
    model = MODELS["t5"]().double()
    encoder, decoder = widths
    ids = torch.randint(3, VOCABULARY_OF_MODELS, (3, encoder))
    mask = (torch.arange(encoder) < torch.tensor([[encoder], [encoder - 1], [2]])).long()
    labels = torch.randint(3, VOCABULARY_OF_MODELS, (3, decoder))
    labels[torch.arange(decoder) >= torch.tensor([[2], [decoder], [decoder - 1]])] = -100
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    alone = [
        {
            "input_ids": ids[i : i + 1, :long],
            "attention_mask": mask[i : i + 1, :long],
            "labels": labels[i : i + 1, :said],
        }
        for i, (long, said) in enumerate(zip(mask.sum(1).tolist(), (labels != -100).sum(1).tolist(), strict=True))
    ]
    layers = ["encoder*.q", "encoder*.wo", "decoder*.q", "decoder*.k", "decoder*.wo"]
    together, apart = (fg.estimate_fisher(model, data, structure, layers=layers, rank=16) for data in ([batch], alone))
    for name in together:
        assert_close(together[name].to_dense(), apart[name].to_dense(), 1e-9)
