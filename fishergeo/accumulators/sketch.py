"""The one-pass sketch of a layer's one-sided Gram matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fishergeo.accumulators.base import Accumulator, Layout, Made, Owned, Shared
from fishergeo.capture import Record
from fishergeo.operators import SymmetricOperator
from fishergeo.sketching import PsdSketch, SketchOperator, compress, factor_eigh, probe_matrix

_WIDE = 512
"""Columns from which halves of a kernel are multiplied as fast as all of it."""


class SketchAccumulator(Accumulator):
    """A factor V with V Vᵀ ≤ Σ G Gᵀ (or Σ Gᵀ G) and the exact trace: O((p + q)·rank) memory, no (p, p) matrix.

    With ``layout.probes`` also the products of the whole sum with so many Gaussian columns, which measure the error.
    """

    def __init__(self, layout: Layout, sums: dict[str, Tensor]) -> None:
        super().__init__(layout, sums)
        factor = sums["factor"]
        self.sketch = PsdSketch(
            layout.size, layout.rank, layout.seed, layout.name, factor.dtype, factor.device, factor, sums.get("probed")
        )
        self.sketches = (self.sketch,)

    @classmethod
    def expected(cls, layout: Layout) -> dict[str, tuple[int | None, ...]]:
        """The factor, the trace and the products with the probes."""
        probed: dict[str, tuple[int | None, ...]] = {"probed": (layout.size, layout.probes)} if layout.probes else {}
        return {"factor": (layout.size, None), "trace": (1,), **probed}

    def add(self, record: Record, shared: Shared) -> None:
        """Adds one batch of one layer."""
        near, far, kernel = self._near_and_far(record, shared)
        n, t, size = near.shape
        if t == 1:
            weights = far.square().sum(2, keepdim=True)
            self.sums["trace"] += (near.square().sum(2, keepdim=True) * weights).sum()
            self._stream(n, lambda i, j, omega: rows_product(near[i:j], (near[i:j] @ omega) * weights[i:j]))
        elif t * (size + far.shape[2]) <= size * far.shape[2]:
            between = kernel()
            self.sums["trace"] += kernels_trace(between, near)
            self._stream(n, lambda i, j, omega: rows_product(near[i:j], torch.bmm(between[i:j], near[i:j] @ omega)))
        else:  # long sequences: the weight gradient of one example is smaller than its kernels
            for i in range(n):
                gradient = near[i].T @ far[i]
                self.sums["trace"] += gradient.square().sum()
                self._stream(1, lambda _i, _j, omega, g=gradient: g @ (g.T @ omega))  # type: ignore[misc]

    def _stream(self, examples: int, product: Callable[[int, int, Tensor], Tensor]) -> None:
        """Feeds examples i to j at a time, so that segments end at the same example however they are batched."""
        start = 0
        while start < examples:
            stop = min(examples, start + self.sketch.room)
            self.sketch.add(product(start, stop, self.sketch.omega), stop - start)
            start = stop

    def finish(self) -> None:
        """Folds the open segment into the factor."""
        self.sums["factor"] = self.sketch.close()

    def decay_(self, factor: float, done: set[Owned]) -> None:
        """Multiplies the closed factor, the open segment, the trace and the products with the probes."""
        self.sketch.scale_(factor)
        self.sums["factor"] = self.sketch.factor
        self.sums["trace"] *= factor

    def state(self) -> dict[str, Tensor]:
        """The sums and the open segment."""
        return {**self.sums, "factor": self.sketch.factor, **self.sketch.state()}

    @classmethod
    def restored(cls, layout: Layout, state: dict[str, Tensor]) -> SketchAccumulator:
        """Goes on in the middle of a segment."""
        accumulator = cls(layout, {key: state[key] for key in cls.expected(layout)})
        accumulator.sketch.restore(state)
        return accumulator

    def operator(self, count: float, made: Made | None = None) -> SymmetricOperator:
        """The leading ``rank`` pairs of F; ``full_trace`` is exact."""
        values, vectors = factor_eigh(self.sums["factor"], self.layout.rank)
        trace = self.sums["trace"][0] / count
        images = self.sums.get("probed", vectors[:, :0]) / count
        probes = probe_matrix(self.layout.size, self.layout.probes, self.layout.seed, self.layout.name)
        return SketchOperator(
            (values / count).to(self.dtype),
            vectors.to(self.dtype),
            trace.to(self.dtype),
            self.layout.side,
            probes.to(images),
            images,
            self.sums["factor"],
        )

    def merged(self, other: Accumulator, done: dict[Owned, Tensor]) -> dict[str, Tensor]:
        """Sums of both: the factors side by side, cut back to the rank.

        Raises:
            ValueError: if the products with the probes are of different probes.
        """
        if self.layout.probes and self.layout.seed != other.layout.seed:
            raise ValueError(
                f"the probes of the two are of seeds {self.layout.seed} and {other.layout.seed}, so their products do "
                "not add up; estimate the parts with one seed, or with probes=0"
            )
        factor = self.sums["factor"]
        both = torch.cat([factor, other.sums["factor"].to(factor.device)], 1)
        others = {
            key: tensor + other.sums[key].to(factor.device) for key, tensor in self.sums.items() if key != "factor"
        }
        return {"factor": compress(both, min(self.layout.rank, len(both))), **others}

    def weighted(self, weight: float, done: dict[Owned, Tensor]) -> dict[str, Tensor]:
        """Sums that count ``weight`` times as much."""
        return {key: t * (weight**0.5 if key == "factor" else weight) for key, t in self.sums.items()}


def rows_product(near: Tensor, inner: Tensor) -> Tensor:
    """Σ_i N_iᵀ I_i for (n, T, size) and (n, T, k) blocks."""
    return near.flatten(0, 1).T @ inner.flatten(0, 1)


def kernels_trace(kernel: Tensor, rows: Tensor) -> Tensor:
    """Σ_i tr(K_i N_i N_iᵀ) for symmetric (n, T, T) and any (n, T, d); of wide rows' own kernels three quarters are formed."""
    half = rows.shape[1] // 2 if rows.shape[2] >= _WIDE else 0
    lower = kernel[:, half:] * torch.bmm(rows[:, half:], rows.mT)
    if not half:
        return lower.sum()
    upper = kernel[:, :half, :half] * torch.bmm(rows[:, :half], rows[:, :half].mT)
    return upper.sum() + lower[:, :, half:].sum() + 2 * lower[:, :, :half].sum()
