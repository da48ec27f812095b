"""The Trainer's settings of a run: defaults, what is given in their place, and what is wrong with that."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from alignguard.guard import is_number

DEFAULT_TRAINING: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.05,  # of the run
    "logging_steps": 5,
    "weight_decay": 0.0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}

FULL_RATE = 2e-5  # learning rate where every weight trains

OWN = {
    "output_dir": "output_dir",
    "seed": "seed",
    "resume_from_checkpoint": "resume",
    "remove_unused_columns": None,
}  # set by fit, and its name for them


# Of evaluation during training, which fit does not do, and of scripts that parse these arguments: given, they would not act.
IDLE = re.compile(
    r"eval_\w+|do_\w+|\w+_eval|(bf16|fp16)_full_eval|per_device_eval_batch_size|load_best_model_at_end|"
    r"metric_for_best_model|greater_is_better|batch_eval_metrics|prediction_loss_only|include_for_metrics|label_names"
)

HUB = re.compile(r"push_to_hub\w*|hub_\w+")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


Check = tuple[Callable[[Any], bool], str]

NEVER: Check = (lambda v: v is False, "False, or a resumed run would not be the run that was stopped")

AT_LEAST_ONE: Check = (lambda v: _whole(v) and v >= 1, "a whole number of at least 1")

AT_LEAST_ZERO: Check = (lambda v: is_number(v) and v >= 0, "a finite number of at least 0")

POSITIVE: Check = (lambda v: is_number(v) and v > 0, "a finite number above 0")

CHECKS: dict[str, Check] = {
    "learning_rate": AT_LEAST_ZERO,
    "weight_decay": AT_LEAST_ZERO,
    "max_grad_norm": AT_LEAST_ZERO,
    "warmup_steps": AT_LEAST_ZERO,
    "label_smoothing_factor": (lambda v: is_number(v) and 0 <= v < 1, "a number of at least 0 and below 1"),
    "num_train_epochs": POSITIVE,
    "max_steps": (lambda v: _whole(v) and (v >= 1 or v == -1), "a whole number of at least 1, or -1 for none"),
    "per_device_train_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "save_only_model": NEVER,  # its checkpoints lack optimizer, schedule and random state, and the Trainer begins those anew
    "ignore_data_skip": NEVER,  # the first rows would be read again
    "save_total_limit": (lambda v: v is None or (_whole(v) and v >= 1), "a whole number of at least 1, or None"),
}


def run_settings(
    method: str, training: Mapping[str, Any] | None, save_every: int | None, progress: bool
) -> dict[str, Any]:
    """Fields of ``transformers.TrainingArguments`` of a run.

    Args:
        method: ``"lora"`` or ``"full"``, which decides the default learning rate.
        training: fields that replace the defaults.
        save_every: optimizer steps between checkpoints; None keeps none.
        progress: show the Trainer's bar.

    Raises:
        TypeError, ValueError: an unknown field, one that :func:`alignguard.fit` sets itself or that would not act beside
            the others, or a value out of range; named.
    """
    if training is not None and not isinstance(training, Mapping):
        raise TypeError(f"training must map fields of transformers.TrainingArguments to values, not {training!r}")
    given = dict(training or {})
    settings = {**DEFAULT_TRAINING, "disable_tqdm": not progress}
    if method == "full":
        settings["learning_rate"] = FULL_RATE
    if save_every is not None:
        if not AT_LEAST_ONE[0](save_every):
            raise ValueError(f"save_every must be a whole number of steps, at least 1, not {save_every!r}")
        settings |= {"save_strategy": "steps", "save_steps": save_every, "save_total_limit": 2}
        if twice := sorted({"save_strategy", "save_steps"} & set(given)):
            raise ValueError(f"training: {twice[0]} is what save_every sets; leave one of them out")
    if unknown := sorted(set(map(str, given)) - set(TrainingArguments.__dataclass_fields__)):
        raise ValueError(f"training: unknown fields {unknown}; see transformers.TrainingArguments")
    if taken := sorted(set(given) & set(OWN)):
        instead = OWN[taken[0]]
        raise ValueError(
            f"training: {taken[0]} is set by fit; " + (f"give {instead}= to it" if instead else "leave it out")
        )
    for name, value in given.items():
        if IDLE.fullmatch(name):
            raise ValueError(
                f"training: {name} does not act here, where nothing is evaluated during training (no eval_dataset); leave "
                "it out, and measure with alignguard driftcheck"
            )
        if HUB.fullmatch(name):
            raise ValueError(
                f"training: {name} does not act here, where what was trained is written after the Trainer is done; leave it out, "
                "and upload the run's adapter or model folder afterwards (hf upload)"
            )
        holds, words = CHECKS.get(name, (lambda v: True, ""))
        if not holds(value):
            raise ValueError(f"training: {name} must be {words}, not {value!r}")
    if given.get("fp16") and (given.get("use_cpu") or not torch.accelerator.is_available()):
        raise ValueError("training: fp16 does not act on a processor; leave it out, or give bf16")
    settings |= given
    if settings["save_strategy"] == "no" and (idle := sorted({"save_steps", "save_total_limit"} & set(given))):
        raise ValueError(
            f"training: {idle[0]} does not act where no checkpoint is kept; give save_every (--save-every)"
        )
    return settings


def training_arguments(kind: str, output_dir: Path, seed: int, settings: Mapping[str, Any]) -> TrainingArguments:
    """The Trainer's arguments; nothing is written.

    Raises:
        ValueError: what transformers finds wrong with them.
    """
    arguments = Seq2SeqTrainingArguments if kind == "seq2seq" else TrainingArguments
    if not torch.accelerator.is_available():  # or transformers asks for it, of bf16 alone
        settings = {"use_cpu": True, **settings}
    try:
        made = arguments(output_dir=str(output_dir), seed=seed, remove_unused_columns=False, **settings)
        for integration in get_reporting_integration_callbacks(made.report_to):
            integration()  # as the Trainer will, too late
        return made
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"training: transformers.TrainingArguments refuses these settings ({' '.join(str(error).split())[:300]})"
        ) from error
