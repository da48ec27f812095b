"""Every example's inputs and output gradients, kept: the exact Fisher of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from fishergeo.accumulators.base import Accumulator, Layout, Made, Owned, Shared
from fishergeo.capture import Record
from fishergeo.operators import ExactOperator, SymmetricOperator


class ExactAccumulator(Accumulator):
    """Rows of D_i and A_i one after the other, and how many each example has; memory grows with the data.

    An example keeps at most min(p, q) rows: a longer one is replaced by G·I or I·G. Padding is not kept, and examples that
    are no data have no place. One that does not reach the layer has, with no row, so that in all layers the places are
    those of the same examples (of positions, where a token is a datum). Gradients carry the roots of the examples' weights,
    which are kept beside them.
    """

    def __init__(self, layout: Layout, sums: dict[str, Tensor]) -> None:
        # Files from before weights were kept hold none.
        sums.setdefault("weights", torch.ones(len(sums.get("lengths", ())), dtype=torch.float64))
        super().__init__(layout, sums)
        self._waiting: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @classmethod
    def expected(cls, layout: Layout) -> dict[str, tuple[int | None, ...]]:
        """Rows of all examples."""
        return {"gradients": (None, layout.p), "inputs": (None, layout.q), "lengths": (None,), "weights": (None,)}

    @classmethod
    def empty(cls, layout: Layout, dtype: torch.dtype, device: torch.device) -> Accumulator:
        """No rows."""
        sums = {
            key: torch.zeros(0, width, dtype=dtype, device=device)
            for key, width in (("gradients", layout.p), ("inputs", layout.q))
        }
        places = {"lengths": torch.zeros(0, dtype=torch.long), "weights": torch.zeros(0, dtype=torch.float64)}
        return cls(layout, sums | places)

    def add(self, record: Record, shared: Shared) -> None:
        """Keeps one batch of one layer.

        Raises:
            ValueError: where a token is a datum and the layer reads one several times, so that rows are none.
        """
        a, d = self._cast(record, shared)
        n, t, q = a.shape
        p = d.shape[2]
        mask = None if record.mask is None else record.mask.reshape(n, t)
        # Copies all: what was captured may be a buffer that the next batch overwrites.
        if t > min(p, q):
            reached = torch.ones(n, dtype=torch.bool, device=d.device) if mask is None else mask.any(1)
            lengths = min(p, q) * (reached if record.counted is None else reached[record.counted]).long()
            g = torch.bmm(d.mT, a) if mask is None else torch.bmm(d.mT, a)[reached]
            d, a = (g.mT, _identity(g, q)) if q <= p else (_identity(g, p), g)
            rows = d.flatten(0, 1), a.flatten(0, 1)
        elif mask is None:
            lengths = torch.full((n,), t)
            rows = d.flatten(0, 1).clone(), a.flatten(0, 1).clone()
        else:
            lengths = self._lengths(record, mask)
            rows = d[mask], a[mask]
        self._waiting.append((*rows, lengths.cpu(), self._weights(record, shared, len(lengths))))

    def _weights(self, record: Record, shared: Shared, data: int) -> Tensor:
        """Weight of each datum, as the batch weighs its example."""
        if shared.weights is None:
            return torch.ones(data, dtype=torch.float64)
        weights = shared.weights.double().cpu()
        if self.layout.unit != "token":
            return weights if record.counted is None else weights[record.counted.cpu()]
        if record.visits is not None:
            positions = (record.visits >= 0).sum(1)
        elif record.mask is not None:
            positions = record.mask.flatten(1).sum(1)
        else:
            positions = torch.tensor([record.inputs.shape[1]])
        return weights.repeat_interleave(positions.cpu())

    def _lengths(self, record: Record, mask: Tensor) -> Tensor:
        """Rows of each datum of a record with padding."""
        if self.layout.unit != "token":
            lengths = mask.sum(1)
            return lengths if record.counted is None else lengths[record.counted]
        if record.visits is None:
            return torch.ones(int(mask.sum()), dtype=torch.long)
        lengths = record.visits[record.visits >= 0]
        if not bool((lengths <= 1).all()):
            raise ValueError(
                f"layer {self.layout.name!r} reads a position several times, so that with unit='token' its data are not "
                "those of other layers; take unit='sequence', or leave it out of layers"
            )
        return lengths

    def miss(self, counted: Tensor, shared: Shared) -> None:
        """Keeps the places of the examples of a batch that did not reach the layer."""
        gradients, inputs = (self.sums[key][:0] for key in ("gradients", "inputs"))
        # How many positions it would have had here cannot be told: a mark, beside which no row may stand.
        unknown = torch.full((1,), -1)
        places = unknown if self.layout.unit == "token" else torch.zeros(int(counted.sum()), dtype=torch.long)
        weights = torch.ones(len(places), dtype=torch.float64)
        if shared.weights is not None and self.layout.unit != "token":
            weights = shared.weights[counted.to(shared.weights.device)].double().cpu()
        self._waiting.append((gradients, inputs, places, weights))

    def finish(self) -> None:
        """Joins what the batches left.

        Raises:
            ValueError: where a token is a datum and a batch with an unknown number of them did not reach the layer.
        """
        if not self._waiting:
            return
        d, a, lengths, weights = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        sums = self.sums
        self.sums = {
            "gradients": torch.cat([sums["gradients"], d]),
            "inputs": torch.cat([sums["inputs"], a]),
            "lengths": torch.cat([sums["lengths"], lengths.to(sums["lengths"])]),
            "weights": torch.cat([sums["weights"], weights.to(sums["weights"])]),
        }
        if len(self.sums["inputs"]) and not bool((self.sums["lengths"] >= 0).all()):
            raise ValueError(
                f"layer {self.layout.name!r} is not reached by every batch, so that with unit='token' its data are not those "
                "of other layers; take unit='sequence', or leave it out of layers"
            )

    def state(self) -> dict[str, Tensor]:
        """The rows so far."""
        self.finish()
        return self.sums

    def decay_(self, factor: float, done: set[Owned]) -> None:
        """Gradients by the root of the factor."""
        self.finish()
        self.sums["gradients"].mul_(factor**0.5)
        self.sums["weights"].mul_(factor)

    def operator(self, count: float, made: Made | None = None) -> SymmetricOperator:
        """(pq, pq), matrix-free."""
        weights = self.sums["weights"]
        plain = bool((weights == 1).all())
        rows = self.sums["gradients"], self.sums["inputs"]
        return ExactOperator(*rows, self.sums["lengths"], count, weights=None if plain else weights)

    def merged(self, other: Accumulator, done: dict[Owned, Tensor]) -> dict[str, Tensor]:
        """The examples of both."""
        return {key: torch.cat([tensor, other.sums[key].to(tensor)]) for key, tensor in self.sums.items()}

    def weighted(self, weight: float, done: dict[Owned, Tensor]) -> dict[str, Tensor]:
        """The same examples, gradients times the root of the weight."""
        gradients, weights = self.sums["gradients"] * weight**0.5, self.sums["weights"] * weight
        return self.sums | {"gradients": gradients, "weights": weights}


def _identity(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(len(like), size, size)
