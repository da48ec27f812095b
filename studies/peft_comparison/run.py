"""``python -m studies peft-comparison``: the benchmark's columns and this project's own, for LoRA with the guard and without."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import set_seed

from alignguard.data import encode_source, pad_id
from alignguard.drift import driftcheck, load_prompts, measured_kl
from alignguard.embedded import data_path, model_path
from alignguard.files import write_text
from alignguard.guard import Guard, GuardConfig
from alignguard.loading import adapt, load_model
from alignguard.tables import text_table
from alignguard.training import versions
from studies.peft_comparison.questions import read_questions, short_enough, sums
from studies.peft_comparison.recipe import Settings, accuracy, encode, read_texts, train, validation
from studies.texts import text_loss

GUARDS: dict[str, GuardConfig | None] = {"lora": None, "guarded-lora": GuardConfig()}
TINY = Path(__file__).parent / "tiny.json"
ASKED = ("unsafe", "borderline", "ordinary")
SHARES = ("refusal", "borderline", "compliance")

# Options that a model of one's own needs, and what stands in for them with the embedded one.
FILES = {
    "data": "what is learned, of MetaMathQA's form",
    "valid_data": "GSM8K's train rows, of which accuracy is read while training",
    "test_data": "GSM8K's test rows",
    "text": "texts that forgetting is read on: text, or prompt and response, in each row",
    "alignment_data": "what the guard keeps: prompt and response",
    "drift_data": "other such rows, on which KL from the base is measured",
}


def embedded_files(folder: Path) -> dict[str, str]:
    """What the embedded model reads: sums that are made up and written to the folder, and packaged data."""
    made = {"data": (2000, 0), "valid_data": (100, 1), "test_data": (200, 2)}
    for name, (count, seed) in made.items():
        rows = sums(count, seed)
        if name != "data":
            rows = [{"question": row["query"], "answer": row["response"].rsplit("\n", 1)[0]} for row in rows]
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return {
        **{name: str(folder / f"{name}.jsonl") for name in made},
        "text": str(data_path("task_validation")),
        "alignment_data": str(data_path("alignment")),
        "drift_data": str(data_path("validation")),
    }


class PeakMemory:
    """The most bytes in use since this was made beyond those in use then: the accelerator's, else the process's."""

    def __init__(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
        self.start = self._peak()

    def _peak(self) -> int | None:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_reserved()
        status = Path("/proc/self/status")
        if not status.exists():
            return None
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def read(self) -> int | None:
        """The bytes; None where they cannot be told."""
        peak = self._peak()
        return None if peak is None or self.start is None else peak - self.start


def kept(model: Any, tokenizer: Any, drift_data: str, limit: int | None) -> dict[str, float]:
    """What is left of alignment: DriftCheck's shares in percent and KL from the base in nats a token."""
    prompts = [row for row in load_prompts(None, limit) if row["category"] in ASKED]
    told = driftcheck(model, tokenizer, prompts).summary()
    shares = {name: 100 * told[name].value for name in SHARES}
    kl = measured_kl(model, None, tokenizer, drift_data) if hasattr(model, "disable_adapter") else 0.0
    return {**shares, "kl": kl}


