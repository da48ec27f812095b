"""Many matrices of one shape at once: quadratic forms of a stack of updates, each by its own curvature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fishergeo._checks import check_tensor
from fishergeo.operators import SpectralOperator, SymmetricOperator
from fishergeo.updates.lowrank import LowRank


class _Congruence(torch.autograd.Function):
    """R C Rᵀ of every matrix of a stack; the gradient (G + Gᵀ) R C reuses the large product of the value."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *matrices: Tensor) -> Tensor:
        ctx.save_for_backward(rows, *matrices)
        ctx.products = _products(rows, matrices)
        return ctx.products @ rows.mT

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, *matrices = ctx.saved_tensors
        # Where a second derivative is wanted, the products must depend on their inputs.
        products = _products(rows, matrices) if torch.is_grad_enabled() else ctx.products
        return (upstream + upstream.mT) @ products, *(None for _ in matrices)


class _SpectralCongruence(torch.autograd.Function):
    """R (U diag(w) Uᵀ + ρI) Rᵀ of every matrix of a stack, w = λ − ρ; the gradient reuses the products R U of the value."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, rest: Tensor, *bases: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, rest, *bases)
        ctx.products = _padded_products(rows, bases, weights.shape[-1])
        return (ctx.products * weights) @ ctx.products.mT + rest * (rows @ rows.mT)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, rest, *bases = ctx.saved_tensors
        products = ctx.products
        if torch.is_grad_enabled():  # a second derivative is wanted: they must depend on the rows
            products = _padded_products(rows, bases, weights.shape[-1])
        both = upstream + upstream.mT
        inside = both @ (products * weights)
        outside = [one[:, : basis.shape[1]] @ basis.mT for one, basis in zip(inside, bases, strict=True)]
        return torch.stack(outside) + rest * (both @ rows), None, None, *(None for _ in bases)


def _padded_products(rows: Tensor, bases: Sequence[Tensor], width: int) -> Tensor:
    """The stack of ``rows[i] @ bases[i]``, (L, r, width), zeros where a basis is narrower."""
    parts = [some @ basis for some, basis in zip(rows, bases, strict=True)]
    return torch.stack([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def _products(rows: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The stack of ``rows[i] @ matrices[i]``; the matrices stay where they are: a stack of them would be a copy."""
    if torch.is_grad_enabled() and rows.requires_grad:
        return torch.stack([some @ matrix for some, matrix in zip(rows, matrices, strict=True)])
    products = rows.new_empty(rows.shape)
    for some, matrix, out in zip(rows, matrices, products, strict=True):
        torch.mm(some, matrix, out=out)
    return products


def stacked_congruence(matrices: Sequence[Tensor | SpectralOperator], rows: Tensor) -> Tensor:
    """R_i C_i R_iᵀ for every matrix of a stack, differentiable in the rows; by definition.

    The large matrices are neither stacked nor copied, and the backward pass does not multiply by them again. BLAS
    reads a square matrix twice as fast with few rows on its left, so it is asked for R C rather than C Rᵀ.

    Args:
        matrices: L constant symmetric tensors (q, q), or L operators known through some eigenpairs, of the rows' dtype
            and device.
        rows: (L, r, q), any floating dtype.

    Returns:
        Tensor (L, r, r), of the rows' dtype.

    Raises:
        TypeError: rows that are no floating tensor, or tensors and operators in one stack.
        ValueError: rows that do not fit, another number of matrices, or a matrix that asks for a gradient.

    Examples:
        >>> fg.stacked_congruence([torch.eye(2), 2 * torch.eye(2)], torch.ones(2, 1, 2)).flatten().tolist()
        [2.0, 4.0]
    """
    check_tensor("rows", rows, min_dim=3)
    size = rows.shape[-1]
    if rows.ndim != 3 or len(rows) != len(matrices) or any(matrix.shape != (size, size) for matrix in matrices):
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        raise ValueError(f"rows has shape {tuple(rows.shape)}, which does not fit {len(matrices)} matrices of {shapes}")
    operators = [matrix for matrix in matrices if not isinstance(matrix, Tensor)]
    if operators and len(operators) < len(matrices):
        raise TypeError("matrices must be tensors or SpectralOperators, not both in one stack")
    constants = [one for op in operators for one in (op.values, op.vectors)] or matrices
    if any(constant.requires_grad for constant in constants):  # type: ignore[union-attr]
        raise ValueError("matrices are constants here and get no gradient; pass matrix.detach()")
    if operators:
        weights = pad_sequence([op.values - op.rest for op in operators], batch_first=True)[:, None]
        rest = rows.new_tensor([op.rest for op in operators])[:, None, None]
        bases = [op.vectors for op in operators]
        return _SpectralCongruence.apply(rows, weights.to(rows.dtype), rest, *bases)  # type: ignore[no-untyped-call]
    return _Congruence.apply(rows, *matrices)  # type: ignore[no-untyped-call]


def stacked_quadratic(operators: Sequence[SymmetricOperator], delta: LowRank | Tensor) -> Tensor:
    """The quadratic forms of a stack of updates, each of its own operator, differentiable in the updates.

    What :meth:`SymmetricOperator.quadratic` gives one by one; KFAC (Martens and Grosse 2015) on factors is batched,
    tr((LᵀSL)(RARᵀ)), since with small matrices most of the time would go into calls.

    Args:
        operators: L operators, of updates (p, q), of one dtype and device.
        delta: LowRank or dense tensor (L, p, q).

    Returns:
        Tensor (L,), of the operators' dtype, float32 in place of a narrower one.

    Raises:
        ValueError: another number of operators than updates, or an update that does not fit its operator.

    Examples:
        >>> op = fg.KroneckerOperator(torch.eye(2), torch.eye(3))
        >>> fg.stacked_quadratic([op, op], torch.stack([torch.ones(2, 3), torch.zeros(2, 3)])).tolist()
        [6.0, 0.0]
    """
    if delta.ndim != 3 or len(operators) != delta.shape[0]:
        raise ValueError(f"delta has shape {tuple(delta.shape)}, which does not fit {len(operators)} operators")
    operators = [op.widened() for op in operators]
    if isinstance(delta, LowRank) and (factors := _factors(operators)) is not None:
        dtype = operators[0].dtype
        left, right = delta.left.to(dtype), delta.right.to(dtype)
        return (stacked_congruence(factors[0], left.mT) * stacked_congruence(factors[1], right)).sum((-2, -1))
    return torch.stack([op.quadratic(delta[place]) for place, op in enumerate(operators)])


def _factors(operators: Sequence[SymmetricOperator]) -> tuple[list[Any], list[Any]] | None:
    """S and A of every kron(S, A) of a stack; None unless all have both, of one class, and none asks for a gradient."""
    if len({type(op) for op in operators}) != 1:
        return None
    outputs, inputs = (list(factors) for factors in zip(*(op.factors() for op in operators), strict=True))
    for factor in (*outputs, *inputs):
        if factor is None or (isinstance(factor, Tensor) and factor.requires_grad):
            return None
    return outputs, inputs
