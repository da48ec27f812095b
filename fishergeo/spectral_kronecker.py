"""A Kronecker product of two factors of which some eigenpairs are known."""

from __future__ import annotations

import torch
from torch import Tensor

from fishergeo.layer_operators import EigenKroneckerOperator, FactoredKronecker
from fishergeo.operators import SpectralOperator


class SpectralKroneckerOperator(FactoredKronecker):
    """kron(S, A) on vec(W), row-major, with S = U diag(λ) Uᵀ + ρ(I − U Uᵀ) and A alike: KFAC of sketched factors.

    The form of KFAC (Martens and Grosse 2015); memory and products go by the eigenpairs that are known. Functions of
    the whole operator (:meth:`power`, :meth:`logdet`, :meth:`eigh`) complete the bases, (p, p) and (q, q).

    Args:
        output_factor: S, (p, p), in whose dtype products come.
        input_factor: A, (q, q).

    Raises:
        TypeError: if a factor is no SpectralOperator.

    Examples:
        >>> one = fg.SpectralOperator(torch.tensor([2.0]), torch.eye(2)[:, :1], rest=1.0)
        >>> op = fg.SpectralKroneckerOperator(one, one)
        >>> op.shape, op.diagonal().tolist()
        ((4, 4), [4.0, 2.0, 2.0, 1.0])
        >>> float(op.quadratic(torch.ones(2, 2)))  # tr(ΔWᵀ S ΔW A)
        9.0
    """

    output_factor: SpectralOperator
    input_factor: SpectralOperator

    def __init__(self, output_factor: SpectralOperator, input_factor: SpectralOperator) -> None:
        for name, factor in (("output_factor", output_factor), ("input_factor", input_factor)):
            if not isinstance(factor, SpectralOperator):
                raise TypeError(f"{name} must be a SpectralOperator, got {type(factor).__name__}")
        self.output_factor = output_factor
        self.input_factor = input_factor

    def _matmat(self, block: Tensor) -> Tensor:
        p, q = self.output_factor.shape[0], self.input_factor.shape[0]
        columns = block.shape[1]
        rows = self.output_factor @ block.reshape(p, q * columns)
        inside = rows.reshape(p, q, columns).transpose(0, 1).reshape(q, p * columns)
        return (self.input_factor @ inside).reshape(q, p, columns).transpose(0, 1).reshape(p * q, columns)

    def to_dense(self) -> Tensor:
        """(pq, pq)."""
        return torch.kron(self.output_factor.to_dense(), self.input_factor.to_dense())

    def rotated(self) -> EigenKroneckerOperator:
        """The same operator in complete eigenbases of its factors."""
        (s, u), (a, v) = (_complete(factor) for factor in (self.output_factor, self.input_factor))
        return EigenKroneckerOperator(u, v, torch.outer(s, a))

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        return ((self.output_factor @ delta) * (self.input_factor @ delta.T).T).sum()

    def _quadratic_factored(self, left: Tensor, right: Tensor) -> Tensor:
        return ((left.T @ (self.output_factor @ left)) * (right @ (self.input_factor @ right.T))).sum()


def _complete(factor: SpectralOperator) -> tuple[Tensor, Tensor]:
    """All eigenvalues, (size,), and vectors, (size, size), the known ones first."""
    size, known = factor.vectors.shape
    others = torch.linalg.qr(factor.vectors.double(), mode="complete")[0][:, known:].to(factor.dtype)
    values = torch.cat([factor.values, factor.values.new_full((size - known,), factor.rest)])
    return values.to(factor.dtype), torch.cat([factor.vectors, others], 1)
