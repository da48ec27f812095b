"""One rival trained on the guard's own Trainer: the same data, schedule, seed and adapter."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from alignguard.data import Source, encode_source, load_conversations, pad_id, pad_rows
from alignguard.files import claim_output, save_adapter, write_text
from alignguard.loading import adapt, load_model
from alignguard.objective import model_kind
from alignguard.training import DEFAULT_TRAINING, GuardTrainer
from studies.rivals.base import Encoded, Rival, Run


@dataclass(frozen=True)
class RivalResult:
    """What a rival's run left behind.

    Attributes:
        model: the peft model, in eval mode.
        adapter_dir: folder of its adapter.
        history: the Trainer's log, a dict a logged step.
        step_seconds: wall time of each optimizer step; what happens before and after training is not in it.
        examples_read: how often an alignment example was read, repeats included; replay may count the one batch that
            the data loader fetched ahead.
    """

    model: PeftModel
    adapter_dir: Path
    history: list[dict[str, float]]
    step_seconds: list[float]
    examples_read: int

    @property
    def step_time(self) -> float:
        """Mean seconds of an optimizer step, the first two left out; 0 where nothing was trained."""
        times = self.step_seconds[2:] or self.step_seconds
        return sum(times) / max(len(times), 1)


class _StepDone(TrainerCallback):
    def __init__(self, rival: Rival, run: Run) -> None:
        self.rival, self.run = rival, run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rival.step_done(self.run, state.global_step)


class RivalTrainer(GuardTrainer):
    """The guard's Trainer without a guard, and with a rival's hooks."""

    def __init__(self, *args: Any, rival: Rival, run: Run, **kwargs: Any) -> None:
        super().__init__(*args, guard=None, **kwargs)
        self.rival, self.run = rival, run
        self.add_callback(_StepDone(rival, run))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, and on an accumulation window's last micro-batch the rival's turn at the gradients."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.rival.gradients(self.run, self.state.global_step)
        return loss


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
    overwrite: bool = False,
    max_length: int = 256,
    seed: int = 0,
    trained: str | Path | None = None,
) -> RivalResult:
    """Fine-tune with LoRA under one rival; arguments and defaults are those of :func:`alignguard.fit`.

    Args:
        rival: a fresh one; an instance serves one run.
        model: path, hub name, or a loaded causal LM or encoder-decoder with its ``tokenizer``.
        task_data: what to learn.
        alignment_data: what to keep; None for rivals that do not read it.
        output_dir: receives ``adapter/`` and ``history.json``.
        tokenizer: of a loaded model.
        lora: a ``peft.LoraConfig`` or its fields.
        training: fields of ``transformers.TrainingArguments`` that replace the defaults.
        overwrite: allow an output folder that holds something.
        max_length: longest example in tokens.
        seed: of the adapter's start, the data order and the rival.
        trained: adapter that plain LoRA left with these very arguments. A rival that acts after training alone goes
            on from it, and nothing is trained.

    Returns:
        RivalResult: model, folder, log, step times and how many alignment examples were read.

    Raises:
        FileNotFoundError, FileExistsError, TypeError, ValueError: bad input, named, before training.
    """
    if rival.reads_alignment and alignment_data is None:
        raise ValueError(f"{rival.name} reads alignment examples; give alignment_data")
    if trained is not None and not rival.after_training():
        raise ValueError(f"{rival.name} acts while it trains, so it cannot go on from the adapter in trained={trained}")
    task = load_conversations(task_data, "task_data")
    alignment = load_conversations(alignment_data, "alignment_data") if alignment_data is not None else []
    settings = {**DEFAULT_TRAINING, **(training or {})}
    loaded, tokenizer = load_model(model, tokenizer)
    set_seed(seed)
    adapted = adapt(loaded, lora)
    pad, kind = pad_id(tokenizer), model_kind(adapted)
    rows, kept = (
        encode_source([{"messages": messages} for messages in read], name, tokenizer, kind, max_length) if read else []
        for read, name in ((task, "task_data"), (alignment, "alignment_data"))
    )
    random.Random(seed).shuffle(kept)
    output = claim_output(output_dir, overwrite)
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"), seed=seed, remove_unused_columns=False, **settings
    )
    adapted.to(arguments.device)
    run = Run(adapted, kept, pad, seed)

    def collator(batch: Sequence[Encoded]) -> dict[str, Any]:
        run.examples_read += sum(bool(row.get("replayed")) for row in batch)
        return pad_rows(batch, pad, kind)

    history: list[dict[str, float]] = []
    seconds: list[float] = []
    if trained is not None:
        set_peft_model_state_dict(adapted, load_peft_weights(str(trained), device=str(arguments.device)))
    else:
        rival.start(run)
        trainer = RivalTrainer(
            model=adapted,
            args=arguments,
            train_dataset=rival.rows(rows, run),
            data_collator=collator,
            rival=rival,
            run=run,
        )
        set_seed(seed)  # data order and dropout are the plain run's, whatever the rival drew
        trainer.train()
        history, seconds = [entry for entry in trainer.state.log_history if "loss" in entry], trainer.step_seconds
    rival.finish(run)
    adapted.eval()
    adapter_dir = save_adapter(adapted, output / "adapter")
    write_text(output / "history.json", json.dumps(history, indent=1))
    return RivalResult(adapted, adapter_dir, history, seconds, run.examples_read)
