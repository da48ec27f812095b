"""From what was prepared to a fine-tuned model: trained, saved atomically, resumed."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments, set_seed

from alignguard.data import Source, collator, pad_id, shown_row
from alignguard.files import OWN_ANSWERS, save_adapter, write_text
from alignguard.guard import Guard, GuardConfig
from alignguard.loading import settle
from alignguard.training.checkpoint import latest_checkpoint
from alignguard.training.hooks import Hooks, HookSeq2SeqTrainer, HookTrainer
from alignguard.training.preparation.prepared import Prepared, prepare
from alignguard.training.preparation.rehearsal import warmup_steps
from alignguard.training.record import RECORD, TARGETS, add_card_section, card_section, check_run, claim_run
from alignguard.training.settings import training_arguments
from alignguard.training.trainer import GuardSeq2SeqTrainer, GuardTrainer
from alignguard.updates import coverage_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """What a run left behind.

    Attributes:
        model: the peft model, or with ``method="full"`` the model, trained, in eval mode.
        guard: the guard, or None for a plain run.
        adapter_dir: folder of the adapter, whatever its name, loadable by ``PeftModel.from_pretrained``; of several active
            ones, whose sum was trained, each in a folder of its name inside. With ``method="full"`` folder of the whole
            model, loadable by ``from_pretrained``.
        history: the Trainer's log, a dict a logged step.
        step_seconds: wall time of each optimizer step, refreshes included.

    Examples:
        >>> result = alignguard.FitResult(None, None, "runs/fit/adapter", [], [3.0, 2.0, 1.0, 1.0])
        >>> result.step_time  # the first two are warm-up
        1.0
    """

    model: Any
    guard: Guard | None
    adapter_dir: Path
    history: list[dict[str, float]]
    step_seconds: list[float]

    @property
    def step_time(self) -> float:
        """Mean seconds an optimizer step took, refreshes included; the first two (warm-up) left out; NaN for none."""
        times = self.step_seconds[2:] or self.step_seconds
        return sum(times) / len(times) if times else math.nan


def train(
    ready: Prepared,
    output_dir: str | Path,
    rival: Hooks | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = False,
    verbose: bool = False,
    trained: str | Path | None = None,
) -> FitResult:
    """Train what :func:`prepare` made ready, and save it.

    Args:
        ready: prepared run; it serves once.
        output_dir: folder that receives ``adapter/`` (``model/`` for ``method="full"``), ``history.json``, ``run.json``
            and checkpoints.
        rival: method in the guard's place, of a run prepared with ``guarded=False``.
        overwrite: allow an output folder that holds something; what a run left there is removed, other files stay.
        resume: go on from the last complete checkpoint of the same run, or start if there is none.
        progress: show progress bars and the table of what is guarded.
        verbose: give every guarded matrix a line of that table, not every kind of layer.
        trained: folder of an adapter that these same arguments left without the rival; it is taken in place of
            training, and the rival acts on that.

    Returns:
        FitResult: model, guard, folder, log and step times.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError: the output folder cannot be had.
        ValueError: a rival beside a guard, a rival or a run without a checkpoint that is to be resumed, or settings that
            transformers refuses.
        FloatingPointError: NaN or infinity in the loss.
        OSError: saving failed; nothing half-written stays.
    """
    output, guard = Path(output_dir).expanduser(), ready.guard
    if rival is not None and guard is not None:
        raise ValueError("a rival trains in the guard's place; prepare the run with guarded=False")
    if rival is not None and resume:
        raise ValueError("checkpoints hold no state of a rival; leave out resume")
    target = output / TARGETS[ready.method]
    going_on = resume and (output / RECORD).is_file()
    found = latest_checkpoint(output / "checkpoints") if going_on else None
    if going_on and found is None and target.exists():
        raise ValueError(
            f"resume: {output} holds a finished run that kept no checkpoint to go on from (save_every); take another "
            "folder, or start anew with overwrite and without resume"
        )
    for note in (*ready.rows.notes, *ready.alignment.notes):
        logger.warning("%s", note)
    if progress:
        print(shown_row(ready.tokenizer, ready.rows, "task_data", ready.kind))
        if guard is not None:
            print(coverage_table(guard.coverage(), fold=not verbose))
    record = ready.record | ({} if rival is None else {"rival": rival.describe()})
    arguments = training_arguments(ready.kind, output / "checkpoints", ready.seed, ready.settings)
    start = None if trained is None else load_peft_weights(str(trained), device=str(arguments.device))
    arguments.warmup_steps = warmup_steps(arguments, ready.steps)
    with arguments.main_process_first(desc="output folder"):
        if arguments.process_index == 0:
            claim_run(output, record, overwrite=overwrite, resume=resume)
    history: list[dict[str, float]] = []
    seconds: list[float] = []
    if start is not None:
        ready.model.to(arguments.device)
        set_peft_model_state_dict(ready.model, start, adapter_name=ready.model.active_adapters[0])
    else:
        trainer = _trainer(ready, arguments, rival)
        if guard is not None and guard.uses_curvature and found is None and not guard.layers:
            guard.model.to(arguments.device)
            guard.refresh(progress=progress)
        set_seed(ready.seed)  # dropout and data order are the plain run's, whatever the guard or a rival drew
        before = _sizes(ready.model)
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
        if trainer.state.global_step and _sizes(ready.model) == before:
            logger.warning(
                "after %d steps every weight is what it was, so nothing was learned; look at the learning rate, and at "
                "the precision of what trains", trainer.state.global_step,
            )  # fmt: skip
        history, seconds = [entry for entry in trainer.state.log_history if "loss" in entry], trainer.step_seconds
    if rival is not None:
        rival.finish()
    ready.model.eval()
    files = {"alignguard_config.json": guard.config.to_json()} if guard is not None else None
    card = card_section(record, guard)  # it measures drift, which sharded models only can all together
    if arguments.process_index == 0:

        def finish(folder: Path) -> None:
            if isinstance(ready.model, PeftModel):
                settle(folder, list(ready.model.active_adapters))
            add_card_section(folder, card)
            if ready.method == "full":  # an adapter's is its base's
                ready.tokenizer.save_pretrained(str(folder))

        save_adapter(ready.model, target, files, finish)
        write_text(output / "history.json", json.dumps(history, indent=1))
    return FitResult(ready.model, guard, target, history, seconds)


def _sizes(model: Any) -> list[float]:
    """Sums that tell whether any weight has moved, without a copy of them."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in trained)
    return [float(tensor.double().abs().sum()) for tensor in whole]


