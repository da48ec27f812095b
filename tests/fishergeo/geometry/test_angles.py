"""Principal angles are exact at both ends, and the distances made of them are metrics of the spans."""

import math

import pytest
import torch
from geometry_cases import SEEDS, SIZES, assert_close, bases, gaussian, orthonormal
from hypothesis import given
from hypothesis import strategies as st

import fishergeo as fg

KINDS = ["geodesic", "chordal", "projection", "fubini-study", "asimov"]


def at_angles(angles, p=None, seed=0):
    """Two bases in R^p whose principal angles are the given ones, in random coordinates."""
    theta = torch.tensor(angles, dtype=torch.float64)
    k = len(angles)
    frame = orthonormal(seed, p or 2 * k + 1, 2 * k)
    x, normal = frame[:, :k], frame[:, k:]
    y = x * theta.cos() + normal * theta.sin()
    return x @ orthonormal(seed + 1, k, k), y @ orthonormal(seed + 2, k, k)


@st.composite
def triples(draw, count=3):
    """Bases of one shape."""
    p = draw(st.integers(1, 8))
    k = draw(st.integers(1, p))
    return [orthonormal(draw(SEEDS), p, k) for _ in range(count)]


@pytest.mark.parametrize(
    "angles",
    [
        [1e-3, 0.3, 1.2],
        [1e-9, 1e-5, 1e-2],
        [1e-12, 1e-12, 0.5],
        [0.0, 0.0, 1e-8],
        [math.pi / 2 - 1e-9, math.pi / 2 - 1e-5, math.pi / 2],
        [0.0, math.pi / 4, math.pi / 2],
    ],
)
def test_angles_are_recovered_to_1e_12_tiny_and_right_ones_too(angles):
    x, y = at_angles(angles)
    expected = torch.tensor(sorted(angles), dtype=torch.float64)
    assert float((fg.principal_angles(x, y) - expected).abs().max()) < 1e-14


def test_a_tiny_angle_is_not_lost_as_arccos_loses_it():
    x, y = at_angles([1e-9])
    assert abs(float(fg.principal_angles(x, y)) / 1e-9 - 1) < 1e-5
    assert abs(math.acos(min(1.0, float(x.mT @ y))) / 1e-9 - 1) > 0.1


@given(SIZES.flatmap(lambda p: st.tuples(bases(p), bases(p))))
def test_angles_are_ascending_symmetric_and_their_cosines_the_singular_values(pair):
    u, v = pair
    angles = fg.principal_angles(u, v)
    assert angles.shape == (min(u.shape[1], v.shape[1]),)
    assert (angles >= 0).all() and (angles <= math.pi / 2 + 1e-12).all() and (angles.diff() >= -1e-12).all()
    assert_close(fg.principal_angles(v, u), angles)
    assert_close(torch.cos(angles), torch.linalg.svdvals(u.mT @ v))


@given(triples(2), SEEDS)
def test_angles_depend_on_spans_alone_and_not_on_coordinates(pair, seed):
    u, v = pair
    p, k = u.shape
    angles = fg.principal_angles(u, v)
    assert_close(fg.principal_angles(u @ orthonormal(seed, k, k), v @ orthonormal(seed + 1, k, k)), angles)
    turn = orthonormal(seed + 2, p, p)
    assert_close(fg.principal_angles(turn @ u, turn @ v), angles)


@given(SIZES.flatmap(lambda p: st.tuples(bases(p), SEEDS)))
def test_a_subspace_of_another_makes_angles_of_zero(case):
    u, seed = case
    k = u.shape[1]
    inside = u @ orthonormal(seed, k, max(0, k - 1)) if k else u
    assert float(fg.principal_angles(u, inside).sum()) < 1e-13


@given(triples(2))
def test_distances_are_their_matrix_definitions(pair):
    u, v = pair
    difference = torch.linalg.matrix_norm(u @ u.mT - v @ v.mT)
    assert_close(fg.subspace_distance(u, v, "projection"), difference / 2**0.5)
    left, _, right = torch.linalg.svd(u.mT @ v)
    assert_close(fg.subspace_distance(u, v, "chordal"), torch.linalg.matrix_norm(u @ (left @ right) - v))
    assert_close(torch.cos(fg.subspace_distance(u, v, "fubini-study")), torch.linalg.det(u.mT @ v).abs(), 1e-9)
    cosines = torch.linalg.svdvals(u.mT @ v).clamp(max=1)
    assert_close(fg.subspace_distance(u, v), torch.linalg.vector_norm(torch.arccos(cosines)), 1e-7)
    assert_close(fg.subspace_distance(u, v, "asimov"), torch.arccos(cosines.min()), 1e-7)


