"""Every structure against a loop over single examples, written without the package's code."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import fishergeo as fg

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj")
VOCABULARY = 40


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).double().eval()


def make_examples(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(1, length - 1, (1,), generator=generator))] = -100
        examples.append((ids, labels))
    return examples


def collate(examples, side="right"):
    width = max(len(ids) for ids, _ in examples)
    batch = {
        "input_ids": torch.zeros(len(examples), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(examples), width, dtype=torch.long),
        "labels": torch.full((len(examples), width), -100),
    }
    for row, (ids, labels) in enumerate(examples):
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        batch["input_ids"][row, place] = ids
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = labels
    return batch


def oracle_objective(logits, labels, kind):
    """Mean over supervised tokens of one example's cross-entropy or margin, token by token."""
    terms = []
    for position in range(len(labels) - 1):
        target = int(labels[position + 1])
        if target == -100:
            continue
        row = logits[position]
        others = torch.cat([row[:target], row[target + 1 :]])
        over = row if kind == "empirical" else others
        terms.append(torch.log(torch.exp(over).sum()) - row[target])
    return sum(terms) / len(terms), len(terms)


def oracle(model, examples, kind="empirical"):
    """Per layer: weight gradients (N, p, q), KFAC factors, one example at a time with W.grad and plain hooks."""
    gradients = {name: [] for name in NAMES}
    factors = {name: [0.0, 0.0, 0] for name in NAMES}
    taken = {}
    handles = []
    for name in NAMES:

        def hook(module, inputs, output, name=name):
            taken[name] = inputs[0].detach()[0]
            output.register_hook(lambda g: factors[name].__setitem__(0, factors[name][0] + g[0].T @ g[0]))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    for ids, labels in examples:
        model.zero_grad(set_to_none=True)
        value, _ = oracle_objective(model(input_ids=ids[None]).logits[0], labels, kind)
        value.backward()
        for name in NAMES:
            gradients[name].append(model.get_submodule(name).weight.grad.clone())
            factors[name][1] = factors[name][1] + taken[name].T @ taken[name]
            factors[name][2] += len(ids)
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    count = len(examples)
    kfac = {name: (s / count, a / tokens) for name, (s, a, tokens) in factors.items()}
    return {name: torch.stack(g) for name, g in gradients.items()}, kfac


def assert_close(actual, expected, tolerance=1e-10):
    assert (actual - expected).norm() <= tolerance * expected.norm()


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
