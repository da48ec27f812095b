"""Running sums over a stream of (a, g) records, one accumulator a layer, and the operators they become.

Every state is a dict of plain sums, so that shards add up and a file holds all there is. D is an example's (T, p)
output gradients, A its (T, q) inputs, G = DᵀA its weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fishergeo.capture import Record
from fishergeo.gram import add_gram_, mirrored
from fishergeo.layer_operators import DiagonalOperator, KroneckerOperator
from fishergeo.operators import DenseOperator, SpectralOperator, SymmetricOperator
from fishergeo.sketch import PsdSketch, compress, factor_eigh

Side = Literal["output", "input"]


class Shared:
    """Work that several layers of one batch need once, keyed by the input tensor they share.

    Only the last few inputs are held: layers that share one see their gradients arrive side by side.
    """

    def __init__(self, capacity: int = 2) -> None:
        self.capacity = capacity
        self._kept: dict[int, dict[str, Tensor]] = {}

    def get(self, source: int, what: str, compute: Callable[[], Tensor]) -> Tensor:
        """The tensor named ``what`` of input ``source``, computed on first use."""
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
        sums: name -> tensor, every one additive over examples.
        unit: ``"sequence"`` or ``"token"``.
    """

    def __init__(self, sums: dict[str, Tensor], unit: str) -> None:
        self.sums = sums
        self.unit = unit

    def add(self, record: Record, shared: Shared) -> None:
        """Adds one batch of one layer."""
        raise NotImplementedError

    def operator(self, count: float) -> SymmetricOperator:
        """The operator after ``count`` units."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the sums."""
        return next(iter(self.sums.values())).dtype

    def finish(self) -> None:
        """Called once after the last batch."""

    def _cast(self, record: Record, shared: Shared) -> tuple[Tensor, Tensor]:
        a = shared.get(record.source, f"inputs {self.dtype}", lambda: record.inputs.to(self.dtype))
        return a, record.gradients.to(self.dtype)


def _weighted_gram(d: Tensor, a: Tensor, kernel: Callable[[], Tensor], cost_of_kernel: float) -> Tensor:
    """Σ_i D_iᵀ A_i A_iᵀ D_i over a batch, by the cheaper of two orders of multiplication.

    Through the kernel A Aᵀ (T, T) it costs 2T²p + 2Tp² and the kernel; through G it costs 2Tpq + 2p²q.
    """
    n, t, p = d.shape
    q = a.shape[2]
    if cost_of_kernel + t * t * p + t * p * p <= t * p * q + p * p * q:
        weighted = torch.bmm(kernel(), d)
        return d.reshape(n * t, p).T @ weighted.reshape(n * t, p)
    total = d.new_zeros(p, p)
    for one_d, one_a in zip(d, a, strict=True):
        gradient = one_d.T @ one_a
        total.addmm_(gradient, gradient.T)
    return total


class GramAccumulator(Accumulator):
    """Σ G Gᵀ (output side) or Σ Gᵀ G (input side), exact."""

    def __init__(self, sums: dict[str, Tensor], unit: str, side: str) -> None:
        super().__init__(sums, unit)
        self.side = side

    @classmethod
    def empty(cls, p: int, q: int, unit: str, side: str, dtype: torch.dtype, device: torch.device) -> GramAccumulator:
        """The sum of nothing."""
        size = p if side == "output" else q
        return cls({"gram": torch.zeros(size, size, dtype=dtype, device=device)}, unit, side)

    def add(self, record: Record, shared: Shared) -> None:
        """Adds one batch of one layer."""
        a, d = self._cast(record, shared)
        total = self.sums["gram"]
        near, far = (d, a) if self.side == "output" else (a, d)
        if self.unit == "token" or near.shape[1] == 1:
            near, far = near.flatten(0, 1), far.flatten(0, 1)
            total.addmm_((near * far.square().sum(1, keepdim=True)).T, near)
            return
        t = a.shape[1]
        if self.side == "output":
            kernel = lambda: shared.get(record.source, "kernel", lambda: torch.bmm(a, a.mT))  # noqa: E731
            # The kernel of the inputs is shared by q, k and v, so half of it is charged.
            total += _weighted_gram(d, a, kernel, 0.5 * t * t * a.shape[2])
        else:
            total += _weighted_gram(a, d, lambda: torch.bmm(d, d.mT), t * t * d.shape[2])

    def operator(self, count: float) -> SymmetricOperator:
        """F, (p, p) or (q, q)."""
        gram = self.sums["gram"] / count
        return DenseOperator((gram + gram.T) / 2, self.side)


class DiagonalAccumulator(Accumulator):
    """Σ G∘G."""

    @classmethod
    def empty(cls, p: int, q: int, unit: str, dtype: torch.dtype, device: torch.device) -> DiagonalAccumulator:
        """The sum of nothing."""
        return cls({"squares": torch.zeros(p, q, dtype=dtype, device=device)}, unit)

    def add(self, record: Record, shared: Shared) -> None:
        """Adds one batch of one layer; one (p, q) scratch tensor."""
        a, d = self._cast(record, shared)
        total = self.sums["squares"]
        if self.unit == "token" or a.shape[1] == 1:
            total.addmm_(d.flatten(0, 1).square().T, a.flatten(0, 1).square())
            return
        for one_d, one_a in zip(d, a, strict=True):
            gradient = one_d.T @ one_a
            total.addcmul_(gradient, gradient)

    def operator(self, count: float) -> SymmetricOperator:
        """(pq, pq)."""
        return DiagonalOperator(self.sums["squares"] / count)