@pytest.mark.parametrize("kind", KINDS)
@given(bases_=triples())
def test_distances_are_metrics(kind, bases_):
    u, v, w = bases_
    d = [fg.subspace_distance(*pair, kind) for pair in ((u, v), (v, w), (u, w))]
    assert float(d[2]) <= float(d[0]) + float(d[1]) + 1e-9
    assert_close(fg.subspace_distance(v, u, kind), d[0])
    assert float(fg.subspace_distance(u, u @ orthonormal(0, u.shape[1], u.shape[1]), kind)) < 1e-13


@given(triples(2))
def test_distances_are_ordered(pair):
    d = {kind: float(fg.subspace_distance(*pair, kind)) for kind in KINDS}
    assert d["projection"] <= d["chordal"] + 1e-12 <= d["geodesic"] + 2e-12
    assert d["asimov"] <= d["fubini-study"] + 1e-9 and d["fubini-study"] <= d["geodesic"] + 1e-9
    assert d["geodesic"] <= math.pi / 2 * pair[0].shape[1] ** 0.5 + 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-10, 1e-6])
def test_every_distance_keeps_tiny_angles(kind, scale):
    angles = [scale, 2 * scale]
    length = 2 * scale if kind == "asimov" else scale * 5**0.5
    assert abs(float(fg.subspace_distance(*at_angles(angles), kind)) / length - 1) < 1e-4


def test_known_distances_of_two_lines_at_60_degrees_and_at_right_angles():
    line = lambda degrees: torch.tensor([[math.cos(math.radians(degrees))], [math.sin(math.radians(degrees))]])
    sixty = [float(fg.subspace_distance(line(0).double(), line(60).double(), kind)) for kind in KINDS]
    assert sixty == pytest.approx([math.pi / 3, 1.0, 3**0.5 / 2, math.pi / 3, math.pi / 3], abs=1e-6)
    right = [float(fg.subspace_distance(torch.eye(2)[:, :1], torch.eye(2)[:, 1:], kind)) for kind in KINDS]
    assert right == pytest.approx([math.pi / 2, 2**0.5, 1.0, math.pi / 2, math.pi / 2], abs=1e-6)


@given(SIZES.flatmap(lambda p: st.tuples(bases(p), bases(p))).filter(lambda b: min(b[0].shape[1], b[1].shape[1]) > 0))
def test_overlap_is_the_mean_squared_cosine_and_reaches_its_ends(pair):
    u, v = pair
    value = fg.subspace_overlap(u, v)
    assert_close(value, torch.cos(fg.principal_angles(u, v)).square().mean())
    assert -1e-12 <= float(value) <= 1 + 1e-12
    assert_close(fg.subspace_overlap(u, u), torch.ones((), dtype=u.dtype))
    p, k = u.shape
    assert float(fg.subspace_overlap(torch.eye(p + 1)[:, :k], torch.eye(p + 1)[:, p:])) == 0


def test_random_subspaces_overlap_by_k_over_p_on_average():
    values = [float(fg.subspace_overlap(orthonormal(i, 20, 5), orthonormal(i + 1000, 20, 3))) for i in range(300)]
    assert sum(values) / 300 == pytest.approx(5 / 20, abs=0.02)


