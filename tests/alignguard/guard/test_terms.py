"""Terms of many matrices of one shape at once, against the dense formula of each."""

import pytest
import torch
from alignment_rows import rows
from architectures import from_zero, make, move
from geometry_cases import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

import fishergeo as fg
from alignguard.guard import Guard, GuardConfig
from alignguard.guard.layer_curvature import LayerCurvature
from alignguard.guard.terms import TermGroup

STRENGTHS = {"lambda_alignment": 0.7, "lambda_task": 0.3, "lambda_collision": 0.2, "alpha": 0.4}


def semidefinite(seed, size, decay):
    """A curvature whose spectrum falls off as fast as it is told, so that groups hold projectors of several ranks."""
    root = gaussian(seed, size, size) * torch.exp(-decay * torch.arange(size, dtype=torch.float64))
    return root @ root.mT


def stack(structure, count, p=9, q=7, r=3, dtype=torch.float64):
    outputs = [semidefinite(i, p, 0.2 + 0.4 * i).to(dtype) for i in range(count)]
    inputs = [semidefinite(50 + i, q, 0.3).to(dtype) for i in range(count)]
    if structure == "kfac":
        operators = [fg.KroneckerOperator(s, a) for s, a in zip(outputs, inputs, strict=True)]
    elif structure == "kfac-sketch":
        operators = [
            fg.SpectralKroneckerOperator(
                *(
                    fg.SpectralOperator(w[k:].flip(0), v[:, k:].flip(1), w.sum(), side, float(w[:k].mean()))
                    for side, k in (("output", 3 - i % 2), ("input", 2 + i % 2))
                    for w, v in [torch.linalg.eigh(s if side == "output" else a)]
                )
            )
            for i, (s, a) in enumerate(zip(outputs, inputs, strict=True))
        ]
    elif structure == "gram":
        operators = [fg.DenseOperator(s) for s in outputs]
    else:
        tops = [torch.linalg.eigh(s) for s in outputs]
        operators = [
            fg.SpectralOperator(w.flip(0)[:6].contiguous(), v.flip(1)[:, :6].contiguous(), s.trace())
            for (w, v), s in zip(tops, outputs, strict=True)
        ]
    left, right = gaussian(99, count, p, r).to(dtype), gaussian(98, count, r, q).to(dtype)
    return operators, left.requires_grad_(), right.requires_grad_()


def formula(operator, config, delta, scale, share):
    """The penalty of one matrix from dense matrices alone."""
    output = getattr(operator, "output_factor", operator)
    inside = getattr(operator, "input_factor", torch.eye(delta.shape[1]).to(delta))
    s, inside = (x if isinstance(x, torch.Tensor) else x.to_dense() for x in (output, inside))
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh(s))
    values = values.clamp_min(0)
    total = output.full_trace if isinstance(output, fg.SpectralOperator) else values.sum()
    m = int((values.cumsum(0) < config.energy * total * (1 - 1e-12)).sum()) + 1
    if config.projection == "soft":
        known = len(output.values) if isinstance(output, fg.SpectralOperator) else len(values)
        weights = (values / (values + values[m - 1]))[:known]
        p = (vectors[:, :known] * weights) @ vectors[:, :known].mT
    else:
        p = vectors[:, :m] @ vectors[:, :m].mT
    part = p @ delta
    charged = delta if config.whole_update else part
    alignment = (charged * (s @ charged @ inside)).sum()
    part, rest = part / scale, (delta - part) / scale
    size = delta.numel() if config.scale_free else 1
    eta = 1 + config.beta * torch.sigmoid((part + rest).abs() - config.tau)
    x, y = part.mT @ part, rest.mT @ rest
    return (
        config.lambda_alignment * alignment
        + config.lambda_task * share * rest.square().sum() / size
        + config.lambda_collision * config.alpha * share * (eta * (part * rest).abs()).sum() / size
        + config.lambda_collision * (1 - config.alpha) * share * (x * y).sum() / (x.norm() * y.norm())
    )


