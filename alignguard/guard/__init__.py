"""The guard: curvature of the alignment data at the present weights, and the penalty that it puts on the update."""

from alignguard.guard.config import METRICS, GuardConfig, is_number
from alignguard.guard.curvature import curvatures
from alignguard.guard.guard import TERMS, Guard
from alignguard.guard.state import COUNTERS, FORMAT, load_guard, save_guard

__all__ = [
    "COUNTERS",
    "FORMAT",
    "METRICS",
    "TERMS",
    "Guard",
    "GuardConfig",
    "curvatures",
    "is_number",
    "load_guard",
    "save_guard",
]
