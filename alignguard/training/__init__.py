"""A guarded fine-tuning run: prepared, trained, saved, resumed."""

from alignguard.training.checkpoint import check_complete, latest_checkpoint
from alignguard.training.drift_callback import DriftCallback
from alignguard.training.dry_run import activation_bytes, plan_text, seconds_of_step
from alignguard.training.fisher_file import load_fisher, origin_path, write_fisher
from alignguard.training.hooks import Hooks
from alignguard.training.pictures import PictureCallback
from alignguard.training.preparation.answers import OwnAnswers, own_answers
from alignguard.training.preparation.late_guard import make_guard
from alignguard.training.preparation.prepared import Prepared, prepare
from alignguard.training.record import card_section, check_run, versions
from alignguard.training.run import FitResult, fit, train
from alignguard.training.settings import DEFAULT_TRAINING
from alignguard.training.trainer import GuardMixin, GuardSeq2SeqTrainer, GuardTrainer, honours_item_count

__all__ = [
    "DEFAULT_TRAINING",
    "DriftCallback",
    "FitResult",
    "GuardMixin",
    "GuardSeq2SeqTrainer",
    "GuardTrainer",
    "Hooks",
    "OwnAnswers",
    "PictureCallback",
    "Prepared",
    "activation_bytes",
    "card_section",
    "check_complete",
    "check_run",
    "fit",
    "honours_item_count",
    "latest_checkpoint",
    "load_fisher",
    "make_guard",
    "origin_path",
    "own_answers",
    "plan_text",
    "prepare",
    "seconds_of_step",
    "train",
    "versions",
    "write_fisher",
]
