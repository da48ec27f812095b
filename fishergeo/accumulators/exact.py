"""Every example's inputs and output gradients, kept: the exact Fisher of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from fishergeo.accumulators.base import Accumulator, Layout, Made, Owned, Shared
from fishergeo.capture import Record
from fishergeo.operators import ExactOperator, SymmetricOperator


class ExactAccumulator(Accumulator):
    """Rows of D_i and A_i one after the other, and how many each example has; memory grows with the data.

    An example keeps at most min(p, q) rows: a longer one is replaced by G·I or I·G.
    Padding is not kept.
    """

    def __init__(self, layout: Layout, sums: dict[str, Tensor]) -> None:
        super().__init__(layout, sums)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    @classmethod
    def expected(cls, layout: Layout) -> dict[str, tuple[int | None, ...]]:
        """Rows of all examples."""
        return {"gradients": (None, layout.p), "inputs": (None, layout.q), "lengths": (None,)}

    @classmethod
    def empty(cls, layout: Layout, dtype: torch.dtype, device: torch.device) -> Accumulator:
        """No rows."""
        sums = {
            key: torch.zeros(0, width, dtype=dtype, device=device)
            for key, width in (("gradients", layout.p), ("inputs", layout.q))
        }
        return cls(layout, sums | {"lengths": torch.zeros(0, dtype=torch.long)})

    def add(self, record: Record, shared: Shared) -> None:
        """Keeps one batch of one layer."""
        a, d = self._cast(record, shared)
        n, t, q = a.shape
        p = d.shape[2]
        if t > min(p, q):
            g = torch.bmm(d.mT, a)
            d, a = (g.mT, _identity(g, q)) if q <= p else (_identity(g, p), g)
            self._keep(d, a, torch.full((n,), min(p, q)))
        elif record.mask is None:
            self._keep(d, a, torch.full((n,), t))
        else:
            mask = record.mask.reshape(n, t)
            self._waiting.append((d[mask], a[mask], mask.sum(1).cpu()))

    def _keep(self, d: Tensor, a: Tensor, lengths: Tensor) -> None:
        # Copies: what was captured may be a buffer that the next batch overwrites.
        self._waiting.append((d.flatten(0, 1).clone(), a.flatten(0, 1).clone(), lengths))

    def finish(self) -> None:
        """Joins what the batches left, and drops examples without a row."""
        if not self._waiting:
            return
        d, a, lengths = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        sums = self.sums
        lengths = lengths[lengths > 0]
        self.sums = {
            "gradients": torch.cat([sums["gradients"], d]),
            "inputs": torch.cat([sums["inputs"], a]),
            "lengths": torch.cat([sums["lengths"], lengths]),
        }

    def state(self) -> dict[str, Tensor]:
        """The rows so far."""
        self.finish()
        return self.sums

    def decay_(self, factor: float, done: set[Owned]) -> None:
        """Gradients by the root of the factor."""
        self.finish()
        self.sums["gradients"].mul_(factor**0.5)

    def operator(self, count: float, made: Made | None = None) -> SymmetricOperator:
        """(pq, pq), matrix-free."""
        return ExactOperator(self.sums["gradients"], self.sums["inputs"], self.sums["lengths"], count)

    def merged(self, other: Accumulator, done: dict[Owned, Tensor]) -> dict[str, Tensor]:
        """The examples of both."""
        return {key: torch.cat([tensor, other.sums[key].to(tensor)]) for key, tensor in self.sums.items()}

    def weighted(self, weight: float, done: dict[Owned, Tensor]) -> dict[str, Tensor]:
        """The same examples, gradients times the root of the weight."""
        return self.sums | {"gradients": self.sums["gradients"] * weight**0.5}


def _identity(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(len(like), size, size)
