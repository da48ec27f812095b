"""The leg that charges what the model says: KL to the model before training, and what is remembered of it in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignguard.guard.config import GuardConfig
from alignguard.guard.legs.base import Leg
from alignguard.guard.reference import Reference
from alignguard.guard.rows import AlignmentRows
from alignguard.guard.schedule import DriftBudget

_SETTLED = 1e-4  # nats a token: a divergence below this has no direction worth remembering


@dataclass(frozen=True)
class _Reading:
    """A divergence that was read, and its slope there.

    Attributes:
        value: KL, nats a response token.
        gradient: slope in the trainable weights end to end, (weights,).
        offset: ⟨gradient, weights⟩ where it was read.
    """

    value: float
    gradient: Tensor
    offset: float


class KLLeg(Leg):
    """λ_KL KL(start ‖ present) a response token, on a few examples in rotation (Li and Hoiem 2017).

    With ``kl_memory`` the last evaluations go on charging between two readings, each by the Gauss-Newton model of its
    own divergence along its own gradient (this project's own): KL is half a square to second order, so with K and g its
    value and gradient at the weights where it was read and d = ⟨g, θ − θ_read⟩,

        ½ (√(2K) + d/√(2K))² = K + d + d²/(4K),

    whose value and slope are right where it was read and which bends upward across all layers at once. It costs two inner
    products with the trainable weights, no pass through the model.

    Args:
        rows: alignment examples.
        config: strength, examples, interval and memory.
        budget: multiplier of the strength.
        reference: what the model said before training at the examples that are read.
        parameters: trainable weights, of which gradients are remembered.
    """

    name = "kl"

    def __init__(
        self,
        rows: AlignmentRows,
        config: GuardConfig,
        budget: DriftBudget | None,
        reference: Reference,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        super().__init__(rows, config, budget)
        self.reference, self.parameters = reference, list(parameters)
        self._memory: deque[_Reading] = deque(maxlen=config.kl_memory)

    def terms(self, step: int) -> dict[str, Tensor]:
        """The term ``kl``: where it is due its own, ``kl_every`` times as heavy; with a memory the mean of its models."""
        c = self.config
        strength = c.lambda_kl * (1.0 if self.budget is None else self.budget.multiplier)
        if not c.kl_memory:
            due = step % c.kl_every == 0
            return {"kl": strength * c.kl_every * self._read(step // c.kl_every)} if due else {}
        # A new adapter moves fastest, and at its start, where KL is zero, there is no direction to remember.
        if step < c.kl_every or step % c.kl_every == 0:
            self._remember(self._read(min(step, c.kl_every - 1) + step // c.kl_every))
        return {"kl": strength * self._recalled()} if self._memory else {}

    def _read(self, turn: int) -> Tensor:
        """KL a response token of the next examples, at the present weights."""
        places = self.rows.places(self.config.kl_examples, turn)
        self.rows.readings += len(places)
        return self.reference.divergence(places)[0].mean()

    def _remember(self, value: Tensor) -> None:
        if float(value.detach()) < _SETTLED:
            return
        found = torch.autograd.grad(value, self.parameters, allow_unused=True)
        slopes = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
        gradient = torch.cat([slope.flatten() for slope in slopes])
        self._memory.append(_Reading(float(value.detach()), gradient, float(gradient @ self._weights().detach())))

    def _weights(self) -> Tensor:
        return torch.cat([p.flatten() for p in self.parameters])

    def _recalled(self) -> Tensor:
        """Mean over the memory of ½ (√(2K) + d/√(2K))², in nats a token."""
        weights = self._weights()
        moved = torch.stack([one.gradient @ weights - one.offset for one in self._memory])
        root = (2 * weights.new_tensor([one.value for one in self._memory])).sqrt()
        return (root + moved / root).square().mean() / 2

    def state_dict(self) -> dict[str, Any]:
        """The memory: values, offsets and gradients."""
        if not self.config.kl_memory:
            return {}
        return {"kl_memory": [dict(vars(one)) for one in self._memory]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            KeyError, TypeError: a value is missing, or is of another kind.
            ValueError: gradients of other weights.
        """
        size = sum(p.numel() for p in self.parameters)
        self._memory.clear()
        for kept in state["kl_memory"] if self.config.kl_memory else ():
            if kept["gradient"].shape != (size,):
                raise ValueError(f"a remembered gradient is of {kept['gradient'].numel()} weights, and {size} train")
            self._memory.append(_Reading(float(kept["value"]), kept["gradient"], float(kept["offset"])))
