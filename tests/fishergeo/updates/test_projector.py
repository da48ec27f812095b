"""Projectors and the split of an update: laws of P, I − P and of soft weights, on factors and dense, on both sides."""

import pytest
import torch
from geometry_cases import BATCHES, SEEDS, SIZES, assert_close, bases, gaussian, low_ranks, orthonormal
from hypothesis import given
from hypothesis import strategies as st

import fishergeo as fg

SIDES = st.sampled_from(["output", "input"])


def dense(update):
    return update.to_dense() if isinstance(update, fg.LowRank) else update


def matrix(projector, update):
    """The update that the dense matrix of the projector makes: an oracle without factors."""
    p = projector.to_dense()
    return p @ dense(update) if projector.side == "output" else dense(update) @ p


@st.composite
def splits(draw, soft=False):
    """(projector, update): the update is factored or dense, the projector acts on either side."""
    update, side = draw(low_ranks()), draw(SIDES)
    basis = draw(bases(update.shape[-2] if side == "output" else update.shape[-1]))
    if soft:
        weights = torch.rand(basis.shape[1], generator=torch.Generator().manual_seed(draw(SEEDS)), dtype=basis.dtype)
        projector = fg.SoftProjector(basis, weights, side)
    else:
        projector = fg.Projector(basis, side)
    return projector, update if draw(st.booleans()) else update.to_dense()


@given(splits())
def test_a_projector_is_the_matrix_of_its_basis(case):
    projector, update = case
    assert_close(projector.to_dense(), projector.basis @ projector.basis.mT)
    assert_close(dense(projector(update)), matrix(projector, update))


@given(splits())
def test_a_projector_is_idempotent(case):
    projector, update = case
    once = projector(update)
    assert_close(dense(projector(once)), dense(once))


@given(splits(), SEEDS)
def test_a_projector_is_self_adjoint(case, seed):
    projector, update = case
    other = gaussian(seed, *update.shape)
    assert_close((dense(projector(update)) * other).sum(), (dense(update) * projector(other)).sum())


@given(st.booleans().flatmap(splits))
def test_the_parts_of_a_split_sum_back_exactly(case):
    projector, update = case
    part, rest = projector.split(update)
    assert_close(dense(part) + dense(rest), dense(update), 1e-13)
    assert_close(dense(part), dense(projector.apply(update)), 0)


@given(st.booleans().flatmap(splits))
def test_the_complement_is_the_rest_and_its_complement_the_projector(case):
    projector, update = case
    part, rest = projector.split(update)
    swapped = projector.complement.split(update)
    assert_close(dense(projector.complement(update)), dense(rest), 0)
    assert_close(dense(swapped[0]), dense(rest), 0)
    assert_close(dense(swapped[1]), dense(part), 0)
    assert projector.complement.complement is projector


@given(splits())
def test_the_parts_of_a_hard_split_are_orthogonal_and_obey_pythagoras(case):
    projector, update = case
    part, rest = (dense(x) for x in projector.split(update))
    scale = max(1.0, float(dense(update).square().sum()))
    assert float((part * rest).sum().abs()) <= 1e-12 * scale
    assert abs(float(part.square().sum() + rest.square().sum() - dense(update).square().sum())) <= 1e-12 * scale


@given(splits())
def test_projecting_never_lengthens(case):
    projector, update = case
    before = torch.linalg.matrix_norm(dense(update))
    for piece in projector.split(update):
        assert (torch.linalg.matrix_norm(dense(piece)) <= before * (1 + 1e-12)).all()


@given(splits(), SEEDS)
def test_a_projector_depends_on_the_span_alone(case, seed):
    projector, update = case
    m = projector.rank
    rotated = fg.Projector(projector.basis @ orthonormal(seed, m, m), projector.side)
    assert_close(dense(rotated(update)), dense(projector(update)))


@given(low_ranks(), SIDES)
def test_a_full_basis_keeps_everything_and_an_empty_one_nothing(update, side):
    n = update.shape[-2] if side == "output" else update.shape[-1]
    full, empty = fg.Projector(orthonormal(0, n, n), side), fg.Projector(torch.zeros(n, 0, dtype=update.dtype), side)
    assert_close(full(update).to_dense(), update.to_dense())
    assert_close(empty(update).to_dense(), torch.zeros_like(update.to_dense()))


@given(st.booleans().flatmap(splits))
def test_a_split_keeps_kind_shape_dtype_and_rank(case):
    projector, update = case
    for piece in projector.split(update):
        assert type(piece) is type(update) and piece.shape == update.shape and piece.dtype == update.dtype
        if isinstance(update, fg.LowRank):
            assert piece.rank == update.rank


