"""The leg that charges what the model says: KL to the model before training, and what is remembered of it in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignguard.guard.config import GuardConfig
from alignguard.guard.legs.base import Leg
from alignguard.guard.reference import Reference
from alignguard.guard.rows import AlignmentRows
from alignguard.guard.schedule import DriftBudget

_SETTLED = 1e-4  # nats a token: a divergence below this has no direction worth remembering


_RECENT = 4  # readings whose mean is what the leg believes the drift to be


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

    With a memory the last evaluations go on charging between two readings, each by the Gauss-Newton model of its own
    divergence along its own gradient (this project's own): KL is half a square to second order, so with K and g its
    value and gradient at the weights where it was read and d = ⟨g, θ − θ_read⟩,

        ½ (√(2K) + d/√(2K))² = K + d + d²/(4K),

    whose value and slope are right where it was read and which bends upward across all layers at once. It costs two inner
    products with the trainable weights, no pass through the model.

    Args:
        rows: alignment examples.
        config: strength, examples, interval and memory.
        budget: multiplier of the strength.
        reference: what the model said before training at the examples that are read.
        remembers: whether adapters train, so that a gradient of everything that trains is small.
    """

    name = "kl"

    def __init__(
        self,
        rows: AlignmentRows,
        config: GuardConfig,
        budget: DriftBudget | None,
        reference: Reference,
        remembers: bool,
    ) -> None:
        super().__init__(rows, config, budget)
        self.reference, self._remembers = reference, remembers
        memory = config.kl_schedule(remembers)[1]
        self._memory: deque[_Reading] = deque(maxlen=memory)
        self._read_before: deque[float] = deque(maxlen=_RECENT)  # nats a response
        self._compared: deque[tuple[float, float]] = deque(maxlen=2 * _RECENT)

    def terms(self, step: int) -> dict[str, Tensor]:
        """The term ``kl``: where it is due its own, ``kl_every`` times as heavy; with a memory the mean of its models.

        Raises:
            ValueError: a memory is asked for, and the trainable weights are sharded.
        """
        every, memory = self._schedule()
        strength = self.config.lambda_kl * (1.0 if self.budget is None else self.budget.multiplier)
        if not memory:
            return {"kl": strength * every * self._read(step // every)} if step % every == 0 else {}
        # A new adapter moves fastest, and at its start, where KL is zero, there is no direction to remember.
        if step < every or step % every == 0:
            self._remember(self._read(min(step, every - 1) + step // every))
        return {"kl": strength * self._recalled()} if self._memory else {}

    def _schedule(self) -> tuple[int, int]:
        """Steps between two readings, and readings remembered."""
        sharded = any(isinstance(p, DTensor) for p in self._trained())
        if sharded and self.config.kl_memory:
            raise ValueError(
                "kl_memory keeps gradients of the trainable weights, which are sharded here; leave it out, or set it to 0"
            )
        return self.config.kl_schedule(self._remembers and not sharded)

    def _trained(self) -> list[nn.Parameter]:
        # Asked anew each time: sharding puts other parameters in the place of those that the guard was made on.
        return [p for p in self.rows.model.parameters() if p.requires_grad]

    def _read(self, turn: int) -> Tensor:
        """KL a response token of the next examples, at the present weights."""
        places = self.rows.places(self.config.kl_examples, turn)
        self.rows.readings += len(places)
        nats = self.reference.divergence(places)[0]
        found = float(nats.detach().sum()) / len(places)
        if self._read_before:
            self._compared.append((self.drift(), found))
        self._read_before.append(found)
        return nats.mean()

    def _remember(self, value: Tensor) -> None:
        if float(value.detach()) < _SETTLED:
            return
        trained = self._trained()
        found = torch.autograd.grad(value, trained, allow_unused=True)
        slopes = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]
        gradient = torch.cat([slope.flatten() for slope in slopes])
        self._memory.append(_Reading(float(value.detach()), gradient, float(gradient @ self._weights().detach())))

    def _weights(self) -> Tensor:
        return torch.cat([p.flatten() for p in self._trained()])

    def _recalled(self) -> Tensor:
        """Mean over the memory of ½ (√(2K) + d/√(2K))², in nats a token."""
        weights = self._weights()
        moved = torch.stack([one.gradient @ weights - one.offset for one in self._memory])
        root = (2 * weights.new_tensor([one.value for one in self._memory])).sqrt()
        return (root + moved / root).square().mean() / 2

    def drift(self) -> float:
        """What the leg believes the drift to be: the mean of its last readings, nats a response as far as it is read.

        What the memory comes to is no such belief: the run undoes what is remembered before it undoes the rest.
        """
        return sum(self._read_before) / len(self._read_before) if self._read_before else 0.0

    def compared(self) -> tuple[float, float] | None:
        """Drift that was believed in and drift that was then read, in nats a response.

        Means over some readings, for single examples differ; None before the second reading.
        """
        if not self._compared:
            return None
        believed, read = zip(*self._compared, strict=True)
        return sum(believed) / len(believed), sum(read) / len(read)

    def state_dict(self) -> dict[str, Any]:
        """The memory, its values, offsets and gradients; the last readings, and what was believed before each."""
        return {
            "kl_memory": [dict(vars(one)) for one in self._memory],
            "kl_compared": [list(pair) for pair in self._compared],
            "kl_read": list(self._read_before),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            KeyError, TypeError: a value is missing, or is of another kind.
            ValueError: gradients of other weights.
        """
        size = sum(p.numel() for p in self._trained())
        self._memory.clear()
        for kept in state["kl_memory"]:
            if kept["gradient"].shape != (size,):
                raise ValueError(f"a remembered gradient is of {kept['gradient'].numel()} weights, and {size} train")
            self._memory.append(_Reading(float(kept["value"]), kept["gradient"], float(kept["offset"])))
        self._compared.clear()
        self._compared.extend((float(believed), float(read)) for believed, read in state["kl_compared"])
        self._read_before.clear()
        self._read_before.extend(map(float, state["kl_read"]))
