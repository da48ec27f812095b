"""Collision metrics: exact against their dense formulas, degenerate exactly where theory says, safe at zero."""

import pytest
import torch
from geometry_cases import SEEDS, assert_close, bases, gaussian, low_ranks, orthonormal
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fishergeo as fg
from fishergeo.updates import _tiles

METRICS = ["euclidean", "input-gram", "output-gram", "matrix"]


def overlap_formula(a, t, beta=4.0, tau=0.01, weight=None):
    """The paper's sum written out, per matrix of the batch."""
    d = a + t if weight is None else weight + a + t
    eta = 1 + beta / (1 + torch.exp(tau - d.abs()))
    return (eta * (a * t).abs()).sum((-1, -2))


def separation_formula(a, t, metric):
    """Squared cosine of two dense matrices, with the Gram matrices written out."""
    if isinstance(metric, torch.Tensor):
        return (a * (metric @ t)).sum() ** 2 / ((a * (metric @ a)).sum() * (t * (metric @ t)).sum())
    if metric == "euclidean":
        return (a * t).sum() ** 2 / (a.square().sum() * t.square().sum())
    x, y = (a.mT @ a, t.mT @ t) if metric == "input-gram" else (a @ a.mT, t @ t.mT)
    return (x * y).sum() / (torch.linalg.matrix_norm(x) * torch.linalg.matrix_norm(y))


def semidefinite(seed, p):
    root = gaussian(seed, p, p)
    return root @ root.mT + 0.1 * torch.eye(p, dtype=torch.float64)


def metric_of(name, seed, p):
    return semidefinite(seed, p) if name == "matrix" else name


@st.composite
def parts(draw, **kwargs):
    """Two LowRanks of one shape, unrelated."""
    first = draw(low_ranks(**kwargs))
    *batch, p, q = first.shape
    return first, draw(low_ranks(p=p, q=q, batch=st.just(tuple(batch))))


@st.composite
def nonzero_parts(draw):
    """Two unbatched LowRanks of one shape, both far from zero."""
    p, q, seed = draw(st.integers(2, 8)), draw(st.integers(2, 8)), draw(SEEDS)
    r1, r2 = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    first = fg.LowRank(gaussian(seed, p, r1), gaussian(seed + 1, r1, q))
    second = fg.LowRank(gaussian(seed + 2, p, r2), gaussian(seed + 3, r2, q))
    assume(float(first.norm()) > 1e-3 and float(second.norm()) > 1e-3)
    return first, second


# --- the coordinate-wise term ---------------------------------------------------------------------------------------


@given(parts(), st.floats(0, 10), st.floats(-1, 1), st.booleans(), SEEDS)
def test_overlap_is_the_papers_sum_factored_and_dense(pair, beta, tau, with_weight, seed):
    a, t = pair
    weight = gaussian(seed, *a.shape) if with_weight else None
    expected = overlap_formula(a.to_dense(), t.to_dense(), beta, tau, weight)
    assert_close(fg.riemannian_overlap(a, t, beta, tau, weight), expected)
    assert_close(fg.riemannian_overlap(a.to_dense(), t.to_dense(), beta, tau, weight), expected)


def test_default_parameters_are_beta_4_and_tau_one_hundredth():
    a, t = gaussian(0, 5, 6), gaussian(1, 5, 6)
    assert_close(fg.riemannian_overlap(a, t), overlap_formula(a, t, 4.0, 0.01))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1300), (700, 3), (200, 600), (129, 513), (65, 1024)])
@pytest.mark.parametrize("with_weight", [False, True])
def test_value_and_gradient_are_exact_across_tile_borders(shape, with_weight):
    p, q = shape
    factors = [gaussian(i, *s).requires_grad_() for i, s in enumerate([(p, 3), (3, q), (p, 2), (2, q)])]
    weight = gaussian(9, p, q) if with_weight else None
    lowrank = fg.LowRank(*factors[:2]), fg.LowRank(*factors[2:])
    dense = [x.to_dense() for x in lowrank]
    expected = overlap_formula(*dense, weight=weight)
    wanted = torch.autograd.grad(expected, factors, retain_graph=True)
    for value in (fg.riemannian_overlap(*lowrank, weight=weight), fg.riemannian_overlap(*dense, weight=weight)):
        assert abs(value.item() - expected.item()) <= 1e-10 * expected.item()
        for g, w in zip(torch.autograd.grad(3 * value, factors, retain_graph=True), wanted, strict=True):
            assert_close(g, 3 * w)


