"""The joint Fisher of several layers against gradients laid end to end, and what the sum over layers leaves out."""

import itertools

import pytest
import torch
from fisher_oracle import NAMES, assert_close, collate, make_examples, oracle, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import EXPERTS, Routed, Switched, expert_gradients, routed_batch, summed

import fishergeo as fg


def estimated(examples, cuts=(2,), **options):
    model = tiny_llama()
    edges = [0, *cuts, len(examples)]
    batches = [collate(examples[a:b]) for a, b in itertools.pairwise(edges)]
    fisher = fg.estimate_fisher(model, batches, structure="exact", layers=list(NAMES), **options)
    return model, fg.JointFisher(dict(fisher))


def updates(fisher, seed, rank=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: operator.layer_shape for name, operator in fisher.operators.items()}
    return {
        name: fg.LowRank(
            torch.randn(p, rank, generator=generator, dtype=torch.float64),
            torch.randn(rank, q, generator=generator, dtype=torch.float64),
        )
        for name, (p, q) in shapes.items()
    }


@settings(deadline=None, max_examples=8)
@given(lengths=st.lists(st.integers(4, 14), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_it_is_the_quadratic_form_of_gradients_laid_end_to_end(lengths, seed):
    examples = make_examples(lengths, seed)
    model, joint = estimated(examples, cuts=(1,))
    gradients, _ = oracle(model, examples)
    moved = updates(joint, seed)
    end_to_end = torch.cat([gradients[name].flatten(1) for name in NAMES], 1)
    delta = torch.cat([(moved[name].left @ moved[name].right).flatten() for name in NAMES])
    assert_close(joint.inner(moved), end_to_end @ delta)
    assert_close(joint.quadratic(moved), (end_to_end @ delta).square().mean())
    assert_close(joint.dual(), end_to_end @ end_to_end.T / len(examples))
    assert_close(joint.trace(), end_to_end.square().sum() / len(examples))
    dense = {name: one.left @ one.right for name, one in moved.items()}
    assert_close(joint.inner(dense), joint.inner(moved))


def test_a_layer_that_does_not_move_adds_nothing_and_one_alone_is_its_own_block():
    _, joint = estimated(make_examples([6, 9, 7]))
    moved = updates(joint, 0)
    name = NAMES[1]
    assert_close(joint.quadratic({name: moved[name]}), joint.operators[name].quadratic(moved[name]))


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 999))
def test_it_lies_between_nothing_and_the_number_of_layers_times_the_sum_of_blocks(seed):
    _, joint = estimated(make_examples([6, 9, 7]))
    moved = updates(joint, seed)
    blocks = sum(float(joint.operators[name].quadratic(moved[name])) for name in NAMES)
    assert -1e-12 <= float(joint.quadratic(moved)) <= len(NAMES) * blocks * (1 + 1e-10)


def test_effects_that_cancel_between_layers_cost_nothing_although_every_block_charges_them():
    _, joint = estimated(make_examples([8]), cuts=())
    first, second = NAMES[:2]
    moved = updates(joint, 3)
    ratio = float(joint.inner({first: moved[first]}) / joint.inner({second: moved[second]}))
    cancelling = {first: moved[first], second: moved[second] * -ratio}
    blocks = sum(float(joint.operators[name].quadratic(delta)) for name, delta in cancelling.items())
    assert blocks > 0 and float(joint.quadratic(cancelling)) < 1e-20 * blocks


def test_its_gradient_in_the_factors_is_that_of_the_dense_form():
    model, joint = estimated(make_examples([6, 9, 7]))
    moved = updates(joint, 1)
    for one in moved.values():
        one.left.requires_grad_(True)
    joint.quadratic(moved).backward()
    gradients, _ = oracle(model, make_examples([6, 9, 7]))
    inner = joint.inner(moved).detach()
    for name, one in moved.items():
        expected = torch.einsum("i,ipq->pq", 2 * inner / len(inner), gradients[name]) @ one.right.T
        assert_close(one.left.grad, expected)


