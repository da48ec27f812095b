"""The Grassmann manifold obeys the laws of a Riemannian manifold and runs under geoopt's optimizers."""

import math

import geoopt
import pytest
import torch
from geometry_cases import SEEDS, assert_close, gaussian, orthonormal
from hypothesis import given
from hypothesis import strategies as st

import fishergeo as fg

M = fg.Grassmann()


def same_span(x, y, tol=1e-9):
    assert_close(x @ x.mT, y @ y.mT, tol)


@st.composite
def points(draw, tangents=1, reach=1.5):
    """A point and tangent vectors of operator norm up to `reach`, inside the injectivity radius π/2."""
    p = draw(st.integers(2, 8))
    k = draw(st.integers(1, p))
    x = orthonormal(draw(SEEDS), p, k)
    vectors = []
    for _ in range(tangents):
        u = M.proju(x, gaussian(draw(SEEDS), p, k))
        length = float(torch.linalg.matrix_norm(u, 2))
        vectors.append(u * draw(st.floats(0, reach)) / max(length, 1e-6) if length > 1e-6 else 0 * u)
    return (x, *vectors)


@given(points())
def test_projections_are_idempotent_and_their_results_pass_geoopts_checks(case):
    x, u = case
    p, k = x.shape
    M.assert_check_point_on_manifold(x)
    M.assert_check_vector_on_tangent(x, u)
    near = x + 0.01 * gaussian(3, p, k)
    on = M.projx(near)
    M.assert_check_point_on_manifold(on)
    assert_close(M.projx(on), on)
    v = M.proju(x, gaussian(4, p, k))
    M.assert_check_vector_on_tangent(x, v)
    assert_close(M.proju(x, v), v)
    assert_close(M.egrad2rgrad(x, gaussian(4, p, k)), v, 0)


def test_the_projection_keeps_the_span_and_is_the_nearest_basis():
    a = gaussian(0, 6, 3)
    on = M.projx(a)
    assert_close(on @ on.mT @ a, a)
    rivals = [torch.linalg.qr(a).Q, on @ orthonormal(1, 3, 3)]
    assert all(torch.linalg.matrix_norm(a - on) <= torch.linalg.matrix_norm(a - r) for r in rivals)


def test_checks_of_points_and_vectors_fail_where_they_should():
    x = orthonormal(0, 5, 2)
    assert not M.check_point_on_manifold(2 * x)
    assert not M.check_vector_on_tangent(x, x)
    assert not M.check_point(torch.zeros(2, 5))
    assert "X^T X" in M.check_point_on_manifold(2 * x, explain=True)[1]
    assert "x^T u" in M.check_vector_on_tangent(x, x, explain=True)[1]
    assert "shape[-1] <= shape[-2]" in M.check_point(torch.zeros(2, 5), explain=True)[1]
    with pytest.raises(ValueError, match="Grassmann"):
        M.assert_check_point_on_manifold(2 * x)


@given(points())
def test_exp_stays_on_the_manifold_and_log_inverts_it(case):
    x, u = case
    y = M.expmap(x, u)
    M.assert_check_point_on_manifold(y, atol=1e-12, rtol=0)
    assert_close(M.logmap(x, y), u, 1e-9)


@given(points(reach=0), SEEDS)
def test_log_is_tangent_and_exp_inverts_it_for_any_two_points(case, seed):
    x, _ = case
    y = orthonormal(seed, *x.shape)
    v = M.logmap(x, y)
    M.assert_check_vector_on_tangent(x, v, atol=1e-12, rtol=0)
    same_span(M.expmap(x, v), y)
    assert_close(M.norm(x, v), M.dist(x, y))


@given(points(reach=50))
def test_exp_is_accurate_for_steps_that_wrap_around(case):
    x, u = case
    q, s, wh = torch.linalg.svd(u, full_matrices=False)
    expected = (x @ wh.mT * s.cos() + q * s.sin()) @ wh
    assert_close(M.expmap(x, u), expected, 1e-11)


@given(points(reach=0))
def test_at_zero_exp_and_log_are_exact(case):
    x, u = case
    assert_close(M.expmap(x, u), x, 1e-14)
    assert float(M.logmap(x, x).abs().max()) < 1e-14
    assert float(M.dist(x, x)) < 1e-14


