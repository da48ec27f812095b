"""Divergences that were read, each remembered by a quadratic model of itself, and a step of the weights that heeds them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignguard.guard.legs.optimizers import Metric

_TINY = 1e-30  # where a gradient is as small, so is the step

# Numbers for which arithmetic is done at once: with eight readings of as many what a processor core's own cache holds, and
# elsewhere enough that starting it takes no time.
_BLOCK, _BLOCK_ELSEWHERE = 1 << 16, 1 << 24


@dataclass(frozen=True)
class _Reading:
    """A divergence that was read, and its slope there.

    Attributes:
        value: KL, nats a response token.
        gradient: slope in the trainable weights end to end, (weights,), bfloat16 where weights are no wider than float32.
        offset: ⟨gradient, weights⟩ where it was read.
    """

    value: float
    gradient: Tensor
    offset: float


@dataclass(frozen=True)
class _Piece:
    """Some numbers in a row of one weight.

    Attributes:
        numbers: a view of them, in whatever shape.
        metric: of the weight.
        part: which of the weight's numbers they are.
    """

    numbers: Tensor
    metric: Metric
    part: slice

    def of(self, state: Tensor | None) -> Tensor:
        """The same numbers of what the optimizer keeps of the weight, flat."""
        assert state is not None  # a block's pieces are alike in what they have
        return state.flatten()[self.part]


@dataclass(frozen=True)
class _Block:
    """Pieces in a row, for which arithmetic is done at once: an adapter's weights are hundreds, and small, others are few."""

    pieces: Sequence[_Piece]

    def numel(self) -> int:
        return sum(piece.numbers.numel() for piece in self.pieces)

    def flat(self) -> Tensor:
        """End to end, (numel,), float32 or wider."""
        return self._joined([piece.numbers.flatten() for piece in self.pieces])

    @property
    def dtype(self) -> torch.dtype:
        """In which they are reckoned with."""
        return _wide(self.pieces[0].numbers)

    def steps(self, floor: Tensor) -> Tensor | float:
        """The optimizer's rate / scale, (numel,), where no scale is less than the ``floor`` (numel,)."""
        metric = self.pieces[0].metric
        if metric.squares is None:
            return metric.rate
        scale = metric.scale(self._joined([piece.of(piece.metric.squares) for piece in self.pieces]))
        return torch.maximum(scale, floor.to(self.dtype)).clamp_min_(_TINY).reciprocal_().mul_(metric.rate)

    def uphill(self) -> Tensor | None:
        """Where the task's loss grows, (numel,); None where the optimizer does not say."""
        metric = self.pieces[0].metric
        if metric.means is None:
            return None
        return metric.uphill(self._joined([piece.of(piece.metric.means) for piece in self.pieces]))

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)).to(self.dtype)

    def subtract(self, flat: Tensor) -> None:
        """Take what is end to end from the numbers themselves."""
        parts = flat.split([piece.numbers.numel() for piece in self.pieces])
        for piece, part in zip(self.pieces, parts, strict=True):
            piece.numbers.sub_(part.view_as(piece.numbers))


@dataclass(frozen=True)
class _Known:
    """⟨g, θ⟩ of each reading, as a step left the weights; ``versions`` tell whether they are still the same."""

    products: Tensor
    versions: list[tuple[int, int]]


