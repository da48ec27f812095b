"""Trace and diagonal of an operator from a few products: Hutchinson, Hutch++, XTrace, XDiag.

Hutchinson (1990); Hutch++: Meyer, Musco, Musco and Woodruff (2021), "Hutch++: optimal stochastic trace estimation";
XTrace and XDiag: Epperly, Tropp and Webber (2024), "XTrace: making the most of every sample in stochastic trace
estimation". All are unbiased, or for XTrace exchangeable over its samples, and for low-rank operators all but
Hutchinson's are exact to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fishergeo._checks import check_choice, check_integer
from fishergeo._linalg import directions, power_below
from fishergeo.operators import BlackBox, Product, black_box

TRACE_METHODS = ("xtrace", "hutch++", "hutchinson")

DIAGONAL_METHODS = ("xdiag", "hutchinson")


@dataclass(frozen=True)
class Estimate:
    """A number, or a tensor of numbers, estimated from random probes.

    Attributes:
        value: scalar, or (size,) for a diagonal, in the operator's dtype, float32 for half precision.
        error: standard error of each, the same shape, from the scatter of the samples; zero where every basis vector
            was multiplied, rounding where the operator is of low rank.
        products: columns that the operator was multiplied with.

    Examples:
        >>> estimate = fg.trace(torch.eye(5, dtype=torch.float64), 10)
        >>> round(float(estimate), 6), round(float(estimate.error), 6)
        (5.0, 0.0)
    """

    value: Tensor
    error: Tensor
    products: int

    def __float__(self) -> float:
        return float(self.value)


def _signs(size: int, columns: int, seed: int, name: str, like: tuple[torch.dtype, torch.device]) -> Tensor:
    draw = directions(size, columns, seed, name)
    return torch.where(draw < 0, -1.0, 1.0).to(device=like[1], dtype=like[0])


def _widened(op: BlackBox, size: int | None) -> tuple[Product, int, torch.dtype, torch.device]:
    """The operator as a black box of float32 or wider: LAPACK has nothing narrower."""
    matmul, n, dtype, device = black_box(op, size)
    work = torch.promote_types(dtype, torch.float32)
    return (lambda block: matmul(block.to(dtype)).to(work)), n, work, device


def trace(
    op: BlackBox, products: int = 32, method: str = "xtrace", *, size: int | None = None, seed: int = 0
) -> Estimate:
    """tr(A) of a symmetric operator from ``products`` columns, in two or three block products.

    Where ``products`` reaches twice the size, the trace is exact: the basis vectors are multiplied. XTrace: Epperly,
    Tropp and Webber (2024); Hutch++: Meyer et al. (2021); Hutchinson (1990).

    Args:
        op: an operator, a square tensor, a SciPy LinearOperator, or a function of a (size, c) block.
        products: columns to multiply with, at least 4.
        method: ``"xtrace"`` (least error for decaying spectra, and the best error estimate), ``"hutch++"``, or
            ``"hutchinson"`` (the mean of zᵀAz over random signs; one block product).
        size: size of a function's blocks.
        seed: seed of the probes, which are the same on every device.

    Returns:
        Estimate with scalar tensors.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for arguments out of range.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        >>> round(float(fg.trace(lambda block: A @ block, 12, size=3)), 4)
        6.0
    """
    matmul, n, dtype, device = _widened(op, size)
    check_integer("products", products, low=4)
    check_choice("method", method, TRACE_METHODS)
    if products >= 2 * n:
        whole = matmul(torch.eye(n, dtype=dtype, device=device))
        return Estimate(whole.diagonal().sum(), whole.new_zeros(()), n)
    if method == "hutchinson":
        z = _signs(n, products, seed, "trace", (dtype, device))
        return _mean((z * matmul(z)).sum(0), products)
    if method == "hutch++":
        return _hutch_plus_plus(matmul, n, products, seed, dtype, device)
    return _xtrace(matmul, n, products // 2, seed, dtype, device)


def _hutch_plus_plus(
    matmul: Product, n: int, products: int, seed: int, dtype: torch.dtype, device: torch.device
) -> Estimate:
    third = products // 3
    q = torch.linalg.qr(matmul(_signs(n, third, seed, "sketch", (dtype, device))))[0]
    inside = (q * matmul(q)).sum()
    z = _signs(n, products - 2 * third, seed, "trace", (dtype, device))
    z = z - q @ (q.T @ z)
    outside = _mean((z * matmul(z)).sum(0), products)
    return Estimate(inside + outside.value, outside.error, products)


def _mean(samples: Tensor, products: int) -> Estimate:
    """Over the last dimension; squares are of numbers near one, whatever the operator's scale."""
    unit = power_below(samples.abs().max())
    error = (samples / unit).std(-1) * unit / samples.shape[-1] ** 0.5
    return Estimate(samples.mean(-1), error, products)


