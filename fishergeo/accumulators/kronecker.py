"""Kronecker factors of a layer's curvature (KFAC), and exact second moments in their eigenbasis (EKFAC)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fishergeo._linalg import HalfGram, mirrored
from fishergeo.accumulators.base import Accumulator, Layout, Made, Owned, Shared
from fishergeo.accumulators.moments import add_squares_
from fishergeo.accumulators.sketch import rows_product
from fishergeo.capture import Record
from fishergeo.operators import (
    EigenKroneckerOperator,
    KroneckerOperator,
    SpectralKroneckerOperator,
    SpectralOperator,
    SymmetricOperator,
)
from fishergeo.sketching import PsdSketch, compress, factor_eigh


def input_rows(record: Record, shared: Shared, sharing: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (n, T, q) whose squares sum up to the input moment, (n, 1, q) with "reduce", and their weight, a scalar."""
    a = shared.get(record.source, f"inputs {dtype}", lambda: record.inputs.to(dtype))
    if record.mask is None:
        lengths = torch.full((len(a),), a.shape[1], dtype=torch.float64, device=a.device)
    else:
        lengths = record.mask.sum(1, dtype=torch.float64)
    counted = lengths
    if sharing == "reduce":
        a = (a.sum(1) / lengths.clamp_min(1).to(a.dtype)[:, None])[:, None]
        counted = (lengths > 0).double()
    if shared.weights is not None:
        a = a * shared.weights.sqrt().to(a.dtype).view(-1, 1, 1)
        counted = counted * shared.weights
    return a, counted.sum()


class InputMoment:
    """Σ w a aᵀ over tokens ("expand") or over examples' mean tokens ("reduce"), held once for layers that share it.

    Attributes:
        total: (q, q), lower triangle, short of the rows that wait.
        tokens: (1,) the weight of all rows.
        half: the sum at work.
    """

    def __init__(self, total: Tensor, tokens: Tensor, half: HalfGram | None = None) -> None:
        self.total = total
        self.tokens = tokens
        self.half = half or HalfGram(total)
        self._latest: tuple[int, int] | None = None

    def add(self, record: Record, shared: Shared, sharing: str) -> None:
        """Adds a batch once, whichever of the sharing layers comes first, and only with its first objective."""
        if shared.draw:
            return
        if self._latest is not None and self._latest[0] == shared.number:
            if self._latest[1] != record.source:
                raise _parted(record.name, shared)
            return
        self._latest = (shared.number, record.source)
        rows, counted = input_rows(record, shared, sharing, self.total.dtype)
        self.half.add(rows.flatten(0, 1))
        self.tokens += counted

    def check_missed(self, name: str, shared: Shared) -> None:
        """Refuses the batch at hand for a layer that it did not reach, if it reached others that share the moment.

        Raises:
            RuntimeError: naming the layer.
        """
        if shared.draw == 0 and self._latest is not None and self._latest[0] == shared.number:
            raise _parted(name, shared)


def _parted(name: str, shared: Shared) -> RuntimeError:
    return RuntimeError(
        f"layer {name!r} shared its input with another layer in the first batch and does not in batch {shared.number}; "
        "pass share_inputs=False"
    )