class Memory:
    """The last readings of a divergence, and what their models say of weights that have moved on.

    With K and g the value and gradient of a reading and d = ⟨g, θ − θ_read⟩, its Gauss-Newton model is

        ½ ρ²,  ρ = √(2K) + d/√(2K),

    whose value and slope are right where it was read and which bends upward across all layers at once; the memory is the
    mean of ½ ρ² over its readings.

    Args:
        length: most readings; the oldest is forgotten first.
    """

    def __init__(self, length: int) -> None:
        self._kept: deque[_Reading] = deque(maxlen=length)
        self._known: _Known | None = None
        self._floor: Tensor | None = None  # of the readings as they are

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, value: float, gradient: Tensor, weights: Sequence[Tensor]) -> None:
        """Remember a reading.

        Args:
            value: KL, positive.
            gradient: its slope in the weights end to end.
            weights: where it was read.
        """
        kept, blocks = compact(gradient), _blocks(weights)
        with torch.no_grad():
            parts = zip(kept.split([block.numel() for block in blocks]), blocks, strict=True)
            offset = float(sum(part.to(block.dtype) @ block.flat() for part, block in parts))
        if self._known is not None:
            # Of the others it is known already, unless the weights have been moved by somebody else since.
            products = torch.cat([self._known.products, self._known.products.new_tensor([offset])])
            self._known = _Known(products[-(self._kept.maxlen or 0) :], self._known.versions)
        self._kept.append(_Reading(value, kept, offset))
        self._floor = None

    def value(self, weights: Sequence[Tensor]) -> Tensor:
        """Mean over the readings of ½ ρ² in nats a token, differentiable once in the weights."""
        found: Tensor = _Recalled.apply(self, *weights)  # type: ignore[no-untyped-call]
        return found

    def step(
        self, weights: Sequence[Tensor], metric: Sequence[Metric], strength: float, climb: float | None = None
    ) -> None:
        """Move the weights by the proximal step of strength × memory that climbs the task's loss no further than allowed.

        What is added to them is the minimiser δ of Σ scale δ²/(2 rate) + strength × memory(θ + δ): a step of the optimizer's
        own kind whose gradient is that of the place it ends at (implicit Euler), so that no strength and no rate lets it
        overshoot. With ``climb`` it is the minimiser among those with ⟨uphill, δ⟩ ≤ climb × Σ rate uphill²/scale, which is
        what a step of the optimizer gains on its loss to first order; gradients of several tasks are parted by such a bound,
        of zero, in Lopez-Paz and Ranzato (2017). The models are of rank one each, so it takes a system of as many unknowns
        as there are readings.

        Args:
            weights: trainable weights.
            metric: how the optimizer measures a change of each of them, and where its loss grows.
            strength: weight of the memory.
            climb: share of the optimizer's gain that may be taken back, not negative; None for any.
        """
        if not self._kept or strength == 0:
            return
        with torch.no_grad():
            roots = self._roots(weights[0])
            products, climbs, slope = torch.zeros_like(roots), torch.zeros_like(roots), roots.new_zeros(())
            overlaps = torch.zeros(len(roots), len(roots)).to(roots)
            blocks = _blocks(weights, metric)
            floors = self._floors().split([block.numel() for block in blocks])
            for (rows, block), floor in zip(self._rows(blocks), floors, strict=True):
                step, uphill = block.steps(floor), block.uphill()
                products += rows @ block.flat()
                overlaps += (rows * step) @ rows.T
                if uphill is not None:
                    sunk = uphill * step
                    climbs += rows @ sunk
                    slope += uphill @ sunk
            pull, against = self._pull(roots, products, overlaps, climbs, slope, strength / len(roots), climb)
            for (rows, block), floor in zip(self._rows(blocks), floors, strict=True):
                change = pull @ rows
                if against and (uphill := block.uphill()) is not None:
                    change.sub_(uphill, alpha=against)
                block.subtract(change.mul_(block.steps(floor)))
            self._known = _Known(products - overlaps @ pull + against * climbs, _versions(weights))

    def _floors(self) -> Tensor:
        """Root mean square of the readings' gradients, (weights,): the least scale of a coordinate's step.

        A coordinate that the task leaves alone has no scale of its own, and would count as free.
        """
        if self._floor is None:
            parts = zip(*(one.gradient.split(_BLOCK_ELSEWHERE) for one in self._kept), strict=True)
            self._floor = torch.cat([compact(_root_mean_square(part)) for part in parts])
        return self._floor

    def _pull(
        self,
        roots: Tensor,
        products: Tensor,
        overlaps: Tensor,
        climbs: Tensor,
        slope: Tensor,
        share: float,
        climb: float | None,
    ) -> tuple[Tensor, float]:
        """How far to go against each reading's gradient, and how far along uphill, both in the optimizer's metric."""
        overlaps, climbs = overlaps / torch.outer(roots, roots), climbs / roots
        residuals = self._residuals(roots, products)

        def solved(overlaps: Tensor, residuals: Tensor) -> Tensor:
            found: Tensor = torch.linalg.solve(torch.eye(len(roots)).to(roots) + share * overlaps, share * residuals)
            return found

        pull = solved(overlaps, residuals)
        if climb is None or float(-climbs @ pull) <= climb * float(slope):
            return pull / roots, 0.0
        # Within the plane of what is allowed: as far uphill as that, and from there on level.
        pull = solved(overlaps - torch.outer(climbs, climbs) / slope, residuals + climb * climbs)
        return pull / roots, float(climbs @ pull / slope) + climb

    def state(self) -> list[dict[str, Any]]:
        """The readings, for a checkpoint."""
        return [dict(vars(one)) for one in self._kept]

    def restore(self, kept: Sequence[Mapping[str, Any]], size: int) -> None:
        """Take back what :meth:`state` gave.

        Args:
            kept: readings.
            size: how many weights train.

        Raises:
            KeyError, TypeError: a value is missing, or is of another kind.
            ValueError: gradients of other weights.
        """
        self._kept.clear()
        self._known = self._floor = None
        for one in kept:
            if one["gradient"].shape != (size,):
                raise ValueError(f"a remembered gradient is of {one['gradient'].numel()} weights, and {size} train")
            self._kept.append(_Reading(float(one["value"]), compact(one["gradient"]), float(one["offset"])))

    def _rows(self, blocks: Sequence[_Block]) -> Iterator[tuple[Tensor, _Block]]:
        """With each block in turn the readings' gradients, (readings, numel), float32 or wider: never all at once."""
        start = 0
        for block in blocks:
            end = start + block.numel()
            yield torch.stack([one.gradient[start:end] for one in self._kept]).to(block.dtype), block
            start = end

    def _products(self, weights: Sequence[Tensor]) -> Tensor:
        """⟨g, θ⟩ of each reading."""
        if self._known is not None and self._known.versions == _versions(weights):
            return self._known.products
        products = weights[0].new_zeros(len(self._kept), dtype=_wide(weights[0]))
        for rows, block in self._rows(_blocks(weights)):
            products += rows @ block.flat()
        return products

    def _roots(self, like: Tensor) -> Tensor:
        return (2 * like.new_tensor([one.value for one in self._kept], dtype=_wide(like))).sqrt()

    def _residuals(self, roots: Tensor, products: Tensor) -> Tensor:
        """ρ of each reading, of the products ⟨g, θ⟩."""
        return roots + (products - roots.new_tensor([one.offset for one in self._kept])) / roots


