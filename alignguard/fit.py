"""One call from data to a guarded adapter: load, check everything, train, save atomically."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments, set_seed

from alignguard.config import GuardConfig
from alignguard.data import Source, collate, encode_messages, load_conversations, pad_id
from alignguard.files import write_text
from alignguard.guard import Guard
from alignguard.trainer import GuardTrainer

DEFAULT_LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
DEFAULT_TRAINING: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "logging_steps": 5,
    "weight_decay": 0.0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@dataclass(frozen=True)
class FitResult:
    """What a run left behind.

    Attributes:
        model: the peft model, trained, in eval mode.
        guard: the guard, or None for a plain run.
        adapter_dir: folder of the adapter, loadable by ``PeftModel.from_pretrained``.
        history: the Trainer's log, a dict a logged step.
        step_seconds: wall time of each optimizer step, refreshes included.
    """

    model: PeftModel
    guard: Guard | None
    adapter_dir: Path
    history: list[dict[str, float]]
    step_seconds: list[float]

    @property
    def step_time(self) -> float:
        """Mean seconds an optimizer step took, refreshes included; the first two steps (warm-up) are left out."""
        times = self.step_seconds[2:] or self.step_seconds
        return sum(times) / len(times)


def claim_output(output_dir: str | Path, overwrite: bool = False) -> Path:
    """Make the output folder, refusing to touch what is there.

    Raises:
        FileExistsError: the folder holds something and ``overwrite`` is false.
        NotADirectoryError: a file stands at that path.
        PermissionError: the folder cannot be written.
    """
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"output_dir {path} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"output_dir {path} is not empty; choose another or allow overwriting (--overwrite)")
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(f"output_dir {path} cannot be written")
    return path


def save_adapter(model: PeftModel, target: Path, extra: Mapping[str, str] | None = None) -> Path:
    """Save an adapter whole or not at all: written beside its place, then moved there.

    Raises:
        OSError: the disk is full or not writable; the message names the folder.
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        model.save_pretrained(str(temporary), safe_serialization=True)
        for name, text in (extra or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk as its own error, with the system's words in it
        if isinstance(error, OSError) or "space left" in str(error):
            raise _save_error(target, error) from error
        raise
    return target


def _save_error(path: Path, error: Exception) -> OSError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "space left" in str(error)
    what = "no space is left on the disk" if full else str(error)
    return OSError(getattr(error, "errno", None) or errno.EIO, f"cannot write {path}: {what}")


def load_model(model: str | Path | PreTrainedModel | PeftModel, tokenizer: Any = None) -> tuple[Any, Any]:
    """A causal LM in float32 or its own precision on an accelerator, and its tokenizer.

    Raises:
        FileNotFoundError: a local path that is not there.
        ValueError: a model object without a tokenizer.
    """
    if isinstance(model, (str, Path)):
        path = str(model)
        if (path.startswith((".", "/", "~")) or isinstance(model, Path)) and not Path(path).expanduser().is_dir():
            raise FileNotFoundError(f"model: no such folder: {path}")
        # half precision on a processor is slow and coarse; on an accelerator the checkpoint's own dtype stays
        dtype = "auto" if torch.cuda.is_available() else torch.float32
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return loaded, tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(path)
    if tokenizer is None:
        raise ValueError("give a tokenizer along with a model object")
    return model, tokenizer


def adapt(model: Any, lora: LoraConfig | Mapping[str, Any] | None = None) -> PeftModel:
    """The model with a fresh LoRA adapter, or as it is when it has one.

    Raises:
        ValueError: target modules that match nothing.
    """
    if isinstance(model, PeftModel):
        return model
    config = (
        lora
        if isinstance(lora, LoraConfig)
        else LoraConfig(**{**DEFAULT_LORA, "task_type": "CAUSAL_LM", **(lora or {})})
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        linears = sorted(
            {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        )
        raise ValueError(
            f"target_modules={config.target_modules!r} cannot be adapted ({error}); the model's Linear modules end in {linears}"
        ) from error


def fit(
    model: str | Path | PreTrainedModel | PeftModel,
    task_data: Source,
    alignment_data: Source | None,
    config: GuardConfig | None = None,
    output_dir: str | Path = "runs/fit",
    *,
    tokenizer: Any = None,
    lora: LoraConfig | Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    guarded: bool = True,
    overwrite: bool = False,
    progress: bool = False,
    max_length: int = 256,
    seed: int = 0,
) -> FitResult:
    """Fine-tune with LoRA on task data while the guard keeps what alignment data shows.

    Everything is read and checked before anything is written or trained.

    Args:
        model: path, hub name, or a loaded causal LM (then with ``tokenizer``); a PeftModel keeps its adapter.
        task_data: what to learn: path of .jsonl or .csv, a ``datasets.Dataset`` or an iterable of rows with
            ``prompt`` and ``response``, or ``messages``.
        alignment_data: what to keep, in the same forms: unsafe prompts with the refusals the model should still give.
            May be None for a plain run.
        config: strengths of the guard; the defaults need no tuning on the embedded model.
        output_dir: receives ``adapter/`` and ``history.json``.
        lora: a ``peft.LoraConfig`` or its fields; rank 8 on every Linear if left out.
        training: fields of ``transformers.TrainingArguments`` that replace the defaults.
        guarded: False trains plain LoRA on the same data, seed and schedule.
        overwrite: allow an output folder that holds something.
        progress: show progress bars.
        max_length: longest example in tokens.
        seed: of the adapter's start, the data order and the guard.

    Raises:
        FileNotFoundError, FileExistsError, TypeError, ValueError: bad input, named, before training.
        FloatingPointError: NaN or infinity in the loss.
        OSError: saving failed; nothing half-written stays.
    """
    config = config or GuardConfig(seed=seed)
    task = load_conversations(task_data, "task_data")
    if guarded and alignment_data is None:
        raise ValueError("alignment_data is missing; give prompts with the answers to keep, or guarded=False")
    alignment = load_conversations(alignment_data, "alignment_data") if guarded and alignment_data is not None else []
    settings = {**DEFAULT_TRAINING, "disable_tqdm": not progress, **(training or {})}
    if unknown := sorted(set(settings) - set(TrainingArguments.__dataclass_fields__)):
        raise ValueError(f"training: unknown fields {unknown}; see transformers.TrainingArguments")
    loaded, tokenizer = load_model(model, tokenizer)
    set_seed(seed)
    adapted = adapt(loaded, lora)
    pad = pad_id(tokenizer)
    rows = [encode_messages(tokenizer, messages, max_length) for messages in task]
    kept = [encode_messages(tokenizer, messages, config.max_length) for messages in alignment]
    guard = Guard(adapted, kept, config, pad) if guarded else None
    output = claim_output(output_dir, overwrite)
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"), seed=seed, remove_unused_columns=False, **settings
    )
    trainer = GuardTrainer(
        model=adapted, args=arguments, train_dataset=rows, data_collator=lambda batch: collate(batch, pad), guard=guard
    )
    if guard is not None and guard.uses_curvature:
        guard.model.to(arguments.device)
        guard.refresh(progress=progress)
    set_seed(seed)  # dropout and data order are the plain run's, whatever the guard drew
    trainer.train()
    adapted.eval()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    adapter_dir = save_adapter(
        adapted, output / "adapter", {"alignguard_config.json": config.to_json()} if guarded else None
    )
    write_text(output / "history.json", json.dumps(history, indent=1))
    return FitResult(adapted, guard, adapter_dir, history, trainer.step_seconds)
