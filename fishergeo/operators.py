"""Symmetric positive semi-definite operators of layers, and what one can ask of them.

A one-sided operator has the shape of one side of W: (p, p) for ``side="output"``, (q, q) for ``side="input"``. A
two-sided one acts on vec(W), row-major, and has shape (pq, pq).
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor


class SymmetricOperator(abc.ABC):
    """A real symmetric operator, known by its action.

    Attributes:
        shape: (size, size).
        dtype: of its numbers.
        device: where they live.
        side: ``"output"``, ``"input"`` or ``"both"``: which side of W it acts on.
    """

    side: str = "output"

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(size, size)."""

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of products."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """The device of products."""

    @abc.abstractmethod
    def _matmat(self, block: Tensor) -> Tensor:
        """The product with a (size, k) block of the operator's own dtype."""

    @abc.abstractmethod
    def diagonal(self) -> Tensor:
        """(size,)."""

    def trace(self) -> Tensor:
        """Scalar tensor."""
        return self.diagonal().sum()

    def __matmul__(self, other: Tensor) -> Tensor:
        """Product with a vector (size,) or a block (size, k), differentiable in both.

        Raises:
            ValueError: if the leading dimension of ``other`` is not the operator's size.
        """
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim not in (1, 2) or other.shape[0] != self.shape[1]:
            raise ValueError(f"operator of shape {self.shape} @ tensor of shape {tuple(other.shape)}")
        block = other.to(self.dtype)
        return self._matmat(block[:, None])[:, 0] if other.ndim == 1 else self._matmat(block)

    def to_dense(self) -> Tensor:
        """(size, size)."""
        return self._matmat(torch.eye(self.shape[0], dtype=self.dtype, device=self.device))

    def eigh(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues, descending, and their orthonormal vectors.

        The sign of each vector is fixed by making its entry of largest magnitude positive.

        Args:
            k: how many, all by default.

        Returns:
            (values (k,), vectors (size, k)), in the operator's dtype; computed in float64.

        Raises:
            ValueError: if k is not between 1 and the size.
        """
        k = checked_rank(k, self.shape[0])
        values, vectors = torch.linalg.eigh(self.to_dense().double())
        values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
        return values.to(self.dtype), fix_signs(vectors).to(self.dtype)

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The same operator for SciPy, on NumPy arrays."""

        def product(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            block = torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)
            return (self @ block).detach().cpu().numpy()

        numpy_dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return scipy.sparse.linalg.LinearOperator(
            self.shape, matvec=product, matmat=product, rmatvec=product, rmatmat=product, dtype=numpy_dtype
        )

    def quadratic(self, delta: Any) -> Tensor:
        """The quadratic form of an update ΔW (p, q), differentiable in it.

        One-sided, ``side="output"``: tr(ΔWᵀ F ΔW); ``side="input"``: tr(ΔW F ΔWᵀ). Two-sided: vec(ΔW)ᵀ F vec(ΔW).

        Args:
            delta: a (p, q) tensor, or factors with ``.left`` (p, r) and ``.right`` (r, q) standing for their product;
                then no (p, q) tensor is formed.

        Returns:
            Scalar tensor.

        Raises:
            ValueError: if the shape does not fit.
        """
        if isinstance(delta, Tensor):
            self._check_delta(delta.shape[0], delta.shape[-1])
            return self._quadratic_dense(delta.to(self.dtype))
        left, right = delta.left, delta.right
        self._check_delta(left.shape[0], right.shape[-1])
        return self._quadratic_factored(left.to(self.dtype), right.to(self.dtype))

    def _check_delta(self, rows: int, columns: int) -> None:
        size = {"output": rows, "input": columns}.get(self.side, rows * columns)
        if size != self.shape[0]:
            raise ValueError(
                f"delta of shape ({rows}, {columns}) does not fit an operator of shape {self.shape}, side {self.side!r}"
            )

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        if self.side == "input":
            delta = delta.T
        elif self.side == "both":
            delta = delta.reshape(-1, 1)
        return (delta * self._matmat(delta)).sum()

    def _quadratic_factored(self, left: Tensor, right: Tensor) -> Tensor:
        # tr(RᵀLᵀ F L R) = ⟨Lᵀ F L, R Rᵀ⟩, and the mirror image of it.
        if self.side == "output":
            return ((left.T @ self._matmat(left)) * (right @ right.T)).sum()
        if self.side == "input":
            return ((right @ self._matmat(right.T)) * (left.T @ left)).sum()
        raise NotImplementedError(f"{type(self).__name__} has no factored quadratic form")


class DenseOperator(SymmetricOperator):
    """A symmetric matrix held whole.

    Args:
        matrix: (size, size), symmetric.
        side: see :class:`SymmetricOperator`.
    """

    def __init__(self, matrix: Tensor, side: str = "output") -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, got shape {tuple(matrix.shape)}")
        self.matrix = matrix
        self.side = side

    @property
    def shape(self) -> tuple[int, int]:
        """(size, size)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """The device of products."""
        return self.matrix.device

    def _matmat(self, block: Tensor) -> Tensor:
        return self.matrix @ block

    def diagonal(self) -> Tensor:
        """(size,)."""
        return self.matrix.diagonal()

    def to_dense(self) -> Tensor:
        """(size, size), the matrix itself."""
        return self.matrix


class SpectralOperator(SymmetricOperator):
    """U diag(λ) Uᵀ: an operator known through its leading eigenpairs.

    ``trace()`` and ``diagonal()`` are of this operator, the truncated one; ``full_trace`` is that of the operator it
    stands for, where that is known.

    Args:
        values: (k,), descending.
        vectors: (size, k), orthonormal columns.
        full_trace: scalar tensor or None.
        side: see :class:`SymmetricOperator`.
    """

    def __init__(self, values: Tensor, vectors: Tensor, full_trace: Tensor | None = None, side: str = "output") -> None:
        if values.ndim != 1 or vectors.ndim != 2 or vectors.shape[1] != len(values):
            raise ValueError(f"values {tuple(values.shape)} and vectors {tuple(vectors.shape)} do not pair up")
        self.values = values
        self.vectors = vectors
        self.full_trace = full_trace
        self.side = side

    @property
    def shape(self) -> tuple[int, int]:
        """(size, size)."""
        return self.vectors.shape[0], self.vectors.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products."""
        return self.vectors.dtype

    @property
    def device(self) -> torch.device:
        """The device of products."""
        return self.vectors.device

    def _matmat(self, block: Tensor) -> Tensor:
        return self.vectors @ (self.values[:, None] * (self.vectors.T @ block))

    def diagonal(self) -> Tensor:
        """(size,)."""
        return (self.vectors.square() * self.values).sum(1)

    def trace(self) -> Tensor:
        """Sum of the eigenvalues known."""
        return self.values.sum()

    def eigh(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The k largest eigenpairs; by default all that are known.

        Raises:
            ValueError: if k exceeds the known rank.
        """
        k = checked_rank(k, len(self.values))
        return self.values[:k], self.vectors[:, :k]

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        inner = self.vectors.T @ (delta.T if self.side == "input" else delta)
        return (self.values[:, None] * inner.square()).sum()


class DiagonalOperator(SymmetricOperator):
    """A diagonal on vec(W), row-major.

    Args:
        entries: (p, q).
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
        """The k largest entries and their unit vectors."""
        k = checked_rank(k, self.shape[0])
        values, index = self.entries.flatten().topk(k)
        vectors = torch.zeros(self.shape[0], k, dtype=self.dtype, device=self.device)
        vectors[index, torch.arange(k, device=self.device)] = 1
        return values, vectors

    def _check_delta(self, rows: int, columns: int) -> None:
        _check_exact(self.entries.shape[0], self.entries.shape[1], rows, columns)

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        return (self.entries * delta.square()).sum()

    def _quadratic_factored(self, left: Tensor, right: Tensor) -> Tensor:
        return _TiledSquares.apply(self.entries, left, right)  # type: ignore[no-untyped-call]


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


class KroneckerOperator(SymmetricOperator):
    """kron(S, A) on vec(W), row-major: vec(ΔW) goes to vec(S ΔW A).

    Args:
        output_factor: S, (p, p), symmetric positive semi-definite.
        input_factor: A, (q, q), the same.
    """

    side = "both"

    def __init__(self, output_factor: Tensor, input_factor: Tensor) -> None:
        for name, factor in (("output_factor", output_factor), ("input_factor", input_factor)):
            if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
                raise ValueError(f"{name} must be square, got shape {tuple(factor.shape)}")
        self.output_factor = output_factor
        self.input_factor = input_factor

    @property
    def shape(self) -> tuple[int, int]:
        """(pq, pq)."""
        size = len(self.output_factor) * len(self.input_factor)
        return size, size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products."""
        return self.output_factor.dtype

    @property
    def device(self) -> torch.device:
        """The device of products."""
        return self.output_factor.device

    def _matmat(self, block: Tensor) -> Tensor:
        p, q = len(self.output_factor), len(self.input_factor)
        cube = block.T.reshape(-1, p, q)
        return (self.output_factor @ cube @ self.input_factor).reshape(-1, p * q).T

    def diagonal(self) -> Tensor:
        """(pq,)."""
        return torch.outer(self.output_factor.diagonal(), self.input_factor.diagonal()).flatten()

    def trace(self) -> Tensor:
        """tr(S)·tr(A)."""
        return self.output_factor.trace() * self.input_factor.trace()

    def to_dense(self) -> Tensor:
        """(pq, pq)."""
        return torch.kron(self.output_factor, self.input_factor)

    def eigh(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The k largest products of the factors' eigenvalues, and the Kronecker products of their vectors."""
        k = checked_rank(k, self.shape[0])
        s, u = torch.linalg.eigh(self.output_factor.double())
        a, v = torch.linalg.eigh(self.input_factor.double())
        values, index = torch.outer(s, a).flatten().topk(k)
        rows, columns = index // len(a), index % len(a)
        vectors = (u[:, None, rows] * v[None, :, columns]).reshape(-1, k)
        return values.to(self.dtype), fix_signs(vectors).to(self.dtype)

    def _check_delta(self, rows: int, columns: int) -> None:
        _check_exact(len(self.output_factor), len(self.input_factor), rows, columns)

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        return ((self.output_factor @ delta) * (delta @ self.input_factor)).sum()

    def _quadratic_factored(self, left: Tensor, right: Tensor) -> Tensor:
        return ((left.T @ (self.output_factor @ left)) * (right @ (self.input_factor @ right.T))).sum()


def _check_exact(p: int, q: int, rows: int, columns: int) -> None:
    if (rows, columns) != (p, q):
        raise ValueError(f"delta of shape ({rows}, {columns}) does not fit an operator of a layer of shape ({p}, {q})")


def checked_rank(k: int | None, most: int) -> int:
    """K, or ``most`` where it is None.

    Raises:
        ValueError: unless 1 <= k <= most.
    """
    if k is None:
        return most
    if not 1 <= k <= most:
        raise ValueError(f"k={k} must be between 1 and {most}")
    return int(k)


def fix_signs(vectors: Tensor) -> Tensor:
    """Columns flipped so that each one's entry of largest magnitude is positive."""
    peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(peak < 0, -1, 1).to(vectors.dtype)
