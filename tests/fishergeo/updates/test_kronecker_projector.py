"""Two-sided projectors: rectangles of direction pairs, and masks that keep the truly leading ones."""

import pytest
import torch
from geometry_cases import SEEDS, SIZES, assert_close, bases, gaussian, low_ranks, orthonormal
from hypothesis import given
from hypothesis import strategies as st

import fishergeo as fg


def dense(update):
    return update.to_dense() if isinstance(update, fg.LowRank) else update


def kron_matrix(projector):
    """The projector as a matrix on Δ.flatten(), written from the pairs: an oracle without factors."""
    u, v = projector.output_basis, projector.input_basis
    keep = getattr(projector, "mask", torch.ones(u.shape[1], v.shape[1], dtype=torch.bool))
    pairs = [torch.kron(u[:, i], v[:, j]) for i, j in keep.nonzero().tolist()]
    columns = torch.stack(pairs, 1) if pairs else u.new_zeros(u.shape[0] * v.shape[0], 0)
    return columns @ columns.mT


@st.composite
def cases(draw):
    update = draw(low_ranks())
    u, v = draw(bases(update.shape[-2])), draw(bases(update.shape[-1]))
    if draw(st.booleans()):
        projector = fg.KroneckerProjector(u, v)
    else:
        generator = torch.Generator().manual_seed(draw(SEEDS))
        projector = fg.KroneckerMaskProjector(u, v, torch.rand(u.shape[1], v.shape[1], generator=generator) < 0.5)
    return projector, update if draw(st.booleans()) else update.to_dense()


@given(cases())
def test_it_is_the_projector_onto_the_kept_pairs(case):
    projector, update = case
    flat = dense(update).flatten(-2)
    assert_close(dense(projector(update)).flatten(-2), flat @ kron_matrix(projector))


@given(cases())
def test_it_is_idempotent_splits_exactly_and_orthogonally(case):
    projector, update = case
    part, rest = projector.split(update)
    assert_close(dense(projector(part)), dense(part))
    assert_close(dense(part) + dense(rest), dense(update), 1e-12)
    scale = max(1.0, float(dense(update).square().sum()))
    assert float((dense(part) * dense(rest)).sum().abs()) < 1e-11 * scale
    assert_close(dense(projector.complement(update)), dense(rest), 0)


@given(cases())
def test_factored_updates_stay_factored_with_ranks_as_stated(case):
    projector, update = case
    part, rest = projector.split(update)
    assert type(part) is type(rest) is type(update)
    if not isinstance(update, fg.LowRank):
        return
    if isinstance(projector, fg.KroneckerProjector):
        assert (part.rank, rest.rank) == (update.rank, 2 * update.rank)
    else:
        assert part.rank == min(projector.mask.shape) and rest.rank == part.rank + update.rank


@given(SIZES, SIZES, SEEDS, st.data())
def test_the_top_pairs_are_the_leading_eigenspace_of_the_kronecker_product(p, q, seed, data):
    def curvature(n, s):
        root = gaussian(s, n, n)
        return torch.linalg.eigh(root @ root.mT)

    (sigma, u), (alpha, v) = curvature(p, seed), curvature(q, seed + 1)
    k = data.draw(st.integers(0, p * q))
    projector = fg.KroneckerMaskProjector.from_spectra(sigma.abs(), u, alpha.abs(), v, k)
    fisher = torch.kron(u @ torch.diag(sigma.abs()) @ u.mT, v @ torch.diag(alpha.abs()) @ v.mT)
    assert int(projector.mask.sum()) == k
    held = (kron_matrix(projector) @ fisher).trace()
    assert_close(held, torch.linalg.eigvalsh(fisher).flip(0)[:k].sum(), 1e-9)


def test_the_top_pairs_are_not_a_rectangle():
    """σ = α = (4, 2, 1): the four leading products are 16, 8, 8, 4, where a 2×2 rectangle of pairs would do as well,
    but the three leading ones, 16, 8, 8, have the shape of an L."""
    values, vectors = torch.tensor([4.0, 2.0, 1.0]), torch.eye(3)
    projector = fg.KroneckerMaskProjector.from_spectra(values, vectors, values, vectors, 3)
    assert projector.mask.tolist() == [[True, True], [True, False]]
    kept = projector(torch.ones(3, 3))
    assert kept.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_a_full_mask_is_the_rectangle():
    u, v, update = orthonormal(0, 6, 3), orthonormal(1, 5, 2), gaussian(2, 6, 5)
    mask = torch.ones(3, 2, dtype=torch.bool)
    assert_close(fg.KroneckerMaskProjector(u, v, mask)(update), fg.KroneckerProjector(u, v)(update))


