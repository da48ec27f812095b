"""Distances between curvatures, and between distributions, are metrics with the invariances they are named for."""

import math

import pytest
import scipy.linalg
import torch
from geometry_cases import SEEDS, assert_close, gaussian, orthonormal
from hypothesis import given
from hypothesis import strategies as st

import fishergeo as fg

DISTANCES = {
    "affine-invariant": fg.affine_invariant_distance,
    "log-euclidean": fg.log_euclidean_distance,
    "bures-wasserstein": fg.bures_wasserstein_distance,
}
EVERY = pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)


def definite(seed, n):
    root = gaussian(seed, n, n)
    return root @ root.mT / n + 0.2 * torch.eye(n, dtype=torch.float64)


@st.composite
def matrices(draw, count=2):
    n = draw(st.integers(1, 6))
    return [definite(draw(SEEDS), n) for _ in range(count)]


def oracle(name, a, b):
    """The textbook formulas through scipy's matrix functions."""
    a, b = a.numpy(), b.numpy()
    if name == "affine-invariant":
        return math.sqrt(sum(math.log(x) ** 2 for x in scipy.linalg.eigh(b, a, eigvals_only=True)))
    if name == "log-euclidean":
        return float(scipy.linalg.norm(scipy.linalg.logm(a) - scipy.linalg.logm(b)))
    root = scipy.linalg.sqrtm(a)
    cross = scipy.linalg.sqrtm(root @ b @ root).trace().real
    return math.sqrt(max(0.0, a.trace() + b.trace() - 2 * cross))


@pytest.mark.parametrize("name", DISTANCES)
@given(pair=matrices())
def test_distances_are_their_textbook_formulas(name, pair):
    assert float(DISTANCES[name](*pair)) == pytest.approx(oracle(name, *pair), rel=1e-6, abs=1e-6)


@EVERY
@given(triple=matrices(3))
def test_distances_are_metrics(distance, triple):
    a, b, c = triple
    assert float(distance(a, c)) <= float(distance(a, b)) + float(distance(b, c)) + 1e-9
    assert_close(distance(b, a), distance(a, b), 1e-9)
    assert float(distance(a, a)) < 1e-12 * a.shape[0]
    assert float(distance(a, b)) >= 0


@EVERY
@given(pair=matrices(), seed=SEEDS)
def test_distances_do_not_change_under_rotations(distance, pair, seed):
    a, b = pair
    turn = orthonormal(seed, *a.shape)
    turned = [(m + m.mT) / 2 for m in (turn @ a @ turn.mT, turn @ b @ turn.mT)]
    assert_close(distance(*turned), distance(a, b), 1e-8)


@given(matrices(), SEEDS)
def test_the_affine_invariant_distance_sees_neither_coordinates_nor_inversion(pair, seed):
    a, b = pair
    change = gaussian(seed, *a.shape) + 3 * torch.eye(a.shape[0], dtype=torch.float64)
    if float(torch.linalg.cond(change)) > 100:
        return
    carried = [(m + m.mT) / 2 for m in (change @ a @ change.mT, change @ b @ change.mT)]
    assert_close(fg.affine_invariant_distance(*carried), fg.affine_invariant_distance(a, b), 1e-6)
    inverses = [(m + m.mT) / 2 for m in (torch.linalg.inv(a), torch.linalg.inv(b))]
    assert_close(fg.affine_invariant_distance(*inverses), fg.affine_invariant_distance(a, b), 1e-6)


@given(matrices())
def test_log_euclidean_is_at_most_affine_invariant_and_equal_where_matrices_commute(pair):
    a, b = pair
    assert float(fg.log_euclidean_distance(a, b)) <= float(fg.affine_invariant_distance(a, b)) + 1e-9
    commuting = a @ a / 3
    commuting = (commuting + commuting.mT) / 2
    assert_close(fg.log_euclidean_distance(a, commuting), fg.affine_invariant_distance(a, commuting), 1e-8)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5), SEEDS)
def test_known_distances_of_diagonal_matrices(values, seed):
    x = torch.tensor(values, dtype=torch.float64)
    y = gaussian(seed, len(values)).exp()
    a, b = torch.diag(x), torch.diag(y)
    logs = torch.linalg.vector_norm(x.log() - y.log())
    assert_close(fg.affine_invariant_distance(a, b), logs)
    assert_close(fg.log_euclidean_distance(a, b), logs)
    assert_close(fg.bures_wasserstein_distance(a, b), torch.linalg.vector_norm(x.sqrt() - y.sqrt()))


@EVERY
def test_small_distances_are_not_cancelled(distance):
    a = definite(0, 4)
    step = gaussian(1, 4, 4)
    step = step + step.mT
    ratio = float(distance(a, a + 1e-9 * step)) / float(distance(a, a + 1e-6 * step))
    assert ratio == pytest.approx(1e-3, rel=1e-4)


