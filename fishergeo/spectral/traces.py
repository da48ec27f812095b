"""Trace and diagonal of an operator from a few products: Hutchinson, Hutch++, XTrace, XDiag.

Hutchinson (1990); Hutch++: Meyer, Musco, Musco and Woodruff (2021), "Hutch++: optimal stochastic trace estimation";
XTrace and XDiag: Epperly, Tropp and Webber (2024), "XTrace: making the most of every sample in stochastic trace
estimation". All are unbiased, or for XTrace exchangeable over its samples, and exact for low-rank operators but
Hutchinson's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fishergeo._checks import check_choice, check_integer
from fishergeo._linalg import directions
from fishergeo.operators import BlackBox, Product, black_box

TRACE_METHODS = ("xtrace", "hutch++", "hutchinson")

DIAGONAL_METHODS = ("xdiag", "hutchinson")


@dataclass(frozen=True)
class Estimate:
    """A number, or a tensor of numbers, estimated from random probes.

    Attributes:
        value: scalar, or (size,) for a diagonal, in the operator's dtype.
        error: standard error of each, the same shape, from the scatter of the samples; zero where the estimate is exact.
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
    matmul, n, dtype, device = black_box(op, size)
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


def _unit(tensor: Tensor) -> Tensor:
    """The power of two just above the largest magnitude, to divide by without rounding; 1 where all is zero."""
    mantissa, exponent = torch.frexp(tensor.abs().max())
    return torch.where(mantissa == 0, 1, torch.ldexp(torch.ones_like(mantissa), exponent))


def _mean(samples: Tensor, products: int) -> Estimate:
    """Over the last dimension; squares are of numbers near one, whatever the operator's scale."""
    unit = _unit(samples)
    error = (samples / unit).std(-1) * unit / samples.shape[-1] ** 0.5
    return Estimate(samples.mean(-1), error, products)


def _left_out(triangle: Tensor, eps: float) -> Tensor | None:
    """Unit columns s_i: Q(I − s_i s_iᵀ)Qᵀ projects on the range of all samples but the i-th. None if R is singular."""
    triangle = triangle / _unit(triangle)
    singular = torch.linalg.svdvals(triangle)
    if not bool(singular[-1] > 16 * eps * len(triangle) * singular[0]):
        return None
    inverse = torch.linalg.inv(triangle).T
    return inverse / torch.linalg.vector_norm(inverse, dim=0)


def _xtrace(matmul: Product, n: int, half: int, seed: int, dtype: torch.dtype, device: torch.device) -> Estimate:
    omega = (directions(n, half, seed, "trace") * n**0.5).to(device, dtype)
    y = matmul(omega)
    q, triangle = torch.linalg.qr(y)
    z = matmul(q)
    h = q.T @ z
    s = _left_out(triangle, torch.finfo(dtype).eps)
    if s is None:  # fewer dimensions than samples: the range of A is in that of Q, so its trace is all there
        return Estimate(h.trace(), h.new_zeros(()), 2 * half)
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
    matmul, n, dtype, device = black_box(op, size)
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
    s = _left_out(triangle, torch.finfo(dtype).eps)
    if s is None:
        return Estimate(whole, torch.zeros_like(whole), 2 * half)
    qs, t = q @ s, z.T @ omega
    # diag(P_i A) with P_i = Q(I − s_i s_iᵀ)Qᵀ, and ω_i ∘ (I − P_i)A ω_i.
    inside = whole[:, None] - qs * (z @ s)
    outside = omega * (y - q @ (t - s * (s * t).sum(0)))
    return _mean(inside + outside, 2 * half)
