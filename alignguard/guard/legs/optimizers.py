"""How an optimizer measures a change of the weights, and where it is heading, as far as its state says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_TINY = 1e-30  # where a gradient is as small, so is the step


@dataclass(frozen=True)
class Metric:
    """How an optimizer measures a change of one weight: it steps by rate × gradient / scale.

    Attributes:
        rate: learning rate.
        scale: of the weight's shape, the root mean square of its gradients; None for 1.
        uphill: of the weight's shape, the mean of its last gradients; None where there is none.
    """

    rate: float
    scale: Tensor | None = None
    uphill: Tensor | None = None

    def steps(self, floor: Tensor) -> Tensor | float:
        """Rate / scale, (numel,), where no scale is less than the ``floor`` (numel,)."""
        if self.scale is None:
            return self.rate
        return self.rate / torch.maximum(self.scale.flatten(), floor).clamp_min(_TINY)


def joined(metric: Sequence[Metric], dtype: torch.dtype) -> Metric:
    """That of several weights end to end, which are of one rate and alike in what is None.

    Args:
        metric: one a weight.
        dtype: of what is returned.
    """

    def flat(parts: list[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.cat([part.flatten() for part in parts]).to(dtype)  # type: ignore[union-attr]

    return Metric(metric[0].rate, flat([one.scale for one in metric]), flat([one.uphill for one in metric]))


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
        return Metric(rate, uphill=gradient if momentum is None else momentum)
    if "exp_avg_sq" not in state:
        return Metric(0.0)
    first, second = (1 - float(beta) ** float(state["step"]) for beta in group["betas"])  # type: ignore[attr-defined]
    return Metric(rate, (state["exp_avg_sq"] / second).sqrt() + group["eps"], state["exp_avg"] / first)
