"""Symmetric matrices of given spectra, the hard ones included, for the tests of eigensolvers."""

import torch
from geometry_cases import gaussian, orthonormal
from hypothesis import strategies as st


def with_spectrum(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    basis = orthonormal(seed, len(values), len(values))
    matrix = (basis * values) @ basis.T
    return (matrix + matrix.T) / 2


def spectrum(kind: str, n: int, seed: int = 0) -> torch.Tensor:
    index = torch.arange(1, n + 1, dtype=torch.float64)
    uniform = gaussian(seed, n).abs() / 4
    return {
        "power law": index**-1.0,
        "slow": index**-0.3,
        "clustered": torch.cat([2 + 1e-7 * index[: n // 8], uniform[n // 8 :]]),
        "repeated": torch.where(index <= max(1, n // 3), 3.0, 1.0).double(),
        "rank deficient": torch.where(index <= max(1, n // 6), index, 0.0),
        "condition 1e12": torch.logspace(0, -12, n, dtype=torch.float64),
        "tiny": 1e-30 * index**-0.7,
        "huge": 1e30 * index**-0.7,
        "negative": -index,
        "indefinite": gaussian(seed, n),
        "plus and minus": torch.where(index % 2 == 0, index, -(index + 1)),
        "zero": torch.zeros(n, dtype=torch.float64),
        "identity": torch.ones(n, dtype=torch.float64),
    }[kind]


KINDS = (
    "power law", "slow", "clustered", "repeated", "rank deficient", "condition 1e12", "tiny", "huge", "negative",
    "indefinite", "plus and minus", "zero", "identity",
)  # fmt: skip


@st.composite
def matrices(draw, low: int = 1, high: int = 40, kinds: tuple[str, ...] = KINDS) -> torch.Tensor:
    n, seed = draw(st.integers(low, high)), draw(st.integers(0, 999))
    return with_spectrum(spectrum(draw(st.sampled_from(kinds)), n, seed), seed)
