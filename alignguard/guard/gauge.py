"""What the guard believes the drift to be, beside what it is: a penalty that is blind must not go unnoticed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from alignguard.guard.schedule import NOISE

BLIND = 3.0  # measured over predicted drift from which the prediction is called blind
SETTLED = 0.1  # nats a response: a drift below this is harmless whatever was predicted


@dataclass
class DriftGauge:
    """The last measurement of drift and the guard's own prediction of it at the same weights.

    A prediction is of a quadratic made before, a measurement is KL(start ‖ present) on examples read for the first time
    since. Both are in nats a response, of the response tokens that were read.

    Attributes:
        predicted: drift that the penalty believed in; None before the first comparison.
        measured: drift that was there; None before the first comparison.
        warned: the warning has been given.
    """

    predicted: float | None = None
    measured: float | None = None
    warned: bool = False

    def compare(self, predicted: float, measured: float, remedy: str) -> None:
        """Take in both at the same weights, and warn once if the prediction is too small by more than a factor of 3.

        Args:
            predicted: drift by the penalty's own quadratic, nats a response.
            measured: drift that was measured, nats a response.
            remedy: what to do about a blind prediction, for the warning.

        Warns:
            UserWarning: the drift is past what the penalty believes; names both and the remedy.
        """
        self.predicted, self.measured = predicted, measured
        if not self.warned and measured > SETTLED and measured > BLIND * predicted:
            self.warned = True
            warnings.warn(
                f"the model has drifted {measured:.2g} nats a response, and the guard's curvature predicts "
                f"{predicted:.2g}: it does not see where this model moves. {remedy}",
                stacklevel=2,
            )

    @property
    def ratio(self) -> float | None:
        """Measured over predicted drift; None where nothing has been compared, or the drift is rounding."""
        if self.predicted is None or self.measured is None or max(self.predicted, self.measured) < NOISE:
            return None
        return self.measured / max(self.predicted, NOISE)

    def numbers(self) -> dict[str, float]:
        """``drift_predicted`` and ``drift_measured`` of the last comparison, empty before it."""
        if self.predicted is None or self.measured is None:
            return {}
        return {"drift_predicted": self.predicted, "drift_measured": self.measured}

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: a value is missing or no number.
        """
        for name in ("predicted", "measured"):
            setattr(self, name, None if state[name] is None else float(state[name]))
        self.warned = bool(state["warned"])