def test_log_is_sound_at_right_angles():
    x, y = torch.eye(6, dtype=torch.float64)[:, :3], torch.eye(6, dtype=torch.float64)[:, 3:]
    v = M.logmap(x, y)
    M.assert_check_vector_on_tangent(x, v)
    assert float(M.norm(x, v)) == pytest.approx(3**0.5 * math.pi / 2)
    same_span(M.expmap(x, v), y)


@given(points(), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_geodesics_have_constant_speed_and_are_shortest(case, s, t):
    x, u = case
    y = M.expmap(x, u)
    whole = float(M.dist(x, y))
    assert abs(float(M.dist(M.geodesic(s, x, y), M.geodesic(t, x, y))) - abs(s - t) * whole) < 1e-8
    assert_close(M.geodesic(0.0, x, y), x, 1e-13)
    same_span(M.geodesic(1.0, x, y), y)
    assert abs(whole - float(torch.linalg.matrix_norm(u))) < 1e-9


@given(points(), SEEDS)
def test_distance_is_symmetric_squared_by_dist2_and_does_not_see_the_basis(case, seed):
    x, u = case
    y = M.expmap(x, u)
    turn = orthonormal(seed, x.shape[1], x.shape[1])
    assert_close(M.dist(y, x), M.dist(x, y))
    assert_close(M.dist(x @ turn, y), M.dist(x, y))
    assert_close(M.dist2(x, y), M.dist(x, y) ** 2)
    assert_close(M.dist(x, y), fg.subspace_distance(x, y))
    assert M.dist(x, y, keepdim=True).shape == M.dist2(x, y, keepdim=True).shape == (1, 1)


@given(points(tangents=3))
def test_parallel_transport_keeps_inner_products_and_carries_the_velocity(case):
    x, u, v, w = case
    y = M.expmap(x, u)
    moved_v, moved_w = M.transp_follow_expmap(x, u, v), M.transp_follow_expmap(x, u, w)
    M.assert_check_vector_on_tangent(y, moved_v, atol=1e-12, rtol=0)
    assert_close(M.inner(y, moved_v, moved_w), M.inner(x, v, w))
    assert_close(M.transp_follow_expmap(x, u, u), -M.logmap(y, x), 1e-8)
    q, s, wh = torch.linalg.svd(u, full_matrices=False)
    along = q.mT @ v
    textbook = v + q @ ((s.cos() - 1)[:, None] * along) - x @ (wh.mT @ (s.sin()[:, None] * along))
    assert_close(moved_v, textbook, 1e-11)
    both = M.expmap_transp(x, u, v)
    assert_close(both[0], y, 0)
    assert_close(both[1], moved_v, 0)


@given(points(tangents=2))
def test_transport_to_a_point_and_back_is_the_identity_in_any_basis(case):
    x, u, v = case
    y = M.expmap(x, u) @ orthonormal(5, x.shape[1], x.shape[1])
    there = M.transp(x, y, v)
    M.assert_check_vector_on_tangent(y, there)
    assert_close(M.inner(y, there), M.inner(x, v))
    assert_close(M.transp(y, x, there), v, 1e-8)


@given(points())
def test_the_retraction_agrees_with_exp_to_second_order(case):
    x, u = case
    errors = []
    for h in (1e-2, 1e-3):
        y = M.retr(x, h * u)
        M.assert_check_point_on_manifold(y, atol=1e-12, rtol=0)
        errors.append(float(torch.linalg.matrix_norm(y - M.expmap(x, h * u))))
    assert errors[0] < 1e-5 and errors[1] < 1e-8
    moved, vector = M.retr_transp(x, u, u)
    assert_close(moved, M.retr(x, u), 0)
    M.assert_check_vector_on_tangent(moved, vector)
    assert_close(M.transp_follow_retr(x, u, u), vector, 0)


@given(points(tangents=2))
def test_the_inner_product_is_bilinear_symmetric_and_gives_the_norm(case):
    x, u, v = case
    assert_close(M.inner(x, u, v), M.inner(x, v, u))
    assert_close(M.inner(x, 2 * u + v, v), 2 * M.inner(x, u, v) + M.inner(x, v))
    assert_close(M.norm(x, u) ** 2, M.inner(x, u))
    assert M.inner(x, u, v, keepdim=True).shape == M.norm(x, u, keepdim=True).shape == (1, 1)


def test_operations_are_batched():
    x = torch.stack([orthonormal(i, 6, 2) for i in range(3)])
    u = M.proju(x, gaussian(9, 3, 6, 2))
    y = M.expmap(x, u)
    for i in range(3):
        assert_close(y[i], M.expmap(x[i], u[i]))
        assert_close(M.logmap(x, y)[i], M.logmap(x[i], y[i]))
        assert_close(M.transp(x, y, u)[i], M.transp(x[i], y[i], u[i]))
        assert_close(M.dist(x, y)[i], M.dist(x[i], y[i]))
        assert_close(
            M.geodesic(torch.tensor([0.1, 0.2, 0.3], dtype=x.dtype), x, y)[i], M.geodesic((i + 1) / 10, x[i], y[i])
        )
    assert M.dist(x, y, keepdim=True).shape == (3, 1, 1)


def test_gradients_of_exp_agree_with_finite_differences_at_zero_too():
    x = orthonormal(0, 5, 2)
    for u in (gaussian(1, 5, 2), torch.zeros(5, 2, dtype=torch.float64)):
        inputs = x.clone().requires_grad_(), u.requires_grad_()
        assert torch.autograd.gradcheck(lambda a, b: M.expmap(a, M.proju(a, b)), inputs)


def test_gradients_of_log_and_retraction_agree_with_finite_differences():
    x, y = gaussian(0, 5, 2).requires_grad_(), gaussian(1, 5, 2).requires_grad_()
    qf = lambda a: torch.linalg.qr(a).Q
    assert torch.autograd.gradcheck(lambda a, b: M.logmap(qf(a), qf(b)), (x, y))
    assert torch.autograd.gradcheck(lambda a, b: M.retr(qf(a), M.proju(qf(a), b)), (x, y))


@given(points())
def test_the_gradient_of_the_squared_distance_is_minus_twice_the_logarithm(case):
    x, u = case
    y = M.expmap(x, u)
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(M.dist2(point, y), point)
    assert_close(M.egrad2rgrad(x, gradient), -2 * M.logmap(x, y), 1e-7)


def test_the_gradient_of_the_squared_distance_at_zero():
    start = gaussian(0, 5, 2).requires_grad_()
    target = torch.linalg.qr(start.detach()).Q
    assert torch.autograd.gradcheck(lambda a: M.dist2(torch.linalg.qr(a).Q, target), start)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: geoopt.optim.RiemannianAdam([p], lr=0.05, stabilize=10),
        lambda p: geoopt.optim.RiemannianAdam([p], lr=0.05, amsgrad=True),
        lambda p: geoopt.optim.RiemannianSGD([p], lr=0.02),
        lambda p: geoopt.optim.RiemannianSGD([p], lr=0.01, momentum=0.8, stabilize=10),
        lambda p: geoopt.optim.RiemannianSGD([p], lr=0.01, momentum=0.8, nesterov=True),
    ],
)
def test_geoopts_optimizers_find_the_leading_eigenspace(make):
    root = gaussian(0, 8, 8)
    values, vectors = torch.linalg.eigh(root @ torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64)) @ root.mT / 8)
    matrix = vectors @ torch.diag(values) @ vectors.mT
    point = geoopt.ManifoldParameter(M.random(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    optimizer = make(point)
    for _ in range(400):
        optimizer.zero_grad()
        loss = -(point.mT @ matrix @ point).trace()
        loss.backward()
        optimizer.step()
    M.assert_check_point_on_manifold(point.detach(), atol=1e-8)
    assert float(fg.principal_angles(torch.Tensor(point.detach()).double(), vectors[:, -2:]).max()) < 0.03


def test_random_points_are_uniform_and_reproducible_and_the_origin_is_the_first_axes():
    x = M.random(4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    again = M.random((4, 5, 2), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert isinstance(x, geoopt.ManifoldTensor) and x.manifold.name == "Grassmann"
    assert_close(torch.Tensor(x), torch.Tensor(again), 0)
    M.assert_check_point_on_manifold(x)
    many = torch.Tensor(M.random(4000, 3, 1, generator=torch.Generator().manual_seed(1)))
    assert torch.allclose((many @ many.mT).mean(0), torch.eye(3) / 3, atol=0.03)
    origin = M.origin(2, 4, 2)
    assert torch.equal(torch.Tensor(origin)[1], torch.eye(4)[:, :2])
    for make in (M.random, M.origin):
        with pytest.raises(ValueError, match=r"shape\[-1\]"):
            make(2, 3)


# --- Karcher mean ---------------------------------------------------------------------------------------------------


@given(points(tangents=1, reach=0.7))
def test_the_mean_of_two_points_is_the_middle_of_their_geodesic(case):
    x, u = case
    y = M.expmap(x, u)
    same_span(fg.karcher_mean(torch.stack([x, y])), M.geodesic(0.5, x, y), 1e-8)


@given(points(tangents=3, reach=0.5), SEEDS)
def test_the_mean_balances_logarithms_and_does_not_see_bases_or_coordinates(case, seed):
    x, *vectors = case
    p, k = x.shape
    y = torch.stack([M.expmap(x, u) for u in vectors])
    mean = fg.karcher_mean(y)
    assert float(M.logmap(mean.expand_as(y), y).mean(0).abs().max()) < 1e-9
    turned = torch.stack([z @ orthonormal(seed + i, k, k) for i, z in enumerate(y)])
    same_span(fg.karcher_mean(turned), mean, 1e-8)
    turn = orthonormal(seed, p, p)
    same_span(fg.karcher_mean(turn @ y), turn @ mean, 1e-8)


def test_weights_of_the_mean():
    x = orthonormal(0, 6, 2)
    u = M.proju(x, gaussian(1, 6, 2)) * 0.2
    y = M.expmap(x, u)
    weighted = fg.karcher_mean(torch.stack([x, y]), torch.tensor([3.0, 1.0], dtype=torch.float64))
    same_span(weighted, M.geodesic(0.25, x, y), 1e-8)
    same_span(fg.karcher_mean(torch.stack([x, y]), torch.tensor([1.0, 0.0], dtype=torch.float64)), x, 1e-8)


def test_a_mean_that_does_not_converge_is_an_error():
    spread = torch.stack([orthonormal(i, 8, 3) for i in range(5)])
    with pytest.raises(RuntimeError, match="did not converge: after 1 steps"):
        fg.karcher_mean(spread, max_iter=1)


@pytest.mark.parametrize(
    ("points_", "keywords", "error", "message"),
    [
        (torch.eye(3), {}, ValueError, "points must have shape"),
        (2 * torch.eye(3)[None], {}, ValueError, "points is not orthonormal"),
        (torch.eye(3)[None], {"weights": torch.ones(2)}, ValueError, "weights must be 1 numbers"),
        (torch.eye(3)[None], {"weights": -torch.ones(1)}, ValueError, "weights must be 1 numbers"),
        (torch.eye(3)[None], {"weights": torch.zeros(1)}, ValueError, "weights must be 1 numbers"),
        (torch.eye(3)[None], {"weights": torch.ones(1).double()}, TypeError, "weights is torch.float64"),
        (torch.eye(3)[None], {"max_iter": 0}, ValueError, "max_iter must be at least 1"),
        (torch.eye(3)[None], {"tol": -1.0}, ValueError, "tol must be"),
    ],
)
def test_bad_input_to_the_mean_is_refused_by_name(points_, keywords, error, message):
    with pytest.raises(error, match=message):
        fg.karcher_mean(points_, **keywords)


@pytest.mark.parametrize("name", ["Sphere", "Stiefel", "SymmetricPositiveDefinite"])
def test_geoopts_own_manifolds_have_no_second_name_here(name):
    assert hasattr(geoopt, name) and not hasattr(fg, name)


def test_origin_is_a_point_of_this_manifold_and_small_vertical_parts_are_noticed():
    assert M.origin(4, 2).manifold.name == "Grassmann"
    x = orthonormal(0, 5, 2)
    assert not M.check_vector_on_tangent(x, 1e-3 * x) and not M.check_point_on_manifold((1 + 1e-3) * x)


def through_qr(function):
    """The function of orthonormal bases as one of any matrices, so that finite differences stay on the manifold."""
    return lambda *matrices: function(*(torch.linalg.qr(a).Q for a in matrices[:2]), *matrices[2:])


SMOOTH = {
    "logmap": through_qr(M.logmap),
    "dist2": through_qr(M.dist2),
    "geodesic": through_qr(lambda x, y: M.geodesic(0.3, x, y)),
    "transp": through_qr(lambda x, y: M.transp(x, y, M.proju(x, gaussian(7, 6, 3)))),
    "retr": through_qr(lambda x, y: M.retr(x, M.proju(x, y))),
    "transp_follow_expmap": through_qr(
        lambda x, y: M.transp_follow_expmap(x, M.logmap(x, y), M.proju(x, gaussian(7, 6, 3)))
    ),
    "retr_transp": through_qr(lambda x, y: M.retr_transp(x, M.logmap(x, y), M.proju(x, gaussian(7, 6, 3)))[1]),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("angles", [[0.0, 0.0, 0.0], [0.4, 0.4, 0.4], [0.0, 0.005, 0.0051], [0.3, 1.0, 1.4]])
def test_gradients_agree_with_finite_differences_at_zero_and_equal_angles_too(name, angles):
    frame, theta = orthonormal(0, 6, 6), torch.tensor(angles, dtype=torch.float64)
    x = frame[:, :3].clone()
    y = (x * theta.cos() + frame[:, 3:] * theta.sin()) @ orthonormal(1, 3, 3)
    assert torch.autograd.gradcheck(SMOOTH[name], (x.requires_grad_(), y.requires_grad_()))


@pytest.mark.parametrize("name", ["logmap", "retr"])
def test_second_derivatives_are_refused_by_the_name_of_the_map(name):
    x, y = orthonormal(0, 6, 2).requires_grad_(), orthonormal(1, 6, 2)
    value = M.logmap(x, y).sum() if name == "logmap" else M.retr(x, y).sum()
    called = "logmap" if name == "logmap" else "projx"
    with pytest.raises(RuntimeError, match=rf"^Grassmann\.{called} has no second derivatives"):
        torch.autograd.grad(value, x, create_graph=True)


def test_the_points_that_are_made_lie_where_asked_and_are_refused_by_name():
    for make in (M.random, M.origin):
        point = make(5, 2, device="meta", dtype=torch.float64)
        assert point.device.type == "meta" and point.dtype == torch.float64
        with pytest.raises(ValueError, match=r"`x` should have shape\[-1\] <= shape\[-2\], got 3 > 2"):
            make(2, 3)


def test_sizes_of_batched_vectors_and_distances_are_those_of_each():
    x, y = (torch.stack([orthonormal(i + s, 6, 2) for i in range(3)]) for s in (0, 10))
    v = M.logmap(x, y)
    assert_close(M.norm(x, v), torch.stack([M.norm(x[i], v[i]) for i in range(3)]))
    assert_close(M.norm(x, v), torch.linalg.matrix_norm(v))
    assert_close(M.dist2(x, y), torch.stack([M.dist2(x[i], y[i]) for i in range(3)]))
    assert_close(M.inner(x, v), torch.linalg.matrix_norm(v) ** 2)


def test_the_mean_keeps_the_dtype_and_half_precision_is_averaged_in_float32():
    points_ = torch.stack([orthonormal(0, 6, 2), orthonormal(0, 6, 2)]).bfloat16()
    mean = fg.karcher_mean(points_)
    assert mean.dtype == torch.bfloat16 and mean.shape == (6, 2)
    assert torch.allclose((mean @ mean.mT).float(), (points_[0] @ points_[0].mT).float(), atol=0.05)
    assert fg.karcher_mean(torch.zeros(3, 4, 0)).shape == (4, 0)


def test_batches_of_two_dimensions_move_like_each_of_their_points():
    x = torch.stack([orthonormal(i, 6, 3) for i in range(4)]).reshape(2, 2, 6, 3)
    u = M.proju(x, gaussian(9, 2, 2, 6, 3))
    for i, j in ((0, 1), (1, 0)):
        assert_close(M.expmap(x, u)[i, j], M.expmap(x[i, j], u[i, j]))
        assert_close(M.transp_follow_expmap(x, u, u)[i, j], M.transp_follow_expmap(x[i, j], u[i, j], u[i, j]))


@pytest.mark.parametrize("weights", [[3e38, 3e38], [1e-45, 1e-45]])
def test_a_mean_with_weights_whose_sum_leaves_the_dtype_is_that_of_their_shares(weights):
    u = torch.tensor([[0.6], [0.8]])
    v = torch.tensor([[0.8], [0.6]])
    mean = fg.karcher_mean(torch.stack([u, v]), torch.tensor(weights))
    assert mean.abs().flatten().tolist() == pytest.approx([0.5**0.5] * 2, abs=1e-5)