@pytest.mark.parametrize("frozen", [(0,), (1, 3), (0, 2), (0, 1, 2)])
def test_frozen_factors_get_no_gradient_and_the_others_the_right_one(frozen):
    factors = [gaussian(i, *s) for i, s in enumerate([(6, 2), (2, 7), (6, 2), (2, 7)])]
    live = [f.requires_grad_() for i, f in enumerate(factors) if i not in frozen]
    pair = fg.LowRank(*factors[:2]), fg.LowRank(*factors[2:])
    expected = torch.autograd.grad(overlap_formula(pair[0].to_dense(), pair[1].to_dense()), live, retain_graph=True)
    for g, w in zip(torch.autograd.grad(fg.riemannian_overlap(*pair), live), expected, strict=True):
        assert_close(g, w)


def test_one_dense_part_may_be_frozen():
    a, t = gaussian(0, 5, 6).requires_grad_(), gaussian(1, 5, 6)
    (expected,) = torch.autograd.grad(overlap_formula(a, t), a)
    assert_close(torch.autograd.grad(fg.riemannian_overlap(a, t), a)[0], expected)
    assert_close(torch.autograd.grad(fg.riemannian_overlap(t, a), a)[0], expected)


def test_each_matrix_of_a_batch_has_its_own_gradient_scale():
    a, t = gaussian(0, 3, 5, 6).requires_grad_(), gaussian(1, 3, 5, 6).requires_grad_()
    coefficients = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = torch.autograd.grad(coefficients @ overlap_formula(a, t), (a, t))
    for g, w in zip(torch.autograd.grad(coefficients @ fg.riemannian_overlap(a, t), (a, t)), expected, strict=True):
        assert_close(g, w)


@given(parts())
def test_overlap_is_symmetric_nonnegative_and_its_mean_is_the_sum_over_the_size(pair):
    a, t = pair
    value = fg.riemannian_overlap(a, t)
    assert (value >= 0).all()
    assert_close(fg.riemannian_overlap(t, a), value)
    assert_close(fg.riemannian_overlap(a, t, reduction="mean") * a.shape[-1] * a.shape[-2], value)


@given(parts(), SEEDS)
def test_overlap_does_not_change_under_signs_and_permutations_of_coordinates(pair, seed):
    a, t = pair
    p = a.shape[-2]
    order = torch.randperm(p, generator=torch.Generator().manual_seed(seed))
    change = torch.eye(p, dtype=torch.float64)[order] * gaussian(seed, p, 1).sign()
    assert_close(fg.riemannian_overlap(change @ a, change @ t), fg.riemannian_overlap(a, t))


def test_overlap_changes_under_a_rotation_of_coordinates():
    """The counter-example: it depends on the basis, unlike the angles."""
    a, t = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) / 2**0.5
    assert float(fg.riemannian_overlap(a, t)) == 0
    assert float(fg.riemannian_overlap(turn @ a, turn @ t)) > 0.5


@given(parts())
def test_overlap_with_a_zero_part_is_zero(pair):
    a, _ = pair
    assert float(fg.riemannian_overlap(a, 0.0 * a).abs().max()) == 0


