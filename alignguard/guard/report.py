"""What people look at: numbers of a log line, and spectra of the curvature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignguard.guard.gauge import DriftGauge
from alignguard.guard.legs import CurvatureLeg
from alignguard.guard.schedule import DriftBudget, Schedule


class Report:
    """Reads what the parts of a guard have come to; nothing here changes what they do.

    Args:
        curvature: leg whose estimates are shown.
        schedule: counts the estimates, and knows the last drift measured.
        budget: its multiplier and scale are shown; None where there is no budget.
        gauge: its last comparison is shown.
    """

    def __init__(
        self, curvature: CurvatureLeg, schedule: Schedule, budget: DriftBudget | None, gauge: DriftGauge
    ) -> None:
        self.curvature, self.schedule, self.budget, self.gauge = curvature, schedule, budget, gauge
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
        shown = {"cosine": self.curvature.cosine()} | self.gauge.numbers()
        if (angle := self.angle()) is not None:
            shown["angle"] = angle
        if self.schedule.freshness is not None:
            shown |= {"drift_predicted": self.curvature.drift(), "drift_measured": self.schedule.freshness.drift}
        if self.budget is not None:
            shown |= {"multiplier": self.budget.multiplier, "scale": self.budget.scale}
        return shown

    def spectra(self) -> dict[str, dict[str, Any]]:
        """Leading eigenvalues, trace, rank and share of energy of every layer."""
        return {name: layer.summary() for name, layer in self.curvature.layers.items()}
