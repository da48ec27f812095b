"""Influence scores against dense inverses, their laws, blocks on disk, and what is refused."""

import dataclasses
import types

import pytest
import small_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import EXPERTS, Routed, expert_gradients, routed_batch, summed
from uses_cases import (
    LAYERS,
    STRUCTURES,
    batches,
    classifier,
    dense_fisher,
    estimated,
    examples,
    gradients,
    loss,
    moved,
    psd,
    random,
)

import fishergeo as fg

SEEDS = st.integers(0, 99)


def by_hand(dense, queries, trained, damping):
    """Σ_l g_qᵀ (F + δI)⁻¹ g_i with the matrices written out."""
    total = 0.0
    for name in LAYERS:
        level = 0.1 * dense[name].diagonal().mean() if damping is None else damping
        inverse = torch.linalg.inv(dense[name] + level * torch.eye(len(dense[name]), dtype=torch.float64))
        total = total + queries[name].flatten(1) @ inverse @ trained[name].flatten(1).T
    return total


def close(found, expected, tolerance=1e-8):
    return (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("damping", [None, 1e-2])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_scores_are_those_of_the_dense_inverse(structure, damping):
    model, data, asked = classifier(), examples(11), examples(3, seed=20)
    fisher, dense = estimated(model, data, structure), dense_fisher(model, data, structure)
    found = fg.influence(model, fisher, batches(asked, 2), batches(data), damping=damping, loss=loss)
    assert close(found.values, by_hand(dense, gradients(model, asked), gradients(model, data), damping))
    assert found.examples.tolist() == [list(range(11))] * 3 and found.tokens is None


@pytest.mark.parametrize("side", ["output", "input"])
def test_one_sided_operators(side):
    model, data = classifier(), examples(5)
    matrix = psd(3 if side == "output" else 4)
    found = fg.influence(
        model, {"2": fg.DenseOperator(matrix, side)}, batches(data), batches(data), damping=0.1, loss=loss
    )
    g = gradients(model, data)["2"]
    inverse = torch.linalg.inv(matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64))
    turned = inverse @ g if side == "output" else g @ inverse
    expected = torch.einsum("qij,nij->qn", turned, g)
    assert close(found.values[:, :5], expected) and found.values.shape == (5, 5)


@settings(deadline=None, max_examples=8)
@given(seed=SEEDS, structure=st.sampled_from(STRUCTURES))
def test_an_example_never_speaks_against_itself_and_scores_are_symmetric(seed, structure):
    model, data = classifier(seed), examples(6, seed)
    scores = fg.influence(model, estimated(model, data, structure), [data], [data], loss=loss).values
    assert bool((scores.diagonal() >= 0).all())
    assert close(scores, scores.T, 1e-10)
    assert float(torch.linalg.eigvalsh(scores)[0]) >= -1e-9 * float(scores.abs().max())


@settings(deadline=None, max_examples=6)
@given(seed=SEEDS, cuts=st.tuples(st.integers(1, 7), st.integers(1, 3)))
def test_how_the_examples_are_batched_does_not_matter(seed, cuts):
    model, data, asked = classifier(seed), examples(7, seed), examples(3, seed + 50)
    fisher = estimated(model, data, "ekfac")
    whole = fg.influence(model, fisher, [asked], [data], loss=loss).values
    cut = fg.influence(model, fisher, batches(asked, cuts[1]), batches(data, cuts[0]), loss=loss).values
    assert close(cut, whole, 1e-12)


@settings(deadline=None, max_examples=6)
@given(seed=SEEDS)
def test_much_damping_leaves_the_inner_product_of_gradients(seed):
    model, data = classifier(seed), examples(6, seed)
    scores = fg.influence(model, estimated(model, data, "kfac"), [data], [data], damping=1e8, loss=loss).values
    plain = sum(g.flatten(1) @ g.flatten(1).T for g in gradients(model, data).values())
    assert close(1e8 * scores, plain, 1e-6)