def _left_out(triangle: Tensor) -> Tensor:
    """Unit columns s_i: Q(I − s_i s_iᵀ)Qᵀ projects on the range of all samples but the i-th.

    They are the columns of R⁻ᵀ. Where R is singular to rounding, as for an operator of low rank, those point to what is
    rounding in Q, which is left out without loss; the floor only keeps the inverse finite. A small singular value alone
    does not say that there is nothing beyond the samples' range: a long flat tail has a trace too.
    """
    left, singular, right = torch.linalg.svd((triangle / power_below(triangle.abs().max())).cpu().double())
    floor = torch.finfo(torch.float64).eps * singular[0]
    inverse = (left / torch.where(singular > floor, singular, torch.where(floor > 0, floor, 1))) @ right
    return (inverse / torch.linalg.vector_norm(inverse, dim=0)).to(triangle)


def _xtrace(matmul: Product, n: int, half: int, seed: int, dtype: torch.dtype, device: torch.device) -> Estimate:
    omega = (directions(n, half, seed, "trace") * n**0.5).to(device, dtype)
    y = matmul(omega)
    q, triangle = torch.linalg.qr(y)
    z = matmul(q)
    h = q.T @ z
    s = _left_out(triangle)
    w, t = q.T @ omega, z.T @ omega
    x = w - s * (s * w).sum(0)
    inside = h.trace() - (s * (h @ s)).sum(0)
    outside = (omega * y).sum(0) - 2 * (x * t).sum(0) + (x * (h @ x)).sum(0)
    # What is left of a Gaussian vector has a random length; its direction is what matters.
    length = omega.square().sum(0) - x.square().sum(0)
    return _mean(inside + outside * (n - half + 1) / length, 2 * half)


def diagonal(
    op: BlackBox, products: int = 32, method: str = "xdiag", *, size: int | None = None, seed: int = 0
) -> Estimate:
    """diag(A) of a symmetric operator from ``products`` columns. XDiag: Epperly, Tropp and Webber (2024).

    Args:
        op: an operator, a square tensor, a SciPy LinearOperator, or a function of a (size, c) block.
        products: columns to multiply with, at least 4; with twice the size or more the diagonal is exact.
        method: ``"xdiag"`` (a low-rank part exactly, the rest by Hutchinson, each sample against the others' range) or
            ``"hutchinson"`` (Bekas, Kokiopoulou and Saad 2007: the mean of z ∘ Az over random signs).
        size: size of a function's blocks.
        seed: seed of the probes.

    Returns:
        Estimate with tensors (size,).

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for arguments out of range.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        >>> [round(v, 4) for v in fg.diagonal(A, 12).value.tolist()]
        [1.0, 2.0, 3.0]
    """
    matmul, n, dtype, device = _widened(op, size)
    check_integer("products", products, low=4)
    check_choice("method", method, DIAGONAL_METHODS)
    if products >= 2 * n:
        whole = matmul(torch.eye(n, dtype=dtype, device=device)).diagonal()
        return Estimate(whole, torch.zeros_like(whole), n)
    if method == "hutchinson":
        z = _signs(n, products, seed, "diagonal", (dtype, device))
        return _mean(z * matmul(z), products)
    half = products // 2
    omega = _signs(n, half, seed, "diagonal", (dtype, device))
    y = matmul(omega)
    q, triangle = torch.linalg.qr(y)
    z = matmul(q)
    whole = (q * z).sum(1)
    s = _left_out(triangle)
    qs, t = q @ s, z.T @ omega
    # diag(P_i A) with P_i = Q(I − s_i s_iᵀ)Qᵀ, and ω_i ∘ (I − P_i)A ω_i.
    inside = whole[:, None] - qs * (z @ s)
    outside = omega * (y - q @ (t - s * (s * t).sum(0)))
    return _mean(inside + outside, 2 * half)