class KfacAccumulator(Accumulator):
    """S = Σ g gᵀ and A = Σ a aᵀ (Martens and Grosse 2015; weight sharing by Eschenhagen et al. 2023).

    "expand": g and a of every position that is not padding. "reduce": the sum of an example's g and the mean of its a.
    """

    shared = ("input", "tokens", "input buffer")

    def __init__(self, layout: Layout, sums: dict[str, Tensor], moment: InputMoment | None = None) -> None:
        super().__init__(layout, sums)
        self.moment = moment or InputMoment(sums["input"], sums["tokens"])
        self.half = HalfGram(sums["output"])

    @classmethod
    def expected(cls, layout: Layout) -> dict[str, tuple[int | None, ...]]:
        """Two factors and the weight of the rows in the input factor."""
        return {"output": (layout.p, layout.p), "input": (layout.q, layout.q), "tokens": (1,)}

    def join(self, other: Accumulator) -> None:
        """Hold the input moment of ``other``, a layer that reads the same inputs."""
        super().join(other)
        self.moment = cast(KfacAccumulator, other).moment

    def add(self, record: Record, shared: Shared) -> None:
        """Adds one batch of one layer."""
        self.moment.add(record, shared, self.layout.sharing)
        d = record.gradients.to(self.dtype)
        self.half.add(d.sum(1) if self.layout.sharing == "reduce" else d.flatten(0, 1))

    def miss(self, counted: Tensor, shared: Shared) -> None:
        """Refuses a batch that only other layers of the input group have seen: their inputs were not this one's.

        Raises:
            RuntimeError: by name.
        """
        self.moment.check_missed(self.layout.name, shared)

    def finish(self) -> None:
        """Multiplies the rows that still wait."""
        self.half.flush()
        self.moment.half.flush()

    def finite(self) -> bool:
        """By the diagonals: Σ|x_i x_j| is at most the larger of Σ x_i² and Σ x_j² (Cauchy-Schwarz)."""
        diagonals = [self.sums[key].diagonal() for key in ("output", "input")]
        return bool(torch.isfinite(torch.stack([each.sum() for each in diagonals])).all())

    def state(self) -> dict[str, Tensor]:
        """The sums and the rows that wait."""
        result = dict(self.sums)
        for key, half in (("output", self.half), ("input", self.moment.half)):
            if half.buffer is not None:
                result |= {f"{key} buffer": half.buffer, f"{key} waiting": torch.tensor([half.waiting])}
        return result

    @classmethod
    def restored(cls, layout: Layout, state: dict[str, Tensor]) -> KfacAccumulator:
        """The accumulator of :meth:`state`. Layers that shared an input moment are joined again by the caller."""
        sums = {key: state[key] for key in cls.expected(layout)}
        inputs = HalfGram(sums["input"], state.get("input buffer"), state.get("input waiting"))
        accumulator = cls(layout, sums, InputMoment(sums["input"], sums["tokens"], inputs))
        accumulator.half = HalfGram(sums["output"], state.get("output buffer"), state.get("output waiting"))
        return accumulator

    def operator(self, count: float, made: Made | None = None) -> SymmetricOperator:
        """kron(S, A), (pq, pq). Layers whose input moment is one get one A."""
        total, tokens = self.sums["input"], self.sums["tokens"]
        made = {} if made is None else made
        if self.group not in made:
            rows = torch.where(tokens > 0, tokens, 1)  # an expert may have none
            made[self.group] = mirrored(total, rows.to(total.dtype))
        return KroneckerOperator(mirrored(self.sums["output"], count), made[self.group])

    def output_eigenvectors(self) -> Tensor:
        """Those of S, (p, p)."""
        self.half.flush()
        return eigenbasis(self.sums["output"])

    def input_eigenvectors(self) -> Tensor:
        """Those of A, (q, q); the same for every layer of the input group."""
        self.moment.half.flush()
        return eigenbasis(self.moment.total)


def eigenbasis(total: Tensor) -> Tensor:
    """The eigenvectors, ascending, of the symmetric matrix whose lower triangle this is, in its own precision.

    Any orthogonal matrix would serve as an EKFAC basis, so single precision costs at most a little of its optimality.
    """
    # LAPACK's columns are put in the order that a file gives them back in, so that products round the same way.
    return torch.linalg.eigh(total)[1].contiguous()


@dataclass(frozen=True, eq=False)
class InputBasis:
    """The fixed eigenbasis V (q, q) of the inputs of one input group; one object a basis."""

    vectors: Tensor

    def rotated(self, inputs: Tensor, source: int, shared: Shared) -> Tensor:
        """A V for inputs (n, T, q), once for all layers that read the input numbered ``source``."""
        return shared.get(source, self, lambda: inputs @ self.vectors)


