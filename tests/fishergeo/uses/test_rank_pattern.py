"""Ranks by the Fisher against an exhaustive search, peft's reading of them, and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from uses_cases import STRUCTURES, classifier, dense_fisher, estimated, examples, gradients, psd, random, weights

import fishergeo as fg

SEEDS = st.integers(0, 999)


def fishers(seed):
    return {
        "a": fg.KroneckerOperator(psd(3, seed), psd(3, seed + 1)),
        "b": fg.DiagonalOperator(random(3, 3, seed=seed + 2).square()),
    }


def updates(seed):
    return {name: random(3, 3, seed=seed + place) for place, name in enumerate("ab")}


def gains(dense, update):
    """Squared singular values of F^½ ΔW by an eigendecomposition of the dense matrix."""
    values, vectors = torch.linalg.eigh(dense)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return torch.linalg.svdvals((root @ update.flatten()).reshape(update.shape)).square()


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, directions=st.integers(2, 6))
def test_a_budget_of_directions_is_spent_on_the_largest_gains(seed, directions):
    found = fg.rank_pattern(fishers(seed), budget=6 * directions, update=updates(seed))
    each = {n: gains(op.to_dense(), updates(seed)[n]) for n, op in fishers(seed).items()}
    kept = sum(float(each[n][:r].sum()) for n, r in found.items())
    best = max(
        float(each["a"][:a].sum() + each["b"][:b].sum())
        for a, b in itertools.product(range(1, 4), range(1, 4))
        if a + b <= directions
    )
    assert sum(found.values()) == directions and abs(kept - best) <= 1e-9 * best


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, energy=st.floats(0.05, 1.0))
def test_an_energy_is_reached_and_one_direction_less_would_miss_it(seed, energy):
    found = fg.rank_pattern(fishers(seed), energy=energy, update=updates(seed))
    each = {n: gains(op.to_dense(), updates(seed)[n]) for n, op in fishers(seed).items()}
    whole = sum(float(g.sum()) for g in each.values())
    kept = sum(float(each[n][:r].sum()) for n, r in found.items())
    assert kept >= energy * whole * (1 - 1e-9)
    last = min(float(each[n][r - 1]) for n, r in found.items() if r > 1) if max(found.values()) > 1 else None
    assert last is None or kept - last < energy * whole


@pytest.mark.parametrize("structure", STRUCTURES)
def test_without_an_update_gains_are_eigenvalues_of_the_gradients_second_moment(structure):
    model, data = classifier(), examples(30)
    fisher = estimated(model, data, structure)
    expected = {}
    for name, dense in dense_fisher(model, data, structure).items():
        p, q = weights(model)[name].shape
        moment = dense.reshape(p, q, p, q).diagonal(dim1=1, dim2=3).sum(-1)
        expected[name] = torch.linalg.eigvalsh(moment).flip(0)
        assert torch.allclose(fisher[name].partial_trace(), moment, atol=1e-12)
        other = dense.reshape(p, q, p, q).diagonal(dim1=0, dim2=2).sum(-1)
        assert torch.allclose(fisher[name].partial_trace("input"), other, atol=1e-12)
    if structure == "exact":
        g = gradients(model, data)["2"]
        assert torch.allclose(fisher["2"].partial_trace(), (g @ g.mT).mean(0), atol=1e-12)
    found = fg.rank_pattern(fisher, energy=0.8)
    order = sorted(((float(v) / 7, n) for n, e in expected.items() for v in e[1:]), reverse=True)
    kept = sum(float(e[0]) for e in expected.values())
    ranks, wanted = dict.fromkeys(expected, 1), 0.8 * sum(float(e.sum()) for e in expected.values())
    for _, name in order:
        if kept >= wanted:
            break
        kept += float(expected[name][ranks[name]])
        ranks[name] += 1
    assert found == {name.removesuffix("+bias"): rank for name, rank in ranks.items()}


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, less=st.integers(12, 24), more=st.integers(0, 18))
def test_more_budget_takes_no_rank_away(seed, less, more):
    few, many = (fg.rank_pattern(fishers(seed), budget=b, update=updates(seed)) for b in (less, less + more))
    assert all(few[name] <= many[name] for name in few)
    assert sum(6 * rank for rank in few.values()) <= less


def test_factors_and_dense_updates_have_the_same_ranks_and_bounds_hold():
    low = {n: fg.LowRank(random(3, 1, seed=s), random(1, 3, seed=s + 1)) for s, n in enumerate("ab")}
    dense = {n: one.to_dense() for n, one in low.items()}
    fisher = {n: fg.KroneckerOperator(psd(3, s), psd(3, s + 1)) for s, n in enumerate("ab")}
    assert fg.rank_pattern(fisher, energy=0.999999, update=low) == {"a": 1, "b": 1}
    assert fg.rank_pattern(fisher, energy=0.999999, update=dense) == {"a": 1, "b": 1}
    assert fg.rank_pattern(fishers(0), energy=1.0, update=updates(0), maximum=2) == {"a": 2, "b": 2}
    assert fg.rank_pattern(fishers(0), energy=0.01, update=updates(0), minimum=2) == {"a": 2, "b": 2}


def test_peft_takes_the_pattern():
    model = classifier().float()
    x, y = examples(20)
    fisher = estimated(model, (x.float(), y), "gram")
    alone = {"2": fisher["2"]}
    pattern = fg.rank_pattern(alone, energy=0.999, update={"2": random(3, 4).float()})
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=["2"], rank_pattern=pattern))
    assert adapted.base_model.model[2].lora_A["default"].weight.shape == (pattern["2"], 4)
    peft_names = {"base_model.model.2.base_layer": fisher["2"]}
    again = fg.rank_pattern(peft_names, energy=0.999, update={"base_model.model.2.base_layer": random(3, 4).float()})
    assert again == pattern


@pytest.mark.parametrize("updated", [False, True])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["diagonal", "kfac", "dense"])
def test_a_fisher_with_nan_has_no_ranks(kind, number, updated):
    hole = torch.zeros(3, 3).double()
    hole[1, 1] = number
    bad = {
        "diagonal": lambda: fg.DiagonalOperator(random(3, 3).square() + hole),
        "kfac": lambda: fg.KroneckerOperator(psd(3), psd(3, 1) + hole),
        "dense": lambda: fg.DenseOperator(psd(3) + hole),
    }[kind]()
    if kind == "dense" and not updated:
        return  # says nothing of the other side, which is refused first
    update = updates(0) if updated else None
    with pytest.raises(ValueError, match=r"layer 'a'.*NaN or infinite"):
        fg.rank_pattern({"a": bad, "b": fishers(0)["b"]}, budget=20, update=update)


def test_what_is_refused_is_named():
    with pytest.raises(ValueError, match="one of budget= and energy="):
        fg.rank_pattern(fishers(0))
    with pytest.raises(ValueError, match="budget=11 is less than the 12"):
        fg.rank_pattern(fishers(0), budget=11)
    with pytest.raises(ValueError, match="energy"):
        fg.rank_pattern(fishers(0), energy=1.5)
    with pytest.raises(ValueError, match="update lacks layer 'b'"):
        fg.rank_pattern(fishers(0), budget=20, update={"a": random(3, 3)})
    with pytest.raises(ValueError, match="layer 'a' has shape"):
        fg.rank_pattern(fishers(0), budget=20, update={"a": random(2, 3), "b": random(3, 3)})
    with pytest.raises(ValueError, match="layer 'a': one weight"):
        fg.rank_pattern(fishers(0), budget=20, update={"a": random(3, 2, 3), "b": random(3, 3)})
    with pytest.raises(ValueError, match="layer 'b': update has 9 entries"):
        fg.rank_pattern(fishers(0), budget=20, update={"a": random(3, 3), "b": random(3, 3) * torch.nan})
    with pytest.raises(ValueError, match="says nothing of the side"):
        fg.rank_pattern({"a": fg.DenseOperator(psd(3))}, budget=20)


def test_a_share_is_of_all_gains_also_of_those_that_no_rank_may_reach():
    flat = {name: fg.DenseOperator(gain * torch.eye(10).double()) for name, gain in (("a", 10.0), ("b", 1.0))}
    update = {name: torch.eye(10).double() for name in flat}
    assert fg.rank_pattern(flat, energy=0.9, maximum=2, update=update) == {"a": 2, "b": 2}
