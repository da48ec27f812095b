"""KFAC whose factors are sketched: memory (p + q)·rank a layer in the place of p² + q²."""

from __future__ import annotations

import torch
from torch import Tensor

from fishergeo.accumulators import Accumulator, Layout, Made, Shared
from fishergeo.capture import Record
from fishergeo.kronecker_accumulators import input_rows
from fishergeo.operators import SpectralKroneckerOperator, SpectralOperator, SymmetricOperator
from fishergeo.sketch_accumulator import rows_product
from fishergeo.sketching import PsdSketch, compress, factor_eigh

_SIDES = ("output", "input")


class KfacSketchAccumulator(Accumulator):
    """S = Σ g gᵀ and A = Σ a aᵀ (Martens and Grosse 2015), each known through a one-pass sketch and its exact trace.

    What a sketch lacks, the trace less the known eigenvalues, is spread evenly over the directions it does not know
    (:meth:`operator`), so that the factors have the right traces. Layers that read one input sketch it each for
    themselves: a sketch is small.
    """

    def __init__(self, layout: Layout, sums: dict[str, Tensor]) -> None:
        super().__init__(layout, sums)
        made = []
        for place, (side, size) in enumerate(zip(_SIDES, (layout.p, layout.q), strict=True)):
            factor, seed = sums[side], 2 * layout.seed + place  # other directions for the other side
            made.append(PsdSketch(size, layout.rank, seed, layout.name, factor.dtype, factor.device, factor))
        self.sketches = tuple(made)

    @classmethod
    def expected(cls, layout: Layout) -> dict[str, tuple[int | None, ...]]:
        """A factor and a trace of each side, and the weight of the rows of the input side."""
        return {
            "output": (layout.p, None),
            "input": (layout.q, None),
            "output trace": (1,),
            "input trace": (1,),
            "tokens": (1,),
        }

    def add(self, record: Record, shared: Shared) -> None:
        """Adds one batch of one layer; inputs count with the first objective alone."""
        reduce = self.layout.sharing == "reduce"
        d = record.gradients.to(self.dtype)
        self._stream("output", d.sum(1, keepdim=True) if reduce else d)
        if shared.draw:
            return
        a, counted = input_rows(record, shared, self.layout.sharing, self.dtype)
        self._stream("input", a)
        self.sums["tokens"] += counted

    def _stream(self, side: str, rows: Tensor) -> None:
        """Adds Σ XᵀX of (n, T, size) rows; segments end at the same example however they are batched."""
        sketch, start = self.sketches[_SIDES.index(side)], 0
        self.sums[f"{side} trace"] += rows.square().sum(dtype=torch.float64)
        while start < len(rows):
            part = rows[start : start + sketch.room]
            sketch.add(rows_product(part, part @ sketch.omega), len(part))
            start += len(part)

    def finish(self) -> None:
        """Folds the open segments into the factors."""
        for side, sketch in zip(_SIDES, self.sketches, strict=True):
            self.sums[side] = sketch.close()

    def decay_(self, factor: float, done: set[int]) -> None:
        """Multiplies the closed factors, the open segments, the traces and the weight of the rows."""
        for side, sketch in zip(_SIDES, self.sketches, strict=True):
            sketch.scale_(factor)
            self.sums[side] = sketch.factor
        for key in ("output trace", "input trace", "tokens"):
            self.sums[key] *= factor

    def state(self) -> dict[str, Tensor]:
        """The sums and the open segments."""
        result = dict(self.sums)
        for side, sketch in zip(_SIDES, self.sketches, strict=True):
            result |= {side: sketch.factor, **{f"{side} {key}": tensor for key, tensor in sketch.state().items()}}
        return result

    @classmethod
    def restored(cls, layout: Layout, state: dict[str, Tensor]) -> KfacSketchAccumulator:
        """Goes on in the middle of the segments."""
        accumulator = cls(layout, {key: state[key] for key in cls.expected(layout)})
        for side, sketch in zip(_SIDES, accumulator.sketches, strict=True):
            sketch.restore({k.removeprefix(f"{side} "): t for k, t in state.items() if k.startswith(f"{side} sketch")})
        return accumulator

    def operator(self, count: float, made: Made | None = None) -> SymmetricOperator:
        """kron(Ŝ, Â), (pq, pq), each factor U diag(λ) Uᵀ + ρ(I − UUᵀ) with ρ the mean of the eigenvalues not known."""
        tokens = max(float(self.sums["tokens"]), 1e-300)
        factors = [self._factor(side, units) for side, units in zip(_SIDES, (count, tokens), strict=True)]
        return SpectralKroneckerOperator(*factors)

    def _factor(self, side: str, units: float) -> SpectralOperator:
        values, vectors = factor_eigh(self.sums[side], self.layout.rank)
        trace, values = float(self.sums[f"{side} trace"]) / units, values / units
        unknown = len(vectors) - len(values)
        rest = max(trace - float(values.sum()), 0.0) / unknown if unknown else 0.0
        full = torch.tensor(trace, dtype=self.dtype, device=vectors.device)
        return SpectralOperator(values.to(self.dtype), vectors.to(self.dtype), full, side, rest)

    def merged(self, other: Accumulator, done: dict[int, Tensor]) -> dict[str, Tensor]:
        """Sums of both: the factors side by side, cut back to the rank."""
        found = {}
        for key, tensor in self.sums.items():
            theirs = other.sums[key].to(tensor.device)
            if key in _SIDES:
                found[key] = compress(torch.cat([tensor, theirs], 1), min(self.layout.rank, len(tensor)))
            else:
                found[key] = tensor + theirs
        return found

    def weighted(self, weight: float, done: dict[int, Tensor]) -> dict[str, Tensor]:
        """Sums that count ``weight`` times as much."""
        return {key: t * (weight**0.5 if key in _SIDES else weight) for key, t in self.sums.items()}
