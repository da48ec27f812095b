"""Every structure against a loop over single examples, written without the package's code."""

import itertools

import pytest
import torch
from fisher_oracle import NAMES, assert_close, collate, make_examples, oracle, oracle_objective, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import fishergeo as fg


@pytest.mark.parametrize("kind", ["empirical", "margin"])
@settings(deadline=None, max_examples=6)
@given(
    order=st.permutations(range(6)),
    cuts=st.sets(st.integers(1, 5), max_size=5),
    padding=st.sampled_from(["left", "right"]),
)
def test_every_structure_agrees_with_the_loop_over_single_examples(kind, order, cuts, padding):
    model = tiny_llama()
    examples = make_examples([5, 9, 7, 9, 4, 6])
    gradients, kfac = oracle(model, examples, kind)
    shuffled = [examples[i] for i in order]
    edges = [0, *sorted(cuts), 6]
    batches = [collate(shuffled[a:b], padding) for a, b in itertools.pairwise(edges)]

    def estimate(structure, **options):
        return fg.estimate_fisher(model, batches, structure=structure, kind=kind, layers=list(NAMES), **options)

    output, inputs = estimate("gram"), estimate("gram", side="input")
    diagonal, kronecker = estimate("diagonal"), estimate("kfac")
    sketch, sketch_in = estimate("sketch", rank=20), estimate("sketch", rank=20, side="input")
    for name in NAMES:
        g = gradients[name]
        assert_close(output[name].to_dense(), (g @ g.mT).mean(0))
        assert_close(inputs[name].to_dense(), (g.mT @ g).mean(0))
        assert_close(diagonal[name].diagonal(), g.square().mean(0).flatten())
        assert_close(kronecker[name].output_factor, kfac[name][0])
        assert_close(kronecker[name].input_factor, kfac[name][1])
        assert_close(sketch[name].to_dense(), (g @ g.mT).mean(0))
        assert_close(sketch_in[name].to_dense(), (g.mT @ g).mean(0))
        assert_close(sketch[name].full_trace, g.square().sum() / len(g))


def test_kfac_is_exact_for_one_example_of_one_token():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4).double()
    x, weights = torch.randn(1, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    fisher = fg.estimate_fisher(model, [x], structure="kfac", loss=lambda m, b: (m(b).sin() * weights).sum(1))
    ((model(x).sin() * weights).sum()).backward()
    vector = model.weight.grad.flatten()
    assert_close(fisher[""].to_dense(), torch.outer(vector, vector))


@pytest.mark.parametrize("side", ["output", "input"])
def test_token_unit_takes_every_position_as_a_datum(side):
    model = tiny_llama()
    examples = make_examples([5, 8])
    name = NAMES[1]
    taken = []

    def hook(module, inputs, output):
        output.register_hook(lambda g: taken.append((inputs[0].detach()[0], g[0])))

    handle = model.get_submodule(name).register_forward_hook(hook)
    expected, tokens = 0, 0
    for ids, labels in examples:
        value, count = oracle_objective(model(input_ids=ids[None]).logits[0], labels, "empirical")
        (value * count).backward()
        tokens += count
        for a, g in zip(*taken.pop(), strict=True):
            one = torch.outer(g, a)
            expected = expected + (one @ one.T if side == "output" else one.T @ one)
    handle.remove()
    model.zero_grad(set_to_none=True)
    for structure in ("gram", "sketch"):
        fisher = fg.estimate_fisher(
            model, [collate(examples)], structure=structure, unit="token", side=side, layers=[name], rank=20
        )
        assert_close(fisher[name].to_dense(), expected / tokens)


def test_sampled_labels_do_not_depend_on_batching_or_padding():
    model = tiny_llama()
    examples = make_examples([5, 9, 7])
    one = fg.estimate_fisher(model, [collate(examples)], structure="gram", kind="mc", seed=3)
    other = fg.estimate_fisher(
        model, [collate(examples[:1], "left"), collate(examples[1:], "left")], structure="gram", kind="mc", seed=3
    )
    for name in one:
        assert_close(other[name].to_dense(), one[name].to_dense())


def test_sampled_labels_average_to_the_fisher_information():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4, bias=False).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    p = model(x).softmax(1).detach()
    expected = sum(
        weight * torch.outer(torch.outer(e - row, one).flatten(), torch.outer(e - row, one).flatten())
        for one, row in zip(x, p, strict=True)
        for weight, e in zip(row, torch.eye(4, dtype=torch.float64), strict=True)
    ) / len(x)

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = model

        def forward(self, x):
            return self.linear(x)

    batch = {"x": x.repeat(4000, 1), "labels": torch.zeros(20000, dtype=torch.long)}
    fisher = fg.estimate_fisher(Wrapped(), [batch], structure="diagonal", kind="mc")
    assert_close(fisher["linear"].diagonal(), expected.diagonal(), 0.03)
