"""Second moments of weight gradients that are held whole: one side's Gram matrix, and the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from fishergeo._linalg import add_gram_, add_product_, mirrored
from fishergeo.accumulators.base import Accumulator, Layout, Made, Shared
from fishergeo.capture import Record
from fishergeo.operators import DenseOperator, DiagonalOperator, SymmetricOperator


class GramAccumulator(Accumulator):
    """Σ G Gᵀ (output side) or Σ Gᵀ G (input side), exact; of the sum only the lower triangle is kept."""

    @classmethod
    def expected(cls, layout: Layout) -> dict[str, tuple[int | None, ...]]:
        """One (p, p) or (q, q) matrix."""
        return {"gram": (layout.size, layout.size)}

    def add(self, record: Record, shared: Shared) -> None:
        """Adds one batch of one layer.

        Through the kernel F Fᵀ (T, T) of the far side an example costs T²p + Tp²/2 multiplications and the kernel;
        through G it costs Tpq + p²q/2, with p the near side and q the far one. The cheaper is taken.
        """
        near, far, kernel = self._near_and_far(record, shared)
        total = self.sums["gram"]
        n, t, p = near.shape
        q = far.shape[2]
        if t == 1:
            scale = torch.linalg.vector_norm(far.reshape(n, q), dim=1, keepdim=True)
            add_gram_(total, near.reshape(n, p) * scale)
        elif t * t * (p + q / 2) + t * p * p / 2 <= t * p * q + p * p * q / 2:
            weighted = torch.bmm(kernel(), near)
            add_product_(total, near.reshape(n * t, p), weighted.reshape(n * t, p))
        else:
            for one_near, one_far in zip(near, far, strict=True):
                add_gram_(total, one_far.T @ one_near)

    def operator(self, count: float, made: Made | None = None) -> SymmetricOperator:
        """F, (p, p) or (q, q)."""
        return DenseOperator(mirrored(self.sums["gram"], count), self.layout.side)


class DiagonalAccumulator(Accumulator):
    """Σ G∘G."""

    @classmethod
    def expected(cls, layout: Layout) -> dict[str, tuple[int | None, ...]]:
        """One (p, q) matrix."""
        return {"squares": (layout.p, layout.q)}

    def add(self, record: Record, shared: Shared) -> None:
        """Adds one batch of one layer; one (p, q) scratch tensor."""
        a, d = self._cast(record, shared)
        add_squares_(self.sums["squares"], d, a)

    def operator(self, count: float, made: Made | None = None) -> SymmetricOperator:
        """(pq, pq)."""
        return DiagonalOperator(self.sums["squares"] / count)


def add_squares_(total: Tensor, d: Tensor, a: Tensor) -> None:
    """Adds Σ_i (D_iᵀA_i)∘(D_iᵀA_i) in place; example by example, so that the product is still in the cache.

    Args:
        total: (p, q).
        d: (n, T, p).
        a: (n, T, q).
    """
    if a.shape[1] == 1:
        total.addmm_(d.flatten(0, 1).square().T, a.flatten(0, 1).square())
        return
    scratch = torch.empty_like(total)
    for one_d, one_a in zip(d, a, strict=True):
        torch.mm(one_d.T, one_a, out=scratch)
        total.addcmul_(scratch, scratch)
