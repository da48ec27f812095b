"""Fine-tuning that keeps what alignment put in: a Fisher guard for LoRA and full runs, and DriftCheck to measure what was lost."""

from alignguard.fit import FitResult, fit
from alignguard.guard import Guard, GuardConfig
from alignguard.trainer import GuardMixin, GuardSeq2SeqTrainer, GuardTrainer

__all__ = ["FitResult", "Guard", "GuardConfig", "GuardMixin", "GuardSeq2SeqTrainer", "GuardTrainer", "fit"]