def test_what_does_not_belong_together_is_refused_by_name():
    one = fg.ExactOperator(torch.eye(2), torch.ones(2, 1), torch.tensor([1, 1]), count=2)
    other = fg.ExactOperator(torch.eye(2), torch.ones(2, 1), torch.tensor([2]), count=1)
    with pytest.raises(ValueError, match="operators is empty"):
        fg.JointFisher({})
    with pytest.raises(ValueError, match="layer 'b' has seen 1 examples, divided by 1, and 'a' 2, divided by 2"):
        fg.JointFisher({"a": one, "b": other})
    with pytest.raises(TypeError, match="layer 'a' has a DenseOperator; estimate the Fisher with structure='exact'"):
        fg.JointFisher({"a": fg.DenseOperator(torch.eye(2))})
    joint = fg.JointFisher({"a": one})
    with pytest.raises(ValueError, match="updates names layers that this Fisher does not have: 'b'"):
        joint.quadratic({"b": torch.zeros(2, 1)})
    with pytest.raises(ValueError, match="updates is empty"):
        joint.quadratic({})
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        joint.quadratic({"a": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match="one update at a time"):
        joint.quadratic({"a": torch.zeros(4, 2, 1)})


@pytest.mark.parametrize("length", [1, 2, 9])
def test_an_example_has_its_place_in_layers_that_it_does_not_reach(length):
    model, x = Routed(), routed_batch(7, length)
    gradients = expert_gradients(model, x)
    assert all(bool((g.flatten(1) == 0).all(1).any()) for g in gradients.values())
    exact = fg.estimate_fisher(model, [x[:3], x[3:]], "exact", layers=[*EXPERTS, "head"], loss=summed)
    joint = fg.JointFisher(exact)
    generator = torch.Generator().manual_seed(0)
    delta = {name: torch.randn(3, 4, generator=generator, dtype=torch.float64) for name in EXPERTS}
    effects = sum(torch.einsum("ijk,jk->i", gradients[name], delta[name]) for name in EXPERTS)
    assert joint.examples == 7 and all(one.examples == 7 for one in exact.values())
    assert_close(joint.inner(delta), effects)
    assert_close(joint.quadratic(delta), effects.square().mean())
    flat = torch.cat([gradients[name].flatten(1) for name in EXPERTS], 1)
    assert_close(fg.JointFisher({name: exact[name] for name in EXPERTS}).dual(), flat @ flat.T / 7)
    for name, g in gradients.items():
        assert_close(exact[name].weight_gradients(), g)
        assert_close(exact[name].to_dense(), g.flatten(1).T @ g.flatten(1) / 7)
        assert_close(exact[name].eigh(4)[0], torch.linalg.eigvalsh(g.flatten(1).T @ g.flatten(1) / 7).flip(0)[:4])


@pytest.mark.parametrize("structure", ["exact", "ekfac"])
def test_layers_of_which_a_batch_takes_one_count_the_batches_of_the_other(structure):
    model, x = Switched(), routed_batch(6, 1, seed=1)[:, 0]
    loss = lambda model, x: model(x)[:, 0]
    fisher = fg.estimate_fisher(model, list(x[:, None]), [structure, "diagonal"], layers=["a", "b"], loss=loss)
    inputs = {"a": x * (x[:, :1] > 0), "b": x * (x[:, :1] <= 0)}
    for name, rows in inputs.items():
        assert_close(fisher["diagonal"][name].trace(), rows.square().sum() / 6)
        assert_close(fisher[structure][name].trace(), rows.square().sum() / 6)
    if structure == "exact":
        delta = {"a": torch.eye(3, 4).double(), "b": 2 * torch.eye(3, 4).double()}
        effects = inputs["a"][:, 0] + 2 * inputs["b"][:, 0]
        joint = fg.JointFisher(fisher["exact"])
        assert_close(joint.inner(delta), effects)
        assert_close(joint.quadratic(delta), effects.square().mean())


def test_positions_have_their_places_too_where_each_is_a_datum():
    model, x = Routed(), routed_batch(5, 3)
    exact = fg.estimate_fisher(model, [x[:2], x[2:]], "exact", layers=[*EXPERTS, "head"], loss=summed, unit="token")
    delta = torch.arange(12.0).reshape(3, 4).double()
    each = lambda model, x: torch.sin(model(x)).sum(2).flatten()  # a position depends on itself alone
    g = expert_gradients(model, x.reshape(15, 1, 4), each)
    assert_close(
        fg.JointFisher(exact).inner(dict.fromkeys(EXPERTS, delta)),
        sum(torch.einsum("ijk,jk->i", g[name], delta) for name in EXPERTS),
    )
    with pytest.raises(ValueError, match=r"layer 'a' is not reached by every batch, .*unit='sequence'"):
        fg.estimate_fisher(Switched(), list(routed_batch()), "exact", layers=["a", "b"], unit="token",
                           loss=lambda model, x: model(x)[:, 0])  # fmt: skip


def test_an_example_without_a_supervised_token_is_a_datum_of_no_layer():
    model, examples = tiny_llama(), make_examples([14, 14, 14], 1)
    batch = collate(examples)
    batch["labels"][1] = -100
    exact = fg.estimate_fisher(model, [batch], "exact", layers=list(NAMES))
    gradients, _ = oracle(model, [examples[0], examples[2]])
    moved = updates(fg.JointFisher(exact), 0)
    expected = sum(torch.einsum("ipq,pq->i", gradients[name], moved[name].left @ moved[name].right) for name in NAMES)
    assert_close(fg.JointFisher(exact).inner(moved), expected)


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_what_an_update_does_to_an_example_is_the_same_whatever_its_weight(unit):
    examples, weights = make_examples([5, 8, 4, 7]), torch.tensor([0.5, 2.0, 1.0, 3.0]).double()
    model, plain = estimated(examples, unit=unit)
    edges = [slice(0, 3), slice(3, 4)]
    batches = [collate(examples[part]) | {"w": weights[part]} for part in edges]
    estimate = lambda part=batches, **options: fg.estimate_fisher(
        model, part, structure="exact", layers=list(NAMES), unit=unit, **options
    )
    moved = updates(plain, 3)
    wanted, dense = plain.inner(moved), {name: one.weight_gradients() for name, one in plain.operators.items()}
    weighted = estimate(example_weights="w")
    merged = estimate(batches[:1], example_weights="w").merge(estimate(batches[1:], example_weights="w"))
    for fisher in (weighted, merged, estimate(decay=0.5), estimate().scaled(0.3)):
        joint = fg.JointFisher(dict(fisher))
        assert_close(joint.inner(moved), wanted, 1e-6)  # its norms compute in float32
        for name in NAMES:
            assert_close(fisher[name].weight_gradients(), dense[name], 1e-6)
            again = fg.operator_from_tensors("ExactOperator", fisher[name].tensors())
            assert_close(again.inner(moved[name]), fisher[name].inner(moved[name]))
    if unit == "sequence":  # the form itself is of the weighted examples
        quadratic = fg.JointFisher(dict(weighted)).quadratic(moved)
        assert_close(quadratic, (weights * wanted.square()).sum() / weights.sum(), 1e-6)
    nothing = estimate([batches[0] | {"w": torch.tensor([1.0, 0.0, 1.0])}], example_weights="w")
    with pytest.raises(ValueError, match="have the weight zero"):
        fg.JointFisher(dict(nothing)).inner(moved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_small_update_does_not_leave_the_range_of_half_precision(dtype):
    operator = fg.ExactOperator(torch.ones(2, 3, dtype=dtype), torch.ones(2, 4, dtype=dtype), torch.tensor([1, 1]), 2)
    update = torch.full((3, 4), 1e-6)
    found = fg.JointFisher({"layer": operator}).quadratic({"layer": update})
    assert found.dtype == torch.float32 and float(found) == pytest.approx(float(operator.quadratic(update)), rel=1e-6)
    assert float(found) == pytest.approx(1.44e-10, rel=1e-4)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "kfac-sketch", "gram", "diagonal", "exact"])
def test_an_expert_that_no_counted_example_reaches_has_a_fisher_of_zero(structure):
    weights = lambda x: (x[:, 0, 0] < 0).to(x)
    fisher = fg.estimate_fisher(
        Routed().float(),
        [routed_batch().float()],
        structure,
        layers=list(EXPERTS),
        loss=summed,
        example_weights=weights,
    )
    assert float(fisher[EXPERTS[0]].trace()) > 0
    assert not fisher[EXPERTS[1]].to_dense().any()
