"""One comparable run: train a method on a bench, and measure what it learned and what it kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignguard.data import load_conversations
from alignguard.guard import GuardConfig
from alignguard.loading import load_tokenizer
from alignguard.training import fit
from studies.bench import Bench, measure
from studies.parts import alignment_parts, part_file, save_parts
from studies.rivals import RIVALS, make_rival, train_rival

GUARD = "guard"

PLAIN = "plain"


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
