"""Everything that a run needs, read, made and checked before anything is written."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, set_seed

from alignguard.data import (
    DataSource,
    Examples,
    Source,
    as_source,
    check_fits,
    encode_source,
    pad_id,
    prompts_alone,
    read_rows,
)
from alignguard.guard import Guard, GuardConfig
from alignguard.loading import (
    adapt,
    check_device,
    kind_of,
    load_tokenizer,
    load_weights,
    lora_config,
    put_on,
    switched_off,
    taken_off_again,
    what_trains,
)
from alignguard.training.fisher_file import file_digest, load_fisher
from alignguard.training.preparation.answers import (
    OwnAnswers,
    Questions,
    answered,
    category_of,
    packaged_prompts,
    questions,
    spread,
)
from alignguard.training.preparation.rehearsal import PROBED, rehearse
from alignguard.training.record import record_of, weight_marks
from alignguard.training.settings import run_settings
from alignguard.updates import METHODS

STAND_IN = "No."  # a response for each prompt, until the model has given its own

# Columns that prompts alone may have beside them; any other text may be the answer that its owner wants kept.
BESIDE_PROMPTS = {"category", "harm", "id", "language", "licence", "license", "source", "split"}


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
        seed: seed of the adapter's start and the data order.
        steps: optimizer steps of the whole run.
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
    steps: int
    record: dict[str, Any]


def prepare(
    model: str | Path | PreTrainedModel | PeftModel,
    task_data: Source,
    alignment_data: Source | None = None,
    config: GuardConfig | None = None,
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
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
    overwrite: bool = False,
    most_prompts: int | None = None,
    adapter: Callable[[Any, LoraConfig, Examples], PeftConfig] | None = None,
) -> Prepared:
    """Read and check what a run is given; nothing is written but the model's own answers, where they are asked for.

    Args:
        model: path, hub name or loaded model, as :func:`alignguard.fit` takes it, like every argument of the same name.
        task_data: what to learn.
        alignment_data: what to keep: rows, or prompts that the model itself answers first; None for packaged prompts.
        config: strengths of the guard.
        tokenizer: tokenizer of a loaded model, or another than the model's own.
        trust_remote_code: whether Python that comes with the model is run.
        lora: a ``peft.LoraConfig`` or its fields.
        training: fields of ``transformers.TrainingArguments``.
        method: ``"lora"`` or ``"full"``.
        offload: device of the reference weights; refused where there are none.
        guarded: False prepares a plain run.
        read_alignment: read ``alignment_data`` without a guard too, for a method that :func:`train` is given in its
            place; up to ``max_length`` tokens each.
        progress: show progress bars.
        max_length: longest example in tokens.
        seed: seed of the adapter's start, of the data order and, where no config is given, of the guard.
        save_every: optimizer steps between checkpoints; None keeps none.
        fisher: file of ``alignguard fisher``.
        answers: file that keeps the model's own answers as they come, so that they are given once; None keeps none.
        overwrite: let other answers in that file give way, in place of refusing them.
        most_prompts: prompts that are answered at most, for a look at a run; None answers all.
        adapter: what makes another adapter's configuration of the model, the LoRA's and the alignment examples, for a
            method that :func:`train` is given in the guard's place; None puts on the LoRA.

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
            f"{', '.join(idle)}: set, and nothing here reads that. Fields of the Fisher need lambda_alignment too, or "
            "GuardConfig.curvature() (--preset curvature); those of collision need lambda_collision (scale_free "
            "lambda_task or that), those of KL lambda_kl; those of measuring drift need max_drift, or adaptive, which "
            "refresh_budget and refresh_tolerance need"
        )
    if fisher is not None and not config.reads_fisher:
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
        if not guarded:
            raise ValueError(
                "offload is where the guard keeps its reference weights; leave it out of a run without the guard"
            )
    settings = run_settings(method, training, save_every, progress)
    # What is quickly read is checked before weights are, which may take minutes.
    kind = kind_of(model, trust_remote_code)
    tokenizer = load_tokenizer(model, tokenizer, trust_remote_code)
    rows = encode_source(task_data, "task_data", tokenizer, kind, max_length)
    kept, longest = Examples(), config.max_length if guarded else max_length
    asked: list[dict[str, str]] | None = None
    if guarded or read_alignment:
        kept, asked = alignment_rows(alignment_data, tokenizer, kind, longest)
    loaded = load_weights(model, trust_remote_code)
    put_back, marks = what_trains(loaded), weight_marks(loaded)
    if method == "full" and isinstance(loaded, PeftModel):
        raise TypeError('method="full" trains the weights themselves; pass the model without its adapter')
    if adapter is not None and isinstance(loaded, PeftModel):
        raise ValueError(
            "model: it carries its adapter already, and this method makes its own; pass the model below it"
        )
    check_fits(loaded, rows, "task_data", pad_id(tokenizer))
    own = to_ask = None
    if asked is not None:
        looked_at = asked if most_prompts is None else spread(asked, most_prompts)
        to_ask = _questions(loaded, tokenizer, looked_at, answers, overwrite, settings)
        kept = stand_ins(asked, tokenizer, kind, longest)
    check_fits(loaded, kept, "alignment_data", pad_id(tokenizer))
    curvature = None
    if fisher is not None:
        curvature = load_fisher(fisher, loaded, config)

    def answer() -> tuple[OwnAnswers, Examples]:
        assert asked is not None and to_ask is not None
        look = len(to_ask.asked) < len(asked)
        own = _answered(loaded, tokenizer, to_ask, settings, progress, look)
        found: list[Mapping[str, str]] = list(own.rows)
        if look:  # so that what is counted in rows is of a run
            told = {prompt for prompt, _ in to_ask.asked}
            found += [{**row, "response": STAND_IN} for row in asked if row["prompt"] not in told]
        rows = encode_source(found, "alignment_data", tokenizer, kind, longest)
        rows.notes.append(own.summary())
        if look:
            rows.notes.append(
                f"alignment: a run answers all {len(asked)} prompts and keeps of unsafe ones those that it refuses; this look "
                f"took {own.asked}"
            )
        check_fits(loaded, rows, "alignment_data", pad_id(tokenizer))
        return own, rows

    if adapter is not None:
        wanted = lora_config(loaded, lora)
        if to_ask is not None:  # the method reads the answers themselves
            own, kept = answer()
        set_seed(seed)
        trained = put_on(loaded, adapter(loaded, wanted, kept))
    else:
        set_seed(seed)
        trained = loaded if method == "full" else adapt(loaded, lora)

    def guard_on(examples: Sequence[Mapping[str, Any]]) -> Guard | None:
        made = Guard(trained, examples, config, pad_id(tokenizer), method, offload) if guarded else None
        kept_apart = made is not None and any(name.endswith("|weight") for name in made.updates.references())
        if offload is not None and not kept_apart:
            raise ValueError(
                'offload: this LoRA has no reference weights to keep elsewhere; leave it out, or take method="full"'
            )
        if made is not None and curvature is not None:
            made.use_fisher(curvature)
        return made

    with taken_off_again(trained, loaded, put_back):  # who is refused or interrupted calls again with the same model
        if not any(parameter.requires_grad for parameter in trained.parameters()):
            raise ValueError(
                "model: nothing trains, every weight is frozen; load an adapter with PeftModel.from_pretrained(..., "
                "is_trainable=True), or call requires_grad_(True) on what should train"
            )

        # Answers take minutes, so all that would be refused is found on rows that stand in for them.
        late = to_ask is not None and own is None
        guard = guard_on(kept[:PROBED] if late else kept)
        steps = rehearse(trained, tokenizer, kind, rows, guard, settings, seed)
        if late:
            # Where switching a fresh adapter off leaves the model at its start, that is faster to ask.
            off = trained is not loaded and guard is not None and guard.updates.base_is_reference
            guard = None
            gc.collect()  # the rehearsal's Trainer and its guard, with copies of the weights, stand in circles
            with switched_off(trained) if off else nullcontext():
                own, kept = answer()
            guard = guard_on(kept)
    record = record_of(
        model=model, model_weights=marks, task=rows, alignment=kept, config=config.to_dict() if guarded else None, method=method, seed=seed,
        lora={n: c.to_dict() for n, c in trained.peft_config.items()} if method == "lora" else None,
        training={name: value for name, value in settings.items() if name != "disable_tqdm"}, steps=steps,
        own_answers=None if own is None else own.counts(),
        **({} if fisher is None else {"fisher": file_digest(fisher)}),
    )  # fmt: skip
    return Prepared(trained, tokenizer, kind, rows, kept, guard, settings, method, seed, steps, record)


