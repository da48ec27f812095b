"""From data to a fine-tuned model in two steps: read and check everything, then train and save atomically."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments, set_seed

from alignguard.data import (
    Examples,
    Source,
    as_source,
    check_fits,
    collator,
    encode_source,
    pad_id,
    prompts_alone,
    shown_row,
)
from alignguard.files import OWN_ANSWERS, save_adapter, write_text
from alignguard.guard import Guard, GuardConfig
from alignguard.loading import adapt, check_device, kind_of, load_tokenizer, load_weights
from alignguard.training.answers import OwnAnswers, own_answers, packaged_prompts
from alignguard.training.checkpoint import latest_checkpoint
from alignguard.training.fisher_file import load_fisher
from alignguard.training.hooks import Hooks, HookSeq2SeqTrainer, HookTrainer
from alignguard.training.record import add_card_section, card_section, check_run, claim_run, record_of
from alignguard.training.settings import run_settings, training_arguments
from alignguard.training.trainer import GuardSeq2SeqTrainer, GuardTrainer
from alignguard.updates import METHODS, coverage_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """What a run left behind.

    Attributes:
        model: the peft model, or with ``method="full"`` the model, trained, in eval mode.
        guard: the guard, or None for a plain run.
        adapter_dir: folder of the adapter, loadable by ``PeftModel.from_pretrained``; with ``method="full"`` of the
            whole model, loadable by ``from_pretrained``.
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


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs, read and checked, with nothing written yet.

    Attributes:
        model: with its adapter, or whose weights train.
        tokenizer: its tokenizer.
        kind: ``"causal"``, ``"seq2seq"`` or ``"classification"``.
        rows: encoded task examples.
        alignment: encoded alignment examples; empty for a plain run that reads none.
        guard: on the model at its start, without curvature yet; None for a plain run.
        settings: fields of TrainingArguments.
        method: ``"lora"`` or ``"full"``.
        seed: seed of the adapter's start, the data order and the guard.
        record: what the run is, for resuming.
    """

    model: Any
    tokenizer: Any
    kind: str
    rows: Examples
    alignment: Examples
    guard: Guard | None
    settings: dict[str, Any]
    method: str
    seed: int
    record: dict[str, Any]


def prepare(
    model: str | Path | PreTrainedModel | PeftModel,
    task_data: Source,
    alignment_data: Source | None = None,
    config: GuardConfig | None = None,
    *,
    tokenizer: Any = None,
    lora: LoraConfig | Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    method: str = "lora",
    offload: str | None = None,
    guarded: bool = True,
    read_alignment: bool = False,
    progress: bool = False,
    max_length: int = 256,
    seed: int = 0,
    save_every: int | None = None,
    fisher: str | Path | None = None,
    answers: str | Path | None = None,
    most_prompts: int | None = None,
) -> Prepared:
    """Read and check what a run is given; nothing is written but the model's own answers, where they are asked for.

    Args:
        model: path, hub name or loaded model, as :func:`alignguard.fit` takes it, like every argument of the same name.
        task_data: what to learn.
        alignment_data: what to keep: rows, or prompts that the model itself answers first; None for packaged prompts.
        config: strengths of the guard.
        tokenizer: tokenizer of a loaded model.
        lora: a ``peft.LoraConfig`` or its fields.
        training: fields of ``transformers.TrainingArguments``.
        method: ``"lora"`` or ``"full"``.
        offload: device of the reference weights.
        guarded: False prepares a plain run.
        read_alignment: read ``alignment_data`` without a guard too, for a method that :func:`train` is given in its
            place; up to ``max_length`` tokens each.
        progress: show progress bars.
        max_length: longest example in tokens.
        seed: seed of the adapter's start, the data order and the guard.
        save_every: optimizer steps between checkpoints; None keeps none.
        fisher: file of ``alignguard fisher``.
        answers: file that keeps the model's own answers as they come, so that they are given once; None keeps none.
        most_prompts: prompts that are answered at most, for a look at a run; None answers all.

    Returns:
        Prepared: model with its adapter, encoded rows, guard and settings, for :func:`train`.

    Raises:
        FileNotFoundError, TypeError, ValueError: bad input, named.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, not {seed!r}")
    config = config or GuardConfig(seed=seed)
    if not isinstance(config, GuardConfig):
        raise TypeError(f"config must be an alignguard.GuardConfig, not {config!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, not {method!r}")
    if method == "full" and lora:
        raise ValueError('method="full" trains every weight; leave out lora')
    if fisher is not None and not guarded:
        raise ValueError("fisher is the guard's first curvature; leave it out of a run without the guard")
    if guarded and (idle := config.unread()):
        raise ValueError(
            f"{', '.join(idle)}: set, and no term reads the Fisher; give lambda_alignment too, or start from "
            "GuardConfig.curvature() (--preset curvature)"
        )
    if fisher is not None and not (config.lambda_alignment or config.lambda_task or config.lambda_collision):
        raise ValueError(
            "fisher is given, and no term reads it; give lambda_alignment too, or start from GuardConfig.curvature() "
            "(--preset curvature)"
        )
    if fisher is not None and config.noise_edge:
        raise ValueError("noise_edge counts the tokens of the guard's own estimates; leave out fisher, or noise_edge")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(f"max_length must be a whole number of tokens, at least 2, not {max_length!r}")
    if offload is not None:
        check_device("offload", offload)
    settings = run_settings(method, training, save_every, progress)
    # What is quickly read is checked before weights are, which may take minutes.
    kind, tokenizer = kind_of(model), load_tokenizer(model, tokenizer)
    rows = encode_source(task_data, "task_data", tokenizer, kind, max_length)
    kept, longest = Examples(), config.max_length if guarded else max_length
    asked: list[dict[str, str]] | None = None
    if guarded or read_alignment:
        kept, asked = _alignment(alignment_data, tokenizer, kind, longest)
    loaded = load_weights(model)
    if method == "full" and isinstance(loaded, PeftModel):
        raise TypeError('method="full" trains the weights themselves; pass the model without its adapter')
    check_fits(loaded, rows, "task_data")
    own = None
    if asked is not None:
        own = _answered(loaded, tokenizer, asked[:most_prompts], answers, settings, progress)
        kept = encode_source(own.rows, "alignment_data", tokenizer, kind, longest)
        kept.notes.append(own.summary())
        if own.asked < len(asked):
            kept.notes.append(f"alignment: a run answers all {len(asked)} prompts, of which this look took {own.asked}")
    check_fits(loaded, kept, "alignment_data")
    curvature = None
    if fisher is not None:
        curvature = load_fisher(fisher, loaded, config)
    set_seed(seed)
    trained = loaded if method == "full" else adapt(loaded, lora)
    guard = Guard(trained, kept, config, pad_id(tokenizer), method, offload) if guarded else None
    if guard is not None and curvature is not None:
        guard.use_fisher(curvature)
    record = record_of(
        model=model, task=rows, alignment=kept, config=config.to_dict() if guarded else None, method=method, seed=seed,
        lora={n: c.to_dict() for n, c in trained.peft_config.items()} if method == "lora" else None,
        training={name: value for name, value in settings.items() if name != "disable_tqdm"},
        own_answers=None if own is None else own.counts(),
    )  # fmt: skip
    return Prepared(trained, tokenizer, kind, rows, kept, guard, settings, method, seed, record)


