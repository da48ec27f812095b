"""How an optimizer measures a change of the weights, and where it is heading, as far as its state says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Metric:
    """How an optimizer measures a change of one weight: it steps by rate × gradient / scale.

    It refers to the optimizer's own state and works out a part of it when asked, so that of all weights together nothing is
    held twice.

    Attributes:
        rate: learning rate.
        squares: of the weight's shape, from whose root the scale is; None for a scale of 1.
        means: of the weight's shape, where the loss grows; None where that is not known.
        unbiased: by how much ``squares`` and ``means`` are too small, of a mean that began at zero.
        damping: added to the root.
    """

    rate: float
    squares: Tensor | None = None
    means: Tensor | None = None
    unbiased: tuple[float, float] = (1.0, 1.0)
    damping: float = 0.0

    def kind(self) -> tuple[object, ...]:
        """What must be the same for numbers of two weights to be reckoned with together."""
        return self.rate, self.squares is None, self.means is None, self.unbiased, self.damping

    def scale(self, squares: Tensor) -> Tensor:
        """Root mean square of the gradients of some numbers, of their ``squares`` as they stand in the optimizer."""
        return (squares / self.unbiased[0]).sqrt_().add_(self.damping)

    def uphill(self, means: Tensor) -> Tensor:
        """Mean of the last gradients of some numbers, of their ``means`` as they stand in the optimizer."""
        return means / self.unbiased[1]


def measures(optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter]) -> bool:
    """Whether :func:`metric_of` can tell: torch's SGD, Adam and AdamW, which step these same weights.

    Args:
        optimizer: any.
        weights: all that train.
    """
    known = isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW))
    if not known or any(group.get("amsgrad") or group["maximize"] for group in optimizer.param_groups):
        return False
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return held.issuperset(id(p) for p in weights)


def metric_of(optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter]) -> list[Metric]:
    """One a weight, after a step; a weight that had no gradient yet has the rate 0.

    Adam divides by √v + ε, v its mean square of gradients, and steps along its mean of gradients, both freed of the
    bias of their start (Kingma and Ba 2015). Of SGD uphill is the momentum or, without one, the gradient.

    Args:
        optimizer: one that :func:`measures`.
        weights: all that train.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    return [_of(groups[p], optimizer.state.get(p, {}), p.grad) for p in weights]


def _of(group: dict[str, object], state: dict[str, Tensor], gradient: Tensor | None) -> Metric:
    rate = float(group["lr"])  # type: ignore[arg-type]
    if "betas" not in group:
        momentum = state.get("momentum_buffer")
        return Metric(rate, means=gradient if momentum is None else momentum)
    if "exp_avg_sq" not in state:
        return Metric(0.0)
    first, second = (1 - float(beta) ** float(state["step"]) for beta in group["betas"])  # type: ignore[attr-defined]
    return Metric(rate, state["exp_avg_sq"], state["exp_avg"], (second, first), float(group["eps"]))  # type: ignore[arg-type]
