"""The benchmark's recipe: its settings, rows and their order, training under the guard or without it, and evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from alignguard.data import collator, pad_id, read_jsonl
from alignguard.drift import PromptBatch, answer_batch
from alignguard.guard import TERMS, Guard
from alignguard.training import GuardTrainer
from studies.peft_comparison.questions import is_correct

BUCKET = 20  # batches whose rows are sorted by length together
WARMUP = 0.1  # of the steps


@dataclass(frozen=True)
class Settings:
    """What the benchmark fixes for all methods, and LoRA's own settings there; the defaults are its real ones.

    Attributes:
        max_seq_length: most tokens of a row that is trained on, or of a text.
        batch_size: rows in a step.
        batch_size_eval: questions answered together.
        max_steps: optimizer steps.
        eval_steps: steps between two readings of the validation rows; the training loss told is the mean over as many.
        seed: of the adapter's start and of what is drawn.
        grad_norm_clip: largest norm of the gradient.
        optimizer_kwargs: AdamW's ``lr`` and ``weight_decay``; the rate warms up over a tenth of the steps and falls by a
            cosine.
        generation_kwargs: ``max_length`` of question and answer in tokens, ``max_new_tokens`` of the answer; the less of both
            holds.
        query_template: what stands around a question.
        lora: fields of ``peft.LoraConfig``.
        valid: most validation rows, drawn as the benchmark draws them.
        test: most test rows, the first ones; None takes all.
        texts: most texts that forgetting is read on.

    Raises:
        ValueError: a value out of its range, or a template without ``{query}``.
    """

    max_seq_length: int = 768
    batch_size: int = 4
    batch_size_eval: int = 50
    max_steps: int = 5000
    eval_steps: int = 250
    seed: int = 0
    grad_norm_clip: float = 1.0
    optimizer_kwargs: dict[str, float] = field(default_factory=lambda: {"lr": 1e-4, "weight_decay": 0.1})
    generation_kwargs: dict[str, int] = field(default_factory=lambda: {"max_length": 800, "max_new_tokens": 300})
    query_template: str = "Question: {query} Think step by step.\nAnswer:"
    lora: dict[str, Any] = field(
        default_factory=lambda: {"r": 32, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"]}
    )
    valid: int = 50
    test: int | None = None
    texts: int = 100

    def __post_init__(self) -> None:
        for name in ("max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "valid", "texts"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"settings: {name} must be a whole number of at least 1, not {value!r}")
        if self.eval_steps > self.max_steps:
            raise ValueError(f"settings: eval_steps={self.eval_steps} is more than max_steps={self.max_steps}")
        if "{query}" not in self.query_template:
            raise ValueError(f"settings: query_template must hold {{query}}, not {self.query_template!r}")
        for name, keys in (("optimizer_kwargs", {"lr", "weight_decay"}), ("generation_kwargs", GENERATION)):
            if set(getattr(self, name)) != keys:
                raise ValueError(f"settings: {name} must hold {sorted(keys)}, not {sorted(getattr(self, name))}")

    @classmethod
    def read(cls, path: str | Path | None, **changes: Any) -> Settings:
        """The defaults with the fields of a JSON file in their place, and then ``changes``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: an unknown field, or as the constructor.
        """
        (given,) = [{}] if path is None else read_jsonl(path)
        known = {one.name for one in dataclasses.fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"settings {path}: unknown fields {unknown}; there are {', '.join(sorted(known))}")
        return cls(**{**given, **changes})


GENERATION = {"max_length", "max_new_tokens"}


def encode(rows: Sequence[Mapping[str, str]], tokenizer: Any, settings: Settings) -> list[dict[str, list[int]]]:
    """Question, answer and end of sequence, all of which is learned, in the order of training.

    Rows keep the file's order but for buckets of ``BUCKET`` batches, within which the longest come first.
    """
    wanted = rows[: settings.max_steps * settings.batch_size]
    texts = [settings.query_template.format(query=row["query"]) + row["response"] for row in wanted]
    found = [tokenizer(text)["input_ids"][: settings.max_seq_length] for text in texts]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = [{"input_ids": ids + end, "labels": ids + end} for ids in found]
    size = BUCKET * settings.batch_size
    ordered = []
    for start in range(0, len(encoded), size):
        ordered += sorted(encoded[start : start + size], key=lambda row: -len(row["input_ids"]))
    return ordered


def validation(rows: Sequence[Mapping[str, str]], settings: Settings) -> list[Mapping[str, str]]:
    """The validation rows, drawn by NumPy's generator of seed 0 as the benchmark does."""
    import numpy

    places = numpy.random.RandomState(0).permutation(len(rows))
    return [rows[place] for place in places[: settings.valid]]


