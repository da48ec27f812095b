"""Merged weights against the dense minimiser, the laws of merging, adapters, and what is refused or told."""

import copy
import warnings

import pytest
import torch
from architectures import make, merged_weights, move
from hypothesis import given, settings
from hypothesis import strategies as st
from uses_cases import (
    LAYERS,
    STRUCTURES,
    classifier,
    dense_fisher,
    estimated,
    examples,
    factors,
    moved,
    psd,
    random,
    weights,
)

import fishergeo as fg

P, Q = 3, 4
SEEDS = st.integers(0, 999)
KINDS = {
    "diagonal": lambda seed: fg.DiagonalOperator(random(P, Q, seed=seed).square() + 0.1),
    "kfac": lambda seed: fg.KroneckerOperator(psd(P, seed), psd(Q, seed + 1)),
    "ekfac": lambda seed: fg.KroneckerOperator(psd(P, seed), psd(Q, seed + 1)).rotated(),
    "output": lambda seed: fg.DenseOperator(psd(P, seed)),
    "input": lambda seed: fg.DenseOperator(psd(Q, seed), "input"),
}


class One(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.layer = torch.nn.Linear(Q, P, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(random(P, Q, seed=seed))


def dense(operator):
    """(pq, pq) of an operator on vec(W)."""
    matrix = operator.to_dense()
    if operator.side == "output":
        return torch.kron(matrix, torch.eye(Q, dtype=torch.float64))
    return torch.kron(torch.eye(P, dtype=torch.float64), matrix) if operator.side == "input" else matrix


def minimiser(fishers, points, damping=0.0, shares=None):
    """(Σ c F)⁻¹ Σ c F w, dense, by least squares where it is singular."""
    shares = [1.0] * len(points) if shares is None else shares
    shifted = [f + damping * torch.eye(len(f), dtype=torch.float64) for f in fishers]
    total = sum(c * f for c, f in zip(shares, shifted, strict=True))
    pull = sum(c * f @ w.flatten() for c, f, w in zip(shares, shifted, points, strict=True))
    return torch.linalg.solve(total, pull).reshape(points[0].shape)


def merged(models, operators, **options):
    return fg.merge_weights(models, [{"layer": one} for one in operators], **options)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_estimated_fishers_merge_to_the_dense_minimiser(structure):
    models, data = [classifier(), moved(classifier(), 0.3)], [examples(40, 0), examples(40, 7)]
    fishers = [estimated(model, part, structure) for model, part in zip(models, data, strict=True)]
    found = fg.merge_weights(models, fishers, damping=1e-2, tolerance=1e-13)
    whole = [dense_fisher(model, part, structure) for model, part in zip(models, data, strict=True)]
    for name in LAYERS:
        expected = minimiser([one[name] for one in whole], [weights(model)[name] for model in models], 1e-2)
        assert (found.weights[name] - expected).norm() <= 1e-8 * expected.norm()
    twin = classifier()
    twin.load_state_dict(found.state)
    assert torch.allclose(weights(twin)["0+bias"], found.weights["0+bias"], atol=1e-15)
    assert found.averaged == ("2.bias",) and torch.allclose(twin[2].bias, (models[0][2].bias + models[1][2].bias) / 2)


@settings(deadline=None, max_examples=25)
@given(kind=st.sampled_from(sorted(KINDS)), count=st.integers(2, 4), damping=st.sampled_from([0.0, 0.3]), seed=SEEDS)
def test_operators_of_every_kind_merge_to_the_dense_minimiser(kind, count, damping, seed):
    models = [One(seed + 10 * place) for place in range(count)]
    operators = [KINDS[kind](seed + 100 * place) for place in range(count)]
    shares = [1.0 + place for place in range(count)]
    found = merged(models, operators, damping=damping, shares=shares, tolerance=1e-14)
    expected = minimiser([dense(one) for one in operators], [m.layer.weight.detach() for m in models], damping, shares)
    assert (found.weights["layer"] - expected).norm() <= 1e-8 * expected.norm()


@settings(deadline=None, max_examples=15)
@given(kind=st.sampled_from(sorted(KINDS)), seed=SEEDS)
def test_equal_models_merge_to_themselves_to_the_bit(kind, seed):
    model = One(seed)
    found = merged([model, copy.deepcopy(model)], [KINDS[kind](seed), KINDS[kind](seed + 5)])
    assert torch.equal(found.state["layer.weight"], model.layer.weight)


@settings(deadline=None, max_examples=15)
@given(kind=st.sampled_from(sorted(KINDS)), count=st.integers(2, 4), seed=SEEDS)
def test_equal_fishers_give_plain_averaging(kind, count, seed):
    models = [One(seed + place) for place in range(count)]
    found = merged(models, [KINDS[kind](seed)] * count)
    mean = torch.stack([model.layer.weight.detach() for model in models]).mean(0)
    assert torch.allclose(found.weights["layer"], mean, atol=1e-9)


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS)
def test_an_identity_fisher_gives_plain_averaging(seed):
    models = [One(seed), One(seed + 1)]
    found = merged(models, [fg.KroneckerOperator(torch.eye(P).double(), torch.eye(Q).double())] * 2)
    assert torch.allclose(found.weights["layer"], (models[0].layer.weight + models[1].layer.weight) / 2, atol=1e-14)


@settings(deadline=None, max_examples=15)
@given(kind=st.sampled_from(sorted(KINDS)), seed=SEEDS)
def test_the_order_of_the_models_does_not_matter(kind, seed):
    models, operators = [One(seed), One(seed + 1)], [KINDS[kind](seed), KINDS[kind](seed + 9)]
    there = merged(models, operators, tolerance=1e-14).weights["layer"]
    back = merged(models[::-1], operators[::-1], tolerance=1e-14).weights["layer"]
    assert torch.allclose(there, back, atol=1e-9)


@settings(deadline=None, max_examples=15)
@given(kind=st.sampled_from(sorted(KINDS)), factor=st.floats(0.01, 100), seed=SEEDS)
def test_a_common_factor_of_all_fishers_does_not_matter(kind, factor, seed):
    models, operators = [One(seed), One(seed + 1)], [KINDS[kind](seed), KINDS[kind](seed + 9)]
    plain = merged(models, operators, tolerance=1e-14).weights["layer"]
    scaled = merged(models, operators, shares=[factor, factor], tolerance=1e-14).weights["layer"]
    assert torch.allclose(plain, scaled, atol=1e-8)


@settings(deadline=None, max_examples=10)
@given(kind=st.sampled_from(sorted(KINDS)), seed=SEEDS)
def test_much_damping_gives_plain_averaging(kind, seed):
    models, operators = [One(seed), One(seed + 1)], [KINDS[kind](seed), KINDS[kind](seed + 9)]
    found = merged(models, operators, damping=1e9).weights["layer"]
    assert torch.allclose(found, (models[0].layer.weight + models[1].layer.weight) / 2, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(kind=st.sampled_from(sorted(KINDS)), seed=SEEDS)
def test_the_merged_weight_costs_no_more_than_the_average_or_any_of_the_models(kind, seed):
    models, operators = [One(seed), One(seed + 1)], [KINDS[kind](seed), KINDS[kind](seed + 9)]
    points = [model.layer.weight.detach() for model in models]

    def cost(weight):
        return sum(float(op.quadratic(weight - point)) for op, point in zip(operators, points, strict=True))

    best = cost(merged(models, operators).weights["layer"])
    assert all(best <= cost(other) * (1 + 1e-9) for other in (*points, (points[0] + points[1]) / 2))


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, zeros=st.lists(st.booleans(), min_size=P * Q, max_size=P * Q))
def test_where_no_fisher_has_curvature_the_plain_average_stays(seed, zeros):
    models = [One(seed), One(seed + 1)]
    hole = torch.tensor(zeros).reshape(P, Q)
    operators = [
        fg.DiagonalOperator((random(P, Q, seed=s).square() + 0.1).masked_fill(hole, 0)) for s in (seed, seed + 3)
    ]
    found = merged(models, operators).weights["layer"]
    mean = (models[0].layer.weight + models[1].layer.weight).detach() / 2
    assert torch.allclose(found[hole], mean[hole], atol=1e-14)


def test_input_grams_are_regression_of_the_means():
    models, data = [classifier(), moved(classifier(), 0.3)], [examples(40, 0), examples(40, 7)]
    grams = [fg.input_grams(estimated(m, d, "kfac")) for m, d in zip(models, data, strict=True)]
    with pytest.warns(UserWarning, match=r"2\.bias"):
        found = fg.merge_weights(models, grams)
    for name in LAYERS:
        inputs = [factors(m, d)[name][1] for m, d in zip(models, data, strict=True)]
        pull = sum(weights(m)[name] @ gram for m, gram in zip(models, inputs, strict=True))
        assert torch.allclose(found.weights[name], pull @ torch.linalg.inv(sum(inputs)), atol=1e-9)
        assert found.steps[name] == 0
    with pytest.raises(ValueError, match="structure='kfac'"):
        fg.input_grams(estimated(models[0], data[0], "diagonal"))


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_adapters_are_merged_as_the_weights_they_act_with(model):
    models = [make(model), make(model)]
    for place, one in enumerate(models):
        move(one, seed=place)
    names = [n for n, _ in models[0].named_modules() if n.endswith(("q_proj.base_layer", "c_attn.base_layer"))]
    base = models[0].get_submodule(names[0]).weight
    p, q = base.T.shape if model == "gpt2" else base.shape
    fishers = [{name: fg.KroneckerOperator(psd(p, s), psd(q, s + 1)) for name in names} for s in (0, 5)]
    with pytest.warns(UserWarning, match="averaged plainly"):
        found = fg.merge_weights(models, fishers, tolerance=1e-13)
    plain = [merged_weights(one) for one in models]
    key = fg.capture.plain_name(names[0]) + ".weight"
    points = [each[key].T if model == "gpt2" else each[key] for each in plain]
    expected = minimiser([op[names[0]].to_dense() for op in fishers], points)
    assert (found.weights[names[0]] - expected).norm() <= 1e-8 * expected.norm()
    models[0].load_state_dict(found.state)
    now = merged_weights(models[0])[key]
    assert torch.allclose(now.T if model == "gpt2" else now, expected, atol=1e-8)
    assert not any("q_proj.lora" in name or "c_attn.lora" in name for name in found.averaged)


def test_parameters_without_a_fisher_are_told_unless_they_are_equal():
    one, two = classifier(), moved(classifier())
    two[0].load_state_dict(one[0].state_dict())
    two[2].bias.data.copy_(one[2].bias)
    fishers = [{"2": fg.DiagonalOperator(torch.ones(3, 4).double())}] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fg.merge_weights([one, two], fishers).averaged == ()
    moved(two)
    with pytest.warns(UserWarning, match=r"3 tensors have no Fisher.*0\.weight"):
        found = fg.merge_weights([one, two], fishers)
    assert found.averaged == ("0.weight", "0.bias", "2.bias")


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_gram_with_one_huge_direction_is_solved_in_float32_weights_too(side):
    size = P if side == "output" else Q
    grams, models = [], [One(1).float(), One(2).float()]
    for seed in (1, 2):
        basis = torch.linalg.qr(psd(size, seed)).Q
        values = torch.tensor([1e6, *[1e-3] * (size - 1)]).double()
        grams.append(((basis * values) @ basis.T).float())
    wide = [copy.deepcopy(model).double() for model in models]
    found = merged(models, [fg.DenseOperator(g, side) for g in grams], damping=1.0)
    exact = merged(wide, [fg.DenseOperator(g.double(), side) for g in grams], damping=1.0)
    move = exact.weights["layer"] - sum(m.layer.weight.detach() for m in wide) / 2
    assert found.residuals["layer"] < 1e-6 and move.norm() > 0.1
    assert (found.weights["layer"].double() - exact.weights["layer"]).norm() < 1e-4 * move.norm()


@pytest.mark.parametrize("side", ["output", "input"])
def test_directions_that_grams_leave_to_rounding_keep_the_plain_average(side):
    """Both models' inputs span the same 20 of 32 directions, as those of a layer after another of rank 20 do."""
    size, rank, generator = 32, 20, torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(random(size, size)).Q
    models, grams = [torch.nn.Linear(size, size, bias=False) for _ in range(2)], []
    for place, model in enumerate(models):
        model.weight.data = torch.randn(size, size, generator=generator)
        rows = (random(500, rank, seed=place + 1) @ basis[:rank]).float()
        grams.append(fg.DenseOperator(rows.T @ rows / 500, side))
    found = fg.merge_weights(models, [{"": gram} for gram in grams])
    mean = sum(model.weight.detach() for model in models) / 2
    move = (found.weights[""] - mean).double()
    # The minimiser of least norm: solved within the directions that the inputs span.
    inside = [basis[:rank] @ gram.to_dense().double() @ basis[:rank].T for gram in grams]
    turn = (lambda x: x.T) if side == "output" else (lambda x: x)
    pull = sum(
        turn((model.weight.detach() - mean).double()) @ basis[:rank].T @ g
        for model, g in zip(models, inside, strict=True)
    )
    expected = turn(torch.linalg.solve(sum(inside), pull.T).T @ basis[:rank])
    assert (move - expected).norm() <= 1e-5 * expected.norm()


SMALL = {
    "diagonal": (1e-36, lambda scale, s: fg.DiagonalOperator((scale * (random(P, Q, seed=s).square() + 0.1)).float())),
    "kfac": (1e-34, lambda scale, s: fg.KroneckerOperator((scale * psd(P, s)).float(), psd(Q, s + 1).float())),
    "ekfac": (
        1e-34,
        lambda scale, s: fg.KroneckerOperator((scale * psd(P, s)).float(), psd(Q, s + 1).float()).rotated(),
    ),
    "gram": (1e-36, lambda scale, s: fg.DenseOperator((scale * psd(Q, s)).float(), "input")),
}


@pytest.mark.parametrize("spread", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_the_scale_of_all_fishers_does_not_matter(kind, large, spread):
    """Down to where float32 ends: squares, and products with small weights, are then zero, or infinite."""
    least, make_one = SMALL[kind]
    models = [One(seed).float() for seed in (0, 1)]
    for model in models:
        model.layer.weight.data *= spread
    scale = 1e30 if large else least
    exact = [dense(make_one(1.0, seed)).double() for seed in (0, 5)]
    expected = minimiser(exact, [model.layer.weight.detach().double() for model in models])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = merged(models, [make_one(scale, seed) for seed in (0, 5)])
    assert (found.weights["layer"].double() - expected).norm() <= 2e-4 * expected.norm()
    assert found.residuals["layer"] <= 1e-5


def test_weights_close_to_each_other_move_as_small_fishers_say():
    """The report of an underflow: (3·0 + 1·4e-4)/4 and (1·0 + 3·4e-4)/4, whatever the scale."""
    models = [torch.nn.Linear(2, 1, bias=False) for _ in range(2)]
    for model, value in zip(models, (0.0, 4e-4), strict=True):
        torch.nn.init.constant_(model.weight, value)
    for scale in (1.0, 1e-18, 1e-20, 1e-35, 1e35):
        fishers = [{"": fg.DiagonalOperator(scale * torch.tensor([f]))} for f in ([3.0, 1.0], [1.0, 3.0])]
        found = fg.merge_weights(models, fishers)
        assert found.weights[""][0].tolist() == pytest.approx([1e-4, 3e-4], rel=1e-5)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_fisher_with_nan_merges_nothing(kind):
    operators = [KINDS[kind](0), KINDS[kind](5)]
    name, broken = next(iter(operators[1].tensors().items()))
    broken = broken.clone()
    broken[0, -1] = torch.nan
    operators[1] = type(operators[1]).from_tensors(operators[1].tensors() | {name: broken}, operators[1].side)
    with pytest.raises(ValueError, match="layer 'layer': a Fisher has NaN"):
        merged([One(0), One(1)], operators)


def test_fishers_and_weights_that_leave_their_dtype_are_refused():
    models = [One(0).float(), One(1).float()]
    for scale, word in ((1e-20, "small"), (1e-25, "small"), (1e20, "large")):
        fishers = [fg.KroneckerOperator(scale * psd(P, s).float(), scale * psd(Q, s + 1).float()) for s in (0, 3)]
        with pytest.raises(ValueError, match=f"layer 'layer'.*too {word}"):
            merged(models, fishers)
    models[1].layer.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weight of layer 'layer' in models\[1\] has 1 entries"):
        merged(models, [fg.DiagonalOperator(torch.ones(P, Q))] * 2)


def test_a_residual_that_is_no_number_is_told():
    operators = [fg.DiagonalOperator(torch.full((P, Q), 1e308, dtype=torch.float64))] * 2
    with pytest.warns(fg.ConvergenceWarning, match="'layer'"):
        merged([One(0), One(1)], [operators[0], fg.DiagonalOperator(0.9 * operators[0].entries)])


def test_conjugate_gradients_that_stop_early_say_so():
    models = [One(0), One(1)]
    operators = [fg.KroneckerOperator(psd(P, s), psd(Q, s + 1)) for s in (0, 3)]
    with pytest.warns(fg.ConvergenceWarning, match="'layer'"):
        merged(models, operators, max_steps=1)


def test_what_is_refused_is_named():
    one, two, data = classifier(), moved(classifier()), examples()
    fishers = [estimated(one, data, "kfac"), estimated(two, data, "kfac")]
    with pytest.raises(ValueError, match=r"fishers\[0\].*fingerprint"):
        fg.merge_weights([one, two], fishers[::-1])
    short = {"2": fishers[1]["2"]}
    with pytest.raises(ValueError, match=r"fishers\[1\] lacks layer '0\+bias'"):
        fg.merge_weights([one, two], [fishers[0], short])
    with pytest.raises(ValueError, match=r"fishers\[0\] lacks layer '0\+bias'"):
        fg.merge_weights([two, one], [short, fishers[0]])
    with pytest.raises(ValueError, match="two or more"):
        fg.merge_weights([one], fishers[:1])
    with pytest.raises(ValueError, match=r"shares\[1\]"):
        fg.merge_weights([one, two], fishers, shares=[1.0, -1.0])
    with pytest.raises(ValueError, match="damping"):
        fg.merge_weights([one, two], fishers, damping=-1.0)
    wider = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 5)).double()
    grams = {"0": fg.DenseOperator(psd(3), "input")}
    with pytest.raises(ValueError, match=r"2\.weight is \(3, 4\) in models\[0\]"):
        fg.merge_weights([one, wider], [grams, grams])
    with pytest.raises(ValueError, match=r"lacks layer '3\.weight'"):
        fg.merge_weights([one, torch.nn.Sequential(*wider, torch.nn.Linear(5, 1).double())], [grams, grams])


