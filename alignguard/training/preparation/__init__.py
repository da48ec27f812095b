"""Before a run: its own answers where they are to be kept, everything read and checked, and a rehearsal."""

from alignguard.training.preparation.answers import OwnAnswers, own_answers, packaged_prompts
from alignguard.training.preparation.prepared import Prepared, prepare
from alignguard.training.preparation.rehearsal import rehearse, warmup_steps

__all__ = ["OwnAnswers", "Prepared", "own_answers", "packaged_prompts", "prepare", "rehearse", "warmup_steps"]
