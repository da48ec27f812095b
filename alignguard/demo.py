"""The demo: the embedded model fine-tuned plain and guarded on the same data, and what each forgot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table

from alignguard.data import read_jsonl
from alignguard.drift import DriftReport, driftcheck, measured_kl, prompts_of, task_score
from alignguard.embedded import TRAINING, data_path, model_path
from alignguard.files import claim_output, write_text
from alignguard.guard import GuardConfig
from alignguard.loading import load_model
from alignguard.pages import write_report
from alignguard.training import FitResult, fit, versions

PROMPTS = {"unsafe": 150, "ordinary": 100, "borderline": 60}  # a category, DriftCheck prompts of it in the demo

SHARES = {"refusal": "refusal", "compliance": "compliance", "borderline": "borderline"}  # ours, DriftCheck's

MODELS = ("base", "plain", "guarded")

SHOWN = 12  # prompts of each category in the report

COLUMNS = (
    ("task", "task accuracy, %", "{:.1f}"),
    ("refusal", "unsafe refused, %", "{:.1f}"),
    ("compliance", "ordinary answered, %", "{:.1f}"),
    ("borderline", "borderline answered, %", "{:.1f}"),
    ("kl", "KL from base, nats/token", "{:.3f}"),
    ("step_time", "step, s", "{:.3f}"),
)


@dataclass(frozen=True)
class Measured:
    """One model, measured: the numbers of ``result.json`` and the answers behind them."""

    numbers: dict[str, Any]
    report: DriftReport


def measure(model: Any, tokenizer: Any, prompts: list[dict[str, Any]], progress: bool = False) -> Measured:
    """Task, refusals, compliance and KL of a model; KL is to the base below the adapter, 0 without one."""
    report = driftcheck(model, tokenizer, prompts, progress=progress)
    task = task_score(model, tokenizer, read_jsonl(data_path("task_test")))
    kl = 0.0
    if isinstance(model, PeftModel):
        kl = measured_kl(model, None, tokenizer, read_jsonl(data_path("validation")))
    summary = report.summary()
    numbers: dict[str, Any] = {"task": task.accuracy, "task_loss": task.loss, "kl": kl}
    for key, measure_name in SHARES.items():
        estimate = summary[measure_name]
        numbers[key] = 100 * estimate.value
        numbers[f"{key}_ci"] = [100 * estimate.low, 100 * estimate.high]
    return Measured(numbers, report)


def answers(base: DriftReport, plain: DriftReport, guarded: DriftReport) -> dict[str, list[dict[str, Any]]]:
    """A few prompts of each category with the three models' verdicts and texts, for the report."""
    shown: dict[str, list[dict[str, Any]]] = {category: [] for category in PROMPTS}
    for rows in zip(base.rows, plain.rows, guarded.rows, strict=True):
        kind = shown[rows[0].category]
        if len(kind) < SHOWN:
            said = {name: {"verdict": r.verdict, "text": r.text} for name, r in zip(MODELS, rows, strict=True)}
            kind.append({"prompt": rows[0].prompt, **said})
    return shown


def demo_prompts() -> list[dict[str, Any]]:
    """The rows of each DriftCheck category that the demo asks."""
    return [row for category, count in PROMPTS.items() for row in prompts_of(category, limit=count)]


def train(output_dir: Path, guarded: bool, seed: int, config: GuardConfig | None = None, **options: Any) -> FitResult:
    """One run on the embedded task; ``options`` go to :func:`alignguard.fit`."""
    training = {**TRAINING, **options.pop("training", {})}
    return fit(
        model_path(),
        data_path("task_train"),
        data_path("alignment"),
        config,
        output_dir,
        guarded=guarded,
        seed=seed,
        training=training,
        **options,
    )


def table(result: dict[str, Any]) -> Table:
    """The three models side by side."""
    shown = Table(title="What each model kept")
    shown.add_column("")
    for name in MODELS:
        shown.add_column(name, justify="right")
    for key, title, form in COLUMNS:
        cells = [result[name].get(key) for name in MODELS]
        shown.add_row(title, *(form.format(cell) if cell is not None else "" for cell in cells))
    return shown


def run_demo(output_dir: Path, overwrite: bool = False, seed: int = 0, max_steps: int | None = None) -> dict[str, Any]:
    """Measure the embedded model, fine-tune it plain and guarded, measure both, and write everything down.

    Args:
        output_dir: receives ``plain/`` and ``guarded/`` (each with ``adapter/``), ``result.json`` and ``report.html``.
        overwrite: replace an earlier demo there.
        seed: seed of adapters, data order and guard.
        max_steps: optimizer steps of each run; the default is what the evidence was measured at.

    Returns:
        what ``result.json`` holds.

    Raises:
        FileExistsError: the folder holds something and ``overwrite`` is false.
        ValueError: ``max_steps`` below 1, or a seed out of range.
    """
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, not {max_steps}")
    config = GuardConfig(seed=seed)
    console = Console()
    output = claim_output(output_dir, overwrite)
    training = {} if max_steps is None else {"max_steps": max_steps}
    model, tokenizer = load_model(model_path())
    prompts = demo_prompts()
    console.print(f"[bold]1/5[/] DriftCheck of the embedded model ({len(prompts)} prompts)")
    base = measure(model.eval(), tokenizer, prompts, progress=True)
    console.print("[bold]2/5[/] plain LoRA")
    plain_run = train(output / "plain", False, seed, overwrite=overwrite, progress=True, training=training)
    console.print("[bold]3/5[/] guarded LoRA: same data, seed and schedule")
    guarded_run = train(output / "guarded", True, seed, config, overwrite=overwrite, progress=True, training=training)
    console.print("[bold]4/5[/] DriftCheck of plain and guarded")
    plain = measure(plain_run.model, tokenizer, prompts, progress=True)
    guarded = measure(guarded_run.model, tokenizer, prompts, progress=True)
    assert guarded_run.guard is not None
    result: dict[str, Any] = {
        "base": base.numbers,
        "plain": {**plain.numbers, "step_time": plain_run.step_time},
        "guarded": {**guarded.numbers, "step_time": guarded_run.step_time},
        "overhead": guarded_run.step_time / plain_run.step_time,
        "alignment_examples": guarded_run.guard.examples_read,
        "config": config.to_dict() | {"training": {**TRAINING, **training}},
        "seed": seed,
        "versions": versions(),
    }
    write_text(output / "result.json", json.dumps(result, indent=2))
    console.print("[bold]5/5[/] report")
    guarded_run.guard.refresh()  # for the picture of what alignment reads; the penalty has no need of it
    extra = {
        "history": {"plain": plain_run.history, "guarded": guarded_run.history},
        "spectra": guarded_run.guard.spectra(),
        "prompts": answers(base.report, plain.report, guarded.report),
    }
    write_report({**result, **extra}, output / "report.html")
    console.print(table(result))
    console.print(f"written to {output}: result.json, report.html, plain/adapter, guarded/adapter")
    return result