def _alignment(
    source: Source | None, tokenizer: Any, kind: str, longest: int
) -> tuple[Examples, list[dict[str, str]] | None]:
    """The encoded rows that are to be kept, or the prompts that the model has to answer first."""
    given = as_source(packaged_prompts() if source is None else source)
    if isinstance(given.source, Iterator):  # it is looked at twice
        given = replace(given, source=list(given.source))
    prompts = prompts_alone(given, "alignment_data")
    if source is None or prompts is not None:
        if kind == "classification":
            raise ValueError("alignment_data: a classifier keeps labels; give rows with prompt and label")
        return Examples(), prompts
    return encode_source(given, "alignment_data", tokenizer, kind, longest), None


def _answered(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Mapping[str, str]],
    path: str | Path | None,
    settings: Mapping[str, Any],
    progress: bool,
) -> OwnAnswers:
    """The model's own answers, on the device that it trains on; of several processes the first one's are taken by all."""
    state = PartialState(cpu=bool(settings.get("use_cpu")))
    if state.num_processes > 1 and path is None:
        raise ValueError("alignment_data: several processes share the model's own answers; give answers a path")
    model.to(state.device)
    with state.main_process_first():
        return own_answers(model, tokenizer, prompts, path=path, progress=progress and state.is_main_process)


