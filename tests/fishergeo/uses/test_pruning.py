"""Optimal Brain Damage and Surgeon against dense matrices, their laws, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from uses_cases import LAYERS, STRUCTURES, classifier, dense_fisher, estimated, examples, moved, psd, random, weights

import fishergeo as fg
from fishergeo.uses import pruning

P, Q = 3, 4
SEEDS = st.integers(0, 999)
MASKS = st.lists(st.booleans(), min_size=P * Q, max_size=P * Q).map(lambda m: torch.tensor(m).reshape(P, Q))
KFAC = {"w": lambda seed: fg.KroneckerOperator(psd(P, seed), psd(Q, seed + 1))}


def surgeon(fisher, weight, keep):
    """(new weight, growth of the loss): the quadratic minimised over the weights that stay, by solving for them."""
    flat, stays = weight.flatten(), keep.flatten()
    delta = -flat.clone()
    pull = fisher[stays][:, ~stays] @ flat[~stays]
    delta[stays] = torch.linalg.solve(fisher[stays][:, stays], pull)
    return (flat + delta).reshape(weight.shape), 0.5 * float(delta @ fisher @ delta)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_saliencies_are_those_of_the_dense_matrix(structure):
    model, data = classifier(), examples(40)
    fisher, dense = estimated(model, data, structure), dense_fisher(model, data, structure)
    for name in LAYERS:
        w = weights(model)[name]
        damped = dense[name] + 0.01 * torch.eye(w.numel(), dtype=w.dtype)
        obd = fg.saliency(model, fisher, damping=0.01)[name]
        obs = fg.saliency(model, fisher, "obs", damping=0.01)[name]
        assert torch.allclose(obd, 0.5 * damped.diagonal().reshape(w.shape) * w.square(), rtol=1e-8, atol=1e-14)
        expected = 0.5 * w.square() / torch.linalg.inv(damped).diagonal().reshape(w.shape)
        assert torch.allclose(obs, expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("direct", [0, 2048])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_step_is_the_dense_minimiser(structure, direct, monkeypatch):
    monkeypatch.setattr(pruning, "DIRECT", direct)
    model, data = classifier(), examples(40)
    fisher, dense = estimated(model, data, structure), dense_fisher(model, data, structure)
    masks = {name: random(*w.shape, seed=3) > 0 for name, w in weights(model).items()}
    found = fg.obs_step(model, fisher, masks, damping=0.01, tolerance=1e-13)
    for name in LAYERS:
        w = weights(model)[name]
        expected, cost = surgeon(dense[name] + 0.01 * torch.eye(w.numel(), dtype=w.dtype), w, masks[name])
        assert (found.weights[name] - expected).norm() <= 1e-8 * expected.norm()
        assert abs(found.cost[name] - cost) <= 1e-8 * cost
        assert (found.steps[name] > 0) == (direct == 0)


@settings(deadline=None, max_examples=25)
@given(mask=MASKS, seed=SEEDS)
def test_masks_of_any_pattern_under_kfac(mask, seed):
    operator, w = KFAC["w"](seed), random(P, Q, seed=seed + 7)
    found = fg.obs_step({"w": w}, {"w": operator}, {"w": mask})
    expected, cost = surgeon(operator.to_dense(), w, mask)
    assert torch.allclose(found.weights["w"], expected, atol=1e-8) and abs(found.cost["w"] - cost) <= 1e-8 * max(
        cost, 1
    )
    assert not found.weights["w"][~mask].any()


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, mask=MASKS)
def test_with_a_diagonal_the_surgeon_is_the_damage(seed, mask):
    fisher = {"w": fg.DiagonalOperator(random(P, Q, seed=seed).square() + 0.01)}
    w = {"w": random(P, Q, seed=seed + 1)}
    obd = fg.saliency(w, fisher)["w"]
    assert torch.allclose(obd, fg.saliency(w, fisher, "obs")["w"], rtol=1e-9)
    found = fg.obs_step(w, fisher, {"w": mask})
    assert torch.equal(found.weights["w"], torch.where(mask, w["w"], 0))
    assert abs(found.cost["w"] - float(obd[~mask].sum())) <= 1e-9


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS)
def test_moving_the_others_never_costs_more_than_leaving_them(seed):
    fisher, w = {"w": KFAC["w"](seed)}, {"w": random(P, Q, seed=seed + 3)}
    assert bool((fg.saliency(w, fisher, "obs")["w"] <= fg.saliency(w, fisher)["w"] * (1 + 1e-9)).all())


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, place=st.integers(0, P * Q - 1))
def test_one_weight_removed_costs_its_saliency(seed, place):
    fisher, w = {"w": KFAC["w"](seed)}, {"w": random(P, Q, seed=seed + 3)}
    mask = torch.ones(P * Q, dtype=torch.bool)
    mask[place] = False
    cost = fg.obs_step(w, fisher, {"w": mask.reshape(P, Q)}).cost["w"]
    assert abs(cost - float(fg.saliency(w, fisher, "obs")["w"].flatten()[place])) <= 1e-9 * max(cost, 1)


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, mask=MASKS, more=MASKS)
def test_removing_more_costs_more(seed, mask, more):
    fisher, w = {"w": KFAC["w"](seed)}, {"w": random(P, Q, seed=seed + 3)}
    few, many = (fg.obs_step(w, fisher, {"w": keep}).cost["w"] for keep in (mask, mask & more))
    assert few <= many * (1 + 1e-9) + 1e-12


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS)
def test_keeping_all_changes_nothing_and_keeping_none_costs_the_quadratic_form(seed):
    fisher, w = {"w": KFAC["w"](seed)}, {"w": random(P, Q, seed=seed + 3)}
    every = torch.ones(P, Q, dtype=torch.bool)
    kept, none = (fg.obs_step(w, fisher, {"w": mask}) for mask in (every, ~every))
    assert torch.equal(kept.weights["w"], w["w"]) and kept.cost["w"] == 0
    assert not none.weights["w"].any()
    assert abs(none.cost["w"] - 0.5 * float(fisher["w"].quadratic(w["w"]))) <= 1e-8 * none.cost["w"]


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, n=st.integers(1, 4), rows=st.integers(1, 5), groups=st.integers(1, 4))
def test_a_mask_keeps_the_best_of_every_group(seed, n, rows, groups):
    scores = random(rows, 4 * groups, seed=seed)
    mask = fg.n_of_m_mask(scores, n, 4).reshape(-1, 4)
    assert bool((mask.sum(1) == n).all())
    if n < 4:
        kept, gone = scores.reshape(-1, 4).masked_fill(~mask, 1e9), scores.reshape(-1, 4).masked_fill(mask, -1e9)
        assert bool((kept.amin(1) >= gone.amax(1)).all())


def test_one_sided_operators_and_two_of_four():
    w = random(P, Q, seed=1)
    for side, size in (("output", P), ("input", Q)):
        fisher = {"w": fg.DenseOperator(psd(size), side)}
        dense = (
            torch.kron(psd(P), torch.eye(Q).double()) if side == "output" else torch.kron(torch.eye(P).double(), psd(Q))
        )
        mask = fg.n_of_m_mask(fg.saliency({"w": w}, fisher, "obs")["w"])
        found = fg.obs_step({"w": w}, fisher, {"w": mask})
        assert torch.allclose(found.weights["w"], surgeon(dense, w, mask)[0], atol=1e-8)
    ties = fg.n_of_m_mask(torch.ones(1, 4))
    assert ties.tolist() == [[True, True, False, False]]


def test_what_is_refused_is_named():
    model, data = classifier(), examples()
    fisher = estimated(model, data, "kfac")
    with pytest.raises(ValueError, match="fingerprint"):
        fg.saliency(moved(classifier()), fisher)
    with pytest.raises(ValueError, match="method"):
        fg.saliency(model, fisher, "magnitude")
    with pytest.raises(ValueError, match="weights lacks layer '0\\+bias'"):
        fg.saliency({"2": weights(model)["2"]}, fisher)
    with pytest.raises(ValueError, match="fisher lacks layer 'other'"):
        fg.saliency({**weights(model), "other": torch.ones(2, 2)}, fisher)
    with pytest.raises(ValueError, match="damping=0 leaves layer '2' singular"):  # the errors of a softmax sum to zero
        fg.obs_step(model, fisher, {"2": torch.ones(3, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match="'3'"):
        fg.obs_step(model, fisher, {"3": torch.ones(3, 4, dtype=torch.bool)}, damping=1.0)
    with pytest.raises(ValueError, match="mask of layer '2' must be bool"):
        fg.obs_step(model, fisher, {"2": torch.ones(3, 4)}, damping=1.0)
    with pytest.raises(ValueError, match="groups of 4"):
        fg.n_of_m_mask(torch.ones(2, 6))
    with pytest.raises(ValueError, match="2 NaN of 4"):
        fg.n_of_m_mask(torch.tensor([[torch.nan, 3.0, torch.nan, 4.0]]))
    for method in ("obd", "obs"):
        with pytest.raises(ValueError, match="damping must be"):
            fg.saliency(model, fisher, method, damping=-5.0)
    with pytest.raises(ValueError, match="tolerance must be"):
        fg.obs_step(model, fisher, {}, tolerance=float("inf"))
    turned = {"w": fg.DiagonalOperator(torch.ones(4, 3))}
    for wrong in (torch.ones(3, 4), torch.ones(4, 1, 3), torch.ones(12)):
        with pytest.raises(ValueError, match="layer 'w'"):
            fg.saliency({"w": wrong}, turned)
    with pytest.raises(ValueError, match="n must be"):
        fg.n_of_m_mask(torch.ones(2, 4), n=5)
    with pytest.raises(ValueError, match="NaN"):
        fg.saliency({"w": torch.full((2, 2), torch.nan)}, {"w": fg.DiagonalOperator(torch.ones(2, 2))})
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight of layer '0'"):
        fg.saliency(model, {"0": fg.DiagonalOperator(torch.ones(2, 2))})


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_the_size_of_the_weights_does_not_matter(scale, monkeypatch):
    monkeypatch.setattr(pruning, "DIRECT", 0)
    w, mask = random(P, Q, seed=1).float(), random(P, Q, seed=2) > 0
    fisher = {"w": fg.KroneckerOperator(psd(P).float(), psd(Q, 1).float())}
    plain, scaled = (fg.obs_step({"w": s * w}, fisher, {"w": mask}).weights["w"] for s in (1.0, scale))
    assert torch.allclose(scaled / scale, plain, rtol=1e-4, atol=1e-5)


def test_conjugate_gradients_that_stop_early_say_so(monkeypatch):
    monkeypatch.setattr(pruning, "DIRECT", 0)
    w, mask = random(P, Q, seed=1), random(P, Q, seed=2) > 0
    with pytest.warns(fg.ConvergenceWarning, match="'w'"):
        fg.obs_step({"w": w}, {"w": KFAC["w"](0)}, {"w": mask}, max_steps=1)
