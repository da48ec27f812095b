"""LowRank does on factors what dense matrices do."""

import pytest
import torch
from geometry_cases import BATCHES, SEEDS, SIZES, assert_close, gaussian, low_ranks
from hypothesis import given
from hypothesis import strategies as st

import fishergeo as fg


@st.composite
def pairs(draw):
    """Two updates of one shape and of independent ranks."""
    p, q, batch = draw(SIZES), draw(SIZES), draw(BATCHES)
    make = low_ranks(p=p, q=q, batch=st.just(batch))
    return draw(make), draw(make)


@given(pairs())
def test_sum_and_difference_are_those_of_the_matrices_and_ranks_add(pair):
    a, b = pair
    assert_close((a + b).to_dense(), a.to_dense() + b.to_dense())
    assert_close((a - b).to_dense(), a.to_dense() - b.to_dense())
    assert (a + b).rank == (a - b).rank == a.rank + b.rank


@given(low_ranks(), st.floats(-5, 5))
def test_scaling_and_negation_are_those_of_the_matrix_and_keep_the_rank(a, c):
    for scaled in (c * a, a * c, torch.tensor(c, dtype=a.dtype) * a, a * torch.tensor(c, dtype=a.dtype)):
        assert_close(scaled.to_dense(), c * a.to_dense())
        assert scaled.rank == a.rank
    assert_close((-a).to_dense(), -a.to_dense())
    assert_close((a / 4).to_dense(), a.to_dense() / 4)


@given(low_ranks())
def test_transpose_twice_is_the_matrix_itself(a):
    assert_close(a.mT.to_dense(), a.to_dense().mT)
    assert_close(a.mT.mT.to_dense(), a.to_dense())
    assert a.mT.shape == a.to_dense().mT.shape


@given(low_ranks(), SIZES, SEEDS)
def test_products_with_dense_matrices_keep_the_rank(a, k, seed):
    p, q = a.shape[-2:]
    right, left = gaussian(seed, q, k), gaussian(seed, k, p)
    assert_close((a @ right).to_dense(), a.to_dense() @ right)
    assert_close((left @ a).to_dense(), left @ a.to_dense())
    assert (a @ right).rank == (left @ a).rank == a.rank


@given(low_ranks(), SEEDS)
def test_products_with_vectors_are_dense_vectors(a, seed):
    p, q = a.shape[-2:]
    assert_close(a @ gaussian(seed, q), a.to_dense() @ gaussian(seed, q))
    assert_close(gaussian(seed, p) @ a, gaussian(seed, p) @ a.to_dense())


@given(low_ranks(batch=st.just(())), SIZES, SEEDS, st.integers(0, 4))
def test_product_of_two_low_ranks_has_the_smaller_rank(a, k, seed, rank):
    b = fg.LowRank(gaussian(seed, a.shape[-1], rank), gaussian(seed + 1, rank, k))
    assert_close((a @ b).to_dense(), a.to_dense() @ b.to_dense())
    assert (a @ b).rank == min(a.rank, b.rank)


@given(pairs())
def test_inner_product_is_frobenius_symmetric_and_agrees_with_dense(pair):
    a, b = pair
    expected = (a.to_dense() * b.to_dense()).sum((-2, -1))
    assert_close(a.inner(b), expected)
    assert_close(b.inner(a), expected)
    assert_close(a.inner(b.to_dense()), expected)


@given(low_ranks())
def test_norms_are_frobenius_norms(a):
    assert_close(a.norm(), torch.linalg.matrix_norm(a.to_dense()))
    assert_close(a.squared_norm(), (a.to_dense() ** 2).sum((-2, -1)))
    assert_close(a.norm() ** 2, a.squared_norm())


@given(pairs())
def test_norm_obeys_triangle_and_cauchy_schwarz(pair):
    a, b = pair
    assert ((a + b).norm() <= a.norm() + b.norm() + 1e-9).all()
    assert (a.inner(b).abs() <= a.norm() * b.norm() + 1e-9).all()


@given(low_ranks())
def test_squared_norm_of_a_cancelled_difference_is_never_negative(a):
    rotation = torch.linalg.qr(gaussian(7, a.rank, a.rank)).Q
    same = fg.LowRank(a.left @ rotation, rotation.mT @ a.right)
    difference = (a - same).squared_norm()
    assert (difference >= 0).all()
    assert_close(difference, torch.zeros_like(difference), 1e-9 * max(1.0, float(a.squared_norm().max())))