@given(st.floats(0, 10), st.sampled_from([(), (2,)]))
def test_overlap_lies_between_its_bounds_of_eta(beta, batch):
    a, t = gaussian(0, *batch, 4, 5), gaussian(1, *batch, 4, 5)
    plain = (a * t).abs().sum((-1, -2))
    value = fg.riemannian_overlap(a, t, beta=beta)
    assert (value >= plain - 1e-12).all() and (value <= (1 + beta) * plain + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    a, t = gaussian(0, 300, 300, dtype=dtype).abs() * 8, gaussian(1, 300, 300, dtype=dtype).abs() * 8
    value = fg.riemannian_overlap(a, t)
    assert value.dtype == torch.float32
    expected = overlap_formula(a.double(), t.double())
    assert float(expected) > 65504 and abs(float(value) / float(expected) - 1) < 1e-5


class Allocations(TorchDispatchMode):
    """Every storage that operators make: the bytes of all of them together, freed or not, and the largest."""

    total = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in self.tensors((args, kwargs))}
        for x in self.tensors(out):
            if x.untyped_storage().data_ptr() not in given:
                self.total += x.untyped_storage().nbytes()
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out

    @staticmethod
    def tensors(tree):
        return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def test_at_4096_all_that_value_and_gradient_of_factors_ever_allocate_is_below_64_megabytes():
    p = q = 4096
    update = fg.LowRank(torch.randn(p, 16).requires_grad_(), torch.randn(16, q).requires_grad_())
    part, rest = fg.Projector(torch.linalg.qr(torch.randn(p, 64)).Q).split(update)
    with Allocations() as made:
        fg.riemannian_overlap(part, rest).backward()
    assert made.largest <= _tiles.TILES * _tiles.CPU_TILE * 4
    assert made.total < 64e6 < 4 * p * q


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_weight", [False, True])
def test_dense_updates_cost_tiles_and_their_own_gradients_in_any_dtype(dtype, with_weight):
    p = q = 1024
    a, t, w = (torch.randn(p, q, dtype=dtype) for _ in range(3))
    a.requires_grad_()
    with Allocations() as made:
        value = fg.riemannian_overlap(a, t, weight=w if with_weight else None)
        forward = made.total
        torch.autograd.grad(value, a)
    tiles = _tiles.TILES * _tiles.CPU_TILE * 4
    assert forward <= tiles + 1e6 < 4 * p * q
    assert made.total - forward <= tiles + p * q * a.element_size() + 1e6


def test_half_precision_gradients_and_weights_are_those_of_float32_rounded():
    a, t, w = (gaussian(i, 40, 30, dtype=torch.bfloat16) for i in range(3))
    narrow, wide = a.clone().requires_grad_(), a.float().requires_grad_()
    value, expected = (
        fg.riemannian_overlap(narrow, t, weight=w),
        fg.riemannian_overlap(wide, t.float(), weight=w.float()),
    )
    assert torch.equal(value, expected)
    gradients = torch.autograd.grad(value, narrow)[0], torch.autograd.grad(expected, wide)[0]
    assert gradients[0].dtype == torch.bfloat16 and torch.equal(gradients[0], gradients[1].bfloat16())


# --- its sampled estimate -------------------------------------------------------------------------------------------


@given(parts(), SEEDS, st.booleans())
def test_sampling_every_row_is_exact_and_has_no_variance(pair, seed, mean):
    a, t = pair
    reduction = "mean" if mean else "sum"
    estimate = fg.sampled_riemannian_overlap(
        a, t, a.shape[-2], torch.Generator().manual_seed(seed), reduction=reduction
    )
    assert_close(estimate.value, fg.riemannian_overlap(a, t, reduction=reduction))
    assert_close(estimate.variance, torch.zeros_like(estimate.value))


def test_the_estimate_and_its_variance_are_unbiased_over_all_samples():
    """Enumerates every sample of 2 of 4 rows by scanning seeds until each has been seen, and weights them alike."""
    a, t, w = gaussian(0, 4, 5), gaussian(1, 4, 5), gaussian(2, 4, 5)
    seen = {}
    for seed in range(500):
        chosen = torch.randperm(4, generator=torch.Generator().manual_seed(seed))[:2]
        key = tuple(sorted(chosen.tolist()))
        if key not in seen:
            seen[key] = fg.sampled_riemannian_overlap(a, t, 2, torch.Generator().manual_seed(seed), weight=w)
    assert len(seen) == 6
    values = torch.stack([e.value for e in seen.values()])
    exact = overlap_formula(a, t, weight=w)
    assert_close(values.mean(), exact)
    assert_close(torch.stack([e.variance for e in seen.values()]).mean(), ((values - exact) ** 2).mean())