def _trainer(ready: Prepared, arguments: TrainingArguments, rival: Hooks | None) -> Any:
    """The Trainer of a run; a rival has its start first."""
    collate = collator(pad_id(ready.tokenizer), ready.kind)
    shared: dict[str, Any] = {"model": ready.model, "args": arguments}
    if rival is None:
        kind = GuardSeq2SeqTrainer if ready.kind == "seq2seq" else GuardTrainer
        return kind(**shared, train_dataset=ready.rows, data_collator=collate, guard=ready.guard)

    def fetch(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rival.fetched(rows)
        return collate(rows)

    ready.model.to(arguments.device)
    rival.start()
    hooked = HookSeq2SeqTrainer if ready.kind == "seq2seq" else HookTrainer
    return hooked(**shared, train_dataset=rival.rows(ready.rows), data_collator=fetch, hooks=rival)


def fit(
    model: str | Path | PreTrainedModel | PeftModel,
    task_data: Source,
    alignment_data: Source | None = None,
    config: GuardConfig | None = None,
    output_dir: str | Path = "runs/fit",
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    lora: LoraConfig | Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    method: str = "lora",
    offload: str | None = None,
    guarded: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    save_every: int | None = None,
    fisher: str | Path | None = None,
    progress: bool = False,
    verbose: bool = False,
    max_length: int = 256,
    seed: int = 0,
) -> FitResult:
    """Fine-tune on task data while the guard keeps what alignment data shows.

    Everything is read and checked before anything is written or trained.

    Args:
        model: path, GGUF file, hub name, or a loaded model (then with ``tokenizer``): a causal LM, an encoder-decoder or a
            sequence classifier. A PeftModel keeps its adapter.
        task_data: what to learn: a file, folder, hub name, ``datasets`` object or iterable of rows with ``prompt`` and
            ``response``, ``messages``, or in Alpaca's, ShareGPT's or Dolly's form; for a classifier ``prompt`` and
            ``label``. :class:`alignguard.data.DataSource` maps columns and chooses a split or the turns learned from.
        alignment_data: what to keep, in the same forms: unsafe prompts with the refusals the model should still give.
            Prompts alone are answered by the model itself before training, and its refusals of unsafe ones and its
            answers to others are what is kept (:func:`alignguard.training.own_answers`); None takes packaged prompts.
        config: strengths of the guard; the defaults were chosen on a public chat model (docs/evidence.md).
        output_dir: receives ``adapter/`` (``model/`` for ``method="full"``), ``history.json``, ``run.json``, checkpoints,
            and the model's own answers where they are asked for.
        tokenizer: tokenizer of a loaded model; read with the model where that is a path or name, unless given, as a
            path or name too.
        trust_remote_code: run Python that comes with the model; without it such a model is refused, and nobody is asked.
        lora: a ``peft.LoraConfig`` or its fields; rank 8 on every Linear, and on experts, if left out. Not for a PeftModel.
        training: fields of ``transformers.TrainingArguments`` that replace the defaults.
        method: ``"lora"``, or ``"full"``: every weight trains, and every Linear but the output embedding is guarded
            by its dense ΔW = W − W0.
        offload: with ``"full"``, the device of the reference weights W0, ``"cpu"`` say; their weight's own if None.
        guarded: False trains plainly on the same data, seed and schedule.
        overwrite: allow an output folder that holds something; once all is checked, what a run left there is removed, its
            own answers to other prompts too, and other files stay.
        resume: go on from the last complete checkpoint of the same run in ``output_dir``, or start if there is none; with
            more steps than it had, a run is extended, finished or not.
        save_every: optimizer steps between checkpoints; the two latest are kept. None keeps none.
        fisher: file of ``alignguard fisher``, taken as the first curvature in place of an estimate.
        progress: show progress bars and the table of what is guarded.
        verbose: give every guarded matrix a line of that table, not every kind of layer.
        max_length: longest example in tokens.
        seed: seed of the adapter's start, of the data order and, where no ``config`` is given, of the guard; with one the
            guard's is ``config.seed``.

    Returns:
        FitResult: model, guard, folder, log and step times.

    Raises:
        FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError, TypeError, ValueError: bad input, named,
            before training.
        FloatingPointError: NaN or infinity in the loss.
        OSError: saving failed; nothing half-written stays.

    Examples:
        >>> import contextlib, io, tempfile
        >>> from alignguard.embedded import data_path, model_path
        >>> from alignguard.data import read_jsonl
        >>> with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        ...     result = alignguard.fit(
        ...         model_path(),
        ...         read_jsonl(data_path("task_train"))[:2],
        ...         read_jsonl(data_path("alignment"))[:2],
        ...         output_dir=folder + "/run",
        ...         training={"max_steps": 1},
        ...     )
        ...
        >>> result.adapter_dir.name, len(result.step_seconds)
        ('adapter', 1)
    """
    check_run(Path(output_dir), overwrite=overwrite, resume=resume, model=model, method=method)
    output = Path(output_dir).expanduser()
    going_on = resume and (output / RECORD).is_file()
    ready = prepare(
        model, task_data, alignment_data, config, tokenizer=tokenizer, trust_remote_code=trust_remote_code, lora=lora, training=training, method=method,
        offload=offload, guarded=guarded, progress=progress, max_length=max_length, seed=seed, save_every=save_every,
        fisher=fisher, answers=output / OWN_ANSWERS, overwrite=overwrite and not going_on,
    )  # fmt: skip
    return train(ready, output_dir, overwrite=overwrite, resume=resume, progress=progress, verbose=verbose)