@pytest.mark.parametrize("kind", [*KINDS, "angles", "overlap"])
@pytest.mark.parametrize("angles", [[0.2, 0.7], [0.5, 0.5], [1e-3, 1.5]])
def test_gradients_agree_with_finite_differences(kind, angles):
    """Through a QR, since the functions are of the span; equal angles only in functions symmetric in them."""
    if kind in ("angles", "asimov") and angles[0] == angles[1]:
        return
    x, y = at_angles(angles)
    inputs = (x @ gaussian(5, 2, 2)).requires_grad_(), (y @ gaussian(6, 2, 2)).requires_grad_()

    def function(a, b):
        u, v = torch.linalg.qr(a).Q, torch.linalg.qr(b).Q
        if kind == "angles":
            return fg.principal_angles(u, v)
        return fg.subspace_overlap(u, v) if kind == "overlap" else fg.subspace_distance(u, v, kind)

    assert torch.autograd.gradcheck(function, inputs, atol=1e-5, eps=1e-7)


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (1, 3)])
def test_gradients_of_angles_between_subspaces_of_different_dimension(shape):
    inputs = tuple(gaussian(i, 7, k).requires_grad_() for i, k in enumerate(shape))
    assert torch.autograd.gradcheck(
        lambda a, b: fg.principal_angles(torch.linalg.qr(a).Q, torch.linalg.qr(b).Q), inputs
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_distance_at_zero_is_finite(kind):
    x = orthonormal(0, 5, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(fg.subspace_distance(x, x.detach().clone(), kind), x)
    assert torch.isfinite(gradient).all() and float(gradient.abs().max()) < 1.5
    identity = torch.eye(4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(fg.subspace_distance(identity, torch.eye(4, 2), kind), identity)
    assert float(gradient.abs().max()) == 0


def test_batches_broadcast_and_half_precision_is_computed_in_float32():
    u, v = torch.stack([orthonormal(i, 6, 2) for i in range(3)]), orthonormal(9, 6, 3)
    expected = torch.stack([fg.principal_angles(x, v) for x in u])
    assert_close(fg.principal_angles(u, v), expected)
    assert_close(fg.principal_angles(v, u), expected)
    half = fg.principal_angles(u.bfloat16(), v.bfloat16())
    assert half.dtype == torch.float32 and torch.allclose(half.double(), expected, atol=0.05)
    assert fg.subspace_overlap(u.half(), v.half()).dtype == torch.float32


def test_bad_input_is_refused_by_name():
    u = torch.eye(4)[:, :2]
    with pytest.raises(ValueError, match="v is not orthonormal"):
        fg.principal_angles(u, 2 * u)
    with pytest.raises(ValueError, match=r"u spans a subspace of R\^4 but v one of R\^5"):
        fg.principal_angles(u, torch.eye(5)[:, :2])
    with pytest.raises(ValueError, match="u has 2 columns and v 1"):
        fg.subspace_distance(u, u[:, :1])
    with pytest.raises(ValueError, match="kind must be one of"):
        fg.subspace_distance(u, u, "chord")
    with pytest.raises(ValueError, match="no columns"):
        fg.subspace_overlap(u, u[:, :0])
    with pytest.raises(ValueError, match="batch shape"):
        fg.principal_angles(u.expand(2, 4, 2), u.expand(3, 4, 2))
    with pytest.raises(TypeError, match=r"u is torch\.float32 but v is torch\.float64"):
        fg.principal_angles(u, u.double())


def test_second_derivatives_are_refused_not_wrong():
    u = torch.eye(4)[:, :2].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"^principal_angles has no second derivatives"):
        torch.autograd.grad(fg.principal_angles(u, torch.eye(4)[:, 1:3]).sum(), u, create_graph=True)


def test_distances_of_empty_subspaces_are_zero_and_dimensions_are_compared_in_batches_too():
    empty, u = torch.zeros(3, 4, 0), torch.eye(4)[:, :2].expand(3, 4, 2)
    for kind in KINDS:
        assert torch.equal(fg.subspace_distance(empty, empty, kind), torch.zeros(3))
    with pytest.raises(ValueError, match="u has 2 columns and v 1"):
        fg.subspace_distance(u, u[..., :1])


def test_the_overlap_has_a_gradient_of_zero_where_it_is_largest():
    start = gaussian(0, 5, 2).requires_grad_()
    target = torch.linalg.qr(start.detach()).Q
    function = lambda a: fg.subspace_overlap(torch.linalg.qr(a).Q, target)
    assert torch.autograd.gradcheck(function, start)
    assert float(torch.autograd.grad(function(start), start)[0].abs().max()) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_squared_distances_are_differentiable_at_zero(kind):
    start = gaussian(0, 5, 2).requires_grad_()
    target = torch.linalg.qr(start.detach()).Q
    if kind == "asimov":  # the largest of two equal angles has corners, squared or not
        start, target = gaussian(0, 5, 1).requires_grad_(), torch.linalg.qr(gaussian(0, 5, 1)).Q
    function = lambda a: fg.subspace_distance(torch.linalg.qr(a).Q, target, kind) ** 2
    assert torch.autograd.gradcheck(function, start)


def test_messages_print_the_dimensions():
    u, v = torch.eye(5)[:, :2], torch.eye(5)[:, :3]
    with pytest.raises(ValueError, match=r"^u has 2 columns and v 3: these distances are between subspaces of equal"):
        fg.subspace_distance(u, v)
    with pytest.raises(ValueError, match=r"^u spans a subspace of R\^5 but v one of R\^4"):
        fg.principal_angles(u, torch.eye(4)[:, :2])
    with pytest.raises(ValueError, match=r"^u has batch shape \(2,\) and v \(3,\), which do not broadcast"):
        fg.principal_angles(u.expand(2, 5, 2), u.expand(3, 5, 2))
    with pytest.raises(ValueError, match=r"^u or v has no columns"):
        fg.subspace_overlap(u, u[:, :0])


def test_each_matrix_of_a_batch_has_the_gradient_it_has_alone():
    x, y = (torch.stack([orthonormal(seed + i, 5, 2) for i in range(3)]).requires_grad_() for seed in (0, 10))
    fg.principal_angles(x, y).square().sum().backward()
    for i in range(3):
        a, b = (z[i].detach().clone().requires_grad_() for z in (x, y))
        fg.principal_angles(a, b).square().sum().backward()
        assert_close(x.grad[i], a.grad, 1e-12)
        assert_close(y.grad[i], b.grad, 1e-12)