def test_the_gradient_of_the_estimate_is_unbiased():
    left, right = gaussian(0, 4, 2).requires_grad_(), gaussian(1, 2, 5).requires_grad_()
    part, rest = fg.Projector(orthonormal(2, 4, 2)).split(fg.LowRank(left, right))
    exact = torch.autograd.grad(fg.riemannian_overlap(part, rest), (left, right), retain_graph=True)
    seen = {}
    for seed in range(500):
        key = tuple(sorted(torch.randperm(4, generator=torch.Generator().manual_seed(seed))[:2].tolist()))
        if key not in seen:
            value = fg.sampled_riemannian_overlap(part, rest, 2, torch.Generator().manual_seed(seed)).value
            seen[key] = torch.autograd.grad(value, (left, right), retain_graph=True)
    for i in range(2):
        assert_close(torch.stack([g[i] for g in seen.values()]).mean(0), exact[i])


def test_the_variance_of_a_mean_is_scaled_twice():
    a, t = gaussian(0, 8, 5), gaussian(1, 8, 5)
    total, mean = (
        fg.sampled_riemannian_overlap(a, t, 3, torch.Generator().manual_seed(0), reduction=r) for r in ("sum", "mean")
    )
    assert_close(mean.value * 40, total.value)
    assert_close(mean.variance * 1600, total.variance)
    assert not total.variance.requires_grad


# --- angles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
@given(pair=nonzero_parts(), seed=SEEDS)
def test_separation_is_its_dense_formula_factored_and_dense(name, pair, seed):
    a, t = pair
    metric = metric_of(name, seed, a.shape[0])
    expected = separation_formula(a.to_dense(), t.to_dense(), metric)
    assert_close(fg.geodesic_separation(a, t, metric), expected, 1e-9)
    assert_close(fg.geodesic_separation(a.to_dense(), t.to_dense(), metric), expected, 1e-9)


@pytest.mark.parametrize("name", METRICS)
@given(pair=parts(), seed=SEEDS)
def test_separation_lies_in_the_unit_interval_and_is_symmetric(name, pair, seed):
    a, t = pair
    metric = metric_of(name, seed, a.shape[-2])
    value = fg.geodesic_separation(a, t, metric)
    assert value.shape == a.shape[:-2]
    assert ((value >= 0) & (value <= 1)).all()
    assert_close(fg.geodesic_separation(t, a, metric), value)


@pytest.mark.parametrize("name", METRICS)
@given(pair=nonzero_parts(), seed=SEEDS, c=st.floats(1e-20, 1e20))
def test_a_part_against_its_multiple_is_one_at_any_scale(name, pair, seed, c):
    a, t = pair
    metric = metric_of(name, seed, a.shape[0])
    assert_close(fg.geodesic_separation(a, c * a, metric), torch.ones((), dtype=torch.float64), 1e-9)
    assert_close(fg.geodesic_separation(c * a, -t, metric), fg.geodesic_separation(a, t, metric), 1e-9)


