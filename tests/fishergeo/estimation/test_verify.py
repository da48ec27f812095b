"""Every estimate proves itself: what is captured is held against autograd, and nothing that is right is refused."""

import copy
import dataclasses

import pytest
import torch
from architectures import MODELS, VOCABULARY, make
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LAYERS, SmallLM, collate, make_examples, split
from torch import nn

import fishergeo as fg
from fishergeo.capture import records

EXAMPLES = make_examples([5, 3, 7, 4, 6])


def language_batch(family, side="right"):
    generator = torch.Generator().manual_seed(0)
    batch = collate(make_examples([6, 9, 4, 5]), side)
    batch["input_ids"] = torch.randint(3, VOCABULARY, batch["input_ids"].shape, generator=generator)
    batch["input_ids"] *= batch["attention_mask"]
    if family == "classifier":
        return batch | {"labels": torch.tensor([0, 2, 1, 1])}
    labels = torch.where(batch["labels"] == -100, -100, batch["input_ids"])
    labels[:, 0] = torch.where(batch["attention_mask"][:, 0] == 0, -100, labels[:, 0])
    return batch | {"labels": labels}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", MODELS)
def test_no_false_alarm_on_any_architecture_in_any_precision(family, dtype):
    torch.manual_seed(0)
    model = MODELS[family]()
    if family == "mixtral":
        model.set_experts_implementation("eager")
    model = model.to(dtype)
    layers = {"mixtral": ["*.experts.*", "*_proj", "*norm*"], "gpt2": "transformer.h.*"}.get(family)
    fg.estimate_fisher(model, [language_batch(family)], ["gram", "diagonal"], layers=layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", MODELS)
def test_no_false_alarm_under_an_adapter(family, dtype):
    model = make(family, dtype=dtype)
    if family == "mixtral":
        model.base_model.model.set_experts_implementation("eager")
    layers = ["*.lora_?.*", "*.base_layer"] if family != "mixtral" else "*q_proj*"
    fg.estimate_fisher(model, [language_batch(family, "left")], "diagonal", layers=layers)


@settings(max_examples=12)
@given(
    kind=st.sampled_from(["empirical", "mc", "type2", "ggn", "margin"]),
    unit=st.sampled_from(["sequence", "token"]),
    reduction=st.sampled_from(["mean", "sum"]),
    side=st.sampled_from(["left", "right"]),
    weighted=st.booleans(),
    cut=st.integers(1, 4),
    decay=st.sampled_from([1.0, 0.9]),
)
def test_no_false_alarm_whatever_is_differentiated(kind, unit, reduction, side, weighted, cut, decay):
    batches = split(EXAMPLES, [cut], side)
    options = {"decay": decay, "kind": kind, "unit": unit, "reduction": reduction}
    if weighted:
        for batch in batches:
            batch["w"] = torch.rand(len(batch["labels"]), generator=torch.Generator().manual_seed(1))
            batch["tokens"] = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(2))
        options |= {"example_weights": "w", "token_weights": "tokens"}
    fg.estimate_fisher(SmallLM(), batches, ["gram", "kfac", "ekfac"], layers=list(LAYERS), **options)


@dataclasses.dataclass
class Odd:
    """A batch whose examples stand along the second dimension."""

    x: torch.Tensor


class Opaque:
    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: Odd(x.mT), Opaque, lambda x: {"x": x, "text": ["a"] * len(x)},
                                  lambda x: [x, None, 3.0], lambda x: (x, torch.ones(3))])  # fmt: skip
def test_batches_of_any_structure_are_proven(wrap):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def loss(model, batch):
        if isinstance(batch, Odd):
            x = batch.x.mT
        elif isinstance(batch, Opaque):
            x = batch.x
        else:
            x = batch["x"] if isinstance(batch, dict) else batch[0] if isinstance(batch, list | tuple) else batch
        return model(x).square().sum(1)

    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fg.estimate_fisher(model, [wrap(x)], "gram", loss=loss)
    with pytest.raises(RuntimeError, match="2 of 2 layers are not autograd's"):
        broken_view(lambda: fg.estimate_fisher(model, [wrap(x)], "gram", loss=loss))


def broken_view(action, change=lambda a, g: (a, g * 1.1)):
    """Runs with every layer's rows changed on their way into the record."""
    kept = records._terms
    try:

        def terms(*arguments):
            a, g, mask = kept(*arguments)
            return *change(a, g), mask

        records._terms = terms
        return action()
    finally:
        records._terms = kept


