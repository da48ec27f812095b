"""The legs of the penalty: each charges the update in a way of its own and keeps what it needs for that."""

from alignguard.guard.legs.base import Leg
from alignguard.guard.legs.curvature import CurvatureLeg
from alignguard.guard.legs.kl import KLLeg
from alignguard.guard.legs.optimizers import measures, metric_of

__all__ = ["CurvatureLeg", "KLLeg", "Leg", "measures", "metric_of"]
