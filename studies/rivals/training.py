"""One rival trained by the guard's own pipeline: the same checks, data, schedule, seed and adapter."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from alignguard.data import Source, load_conversations, pad_id
from alignguard.training import FitResult, check_run, prepare, train
from studies.rivals.base import Encoded, Rival, Run
from studies.rivals.penalties import L2

EVERY_WEIGHT = (Rival, L2)  # what has a sense where every weight trains


@dataclass(frozen=True)
class RivalResult(FitResult):
    """What a rival's run left behind; there is no guard in it.

    Attributes:
        examples_read: alignment examples read, each reading counted; replay may count the one batch that the data
            loader fetched ahead.
    """

    examples_read: int = 0

    @property
    def step_time(self) -> float:
        """Mean seconds of an optimizer step, the first two left out; 0 where nothing was trained."""
        return super().step_time if self.step_seconds else 0.0


@dataclass(frozen=True)
class _Bound:
    """The hooks of a rival on the run that it serves."""

    rival: Rival
    run: Run

    def describe(self) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        if dataclasses.is_dataclass(self.rival):
            settings = {f.name: getattr(self.rival, f.name) for f in dataclasses.fields(self.rival) if f.init}
        plain = (str, int, float, type(None))  # a model is recorded by its name
        return {"name": self.rival.name} | {
            name: value if isinstance(value, plain) else str(getattr(value, "name_or_path", value))
            for name, value in settings.items()
        }

    def rows(self, task: Sequence[Encoded]) -> list[Encoded]:
        return self.rival.rows(task, self.run)

    def start(self) -> None:
        self.rival.start(self.run)

    def fetched(self, rows: Sequence[Encoded]) -> None:
        if any(row.get("unread") for row in rows):
            raise RuntimeError("the Trainer reads its rows in another order than was foreseen, some as they were left")
        self.run.examples_read += sum(bool(row.get("replayed")) for row in rows)

    def token_losses(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        return self.rival.token_losses(self.run, batch)

    def gradients(self, step: int) -> None:
        self.rival.gradients(self.run, step)

    def step_done(self, step: int) -> None:
        self.rival.step_done(self.run, step)

    def finish(self) -> None:
        self.rival.finish(self.run)


def train_rival(
    rival: Rival,
    model: str | Path | PreTrainedModel | PeftModel,
    task_data: Source,
    alignment_data: Source | None,
    output_dir: str | Path,
    *,
    tokenizer: Any = None,
    lora: LoraConfig | Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    method: str = "lora",
    overwrite: bool = False,
    max_length: int = 256,
    seed: int = 0,
    trained: str | Path | None = None,
) -> RivalResult:
    """Fine-tune under one rival; arguments and defaults are those of :func:`alignguard.fit`.

    Args:
        rival: new rival; an instance serves one run.
        model: path, hub name, or a loaded causal LM or encoder-decoder with its ``tokenizer``.
        task_data: what to learn.
        alignment_data: what to keep; None for rivals that do not read it.
        output_dir: folder that receives ``adapter/``, ``history.json`` and ``run.json``.
        tokenizer: tokenizer of a loaded model.
        lora: a ``peft.LoraConfig`` or its fields.
        training: fields of ``transformers.TrainingArguments`` that replace the defaults.
        method: ``"lora"``, or ``"full"``, in which plain fine-tuning and L2 have a sense.
        overwrite: allow an output folder that holds something.
        max_length: longest example in tokens.
        seed: seed of the adapter's start, the data order and the rival.
        trained: folder of the adapter that plain LoRA left with these same arguments. A rival that acts after training
            alone goes on from it, and nothing is trained.

    Returns:
        RivalResult: model, folder, log, step times and how many alignment examples were read.

    Raises:
        FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError, TypeError, ValueError: bad input, named,
            before training.
    """
    if rival.reads_alignment and alignment_data is None:
        raise ValueError(f"{rival.name} reads alignment examples; give alignment_data")
    if method == "full" and type(rival) not in EVERY_WEIGHT:
        named = ", ".join(kind.name for kind in EVERY_WEIGHT)
        raise ValueError(f'{rival.name} acts on an adapter; with method="full" there are {named}')
    if trained is not None and not rival.after_training():
        raise ValueError(f"{rival.name} acts while it trains, so it cannot go on from the adapter in trained={trained}")
    check_run(Path(output_dir), overwrite=overwrite)
    ready = prepare(
        model, task_data, alignment_data, tokenizer=tokenizer, lora=lora, training=training, method=method, guarded=False,
        read_alignment=alignment_data is not None, max_length=max_length, seed=seed,
        adapter=None if type(rival).adapter is Rival.adapter else rival.adapter,
    )  # fmt: skip
    kept: list[Encoded] = list(ready.alignment)
    random.Random(seed).shuffle(kept)
    told = load_conversations(task_data, "task_data") if rival.reads_text else []
    read = _places_read(len(ready.rows), ready.settings, seed)
    run = Run(ready.model, kept, pad_id(ready.tokenizer), seed, 0, ready.tokenizer, told, max_length, read)
    result = train(ready, output_dir, _Bound(rival, run), overwrite=overwrite, trained=trained)
    shared = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return RivalResult(**shared, examples_read=run.examples_read)


def _places_read(count: int, settings: Mapping[str, Any], seed: int) -> frozenset[int] | None:
    """Places of the rows that a run of these TrainingArguments reads; None if it comes to read all of them.

    The order is that of accelerate's seeded sampler in its first epoch; the data loader fetches one batch ahead.
    """
    batch = settings.get("per_device_train_batch_size", 8)
    rows = settings.get("max_steps", -1) * settings.get("gradient_accumulation_steps", 1) * batch + batch
    if not 0 < rows < count:
        return None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.get("data_seed") or seed))
    return frozenset(order[:rows].tolist())