@settings(max_examples=12)
@given(
    examples=st.integers(2, 6),
    form=st.sampled_from(["roll", "swap", "scale", "lost", "cut"]),
    cuttable=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_rows_that_are_wrong_or_under_the_wrong_example_are_found(examples, form, cuttable, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 10), nn.Tanh(), nn.Linear(10, 7)).to(dtype)
    x = torch.randn(examples, 3, 9).to(dtype)
    loss = lambda m, b: m(b.x if isinstance(b, Opaque) else b).float().square().mean((1, 2)).to(torch.float64)

    def change(a, g):
        if form == "scale":
            return a * 0.8, g
        if form == "lost":
            return torch.cat([torch.zeros_like(a[:, :1]), a[:, 1:]], 1), g
        if form == "cut":
            return a, torch.cat([torch.zeros_like(g[:1]), g[1:]])
        order = torch.arange(len(a)).roll(1)
        if form == "swap":
            order = torch.arange(len(a))
            order[0], order[-1] = order[-1].clone(), order[0].clone()
        return a[order], g[order]

    batch = x if cuttable else Opaque(x)
    with pytest.raises(RuntimeError, match="2 of 2 layers are not autograd's"):
        broken_view(lambda: fg.estimate_fisher(model, [batch], "gram", loss=loss), change)
    assert broken_view(lambda: fg.estimate_fisher(model, [batch], "gram", loss=loss, verify=False), change)


def test_a_parameter_that_another_module_reads_is_found():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return nn.functional.linear(self.b(self.a(x).tanh()).tanh(), self.a.weight)

    loss = lambda m, b: m(b).square().sum(1)
    with pytest.raises(RuntimeError, match=r"1 of 2 layers are not autograd's: 'a'.*read by another module"):
        fg.estimate_fisher(Reader().double(), [torch.ones(2, 3).double()], "gram", loss=loss)


def test_losses_over_the_batch_are_found():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def contrastive(model, batch):
        z = model(batch)
        return nn.functional.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")

    with pytest.raises(RuntimeError, match=r"in its batch and .* alone.*act on each other"):
        fg.estimate_fisher(model, [torch.randn(4, 3).double()], "gram", loss=contrastive)


# What it costs, and what it leaves.


def counted(model):
    """Examples that go through the model forward, and backward."""
    seen = [0, 0]

    def hook(module, args, kwargs, output):
        logits = output["logits"]
        if logits.requires_grad:
            logits.register_hook(lambda g: seen.__setitem__(1, seen[1] + len(g)))
        seen[0] += len(logits)

    model.register_forward_hook(hook, with_kwargs=True)
    return seen


@pytest.mark.parametrize("kind", ["empirical", "mc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_costs_one_batch_in_a_two_pass_estimate_and_in_many_streamed_products(kind, dtype):
    model, batches = SmallLM(dtype=dtype), split(EXAMPLES, [3])
    seen = counted(model)
    fg.estimate_fisher(model, batches, ["ekfac", "gram"], layers=list(LAYERS), kind=kind)
    assert seen == [13, 13]
    stream = fg.StreamingFisher(model, batches, kind=kind, layers=list(LAYERS))
    for _ in range(3):
        stream.multi_matmul({name: torch.ones(p, 1) for name, (p, _) in LAYERS.items()})
    assert seen == [13 + 18, 13 + 18]
    fg.sketch_shards(model, batches, 2, rank=2, layers=list(LAYERS), kind=kind)
    assert seen == [13 + 18 + 8, 13 + 18 + 8]
    fg.estimate_fisher(model, batches, "gram", layers=list(LAYERS), kind=kind, verify=False)
    assert seen == [13 + 18 + 8 + 5, 13 + 18 + 8 + 5]


def test_one_objective_of_many_is_proven():
    model = SmallLM()
    seen = counted(model)
    fg.estimate_fisher(model, [collate(EXAMPLES[:2])], "gram", layers=list(LAYERS), kind="type2")
    draws = 5 * max(int((labels[1:] != -100).sum()) for _, labels in EXAMPLES[:2])
    assert seen == [2 * draws + 2, 2 * draws + 2]


@pytest.mark.parametrize("kind", ["empirical", "mc", "margin", "ggn"])
def test_estimates_are_the_same_bits_with_and_without(kind):
    model = SmallLM(dtype=torch.float32)
    structures = ["gram", "sketch", "diagonal", "kfac", "ekfac", "exact"]
    found = [
        fg.estimate_fisher(
            model, split(EXAMPLES, [2]), structures, layers=list(LAYERS), kind=kind, rank=3, verify=verify
        )
        for verify in (True, False)
    ]
    for structure in structures:
        for name in LAYERS:
            mine, other = (f[structure].accumulators[name].sums for f in found)
            assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_the_model_its_hooks_its_gradients_and_all_random_states_are_left():
    model = SmallLM(dtype=torch.float32)
    calls = []
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
        parameter.register_hook(lambda g: calls.append("gradient"))
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    model.embed.weight.requires_grad_(False)
    model.train()
    kept = {name: (p, p._version, p.requires_grad, p.grad) for name, p in model.named_parameters()}
    hooks = {name: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for name, m in model.named_modules()}
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fg.estimate_fisher(model, [collate(EXAMPLES)], "gram", layers=[*LAYERS, "embed", "first.bias"])
    assert calls == [] and torch.equal(torch.get_rng_state(), random) and model.training
    for name, parameter in model.named_parameters():
        same, version, flag, gradient = kept[name]
        assert parameter is same and parameter._version == version and parameter.requires_grad == flag
        assert parameter.grad is gradient and bool((gradient == 1).all())
    assert {name: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_a_model_that_draws_at_random_in_eval_mode_is_proven_on_the_same_draws():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)) * torch.rand(len(x), 5, dtype=x.dtype))

    fg.estimate_fisher(
        Noisy().double(), [torch.ones(4, 3).double()] * 2, "gram", loss=lambda m, b: m(b).square().sum(1)
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_and_parametrised_models_are_proven(reentrant):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
            nn.utils.parametrizations.weight_norm(self.block[0])

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.block, self.first(x), use_reentrant=reentrant)

    model, loss = Stack().double(), lambda m, b: m(b).square().sum(1)
    x = torch.randn(4, 3).double()
    fg.estimate_fisher(model, [x], "gram", loss=loss)
    with pytest.raises(RuntimeError, match=r"2 of 2 layers.*'block\.0'"):
        broken_view(lambda: fg.estimate_fisher(model, [x], "gram", loss=loss))


