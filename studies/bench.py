"""One comparable run: train a method on a bench, measure what it learned and what it kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import fishergeo as fg
from alignguard.data import encode_source, load_conversations, pad_id, pad_rows, read_jsonl
from alignguard.drift import REFUSAL, driftcheck, load_prompts
from alignguard.embedded import TRAINING, data_path, model_path
from alignguard.guard import GuardConfig
from alignguard.loading import load_model, load_tokenizer
from alignguard.objective import model_kind
from alignguard.training import fit
from alignguard.updates import base_name, lora_updates
from studies.choices import chosen_rightly
from studies.rivals import RIVALS, make_rival, train_rival
from studies.texts import text_loss
from studies.wording import WordingJudge

GUARD = "guard"
PLAIN = "plain"

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


def guard_config(job: Mapping[str, Any]) -> GuardConfig:
    """A guarded job's configuration: its settings are what differs from :meth:`GuardConfig.curvature`.

    Fields of the Fisher are left out where the job has no term that reads it, as in a study of KL alone.

    Raises:
        ValueError: an unknown field, named, or a value out of its range.
    """
    config = GuardConfig.from_dict({**GuardConfig.curvature().to_dict(), **job["settings"], "seed": job["seed"]})
    plain = GuardConfig()
    return dataclasses.replace(config, **{name: getattr(plain, name) for name in config.unread()})


def _check(job: Mapping[str, Any]) -> None:
    if job["method"] == GUARD:
        guard_config(job)
    else:
        make_rival(job["method"], job["settings"])


def make_job(
    name: str,
    method: str,
    settings: Mapping[str, Any],
    seed: int,
    group: str = "",
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One run as a plain object: what a ledger's line is found by.

    Args:
        name: what tables call the setting; runs that differ in the seed alone share it.
        method: ``"guard"``, with fields that differ from :meth:`alignguard.GuardConfig.curvature`, or a name of
            :data:`studies.rivals.RIVALS` with settings of that rival.
        settings: of the method.
        seed: of everything drawn.
        group: the study that the run belongs to.
        training: fields of ``transformers.TrainingArguments`` that replace the bench's for this run.

    Raises:
        ValueError: an unknown method or setting, or a value out of range; before anything runs.
    """
    if method != GUARD and method not in RIVALS:
        raise ValueError(f"unknown method {method!r}; there are {GUARD}, {', '.join(RIVALS)}")
    job = {"name": name, "method": method, "settings": dict(settings), "seed": seed, "group": group}
    if training:
        job["training"] = dict(training)
    _check(job)
    return job


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


def run_job(bench: Bench, job: Mapping[str, Any]) -> dict[str, Any]:
    """Train one job's method and measure it.

    Returns:
        what :func:`measure` gives, ``step_time`` in seconds and ``alignment_examples``, how often one was read; of a
        guarded run ``drift`` too, KL(base ‖ present) in nats a response on alignment examples, those held back where
        there are any, and ``gauge``: step, drift predicted and drift measured of each log line that has them.
    """
    with tempfile.TemporaryDirectory() as folder:
        alignment: Any = bench.alignment
        if bench.alignment_limit is not None:
            alignment = load_conversations(alignment, "alignment")[: bench.alignment_limit]
        training = {**bench.training, **job.get("training", {})}
        shared: dict[str, Any] = {"lora": bench.lora, "training": training, "seed": job["seed"]}
        if bench.method == "full":
            shared |= {"method": "full", "lora": None}
        output = Path(folder) / "run"
        result: Any
        drift = system = None
        if job["method"] == GUARD:
            config = guard_config(job)
            result = fit(bench.model, bench.task_train, alignment, config, output, **shared)
            assert result.guard is not None
            read, drift = result.guard.examples_read, result.guard.measured_drift()
        else:
            rival = make_rival(job["method"], job["settings"])
            keeps = bench.adapters is not None and bench.method == "lora" and rival.after_training()
            kept = _adapter_folder(bench, shared) if keeps else None
            if kept is not None and job["method"] != PLAIN:
                shared["trained"] = kept if kept.is_dir() else _train_plain(bench, shared, kept)
            result = train_rival(rival, bench.model, bench.task_train, alignment, output, **shared)
            if kept is not None and job["method"] == PLAIN and not kept.is_dir():  # its seconds a step are told
                _keep(result.adapter_dir, kept)
            read, system = result.examples_read, rival.asked_with()
        tokenizer = load_tokenizer(bench.model)
        if bench.parts is not None and job["method"] == GUARD:
            energy = config.energy
            save_parts(alignment_parts(result.model, tokenizer, alignment, energy), part_file(bench.parts, job))
        told: dict[str, Any] = {"step_time": result.step_time, "alignment_examples": read}
        if drift is not None:
            names = ("step", "alignguard/drift_predicted", "alignguard/drift_measured")
            logged = [[entry[name] for name in names] for entry in result.history if names[1] in entry]
            told |= {"drift": drift, "gauge": logged}
        return {**measure(result.model, tokenizer, bench, system), **told}