@settings(deadline=None, max_examples=6)
@given(seed=SEEDS, top=st.integers(1, 9))
def test_the_best_of_all_blocks_are_the_best_of_all(seed, top):
    model, data, asked = classifier(seed), examples(9, seed), examples(2, seed + 50)
    fisher = estimated(model, data, "diagonal")
    whole = fg.influence(model, fisher, [asked], batches(data, 4), loss=loss)
    kept = fg.influence(model, fisher, [asked], batches(data, 4), loss=loss, top=top)
    assert kept.values.shape == (2, top)
    assert torch.equal(kept.values, whole.top(top).values) and torch.equal(kept.examples, whole.top(top).examples)


def language():
    model = small_models.SmallLM()
    data = small_models.make_examples([5, 3, 6, 4], seed=2)
    return model, small_models.split(data, [2]), small_models.split(data[:2], [])


def test_tokens_add_up_to_their_example():
    model, trained, asked = language()
    fisher = fg.estimate_fisher(model, trained, "ekfac", layers=["first", "second+bias"], reduction="sum")
    options = {"damping": 1e-2, "reduction": "sum"}
    whole = fg.influence(model, fisher, asked, trained, **options)
    each = fg.influence(model, fisher, asked, trained, tokens=True, **options)
    assert each.values.shape == (2, 18) and each.tokens[0].tolist() == [*range(5), *range(3), *range(6), *range(4)]
    assert close(each.by_example(4), whole.values, 1e-10)
    best = each.top(3)
    assert torch.equal(best.values[:, 0], each.values.amax(1)) and best.tokens.shape == (2, 3)
    unpadded = small_models.split(small_models.make_examples([4, 4]), [])
    plain = fg.influence(model, fisher, asked, unpadded, tokens=True, **options)
    assert plain.tokens[0].tolist() == [0, 1, 2, 3] * 2


def test_a_token_scores_by_what_its_position_adds_to_the_gradient():
    model, trained, asked = language()
    fisher = {"first": fg.DiagonalOperator(torch.ones(7, 6).double())}
    each = fg.influence(model, fisher, asked, trained, tokens=True, damping=0.0, reduction="sum")
    g = small_models.atoms(model, [(b["input_ids"][i][b["attention_mask"][i] == 1], b["labels"][i][b["attention_mask"][i] == 1])
                                   for b in trained for i in range(2)], "empirical", ["first"])  # fmt: skip
    counts = [sum(int(label != -100) for label in b["labels"][i][1:]) for b in trained for i in range(2)]
    rows = [atom[0][1]["first"] for atom in g]
    query = [count * row[0] for count, row in zip(counts[:2], rows[:2], strict=True)]
    expected = torch.cat(
        [count * ((row[1] @ query[1]) * row[2]).sum(1) for count, row in zip(counts, rows, strict=True)]
    )
    assert close(each.values[1], expected, 1e-9)


def test_blocks_on_disk_are_read_and_not_made_again(tmp_path, monkeypatch):
    model, data, asked = classifier(), examples(9), examples(3, seed=20)
    fisher = estimated(model, data, "kfac")
    ask = lambda **more: fg.influence(
        model, fisher, batches(asked, 2), batches(data, 4), loss=loss, path=tmp_path, **more
    )
    whole = ask(damping=0.1)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 6
    files[4].unlink()
    calls = []
    original = fg.uses.tracing.estimate_fisher
    monkeypatch.setattr(fg.uses.tracing, "estimate_fisher", lambda *a, **k: calls.append(1) or original(*a, **k))
    again = ask(damping=0.1)
    assert len(calls) == 2 and torch.equal(again.values, whole.values)  # one block's queries and its examples
    with pytest.raises(ValueError, match="made with other damping"):
        ask(damping=0.2)
    with pytest.raises(ValueError, match="made with other top"):
        ask(damping=0.1, top=2)
    fisher = estimated(model, examples(9, seed=3), "kfac")
    with pytest.raises(ValueError, match="made with other fisher"):
        ask(damping=0.1)


