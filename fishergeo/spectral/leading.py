"""As many leading eigenpairs of a dense curvature as hold a share of its trace, without finding the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fishergeo._checks import check_finite, check_integer, check_number, check_tensor
from fishergeo._linalg import binary_exponent
from fishergeo.spectral.rank import rank_for_energy

BLOCK = 16  # and a 64th of the matrix, if that is more

SMALLEST = 512  # below this LAPACK finds every pair in the time that a few steps take

SETTLED = 1000  # a pair has settled when its residual is this many eps of the largest eigenvalue


def leading_eigenpairs(
    matrix: Tensor, *, energy: float = 0.8, total: float | None = None, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """The fewest leading eigenpairs of a positive semi-definite matrix that hold a share of its trace.

    A curvature has few large eigenvalues, so a block Krylov space of a few dozen columns holds them (Golub and
    Underwood 1977), at a fraction of the full decomposition's p³. The space grows, every column orthogonalised against
    all, until the pairs have settled: ‖M v − θ v‖ ≤ 1000·eps·θ_1, far below what an estimate of a curvature is good
    for. Small matrices, and spectra so flat that the space would reach a third of the matrix, go to LAPACK, and so do
    eigenvalues repeated as often as a block has columns, of which the space shows no more copies than that. The same
    matrix always gives the same bits on the CPU.

    Args:
        matrix: symmetric (p, p), float32 or float64; that it is symmetric is taken for granted, for looking at all of it
            would cost as much as a step.
        energy: the share, in (0, 1].
        total: the trace, where it is known.
        most: pairs at most; no bound if None.

    Returns:
        Values (m,), descending and not negative, and orthonormal vectors (p, m) in columns, of the matrix's dtype; m is
        what :func:`rank_for_energy` says, at most ``most``.

    Raises:
        TypeError: no floating tensor.
        ValueError: a matrix that is not square or not finite, a share or bound out of range, or a ``total`` that is less than
            the sum of the eigenvalues found.

    Examples:
        >>> values, vectors = fg.leading_eigenpairs(torch.diag(torch.tensor([1.0, 8.0, 1.0])))
        >>> values.tolist(), vectors.abs().flatten().tolist()
        ([8.0], [0.0, 1.0, 0.0])
    """
    if check_tensor("matrix", matrix, min_dim=2).ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must be square, got shape {tuple(matrix.shape)}")
    check_finite("matrix", matrix)
    size = len(matrix)
    check_number("energy", energy, low=1e-12, high=1)
    most = size if most is None else min(check_integer("most", most, low=1), size)
    matrix = matrix.detach()
    whole = float(matrix.trace()) if total is None else total
    found = _settled(matrix, energy, whole, most) if size >= SMALLEST and energy < 1 and whole > 0 else None
    if found is None:
        values, vectors = torch.linalg.eigh(matrix)
        values = values.flip(0).clamp_min(0)  # rounding leaves tiny negative ones
        m = min(rank_for_energy(values, energy=energy, total=whole), most)
        found = values[:m], vectors.flip(1)[:, :m]
    return found[0].contiguous(), found[1].contiguous()


def _settled(matrix: Tensor, energy: float, total: float, most: int) -> tuple[Tensor, Tensor] | None:
    """The pairs from a growing Krylov space; None where it would become too large."""
    size, limit = len(matrix), SETTLED * torch.finfo(matrix.dtype).eps
    width = max(BLOCK, size // 64)
    start = torch.randn(size, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = torch.linalg.qr(start.to(matrix)).Q
    basis, images = matrix.new_empty(size, 0), matrix.new_empty(size, 0)
    projected = torch.zeros(0, 0, dtype=torch.float64, device=matrix.device)
    looked = exponent = 0
    while 3 * (basis.shape[1] + width) <= size:
        image = matrix @ block
        if not len(projected):
            # The squares of a small matrix's residuals would be zero, and any pair settled.
            exponent = binary_exponent(float(image.abs().max()), matrix.dtype)
            total = total * math.ldexp(1.0, -exponent)
        image = image * math.ldexp(1.0, -exponent)
        basis, images = torch.cat([basis, block], 1), torch.cat([images, image], 1)
        cross = (basis.mT @ image).double()
        top = torch.cat([projected, cross[: len(projected)]], 1)
        projected = torch.cat([top, cross.mT], 0)
        # The trace over the space is the most that its pairs can hold, so the pairs are not asked for before it will do.
        held = float(projected.trace()) >= energy * total or len(projected) >= most
        if held and len(projected) >= 1.15 * looked:
            looked = len(projected)
            values, rotation = torch.linalg.eigh(projected)  # of the lower triangle
            values, rotation = values.flip(0), rotation.flip(1).to(matrix.dtype)
            reached = values.clamp_min(0).cumsum(0) >= energy * total * (1 - 1e-12)
            m = min(int(reached.to(torch.int64).argmax()) + 1 if bool(reached.any()) else size, most)
            if m <= len(values):
                theta, vectors = values[:m].to(matrix.dtype), basis @ rotation[:, :m]
                residuals = (images @ rotation[:, :m] - vectors * theta).norm(dim=0)
                settled = float(residuals.max()) <= limit * float(values[0])
                if settled and not _crowded(values[:m], residuals.double(), width):
                    if (found := float(values.clamp_min(0).sum())) > total * (1 + max(1e-5, limit)):
                        raise ValueError(
                            f"the trace is {math.ldexp(total, exponent):.6g}, less than the sum {math.ldexp(found, exponent):.6g} "
                            "of the eigenvalues found: a matrix that is not positive semi-definite, or another's total"
                        )
                    return theta.clamp_min(0) * math.ldexp(1.0, exponent), vectors
        for _ in range(2):  # once is not enough where the image lies almost within the space
            image = torch.linalg.qr(image - basis @ (basis.mT @ image)).Q
        block = image
    return None


def _crowded(values: Tensor, residuals: Tensor, width: int) -> bool:
    """Whether copies of an eigenvalue may be missing: a block's width of equal values, and smaller ones after them.

    Vectors that settle within an eigenspace say nothing of what else lies in it, and a Krylov space of a block holds at
    most its width of it. Where no smaller value follows, the copies are as good as those that may be missing.
    """
    if len(values) <= width:
        return False
    ends = torch.arange(width - 1, len(values) - 1)
    slack = 10 * residuals.unfold(0, width, 1).amax(1)[: len(ends)]
    equal = values[ends - width + 1] - values[ends] <= slack
    return bool((equal & (values[ends] - values[-1] > slack)).any())