@given(SIZES, st.integers(0, 4), SEEDS)
def test_trace_is_the_sum_of_the_diagonal(p, r, seed):
    a = fg.LowRank(gaussian(seed, 2, p, r), gaussian(seed + 1, 2, r, p))
    assert_close(a.trace(), a.to_dense().diagonal(dim1=-2, dim2=-1).sum(-1))


@given(low_ranks())
def test_svd_has_orthonormal_factors_descending_values_and_multiplies_back(a):
    u, s, vh = a.svd()
    k = min(*a.shape[-2:], a.rank)
    assert s.shape == (*a.shape[:-2], k)
    assert_close(u.mT @ u, torch.eye(k, dtype=a.dtype).expand(*a.shape[:-2], k, k))
    assert_close(vh @ vh.mT, torch.eye(k, dtype=a.dtype).expand(*a.shape[:-2], k, k))
    assert (s >= 0).all() and (s.diff(dim=-1) <= 1e-12).all()
    assert_close((u * s.unsqueeze(-2)) @ vh, a.to_dense())
    assert_close(s, torch.linalg.svdvals(a.to_dense())[..., :k])


@given(low_ranks(), st.integers(0, 6))
def test_truncation_is_the_best_approximation_of_its_rank(a, k):
    short = a.truncate(k)
    tail = torch.linalg.svdvals(a.to_dense())[..., k:]
    assert short.rank == min(k, *a.shape[-2:], a.rank)
    error = torch.linalg.matrix_norm(a.to_dense() - short.to_dense())
    assert_close(error, tail.square().sum(-1).sqrt())


@given(low_ranks(batch=st.just(())))
def test_bases_are_orthonormal_and_span_the_matrix(a):
    rank = int(torch.linalg.matrix_rank(a.to_dense()))
    columns, rows = a.column_basis(), a.row_basis()
    assert columns.shape == (a.shape[0], rank) and rows.shape == (a.shape[1], rank)
    assert int(a.numerical_rank()) == rank
    assert_close(columns.mT @ columns, torch.eye(rank, dtype=a.dtype))
    assert_close(columns @ (columns.mT @ a.to_dense()), a.to_dense())
    assert_close((a.to_dense() @ rows) @ rows.mT, a.to_dense())


def test_rank_of_a_cancelled_difference_is_zero_and_of_badly_scaled_factors_is_full():
    a = fg.LowRank(gaussian(0, 7, 3), gaussian(1, 3, 5))
    assert int((a - a).numerical_rank()) == 0
    scales = torch.tensor([1e9, 1.0, 1e-9], dtype=torch.float64)
    assert int(fg.LowRank(a.left * scales, a.right / scales[:, None]).numerical_rank()) == 3


def test_bases_of_a_batch_with_different_ranks_are_refused():
    left = gaussian(0, 2, 5, 2)
    left[1, :, 1] = left[1, :, 0]
    with pytest.raises(ValueError, match="ranks 1 to 2"):
        fg.LowRank(left, gaussian(1, 2, 2, 4)).column_basis()


@given(low_ranks(batch=st.just((3,))), st.integers(0, 2))
def test_indexing_the_batch_gives_that_matrix(a, i):
    assert_close(a[i].to_dense(), a.to_dense()[i])
    assert_close(a[1:].to_dense(), a.to_dense()[1:])


def test_indexing_into_the_matrix_is_refused():
    a = fg.LowRank(torch.ones(2, 3, 1), torch.ones(2, 1, 4))
    with pytest.raises(IndexError, match="matrix dimensions"):
        a[0, 1:]
    with pytest.raises(IndexError, match="no batch dimension"):
        a[0][0]


