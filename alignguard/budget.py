"""The drift budget: one factor on the guard's strengths, found while training instead of swept."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass
class DriftBudget:
    """Damped dual ascent on a bound of the drift, a PID controller of a Lagrange multiplier (Stooke et al. 2020).

    The bound is D ≤ D_max. As D grows with the square of ΔW, the controller works on the length √D, which grows about
    evenly: with x = √(D/D_max), smoothed over ``smooth`` updates, and its slope ẋ a step,

        e = clip(x − 1 + horizon·ẋ, −1, 1),    log μ ← log μ + gain·e·steps.

    The slope looks ``horizon`` steps ahead, which damps: μ rises before the bound is crossed. μ stays in
    [``low``, ``high``], so that nothing winds up while the bound is far.

    D is the predicted ½ Σ tr(ΔWᵀFΔW), times ``correction``, the ratio of measured to predicted drift, followed in
    logarithms with weight ``trust`` for each new measurement.

    Attributes:
        max_drift: D_max in nats a response.
        multiplier: μ, on λ_A and λ_KL alike.
        correction: measured over predicted drift.
        length: smoothed x.
        slope: smoothed ẋ.
        step: of the last update, −1 before the first.
        gain: growth of log μ a step where e = 1.
        horizon: steps that the slope looks ahead.
        smooth: updates over which x and its slope are smoothed.
        trust: weight of each new measurement in the correction, in [0, 1].
        low: least μ.
        high: largest μ.
    """

    max_drift: float
    multiplier: float = 1.0
    correction: float = 1.0
    length: float = 0.0
    slope: float = 0.0
    step: int = -1
    gain: float = 0.3
    horizon: float = 10.0
    smooth: float = 5.0
    trust: float = 0.5
    low: float = 1e-2
    high: float = 1e4

    def measured(self, drift: float, predicted: float) -> None:
        """Correct the prediction by a measurement; one that is zero or less, as at the start, says nothing.

        Args:
            drift: measured, nats a response.
            predicted: ½ Σ tr(ΔWᵀFΔW) at the same weights, uncorrected, nats a response.
        """
        if drift > 0 and predicted > 0:
            ratio = min(max(drift / predicted, 1e-2), 1e2)
            self.correction = math.exp((1 - self.trust) * math.log(self.correction) + self.trust * math.log(ratio))

    def update(self, step: int, predicted: float) -> float:
        """Read the predicted drift, uncorrected, in nats a response, before optimizer step ``step``; μ for that step."""
        passed = 1 if self.step < 0 else step - self.step
        if passed <= 0:
            return self.multiplier
        length = math.sqrt(max(self.correction * predicted, 0.0) / self.max_drift)
        share = 1.0 if self.step < 0 else 1 - math.exp(-passed / self.smooth)
        smoothed = self.length + share * (length - self.length)
        slope = 0.0 if self.step < 0 else (smoothed - self.length) / passed
        self.slope += share * (slope - self.slope)
        self.length, self.step = smoothed, step
        error = min(max(smoothed - 1 + self.horizon * self.slope, -1.0), 1.0)
        self.multiplier = min(max(self.multiplier * math.exp(self.gain * error * passed), self.low), self.high)
        return self.multiplier

    def state(self) -> dict[str, float]:
        """Everything, as JSON."""
        return asdict(self)