@given(splits(soft=True))
def test_a_soft_projector_is_the_matrix_of_its_weights(case):
    projector, update = case
    expected = projector.basis @ torch.diag(projector.weights) @ projector.basis.mT
    assert_close(projector.to_dense(), expected)
    assert_close(dense(projector(update)), matrix(projector, update))


@given(splits())
def test_soft_weights_of_one_are_the_hard_projector_and_of_zero_nothing(case):
    hard, update = case
    ones, zeros = torch.ones(hard.rank, dtype=torch.float64), torch.zeros(hard.rank, dtype=torch.float64)
    assert_close(dense(fg.SoftProjector(hard.basis, ones, hard.side)(update)), dense(hard(update)))
    assert float(dense(fg.SoftProjector(hard.basis, zeros, hard.side)(update)).abs().max()) == 0


@given(SIZES, SEEDS, st.floats(1e-3, 1e3))
def test_spectral_weights_are_half_where_the_eigenvalue_is_epsilon(p, seed, epsilon):
    basis = orthonormal(seed, p, p)
    values = gaussian(seed, p).abs()
    values[0] = epsilon
    soft = fg.SoftProjector.from_spectrum(basis, values, epsilon)
    assert_close(soft.weights, values / (values + epsilon))
    assert abs(float(soft.weights[0]) - 0.5) < 1e-12
    curvature = basis @ torch.diag(values) @ basis.mT
    ridge = curvature @ torch.linalg.inv(curvature + epsilon * torch.eye(p, dtype=torch.float64))
    assert_close(soft.to_dense(), ridge, 1e-8)


