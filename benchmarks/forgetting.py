"""How forgetting grows with fine-tuning and changes with size: the law of ``studies.forgetting_law``, method by method.

    python scripts/train_embedded.py DATA two --bf16 --leg 5 --resume alignguard/embedded/model --grow --layers 2 \
        --batch 16 --steps 600 --lr 8e-4 --seed 7
    python benchmarks/forgetting.py alignguard/embedded/model two larger --out benchmarks/results/forgetting.json

Every model (of one tokenizer) learns the packaged task for each number of steps, plainly, with replay and guarded, each as
``benchmarks/results/tuning.json`` has it for the embedded model; nothing is tuned for another size. Forgetting is KL from
the model before, in nats a response token of validation rows: how much less likely the model finds what it would have
said, so that L − L0 of the law is measured by one number. Goes on where it stopped; a model more adds its rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

from sweeps import FIXED, chosen
from transformers import AutoModelForCausalLM

from alignguard.embedded import TRAINING
from alignguard.files import write_text
from alignguard.training import versions
from studies.bench import Bench, measure_base
from studies.forgetting_law import fit_scaling_law
from studies.jobs import GUARD, make_job, run_job
from studies.ledger import Ledger, run_jobs

AMOUNTS = (6, 12, 25, 50, 100, 200, 400)  # optimizer steps of 16 examples, each run with a schedule of its own
PROMPTS = 100  # of each DriftCheck category: the law is fitted to KL, and answers take time


def observed(rows: list[dict[str, Any]], models: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a run: method, parameters, task examples read, KL and what was kept."""
    kept = ("kl", "refusal", "borderline", "compliance", "task")
    found = []
    for row in rows:
        job, result = row["job"], row["result"]
        if "error" not in result:
            place = {"model": row["model"], "parameters": models[row["model"]]["parameters"], "seed": job["seed"]}
            examples = job["training"]["max_steps"] * TRAINING["per_device_train_batch_size"]
            found.append({"method": job["name"], **place, "examples": examples, **{k: result[k] for k in kept}})
    return found


def laws(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The law of each method, with its intervals, and what the runs do not pin down."""
    fits: dict[str, Any] = {}
    for method in dict.fromkeys(row["method"] for row in found):
        own = [row for row in found if row["method"] == method]
        fit = fit_scaling_law(*([row[key] for row in own] for key in ("parameters", "examples", "kl")))
        told = dataclasses.asdict(fit)
        fits[method] = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in told.items()}
    return fits


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("models", type=Path, nargs="+", help="folders; a model is called as its folder is")
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--tuning", type=Path, default=Path("benchmarks/results/tuning.json"))
    cli.add_argument("--amounts", type=int, nargs="+", default=AMOUNTS, help="optimizer steps")
    cli.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    cli.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    args = cli.parse_args()
    replay = chosen(json.loads(args.tuning.read_text()))["replay"]
    methods = {"plain": ("plain", {}), "replay": ("replay", replay), "guard": (GUARD, FIXED["guard, sketched"])}
    jobs = [
        make_job(name, method, settings, seed, "forgetting", training={"max_steps": steps})
        for seed in args.seeds
        for steps in args.amounts
        for name, (method, settings) in methods.items()
    ]
    head = {"command": "python benchmarks/forgetting.py MODEL...", "versions": versions(), "training": TRAINING}
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    models: dict[str, Any] = result.get("models", {})
    rows: list[dict[str, Any]] = [run for run in result.get("runs", []) if run["model"] not in map(_name, args.models)]
    for folder in args.models:
        name, shared = _name(folder), Bench.embedded(model=str(folder), limit=PROMPTS)
        ledger = Ledger(args.out.with_suffix(f".{name}.runs.jsonl"), {**head, **shared.describe()})
        run_jobs(jobs, functools.partial(run_job, shared), ledger, args.processes, progress=True)
        size = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
        models[name] = {"parameters": size, "base": measure_base(shared)}
        rows += [{"model": name, **row} for row in ledger.rows]
        found = observed(rows, models)
        told = {**head, "models": models, "observed": found, "laws": laws(found), "runs": rows}
        write_text(args.out, json.dumps(told, indent=1) + "\n")


def _name(folder: Path) -> str:
    """``embedded`` for the packaged model, whose folder is called ``model``; else the folder's own name."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


if __name__ == "__main__":
    main()
