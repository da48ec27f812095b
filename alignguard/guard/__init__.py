"""The guard: curvature of the alignment data at the present weights, and the penalty that it puts on the update."""

from alignguard.guard.config import METRICS, GuardConfig, is_number
from alignguard.guard.guard import TERMS, Guard
from alignguard.guard.layer_curvature import LayerCurvature, curvatures
from alignguard.guard.legs import CurvatureLeg, KLLeg, Leg
from alignguard.guard.reference import Reference
from alignguard.guard.rows import AlignmentRows
from alignguard.guard.schedule import DriftBudget, Freshness, Schedule
from alignguard.guard.state import COUNTERS, FORMAT, load_guard, save_guard
from alignguard.guard.terms import TermGroup

__all__ = [
    "COUNTERS",
    "FORMAT",
    "METRICS",
    "TERMS",
    "AlignmentRows",
    "CurvatureLeg",
    "DriftBudget",
    "Freshness",
    "Guard",
    "GuardConfig",
    "KLLeg",
    "LayerCurvature",
    "Leg",
    "Reference",
    "Schedule",
    "TermGroup",
    "curvatures",
    "is_number",
    "load_guard",
    "save_guard",
]