class EkfacAccumulator(Accumulator):
    """Σ (Uᵀ G V)∘(Uᵀ G V) in fixed bases U and V (George et al. 2018, "Fast approximate natural gradient descent").

    The bases are no sums: only accumulators with the same ones can be merged.
    """

    shared = ("input_basis",)
    adds_shared = False

    def __init__(self, layout: Layout, sums: dict[str, Tensor]) -> None:
        super().__init__(layout, sums)
        self.basis = InputBasis(sums["input_basis"])

    def join(self, other: Accumulator) -> None:
        """Take the input basis of ``other``, a layer that reads the same inputs."""
        super().join(other)
        self.basis = cast(EkfacAccumulator, other).basis

    @classmethod
    def expected(cls, layout: Layout) -> dict[str, tuple[int | None, ...]]:
        """Bases, moments, and the units they are the sum over."""
        return {
            "moments": (layout.p, layout.q),
            "units": (1,),
            "output_basis": (layout.p, layout.p),
            "input_basis": (layout.q, layout.q),
        }

    @classmethod
    def in_bases(cls, layout: Layout, output_basis: Tensor, input_basis: Tensor) -> EkfacAccumulator:
        """The sum of nothing in these bases."""
        return cls(
            layout,
            {
                "moments": output_basis.new_zeros(layout.p, layout.q),
                "units": torch.zeros(1, dtype=torch.float64, device=output_basis.device),
                "output_basis": output_basis,
                "input_basis": input_basis,
            },
        )

    def add(self, record: Record, shared: Shared) -> None:
        """Adds one batch of one layer.

        Rotating D and A costs T(p² + q²) an example, rotating G costs pq(p + q). The cheaper is taken; a rotated A is
        shared by the layers that read it in the same basis.
        """
        if shared.draw == 0:
            self.sums["units"] += shared.units
        a, d = self._cast(record, shared)
        u, v = self.sums["output_basis"], self.sums["input_basis"]
        t, p, q = a.shape[1], len(u), len(v)
        if t * (p * p + q * q) <= p * q * (p + q):
            add_squares_(self.sums["moments"], d @ u, self.basis.rotated(a, record.source, shared))
            return
        for one_d, one_a in zip(d, a, strict=True):
            rotated = u.T @ (one_d.T @ one_a) @ v
            self.sums["moments"].addcmul_(rotated, rotated)

    def miss(self, counted: Tensor, shared: Shared) -> None:
        """Counts the units of a batch that did not reach the layer, of which F is a mean too."""
        if shared.draw == 0:
            self.sums["units"] += shared.units

    def decay_(self, factor: float, done: set[Owned]) -> None:
        """Multiplies the moments and the units, not the bases."""
        self.sums["moments"].mul_(factor)
        self.sums["units"].mul_(factor)

    def operator(self, count: float, made: Made | None = None) -> SymmetricOperator:
        """kron(U, V) diag kron(U, V)ᵀ, (pq, pq); divided by its own units, which are fewer than the estimate's where
        the bases were fixed on the leading part of a single sweep.
        """
        values = self.sums["moments"] / self.sums["units"].to(self.dtype)
        return EigenKroneckerOperator(self.sums["output_basis"], self.sums["input_basis"], values)

    def merged(self, other: Accumulator, done: dict[Owned, Tensor]) -> dict[str, Tensor]:
        """Moments of both.

        Raises:
            ValueError: if the bases differ.
        """
        bases = {key: self.sums[key] for key in ("output_basis", "input_basis")}
        if not all(torch.equal(basis, other.sums[key].to(basis.device)) for key, basis in bases.items()):
            raise ValueError(
                f"layer {self.layout.name!r}: EKFAC moments in different eigenbases do not add up; merge the shards' "
                "KFAC first and pass it to every shard's estimate as basis="
            )
        device = self.sums["moments"].device
        return bases | {key: self.sums[key] + other.sums[key].to(device) for key in ("moments", "units")}

    def weighted(self, weight: float, done: dict[Owned, Tensor]) -> dict[str, Tensor]:
        """The same bases, moments and units times ``weight``."""
        return self.sums | {key: self.sums[key] * weight for key in ("moments", "units")}


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

    def decay_(self, factor: float, done: set[Owned]) -> None:
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

    def merged(self, other: Accumulator, done: dict[Owned, Tensor]) -> dict[str, Tensor]:
        """Sums of both: the factors side by side, cut back to the rank."""
        found = {}
        for key, tensor in self.sums.items():
            theirs = other.sums[key].to(tensor.device)
            if key in _SIDES:
                found[key] = compress(torch.cat([tensor, theirs], 1), min(self.layout.rank, len(tensor)))
            else:
                found[key] = tensor + theirs
        return found

    def weighted(self, weight: float, done: dict[Owned, Tensor]) -> dict[str, Tensor]:
        """Sums that count ``weight`` times as much."""
        return {key: t * (weight**0.5 if key in _SIDES else weight) for key, t in self.sums.items()}
