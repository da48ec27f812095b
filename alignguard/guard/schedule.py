"""When the guard measures and estimates, and the drift budget: one factor on its strengths, found while training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from alignguard.guard.config import GuardConfig
from alignguard.guard.distributed import agreed


class Schedule:
    """Decides when drift is measured and when the curvature is estimated anew; it runs neither itself.

    It decides by counts of steps and examples, not by seconds, so that a resumed run decides alike, and with
    torch.distributed by the first process's counts, so that all processes decide alike.

    Args:
        config: intervals, and whether refreshes are adaptive.
        rotating: alignment examples that an estimate may read.
        held: alignment examples that a measurement reads; 0 where drift is not measured.

    Attributes:
        step: optimizer steps done when the present one began.
        steps: optimizer steps of the whole run; None where they are not known.
        refreshes: estimates so far.
        estimated_at: step of the last estimate; None before the first.
        freshness: cost and outcome of measurements; None where drift is not measured.
    """

    def __init__(self, config: GuardConfig, rotating: int, held: int) -> None:
        self.config, self.rotating, self.held = config, rotating, held
        self.step = 0
        self.steps: int | None = None
        self.refreshes = 0
        self.estimated_at: int | None = None
        self.freshness = Freshness(config) if held else None

    def begin_run(self, steps: int) -> None:
        """Take in the length of the run, see :meth:`alignguard.Guard.begin_run`."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        self.steps = steps

    def begin_step(self, step: int, task_examples: int | None = None) -> None:
        """Take in which optimizer step begins and the task examples it reads, see :meth:`alignguard.Guard.begin_step`."""
        if (
            step < self.step
        ):  # another run on the same guard: what was done at a later step of the last one was done before
            self.estimated_at = None if self.estimated_at is None else min(self.estimated_at, step)
            if self.freshness is not None:
                self.freshness.measured_at = min(self.freshness.measured_at, step)
        self.step = step
        if self.freshness is not None:
            if self.config.adaptive and task_examples is not None:
                task_examples = int(agreed(task_examples))
            self.freshness.spend_on(task_examples)

    def measures(self) -> bool:
        """Whether drift is to be measured before this step; if so its cost is counted."""
        return self.freshness is not None and self.freshness.may_measure(self.step, self.held)

    def refreshes_now(self, parted: bool) -> bool:
        """Whether the curvature is to be estimated anew before this step; if adaptive its cost is counted.

        Args:
            parted: a measurement of this step was off the prediction by more than the tolerance.
        """
        last, interval = self.estimated_at or 0, self.config.interval(self.steps)
        if self.step < last + (interval if last else min(self.config.first_refresh or interval, interval)):
            return False
        if not self.config.adaptive:
            return True
        examples = min(self.config.refresh_examples, self.rotating)
        return parted and self.freshness is not None and self.freshness.may_refresh(examples)

    def estimated(self) -> None:
        """Note that the curvature has been estimated at the weights of this step."""
        self.estimated_at = self.step
        self.refreshes += 1

    def state_dict(self) -> dict[str, Any]:
        """The counters as plain values; the length of the run is left to :meth:`begin_run`."""
        return {
            "step": self.step,
            "refreshes": self.refreshes,
            "estimated_at": self.estimated_at,
            "freshness": None if self.freshness is None else self.freshness.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: a counter is missing, or is no whole number.
        """
        self.step, self.refreshes = whole_number(state, "step"), whole_number(state, "refreshes")
        self.estimated_at = None if state["estimated_at"] is None else whole_number(state, "estimated_at")
        if self.freshness is not None:
            self.freshness.load_state_dict(state["freshness"])


def whole_number(state: Mapping[str, Any], name: str) -> int:
    """A counter of a state.

    Raises:
        ValueError: it is something else; the message names it.
    """
    value = state[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}, not a whole number")
    return value


def number(state: Mapping[str, Any], name: str) -> float:
    """A value of a state.

    Raises:
        ValueError: it is something else; the message names it.
    """
    value = state[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r}, not a number")
    return float(value)


def _take_back(part: Any, state: Mapping[str, Any]) -> None:
    """Set the counters of a dataclass, each as the kind of number that it is."""
    kinds = {field.name: field.type for field in fields(part)}
    for name in part.state_dict():
        setattr(part, name, (number if kinds[name] == "float" else whole_number)(state, name))


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

    def state_dict(self) -> dict[str, float]:
        """The counters, as JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "config"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Args:
            state: counters by name.

        Raises:
            KeyError, TypeError, ValueError: a counter is missing, or is no number.
        """
        _take_back(self, state)


ROUNDING = 1e-12  # nats a response: predictions below this are of weights that have not moved


@dataclass
class DriftBudget:
    """Damped dual ascent on a bound of the drift, a PID controller of a Lagrange multiplier (Stooke et al. 2020).

    The bound is D ≤ D_max. As D grows with the square of ΔW, the controller works on the length √D, which grows about
    evenly: with x = √(D/D_max), smoothed over ``smooth`` updates, and its slope ẋ a step,

        e = clip(x − 1 + horizon·ẋ, −slack, 1),    log ν ← log ν + gain·e·steps,    μ = ν·pull(x).

    The slope looks ``horizon`` steps ahead, which damps: ν rises before the bound is crossed. Below the bound ν falls
    slower than it rises above it, so that a guard is not let go before the drift has begun. ν stays in [``low``, ``high``].

    pull(x) = clip(x⁴, 1, 2): just above the bound μ grows at once, for late in a run, when the rate is low, ν alone would
    come too late. Inside the bound the guard holds on with ν: a task that has stopped pushing outward gains nothing
    by being let go, and what is kept would be given away.

    D is the last measurement, times what the prediction ½ Σ tr(ΔWᵀFΔW) has grown by since, at most ``reach`` either way:
    a quadratic that has gone stale may be wrong by orders of magnitude and still says whether the update grows. Before
    the first measurement D is the prediction itself.

    An old quadratic sees less and less of where the update goes, a new one sees it all at once. So the alignment term
    is multiplied by ``scale`` too, which follows measured over predicted drift between estimates, and at a new estimate
    falls by what the prediction rises by: the term keeps its value, and μ need not run after the curvature.

    Attributes:
        max_drift: D_max in nats a response.
        strength: ν.
        multiplier: μ, on λ_A and λ_KL alike.
        scale: on λ_A alone.
        drift: last measurement, nats a response.
        predicted: the prediction at its weights, by the curvature of now, nats a response; 0 before the first.
        length: smoothed x.
        slope: smoothed ẋ.
        step: step of the last update, −1 before the first.
        gain: growth of log ν a step where e = 1.
        slack: most that e may be below 0.
        horizon: steps that the slope looks ahead.
        smooth: updates over which x and its slope are smoothed.
        reach: most that the prediction may change a measurement by, as a factor.
        trust: most that log ``scale`` may change by at a measurement.
        most: largest scale, and over one the least.
        low: least ν.
        high: largest ν.
    """

    max_drift: float
    strength: float = 1.0
    multiplier: float = 1.0
    scale: float = 1.0
    drift: float = 0.0
    predicted: float = 0.0
    length: float = 0.0
    slope: float = 0.0
    step: int = -1
    gain: float = 0.1
    slack: float = 0.25
    horizon: float = 5.0
    smooth: float = 2.0
    reach: float = 2.0
    trust: float = 0.5
    most: float = 100.0
    low: float = 1e-4
    high: float = 1e4

    def measured(self, drift: float, predicted: float) -> None:
        """Take a measurement in; where either is rounding, as at the start, it says nothing.

        Args:
            drift: measured, nats a response.
            predicted: ½ Σ tr(ΔWᵀFΔW) at the same weights, nats a response.
        """
        if not (drift > NOISE and predicted > ROUNDING):
            return
        if self.predicted > 0:
            stale = math.log(drift / predicted) - math.log(self.drift / self.predicted)
            self._rescale(math.exp(min(max(stale, -self.trust), self.trust)))
        self.drift, self.predicted = drift, predicted

    def renewed(self, before: float, after: float) -> None:
        """Go over to a new estimate of the curvature without a jump: the term keeps its value, D its present reading.

        Args:
            before: ½ Σ tr(ΔWᵀFΔW) by the old estimate, nats a response.
            after: the same by the new one, at the same weights.
        """
        if before > ROUNDING and after > ROUNDING:
            self._rescale(before / after)
            self.predicted *= after / before

    def _rescale(self, factor: float) -> None:
        self.scale = min(max(self.scale * factor, 1 / self.most), self.most)

    def present(self, predicted: float) -> float:
        """The drift of now in nats a response, from the prediction of now."""
        if self.predicted == 0:
            return max(predicted, 0.0)
        return self.drift * min(max(predicted / self.predicted, 1 / self.reach), self.reach)

    def update(self, step: int, predicted: float) -> float:
        """Read the predicted drift in nats a response before optimizer step ``step``; μ for that step."""
        passed = 1 if self.step < 0 or step < self.step else step - self.step  # a smaller one begins another run
        if passed <= 0:
            return self.multiplier
        length = math.sqrt(self.present(predicted) / self.max_drift)
        share = 1.0 if self.step < 0 else 1 - math.exp(-passed / self.smooth)
        smoothed = self.length + share * (length - self.length)
        slope = 0.0 if self.step < 0 else (smoothed - self.length) / passed
        self.slope += share * (slope - self.slope)
        self.length, self.step = smoothed, step
        error = min(max(smoothed - 1 + self.horizon * self.slope, -self.slack), 1.0)
        self.strength = min(max(self.strength * math.exp(self.gain * error * passed), self.low), self.high)
        self.multiplier = self.strength * min(max(smoothed**4, 1.0), 2.0)
        return self.multiplier

    def state_dict(self) -> dict[str, float]:
        """Everything, as JSON."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Args:
            state: all attributes by name.

        Raises:
            KeyError, TypeError, ValueError: an attribute is missing, or is no number.
        """
        _take_back(self, state)
