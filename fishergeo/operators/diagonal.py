"""."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fishergeo.operators.base import SymmetricOperator, check_layer_shape, checked_rank


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
