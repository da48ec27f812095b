"""The leg that charges what the model says: KL to the model before training, and what is remembered of it in between."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignguard.guard.config import GuardConfig
from alignguard.guard.distributed import same_everywhere
from alignguard.guard.legs.base import Leg
from alignguard.guard.legs.memory import Memory, compact
from alignguard.guard.legs.optimizers import Metric
from alignguard.guard.reference import Reference
from alignguard.guard.rows import AlignmentRows
from alignguard.guard.schedule import DriftBudget

_SETTLED = 1e-4  # nats a token: a divergence below this has no direction worth remembering

_RECENT = 6  # examples read by which the leg believes the drift to be what it is

_COMPARED = 24  # examples over which belief and drift are compared


def due(step: int, every: int, memory: int) -> bool:
    """Whether KL is read before an optimizer step, counted from 0.

    Args:
        step: the step.
        every: steps between two readings.
        memory: readings remembered.
    """
    # A new adapter moves fastest, and at its start, where KL is zero, there is no direction to remember.
    return step % every == 0 or (memory > 0 and step < every)


class KLLeg(Leg):
    """λ_KL KL(start ‖ present) a response token, on a few examples in rotation (Li and Hoiem 2017).

    With a memory the last evaluations go on charging between two readings, each by the Gauss-Newton model of its own
    divergence along its own gradient (:class:`~alignguard.guard.legs.memory.Memory`, this project's own). It costs some
    inner products with the trainable weights, no pass through the model.

    Where the optimizer is known (:meth:`Guard.attach`) what is remembered is no part of the loss: it moves the weights
    after each of the optimizer's steps. Inside the loss its gradients would enter the mean squares by which Adam divides,
    so that the task is learned at a lower rate, and would be clipped together with the task's. AdamW parts weight decay
    from them for the same reason (Loshchilov and Hutter 2019). And there it can be told what it may cost: ``kl_climb`` is the
    share of what the optimizer's step has gained on the task, to first order, that it may take back.

    Args:
        rows: alignment examples.
        config: strength, examples, interval and memory.
        budget: multiplier of the strength.
        reference: what the model said before training at the examples that are read.
        moved: ‖ΔW‖ at the present weights; None where reading it costs too much, that is where all weights train.
    """

    name = "kl"

    def __init__(
        self,
        rows: AlignmentRows,
        config: GuardConfig,
        budget: DriftBudget | None,
        reference: Reference,
        moved: Callable[[], float] | None,
    ) -> None:
        super().__init__(rows, config, budget)
        self.reference, self._moved = reference, moved
        self._method = "full" if moved is None else "lora"
        self._memory = Memory(config.kl_schedule(self._method)[1])
        self.apart = False  # what is remembered acts beside the loss
        recent, compared = (math.ceil(count / config.kl_examples) for count in (_RECENT, _COMPARED))
        self._read_before: deque[tuple[float, float]] = deque(maxlen=recent)  # nats a response, and ‖ΔW‖ there
        self._compared: deque[tuple[float, float]] = deque(maxlen=compared)

    def terms(self, step: int) -> dict[str, Tensor]:
        """The term ``kl``: where it is due its own, ``kl_every`` times as heavy; with a memory the mean of its models.

        Raises:
            ValueError: a memory is asked for, and the trainable weights are sharded.
        """
        every, memory = self.schedule()
        if not memory:
            return {"kl": self._strength() * every * self._read(step // every)} if due(step, every, memory) else {}
        if due(step, every, memory):
            self._remember(self._read(min(step, every - 1) + step // every))
        if not len(self._memory):
            return {}
        value = self._strength() * self._memory.value(self.trained())
        return {"kl": value.detach() if self.apart else value}

    def step(self, metric: Sequence[Metric]) -> None:
        """Move the trainable weights by what is remembered, after a step of the optimizer.

        Args:
            metric: the optimizer's, one a trainable weight.
        """
        climb = self.config.kl_climb
        if climb is not None and self.budget is not None:
            climb *= self.budget.multiplier  # a bound on drift comes first
        # Each reading counts in full: what they take from the task is bounded by the climb, not by a low price.
        self._memory.step(self.trained(), metric, self._strength() * len(self._memory), climb)

    def _strength(self) -> float:
        return self.config.lambda_kl * (1.0 if self.budget is None else self.budget.multiplier)

    def schedule(self) -> tuple[int, int]:
        """Steps between two readings, and readings remembered."""
        sharded = any(isinstance(p, DTensor) for p in self.trained())
        if sharded and self.config.kl_memory:
            raise ValueError(
                "kl_memory keeps gradients of the trainable weights, which are sharded here; leave it out, or set it to 0"
            )
        return self.config.kl_schedule(self._method, sharded)

    def remembers(self) -> bool:
        """Whether readings are remembered, as the weights stand now."""
        return self.schedule()[1] > 0

    def trained(self) -> list[nn.Parameter]:
        """The weights that train."""
        # Asked anew each time: sharding puts other parameters in the place of those that the guard was made on.
        return [p for p in self.rows.model.parameters() if p.requires_grad]

    def _read(self, turn: int) -> Tensor:
        """KL a response token of the next examples, at the present weights."""
        places = self.rows.places(self.config.kl_examples, turn)
        self.rows.readings += len(places)
        nats = self.reference.divergence(places)[0]
        found = float(nats.detach().sum()) / len(places)
        moved = self._distance()
        if self._read_before:
            self._compared.append((self._believed(moved), found))
        self._read_before.append((found, moved))
        return nats.mean()

    def _remember(self, value: Tensor) -> None:
        trained = self.trained()
        found = torch.autograd.grad(value, trained, allow_unused=True)
        slopes = (torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True))
        read = same_everywhere(value.detach().clone())
        gradient = torch.cat([compact(slope.flatten()) for slope in slopes])
        same_everywhere(gradient.view(torch.uint8))  # not every backend sends bfloat16
        if float(read) >= _SETTLED:
            self._memory.add(float(read), gradient, trained)

    def drift(self) -> float:
        """What the leg believes the drift to be, nats a response as far as it is read.

        KL is quadratic in a small update, so its root grows as ‖ΔW‖ does: (c ‖ΔW‖)², c by least squares from the roots of
        the last readings and the distances at which they were read. Where all weights train the distance is taken to stay
        what it was: the square of the mean root. What the memory comes to is no such belief, since
        the run undoes what is remembered before it undoes the rest.
        """
        return self._believed(self._distance())

    def _believed(self, moved: float) -> float:
        products = sum(math.sqrt(max(0.0, read)) * then for read, then in self._read_before)
        squares = sum(then * then for _, then in self._read_before)
        return math.pow(products / squares * moved, 2) if squares else 0.0

    def _distance(self) -> float:
        return 1.0 if self._moved is None else self._moved()

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
            "kl_memory": self._memory.state(),
            "kl_compared": [list(pair) for pair in self._compared],
            "kl_read": [list(pair) for pair in self._read_before],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            KeyError, TypeError: a value is missing, or is of another kind.
            ValueError: gradients of other weights.
        """
        self._memory.restore(state["kl_memory"], sum(p.numel() for p in self.trained()))
        self._compared.clear()
        self._compared.extend((float(believed), float(read)) for believed, read in state["kl_compared"])
        self._read_before.clear()
        self._read_before.extend((float(read), float(moved)) for read, moved in state["kl_read"])
