"""Operators on both sides of a layer's W at once: they act on vec(W), row-major, of shape (pq, pq)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fishergeo.symmetric_operator import SymmetricOperator, checked_rank, fix_signs


class DiagonalOperator(SymmetricOperator):
    """A diagonal on vec(W), row-major: what EWC keeps of the Fisher (Kirkpatrick et al. 2017).

    Args:
        entries: (p, q), any floating dtype, in which products come.

    Raises:
        ValueError: if they have not two dimensions.

    Examples:
        >>> op = fg.DiagonalOperator(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))  # of a (2, 2) weight
        >>> op.shape, float(op.trace())
        ((4, 4), 10.0)
    """

    side = "both"

    def __init__(self, entries: Tensor) -> None:
        if entries.ndim != 2:
            raise ValueError(f"entries must be (p, q), got shape {tuple(entries.shape)}")
        self.entries = entries

    @property
    def shape(self) -> tuple[int, int]:
        """(pq, pq)."""
        return self.entries.numel(), self.entries.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products."""
        return self.entries.dtype

    @property
    def device(self) -> torch.device:
        """The device of products."""
        return self.entries.device

    def _matmat(self, block: Tensor) -> Tensor:
        return self.entries.reshape(-1, 1) * block

    def diagonal(self) -> Tensor:
        """(pq,)."""
        return self.entries.flatten()

    def to_dense(self) -> Tensor:
        """(pq, pq)."""
        return torch.diag(self.entries.flatten())

    def eigh(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The k largest entries (k,), descending, and their unit vectors (pq, k); all of them by default.

        Raises:
            ValueError: if k is not between 1 and pq.
        """
        k = checked_rank(k, self.shape[0])
        values, index = self.entries.flatten().topk(k)
        vectors = torch.zeros(self.shape[0], k, dtype=self.dtype, device=self.device)
        vectors[index, torch.arange(k, device=self.device)] = 1
        return values, vectors

    def _check_delta(self, rows: int, columns: int) -> None:
        check_layer_shape(self.entries.shape[0], self.entries.shape[1], rows, columns)

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        return (self.entries * delta.square()).sum()

    def _quadratic_factored(self, left: Tensor, right: Tensor) -> Tensor:
        return _TiledSquares.apply(self.entries, left, right)  # type: ignore[no-untyped-call]

    def _map(self, function: Callable[[Tensor], Tensor]) -> SymmetricOperator:
        return DiagonalOperator(function(self.entries.double()).to(self.dtype))

    def _eigenvalues(self) -> Tensor:
        return self.entries.double().flatten()


class _TiledSquares(torch.autograd.Function):
    """Σ F_ij (L R)²_ij over tiles of rows; the backward recomputes each tile, so memory is one tile."""

    TILE = 128

    @staticmethod
    def forward(ctx: Any, entries: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(entries, left, right)
        total = torch.zeros((), dtype=left.dtype, device=left.device)
        for start in range(0, len(left), _TiledSquares.TILE):
            rows = slice(start, start + _TiledSquares.TILE)
            total += (entries[rows] * (left[rows] @ right).square()).sum()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, Tensor]:
        entries, left, right = ctx.saved_tensors
        grad_left, grad_right = torch.empty_like(left), torch.zeros_like(right)
        for start in range(0, len(left), _TiledSquares.TILE):
            rows = slice(start, start + _TiledSquares.TILE)
            tile = (left[rows] @ right).mul_(entries[rows]).mul_(2 * upstream)
            grad_left[rows] = tile @ right.T
            grad_right += left[rows].T @ tile
        return None, grad_left, grad_right


class FactoredKronecker(SymmetricOperator):
    """What kron(S, A) on vec(W), row-major, is whatever form its two factors have: tensors, or operators."""

    side = "both"
    output_factor: Any
    input_factor: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(pq, pq)."""
        size = self.output_factor.shape[0] * self.input_factor.shape[0]
        return size, size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products."""
        found: torch.dtype = self.output_factor.dtype
        return found

    @property
    def device(self) -> torch.device:
        """The device of products."""
        found: torch.device = self.output_factor.device
        return found

    def diagonal(self) -> Tensor:
        """(pq,)."""
        return torch.outer(self.output_factor.diagonal(), self.input_factor.diagonal()).flatten()

    def trace(self) -> Tensor:
        """tr(S)·tr(A), a scalar tensor."""
        traces: Tensor = self.output_factor.trace() * self.input_factor.trace()
        return traces

    def rotated(self) -> EigenKroneckerOperator:
        """The same operator in the eigenbases of its factors."""
        raise NotImplementedError

    def eigh(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The k largest products of the factors' eigenvalues (k,), and the Kronecker products of their vectors (pq, k).

        Raises:
            ValueError: if k is not between 1 and pq.
        """
        return self.rotated().eigh(k)

    def _map(self, function: Callable[[Tensor], Tensor]) -> SymmetricOperator:
        return self.rotated()._map(function)

    def _eigenvalues(self) -> Tensor:
        return self.rotated()._eigenvalues()

    def _check_delta(self, rows: int, columns: int) -> None:
        check_layer_shape(self.output_factor.shape[0], self.input_factor.shape[0], rows, columns)


class KroneckerOperator(FactoredKronecker):
    """kron(S, A) on vec(W), row-major: vec(ΔW) goes to vec(S ΔW A) (KFAC: Martens and Grosse 2015).

    Args:
        output_factor: S, (p, p), symmetric positive semi-definite; any floating dtype, in which products come.
        input_factor: A, (q, q), the same.

    Raises:
        ValueError: if a factor is not square.

    Examples:
        >>> op = fg.KroneckerOperator(torch.diag(torch.tensor([1.0, 2.0])), 3 * torch.eye(2))
        >>> op.shape, float(op.trace())
        ((4, 4), 18.0)
        >>> float(op.quadratic(torch.ones(2, 2)))  # tr(ΔWᵀ S ΔW A)
        18.0
    """

    def __init__(self, output_factor: Tensor, input_factor: Tensor) -> None:
        for name, factor in (("output_factor", output_factor), ("input_factor", input_factor)):
            if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
                raise ValueError(f"{name} must be square, got shape {tuple(factor.shape)}")
        self.output_factor = output_factor
        self.input_factor = input_factor

    def _matmat(self, block: Tensor) -> Tensor:
        p, q = len(self.output_factor), len(self.input_factor)
        cube = block.T.reshape(-1, p, q)
        return (self.output_factor @ cube @ self.input_factor).reshape(-1, p * q).T

    def to_dense(self) -> Tensor:
        """(pq, pq)."""
        return torch.kron(self.output_factor, self.input_factor)

    def rotated(self) -> EigenKroneckerOperator:
        """The same operator in the eigenbases of its factors."""
        s, u = torch.linalg.eigh(self.output_factor.double())
        a, v = torch.linalg.eigh(self.input_factor.double())
        return EigenKroneckerOperator(u.to(self.dtype), v.to(self.dtype), torch.outer(s, a).to(self.dtype))

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        return ((self.output_factor @ delta) * (delta @ self.input_factor)).sum()

    def _quadratic_factored(self, left: Tensor, right: Tensor) -> Tensor:
        if self.output_factor.requires_grad or self.input_factor.requires_grad:
            return ((left.T @ (self.output_factor @ left)) * (right @ (self.input_factor @ right.T))).sum()
        return _KroneckerQuadratic.apply(self.output_factor, self.input_factor, left, right)  # type: ignore[no-untyped-call]


class _KroneckerQuadratic(torch.autograd.Function):
    """tr((LᵀSL)(RARᵀ)); the gradient, 2 SL(RARᵀ) and 2 (LᵀSL)RA, reuses the two large products of the value.

    Autograd's own backward would multiply by S and A a second time, which is half of the term's cost. Both large
    products have the few rows on the left, LᵀS for SL: BLAS reads a square matrix twice as fast that way.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inside: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(output, inside, left, right)
        ctx.products = (left.T @ output, right @ inside)
        ctx.inner = (ctx.products[0] @ left, ctx.products[1] @ right.T)
        return (ctx.inner[0] * ctx.inner[1]).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, Tensor, Tensor]:
        output, inside, left, right = ctx.saved_tensors
        (ls, ra), (lsl, rar) = ctx.products, ctx.inner
        if torch.is_grad_enabled():  # a second derivative is wanted: these must depend on their inputs
            ls, ra = left.T @ output, right @ inside
            lsl, rar = ls @ left, ra @ right.T
        return None, None, ((2 * upstream * rar) @ ls).T, (2 * upstream * lsl) @ ra


class EigenKroneckerOperator(SymmetricOperator):
    """kron(U, V) diag(vec(values)) kron(U, V)ᵀ on vec(W): what every function of KFAC is, and EKFAC (George et al. 2018).

    Args:
        output_basis: U, (p, p), orthogonal; any floating dtype.
        input_basis: V, (q, q), orthogonal, the same.
        values: (p, q), the same; products come in their dtype.

    Raises:
        ValueError: if the values do not fit the bases.

    Examples:
        >>> op = fg.EigenKroneckerOperator(torch.eye(2), torch.eye(3), torch.arange(6.0).reshape(2, 3))
        >>> op.shape, float(op.trace())
        ((6, 6), 15.0)
    """

    side = "both"

    def __init__(self, output_basis: Tensor, input_basis: Tensor, values: Tensor) -> None:
        if values.shape != (output_basis.shape[-1], input_basis.shape[-1]):
            raise ValueError(
                f"values {tuple(values.shape)} do not fit bases {tuple(output_basis.shape)}, {tuple(input_basis.shape)}"
            )
        self.output_basis = output_basis
        self.input_basis = input_basis
        self.values = values

    @property
    def shape(self) -> tuple[int, int]:
        """(pq, pq)."""
        return self.values.numel(), self.values.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """The device of products."""
        return self.values.device

    def _matmat(self, block: Tensor) -> Tensor:
        cube = block.T.reshape(-1, *self.values.shape)
        inside = self.values * (self.output_basis.T @ cube @ self.input_basis)
        return (self.output_basis @ inside @ self.input_basis.T).reshape(-1, self.shape[0]).T

    def diagonal(self) -> Tensor:
        """(pq,)."""
        return (self.output_basis.square() @ self.values @ self.input_basis.square().T).flatten()

    def trace(self) -> Tensor:
        """Sum of the eigenvalues, a scalar tensor."""
        return self.values.sum()

    def eigh(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The k largest values (k,) and the Kronecker products of their vectors (pq, k); all by default.

        Raises:
            ValueError: if k is not between 1 and pq.
        """
        k = checked_rank(k, self.shape[0])
        values, index = self.values.flatten().topk(k)
        width = self.values.shape[1]
        left, right = self.output_basis[:, index // width], self.input_basis[:, index % width]
        return values, fix_signs((left[:, None] * right[None]).reshape(-1, k))

    def _map(self, function: Callable[[Tensor], Tensor]) -> SymmetricOperator:
        values = function(self.values.double()).to(self.dtype)
        return EigenKroneckerOperator(self.output_basis, self.input_basis, values)

    def _eigenvalues(self) -> Tensor:
        return self.values.double().flatten()

    def _check_delta(self, rows: int, columns: int) -> None:
        check_layer_shape(self.values.shape[0], self.values.shape[1], rows, columns)

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        return (self.values * (self.output_basis.T @ delta @ self.input_basis).square()).sum()

    def _quadratic_factored(self, left: Tensor, right: Tensor) -> Tensor:
        inside = self.output_basis.T @ left, right @ self.input_basis
        return _TiledSquares.apply(self.values, *inside)  # type: ignore[no-untyped-call]


def check_layer_shape(p: int, q: int, rows: int, columns: int) -> None:
    """Refuses an update (rows, columns) of a layer that is (p, q).

    Raises:
        ValueError: if they differ.
    """
    if (rows, columns) != (p, q):
        raise ValueError(f"delta of shape ({rows}, {columns}) does not fit an operator of a layer of shape ({p}, {q})")
