"""What every running sum over a stream of (a, g) records has in common.

Every state is a dict of plain sums, so that shards add up and a file holds all there is. D is an example's (T, p)
output gradients, A its (T, q) inputs, G = DᵀA its weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fishergeo.capture import Record
from fishergeo.operators import SymmetricOperator
from fishergeo.sketching import PsdSketch

Made = dict[str, Tensor]
"""Input group -> the tensor that an operator made of the sums that the group's layers hold once."""

Owned = tuple[str, str]
"""The layer or input group that holds a sum, and the sum's name."""


@dataclass(frozen=True)
class Layout:
    """All that the shapes and the meaning of a layer's sums depend on.

    Attributes:
        name: name of the layer.
        p: outputs.
        q: inputs.
        unit: ``"sequence"`` or ``"token"``.
        side: ``"output"`` or ``"input"``; ``"both"`` for products with the two-sided Fisher.
        rank: columns of a sketch.
        sharing: ``"expand"`` or ``"reduce"``.
        seed: seed of random test matrices.
        probes: columns that a sketch holds back to measure its error with.
    """

    name: str
    p: int
    q: int
    unit: str = "sequence"
    side: str = "output"
    rank: int = 64
    sharing: str = "expand"
    seed: int = 0
    probes: int = 0

    @property
    def size(self) -> int:
        """Of the chosen side."""
        return {"output": self.p, "input": self.q}.get(self.side, self.p * self.q)