def alignment_rows(
    source: Source | None, tokenizer: Any, kind: str, longest: int
) -> tuple[Examples, list[dict[str, str]] | None]:
    """The encoded rows that are to be kept, or the prompts that the model has to answer first.

    Args:
        source: rows, prompts, or None for packaged prompts.
        tokenizer: of the model.
        kind: of model.
        longest: most tokens of a row.

    Raises:
        ValueError: bad rows; prompts alone for a classifier, of an unknown category, or beside a column that may be what the
            model should answer.
    """
    given = as_source(packaged_prompts() if source is None else source)
    if isinstance(given.source, Iterator):  # it is looked at twice
        given = replace(given, source=list(given.source))
    prompts = prompts_alone(given, "alignment_data")
    if source is None or prompts is not None:
        if kind == "classification":
            raise ValueError("alignment_data: a classifier keeps labels; give rows with prompt and label")
        _check_alone(given)
        for number, row in enumerate(prompts or (), 1):
            category_of(row, number)
        return Examples(), prompts
    return encode_source(given, "alignment_data", tokenizer, kind, longest), None


def _check_alone(given: DataSource) -> None:
    """Refuse prompts beside text that nothing would read, which the model's own answers would replace.

    Raises:
        ValueError: naming the row and the column.
    """
    read = {"prompt", *given.fields.values(), *BESIDE_PROMPTS}
    for where, row in read_rows(given):
        beside = [
            name for name, value in row.items() if name not in read and value and isinstance(value, (str, list, dict))
        ]
        if beside:
            prompt = given.fields.get("prompt", "prompt")
            raise ValueError(
                f"alignment_data: {where}: the model itself answers prompts alone, and {beside[0]!r} beside them would not be "
                f"read; if it holds the answers, say so (--alignment-fields prompt={prompt} response={beside[0]}), or leave "
                "that column out"
            )