@given(SIZES, SIZES, st.integers(1, 3), SEEDS)
def test_experts_may_have_a_basis_each(p, q, r, seed):
    basis = torch.stack([orthonormal(seed + i, p, max(1, p // 2)) for i in range(3)])
    update = fg.LowRank(gaussian(seed, 3, p, r), gaussian(seed + 1, 3, r, q))
    part, rest = fg.Projector(basis).split(update)
    for i in range(3):
        alone = fg.Projector(basis[i]).split(update[i])
        assert_close(part[i].to_dense(), alone[0].to_dense())
        assert_close(rest[i].to_dense(), alone[1].to_dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bases_rounded_to_narrow_dtypes_are_accepted(dtype):
    basis = orthonormal(0, 64, 8, dtype)
    projector = fg.Projector(basis)
    update = fg.LowRank(gaussian(1, 64, 4, dtype=dtype), gaussian(2, 4, 16, dtype=dtype))
    part, rest = projector.split(update)
    assert part.dtype == rest.dtype == dtype
    wide = projector.to(torch.float32)
    assert wide.basis.dtype == torch.float32 and wide.side == "output"
    assert torch.allclose(part.to_dense().float(), wide(update.to(torch.float32)).to_dense(), atol=0.2)


def test_moving_a_projector_keeps_side_and_weights():
    soft = fg.SoftProjector(orthonormal(0, 5, 2), torch.tensor([0.25, 1.0], dtype=torch.float64), "input")
    moved = soft.to(torch.float32)
    assert type(moved) is fg.SoftProjector and moved.side == "input"
    assert moved.weights.tolist() == [0.25, 1.0] and moved.weights.dtype == torch.float32
    assert fg.Projector(soft.basis, "input").to(torch.float32).side == "input"


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_gradients_agree_with_finite_differences(side, soft, zero):
    basis = orthonormal(0, 5 if side == "output" else 4, 2)
    weights = torch.tensor([0.3, 0.9], dtype=torch.float64)
    projector = fg.SoftProjector(basis, weights, side) if soft else fg.Projector(basis, side)
    left = (gaussian(1, 5, 2) * (0 if zero else 1)).requires_grad_()
    right = gaussian(2, 2, 4).requires_grad_()

    def function(l, r):
        part, rest = projector.split(fg.LowRank(l, r))
        return part.to_dense(), rest.to_dense(), part.squared_norm()

    assert torch.autograd.gradcheck(function, (left, right))


def test_the_message_about_a_bad_basis_prints_its_defect():
    with pytest.raises(ValueError, match=r"basis is not orthonormal.*is 3,"):
        fg.Projector(2 * torch.eye(4)[:, :2])
    with pytest.raises(ValueError, match="is it transposed"):
        fg.Projector(torch.eye(4)[:2])
    with pytest.raises(ValueError, match="basis has 1 entries that are NaN"):
        fg.Projector(torch.eye(4).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float("nan"))))


def test_an_update_of_the_wrong_side_or_dtype_is_refused_by_name():
    projector = fg.Projector(torch.eye(4)[:, :2])
    with pytest.raises(ValueError, match="basis has 4 rows and acts on the output side, of size 5"):
        projector(torch.ones(5, 4))
    with pytest.raises(TypeError, match=r"delta is torch\.float64"):
        projector.split(torch.ones(4, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("weights", "message"),
    [([0.5, 1.5], "lie in"), ([-0.1, 0.5], "lie in"), ([0.5], "1 entries"), ([float("nan"), 0.5], "NaN")],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=f"weights.*{message}"):
        fg.SoftProjector(torch.eye(4)[:, :2], torch.tensor(weights))


@given(BATCHES, SEEDS)
def test_an_unbatched_basis_serves_every_expert(batch, seed):
    update = gaussian(seed, *batch, 6, 4)
    basis = orthonormal(seed, 6, 3)
    assert_close(fg.Projector(basis)(update), basis @ basis.mT @ update)


@given(SIZES, st.integers(1, 4), SEEDS)
def test_weights_may_differ_between_experts(p, q, seed):
    basis = torch.stack([orthonormal(seed + i, p, p) for i in range(3)])
    weights = torch.rand(3, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    update = gaussian(seed, 3, p, q)
    for delta in (update, fg.LowRank(update, torch.eye(q, dtype=torch.float64))):
        part = dense(fg.SoftProjector(basis, weights)(delta))
        for i in range(3):
            assert_close(part[i], dense(fg.SoftProjector(basis[i], weights[i])(update[i])))


def test_spectral_weights_keep_the_side_and_may_be_none_at_all():
    soft = fg.SoftProjector.from_spectrum(orthonormal(0, 5, 2), torch.ones(2).double(), 1.0, "input")
    assert type(fg.Projector.from_spectrum(soft.basis, torch.ones(2).double(), 1.0)) is fg.SoftProjector
    assert soft.side == "input" and soft.weights.tolist() == [0.5, 0.5]
    empty = torch.zeros(0, dtype=torch.float64)
    nothing = fg.SoftProjector.from_spectrum(torch.zeros(5, 0, dtype=torch.float64), empty, 1.0)
    assert float(nothing(gaussian(1, 5, 3)).abs().max()) == 0 and nothing.rank == 0


def test_moving_takes_keywords_as_tensors_do_and_projectors_print_themselves():
    soft = fg.SoftProjector(orthonormal(0, 5, 2), torch.tensor([0.25, 1.0], dtype=torch.float64), "input")
    moved = soft.to(dtype=torch.float32)
    assert moved.basis.dtype == moved.weights.dtype == torch.float32
    assert repr(soft) == "SoftProjector(basis=(5, 2), side='input')"
    assert repr(fg.Projector(soft.basis).complement) == "Complement(Projector(basis=(5, 2), side='output'))"


def test_counts_in_messages_are_those_of_the_arguments():
    basis = torch.eye(4)[:, :2]
    with pytest.raises(ValueError, match=r"^weights has 3 entries for a basis of 2 columns"):
        fg.SoftProjector(basis, torch.ones(3))
    with pytest.raises(ValueError, match=r"^values has 1 entries for a basis of 2 columns"):
        fg.SoftProjector.from_spectrum(basis, torch.ones(1), 1.0)
    with pytest.raises(ValueError, match=r"^weights must lie in \[0, 1\], they span \[-0.5, 2\]"):
        fg.SoftProjector(basis, torch.tensor([-0.5, 2.0]))
    with pytest.raises(ValueError, match=r"^values must not be negative, the least is -2"):
        fg.SoftProjector.from_spectrum(basis, torch.tensor([1.0, -2.0]), 1.0)
    with pytest.raises(ValueError, match=r"^epsilon must be positive, got 0"):
        fg.SoftProjector.from_spectrum(basis, torch.ones(2), 0)
    with pytest.raises(ValueError, match=r"^basis has shape \(2, 4\): more columns than rows"):
        fg.Projector(basis.mT)
    with pytest.raises(ValueError, match=r"delta has shape \(4, 5\), but the basis has 4 rows and acts on the input"):
        fg.Projector(basis, "input")(torch.ones(4, 5))


def test_experts_may_have_nothing_to_protect():
    empty = fg.SoftProjector(torch.zeros(3, 5, 0), torch.zeros(3, 0))
    assert float(empty(torch.ones(3, 5, 2)).abs().max()) == 0