def test_blocks_of_another_loss_or_fisher_are_not_taken_for_those_of_this_one(tmp_path):
    model, x = torch.nn.Linear(2, 1, bias=False), torch.eye(2)
    operator = lambda *entries: {"": fg.DiagonalOperator(torch.tensor([entries]))}
    ask = lambda fisher, loss: fg.influence(model, fisher, [x], [2 * x], damping=0.0, loss=loss, path=tmp_path)
    first = ask(operator(1.0, 1.0), lambda m, x: m(x)[:, 0])
    with pytest.raises(ValueError, match="made with other data"):
        ask(operator(1.0, 1.0), lambda m, x: 5 * m(x)[:, 0])
    with pytest.raises(ValueError, match="made with other fisher"):
        ask(operator(0.5, 1.5), lambda m, x: m(x)[:, 0])  # of the same trace
    assert torch.equal(ask(operator(1.0, 1.0), lambda m, x: m(x)[:, 0]).values, first.values)


def test_blocks_of_other_batches_are_not_taken_for_those_of_these(tmp_path):
    model, data, asked = classifier(), examples(9), examples(3, seed=20)
    fisher = estimated(model, data, "kfac")
    ask = lambda queries, trained: fg.influence(model, fisher, queries, trained, loss=loss, path=tmp_path)
    ask(batches(asked, 3), batches(data, 4))
    for queries, trained in [
        (batches(examples(3, seed=21), 3), batches(data, 4)),
        (batches(asked, 3), batches(data, 3)),
        (batches(asked, 3), batches(examples(9, seed=4), 4)),
    ]:
        with pytest.raises(ValueError, match="made with other batches"):
            ask(queries, trained)


@dataclasses.dataclass
class Named:
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass(slots=True)
class Slotted:
    x: torch.Tensor
    y: torch.Tensor


class Plain:
    def __init__(self, x, y):
        self.x, self.y = x, y


@pytest.mark.parametrize("kind", [Named, Slotted, Plain, lambda x, y: types.SimpleNamespace(x=x, y=y)])
def test_batches_of_ones_own_class_are_told_by_what_they_hold(kind, tmp_path):
    model, data = classifier(), examples(5)
    fisher = estimated(model, data, "kfac")
    of_named = lambda m, b: loss(m, (b.x, b.y))
    ask = lambda queries: fg.influence(model, fisher, [queries], [kind(*data)], loss=of_named, path=tmp_path)
    first = ask(kind(*examples(2, seed=20)))
    assert torch.equal(ask(kind(*examples(2, seed=20))).values, first.values)
    with pytest.raises(ValueError, match="made with other batches"):
        ask(kind(*examples(2, seed=21)))


def test_tokens_are_counted_by_example_whatever_stands_first_in_a_batch():
    class Placed(small_models.SmallLM):
        def forward(self, input_ids, places=None):
            return super().forward(input_ids)

    batch = small_models.collate(small_models.make_examples([5, 5, 5]))
    del batch["attention_mask"]
    model, layers = Placed(), list(small_models.LAYERS)
    fisher = fg.estimate_fisher(model, [batch], "kfac", layers=layers)
    found = fg.influence(
        model, fisher, [batch], [{"places": torch.arange(5)[None]} | batch], tokens=True, reduction="sum"
    )
    assert found.examples[0].tolist() == [0] * 5 + [1] * 5 + [2] * 5 and found.tokens[0].tolist() == [*range(5)] * 3


class TimeFirst(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 6), torch.nn.Linear(6, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.transpose(0, 1)))).mean((0, 2))