@pytest.mark.parametrize("kind", ["rectangle", "mask"])
def test_gradients_agree_with_finite_differences(kind):
    u, v = orthonormal(0, 5, 3), orthonormal(1, 4, 2)
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    projector = fg.KroneckerProjector(u, v) if kind == "rectangle" else fg.KroneckerMaskProjector(u, v, mask)
    factors = gaussian(2, 5, 2).requires_grad_(), gaussian(3, 2, 4).requires_grad_()

    def function(l, r):
        part, rest = projector.split(fg.LowRank(l, r))
        return part.to_dense(), rest.to_dense(), fg.geodesic_separation(part, rest)

    assert torch.autograd.gradcheck(function, factors)


def test_bad_input_is_refused_by_name():
    u, v = torch.eye(4)[:, :2], torch.eye(3)[:, :2]
    mask = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="input_basis is not orthonormal"):
        fg.KroneckerProjector(u, 2 * v)
    with pytest.raises(ValueError, match=r"delta has shape \(3, 4\), but the bases are for matrices of \(4, 3\)"):
        fg.KroneckerProjector(u, v)(torch.ones(3, 4))
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        fg.KroneckerMaskProjector(u, v, mask.float())
    with pytest.raises(ValueError, match="mask has shape"):
        fg.KroneckerMaskProjector(u, v, mask[:1])
    with pytest.raises(ValueError, match="must be matrices"):
        fg.KroneckerMaskProjector(u[None], v, mask)
    ones = torch.ones(2)
    with pytest.raises(ValueError, match="pairs must be at least 0 and at most 4, got 5"):
        fg.KroneckerMaskProjector.from_spectra(ones, u, ones, v, 5)
    with pytest.raises(ValueError, match="input_values must not be negative"):
        fg.KroneckerMaskProjector.from_spectra(ones, u, -ones, v, 1)
    with pytest.raises(ValueError, match="output_values has shape"):
        fg.KroneckerMaskProjector.from_spectra(torch.ones(3), u, ones, v, 1)


@pytest.mark.parametrize("kind", ["rectangle", "mask"])
def test_parts_of_factors_are_the_projection_and_what_it_leaves(kind):
    u, v = orthonormal(0, 6, 3), orthonormal(1, 5, 2)
    update = fg.LowRank(gaussian(2, 6, 2), gaussian(3, 2, 5))
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    projector = fg.KroneckerProjector(u, v) if kind == "rectangle" else fg.KroneckerMaskProjector(u, v, mask)
    core = u.mT @ update.to_dense() @ v
    expected = u @ (core if kind == "rectangle" else core * mask) @ v.mT
    for delta in (update, update.to_dense()):
        part, rest = projector.split(delta)
        assert_close(dense(part), expected)
        assert_close(dense(rest), update.to_dense() - expected)


@pytest.mark.parametrize("kind", ["rectangle", "mask"])
def test_gradients_at_zero_agree_with_finite_differences(kind):
    u, v = orthonormal(0, 5, 3), orthonormal(1, 4, 2)
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    projector = fg.KroneckerProjector(u, v) if kind == "rectangle" else fg.KroneckerMaskProjector(u, v, mask)
    factors = torch.zeros(5, 2, dtype=torch.float64).requires_grad_(), gaussian(3, 2, 4).requires_grad_()

    def function(l, r):
        part, rest = projector.split(fg.LowRank(l, r))
        return part.to_dense(), rest.squared_norm()

    assert torch.autograd.gradcheck(function, factors)


def test_they_print_what_they_keep():
    u, v = orthonormal(0, 6, 3), orthonormal(1, 5, 2)
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    assert repr(fg.KroneckerProjector(u, v)) == "KroneckerProjector(output=(6, 3), input=(5, 2))"
    assert repr(fg.KroneckerMaskProjector(u, v, mask)) == "KroneckerMaskProjector(pairs=3, directions=(2, 2))"
    assert repr(fg.KroneckerProjector(u, v).complement) == f"Complement({fg.KroneckerProjector(u, v)!r})"


def test_a_mask_of_another_kind_is_refused_with_what_it_is():
    u, v = orthonormal(0, 6, 3), orthonormal(1, 5, 2)
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch\.float32"):
        fg.KroneckerMaskProjector(u, v, torch.ones(3, 2))
    with pytest.raises(TypeError, match="mask must be a bool tensor, got list"):
        fg.KroneckerMaskProjector(u, v, [[True]])
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\), the vectors ask for \(3, 2\)"):
        fg.KroneckerMaskProjector(u, v, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask is on meta but output_vectors is on cpu"):
        fg.KroneckerMaskProjector(u, v, torch.ones(3, 2, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, 4096.0), (torch.float16, 2.0**-14), (torch.float32, 1e30), (torch.float32, 1e-30)],
)
def test_the_leading_pairs_do_not_see_the_scale_of_the_values(dtype, scale):
    values, vectors = torch.tensor([4.0, 2.0, 1.0]), torch.eye(3)
    wide = (scale * values.flip(0)).to(dtype)
    projector = fg.KroneckerMaskProjector.from_spectra(wide, vectors.to(dtype), wide, vectors.to(dtype), 3)
    assert projector(torch.ones(3, 3, dtype=dtype)).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1]]