def test_batches_broadcast():
    a = fg.LowRank(gaussian(0, 4, 3, 2), gaussian(1, 2, 5))
    assert a.shape == (4, 3, 5)
    assert_close(a.to_dense(), a.left @ a.right[0])
    assert_close((fg.LowRank(a.left[0], a.right[0]) + a).to_dense(), a.to_dense()[:1] + a.to_dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_operation_keeps_the_dtype(dtype):
    a = fg.LowRank(gaussian(0, 6, 2, dtype=dtype), gaussian(1, 2, 6, dtype=dtype))
    results = [a.to_dense(), a.inner(a), a.norm(), a.squared_norm(), a.trace(), *a.svd(), a @ a.right[0]]
    results += [(a + a).left, (2 * a).left, (a @ a).right, a.truncate(1).left, a.mT.left]
    assert {x.dtype for x in results} == {dtype}
    assert a.to(torch.float32).dtype == torch.float32
    assert torch.allclose(a.norm().double(), torch.linalg.matrix_norm(a.to_dense().double()), rtol=0.05)


@given(low_ranks(rank=st.integers(1, 3)))
def test_detached_factors_ask_for_no_gradient(a):
    tracked = fg.LowRank(a.left.requires_grad_(), a.right)
    assert tracked.requires_grad and not tracked.detach().requires_grad


SCALARS = {
    "inner": lambda a, b: a.inner(b),
    "squared_norm": lambda a, b: a.squared_norm(),
    "norm": lambda a, b: a.norm(),
    "trace": lambda a, b: (a @ b.mT).trace(),
    "sum": lambda a, b: (a + 2 * b - a @ b.mT @ a).squared_norm(),
    "singular values": lambda a, b: a.svd()[1],
    "truncate": lambda a, b: a.truncate(1).to_dense(),
    "indexed": lambda a, b: a[0].norm() if a.ndim > 2 else a.norm(),
}


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_agree_with_finite_differences(name, batch):
    shapes = [(*batch, 5, 2), (*batch, 2, 4), (*batch, 5, 2), (*batch, 2, 4)]
    factors = [gaussian(i, *shape).requires_grad_() for i, shape in enumerate(shapes)]

    def function(l1, r1, l2, r2):
        return SCALARS[name](fg.LowRank(l1, r1), fg.LowRank(l2, r2))

    assert torch.autograd.gradcheck(function, factors)


@pytest.mark.parametrize("name", ["inner", "squared_norm", "trace", "sum"])
@pytest.mark.parametrize("zero", ["left", "both"])
def test_gradients_at_zero_agree_with_finite_differences(name, zero):
    left, right = torch.zeros(5, 2, dtype=torch.float64), gaussian(1, 2, 4)
    if zero == "both":
        right = torch.zeros_like(right)
    other = fg.LowRank(gaussian(2, 5, 2), gaussian(3, 2, 4))
    factors = (left.requires_grad_(), right.requires_grad_())
    assert torch.autograd.gradcheck(lambda l, r: SCALARS[name](fg.LowRank(l, r), other), factors)


def test_gradient_of_the_norm_at_zero_is_zero():
    left, right = torch.zeros(5, 2, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    gradients = torch.autograd.grad(fg.LowRank(left, right).norm(), (left, right))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_second_derivatives_of_the_squared_norm():
    factors = (gaussian(0, 4, 2).requires_grad_(), gaussian(1, 2, 3).requires_grad_())
    assert torch.autograd.gradgradcheck(lambda l, r: fg.LowRank(l, r).squared_norm(), factors)


def test_ranks_of_a_batch_are_found_one_by_one_whatever_the_scales():
    a = fg.LowRank(gaussian(0, 2, 7, 3), gaussian(1, 2, 3, 5))
    scales = torch.tensor([1e12, 1e-12], dtype=torch.float64)[:, None, None]
    assert fg.LowRank(a.left * scales, a.right).numerical_rank().tolist() == [3, 3]


def test_an_index_that_cuts_one_factor_only_is_refused_too():
    a = fg.LowRank(torch.ones(2, 3, 1), torch.ones(2, 1, 4))
    with pytest.raises(IndexError, match="matrix dimensions"):
        a[..., :1]


def test_refusals_say_what_was_wrong_with_what():
    a = fg.LowRank(torch.ones(3, 2), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"^only a square LowRank has a trace, this one has shape \(5, 3, 4\)"):
        fg.LowRank(torch.ones(5, 3, 2), torch.ones(2, 4)).trace()
    with pytest.raises(TypeError, match=r"^k must be an int, got float"):
        a.truncate(1.0)
    with pytest.raises(ValueError, match=r"^k must be at least 0, got -1"):
        a.truncate(-1)
    with pytest.raises(TypeError, match=r"^other must be a LowRank or a torch\.Tensor, got NoneType"):
        a.inner(None)
    with pytest.raises(ValueError, match=r"^other has shape \(4, 3\), which does not match \(3, 4\)"):
        a.inner(torch.ones(4, 3))
    with pytest.raises(TypeError, match=r"^this LowRank is torch\.float32 but other is torch\.float64"):
        a + a.to(torch.float64)
    with pytest.raises(TypeError, match=r"^this LowRank is torch\.float32 but the right operand is torch\.float64"):
        a @ torch.ones(4, 1).double()
    with pytest.raises(TypeError, match=r"^the left operand is torch\.float64 but this LowRank is torch\.float32"):
        torch.ones(1, 3).double() @ a
    with pytest.raises(ValueError, match=r"^cannot multiply \(3, 4\) by \(3, 1\): inner sizes differ"):
        a @ torch.ones(3, 1)
    with pytest.raises(ValueError, match=r"^cannot multiply \(1, 4\) by \(3, 4\): inner sizes differ"):
        torch.ones(1, 4) @ a
    with pytest.raises(ValueError, match=r"scaled by a number or a 0-dimensional tensor, got \(2,\)"):
        a * torch.ones(2)
    with pytest.raises(IndexError, match=r"^this LowRank has no batch dimension"):
        a[0]
    with pytest.raises(ValueError, match=r"^left has shape \(3, 2\) and right \(3, 4\): the last size of left must"):
        fg.LowRank(torch.ones(3, 2), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"^left has batch shape \(2,\) and right \(3,\), which do not broadcast"):
        fg.LowRank(torch.ones(2, 3, 2), torch.ones(3, 2, 4))
    with pytest.raises(TypeError, match=r"^right must be a real floating tensor, got torch\.int64"):
        fg.LowRank(torch.ones(3, 2), torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^left must have at least 2 dimensions, got shape \(3,\)"):
        fg.LowRank(torch.ones(3), torch.ones(2, 4))


@pytest.mark.parametrize(
    ("left", "right"),
    [((0, 2), (2, 4)), ((3, 2), (2, 0)), ((0, 3, 2), (2, 4)), ((3, 2), (0, 2, 4)), ((2, 0, 1), (1, 4))],
)
def test_empty_matrices_and_batches_are_refused(left, right):
    with pytest.raises(ValueError, match="left or right is empty"):
        fg.LowRank(torch.ones(left), torch.ones(right))


def test_it_prints_its_shape_rank_dtype_and_device():
    a = fg.LowRank(torch.ones(5, 3, 2), torch.ones(2, 4))
    assert repr(a) == "LowRank(shape=(5, 3, 4), rank=2, dtype=torch.float32, device=cpu)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_rank_of_half_precision_factors_is_theirs(dtype):
    a = fg.LowRank(gaussian(0, 256, 4, dtype=dtype), gaussian(1, 4, 256, dtype=dtype))
    assert int(a.numerical_rank()) == 4 and a.column_basis().shape == a.row_basis().shape == (256, 4)
    assert int((a - a).numerical_rank()) == 0
    assert int(fg.LowRank(torch.cat([a.left, a.left], 1), torch.cat([a.right, a.right])).numerical_rank()) == 4
    assert int((a * 1e-3).numerical_rank()) == 4


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norm_and_rank_do_not_see_the_scale_of_the_factors(scale):
    a = fg.LowRank(gaussian(0, 6, 2, dtype=torch.float32), gaussian(1, 2, 5, dtype=torch.float32))
    truth = float(torch.linalg.matrix_norm(a.left.double() @ a.right.double()))
    assert float((a * scale).norm()) == pytest.approx(scale * truth, rel=1e-5)
    assert float(fg.LowRank(a.left * scale, a.right / scale).norm()) == pytest.approx(truth, rel=1e-5)
    scales = torch.tensor([scale, 1.0])
    assert float(fg.LowRank(a.left * scales, a.right / scales[:, None]).norm()) == pytest.approx(truth, rel=1e-5)
    dependent = fg.LowRank(scale * torch.cat([a.left, a.left], 1), torch.cat([a.right, -a.right]) + 0)
    assert int((a * scale).numerical_rank()) == 2 and int(dependent.numerical_rank()) == 0


def test_sums_of_half_precision_factors_neither_underflow_nor_overflow_on_the_way():
    left, right = 1e-4 * gaussian(0, 4096, 8), 1e-4 * gaussian(1, 8, 1024)
    small = fg.LowRank(left.half(), right.half())
    dense = small.left.double() @ small.right.double()
    assert float(small.norm()) == pytest.approx(float(dense.norm()), rel=2e-3)  # one rounding of float16 so small
    large = fg.LowRank(torch.full((4096, 1), 10.0).half(), torch.full((1, 4), 1.0).half())
    assert float(large.norm()) == pytest.approx((4096 * 400) ** 0.5, rel=1e-3)
    assert float(large.inner(torch.full((4096, 4), 0.1).half())) == pytest.approx(4096 * 4 * 0.1 * 10, rel=1e-3)
    square = fg.LowRank(torch.full((4096, 4), 1e-4).half(), torch.full((4, 4096), 1e-4).half())
    assert float(square.trace()) == pytest.approx(4096 * 4 * 1e-8, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("away", [1e-2, 1e-4, 1e-6])
def test_the_norm_of_a_small_difference_is_good_to_rounding_of_its_factors(dtype, away):
    left, right, turn = gaussian(0, 2, 40, 5), gaussian(1, 2, 5, 30), torch.linalg.qr(gaussian(2, 5, 5))[0]
    after = fg.LowRank((left + away * gaussian(3, 2, 40, 5)) @ turn, turn.mT @ right)
    found = after.to(dtype) - fg.LowRank(left, right).to(dtype)
    true = torch.linalg.matrix_norm(found.left.double() @ found.right.double())
    allowed = 4 * torch.finfo(dtype).eps * float(found.left.norm() * found.right.norm())
    assert float((found.norm().double() - true).abs().max()) < allowed
    assert float((found.squared_norm().double().sqrt() - true).abs().max()) < allowed
    assert bool((found.squared_norm() >= 0).all())


def test_a_squared_norm_does_not_depend_on_how_the_scale_is_shared_out():
    tiny = fg.LowRank(torch.full((3, 1), 1e-24), torch.full((1, 3), 1e14))
    assert float(tiny.squared_norm()) == pytest.approx(9e-20, rel=1e-5)
    cancelled = fg.LowRank(torch.tensor([[1e20, -1e20]]), torch.ones(2, 1))
    assert float(cancelled.squared_norm()) == float(cancelled.norm()) == 0
    most = fg.LowRank(torch.full((1, 1), torch.finfo(torch.float32).max), torch.ones(1, 1))
    assert float(most.norm()) == torch.finfo(torch.float32).max
    least = fg.LowRank(torch.full((2000, 1), 2e-22), torch.ones(1, 3000))
    assert float(least.squared_norm()) == pytest.approx(6e6 * 4e-44, rel=1e-2)  # of a float32 so small


@pytest.mark.parametrize("away", [1e-2, 1e-4])
def test_angles_between_small_differences_are_those_of_float64(away):
    left, right = gaussian(0, 64, 4).float(), gaussian(1, 4, 48).float()
    start = fg.LowRank(left, right)
    one, other = (fg.LowRank(left + away * gaussian(seed, 64, 4).float(), right) - start for seed in (2, 3))
    a, b = (x.to(torch.float64).to_dense() for x in (one, other))
    cosine = (a * b).sum() / (a.norm() * b.norm())
    found = fg.layer_cosines([{"layer": one}, {"layer": other}])["layer"][0, 1]
    assert float(found) == pytest.approx(float(cosine), abs=1e-6)
    for metric in ("euclidean", "input-gram", "output-gram", torch.eye(64)):
        wanted = fg.geodesic_separation(a, b, metric.double() if isinstance(metric, torch.Tensor) else metric)
        found = fg.geodesic_separation(one, other, metric)
        assert found.dtype == torch.float32 and float(found) == pytest.approx(float(wanted), abs=1e-6)


def test_a_change_of_factors_is_the_difference_and_zero_where_nothing_moved():
    start = fg.LowRank(gaussian(0, 6, 2).float(), gaussian(1, 2, 5).float())
    now = fg.LowRank(start.left + 1e-6 * gaussian(2, 6, 2).float(), start.right + 1e-6 * gaussian(3, 2, 5).float())
    exact = now.left.double() @ now.right.double() - start.left.double() @ start.right.double()
    gram = (0.1 + torch.eye(6)).double()
    wanted = float((exact * (gram @ exact)).sum())
    change = now.change_from(start)
    assert torch.allclose(change.to_dense().double(), exact, rtol=0, atol=1e-11)
    assert float(fg.DenseOperator(gram.float()).quadratic(change)) == pytest.approx(wanted, rel=1e-4)
    assert float(start.change_from(start).to_dense().abs().max()) == 0
    with pytest.raises(ValueError, match="start has factors of shapes"):
        now.change_from(start + start)
    with pytest.raises(TypeError, match="start must be a LowRank"):
        now.change_from(torch.zeros(6, 5))


def test_a_permutation_of_rows_or_columns_is_not_taken_for_one_of_factors():
    order = torch.tensor([2, 0, 1])
    for p, q in ((3, 5), (5, 3)):
        one = fg.LowRank(gaussian(0, 2, p, 3), gaussian(1, 2, 3, q))
        for index in ((slice(None), order), (..., order)):
            with pytest.raises(IndexError, match="matrix dimensions"):
                one[index]
    assert_close(one[1, ...].to_dense(), one.to_dense()[1])
    assert_close(one[None, [1, 0]].to_dense(), one.to_dense()[None, [1, 0]])