def test_weights_that_a_fisher_could_not_tell_apart_are_merged_as_they_are():
    cases = [(torch.bfloat16, torch.float32, 1.001, 1.002), (torch.float32, torch.float64, 1 + 2e-9, 1 + 4e-9)]
    for fisher_dtype, dtype, first, second in cases:
        models = [torch.nn.Linear(2, 1, bias=False, dtype=dtype) for _ in range(2)]
        for model, value in zip(models, (first, second), strict=True):
            torch.nn.init.constant_(model.weight, value)
        halves = torch.eye(1, dtype=fisher_dtype), torch.eye(2, dtype=fisher_dtype)
        for operator in (fg.DiagonalOperator(torch.ones(1, 2, dtype=fisher_dtype)), fg.KroneckerOperator(*halves)):
            merged = fg.merge_weights(models, [{"": operator}] * 2).state["weight"]
            assert merged.dtype == dtype
            assert float((merged - (first + second) / 2).abs().max()) < 0.02 * (second - first)


@pytest.mark.parametrize("order", [1, -1])
def test_models_of_other_ties_are_refused(order):
    class Two(torch.nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.e, self.h = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
            if tied:
                self.e.weight = self.h.weight

    models = [Two(True), Two(False)][::order]
    fisher = {"h": fg.DiagonalOperator(torch.ones(5, 3))}
    with pytest.raises(ValueError, match=r"'e.weight', 'h.weight' are one tensor in only one of models"):
        fg.merge_weights(models, [fisher, fisher])
