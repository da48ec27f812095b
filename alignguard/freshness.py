"""When a quadratic has gone stale: measured against predicted drift, within a share of the training's compute."""

from __future__ import annotations

from dataclasses import dataclass, field

from alignguard.config import GuardConfig

FORWARD = 1 / 3  # cost of a forward pass alone, in forward and backward passes
MEASURING = 1 / 3  # share of the budget that measurements may take
NOISE = 1e-4  # nats a response: drifts below this are rounding


@dataclass
class Freshness:
    """Decides when to measure and when to refresh. Counts examples, not seconds, so that a resumed run decides alike.

    The rule is this project's own, in the manner of a trust region: it compares predicted with measured drift.

    Attributes:
        config: ``adaptive``, ``measure_every``, ``refresh_budget`` and ``refresh_tolerance`` are read.
        drift: the last measurement, nats a response.
        ratio: measured over predicted drift when the curvature was last estimated; 1 at the start, where the
            quadratic is exact to second order.
        task: task examples so far.
        measuring, refreshing: their cost so far, in task examples.
        measured_at: step of the last measurement.
    """

    config: GuardConfig = field(repr=False)
    drift: float = 0.0
    ratio: float = 1.0
    task: float = 0.0
    measuring: float = 0.0
    refreshing: float = 0.0
    measured_at: int = -1

    def spend_on(self, task_examples: int | None) -> None:
        """Count a step's ``task_examples``.

        Raises:
            ValueError: they are unknown, and adaptive refreshes need them.
        """
        if task_examples is None and self.config.adaptive:
            raise ValueError("adaptive refreshes count their budget in task examples: begin_step(step, task_examples)")
        self.task += task_examples or 0

    def may_measure(self, step: int, examples: int) -> bool:
        """Whether a measurement on so many examples is due at optimizer step ``step``, and paid for if adaptive."""
        if step == 0 or step - max(self.measured_at, 0) < self.config.measure_every:
            return False
        cost = examples * FORWARD
        if self.config.adaptive and self.measuring + cost > MEASURING * self.config.refresh_budget * self.task:
            return False
        self.measuring += cost
        return True

    def may_refresh(self, examples: int) -> bool:
        """Whether a refresh on so many examples is paid for; if so it is counted."""
        if self.measuring + self.refreshing + examples > self.config.refresh_budget * self.task:
            return False
        self.refreshing += examples
        return True

    def measured(self, step: int, drift: float, predicted: float) -> bool:
        """Take a measurement in; whether the prediction has parted from it by more than the tolerance.

        Args:
            step: optimizer steps done.
            drift: measured, nats a response.
            predicted: by the present curvature, nats a response.
        """
        self.drift, self.measured_at = drift, step
        expected = self.ratio * predicted
        if max(drift, expected) < NOISE:
            return False
        return abs(drift - expected) > self.config.refresh_tolerance * max(min(drift, expected), NOISE)

    def calibrate(self, predicted: float) -> None:
        """After a refresh: what the new curvature predicts for the last drift measured, ``predicted`` nats a response."""
        if self.drift >= NOISE and predicted > 0:
            self.ratio = self.drift / predicted

    def state(self) -> dict[str, float]:
        """The counters, as JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "config"}
