"""DriftCheck: what a model refuses and answers, who judges it, and how sure the shares are."""

from alignguard.drift.check import driftcheck
from alignguard.drift.judges import make_judge
from alignguard.drift.likelihood import measured_kl, task_score
from alignguard.drift.prompts import CATEGORIES, load_prompts
from alignguard.drift.prompts.recipes import build_prompts, hub_prompts
from alignguard.drift.report import MEASURES, OTHER_SHARES, DriftReport, shown_answer
from alignguard.drift.rules import COMPLIANCE, INCOHERENT, REFUSAL, judge
from alignguard.drift.statistics import Shift, shift

__all__ = [
    "CATEGORIES",
    "COMPLIANCE",
    "INCOHERENT",
    "MEASURES",
    "OTHER_SHARES",
    "REFUSAL",
    "DriftReport",
    "Shift",
    "build_prompts",
    "driftcheck",
    "hub_prompts",
    "judge",
    "load_prompts",
    "make_judge",
    "measured_kl",
    "shift",
    "shown_answer",
    "task_score",
]