def run_method(
    name: str, model_id: str, files: Mapping[str, str], settings: Settings, folder: Path, limit: int | None = None
) -> dict[str, Any]:
    """Train and measure one method.

    Args:
        name: key of ``GUARDS``.
        model_id: folder or hub name of the model.
        files: path by option, see ``FILES``.
        settings: of the benchmark.
        folder: receives the adapter.
        limit: most prompts of each category of DriftCheck; None asks all.

    Returns:
        A result in the benchmark's own layout (``run_info``, ``train_info``, ``meta_info``), so that its tools read it, and
        under ``alignguard`` the guard's settings and what is left of alignment.
    """
    began, created = time.perf_counter(), datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    memory = PeakMemory()
    model, tokenizer = load_model(model_id)
    learned = short_enough(read_questions(files["data"], "--data"))
    rows = encode(learned, tokenizer, settings)
    valid = validation(read_questions(files["valid_data"], "--valid-data"), settings)
    test = read_questions(files["test_data"], "--test-data")[: settings.test]
    texts = read_texts(files["text"])[: settings.texts]
    set_seed(settings.seed)
    model = adapt(model, settings.lora)
    trainable, total = model.get_nb_trainable_parameters()
    config, guard = GUARDS[name], None
    if config is not None:
        examples = encode_source(files["alignment_data"], "alignment_data", tokenizer, "causal", config.max_length)
        guard = Guard(model, examples, config, pad_id(tokenizer))
    with model.disable_adapter():
        before = text_loss(model, tokenizer, texts, settings.max_seq_length, settings.batch_size)
    ran = train(model, tokenizer, rows, valid, settings, folder / "trainer", guard)
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    score = accuracy(model, tokenizer, test, settings)
    forgetting = text_loss(model, tokenizer, texts, settings.max_seq_length, settings.batch_size) - before
    last = {
        "step": settings.max_steps,
        "test accuracy": score,
        "train loss": ran.metrics[-1]["train loss"],
        "train samples": ran.samples,
        "train total tokens": ran.tokens,
        "forgetting": forgetting,
    }
    peak = memory.read()
    model.save_pretrained(str(folder))
    own = {
        **kept(model, tokenizer, files["drift_data"], limit),
        "alignment_examples": 0 if guard is None else guard.examples_read,
        "guard": None if config is None else config.to_dict(),
    }
    peft_config = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config["default"].to_dict().items()}
    return {
        "run_info": {
            "created_at": created.isoformat(),
            "total_time": time.perf_counter() - began,
            "experiment_name": f"{name}/{Path(model_id).name}",
            "peft_branch": None,
            "train_config": {"model_id": model_id, **dataclasses.asdict(settings)},
            "peft_config": peft_config,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": peak,
            "accelerator_memory_reserved_99th": None,
            "train_time": ran.train_time,
            "file_size": (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
            "num_trainable_params": trainable,
            "num_total_params": total,
            "status": "success",
            "metrics": [*ran.metrics, last],
        },
        "meta_info": {
            "package_info": {f"{name}-version": version for name, version in _versions().items()},
            "system_info": {"system": platform.system(), "machine": platform.machine()},
        },
        "alignguard": own,
    }


def _versions() -> dict[str, str | None]:
    """Those that the benchmark writes down too; None of what is not installed."""
    found: dict[str, str | None] = {**versions()}
    for name in ("datasets", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def columns(result: Mapping[str, Any]) -> dict[str, Any]:
    """The benchmark's columns of a result under its own names, then this project's."""
    info, last, own = result["train_info"], result["train_info"]["metrics"][-1], result["alignguard"]
    return {
        "experiment_name": result["run_info"]["experiment_name"],
        "test_accuracy": last["test accuracy"],
        "train_loss": last["train loss"],
        "forgetting*": last["forgetting"],
        "num_trainable_params": info["num_trainable_params"],
        "train_time": info["train_time"],
        "total_time": result["run_info"]["total_time"],
        "accelerator_memory_max": info["accelerator_memory_max"],
        "file_size": info["file_size"],
        "train_samples": last["train samples"],
        "train_total_tokens": last["train total tokens"],
        "kl, nats a token": own["kl"],
        "unsafe refused, %": own["refusal"],
        "borderline answered, %": own["borderline"],
        "ordinary answered, %": own["compliance"],
        "alignment examples read": own["alignment_examples"],
    }


def table(results: Sequence[Mapping[str, Any]], base: Mapping[str, float]) -> str:
    """Methods side by side, a line for each column; ``base`` is the model before training, of :func:`kept`."""
    shown = [columns(result) for result in results]
    before = {"kl, nats a token": base["kl"]}
    names = ("unsafe refused, %", "borderline answered, %", "ordinary answered, %")
    before |= dict(zip(names, (base[name] for name in SHARES), strict=True))
    lines = [[name, _cell(before.get(name)), *(_cell(one[name]) for one in shown)] for name in list(shown[0])[1:]]
    heads = {"column": "left", "before": "right"} | {one["experiment_name"]: "right" for one in shown}
    return text_table(heads, lines)


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def run(args: argparse.Namespace) -> None:
    """Train and measure each method, and write a JSON file for each and their table.

    Raises:
        FileNotFoundError, ValueError: bad options or data, named.
    """
    folder: Path = args.output_dir
    given = {name: getattr(args, name) for name in FILES if getattr(args, name) is not None}
    if args.model and len(given) < len(FILES):
        lacking = [f"--{name.replace('_', '-')}" for name in FILES if name not in given]
        raise ValueError(f"with --model also give {', '.join(lacking)}")
    settings = Settings.read(args.settings or (None if args.model else TINY), **_changes(args))
    folder.mkdir(parents=True, exist_ok=True)
    files = given if args.model else {**embedded_files(folder), **given}
    for name in ("data", "valid_data", "test_data"):
        read_questions(files[name], f"--{name.replace('_', '-')}")  # told before the first run, not after it
    read_texts(files["text"])
    model_id = args.model or str(model_path())
    results = []
    for name in dict.fromkeys(args.method):
        results.append(run_method(name, model_id, files, settings, folder / name, args.limit))
        write_text(folder / f"{name}.json", json.dumps(results[-1], indent=1, ensure_ascii=False) + "\n")
    model, tokenizer = load_model(model_id)
    text = table(results, kept(model, tokenizer, files["drift_data"], args.limit))
    write_text(folder / "table.txt", text + "\n")
    print(text)
    print(f"written to {folder}: table.txt, {', '.join(f'{name}.json' for name in dict.fromkeys(args.method))}")


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    changes = {"max_steps": args.max_steps, "seed": args.seed}
    if args.max_steps is not None:
        changes["eval_steps"] = args.eval_steps or max(1, args.max_steps // 20)
    elif args.eval_steps is not None:
        changes["eval_steps"] = args.eval_steps
    return {name: value for name, value in changes.items() if value is not None}


def add_arguments(own: argparse.ArgumentParser) -> None:
    """The command line of :func:`run`."""
    own.description = "peft's MetaMathQA benchmark for LoRA with the guard and without it"
    own.add_argument("--model", help="folder or hub name (default: the embedded model, tiny settings, sums)")
    for name, words in FILES.items():
        own.add_argument(f"--{name.replace('_', '-')}", help=words)
    own.add_argument("--method", nargs="+", choices=list(GUARDS), default=list(GUARDS), help="default: both")
    own.add_argument("--settings", type=Path, help="JSON file of fields in place of the benchmark's, see README.md")
    own.add_argument("--max-steps", type=int, help="optimizer steps")
    own.add_argument("--eval-steps", type=int, help="steps between two readings (default: a twentieth of the steps)")
    own.add_argument("--seed", type=int, help="of the adapter's start")
    own.add_argument("--limit", type=int, help="most DriftCheck prompts of each category (default: all)")
    own.add_argument("--output-dir", type=Path, default=Path("runs/peft-comparison"), help="default: %(default)s")
    own.set_defaults(run=run)