@pytest.mark.parametrize("structure", ["kfac", "kfac-sketch", "gram", "sketch"])
@pytest.mark.parametrize("projection", ["hard", "soft"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole update", "aligned part"])
@pytest.mark.parametrize("scale_free", [True, False], ids=["scale-free", "sums"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "factored"])
def test_a_group_is_the_sum_of_the_dense_formulas(structure, projection, whole, scale_free, dense):
    count = 1 if dense else 4
    operators, left, right = stack(structure, count)
    config = GuardConfig.curvature(
        structure=structure, projection=projection, whole_update=whole, scale_free=scale_free, energy=0.75, **STRENGTHS
    )
    scales, share = ([0.5, 2.0, 1.5, 0.1][:count], 0.125) if scale_free else ([1.0] * count, 1.0)
    layers = [LayerCurvature(operator, config) for operator in operators]
    assert dense or projection == "soft" or len({len(layer.values) for layer in layers}) > 1
    group = TermGroup(layers, config, scales, share)
    delta = left @ right if dense else fg.LowRank(left, right)
    ours = torch.stack(list(group.terms(delta).values())).sum()
    each = zip(operators, left, right, scales, strict=True)
    theirs = sum(formula(operator, config, b @ a, scale, share) for operator, b, a, scale in each)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    for mine, true in zip(*(torch.autograd.grad(x, (left, right)) for x in (ours, theirs)), strict=True):
        assert float((mine - true).norm()) <= 1e-10 * float(true.norm())


@pytest.mark.parametrize("switches", [{"alpha": 0.0}, {"alpha": 1.0}, {"lambda_task": 0.0}, {"lambda_collision": 0.0}])
def test_terms_without_strength_are_left_out(switches):
    operators, left, right = stack("kfac", 3)
    config = GuardConfig.curvature(whole_update=False, **(STRENGTHS | switches))
    found = set(TermGroup([LayerCurvature(o, config) for o in operators], config).terms(fg.LowRank(left, right)))
    gone = {"alpha": "overlap" if switches.get("alpha") == 0 else "separation", "lambda_task": "task"}
    expected = {"alignment", "task", "overlap", "separation"} - {gone.get(next(iter(switches)))}
    assert found == (expected if "lambda_collision" not in switches else {"alignment", "task"})


def test_matrices_in_groups_of_several_ranks_and_shapes_are_charged_like_each_alone():
    model = make("llama", "patterns")
    move(model)
    config = GuardConfig.curvature(refresh_examples=4, whole_update=False, **STRENGTHS)
    guard = from_zero(model, lambda: Guard(model, rows(4), config))
    guard.refresh()
    assert len({(m.shape, m.rank) for m in guard.updates.matrices.values()}) > 1
    deltas = {name: matrix.read().to_dense().detach() for name, matrix in guard.updates.matrices.items()}
    alone = sum(formula(layer.operator, config, deltas[name], 1.0, 1.0) for name, layer in guard.layers.items())
    torch.testing.assert_close(guard.penalty(), alone, rtol=1e-10, atol=0)
    exact = sum(0.5 * layer.operator.quadratic(deltas[name]) for name, layer in guard.layers.items())
    assert guard.predicted_drift() == pytest.approx(float(exact), rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_congruences_and_their_two_derivatives_are_those_of_the_formula(count, r, q, seed, known):
    matrices = [semidefinite(seed + i, q, 0.1) for i in range(count)]
    rows = gaussian(seed + 77, count, r, q).requires_grad_()
    dense = torch.stack(matrices)
    if known:
        pairs = [[x.flip(-1)[..., : 1 + (seed + i) % q] for x in torch.linalg.eigh(m)] for i, m in enumerate(matrices)]
        matrices = [fg.SpectralOperator(*pair, rest=0.1 * (seed % 3)) for pair in pairs]
        dense = torch.stack([op.to_dense() for op in matrices])
    torch.testing.assert_close(fg.stacked_congruence(matrices, rows), rows @ dense @ rows.mT)
    assert torch.autograd.gradcheck(lambda x: fg.stacked_congruence(matrices, x), (rows,))
    assert torch.autograd.gradgradcheck(lambda x: fg.stacked_congruence(matrices, x), (rows,))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("structure", ["kfac", "kfac-sketch", "gram", "sketch"])
def test_stacked_quadratics_are_those_of_each_operator(structure, dense):
    operators, left, right = stack(structure, 3)
    delta = left @ right if dense else fg.LowRank(left, right)
    each = torch.stack([o.quadratic(b @ a) for o, b, a in zip(operators, left, right, strict=True)])
    together = fg.stacked_quadratic(operators, delta)
    torch.testing.assert_close(together, each, rtol=1e-12, atol=0)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for mine, true in zip(*(torch.autograd.grad(x, (left, right), upstream) for x in (together, each)), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-12)


def test_factors_that_ask_for_a_gradient_get_it():
    factor = semidefinite(1, 4, 0.1).requires_grad_()
    operator = fg.KroneckerOperator(factor, semidefinite(2, 3, 0.1))
    delta = fg.LowRank(gaussian(3, 1, 4, 2), gaussian(4, 1, 2, 3))
    fg.stacked_quadratic([operator], delta).sum().backward()
    dense = delta.to_dense()[0]
    torch.testing.assert_close(factor.grad, dense @ operator.input_factor @ dense.mT)
    with pytest.raises(ValueError, match="detach"):
        fg.stacked_congruence([factor], gaussian(3, 1, 2, 4))


def test_stacks_that_do_not_fit_are_refused():
    operators, left, right = stack("kfac", 3)
    with pytest.raises(ValueError, match="2 operators"):
        fg.stacked_quadratic(operators[:2], fg.LowRank(left, right))
    with pytest.raises(ValueError, match="1 matrices"):
        fg.stacked_congruence([torch.eye(7)], gaussian(0, 2, 3, 7))
    with pytest.raises(ValueError, match="does not fit"):
        fg.stacked_congruence([torch.eye(6)], gaussian(0, 1, 3, 7))
    with pytest.raises(TypeError, match="not both"):
        some = fg.SpectralOperator(torch.ones(1), torch.eye(7)[:, :1])
        fg.stacked_congruence([torch.eye(7), some], gaussian(0, 2, 3, 7))


@pytest.mark.parametrize("side", ["output", "input"])
def test_projectors_of_several_ranks_stack_to_what_each_is(side):
    bases = [torch.linalg.qr(gaussian(i, 6, m))[0] for i, m in enumerate([2, 0, 4])]
    projectors = [fg.Projector(bases[0], side), fg.Projector(bases[1], side),
                  fg.SoftProjector(bases[2], torch.tensor([1.0, 0.5, 0.2, 0.0], dtype=torch.float64), side)]  # fmt: skip
    together = fg.SoftProjector.stacked(projectors)
    assert together.basis.shape == (3, 6, 4) and together.side == side
    torch.testing.assert_close(together.to_dense(), torch.stack([each.to_dense() for each in projectors]))
    delta = gaussian(8, 3, 6, 6)
    for place, each in enumerate(projectors):
        for ours, theirs in zip(together.split(delta), each.split(delta[place]), strict=True):
            torch.testing.assert_close(ours[place], theirs)
    alone = fg.SoftProjector.stacked(projectors[:1])
    assert alone.basis.data_ptr() == bases[0].data_ptr()


def test_projectors_that_do_not_stack_are_refused():
    one = fg.Projector(torch.eye(3)[:, :1])
    for others, words in [([], "empty"), ([one, fg.Projector(torch.eye(4)[:, :1])], "do not stack"),
                          ([one, fg.Projector(torch.eye(3)[:, :1], "input")], "do not stack"),
                          ([fg.SoftProjector.stacked([one, one])], "do not stack")]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            fg.SoftProjector.stacked(others)
    with pytest.raises(TypeError, match="float64"):
        fg.SoftProjector.stacked([one, fg.Projector(torch.eye(3).double()[:, :1])])
