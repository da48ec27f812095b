"""What the Trainer, the optimizer, the schedule and the guard would find wrong once a run has begun, found before it."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.utils import is_liger_kernel_available

from alignguard.data import Examples, collator, pad_id
from alignguard.guard import Guard
from alignguard.objective import base_model
from alignguard.training.settings import DEFAULT_TRAINING, training_arguments
from alignguard.training.trainer import GuardSeq2SeqTrainer, GuardTrainer

logger = logging.getLogger(__name__)

PROBED = 2  # alignment examples that show whether the layers can be captured: one beside another


def rehearse(
    model: Any, tokenizer: Any, kind: str, rows: Examples, guard: Guard | None, settings: Mapping[str, Any], seed: int
) -> int:
    """Make everything that a run needs, use none of it, and leave nothing behind.

    Args:
        model: with its adapter; it is moved to the device of the run.
        tokenizer: its tokenizer.
        kind: see :func:`alignguard.objective.model_kind`.
        rows: encoded task examples.
        guard: or None for a plain run.
        settings: fields of TrainingArguments.
        seed: seed of the run.

    Returns:
        How many optimizer steps the run has.

    Raises:
        ValueError: settings that the Trainer, the optimizer or the schedule refuses or that need a package that is not
            there, a run without a step or with a rate that stays zero, frozen weights, or layers that cannot be captured.
    """
    _check_padding(model, tokenizer, kind, settings, guard)
    _check_smoothing(model, kind, settings)
    with tempfile.TemporaryDirectory() as folder, _environment_restored():
        arguments = training_arguments(kind, Path(folder), seed, settings)
        trainer_class = GuardSeq2SeqTrainer if kind == "seq2seq" else GuardTrainer
        try:
            trainer = trainer_class(
                model=model, args=arguments, train_dataset=rows, data_collator=collator(pad_id(tokenizer), kind)
            )
            if arguments.use_liger_kernel and not is_liger_kernel_available():
                raise ImportError("use_liger_kernel needs the package liger-kernel")
            loader = trainer.get_train_dataloader()
            steps = trainer.set_initial_training_values(arguments, loader)[-1] if len(loader) else 0
            schedule = _schedule(trainer, max(steps, 1))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # transformers and the packages below it have many kinds
            given = {name: value for name, value in settings.items() if DEFAULT_TRAINING.get(name) != value}
            raise ValueError(
                f"training: transformers' Trainer refuses this model with these settings "
                f"({' '.join(str(error).split())[:300]}); mend or leave out what it names of {given}"
            ) from error
    if not steps:
        raise ValueError(
            f"task_data: {len(rows)} rows make no batch of {arguments.per_device_train_batch_size}, since "
            "dataloader_drop_last leaves incomplete ones out, so nothing would train; give more rows or smaller batches"
        )
    if arguments.learning_rate == 0:
        logger.warning("training: learning_rate is 0, so nothing will move")
    elif isinstance(schedule, LambdaLR) and not any(schedule.lr_lambdas[0](step) > 0 for step in range(steps)):
        raise ValueError(
            f"training: in a run of {steps} {'step' if steps == 1 else 'steps'} the learning rate never rises above zero "
            f"(warmup_steps={settings.get('warmup_steps')}, lr_scheduler_type={str(settings['lr_scheduler_type'])!r}); "
            "take fewer warm-up steps or more steps"
        )
    if guard is not None:
        trainer.guard = guard
        trainer.check_guard()
        _check_capture(guard)
    return steps


@contextlib.contextmanager
def _environment_restored() -> Iterator[None]:
    """Variables that TrainingArguments sets for accelerate are those of the run to come, or of none."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _schedule(trainer: Any, steps: int) -> Any:
    """The run's schedule on the run's kind of optimizer, over one weight that stands for all of them."""
    arguments = trainer.args
    made, options = trainer.get_optimizer_cls_and_kwargs(arguments, trainer.model)
    weight = [torch.nn.Parameter(torch.zeros(1, 1, device=arguments.device))]
    own = {"params", "model", "optimizer_dict"} & set(options)  # these take the model itself and put hooks on it
    rehearsed = torch.optim.SGD(weight, lr=arguments.learning_rate)
    if not own and not is_optimizer_factory(made):
        rehearsed = made(weight, **options)
    return get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=rehearsed,
        num_warmup_steps=warmup_steps(arguments, steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )


def warmup_steps(arguments: Any, steps: int) -> int:
    """Warm-up steps of a run: a share of it is rounded up, as transformers does, and never the whole run."""
    wanted = arguments.get_warmup_steps(steps)
    return min(wanted, steps - 1) if arguments.warmup_steps < 1 else wanted


def _check_padding(model: Any, tokenizer: Any, kind: str, settings: Mapping[str, Any], guard: Guard | None) -> None:
    """A classifier finds the last token of each row by the pad id of its configuration."""
    if kind != "classification":
        return
    inner = base_model(model)
    theirs, ours = getattr(inner.config.get_text_config(), "pad_token_id", None), pad_id(tokenizer)
    largest = max(settings["per_device_train_batch_size"], 1 if guard is None else guard.config.batch_size)
    if theirs != ours and (theirs is not None or largest > 1):
        raise ValueError(
            f"model: its configuration has pad_token_id={theirs}, and rows are padded with the tokenizer's {ours}, so a "
            f"classifier would not find the end of a row; set model.config.pad_token_id = {ours}"
        )


def _check_smoothing(model: Any, kind: str, settings: Mapping[str, Any]) -> None:
    """The Trainer takes the labels away to smooth them. An encoder-decoder makes its decoder's input of them, and it is by a
    list of names that the Trainer knows a causal model, whose labels are those of the next token.
    """
    name = type(base_model(model)).__name__
    known = kind == "classification" or (kind == "causal" and name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if settings.get("label_smoothing_factor") and not known:
        raise ValueError(
            f"training: label_smoothing_factor does not work on a {name}, whose labels transformers' Trainer takes away "
            "unshifted; leave it out"
        )


def _check_capture(guard: Guard) -> None:
    """Capture the guarded layers once, on as few examples as show a fault."""
    if not guard.uses_curvature:
        return
    try:
        guard.curvature.estimate(guard.rows[:PROBED], 0)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError, KeyError, AttributeError) as error:
        raise ValueError(
            f"model: the guarded layers cannot be captured ({' '.join(str(error).split())[:600]}); leave the layers named "
            "unguarded with exclude, choose other target_modules, or guard by KL alone (lambda_kl=1, lambda_alignment=0)"
        ) from error
