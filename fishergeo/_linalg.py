"""Dense linear algebra on which every wing stands: Gram sums, orthonormal blocks, random directions."""

from __future__ import annotations

import math
import zlib
from typing import Any

import scipy.linalg
import scipy.linalg.blas
import torch
from torch import Tensor

_SYRK: dict[torch.dtype, Any] = {torch.float32: scipy.linalg.blas.ssyrk, torch.float64: scipy.linalg.blas.dsyrk}

_BLOCKED_FROM = 192
"""Below this size a triangle saves nothing over the whole product."""

_TILE = 128
"""Rows that are copied at a time, still in the cache when they are read again."""


def add_gram_(total: Tensor, rows: Tensor) -> None:
    """Adds XᵀX to the lower triangle of ``total``, in place; the upper one is left in no particular state.

    On the CPU by the symmetric rank-k update of BLAS, which takes half the multiplications of a product; elsewhere
    by a product. Read the sum with :func:`mirrored`.

    Args:
        total: (d, d), contiguous.
        rows: X, (m, d), the same dtype.
    """
    syrk = _SYRK.get(total.dtype)
    # A subclass (a shard, a tensor without storage) has no memory of its own to hand over.
    unfit = type(total) is not Tensor or total.device.type != "cpu" or len(rows) == 0 or not total.is_contiguous()
    if syrk is None or unfit or rows.requires_grad or total.requires_grad:
        total.addmm_(rows.T, rows)
        return
    # NumPy views of the transposes are in the Fortran order that BLAS wants, so nothing is copied; the upper triangle
    # in that order is the lower one of the tensor.
    columns = rows.contiguous().numpy().T
    target = total.numpy().T
    result = syrk(1.0, columns, beta=1.0, c=target, trans=0, lower=0, overwrite_c=1)
    if result.ctypes.data != target.ctypes.data:
        total.copy_(torch.from_numpy(result.T))