def accuracy(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, str]], settings: Settings) -> float:
    """Share of the questions whose greedy answer ends in the right number."""
    asked = [tokenizer(settings.query_template.format(query=row["query"]))["input_ids"] for row in rows]
    right = 0
    for start in range(0, len(rows), settings.batch_size_eval):
        ids = tuple(tuple(one[: settings.max_seq_length]) for one in asked[start : start + settings.batch_size_eval])
        longest = settings.generation_kwargs["max_length"] - max(map(len, ids))
        room = min(settings.generation_kwargs["max_new_tokens"], longest)
        if room < 1:
            raise ValueError(f"settings: max_length leaves no room for an answer after {max(map(len, ids))} tokens")
        answers = answer_batch(model, tokenizer, PromptBatch(tuple(range(len(ids))), ids), room)
        right += sum(is_correct(a, row["response"]) for a, row in zip(answers, rows[start:], strict=False))
    return right / len(rows)


def read_texts(path: str | Path) -> list[str]:
    """Texts of a file: ``text`` of each row, or ``prompt`` and ``response`` together.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row without them, or no rows.
    """
    texts = []
    for place, row in enumerate(read_jsonl(path), 1):
        if isinstance(row.get("text"), str):
            texts.append(row["text"])
        elif isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
            texts.append(f"{row['prompt']}\n{row['response']}")
        else:
            raise ValueError(f"--text {path}, row {place}: expected text, or prompt and response, found {sorted(row)}")
    if not texts:
        raise ValueError(f"--text {path} holds no rows")
    return texts


class _Readings(TrainerCallback):
    """Accuracy on the validation rows every ``eval_steps``, by the step."""

    def __init__(self, tokenizer: Any, rows: Sequence[Mapping[str, str]], settings: Settings) -> None:
        self.tokenizer, self.rows, self.settings = tokenizer, rows, settings
        self.found: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.settings.eval_steps == 0:
            self.found[state.global_step] = accuracy(model, self.tokenizer, self.rows, self.settings)


@dataclass(frozen=True)
class Trained:
    """What a run tells of itself.

    Attributes:
        metrics: each reading: ``step``, ``valid accuracy``, ``train loss``, ``train samples``.
        train_time: seconds of all optimizer steps, the guard's work included, evaluation left out.
        samples: rows trained on.
        tokens: tokens trained on.
    """

    metrics: list[dict[str, float]]
    train_time: float
    samples: int
    tokens: int


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, list[int]]],
    valid: Sequence[Mapping[str, str]],
    settings: Settings,
    folder: str | Path,
    guard: Guard | None = None,
) -> Trained:
    """Train an adapted model by the benchmark's recipe.

    Args:
        model: a peft model.
        tokenizer: its tokenizer.
        rows: what :func:`encode` gives; begun again where the steps ask for more.
        valid: rows that accuracy is read on meanwhile.
        settings: of the benchmark.
        folder: the trainer's.
        guard: on this model; None trains plainly.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.optimizer_kwargs["lr"],
        weight_decay=settings.optimizer_kwargs["weight_decay"],
        warmup_steps=int(WARMUP * settings.max_steps),
        lr_scheduler_type="cosine",
        max_grad_norm=settings.grad_norm_clip,
        optim="adamw_torch",
        logging_steps=settings.eval_steps,
        train_sampling_strategy="sequential",
        seed=settings.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = GuardTrainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        data_collator=collator(pad_id(tokenizer), "causal"),
        guard=guard,
    )
    readings = _Readings(tokenizer, valid, settings)
    trainer.add_callback(readings)
    trainer.train()
    metrics = []
    for entry in trainer.state.log_history:
        step = entry["step"]
        if "loss" in entry and step in readings.found:
            # of the task alone: the Trainer's loss holds the penalty
            loss = entry["loss"] - sum(entry.get(f"alignguard/{term}", 0.0) for term in TERMS)
            seen = {"valid accuracy": readings.found[step], "train loss": loss}
            metrics.append({"step": step, **seen, "train samples": step * settings.batch_size})
    samples = settings.max_steps * settings.batch_size
    tokens = sum(len(rows[place % len(rows)]["input_ids"]) for place in range(samples))
    return Trained(metrics, sum(trainer.step_seconds), samples, tokens)
