"""Randomised Nyström: the leading eigenpairs of a positive semi-definite F from Y = F Ω alone."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from fishergeo.operators import fix_signs


def test_matrix(size: int, columns: int, seed: int, name: str = "") -> Tensor:
    """A Gaussian (size, columns) matrix in float64 that depends on seed and name only, whatever the device.

    Args:
        size: rows.
        columns: columns.
        seed: any integer.
        name: of the layer, so that layers have independent matrices.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % (2**63))
    return torch.randn(size, columns, generator=generator, dtype=torch.float64)


def nystrom_eigh(product: Tensor, omega: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenpairs of the Nyström approximation Y (Ωᵀ Y)⁺ Yᵀ, which never exceeds F.

    Shift-corrected for stability (Tropp, Yurtsever, Udell, Cevher 2017, "Fixed-rank approximation of a
    positive-semidefinite matrix from streaming data", Algorithm 3): Y + νΩ is factored and ν is taken off again.

    Args:
        product: Y = F Ω, (size, columns).
        omega: Ω, the same shape.
        k: how many pairs; all columns by default.

    Returns:
        (values (k,) descending and non-negative, vectors (size, k) orthonormal), float64.
    """
    y, w = product.double(), omega.to(product.device).double()
    k = min(y.shape) if k is None else min(k, *y.shape)
    # An orthonormal test matrix spans the same space and is better conditioned.
    w, r = torch.linalg.qr(w)
    y = torch.linalg.solve_triangular(r, y, upper=True, left=False)
    norm = torch.linalg.matrix_norm(y)
    if not bool(norm > 0):
        return y.new_zeros(k), torch.linalg.qr(w)[0][:, :k]
    accuracy = torch.finfo(product.dtype).eps
    shift = accuracy * norm
    for _ in range(8):
        shifted = y + shift * w
        core = w.T @ shifted
        factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
        if not int(failed):
            break
        shift = shift * 10
    else:
        raise FloatingPointError("the sketch is not positive semi-definite; was something else than PSD added to it?")
    half = torch.linalg.solve_triangular(factor.T, shifted, upper=True, left=False)
    vectors, singular, _ = torch.linalg.svd(half, full_matrices=False)
    values = (singular.square() - shift).clamp_min(0)
    return values[:k], fix_signs(vectors[:, :k])
