"""DriftCheck: what a model refuses and answers, who judges it, and how sure the shares are."""

from alignguard.drift.check import driftcheck
from alignguard.drift.endpoint import Endpoint, driftcheck_endpoint
from alignguard.drift.generation import PromptBatch, answer_batch, plan_batches, room_for_prompt
from alignguard.drift.generation import fingerprint as answers_fingerprint
from alignguard.drift.judges import JUDGES, ChatJudge, ClassifierJudge, PublishedJudge, make_judge
from alignguard.drift.likelihood import measured_kl, task_score
from alignguard.drift.prompts import CATEGORIES, load_prompts, prompts_of, spaced
from alignguard.drift.prompts.recipes import build_prompts
from alignguard.drift.report import MEASURES, OTHER_SHARES, DriftReport, DriftRow, shown_answer
from alignguard.drift.rules import COMPLIANCE, INCOHERENT, REFUSAL, answer_of, is_right, judge
from alignguard.drift.statistics import Estimate, check_confidence, cohen_kappa, finite_values, paired, share_of

__all__ = [
    "CATEGORIES",
    "COMPLIANCE",
    "INCOHERENT",
    "JUDGES",
    "MEASURES",
    "OTHER_SHARES",
    "REFUSAL",
    "ChatJudge",
    "ClassifierJudge",
    "DriftReport",
    "DriftRow",
    "Endpoint",
    "Estimate",
    "PromptBatch",
    "PublishedJudge",
    "answer_batch",
    "answer_of",
    "answers_fingerprint",
    "build_prompts",
    "check_confidence",
    "cohen_kappa",
    "driftcheck",
    "driftcheck_endpoint",
    "finite_values",
    "is_right",
    "judge",
    "load_prompts",
    "make_judge",
    "measured_kl",
    "paired",
    "plan_batches",
    "prompts_of",
    "room_for_prompt",
    "share_of",
    "shown_answer",
    "spaced",
    "task_score",
]