def test_bures_wasserstein_takes_rank_deficient_curvatures_and_the_others_refuse_them():
    a, b = torch.diag(torch.tensor([4.0, 0.0])), torch.diag(torch.tensor([0.0, 9.0]))
    assert float(fg.bures_wasserstein_distance(a, b)) == pytest.approx(13**0.5)
    for distance in (fg.affine_invariant_distance, fg.log_euclidean_distance):
        with pytest.raises(ValueError, match="b must be positive definite; add damping"):
            distance(torch.eye(2), b)
    with pytest.raises(ValueError, match="a must be positive semidefinite: its least eigenvalue is -1"):
        fg.bures_wasserstein_distance(-torch.eye(2), b)


@EVERY
@pytest.mark.parametrize("repeated", [False, True])
def test_gradients_agree_with_finite_differences_also_at_repeated_eigenvalues(distance, repeated):
    a = torch.eye(3, dtype=torch.float64) * 2 if repeated else definite(0, 3)
    b = definite(1, 3)
    symmetric = lambda m: (m + m.mT) / 2
    inputs = a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: distance(symmetric(x), symmetric(y)), inputs)


@EVERY
def test_the_gradient_where_the_matrices_are_equal_is_finite_and_of_the_square_zero(distance):
    a = definite(0, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(distance(a, a.detach()) ** 2, a)
    assert float(gradient.abs().max()) < 1e-12
    eye = torch.eye(3, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(distance(eye, eye.detach()), eye)
    assert torch.isfinite(gradient).all()


@EVERY
def test_batches_and_half_precision(distance):
    a, b = torch.stack([definite(i, 3) for i in range(4)]), definite(9, 3)
    assert_close(distance(a, b), torch.stack([distance(x, b) for x in a]))
    half = distance(a.bfloat16().float().bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32
    assert torch.allclose(half.double(), distance(a, b), atol=0.1)
    wide = torch.eye(200).bfloat16()
    assert float(distance(wide, wide)) == 0 < float(distance(wide, 4 * wide))


def test_second_derivatives_are_refused_not_wrong():
    a = definite(0, 3).requires_grad_()
    with pytest.raises(RuntimeError, match=r"^a distance between positive definite matrices has no second derivatives"):
        torch.autograd.grad(fg.log_euclidean_distance(a, definite(1, 3)), a, create_graph=True)


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (torch.ones(2, 3), torch.eye(2), ValueError, "a must be square"),
        (torch.eye(2), torch.eye(3), ValueError, "a is 2×2 but b is 3×3"),
        (torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, 1.0]]), ValueError, "b must be symmetric"),
        (torch.eye(2), torch.eye(2).double(), TypeError, "a is torch.float32 but b is torch.float64"),
        (torch.eye(2) * float("nan"), torch.eye(2), ValueError, "a has 4 entries that are NaN"),
        (torch.eye(2), "b", TypeError, "b must be a torch.Tensor"),
    ],
)
@EVERY
def test_bad_matrices_are_refused_by_name(distance, a, b, error, message):
    with pytest.raises(error, match=message):
        distance(a, b)


# --- categorical distributions --------------------------------------------------------------------------------------


def distribution(seed, *shape):
    return torch.softmax(2 * gaussian(seed, *shape), -1)


@given(st.integers(1, 6), SEEDS, SEEDS, SEEDS)
def test_fisher_rao_is_a_metric_with_its_textbook_value(c, i, j, k):
    p, q, r = (distribution(s, c) for s in (i, j, k))
    cosine = (p * q).sqrt().sum().clamp(max=1)
    assert_close(fg.fisher_rao_distance(p, q), 2 * torch.arccos(cosine), 1e-7)
    assert_close(fg.fisher_rao_distance(q, p), fg.fisher_rao_distance(p, q))
    assert float(fg.fisher_rao_distance(p, p)) == 0
    sides = fg.fisher_rao_distance(p, q) + fg.fisher_rao_distance(q, r)
    assert float(fg.fisher_rao_distance(p, r)) <= float(sides) + 1e-12


def test_fisher_rao_reaches_pi_between_disjoint_supports():
    p, q = torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor([0.0, 0.0, 1.0]).double()
    assert float(fg.fisher_rao_distance(p, q)) == pytest.approx(math.pi, abs=1e-12)


@given(st.integers(2, 6), SEEDS)
def test_fisher_rao_is_the_root_of_twice_the_divergence_nearby(c, seed):
    logits = gaussian(seed, c)
    p, q = torch.softmax(logits, -1), torch.softmax(logits + 1e-4 * gaussian(seed + 1, c), -1)
    divergence = (p * (p / q).log()).sum()
    assert float(fg.fisher_rao_distance(p, q)) == pytest.approx(float((2 * divergence).sqrt()), rel=1e-2)


