"""What people look at: drift believed and measured, numbers of a log line, spectra of the curvature."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from alignguard.guard.legs import CurvatureLeg
from alignguard.guard.schedule import NOISE, DriftBudget, Schedule, number

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

    def compare(self, predicted: float, measured: float, remedy: str | None = None) -> None:
        """Take in both at the same weights, and warn once if the prediction is too small by more than a factor of 3.

        Args:
            predicted: drift by the penalty's own quadratic, nats a response.
            measured: drift that was measured, nats a response.
            remedy: what to do about a blind prediction, for the warning; None where nothing was predicted that could be
                blind, as where the drift itself is read.

        Warns:
            UserWarning: the drift is past what the penalty believes; names both and the remedy.
        """
        self.predicted, self.measured = predicted, measured
        if remedy is not None and not self.warned and measured > SETTLED and measured > BLIND * predicted:
            self.warned = True
            warnings.warn(
                f"the model has drifted {measured:.2g} nats a response, and the guard predicts "
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
            setattr(self, name, None if state[name] is None else number(state, name))
        if not isinstance(state["warned"], bool):
            raise ValueError(f"warned is {state['warned']!r}, neither true nor false")
        self.warned = state["warned"]


class Report:
    """Reads what the parts of a guard have come to; nothing here changes what they do.

    Args:
        curvature: leg whose estimates are shown.
        schedule: counts the estimates, and knows the last drift measured.
        budget: its multiplier and scale are shown; None where there is no budget.
        gauge: its last comparison is shown.
        predicted: drift that the penalty believes in now, nats a response.
    """

    def __init__(
        self,
        curvature: CurvatureLeg,
        schedule: Schedule,
        budget: DriftBudget | None,
        gauge: DriftGauge,
        predicted: Callable[[], float],
    ) -> None:
        self.curvature, self.schedule, self.budget, self.gauge = curvature, schedule, budget, gauge
        self.predicted = predicted
        self._shown: tuple[int, dict[str, Tensor]] | None = None  # estimates so far, and the bases of the last one
        self._angle: float | None = None

    @torch.no_grad()
    def angle(self) -> float | None:
        """Mean principal angle in degrees to the estimate shown before, see :meth:`alignguard.Guard.angle`."""
        layers, count = self.curvature.layers, self.schedule.refreshes
        if layers and (self._shown is None or self._shown[0] != count):
            if self._shown is not None:
                angles = [layer.turned_from(self._shown[1][name]) for name, layer in layers.items()]
                self._angle = sum(angles) / len(angles)
            self._shown = count, {name: layer.projector.basis for name, layer in layers.items()}
        return self._angle

    def numbers(self) -> dict[str, float]:
        """What a log line shows beside the terms, see :meth:`alignguard.Guard.numbers`."""
        shown = {"cosine": self.curvature.cosine()} if self.curvature.charged else {}
        shown |= self.gauge.numbers()
        if (angle := self.angle()) is not None:
            shown["angle"] = angle
        if self.schedule.freshness is not None:
            shown |= {"drift_predicted": self.predicted(), "drift_measured": self.schedule.freshness.drift}
        if self.budget is not None:
            shown |= {"multiplier": self.budget.multiplier, "scale": self.budget.scale}
        return shown

    def spectra(self) -> dict[str, dict[str, Any]]:
        """Leading eigenvalues, trace, rank and share of energy of every layer."""
        return {name: layer.summary() for name, layer in self.curvature.layers.items()}
