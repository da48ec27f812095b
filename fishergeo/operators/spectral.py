"""An operator known through some of its eigenpairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor

from fishergeo.operators.base import SymmetricOperator, checked_rank


class SpectralOperator(SymmetricOperator):
    """U diag(λ) Uᵀ + rest·(I − U Uᵀ): an operator known through some eigenpairs.

    ``trace()`` and ``diagonal()`` are of this operator; ``full_trace`` is that of the operator it stands for, where
    that is known. The difference bounds the spectral norm of what is missing if the missing part is positive
    semi-definite, as it is for a sketch. By definition of its eigenpairs.

    Args:
        values: λ, (k,), descending.
        vectors: U, (size, k), orthonormal columns, of any floating dtype, in which products come.
        full_trace: scalar tensor or None.
        side: side of a layer's weight that the matrix stands for, see :class:`SymmetricOperator`.
        rest: the eigenvalue of everything orthogonal to ``vectors``.

    Raises:
        ValueError: if values and vectors do not pair up, or for an unknown side.
        TypeError: if the dtype of the vectors is not a floating one.

    Examples:
        >>> op = fg.SpectralOperator(torch.tensor([2.0, 1.0]), torch.eye(3)[:, :2])
        >>> op.to_dense().diagonal().tolist()
        [2.0, 1.0, 0.0]
    """

    def __init__(
        self,
        values: Tensor,
        vectors: Tensor,
        full_trace: Tensor | None = None,
        side: str = "output",
        rest: float = 0.0,
    ) -> None:
        if values.ndim != 1 or vectors.ndim != 2 or vectors.shape[1] != len(values):
            raise ValueError(f"values {tuple(values.shape)} and vectors {tuple(vectors.shape)} do not pair up")
        super().__init__(len(vectors), vectors.dtype, vectors.device, side)
        self.values = values
        self.vectors = vectors
        self.full_trace = full_trace
        self.rest = rest

    def tensors(self) -> dict[str, Tensor]:
        """``eigenvalues`` (k,), ``eigenvectors`` (size, k), and scalars: ``full_trace`` where it is known, ``rest``,
        float64, where it is not 0.
        """
        found = {"eigenvalues": self.values, "eigenvectors": self.vectors}
        if self.full_trace is not None:
            found["full_trace"] = self.full_trace
        if self.rest:
            found["rest"] = torch.tensor(self.rest, dtype=torch.float64)
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], side: str = "output") -> Self:
        """The operator whose :meth:`tensors` these were; see :meth:`SymmetricOperator.from_tensors`."""
        rest = float(tensors["rest"]) if "rest" in tensors else 0.0
        return cls(tensors["eigenvalues"], tensors["eigenvectors"], tensors.get("full_trace"), side, rest)

    def _matmat(self, block: Tensor) -> Tensor:
        inside = self.vectors @ ((self.values - self.rest)[:, None] * (self.vectors.T @ block))
        return inside + self.rest * block if self.rest else inside

    def diagonal(self) -> Tensor:
        """The diagonal, (size,)."""
        return (self.vectors.square() * (self.values - self.rest)).sum(1) + self.rest

    def trace(self) -> Tensor:
        """Sum of the eigenvalues, a scalar tensor."""
        return self.values.sum() + self.rest * (self.shape[0] - len(self.values))

    def eigh(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The k largest eigenpairs, (values (k,), vectors (size, k)); by default all that are known, or all where a known
        one is less than ``rest``.

        Raises:
            ValueError: if k exceeds the known rank.
        """
        if self.rest or (len(self.values) < self.shape[0] and bool((self.values < 0).any())):
            return super().eigh(k)  # what is orthogonal to the known vectors may come before some of them
        values, vectors = self.known_eigenpairs()
        k = checked_rank(k, len(values))
        return values[:k], vectors[:, :k]

    def known_eigenpairs(self) -> tuple[Tensor, Tensor]:
        """The eigenpairs that it is made of: values (k,), descending, and vectors (size, k)."""
        order = self.values.argsort(descending=True, stable=True)
        return self.values[order], self.vectors[:, order]

    def _map(self, function: Callable[[Tensor], Tensor]) -> SymmetricOperator:
        values, known = self.values.double(), len(self.values)
        complete = known == self.shape[0]
        # All at once: what is rounding depends on the largest of them.
        mapped = function(values if complete else torch.cat([values, values.new_full((1,), self.rest)]))
        rest = 0.0 if complete else float(mapped[-1])
        values = mapped[:known].to(self.dtype)
        order = values.argsort(descending=True)
        return SpectralOperator(values[order], self.vectors[:, order], None, self.side, rest)

    def eigenvalues(self) -> Tensor:
        """All eigenvalues, (size,) float64, those that are known first."""
        others = self.values.new_full((self.shape[0] - len(self.values),), self.rest)
        return torch.cat([self.values, others]).double()

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        delta = {"input": delta.mT, "both": delta.reshape(-1, 1)}.get(self.side, delta)
        inside = ((self.values - self.rest)[:, None] * (self.vectors.T @ delta).square()).sum()
        return inside + self.rest * delta.square().sum() if self.rest else inside