def _adapter_folder(bench: Bench, shared: Mapping[str, Any]) -> Path:
    """Where the adapter that plain LoRA leaves is kept: by what it is trained from, whatever is asked afterwards."""
    trained = {name: told for name, told in bench.describe().items() if name in ("model", "task_train")}
    name = hashlib.sha256(json.dumps([trained, shared], sort_keys=True).encode()).hexdigest()[:16]
    return Path(bench.adapters or "") / name


def _train_plain(bench: Bench, shared: Mapping[str, Any], kept: Path) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        made = train_rival(make_rival(PLAIN), bench.model, bench.task_train, None, Path(folder) / "run", **shared)
        return _keep(made.adapter_dir, kept)


def _keep(adapter: Path, kept: Path) -> Path:
    """Copy an adapter to where it is kept, whole or not at all."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        copied = shutil.copytree(adapter, Path(folder) / "adapter")
        try:
            copied.rename(kept)
        except OSError:
            if not kept.is_dir():  # another process may have been first
                raise
    return kept


def part_file(folder: str | Path, job: Mapping[str, Any]) -> Path:
    """Where ΔW_A of a run stands."""
    name = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"{name}.safetensors"


def alignment_parts(model: Any, tokenizer: Any, alignment: Any, energy: float, examples: int = 128) -> dict[str, Any]:
    """ΔW_A = PΔW of every adapted matrix, P on the leading eigenvectors of the one-sided Fisher at θ0.

    P is taken at θ0 for every run, so that runs differ in their updates and not in what they are projected on.

    Returns:
        module name -> ``LowRank`` (p, q).
    """
    kind, pad, device = model_kind(model), pad_id(tokenizer), next(model.parameters()).device
    rows = encode_source(alignment, "alignment", tokenizer, kind, 256)[:examples]
    batches = [
        {k: v.to(device) for k, v in pad_rows(rows[i : i + 16], pad, kind).items()} for i in range(0, len(rows), 16)
    ]
    updates = {name: delta.detach() for name, delta in lora_updates(model).items()}
    layers = [base_name(name) for name in updates]
    with model.disable_adapter():
        fisher = fg.estimate_fisher(model, batches, structure="gram", layers=layers, reduction="sum")
    parts = {}
    for name, delta in updates.items():
        values, vectors = fisher[base_name(name)].eigh()
        values = values.clamp_min(0)
        m = max(fg.rank_for_energy(values, float(values.sum()), energy), 1)
        parts[name] = fg.Projector(vectors[:, :m].to(delta.dtype)).split(delta)[0]
    return parts


def save_parts(parts: Mapping[str, Any], path: Path) -> None:
    """Write updates in factors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    tensors: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        tensors[f"{name}/left"], tensors[f"{name}/right"] = part.left.contiguous(), part.right.contiguous()
    save_file(tensors, draft)
    draft.replace(path)