def add_product_(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Adds XᵀY, known to be symmetric, to the lower triangle of ``total``, in place, like :func:`add_gram_`.

    BLAS has no routine for half of such a product, so the triangle is cut into block rows of it.

    Args:
        total: (d, d).
        x: (m, d).
        y: (m, d), the same dtype.
    """
    size = len(total)
    if total.device.type != "cpu" or size < _BLOCKED_FROM:
        total.addmm_(x.T, y)
        return
    step = -(-size // 4)
    for start in range(0, size, step):
        stop = min(size, start + step)
        total[start:stop, :stop].addmm_(x[:, start:stop].T, y[:, :stop])


def mirrored(total: Tensor, divisor: float | Tensor = 1.0) -> Tensor:
    """The symmetric matrix whose lower triangle is that of ``total`` over ``divisor``; a new tensor, the only one so large.

    Args:
        total: (d, d); its upper triangle is not read.
        divisor: a number, or a tensor of one of the same dtype.
    """
    whole = torch.empty_like(total, memory_format=torch.contiguous_format)
    for start in range(0, len(total), _TILE):
        rows = whole[start : start + _TILE, : start + _TILE]
        torch.div(total[start : start + _TILE, : start + _TILE], divisor, out=rows)
        whole[:start, start : start + _TILE] = rows[:, :start].T
        corner = rows[:, start:]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return whole


class HalfGram:
    """Σ XᵀX over many small blocks of rows, gathered until a product with them is worth its memory traffic.

    An update reads and writes the whole (d, d) sum, so with few rows it waits for memory, not for arithmetic.

    Args:
        total: (d, d), the sum; its lower triangle is right after :meth:`flush`.
        buffer: (ROWS, d) rows that wait, from an interrupted sum.
        waiting: (1,) long, how many.
    """

    ROWS = 128  # at 64 a product waits for memory; every layer's buffer is this long, so more is paid for in memory

    def __init__(self, total: Tensor, buffer: Tensor | None = None, waiting: Tensor | None = None) -> None:
        self.total = total
        self.buffer = buffer
        self.waiting = 0 if waiting is None else int(waiting)

    def add(self, rows: Tensor) -> None:
        """Adds XᵀX of rows (m, d); they are copied if they have to wait."""
        held = self.waiting
        if held + len(rows) > self.ROWS:
            self.flush()
            held = 0
        if held == 0 and len(rows) >= self.ROWS:
            add_gram_(self.total, rows)
            return
        if self.buffer is None:
            self.buffer = rows.new_zeros(self.ROWS, rows.shape[1])
        self.buffer[held : held + len(rows)] = rows
        self.waiting += len(rows)

    def flush(self) -> None:
        """Multiplies the rows that wait."""
        if self.waiting:
            assert self.buffer is not None
            add_gram_(self.total, self.buffer[: self.waiting])
            self.waiting = 0


def leading_pairs(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues, descending, and their vectors, of a dense symmetric matrix.

    On the CPU in the matrix's own precision, which is the precision its sums were formed in: all pairs by LAPACK's
    divide and conquer, a few (up to a quarter) by its driver for a range of eigenvalues. Elsewhere in float64, since
    solvers of GPUs have failed on matrices of low rank in float32.

    Args:
        matrix: (d, d), symmetric.
        k: 1 to d.

    Returns:
        (values (k,), vectors (d, k)) in the matrix's dtype.
    """
    size = len(matrix)
    if matrix.device.type == "cpu" and not matrix.requires_grad and matrix.dtype in _SYRK:
        # The transpose of a symmetric matrix is itself, and in the order of memory that LAPACK wants.
        few: dict[str, Any] = {"driver": "evr", "subset_by_index": (size - k, size - 1)} if 4 * k <= size else {}
        values, vectors = scipy.linalg.eigh(matrix.numpy().T, check_finite=False, **({"driver": "evd"} | few))
        found = torch.from_numpy(values).to(matrix.dtype), torch.from_numpy(vectors).to(matrix.dtype)
    else:
        found = tuple(each.to(matrix.dtype) for each in torch.linalg.eigh(matrix.double()))
    return found[0].flip(0)[:k], found[1].flip(1)[:, :k]


def binary_exponent(peak: float, dtype: torch.dtype) -> int:
    """The power of two by which numbers up to ``peak`` are divided to be of the size of one, which is exact.

    Squares of small or large numbers leave a dtype's range; so may the power itself, and is bounded.

    Args:
        peak: largest magnitude; 0 gives 0.
        dtype: float32 or float64, in which they are divided.
    """
    most = 1000 if dtype == torch.float64 else 120
    return max(-most, min(most, math.frexp(peak)[1]))


def power_below(peak: Tensor) -> Tensor:
    """The power of two below each of these magnitudes, to divide by without rounding; 1 where it is zero."""
    most = math.frexp(torch.finfo(peak.dtype).max)[1] - 1  # the logarithm of the very largest is rounded up
    return torch.where(peak > 0, peak.log2().floor().clamp(max=most).exp2(), 1)


def gaussian(size: int, columns: int, seed: int, name: str = "") -> Tensor:
    """A Gaussian (size, columns) matrix in float32 that depends on seed and name only, whatever the device or default dtype.

    Args:
        size: rows.
        columns: columns.
        seed: any integer.
        name: name of the layer, so that layers have independent matrices.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % (2**63))
    return torch.randn(size, columns, generator=generator, dtype=torch.float32)


def directions(size: int, columns: int, seed: int, name: str, first: int = 0) -> Tensor:
    """Gaussian columns of expected norm one, each with a counter of its own.

    Column ``first + j`` depends on seed, name and that number only: neither on the device nor on how many are drawn.

    Args:
        size: rows.
        columns: how many.
        seed: any integer.
        name: name of the layer.
        first: counter of the first.

    Returns:
        (size, columns), float64, on the CPU.
    """
    drawn = [gaussian(size, 1, seed, f"{name}#{first + j}").double() for j in range(columns)]
    return torch.cat(drawn, 1) / size**0.5 if drawn else torch.zeros(size, 0, dtype=torch.float64)


def orthonormalise(block: Tensor, basis: Tensor, floor: float) -> Tensor:
    """Orthonormal columns that span what ``block`` adds to ``basis``; directions below ``floor`` are dropped.

    Gram-Schmidt, twice, until the *absolute* inner products with the basis are at rounding level.

    Args:
        block: (size, c).
        basis: (size, m), orthonormal, m may be 0.
        floor: singular values of the remainder that count as rounding.

    Returns:
        (size, r), r ≤ c.
    """
    work = block
    limit = 4 * torch.finfo(block.dtype).eps * len(block) ** 0.5
    for attempt in range(5):
        for _ in range(2):
            work = work - basis @ (basis.T @ work)
        work, triangle = torch.linalg.qr(work)
        if attempt == 0:
            left, singular, _ = torch.linalg.svd(triangle.cpu().double())
            work = work @ left[:, singular > floor].to(work)
        if work.shape[1] == 0 or basis.shape[1] == 0 or float((basis.T @ work).abs().max()) <= limit:
            break
    return work.contiguous()


def tiled_squares(entries: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σ_ij F_ij (L R)²_ij, a scalar, differentiable; of the product one tile of rows is held at a time.

    The product is formed whole for a gradient in F, and for second derivatives.

    Args:
        entries: F, (p, q).
        left: L, (p, r), the same dtype.
        right: R, (r, q), the same dtype.
    """
    if entries.requires_grad:
        return (entries * (left @ right).square()).sum()
    return _TiledSquares.apply(entries, left, right)  # type: ignore[no-untyped-call]


class _TiledSquares(torch.autograd.Function):
    """See :func:`tiled_squares`; the backward recomputes each tile."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(entries, left, right)
        total = torch.zeros((), dtype=left.dtype, device=left.device)
        for start in range(0, len(left), _TILE):
            rows = slice(start, start + _TILE)
            total += (entries[rows] * (left[rows] @ right).square()).sum()
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, Tensor]:
        entries, left, right = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: these must depend on their inputs
            whole = 2 * upstream * entries * (left @ right)
            return None, whole @ right.T, left.T @ whole
        grad_left, grad_right = torch.empty_like(left), torch.zeros_like(right)
        for start in range(0, len(left), _TILE):
            rows = slice(start, start + _TILE)
            tile = (left[rows] @ right).mul_(entries[rows]).mul_(2 * upstream)
            grad_left[rows] = tile @ right.T
            grad_right += left[rows].T @ tile
        return None, grad_left, grad_right
