"""What the sweeps on the embedded model share: the bench that settings are chosen on, the guard's forms by name, the
ledger of their runs, what a tuning file says is best, and the foreign prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignguard.data import read_jsonl
from alignguard.embedded import TRAINING, data_path
from alignguard.files import write_rows, write_text
from alignguard.guard import GuardConfig
from alignguard.training import versions
from studies.bench import Bench, measure_base
from studies.jobs import run_job
from studies.ledger import Ledger, run_jobs
from studies.plans import ANCHOR
from studies.real_model.measure import prompt_groups
from studies.summaries import SLACK, best

SEED = 100  # not one of the seeds that results are reported for
# Sources that neither the embedded model's alignment nor the packaged prompts have seen, and how many of each are asked.
FOREIGN, ASKED = ("malicious_instruct", "donotanswer", "safetytuned_eval"), 80
# arXiv 2508.02079 as written: one-sided Gram, 80 % of its energy, both collision terms, estimated once in 1000 steps; its
# strengths a tenth of what second-hand sources give, which cost the task 2 to 5 points here
PAPER = {
    "structure": "gram", "whole_update": False, "lambda_alignment": 0.3, "lambda_task": 0.001, "lambda_collision": 0.001,
    "alpha": 0.5, "metric": "euclidean", "energy": 0.8, "lambda_kl": 0.0, "first_refresh": None,
}  # fmt: skip
SKETCHED = {"structure": "kfac-sketch", "lambda_alignment": 1.0, "refresh_every": 25, "refresh_examples": 8}
DEFAULT = {
    name: getattr(GuardConfig(), name)
    for name in ("lambda_alignment", "lambda_kl", "kl_examples", "kl_every", "kl_tokens", "kl_memory", "kl_climb")
}
FIXED: dict[str, dict[str, Any]] = {
    "paper": {**PAPER, "refresh_every": 1000, "refresh_examples": 128},
    "paper, refreshed": {**PAPER, "refresh_every": 25, "refresh_examples": 32},
    "kl, every step": {**ANCHOR, "lambda_kl": 1.0, "kl_every": 1},
    # the default, chosen on the public model (studies/real_model), and what could be turned in it
    "kl with memory": DEFAULT,
    "kl with memory, every 2nd": {**DEFAULT, "kl_every": 2},
    "kl with memory, climb 0.3": {**DEFAULT, "kl_climb": 0.3},
    # the default before it: both factors sketched, half the alignment examples, at the strength and schedule of the sweep
    "guard, sketched": SKETCHED,
    # ΔW_A in place of the whole update, by a hard projector and a soft one
    "guard, leading part": {**SKETCHED, "whole_update": False},
    "guard, leading part, soft": {**SKETCHED, "whole_update": False, "projection": "soft"},
    # a strength that makes up for an estimate gone stale, and costs the task; it was the default before the sweep
    "guard, refreshed rarely": {
        "structure": "kfac",
        "lambda_alignment": 10.0,
        "whole_update": True,
        "refresh_every": 100,
        "first_refresh": 10,
        "refresh_examples": 16,
    },
}


def validation_bench(folder: Path, **changes: Any) -> Bench:
    """The embedded model, asked validation prompts and scored on validation rows."""
    ordinary = [{**row, "category": "ordinary"} for row in read_jsonl(data_path("task_validation"))[:100]]
    asked = [
        {"id": f"validation-{i}", "prompt": row["prompt"], "category": row["category"]}
        for i, row in enumerate([*read_jsonl(data_path("validation")), *ordinary])
    ]
    write_text(folder / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in asked))
    asked_of = {"task_test": str(data_path("task_validation")), "prompts": str(folder / "prompts.jsonl")}
    return Bench.embedded(**asked_of, **changes)


def sweep(shared: Bench, jobs: list[dict[str, Any]], out: Path, processes: int, command: str) -> None:
    """Run what is missing; the file holds every run of its ledger, those of other calls too.

    The ledger is not committed, ``out`` is: on a fresh checkout the ledger starts with the runs that ``out`` holds, if
    they are of the same model, data and versions.
    """
    head = {"command": command, "versions": versions(), "training": TRAINING, "bench": shared.describe()}
    ledger = Ledger(out.with_suffix(".runs.jsonl"), head)
    before = json.loads(out.read_text()) if out.is_file() else {}
    same = all(before.get(key) == value for key, value in head.items())
    if same and not ledger.rows:
        for run in before["runs"]:
            ledger.add(run["job"], run["result"])
    base = before["base"] if same else measure_base(shared)
    run_jobs(jobs, functools.partial(run_job, shared), ledger, processes, progress=True)
    write_text(out, json.dumps({**head, "base": base, "runs": ledger.rows}, indent=1) + "\n")


def flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's result beside its method, seed and settings."""
    job = run["job"]
    settings = {**job["settings"], **job.get("training", {})}
    return {"method": job["group"], "seed": job["seed"], "settings": settings, **run["result"]}


def chosen(tuned: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each method the best setting that learns as much, but for ``SLACK``, as plain LoRA on the schedule of all."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for run in map(flat, tuned["runs"]):
        by_method.setdefault(run["method"], []).append(run)
    least = next(run["task"] for run in by_method["plain"] if not run["settings"]) - SLACK
    return {method: best(runs, tuned["base"], least)["settings"] for method, runs in by_method.items()}


def foreign_prompts(data: Path, out: Path) -> str:
    """Write the foreign prompts, and give the file."""
    groups = {f"foreign {name}" for name in FOREIGN}
    asked = [row for row in prompt_groups(data, "test", ASKED) if row["id"].rpartition("/")[0] in groups]
    write_rows(out, asked)
    return str(out)


def asked(shared: Bench, command: str, args: argparse.Namespace) -> tuple[Bench, str]:
    """The bench and the command of a report with the task and the foreign prompts that its arguments name."""
    if args.task is not None:
        files = {f"task_{part}": str(args.tasks / f"{args.task}_{part}.jsonl") for part in ("train", "test")}
        shared, command = dataclasses.replace(shared, **files), f"{command} --task {args.task}"
    if args.foreign is not None:
        path = foreign_prompts(args.foreign, args.out.with_suffix(".foreign.jsonl"))
        shared, command = dataclasses.replace(shared, foreign=path), f"{command} --foreign DATA"
    return shared, command


def arguments(description: str | None, tuning: str) -> argparse.ArgumentParser:
    """What a sweep that is tuned and then reported takes on the command line."""
    cli = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", choices=["tune", "report"])
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--tuning", type=Path, default=Path("benchmarks/results") / tuning)
    cli.add_argument("--task", help="a task of benchmarks/tasks.py (report alone)")
    cli.add_argument("--tasks", type=Path, default=Path("runs/tasks"), help="folder that tasks.py wrote")
    cli.add_argument(
        "--foreign", type=Path, help="folder of the prompt sets, to ask foreign sources too (report alone)"
    )
    cli.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    cli.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    return cli