@given(SEEDS)
def test_fisher_rao_does_not_see_the_order_of_classes_and_shrinks_when_they_are_merged(seed):
    p, q = distribution(seed, 5), distribution(seed + 1, 5)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    assert_close(fg.fisher_rao_distance(p[order], q[order]), fg.fisher_rao_distance(p, q))
    merge = lambda x: torch.cat((x[:1] + x[1:2], x[2:]))
    assert float(fg.fisher_rao_distance(merge(p), merge(q))) <= float(fg.fisher_rao_distance(p, q)) + 1e-12


def test_fisher_rao_gradients_batches_and_half_precision():
    logits = gaussian(0, 3, 4).requires_grad_(), gaussian(1, 3, 4).requires_grad_()
    function = lambda a, b: fg.fisher_rao_distance(torch.softmax(a, -1), torch.softmax(b, -1))
    assert torch.autograd.gradcheck(function, logits)
    same = gaussian(0, 4).requires_grad_()
    target = torch.softmax(same.detach(), -1)
    assert torch.autograd.gradcheck(lambda a: fg.fisher_rao_distance(torch.softmax(a, -1), target) ** 2, same)
    p, q = distribution(0, 4).half(), distribution(1, 4).half()
    assert fg.fisher_rao_distance(p, q).dtype == torch.float32


@pytest.mark.parametrize(
    ("p", "q", "error", "message"),
    [
        ([0.5, 0.6], [0.5, 0.5], ValueError, "p must sum to one"),
        ([0.5, 0.5], [1.5, -0.5], ValueError, "q must not be negative"),
        ([0.5, 0.5], [0.2, 0.3, 0.5], ValueError, "p has 2 classes but q has 3"),
        ([0.5, float("nan")], [0.5, 0.5], ValueError, "p has 1 entries"),
    ],
)
def test_bad_distributions_are_refused_by_name(p, q, error, message):
    with pytest.raises(error, match=message):
        fg.fisher_rao_distance(torch.tensor(p), torch.tensor(q))


@EVERY
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_checks_are_relative_to_the_size_of_the_matrix(distance, scale):
    a, b = definite(0, 3), definite(1, 3)
    power = 0.5 if distance is fg.bures_wasserstein_distance else 0.0
    assert float(distance(scale * a, scale * b)) == pytest.approx(scale**power * float(distance(a, b)), rel=1e-6)
    with pytest.raises(ValueError, match="a must be symmetric"):
        distance(scale * (a + gaussian(2, 3, 3)), scale * b)
    with pytest.raises(ValueError, match="a must be positive"):
        distance(-scale * a, scale * b)


def test_half_precision_probabilities_are_widened_before_their_roots():
    p, q = torch.tensor([0.25, 0.75]), torch.tensor([0.375, 0.625])
    assert torch.equal(fg.fisher_rao_distance(p.half(), q.half()), fg.fisher_rao_distance(p, q))


@EVERY
def test_the_squared_distance_is_differentiable_where_the_matrices_are_equal(distance):
    a = definite(0, 3)
    function = lambda x: distance((x + x.mT) / 2, a) ** 2
    assert torch.autograd.gradcheck(function, a.clone().requires_grad_())


@pytest.mark.parametrize(
    ("dtype", "small", "slack"),
    [(torch.float64, 1e-9, 1e-6), (torch.float64, 1e-12, 1e-3), (torch.float32, 1e-5, 2e-2)],
)
def test_small_relative_eigenvalues_of_ill_conditioned_matrices_count_in_full(dtype, small, slack):
    """Of matrices that commute the distance is known; their relative eigenvalues span the square of a condition number."""
    basis, values = orthonormal(0, 4, 4), torch.tensor([1, 0.5, 2 * small, small], dtype=torch.float64)
    first, second = (((basis * v) @ basis.mT).to(dtype) for v in (values, values.flip(0)))
    first, second = ((m + m.mT) / 2 for m in (first, second))
    truth = float((values.log() - values.flip(0).log()).norm())
    for pair in ((first, second), (second, first)):
        assert float(fg.affine_invariant_distance(*pair)) == pytest.approx(truth, abs=slack)


def test_bures_wasserstein_of_rank_deficient_matrices_is_good_to_the_root_of_rounding():
    x = gaussian(0, 6, 2)
    y = x + 1e-8 * gaussian(1, 6, 2)
    u, _, vh = torch.linalg.svd(y.mT @ x)
    truth = float((x - y @ u @ vh).norm())  # of the factors themselves, at any size
    a, b = x @ x.mT, y @ y.mT
    slack = (6 * torch.finfo(torch.float64).eps * float(a.trace())) ** 0.5
    assert float(fg.bures_wasserstein_distance(a, b)) == pytest.approx(truth, abs=2 * slack)
