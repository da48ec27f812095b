"""Fine-tuning that keeps what alignment put in: a Fisher guard for LoRA and full runs, and DriftCheck to measure what was lost."""

from alignguard.drift import DriftReport, driftcheck
from alignguard.guard import Guard, GuardConfig
from alignguard.training import (
    DriftCallback,
    FitResult,
    GuardMixin,
    GuardSeq2SeqTrainer,
    GuardTrainer,
    PictureCallback,
    fit,
    make_guard,
)

__all__ = [
    "DriftCallback",
    "DriftReport",
    "FitResult",
    "Guard",
    "GuardConfig",
    "GuardMixin",
    "GuardSeq2SeqTrainer",
    "GuardTrainer",
    "PictureCallback",
    "driftcheck",
    "fit",
    "make_guard",
]