def train(
    ready: Prepared,
    output_dir: str | Path,
    rival: Hooks | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = False,
    trained: str | Path | None = None,
) -> FitResult:
    """Train what :func:`prepare` made ready, and save it.

    Args:
        ready: prepared run; it serves once.
        output_dir: folder that receives ``adapter/`` (``model/`` for ``method="full"``), ``history.json``, ``run.json``
            and checkpoints.
        rival: method in the guard's place, of a run prepared with ``guarded=False``.
        overwrite: allow an output folder that holds something; its checkpoints are removed.
        resume: go on from the last complete checkpoint of the same run, or start if there is none.
        progress: show progress bars and the table of what is guarded.
        trained: folder of an adapter that these very arguments left without the rival; it is taken in place of
            training, and the rival acts on that.

    Returns:
        FitResult: model, guard, folder, log and step times.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError: the output folder cannot be had.
        ValueError: a rival beside a guard, a rival that is to be resumed, or settings that transformers refuses.
        FloatingPointError: NaN or infinity in the loss.
        OSError: saving failed; nothing half-written stays.
    """
    output, guard = Path(output_dir), ready.guard
    if rival is not None and guard is not None:
        raise ValueError("a rival trains in the guard's place; prepare the run with guarded=False")
    if rival is not None and resume:
        raise ValueError("checkpoints hold no state of a rival; leave out resume")
    found = latest_checkpoint(output / "checkpoints") if resume else None
    for note in (*ready.rows.notes, *ready.alignment.notes):
        logger.warning("%s", note)
    if progress:
        print(shown_row(ready.tokenizer, ready.rows, "task_data", ready.kind))
        if guard is not None:
            print(coverage_table(guard.coverage()))
    record = ready.record | ({} if rival is None else {"rival": rival.describe()})
    arguments = training_arguments(ready.kind, output / "checkpoints", ready.seed, ready.settings)
    with arguments.main_process_first(desc="output folder"):
        if arguments.process_index == 0:
            claim_run(output, record, overwrite=overwrite, resume=resume)
    history: list[dict[str, float]] = []
    seconds: list[float] = []
    if trained is not None:
        ready.model.to(arguments.device)
        set_peft_model_state_dict(ready.model, load_peft_weights(str(trained), device=str(arguments.device)))
    else:
        trainer = _trainer(ready, arguments, rival)
        if guard is not None and guard.uses_curvature and found is None and not guard.layers:
            guard.model.to(arguments.device)
            guard.refresh(progress=progress)
        set_seed(ready.seed)  # dropout and data order are the plain run's, whatever the guard or a rival drew
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
        history, seconds = [entry for entry in trainer.state.log_history if "loss" in entry], trainer.step_seconds
    if rival is not None:
        rival.finish()
    ready.model.eval()
    files = {"alignguard_config.json": guard.config.to_json()} if guard is not None else None
    card = card_section(record, guard)  # it measures drift, which sharded models only can all together
    target = output / ("model" if ready.method == "full" else "adapter")
    if arguments.process_index == 0:
        save_adapter(ready.model, target, files, lambda folder: add_card_section(folder, card))
        write_text(output / "history.json", json.dumps(history, indent=1))
    return FitResult(ready.model, guard, target, history, seconds)


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
    max_length: int = 256,
    seed: int = 0,
) -> FitResult:
    """Fine-tune on task data while the guard keeps what alignment data shows.

    Everything is read and checked before anything is written or trained.

    Args:
        model: path, hub name, or a loaded model (then with ``tokenizer``): a causal LM, an encoder-decoder or a
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
        tokenizer: of a loaded model; read with the model where that is a path or name.
        lora: a ``peft.LoraConfig`` or its fields; rank 8 on every Linear, and on experts, if left out.
        training: fields of ``transformers.TrainingArguments`` that replace the defaults.
        method: ``"lora"``, or ``"full"``: every weight trains, and every Linear but the output embedding is guarded
            by its dense ΔW = W − W0.
        offload: with ``"full"``, the device of the reference weights W0, ``"cpu"`` say; their weight's own if None.
        guarded: False trains plainly on the same data, seed and schedule.
        overwrite: allow an output folder that holds something; its checkpoints are removed.
        resume: go on from the last complete checkpoint of the same run in ``output_dir``, or start if there is none.
        save_every: optimizer steps between checkpoints; the two latest are kept. None keeps none.
        fisher: file of ``alignguard fisher``, taken as the first curvature in place of an estimate.
        progress: show progress bars and the table of what is guarded.
        max_length: longest example in tokens.
        seed: of the adapter's start, the data order and the guard.

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
    check_run(Path(output_dir), overwrite=overwrite, resume=resume)
    ready = prepare(
        model, task_data, alignment_data, config, tokenizer=tokenizer, lora=lora, training=training, method=method,
        offload=offload, guarded=guarded, progress=progress, max_length=max_length, seed=seed, save_every=save_every,
        fisher=fisher, answers=Path(output_dir) / OWN_ANSWERS,
    )  # fmt: skip
    return train(ready, output_dir, overwrite=overwrite, resume=resume, progress=progress)
