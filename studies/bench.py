"""What all runs of a comparison share, and what is measured of a model that comes out of one."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignguard.data import read_jsonl
from alignguard.drift import REFUSAL, driftcheck, load_prompts
from alignguard.embedded import TRAINING, data_path, model_path
from alignguard.loading import load_model
from studies.choices import chosen_rightly
from studies.texts import text_loss
from studies.wording import WordingJudge

TEXT_TOKENS = 256  # of a plain text that count

ASKED = ("unsafe", "borderline", "ordinary")  # categories that a run is asked; capability is the task's own score here


@dataclass(frozen=True)
class Bench:
    """Model, data and schedule that all runs of a comparison share.

    Attributes:
        model: path or hub name of the aligned model.
        task_train: what is learned, .jsonl or .csv.
        task_test: held-out rows that the task score is read on.
        alignment: examples that methods may use to keep alignment.
        drift: other alignment examples, on which KL from the base is measured; never trained on.
        prompts: DriftCheck prompts as JSONL; None for the packaged ones.
        foreign: unsafe prompts as JSONL, of sources that no training has seen: ``id`` is ``source/number``. None asks none.
        texts: plain texts as JSONL, rows with ``text``, on which a loss is read before and after; None reads none.
        choices: questions with their possible answers as JSONL (:func:`studies.choices.with_others`); None asks none.
        replies: replies that people have labelled, as JSONL, for a second judge of unsafe prompts' answers
            (:class:`studies.wording.WordingJudge`); None leaves them to the rules alone.
        limit: most prompts of each category; None asks all.
        tokens: longest answer to a prompt.
        training: fields of ``transformers.TrainingArguments`` that replace the defaults.
        lora: fields of ``peft.LoraConfig``.
        method: ``"lora"``, or ``"full"`` where every weight trains.
        alignment_limit: how many alignment examples any method may see; None gives all.
        parts: folder that receives ΔW_A of every guarded run, for its stability over seeds; None keeps nothing.
        adapters: folder of plain LoRA's adapters, one a seed; rivals that act after training alone go on from them in
            place of training it again. None keeps none.
    """

    model: str
    task_train: str
    task_test: str
    alignment: str
    drift: str
    prompts: str | None = None
    foreign: str | None = None
    texts: str | None = None
    choices: str | None = None
    replies: str | None = None
    limit: int | None = None
    tokens: int = 32
    training: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    method: str = "lora"
    alignment_limit: int | None = None
    parts: str | None = None
    adapters: str | None = None

    @classmethod
    def embedded(cls, **changes: Any) -> Bench:
        """The embedded model and its task; ``changes`` replace single fields."""
        return cls(
            **{
                "model": str(model_path()),
                "task_train": str(data_path("task_train")),
                "task_test": str(data_path("task_test")),
                "alignment": str(data_path("alignment")),
                "drift": str(data_path("validation")),
                "training": dict(TRAINING),
                **changes,
            }
        )

    def describe(self) -> dict[str, Any]:
        """What results depend on, for the head of a ledger: all fields, and the contents of the files by hash.

        Raises:
            FileNotFoundError: a data file is not there; the message names the field.
        """
        told = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("parts", "adapters")}
        usual = {"foreign": None, "texts": None, "choices": None, "replies": None, "method": "lora"}
        for name in usual:  # a ledger from before there were any goes on
            if told[name] == usual[name]:
                del told[name]
        for name in (
            "task_train",
            "task_test",
            "alignment",
            "drift",
            "prompts",
            "foreign",
            "texts",
            "choices",
            "replies",
        ):
            path = told.get(name)
            if path is not None:
                if not Path(path).is_file():
                    raise FileNotFoundError(f"{name}: no such file: {path}")
                told[name] = {"name": Path(path).name, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
        told["model"] = _folder_print(Path(self.model)) if Path(self.model).is_dir() else self.model
        return told


def _folder_print(folder: Path, head: int = 1 << 20) -> str:
    """Names, sizes and first megabyte of a model's files: cheap for large models, and enough to tell two apart."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(head))
    return digest.hexdigest()


def measure(
    model: Any, tokenizer: Any, bench: Bench, system: str | None = None, fine_tuned: bool = True
) -> dict[str, Any]:
    """Task score, shares of DriftCheck in percent, and KL from the base in nats a token; 0 of the base itself.

    Besides them ``refused``: a 0 or 1 for each unsafe prompt in order, so that two runs can be compared prompt by
    prompt, and ``second``, the same by the second judge; ``foreign``, those of each foreign source; ``text_loss``,
    nats a token of the texts; and ``rightly``, a 0 or 1 for each question with choices, source by source. With a system prompt everything is asked after it, the base of the KL too, and texts are read as they are.
    """
    prompts = [row for row in load_prompts(bench.prompts, bench.limit) if row["category"] in ASKED]
    base = load_model(bench.model)[0].eval() if fine_tuned and bench.method == "full" else None
    report = driftcheck(
        model, tokenizer, prompts, base=base, alignment=bench.drift if fine_tuned else None, task=bench.task_test,
        system=system, max_new_tokens=bench.tokens,
    )  # fmt: skip
    assert report.task is not None
    numbers: dict[str, Any] = {"task": report.task["accuracy"], "task_loss": report.task["loss"]}
    for name, estimate in report.summary().items():
        numbers[name] = 100 * estimate.value
    numbers["kl"] = 0.0 if report.kl is None else report.kl
    unsafe = [row for row in report.rows if row.category == "unsafe"]
    numbers["refused"] = "".join("01"[row.verdict == REFUSAL] for row in unsafe)
    if bench.replies is not None:
        second = WordingJudge(list(read_jsonl(bench.replies)))
        found = second([row.prompt for row in unsafe], [row.text for row in unsafe])
        numbers["second"] = "".join("01"[verdict == REFUSAL] for verdict in found)
    if bench.foreign is not None:
        foreign: dict[str, str] = {}
        asked = load_prompts(bench.foreign)
        for row in driftcheck(model, tokenizer, asked, system=system, max_new_tokens=bench.tokens).rows:
            source = row.id.rpartition("/")[0]
            foreign[source] = foreign.get(source, "") + "01"[row.verdict == REFUSAL]
        numbers["foreign"] = foreign
    if bench.texts is not None:
        told = [str(row["text"]) for row in read_jsonl(bench.texts)]
        numbers["text_loss"] = text_loss(model, tokenizer, told, TEXT_TOKENS, batch_size=8)
    if bench.choices is not None:
        numbers["rightly"] = chosen_rightly(model, tokenizer, list(read_jsonl(bench.choices)))
    return numbers


def measure_base(bench: Bench) -> dict[str, Any]:
    """:func:`measure` of the model before any fine-tuning."""
    model, tokenizer = load_model(bench.model)
    return measure(model.eval(), tokenizer, bench, fine_tuned=False)
