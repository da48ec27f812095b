"""Random matrices and updates for the geometry tests, drawn by hypothesis as small sizes and a seed."""

import torch
from hypothesis import strategies as st

import fishergeo as fg

SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.integers(1, 9)
RANKS = st.integers(0, 5)
BATCHES = st.sampled_from([(), (1,), (3,), (2, 2)])


def gaussian(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(seed: int, rows: int, columns: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.linalg.qr(gaussian(seed, rows, columns)).Q.to(dtype)


@st.composite
def low_ranks(draw, p=None, q=None, rank=RANKS, batch=BATCHES, dtype=torch.float64) -> fg.LowRank:
    """A LowRank of any small shape; sometimes rank 0, zero, or with rank-deficient factors."""
    p, q = p or draw(SIZES), q or draw(SIZES)
    r, lead, seed = draw(rank), draw(batch), draw(SEEDS)
    left, right = gaussian(seed, *lead, p, r), gaussian(seed + 1, *lead, r, q)
    fault = draw(st.sampled_from(["none", "none", "zero", "repeated"]))
    if fault == "zero":
        left = torch.zeros_like(left)
    elif fault == "repeated" and r > 1:
        left[..., -1] = left[..., 0]
    return fg.LowRank(left.to(dtype), right.to(dtype))


@st.composite
def bases(draw, p: int) -> torch.Tensor:
    """Orthonormal columns in R^p, from none of them to all."""
    return orthonormal(draw(SEEDS), p, draw(st.integers(0, p)))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tol: float = 1e-10) -> None:
    """Equal to `tol` relative to the largest expected entry (or one)."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape
    scale = max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    difference = float((actual - expected).abs().max()) if actual.numel() else 0.0
    assert difference <= tol * scale, f"differs by {difference:.3g}"
