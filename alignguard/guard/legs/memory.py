"""Divergences that were read, each remembered by a quadratic model of itself, and a step of the weights that heeds them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignguard.guard.legs.optimizers import Metric, joined

_BLOCK = 1 << 16  # numbers: with eight readings of as many, what a core's own cache holds


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
class _Block:
    """Some weights in a row, for which arithmetic is done at once: an adapter's are hundreds, and small."""

    weights: Sequence[Tensor]
    metric: Metric

    def numel(self) -> int:
        return sum(weight.numel() for weight in self.weights)

    def flat(self) -> Tensor:
        """End to end, (numel,), float32 or wider."""
        return torch.cat([weight.flatten() for weight in self.weights]).to(_wide(self.weights[0]))

    def parted(self, flat: Tensor) -> list[Tensor]:
        """What is end to end, in the weights' shapes."""
        parts = flat.split([weight.numel() for weight in self.weights])
        return [part.view_as(weight) for part, weight in zip(parts, self.weights, strict=True)]


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
        kept, blocks = _compact(gradient), _blocks(weights)
        with torch.no_grad():
            parts = kept.split([block.numel() for block in blocks])
            flats = [block.flat() for block in blocks]
            offset = float(sum(part.to(flat.dtype) @ flat for part, flat in zip(parts, flats, strict=True)))
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
            blocks, steps = _blocks(weights, metric), []
            floors = self._floors().split([block.numel() for block in blocks])
            for (rows, block), floor in zip(self._rows(blocks), floors, strict=True):
                step = block.metric.steps(floor)
                steps.append(step)
                products += rows @ block.flat()
                overlaps += (rows * step) @ rows.T
                if block.metric.uphill is not None:
                    sunk = block.metric.uphill * step
                    climbs += rows @ sunk
                    slope += block.metric.uphill @ sunk
            pull, against = self._pull(roots, products, overlaps, climbs, slope, strength / len(roots), climb)
            for (rows, block), step in zip(self._rows(blocks), steps, strict=True):
                change = pull @ rows
                if against and block.metric.uphill is not None:
                    change.sub_(block.metric.uphill, alpha=against)
                for weight, part in zip(block.weights, block.parted(change.mul_(step)), strict=True):
                    weight -= part
            self._known = _Known(products - overlaps @ pull + against * climbs, _versions(weights))

    def _floors(self) -> Tensor:
        """Root mean square of the readings' gradients, (weights,): the least scale of a coordinate's step.

        A coordinate that the task leaves alone has no scale of its own, and would count as free.
        """
        if self._floor is None:
            squares = torch.zeros_like(self._kept[0].gradient, dtype=_wide(self._kept[0].gradient))
            for one in self._kept:
                squares += one.gradient.to(squares.dtype).square()
            self._floor = squares.div_(len(self._kept)).sqrt_()
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
            self._kept.append(_Reading(float(one["value"]), _compact(one["gradient"]), float(one["offset"])))

    def _rows(self, blocks: Sequence[_Block]) -> Iterator[tuple[Tensor, _Block]]:
        """With each block in turn the readings' gradients, (readings, numel), float32 or wider: never all at once."""
        start = 0
        for block in blocks:
            end = start + block.numel()
            yield torch.stack([one.gradient[start:end] for one in self._kept]).to(_wide(block.weights[0])), block
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
    """Consecutive weights of one kind together, up to ``_BLOCK`` numbers; a larger one by itself."""
    found: list[_Block] = []
    several: list[tuple[Tensor, Metric]] = []

    def close() -> None:
        if several:
            found.append(_Block([w for w, _ in several], joined([m for _, m in several], _wide(several[0][0]))))
            several.clear()

    kind, count = None, 0
    for weight, one in zip(weights, metric or [Metric(1.0)] * len(weights), strict=True):
        its = (weight.dtype, one.rate, one.scale is None, one.uphill is None)
        if its != kind or count + weight.numel() > _BLOCK:
            close()
            kind, count = its, 0
        several.append((weight, one))
        count += weight.numel()
    close()
    return found


def _versions(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(id(weight), weight._version) for weight in weights]


def _wide(like: Tensor) -> torch.dtype:
    """In which weights are reckoned with, whatever they are kept in."""
    return torch.promote_types(like.dtype, torch.float32)


def _compact(gradient: Tensor) -> Tensor:
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
        slopes, gradients = upstream * ctx.slopes, []
        for rows, block in ctx.memory._rows(_blocks(ctx.weights)):
            gradients += [part.to(w.dtype) for part, w in zip(block.parted(slopes @ rows), block.weights, strict=True)]
        return None, *gradients
