"""A guarded fine-tuning run: prepared, trained, saved, resumed."""

from alignguard.training.dry_run import plan_text, seconds_of_step
from alignguard.training.fisher_file import origin_path, write_fisher
from alignguard.training.record import versions
from alignguard.training.run import FitResult, fit, prepare
from alignguard.training.settings import DEFAULT_TRAINING
from alignguard.training.trainer import GuardMixin, GuardSeq2SeqTrainer, GuardTrainer

__all__ = [
    "DEFAULT_TRAINING",
    "FitResult",
    "GuardMixin",
    "GuardSeq2SeqTrainer",
    "GuardTrainer",
    "fit",
    "origin_path",
    "plan_text",
    "prepare",
    "seconds_of_step",
    "versions",
    "write_fisher",
]