class InputMoment:
    """Σ a aᵀ over tokens, held once for all layers that read the same input.

    Attributes:
        total: (q, q).
        tokens: (1,) how many.
    """

    def __init__(self, total: Tensor, tokens: Tensor) -> None:
        self.total = total
        self.tokens = tokens
        self._latest: tuple[int, int] | None = None

    def add(self, record: Record, batch: int, a: Tensor) -> None:
        """Adds a batch once, whichever of the sharing layers comes first."""
        if self._latest is not None and self._latest[0] == batch:
            if self._latest[1] != record.source:
                raise RuntimeError(
                    f"layer {record.name!r} shared its input with another layer in the first batch and does not in "
                    f"batch {batch}; pass share_inputs=False"
                )
            return
        self._latest = (batch, record.source)
        flat = a.flatten(0, 1)
        add_gram_(self.total, flat)
        self.tokens += float(len(flat) if record.mask is None else record.mask.sum())


class KfacAccumulator(Accumulator):
    """S = Σ g gᵀ and A = Σ a aᵀ over positions that are not padding ("expand", Eschenhagen et al. 2023)."""

    def __init__(self, sums: dict[str, Tensor], unit: str, moment: InputMoment | None = None) -> None:
        super().__init__(sums, unit)
        self.moment = moment or InputMoment(sums["input"], sums["tokens"])

    @classmethod
    def empty(cls, p: int, q: int, unit: str, dtype: torch.dtype, device: torch.device) -> KfacAccumulator:
        """The sums of nothing."""
        sums = {
            "output": torch.zeros(p, p, dtype=dtype, device=device),
            "input": torch.zeros(q, q, dtype=dtype, device=device),
            "tokens": torch.zeros(1, dtype=torch.float64, device=device),
        }
        return cls(sums, unit)

    def join(self, other: KfacAccumulator) -> None:
        """From now on the input moment is the one of ``other``, a layer with the same inputs."""
        self.moment = other.moment
        self.sums = {**self.sums, "input": other.sums["input"], "tokens": other.sums["tokens"]}

    def add(self, record: Record, shared: Shared, batch: int = 0) -> None:
        """Adds one batch of one layer."""
        a, d = self._cast(record, shared)
        self.moment.add(record, batch, a)
        flat = d.flatten(0, 1)
        add_gram_(self.sums["output"], flat)

    def operator(self, count: float) -> SymmetricOperator:
        """kron(S, A), (pq, pq)."""
        s = self.sums["output"] / count
        a = self.sums["input"] / self.sums["tokens"].clamp_min(1e-300).to(s.dtype)
        return KroneckerOperator(mirrored(s), mirrored(a))


class SketchAccumulator(Accumulator):
    """A factor V with V Vᵀ ≤ Σ G Gᵀ (or Σ Gᵀ G) and the exact trace: O((p + q)·rank) memory, no (p, p) matrix."""

    def __init__(self, sums: dict[str, Tensor], unit: str, side: str, rank: int, sketch: PsdSketch) -> None:
        super().__init__(sums, unit)
        self.side = side
        self.rank = rank
        self.sketch = sketch

    @classmethod
    def empty(
        cls,
        p: int,
        q: int,
        unit: str,
        side: str,
        rank: int,
        seed: int,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> SketchAccumulator:
        """The sums of nothing."""
        size = p if side == "output" else q
        sketch = PsdSketch(size, rank, seed, name, dtype, device)
        trace = torch.zeros(1, dtype=torch.float64, device=device)
        return cls({"factor": sketch.factor, "trace": trace}, unit, side, rank, sketch)

    def add(self, record: Record, shared: Shared) -> None:
        """Adds one batch of one layer."""
        a, d = self._cast(record, shared)
        near, far = (d, a) if self.side == "output" else (a, d)
        n, t, size = near.shape
        if self.unit == "token" or t == 1:
            weights = far.square().sum(2, keepdim=True)
            self.sums["trace"] += (near.square().sum(2, keepdim=True) * weights).sum()
            self._stream(n, lambda i, j, omega: _product(near[i:j], (near[i:j] @ omega) * weights[i:j]))
        elif t * (size + far.shape[2]) <= size * far.shape[2]:
            if self.side == "output":
                kernel = shared.get(record.source, "kernel", lambda: torch.bmm(far, far.mT))
            else:
                kernel = torch.bmm(far, far.mT)
            self.sums["trace"] += (kernel * torch.bmm(near, near.mT)).sum()
            self._stream(n, lambda i, j, omega: _product(near[i:j], torch.bmm(kernel[i:j], near[i:j] @ omega)))
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

    def operator(self, count: float) -> SymmetricOperator:
        """The leading ``rank`` pairs of F; ``full_trace`` is exact."""
        values, vectors = factor_eigh(self.sums["factor"], self.rank)
        trace = self.sums["trace"][0] / count
        return SpectralOperator(
            (values / count).to(self.dtype), vectors.to(self.dtype), trace.to(self.dtype), self.side
        )

    def merged(self, other: Accumulator) -> dict[str, Tensor]:
        """Sums of both: the factors side by side, cut back to three times the rank."""
        both = torch.cat([self.sums["factor"], other.sums["factor"].to(self.sums["factor"].device)], 1)
        width = 3 * min(self.rank, len(both))
        trace = self.sums["trace"] + other.sums["trace"].to(both.device)
        return {"factor": compress(both, width), "trace": trace}

    def weighted(self, weight: float) -> dict[str, Tensor]:
        """Sums that count ``weight`` times as much."""
        return {"factor": self.sums["factor"] * weight**0.5, "trace": self.sums["trace"] * weight}


def _product(near: Tensor, inner: Tensor) -> Tensor:
    return near.flatten(0, 1).T @ inner.flatten(0, 1)
