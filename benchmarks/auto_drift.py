"""Does max_drift land where it is told to, and is what it finds as good as a sweep of λ?

    python benchmarks/auto_drift.py --out benchmarks/results/auto_drift.json
    python benchmarks/auto_drift.py --task runs/tasks/sst2 --out benchmarks/results/auto_drift_sst2.json

Runs the guard with each budget, and over 12 fixed strengths, for each seed. A budget's run is judged twice: by the drift
measured at its end over the budget, and by what it keeps over what the best strength keeps among those that reach its
task accuracy less half a point. Without strengths (``--strengths``) the first of the two is all there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from alignguard.embedded import TRAINING
from alignguard.files import write_text
from alignguard.guard import GuardConfig
from alignguard.training import versions
from studies.bench import Bench, measure_base
from studies.jobs import GUARD, make_job, run_job
from studies.ledger import Ledger, run_jobs
from studies.summaries import SLACK, kept_of_base

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 300.0)


def judged(runs: list[dict[str, Any]], base: dict[str, Any]) -> list[dict[str, Any]]:
    """Every budget's run beside the sweep of its seed."""
    found = []
    for run in runs:
        budget = run["settings"].get("max_drift")
        if budget is None:
            continue
        swept = [r for r in runs if r["seed"] == run["seed"] and "max_drift" not in r["settings"]]
        able = [r for r in swept if r["task"] >= run["task"] - SLACK]
        best = max((kept_of_base(r, base) for r in able), default=None)
        found.append(
            {
                "budget": budget, "seed": run["seed"], "drift": run["drift"], "drift_over_budget": run["drift"] / budget,
                "task": run["task"], "kept": kept_of_base(run, base), "kept_over_best_of_sweep": None if best is None else kept_of_base(run, base) / best,
            }
        )  # fmt: skip
    return found


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--task", help="path of a task of benchmarks/tasks.py, without _train.jsonl")
    cli.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.3])
    cli.add_argument("--strengths", type=float, nargs="*", default=STRENGTHS, help="λ_A of the sweep")
    cli.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    cli.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    args = cli.parse_args()
    shared = Bench.embedded()
    if args.task is not None:
        shared = dataclasses.replace(shared, task_train=f"{args.task}_train.jsonl", task_test=f"{args.task}_test.jsonl")
    config = GuardConfig.curvature()  # written out: a run is of the defaults that it was made with
    steps = config.interval(TRAINING["max_steps"])
    used = {"structure": config.structure, "refresh_every": steps, "refresh_examples": config.refresh_examples}
    settings = [{**used, "max_drift": b, "lambda_alignment": config.lambda_alignment} for b in args.budgets] + [
        {**used, "lambda_alignment": s} for s in args.strengths
    ]
    jobs = [make_job(str(s), GUARD, s, seed) for seed in args.seeds for s in settings]
    head = {"command": "python benchmarks/auto_drift.py", "versions": versions(), "training": TRAINING}
    ledger = Ledger(args.out.with_suffix(".runs.jsonl"), {**head, **shared.describe()})
    rows = run_jobs(jobs, functools.partial(run_job, shared), ledger, args.processes, progress=True)
    base = measure_base(shared)
    runs = [{"settings": r["job"]["settings"], "seed": r["job"]["seed"], **r["result"]} for r in rows]
    whole = [r for r in runs if "error" not in r]
    write_text(
        args.out, json.dumps({**head, "base": base, "judged": judged(whole, base), "runs": runs}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