def test_the_first_batch_with_a_supervised_token_is_the_one_that_is_proven():
    model, empty = SmallLM(), collate(EXAMPLES[:2])
    empty["labels"] = torch.full_like(empty["labels"], -100)
    with pytest.raises(RuntimeError, match="autograd"):
        broken_view(lambda: fg.estimate_fisher(model, [empty, collate(EXAMPLES)], "gram", layers=list(LAYERS)))


class TimeFirst(nn.Module):
    """Reads (T, n, 3): rows of its first layer stand under other examples, unless there is but one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, batch):
        return self.b(torch.tanh(self.a(batch.transpose(0, 1)))).mean((0, 2))


@pytest.mark.parametrize("sizes", [[1, 4, 3], [4, 1], [1, 1, 4]])
def test_a_batch_that_shows_more_than_those_before_it_is_proven_too(sizes):
    x = [torch.randn(n, 4, 3, dtype=torch.float64) for n in sizes]
    loss = lambda m, b: m(b).square()
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="2 of 2 layers"):
        fg.estimate_fisher(TimeFirst().double(), x, "gram", loss=loss)
    stream = fg.StreamingFisher(TimeFirst().double(), x, loss=loss)
    with pytest.raises(RuntimeError, match="2 of 2 layers"):
        stream.multi_matmul({name: torch.ones(size, 1).double() for name, size in stream.sizes.items()})


def test_the_first_padded_batch_is_proven_too():
    model, whole, padded = SmallLM(), collate(make_examples([6, 6, 6])), collate(make_examples([6, 4, 3]))
    fg.estimate_fisher(model, [whole, padded], "gram", layers=list(LAYERS))
    padded["labels"] = torch.where(padded["labels"] == -100, padded["input_ids"], padded["labels"])
    with pytest.raises(RuntimeError, match="padding counts"):
        fg.estimate_fisher(model, [whole, padded], "gram", layers=list(LAYERS))


def test_a_batch_that_shows_no_more_is_not_proven_again():
    model, batches = SmallLM(), split(EXAMPLES, [1, 2, 4])
    seen = counted(model)
    fg.estimate_fisher(model, batches, "gram", layers=list(LAYERS))
    more = seen[1] - len(EXAMPLES)
    assert [len(batch["labels"]) for batch in batches] == [1, 1, 2, 1] and more == 1 + 2
    seen[:] = [0, 0]
    fg.estimate_fisher(model, batches[::-1], "gram", layers=list(LAYERS))
    assert seen[1] - len(EXAMPLES) == 1 + 2


def test_gradients_that_float16_does_not_hold_are_refused_or_told():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).half(), torch.randn(4, 3).half()
    loss = lambda scale: lambda m, b: m(b).float().square().sum(1) * scale
    fg.estimate_fisher(model, [x], "gram", loss=loss(1.0))
    with pytest.raises(FloatingPointError, match=r"layer '.': its gradients reach .* float16.*multiply the loss"):
        fg.estimate_fisher(model, [x], "gram", loss=loss(1e-6), verify=False)
    with pytest.warns(UserWarning, match="zero in float16"):
        fg.estimate_fisher(model, [x], "gram", loss=loss(1e-12), verify=False)
    fg.estimate_fisher(model.float(), [x.float()], "gram", loss=loss(1e-9))
