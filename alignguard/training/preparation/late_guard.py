"""A guard on a model that another tool has loaded and adapted."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import torch

from alignguard.data import Source, check_fits, encode_source, pad_id
from alignguard.guard import Guard, GuardConfig
from alignguard.objective import model_kind
from alignguard.training.preparation.answers import own_answers
from alignguard.training.preparation.prepared import alignment_rows, stand_ins
from alignguard.training.preparation.rehearsal import PROBED

logger = logging.getLogger(__name__)


def make_guard(
    model: torch.nn.Module,
    tokenizer: Any,
    alignment_data: Source | None = None,
    config: GuardConfig | None = None,
    *,
    answers: str | Path | None = None,
    method: str = "lora",
    progress: bool = False,
) -> Guard:
    """The guard that :func:`alignguard.fit` would put on this model, for a trainer of someone else's.

    Args:
        model: a peft model before training; with ``method="full"`` any model.
        tokenizer: its tokenizer, or the processor that holds it.
        alignment_data: what to keep, as :func:`alignguard.fit` takes it: rows, prompts that the model answers first, or None
            for packaged prompts.
        config: strengths and schedule; the defaults if None.
        answers: file that keeps the model's own answers, so that they are given once; None keeps none.
        method: ``"lora"`` or ``"full"``.
        progress: show progress bars.

    Returns:
        Guard: not estimated yet; a trainer with :class:`~alignguard.GuardMixin` does that when its first step begins.

    Raises:
        FileNotFoundError, TypeError, ValueError: bad rows, or a model that is not understood.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from alignguard.embedded import data_path, model_path
        >>> from alignguard.loading import load_model
        >>> model, tokenizer = load_model(model_path())
        >>> model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        >>> guard = alignguard.make_guard(model, tokenizer, data_path("alignment"))
        >>> len(guard.updates.matrices), len(guard.rows)
        (4, 256)
    """
    config = config or GuardConfig()
    tokenizer, kind = getattr(tokenizer, "tokenizer", tokenizer), model_kind(model)
    kept, prompts = alignment_rows(alignment_data, tokenizer, kind, config.max_length)
    pad = pad_id(tokenizer)
    if prompts is not None:
        # What a guard would refuse, it refuses before minutes of answers.
        asked = stand_ins(prompts, tokenizer, kind, config.max_length)
        check_fits(model, asked, "alignment_data", pad)
        Guard(model, asked[:PROBED], config, pad, method)
        gc.collect()  # a guard stands in circles, and with it copies of the weights
        own = own_answers(model, tokenizer, prompts, path=answers, progress=progress)
        kept = encode_source(own.rows, "alignment_data", tokenizer, kind, config.max_length)
    check_fits(model, kept, "alignment_data", pad)
    for note in kept.notes:
        logger.warning("%s", note)
    return Guard(model, kept, config, pad_id(tokenizer), method)
