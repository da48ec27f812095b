"""A diagonal operator on vec(W)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor

from fishergeo._checks import check_choice
from fishergeo._linalg import tiled_squares
from fishergeo.operators.base import SIDES, SymmetricOperator, check_layer_shape, checked_rank


class DiagonalOperator(SymmetricOperator):
    """A diagonal on vec(W), row-major: what EWC keeps of the Fisher (Kirkpatrick et al. 2017).

    Args:
        entries: (p, q), any floating dtype, in which products come.

    Raises:
        ValueError: if they have not two dimensions.
        TypeError: if their dtype is not a floating one.

    Examples:
        >>> op = fg.DiagonalOperator(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))  # of a (2, 2) weight
        >>> op.shape, float(op.trace())
        ((4, 4), 10.0)
    """

    def __init__(self, entries: Tensor) -> None:
        if entries.ndim != 2:
            raise ValueError(f"entries must be (p, q), got shape {tuple(entries.shape)}")
        super().__init__(entries.numel(), entries.dtype, entries.device, "both")
        self.entries = entries

    def tensors(self) -> dict[str, Tensor]:
        """``entries``, (p, q)."""
        return {"entries": self.entries}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], side: str = "both") -> Self:
        """The operator whose :meth:`tensors` these were, whatever ``side``: it acts on both."""
        return cls(tensors["entries"])

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

    def partial_trace(self, side: str = "output") -> Tensor:
        """Sums of the entries' rows, (p, p), or columns, (q, q), on a diagonal, by ``side``.

        Raises:
            ValueError: for another side than ``"output"`` and ``"input"``.
        """
        check_choice("side", side, SIDES)
        return torch.diag(self.entries.sum(1 if side == "output" else 0))

    def _check_delta(self, rows: int, columns: int) -> None:
        check_layer_shape(self.entries.shape[0], self.entries.shape[1], rows, columns)

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        return (self.entries * delta.square()).sum()

    def _quadratic_factored(self, left: Tensor, right: Tensor) -> Tensor:
        return tiled_squares(self.entries, left, right)

    def _map(self, function: Callable[[Tensor], Tensor]) -> SymmetricOperator:
        return DiagonalOperator(function(self.entries.double()).to(self.dtype))

    def _rounding(self, values: Tensor) -> Tensor:
        # Each entry is a sum of its own: a large one says nothing of the digits of a small one.
        return values.new_zeros(())

    def eigenvalues(self) -> Tensor:
        """The entries, (pq,) float64."""
        return self.entries.double().flatten()