@pytest.mark.parametrize(
    ("metric", "a", "t"),
    [
        ("euclidean", [[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]),
        ("input-gram", [[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]),
        ("output-gram", [[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]),
        (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), [[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]),
    ],
)
def test_every_metric_reaches_zero(metric, a, t):
    assert float(fg.geodesic_separation(torch.tensor(a), torch.tensor(t), metric)) == 0


@given(nonzero_parts(), SEEDS)
def test_angles_do_not_change_under_rotations_of_coordinates(pair, seed):
    a, t = pair
    p, q = a.shape
    left, right = orthonormal(seed, p, p), orthonormal(seed + 1, q, q)
    turned = left @ a @ right, left @ t @ right
    for metric in ("euclidean", "input-gram", "output-gram"):
        assert_close(fg.geodesic_separation(*turned, metric), fg.geodesic_separation(a, t, metric), 1e-8)
    m = semidefinite(seed, p)
    carried = left @ m @ left.mT
    carried = (carried + carried.mT) / 2
    assert_close(fg.geodesic_separation(*turned, carried), fg.geodesic_separation(a, t, m), 1e-8)


@given(nonzero_parts(), SEEDS)
def test_an_operator_gives_what_its_matrix_gives(pair, seed):
    a, t = pair
    m = semidefinite(seed, a.shape[0])

    class Operator:
        """Symmetric, with @ and nothing else, and blind to autograd."""

        def __matmul__(self, x):
            return torch.from_numpy(m.numpy() @ x.detach().numpy())

    left = a.left.clone().requires_grad_()
    values = [fg.geodesic_separation(fg.LowRank(left, a.right), t, metric) for metric in (m, Operator())]
    gradients = [torch.autograd.grad(v, left)[0] for v in values]
    assert_close(values[1], values[0])
    assert_close(gradients[1], gradients[0])


# --- what is degenerate, and what is not ----------------------------------------------------------------------------


@st.composite
def hard_splits(draw, side="output"):
    """(left, right, projector) with gradients asked for."""
    p, q, r, seed = draw(st.integers(2, 8)), draw(st.integers(2, 8)), draw(st.integers(1, 4)), draw(SEEDS)
    projector = fg.Projector(draw(bases(p if side == "output" else q)), side)
    return gaussian(seed, p, r).requires_grad_(), gaussian(seed + 1, r, q).requires_grad_(), projector


def value_and_gradient(left, right, projector, metric):
    value = fg.geodesic_separation(*projector.split(fg.LowRank(left, right)), metric)
    return value.item(), max(float(g.abs().max()) for g in torch.autograd.grad(value, (left, right)))


def well_sized(left, right, projector):
    """Neither part is near zero, where a rounding error has any angle."""
    whole = fg.LowRank(left, right).norm().item()
    return all(x.norm().item() > 1e-3 * max(1.0, whole) for x in projector.split(fg.LowRank(left, right)))


@given(hard_splits())
def test_the_papers_geodesic_term_and_its_gradient_vanish_under_every_hard_projector(case):
    assume(well_sized(*case))
    value, gradient = value_and_gradient(*case, "euclidean")
    assert value < 1e-20 and gradient < 1e-9


@given(hard_splits("input"))
def test_the_papers_geodesic_term_vanishes_under_hard_projectors_of_the_input_too(case):
    assume(well_sized(*case))
    value, gradient = value_and_gradient(*case, "euclidean")
    assert value < 1e-20 and gradient < 1e-9


@given(hard_splits(), SEEDS)
def test_the_term_vanishes_in_every_metric_that_commutes_with_the_projector(case, seed):
    left, _, projector = case
    assume(well_sized(*case))
    p, m = left.shape[0], projector.rank
    inside, outside = semidefinite(seed, m), semidefinite(seed + 1, p)
    rest = torch.eye(p, dtype=torch.float64) - projector.to_dense()
    metric = projector.basis @ inside @ projector.basis.mT + rest @ outside @ rest
    metric = (metric + metric.mT) / 2
    assert_close(metric @ projector.to_dense(), projector.to_dense() @ metric, 1e-12 * float(metric.abs().max()))
    value, gradient = value_and_gradient(*case, metric)
    assert value < 1e-16 and gradient < 1e-7


@given(hard_splits())
def test_the_output_gram_vanishes_under_output_projectors(case):
    assume(well_sized(*case))
    assert value_and_gradient(*case, "output-gram")[0] < 1e-20


@given(hard_splits("input"))
def test_the_input_gram_vanishes_under_input_projectors(case):
    assume(well_sized(*case))
    assert value_and_gradient(*case, "input-gram")[0] < 1e-20


def test_the_readings_that_are_offered_instead_do_not_vanish():
    p, q, r, m = 24, 16, 4, 6
    left, right = gaussian(0, p, r).requires_grad_(), gaussian(1, r, q).requires_grad_()
    basis = orthonormal(2, p, m)
    hard = fg.Projector(basis)
    soft = fg.SoftProjector(basis, torch.linspace(0.9, 0.2, m, dtype=torch.float64))
    cases = [(hard, "input-gram"), (hard, semidefinite(3, p)), (soft, "euclidean")]
    for projector, metric in cases:
        value, gradient = value_and_gradient(left, right, projector, metric)
        assert value > 1e-4 and gradient > 1e-5
    one_sided = fg.Projector(orthonormal(4, q, m), "input")
    assert value_and_gradient(left, right, one_sided, "output-gram")[0] > 1e-3


def test_principal_angles_between_row_spaces_of_the_parts_are_degenerate_the_other_way():
    update = fg.LowRank(gaussian(0, 12, 3), gaussian(1, 3, 9))
    part, rest = fg.Projector(orthonormal(2, 12, 5)).split(update)
    cosines = torch.linalg.svdvals(part.row_basis().mT @ rest.row_basis())
    assert_close(cosines, torch.ones(3, dtype=torch.float64))
    assert float((part.column_basis().mT @ rest.column_basis()).abs().max()) < 1e-12


def test_a_part_in_the_null_space_of_the_metric_has_no_angle():
    """M @ part is zero but for rounding; an unguarded quotient of roundings would be anything in [0, 1]."""
    basis = orthonormal(0, 8, 3)
    metric = basis @ basis.mT
    rest = gaussian(1, 8, 5)
    outside = rest - metric @ rest
    assert float(fg.geodesic_separation(outside, rest, (metric + metric.mT) / 2)) == 0


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METRICS, "overlap", "weighted overlap", "sampled"])
@pytest.mark.parametrize("kind", ["factored", "dense"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_agree_with_finite_differences(name, kind, batch):
    shapes = [(5, 2), (2, 4), (5, 3), (3, 4)] if kind == "factored" else [(5, 4), (5, 4)]
    inputs = tuple(gaussian(i + 10, *batch, *s).requires_grad_() for i, s in enumerate(shapes))
    metric = metric_of(name, 3, 5)

    def function(*x):
        pair = (fg.LowRank(*x[:2]), fg.LowRank(*x[2:])) if kind == "factored" else x
        if name == "sampled":
            return fg.sampled_riemannian_overlap(*pair, 3, torch.Generator().manual_seed(0)).value
        if "overlap" in name:
            weight = gaussian(5, *batch, 5, 4) if name.startswith("weighted") else None
            return fg.riemannian_overlap(*pair, weight=weight)
        return fg.geodesic_separation(*pair, metric)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", ["overlap", "weighted overlap"])
@pytest.mark.parametrize("kind", ["factored", "dense"])
def test_gradient_of_the_overlap_at_a_zero_update_agrees_with_finite_differences(name, kind):
    """LoRA starts here: B = 0. The term is of second order there, so it is differentiable."""
    projector = fg.Projector(orthonormal(0, 5, 2))
    left, right = torch.zeros(5, 2, dtype=torch.float64).requires_grad_(), gaussian(1, 2, 4).requires_grad_()
    weight = gaussian(5, 5, 4) if name.startswith("weighted") else None

    def function(l, r):
        update = fg.LowRank(l, r)
        return fg.riemannian_overlap(*projector.split(update if kind == "factored" else l @ r), weight=weight)

    assert torch.autograd.gradcheck(function, (left, right), eps=1e-7)
    assert all(float(g.abs().max()) == 0 for g in torch.autograd.grad(function(left, right), (left, right)))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("kind", ["factored", "dense"])
@pytest.mark.parametrize("which", ["both", "part", "rest"])
def test_separation_at_zero_has_value_zero_and_gradient_zero(name, kind, which):
    a, t = gaussian(0, 5, 2), gaussian(1, 5, 2)
    if which != "rest":
        a = torch.zeros_like(a)
    if which != "part":
        t = torch.zeros_like(t)
    inputs = (a.requires_grad_(), gaussian(2, 2, 4).requires_grad_(), t.requires_grad_())
    pair = fg.LowRank(inputs[0], inputs[1]), fg.LowRank(inputs[2], inputs[1])
    if kind == "dense":
        pair = tuple(x.to_dense() for x in pair)
    value = fg.geodesic_separation(*pair, metric_of(name, 3, 5))
    assert float(value) == 0
    for g in torch.autograd.grad(value, inputs):
        assert torch.equal(g, torch.zeros_like(g))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_float32_angles_neither_underflow_nor_overflow(scale):
    a, t = gaussian(0, 6, 5, dtype=torch.float32), gaussian(1, 6, 5, dtype=torch.float32)
    for metric in ("euclidean", "input-gram", "output-gram"):
        plain = fg.geodesic_separation(a, t, metric)
        assert torch.allclose(fg.geodesic_separation(scale * a, t, metric), plain, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e20])
def test_angles_do_not_see_the_scale_of_a_metric_nor_how_factors_share_theirs(scale):
    pair = [fg.LowRank(gaussian(i, 6, 3).float(), gaussian(i + 5, 3, 5).float()) for i in range(2)]
    metric = semidefinite(7, 6).float()
    for one in (metric, fg.DenseOperator(metric)):
        plain = fg.geodesic_separation(*pair, one)
        assert torch.allclose(fg.geodesic_separation(*pair, scale * one), plain, rtol=1e-4)
    rows = torch.tensor([scale, 1.0, 1 / scale])
    shared = [fg.LowRank(x.left * rows, x.right / rows[:, None]) for x in pair]
    for name in ("euclidean", "input-gram", "output-gram"):
        plain = fg.geodesic_separation(*pair, name)
        assert torch.allclose(fg.geodesic_separation(*shared, name), plain, rtol=1e-4)


def test_an_operator_metric_with_nan_is_refused():
    broken = torch.eye(4).double()
    broken[0, 0] = torch.nan
    a, t = gaussian(0, 4, 3), gaussian(1, 4, 3)
    with pytest.raises(ValueError, match="metric @ part has 3 entries that are NaN"):
        fg.geodesic_separation(a, t, fg.DenseOperator(broken))


# --- refusals -------------------------------------------------------------------------------------------------------


def test_metrics_that_are_no_inner_product_are_refused():
    a, t = gaussian(0, 4, 3), gaussian(1, 4, 3)
    with pytest.raises(ValueError, match="metric must be symmetric"):
        fg.geodesic_separation(a, t, torch.eye(4, dtype=torch.float64).roll(1, 0))
    with pytest.raises(ValueError, match="metric is not positive semidefinite"):
        fg.geodesic_separation(a, t, -torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="metric has shape \\(3, 3\\)"):
        fg.geodesic_separation(a, t, torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="metric must be one of"):
        fg.geodesic_separation(a, t, "fisher")
    with pytest.raises(TypeError, match="metric must be one of"):
        fg.geodesic_separation(a, t, None)


def test_a_weight_that_asks_for_a_gradient_is_refused():
    a = gaussian(0, 4, 3)
    with pytest.raises(ValueError, match=r"weight\.detach"):
        fg.riemannian_overlap(a, a, weight=gaussian(1, 4, 3).requires_grad_())


def test_second_derivatives_of_the_overlap_are_refused_not_wrong():
    a, t = gaussian(0, 4, 3).requires_grad_(), gaussian(1, 4, 3).requires_grad_()
    for pair in ((a, t), (fg.LowRank(a, a.mT), fg.LowRank(t, t.mT))):
        value = fg.riemannian_overlap(*pair)
        with pytest.raises(RuntimeError, match=r"^riemannian_overlap has no second derivatives"):
            torch.autograd.grad(value, a, create_graph=True)


@pytest.mark.parametrize("name", METRICS)
def test_each_matrix_of_a_batch_is_measured_at_its_own_scale(name):
    metric = metric_of(name, 3, 6)
    scales = torch.tensor([1e-140, 1.0, 1e140], dtype=torch.float64)[:, None, None]
    a, t = gaussian(0, 3, 6, 5) * scales, gaussian(1, 3, 6, 5) * scales
    for x, y in ((a, t), (fg.LowRank(a, torch.eye(5).double()), fg.LowRank(t, torch.eye(5).double()))):
        assert_close(
            fg.geodesic_separation(x, y, metric),
            torch.stack([fg.geodesic_separation(x[i], y[i], metric) for i in range(3)]),
        )


def test_a_direction_of_small_curvature_still_has_an_angle():
    """⟨X, MX⟩ is 3e-15·64 beside curvatures of one: small, but far above rounding."""
    metric = torch.diag(torch.tensor([1.0, 3e-15], dtype=torch.float64))
    a, t = torch.zeros(2, 64, dtype=torch.float64), torch.ones(2, 64, dtype=torch.float64)
    a[1] = 1
    assert float(fg.geodesic_separation(a, t, metric)) == pytest.approx(3e-15, rel=1e-6)
    assert float(fg.geodesic_separation(t, a, metric)) == pytest.approx(3e-15, rel=1e-6)


class Cutting:
    """An operator that returns fewer rows than it is given."""

    def __matmul__(self, x):
        return x[1:]


class Silent(Cutting):
    def __matmul__(self, x):
        return None


class Shaped(Cutting):
    shape = (3, 3)


def test_operators_that_do_not_act_on_the_output_side_are_refused_with_the_shapes():
    a = gaussian(0, 4, 3)
    with pytest.raises(ValueError, match=r"^metric @ X must have the shape \(4, 3\) of X, got torch.Size\(\[3, 3\]\)"):
        fg.geodesic_separation(a, a, Cutting())
    with pytest.raises(ValueError, match=r"^metric @ X must have the shape .* got <class 'NoneType'>"):
        fg.geodesic_separation(a, a, Silent())
    with pytest.raises(ValueError, match=r"^metric has shape \(3, 3\), it must be 4×4"):
        fg.geodesic_separation(a, a, Shaped())


def test_kinds_and_shapes_of_the_parts_are_compared_by_name():
    a, update = gaussian(0, 4, 3), fg.LowRank(gaussian(0, 4, 2), gaussian(1, 2, 3))
    with pytest.raises(TypeError, match=r"^part and rest must both be LowRank or both be dense"):
        fg.riemannian_overlap(a, update)
    with pytest.raises(ValueError, match=r"^part has shape \(4, 3\) but rest has \(3, 3\)"):
        fg.riemannian_overlap(a, a[1:])
    with pytest.raises(ValueError, match=r"^weight has shape \(3, 3\) but the update has \(4, 3\)"):
        fg.riemannian_overlap(a, a, weight=a[1:])


def test_bases_of_one_task_overlap_more_than_bases_of_two():
    """Where collision is a real question: the same task with other data, against another task."""

    def basis(task, seed):
        """Leading output directions of the gradients of a linear model on 200 examples of one task."""
        model = torch.nn.Linear(12, 20, bias=False).double()
        torch.nn.init.zeros_(model.weight)
        batches = [(gaussian(seed, 200, 12), gaussian(seed + 1, 200, 2) @ orthonormal(task, 20, 2).mT)]
        loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(-1)
        fisher = fg.estimate_fisher(model, batches, structure="gram", loss=loss)
        return next(iter(fisher.values())).eigh(2)[1]

    first, again, other = basis(100, 0), basis(100, 50), basis(200, 90)
    assert float(fg.subspace_overlap(first, again)) > 0.99
    assert float(fg.subspace_overlap(first, other)) < 0.5


@pytest.mark.parametrize("parts", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("metric", [torch.bfloat16, torch.float32])
def test_an_operator_as_metric_may_have_a_dtype_of_its_own(parts, metric):
    op = fg.DenseOperator(torch.diag(torch.arange(1.0, 9.0)).to(metric))
    a, t = fg.LowRank(gaussian(0, 8, 2), gaussian(1, 2, 6)), fg.LowRank(gaussian(2, 8, 2), gaussian(3, 2, 6))
    wanted = separation_formula(a.to_dense(), t.to_dense(), op.to_dense().double())
    a, t = a.to(parts), t.to(parts)
    for pair in ((a, t), (a.to_dense(), t.to_dense())):
        value = fg.geodesic_separation(*pair, op)
        assert value.dtype == torch.promote_types(parts, torch.float32)
        half = torch.bfloat16 in (parts, metric)
        assert float(value) == pytest.approx(float(wanted), rel=0.1 if half else 1e-5)