class Shared:
    """What the layers of one batch have in common: its place in the stream, its weights, and work done once.

    Only the last few inputs' work is held: layers that share one see their gradients arrive side by side.

    Attributes:
        number: number of the batch in its pass.
        draw: which objective of the batch is differentiated; inputs are the same in all and count in the first.
        weights: (n,) of the examples, or None for ones. Gradients already carry their square roots.
        units: how many units (examples or supervised tokens, weighted) the batch adds.
    """

    def __init__(self, number: int = 0, draw: int = 0, capacity: int = 2) -> None:
        self.number = number
        self.draw = draw
        self.weights: Tensor | None = None
        self.units = 0.0
        self.capacity = capacity
        self._kept: dict[int, dict[Hashable, Tensor]] = {}

    def get(self, source: int, what: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What is named ``what`` of the input numbered ``source``, computed on first use."""
        if source not in self._kept:
            while len(self._kept) >= self.capacity:
                self._kept.pop(next(iter(self._kept)))
            self._kept[source] = {}
        kept = self._kept[source]
        if what not in kept:
            kept[what] = compute()
        return kept[what]


class Accumulator:
    """Base: named sums and their algebra.

    Args:
        layout: layout of the layer.
        sums: name -> tensor, every one additive over examples unless a subclass says otherwise.

    Attributes:
        group: input group of the layer, named after its first layer: those that read one input, and hold once the sums
            named in ``shared``. A layer's own name where nothing is held in common.
        shared: names of the sums (and of tensors of :meth:`state`) that an input group holds once.
        adds_shared: whether merging adds these, so that both estimates must have the same groups.
        sketches: those at work, whose memory a plan counts by formula.

    Raises:
        ValueError: if a sum is missing or of another shape than the layout asks for.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    adds_shared: ClassVar[bool] = True

    sketches: tuple[PsdSketch, ...] = ()

    def __init__(self, layout: Layout, sums: dict[str, Tensor]) -> None:
        for key, shape in self.expected(layout).items():
            if key not in sums or not _fits(tuple(sums[key].shape), shape):
                raise ValueError(f"layer {layout.name!r} needs {key} of shape {shape}")
        self.layout = layout
        self.sums = sums
        self.group = layout.name

    def owned(self, key: str) -> Owned:
        """The sum ``key`` by who holds it, this layer or its input group: equal for layers that hold one together."""
        return (self.group if key in self.shared else self.layout.name), key

    def join(self, other: Accumulator) -> None:
        """Hold the shared sums of ``other``, a layer of the same input group, in place of one's own."""
        self.group = other.group
        self.sums = {key: other.sums[key] if key in self.shared else tensor for key, tensor in self.sums.items()}

    @classmethod
    def expected(cls, layout: Layout) -> dict[str, tuple[int | None, ...]]:
        """Shapes of the sums; None stands for any length."""
        raise NotImplementedError

    @classmethod
    def empty(cls, layout: Layout, dtype: torch.dtype, device: torch.device) -> Accumulator:
        """The sums of nothing. Counts, of shape (1,), are float64 whatever the dtype."""
        return cls(
            layout,
            {
                key: torch.zeros(
                    [size or 0 for size in shape], dtype=torch.float64 if shape == (1,) else dtype, device=device
                )
                for key, shape in cls.expected(layout).items()
            },
        )

    def add(self, record: Record, shared: Shared) -> None:
        """Adds one batch of one layer."""
        raise NotImplementedError

    def miss(self, counted: Tensor, shared: Shared) -> None:
        """Takes note of a batch, of examples ``counted`` (n,) bool, that did not reach the layer: nothing adds to a sum."""

    def operator(self, count: float, made: Made | None = None) -> SymmetricOperator:
        """The operator after ``count`` units; ``made`` holds what layers before this one made of the sums of their input
        group, and takes this one's.
        """
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the sums."""
        return next(iter(self.sums.values())).dtype

    def finish(self) -> None:
        """Called once after the last batch."""

    def finite(self) -> bool:
        """Whether every entry of the sums is."""
        return all(bool(torch.isfinite(tensor.sum())) for tensor in self.sums.values())

    def decay_(self, factor: float, done: set[Owned]) -> None:
        """Multiplies everything added so far; ``done`` holds what another layer of the group has multiplied."""
        self.finish()
        for key, tensor in self.sums.items():
            if key not in self.shared or self.owned(key) not in done:
                done.add(self.owned(key))
                tensor.mul_(factor)

    def state(self) -> dict[str, Tensor]:
        """All there is in mid-pass; :meth:`restored` goes on from it without a bit of difference."""
        return self.sums

    @classmethod
    def restored(cls, layout: Layout, state: dict[str, Tensor]) -> Accumulator:
        """The accumulator whose :meth:`state` this was."""
        return cls(layout, state)

    def merged(self, other: Accumulator, done: dict[Owned, Tensor]) -> dict[str, Tensor]:
        """Sums of both; ``done`` holds those that another layer of the group has added, and takes this one's."""
        for key, tensor in self.sums.items():
            if self.owned(key) not in done:
                done[self.owned(key)] = tensor + other.sums[key].to(tensor.device)
        return {key: done[self.owned(key)] for key in self.sums}

    def weighted(self, weight: float, done: dict[Owned, Tensor]) -> dict[str, Tensor]:
        """Sums that count ``weight`` times as much; ``done`` as for :meth:`merged`."""
        for key, tensor in self.sums.items():
            if self.owned(key) not in done:
                done[self.owned(key)] = tensor * weight
        return {key: done[self.owned(key)] for key in self.sums}

    def _cast(self, record: Record, shared: Shared) -> tuple[Tensor, Tensor]:
        """(n, T, q) inputs and (n, T, p) gradients in the sums' dtype; (n·T, 1, ·) where a token is a datum."""
        a = shared.get(record.source, f"inputs {self.dtype}", lambda: record.inputs.to(self.dtype))
        d = record.gradients.to(self.dtype)
        if self.layout.unit == "token" and a.shape[1] > 1:
            a, d = a.reshape(-1, 1, a.shape[2]), d.reshape(-1, 1, d.shape[2])
        return a, d

    def _near_and_far(self, record: Record, shared: Shared) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        """Rows of the chosen side, rows of the other one, and the other side's kernel F Fᵀ (n, T, T)."""
        a, d = self._cast(record, shared)
        if self.layout.side == "input":
            return a, d, lambda: torch.bmm(d, d.mT)
        # The inputs' kernel is the same for q, k and v.
        return d, a, lambda: shared.get(record.source, f"kernel {self.dtype}", lambda: torch.bmm(a, a.mT))


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(e is None or s == e for s, e in zip(shape, expected, strict=True))
