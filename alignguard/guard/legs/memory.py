"""Divergences that were read, each remembered by a quadratic model of itself, and a step of the weights that heeds them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignguard.guard.legs.optimizers import Metric


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

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, value: float, gradient: Tensor, weights: Sequence[Tensor]) -> None:
        """Remember a reading.

        Args:
            value: KL, positive.
            gradient: its slope in the weights end to end.
            weights: where it was read.
        """
        kept = _compact(gradient)
        parts = kept.split([weight.numel() for weight in weights])
        with torch.no_grad():
            offset = sum(float(part.to(w.dtype) @ w.flatten()) for part, w in zip(parts, weights, strict=True))
        self._kept.append(_Reading(value, kept, offset))

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
            steps = []
            for rows, weight, one in zip(self._rows(weights), weights, metric, strict=True):
                products += rows @ weight.flatten()
                steps.append(one.steps(rows))
                overlaps += (rows * steps[-1]) @ rows.T
                if one.uphill is not None:
                    uphill = one.uphill.flatten().to(rows.dtype)
                    climbs += rows @ (uphill * steps[-1])
                    slope += uphill @ (uphill * steps[-1])
            overlaps, climbs = overlaps / torch.outer(roots, roots), climbs / roots
            residuals = self._residuals(roots, products)
            share = strength / len(roots)

            def pulls(overlaps: Tensor, residuals: Tensor) -> Tensor:
                found: Tensor = torch.linalg.solve(
                    torch.eye(len(roots)).to(roots) + share * overlaps, share * residuals
                )
                return found

            pull, against = pulls(overlaps, residuals), 0.0
            if climb is not None and float(-climbs @ pull) > climb * float(slope):
                # Within the plane of what is allowed: as far uphill as that, and from there on level.
                pull = pulls(overlaps - torch.outer(climbs, climbs) / slope, residuals + climb * climbs)
                against = float(climbs @ pull / slope) + climb
            pull = pull / roots
            for rows, weight, step, one in zip(self._rows(weights), weights, steps, metric, strict=True):
                change = pull @ rows
                if against and one.uphill is not None:
                    change -= against * one.uphill.flatten().to(change.dtype)
                weight -= (change * step).view_as(weight)

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
        for one in kept:
            if one["gradient"].shape != (size,):
                raise ValueError(f"a remembered gradient is of {one['gradient'].numel()} weights, and {size} train")
            self._kept.append(_Reading(float(one["value"]), _compact(one["gradient"]), float(one["offset"])))

    def _rows(self, weights: Sequence[Tensor]) -> Any:
        """Of each weight in turn the readings' gradients, (readings, numel), in its dtype: never all at once."""
        start = 0
        for weight in weights:
            end = start + weight.numel()
            yield torch.stack([one.gradient[start:end] for one in self._kept]).to(weight.dtype)
            start = end

    def _roots(self, like: Tensor) -> Tensor:
        return (2 * like.new_tensor([one.value for one in self._kept])).sqrt()

    def _residuals(self, roots: Tensor, products: Tensor) -> Tensor:
        """ρ of each reading, of the products ⟨g, θ⟩."""
        return roots + (products - roots.new_tensor([one.offset for one in self._kept])) / roots


def _compact(gradient: Tensor) -> Tensor:
    return gradient if gradient.dtype == torch.float64 else gradient.bfloat16()


class _Recalled(torch.autograd.Function):
    """Memory.value, whose gradient is formed weight by weight."""

    @staticmethod
    def forward(ctx: Any, memory: Memory, *weights: Tensor) -> Tensor:
        roots = memory._roots(weights[0])
        products = torch.zeros_like(roots)
        for rows, weight in zip(memory._rows(weights), weights, strict=True):
            products += rows @ weight.flatten()
        residuals = memory._residuals(roots, products)
        ctx.memory, ctx.weights, ctx.slopes = memory, weights, residuals / roots / len(roots)
        return residuals.square().mean() / 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        slopes = upstream * ctx.slopes
        gradients = [
            (slopes @ rows).view_as(w) for rows, w in zip(ctx.memory._rows(ctx.weights), ctx.weights, strict=True)
        ]
        return None, *gradients