@pytest.mark.parametrize("single", ["queries", "examples"])
def test_one_query_proves_neither_several_queries_nor_the_examples(single):
    torch.manual_seed(0)
    model, x = TimeFirst().double(), torch.randn(4, 4, 3, dtype=torch.float64)
    fisher = {"a": fg.DiagonalOperator(torch.ones(6, 3).double())}
    parts = [x[:1], x] if single == "queries" else [x[:1]], [x[:1], x]
    with pytest.raises(RuntimeError, match="not autograd's"):
        fg.influence(model, fisher, *parts, damping=0.0, loss=lambda m, b: m(b).square())


def test_what_is_refused_is_named():
    model, data = classifier(), examples()
    fisher = estimated(model, data, "kfac")
    with pytest.raises(ValueError, match="fingerprint"):
        fg.influence(moved(classifier()), fisher, [data], [data], loss=loss)
    with pytest.raises(ValueError, match="damping=0 leaves layer '2' singular"):
        fg.influence(model, fisher, [data], [data], damping=0.0, loss=loss)
    for option in ({"unit": "token"}, {"decay": 0.5}, {"example_weights": lambda batch: torch.ones(6)}):
        with pytest.raises(ValueError, match="own gradient"):
            fg.influence(model, fisher, [data], [data], loss=loss, **option)
    with pytest.raises(ValueError, match="query_data: influence takes"):
        fg.influence(model, fisher, [data], [data], loss=loss, query_data=fg.DataOptions(kind="mc"))
    with pytest.raises(TypeError, match="list or a loader"):
        fg.influence(model, fisher, [data], iter([data]), loss=loss)
    with pytest.raises(TypeError, match="unexpected keyword"):
        fg.influence(model, fisher, [data], [data], losses=loss)
    with pytest.raises(ValueError, match="top"):
        fg.influence(model, fisher, [data], [data], loss=loss, top=0)
    with pytest.raises(ValueError, match="queries hold no batch"):
        fg.influence(model, fisher, [], [data], loss=loss)
    with pytest.raises(ValueError, match="examples hold no batch"):
        fg.influence(model, fisher, [data], [], loss=loss)


def test_examples_without_a_supervised_token_and_means_of_tokens_are_refused():
    model, trained, asked = language()
    fisher = {"first": fg.DiagonalOperator(random(7, 6).square())}
    with pytest.raises(ValueError, match="reduction='sum'"):
        fg.influence(model, fisher, asked, trained, tokens=True)
    trained[1]["labels"][0] = -100
    with pytest.raises(ValueError, match="1 of 2 examples of a batch have no supervised token"):
        fg.influence(model, fisher, asked, trained, damping=0.1)


@pytest.mark.parametrize("names", [EXPERTS[1:], EXPERTS])
def test_examples_that_an_expert_does_not_see_score_zero_by_it_and_the_others_are_their_own(names):
    model, x, asked = Routed(), routed_batch(7, 2), routed_batch(5, 2, seed=8)
    trained, queries = expert_gradients(model, x), expert_gradients(model, asked)
    fisher = {name: fg.DiagonalOperator(random(3, 4, seed=5).square() + 1) for name in names}
    found = fg.influence(model, fisher, [asked], [x[:4], x[4:]], damping=0.0, loss=summed)
    weighed = {name: queries[name] / fisher[name].entries for name in names}
    assert found.examples.tolist() == [list(range(7))] * 5
    assert close(found.values, sum(weighed[name].flatten(1) @ trained[name].flatten(1).T for name in names))
    options = {"damping": 0.0, "loss": summed, "reduction": "sum"}
    each = fg.influence(model, fisher, [asked], [x[:4], x[4:]], tokens=True, **options)
    assert each.tokens[0].tolist() == [0, 1] * 7 and close(each.by_example(7), found.values)
    one = lambda model, x: torch.sin(model(x)).sum(2).flatten()
    apart = expert_gradients(model, x.reshape(14, 1, 4), one)
    assert close(each.values, sum(weighed[name].flatten(1) @ apart[name].flatten(1).T for name in names))