def stand_ins(prompts: Sequence[Mapping[str, str]], tokenizer: Any, kind: str, longest: int) -> Examples:
    """Encoded rows in the place of those that the model's answers will make, to find before it is asked what is wrong.

    Args:
        prompts: that the model will answer.
        tokenizer: of the model.
        kind: of model.
        longest: most tokens of a row.

    Raises:
        ValueError: a prompt that cannot be rendered.
    """
    rows = [{"prompt": row["prompt"], "response": STAND_IN} for row in prompts]
    return encode_source(rows, "alignment_data", tokenizer, kind, longest)


def _questions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Mapping[str, str]],
    path: str | Path | None,
    overwrite: bool,
    settings: Mapping[str, Any],
) -> Questions:
    """What the model is asked, and the model on the device that it answers and trains on."""
    state = PartialState(cpu=bool(settings.get("use_cpu")))
    if state.num_processes > 1 and path is None:
        raise ValueError("alignment_data: several processes share the model's own answers; give answers a path")
    model.to(state.device)
    return questions(model, tokenizer, prompts, path, overwrite=overwrite)


def _answered(
    model: Any, tokenizer: Any, to_ask: Questions, settings: Mapping[str, Any], progress: bool, look: bool
) -> OwnAnswers:
    """The model's own answers; of several processes the first one's are taken by all."""
    state = PartialState(cpu=bool(settings.get("use_cpu")))
    with state.main_process_first():
        return answered(model, tokenizer, to_ask, progress=progress and state.is_main_process, look=look)
