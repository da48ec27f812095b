"""Leading eigenpairs by energy: what a full decomposition says, whatever the size and the spectrum."""

import pytest
import torch
from geometry_cases import gaussian, orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st

import fishergeo as fg
from fishergeo.spectral import leading


def curvature(size, values, seed=0, dtype=torch.float64):
    vectors = orthonormal(seed, size, len(values))
    return ((vectors * torch.as_tensor(values, dtype=torch.float64)) @ vectors.mT).to(dtype)


def reference(matrix, energy):
    values, vectors = torch.linalg.eigh(matrix.double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    m = int((values.cumsum(0) < energy * values.sum() * (1 - 1e-12)).sum()) + 1
    return values[:m], vectors[:, :m]


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95])
def test_a_large_matrix_gives_the_pairs_of_the_full_decomposition(dtype, tol, energy, monkeypatch):
    matrix = curvature(600, 0.8 ** torch.arange(200), dtype=dtype)
    values, vectors = reference(matrix, energy)
    monkeypatch.setattr(torch.linalg, "eigh", _only_small(torch.linalg.eigh))
    found, basis = fg.leading_eigenpairs(matrix, energy=energy)
    assert len(found) == len(values) and found.dtype == basis.dtype == dtype
    torch.testing.assert_close(found.double(), values, rtol=1e-5, atol=0)
    assert float((basis.double() @ basis.double().mT - vectors @ vectors.mT).norm()) < tol
    fg.Projector(basis)


def _only_small(eigh):
    def small(matrix, *more):
        assert len(matrix) < 300, "all pairs of the large matrix were found"
        return eigh(matrix, *more)

    return small


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.05, 1.0), st.integers(0, 99))
def test_small_matrices_follow_the_rule_of_energy(size, rank, energy, seed):
    root = gaussian(seed, size, rank)
    matrix = root @ root.mT
    found, basis = fg.leading_eigenpairs(matrix, energy=energy)
    values, vectors = reference(matrix, energy)
    assert abs(len(found) - len(values)) <= (energy > 0.999) * size
    m = len(values) if len(values) == len(found) else 0
    torch.testing.assert_close(found[:m], values[:m], rtol=1e-9, atol=1e-9)
    assert float(found.sum()) >= energy * float(matrix.trace()) * (1 - 1e-9)


def test_a_flat_spectrum_and_one_of_low_rank_come_out_right(monkeypatch):
    flat = curvature(520, torch.linspace(1, 2, 520))
    found, basis = fg.leading_eigenpairs(flat, energy=0.5)
    torch.testing.assert_close(found, reference(flat, 0.5)[0], rtol=1e-10, atol=0)
    thin = curvature(520, [5.0, 1.0])
    found, basis = fg.leading_eigenpairs(thin, energy=0.99)
    torch.testing.assert_close(found, torch.tensor([5.0, 1.0], dtype=torch.float64), rtol=1e-10, atol=0)
    zero, none = fg.leading_eigenpairs(torch.zeros(520, 520))
    assert len(zero) == 0 and none.shape == (520, 0)


def test_a_bound_on_the_rank_and_a_known_trace_are_heeded():
    matrix = curvature(600, 0.8 ** torch.arange(200))
    assert len(fg.leading_eigenpairs(matrix, energy=0.8, most=3)[0]) == 3
    more = len(fg.leading_eigenpairs(matrix, energy=0.4, total=2 * float(matrix.trace()))[0])
    assert more == len(fg.leading_eigenpairs(matrix, energy=0.8)[0])
    one, two = (fg.leading_eigenpairs(matrix)[1] for _ in range(2))
    assert torch.equal(one, two)


def test_the_space_that_grows_is_the_one_that_settles():
    assert leading._settled(curvature(600, torch.linspace(1, 2, 600)), 0.9, 900.0, 600) is None


@pytest.mark.parametrize(("call", "words"), [
    (lambda: fg.leading_eigenpairs(torch.ones(2, 3)), "square"),
    (lambda: fg.leading_eigenpairs(torch.eye(3), energy=1.5), "energy"),
    (lambda: fg.leading_eigenpairs(torch.eye(3), most=0), "most"),
])  # fmt: skip
def test_what_has_no_leading_pairs_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("size", [400, 600])
def test_a_trace_that_is_less_than_what_is_found_is_refused_at_every_size(size):
    values = torch.full((size,), 1e-6).double()
    values[:4] = torch.tensor([10.0, 5.0, 2.0, 1.0])
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)).double()).Q
    matrix = (basis * values) @ basis.T
    assert len(fg.leading_eigenpairs(1e-30 * matrix)[0]) == 2
    with pytest.raises(ValueError, match=r"less than the sum"):
        fg.leading_eigenpairs(1e-30 * matrix, total=1e-30)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("copies", [16, 20, 40])
def test_every_copy_of_an_eigenvalue_is_found_however_many_a_block_has_columns(dtype, copies):
    values = torch.full((600,), 5.0, dtype=torch.float64)
    values[:copies] = 10.0
    energy = (10 * (copies - 1) + 5) / float(values.sum())  # asks for all copies and no more
    found, basis = fg.leading_eigenpairs(curvature(600, values, dtype=dtype), energy=energy)
    torch.testing.assert_close(found.double(), torch.full((copies,), 10.0, dtype=torch.float64), rtol=1e-5, atol=0)
    more, _ = fg.leading_eigenpairs(curvature(600, values, dtype=dtype), energy=energy + 12 / float(values.sum()))
    assert int((more > 9).sum()) == copies and len(more) == copies + 2
    fg.Projector(basis)


def test_a_cluster_wider_than_a_block_is_found_whole():
    values = torch.cat([10 + 1e-9 * torch.arange(20, dtype=torch.float64), torch.ones(580, dtype=torch.float64)])
    found, _ = fg.leading_eigenpairs(curvature(600, values), energy=0.3)
    assert int((found > 9).sum()) == 20


def test_zeros_at_the_end_of_the_list_are_no_copies_that_are_missing(monkeypatch):
    matrix = curvature(600, [5.0, 1.0])
    monkeypatch.setattr(torch.linalg, "eigh", _only_small(torch.linalg.eigh))
    found, _ = fg.leading_eigenpairs(matrix, energy=0.9, total=100.0, most=40)
    torch.testing.assert_close(found[:2], torch.tensor([5.0, 1.0], dtype=torch.float64), rtol=1e-9, atol=0)
    assert len(found) == 40 and float(found[2:].abs().max()) < 1e-9


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-26), (torch.float32, 1e26), (torch.float64, 1e-200)])
def test_the_pairs_do_not_depend_on_the_unit(dtype, scale):
    """Squares of small residuals are zero, and vectors at random once counted as settled."""
    matrix = curvature(600, 0.8 ** torch.arange(200))
    values, vectors = reference(matrix, 0.8)
    found, basis = fg.leading_eigenpairs((matrix * scale).to(dtype), energy=0.8)
    assert len(found) == len(values)
    torch.testing.assert_close(found.double() / scale, values, rtol=1e-5, atol=0)
    assert float((basis.double() @ basis.double().mT - vectors @ vectors.mT).norm()) < 2e-3
