"""How the demo's learning rate and the guards' strengths were chosen: validation prompts alone, one seed.

    python benchmarks/choices.py rate      --out benchmarks/results/learning_rate.json
    python benchmarks/choices.py strength  --out benchmarks/results/strength.json

``rate`` trains plain LoRA over learning rates; the demo takes the smallest one whose task accuracy on validation rows lies
within half a point of the best. ``strength`` trains every guard over strengths and refresh intervals at that rate. Neither
reads the prompts that results are reported on, nor a seed that they are reported for.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from alignguard.data import read_jsonl
from alignguard.demo import TRAINING, versions
from alignguard.embedded import data_path
from alignguard.experiment import GUARD, Bench, make_job, run_job
from alignguard.files import write_text
from alignguard.ledger import Ledger, run_jobs

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEED = 100  # not one of the seeds that results are reported for
KFAC = {"structure": "kfac", "whole_update": True, "refresh_every": 25, "refresh_examples": 32, "lambda_kl": 0.0}
PAPER = {
    "structure": "gram", "whole_update": False, "lambda_task": 0.01, "lambda_collision": 0.01, "alpha": 0.5,
    "metric": "euclidean", "energy": 0.8, "lambda_kl": 0.0,
}  # fmt: skip
LIGHT = {"lambda_alignment": 0.3, "lambda_task": 0.001, "lambda_collision": 0.001}
KL = {"lambda_alignment": 0.0, "lambda_kl": 1.0, "kl_examples": 2, "kl_every": 1}


def grid() -> list[tuple[str, dict[str, Any] | None]]:
    """Every guard with every setting that is tried."""
    tried: list[tuple[str, dict[str, Any] | None]] = [("plain", None)]
    tried += [("kfac, whole update", {**KFAC, "lambda_alignment": x}) for x in (1.0, 3.0, 10.0, 30.0, 100.0)]
    tried += [
        ("kfac, whole update", {**KFAC, "lambda_alignment": 30.0, "refresh_every": n}) for n in (10, 50, 100, 1000)
    ]
    tried += [("kfac, whole update", {**KFAC, "lambda_alignment": 3.0, "refresh_every": 50})]
    tried += [("kfac, aligned part", {**KFAC, "lambda_alignment": 30.0, "whole_update": False})]
    tried += [("kl to the base", {**KL, "lambda_kl": x}) for x in (1.0, 3.0)]
    tried += [("kl to the base", {**KL, "kl_every": n}) for n in (4, 8)]
    tried += [("kfac and kl", {**KFAC, "lambda_alignment": 30.0, "refresh_every": 50, "lambda_kl": 1.0, "kl_every": 4})]
    once = {"refresh_every": 1000, "refresh_examples": 128}
    often = {"refresh_every": 25, "refresh_examples": 32}
    tried += [("paper", {**PAPER, **once, "lambda_alignment": x}) for x in (0.1, 1.0, 3.0)]
    tried += [("paper, refreshed", {**PAPER, **often, "lambda_alignment": x}) for x in (0.03, 0.1, 0.3, 1.0, 3.0)]
    tried += [("paper", {**PAPER, **once, **LIGHT}), ("paper, refreshed", {**PAPER, **often, **LIGHT})]
    return tried


def bench(folder: Path, **changes: Any) -> Bench:
    """The embedded model, asked validation prompts and scored on validation rows."""
    ordinary = [{**row, "category": "ordinary"} for row in read_jsonl(data_path("task_validation"))[:100]]
    asked = [
        {"id": f"validation-{i}", "prompt": row["prompt"], "category": row["category"]}
        for i, row in enumerate([*read_jsonl(data_path("validation")), *ordinary])
    ]
    write_text(folder / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in asked))
    asked_of = {"task_test": str(data_path("task_validation")), "prompts": str(folder / "prompts.jsonl")}
    return Bench.embedded(**asked_of, **changes)


def sweep(jobs: list[dict[str, Any]], shared: Bench, head: dict[str, Any], out: Path, processes: int) -> None:
    """Every job that ``out``'s ledger does not hold yet, then one JSON file of all."""
    ledger = Ledger(out.with_suffix(".runs.jsonl"), {**head, **shared.describe()})
    rows = run_jobs(jobs, functools.partial(run_job, shared), ledger, processes, progress=True)
    runs = [
        {"guard": r["job"]["name"], "seed": r["job"]["seed"], "settings": r["job"]["settings"], **r["result"]}
        for r in rows
    ]
    write_text(out, json.dumps({**head, "processes": processes, "runs": runs}, indent=1) + "\n")


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", choices=["rate", "strength"])
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    args = cli.parse_args()
    head = {"command": f"python benchmarks/choices.py {args.what}", "versions": versions(), "training": TRAINING}
    with tempfile.TemporaryDirectory() as folder:
        shared = bench(Path(folder))
        if args.what == "strength":
            jobs = [make_job(name, GUARD if s is not None else "plain", s or {}, SEED) for name, s in grid()]
            sweep(jobs, shared, head, args.out, args.processes)
            return
        # the rate belongs to what runs share, so every rate has a ledger of its own
        runs = []
        for rate in RATES:
            one = Bench.embedded(**{**vars(shared), "training": {**TRAINING, "learning_rate": rate}})
            part = args.out.with_suffix(f".{rate:g}.json")
            sweep([make_job("plain", "plain", {}, SEED)], one, head, part, 1)
            runs += [{**row, "learning_rate": rate} for row in json.loads(part.read_text())["runs"]]
            part.unlink()
        write_text(args.out, json.dumps({**head, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