def _blocks(weights: Sequence[Tensor], metric: Sequence[Metric] | None = None) -> list[_Block]:
    """The weights in a row, in blocks of one kind and at most ``_BLOCK`` numbers, but for what cannot be cut."""
    found: list[_Block] = []
    size, count, kind = _BLOCK if weights[0].device.type == "cpu" else _BLOCK_ELSEWHERE, 0, None
    for weight, one in zip(weights, metric or [Metric(1.0)] * len(weights), strict=True):
        for piece in _pieces(weight.detach(), one, size):
            its, more = (weight.dtype, one.kind()), piece.numbers.numel()
            if its == kind and count + more <= size:
                found[-1] = _Block([*found[-1].pieces, piece])
                count += more
            else:
                found.append(_Block([piece]))
                kind, count = its, more
    return found


def _pieces(weight: Tensor, metric: Metric, size: int) -> Iterator[_Piece]:
    """A weight in views of at most ``size`` numbers; whole where its numbers are not in a row in memory."""
    if weight.numel() <= size or not weight.is_contiguous():
        yield _Piece(weight, metric, slice(None))
        return
    for start in range(0, weight.numel(), size):
        part = slice(start, min(start + size, weight.numel()))
        yield _Piece(weight.view(-1)[part], metric, part)


def _versions(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(id(weight), weight._version) for weight in weights]


def _wide(like: Tensor) -> torch.dtype:
    """In which weights are reckoned with, whatever they are kept in."""
    return torch.promote_types(like.dtype, torch.float32)


def _root_mean_square(gradients: Sequence[Tensor]) -> Tensor:
    squares = torch.zeros_like(gradients[0], dtype=_wide(gradients[0]))
    for one in gradients:
        squares += one.to(squares.dtype).square()
    return squares.div_(len(gradients)).sqrt_()


def compact(gradient: Tensor) -> Tensor:
    """A gradient as it is kept: bfloat16 but for a wider one than float32."""
    return gradient if gradient.dtype == torch.float64 else gradient.bfloat16()


class _Recalled(torch.autograd.Function):
    """Memory.value, whose gradient is formed weight by weight."""

    @staticmethod
    def forward(ctx: Any, memory: Memory, *weights: Tensor) -> Tensor:
        roots = memory._roots(weights[0])
        residuals = memory._residuals(roots, memory._products(weights))
        ctx.memory, ctx.weights, ctx.slopes = memory, weights, residuals / roots / len(roots)
        return residuals.square().mean() / 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        slopes, gradients = upstream * ctx.slopes, [torch.zeros_like(weight) for weight in ctx.weights]
        for rows, block in ctx.memory._rows(_blocks(gradients)):
            block.subtract(-slopes @ rows)
        return None, *gradients
