"""Full fine-tuning of the embedded model: plain, the default, KL to the base, and L2 to the start.

    python benchmarks/full.py tune   --out benchmarks/results/full_tuning.json
    python benchmarks/full.py report --foreign DATA --out benchmarks/results/full.json
    python benchmarks/full.py report --foreign DATA --task banking77 --out benchmarks/results/full_banking77.json

``tune`` asks validation prompts with a seed of its own. It sweeps plain fine-tuning's learning rate first, and takes the
smallest one whose task accuracy lies within half a point of the best; then, at that rate, four strengths of KL and of
L2. ``report`` runs of each the setting that keeps most within half a point of plain fine-tuning, and the default as it
is, on DriftCheck's own prompts and the foreign ones of ``sweeps.FOREIGN``. DATA is the folder of the prompt sets, and
``benchmarks/tasks.py`` writes other tasks. Both go on where they stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sweeps import FIXED, SEED, arguments, asked, flat, sweep, validation_bench

from studies.bench import Bench
from studies.jobs import GUARD, make_job
from studies.plans import ANCHOR
from studies.summaries import SLACK, best

RATES = (3e-5, 1e-4, 3e-4, 1e-3)
DEFAULT = "kl with memory"
TRIED: dict[str, tuple[str, list[dict[str, Any]]]] = {  # method, and the settings that are tried of it
    "kl": (GUARD, [{**ANCHOR, "lambda_kl": strength, "kl_every": 4} for strength in (0.3, 1.0, 3.0, 10.0)]),
    "l2": ("l2", [{"strength": strength} for strength in (1e-3, 1e-2, 0.1, 1.0)]),
}


def rate_of(tuned: Mapping[str, Any]) -> float:
    """Smallest rate at which plain fine-tuning learns the task within ``SLACK`` of the best."""
    plain = [run for run in map(flat, tuned["runs"]) if run["method"] == "plain" and "error" not in run]
    top = max(run["task"] for run in plain)
    return min(run["settings"]["learning_rate"] for run in plain if run["task"] >= top - SLACK)


def chosen(tuned: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each method that was tuned the best setting at the rate of all."""
    rate, runs = rate_of(tuned), list(map(flat, tuned["runs"]))
    least = next(r["task"] for r in runs if r["method"] == "plain" and r["settings"]["learning_rate"] == rate) - SLACK
    found = {name: best([run for run in runs if run["method"] == name], tuned["base"], least) for name in TRIED}
    return {name: {k: v for k, v in run["settings"].items() if k != "learning_rate"} for name, run in found.items()}


def tune(args: argparse.Namespace) -> None:
    command = "python benchmarks/full.py tune"
    with tempfile.TemporaryDirectory() as folder:
        shared = validation_bench(Path(folder), method="full")
        rates = [make_job("plain", "plain", {}, SEED, "plain", training={"learning_rate": rate}) for rate in RATES]
        sweep(shared, rates, args.out, args.processes, command)
        training = {"learning_rate": rate_of(json.loads(args.out.read_text()))}
        tried = [
            make_job(name, method, settings, SEED, name, training=training)
            for name, (method, grid) in TRIED.items()
            for settings in grid
        ]
        sweep(shared, tried, args.out, args.processes, command)


def report(args: argparse.Namespace) -> None:
    tuned = json.loads(args.tuning.read_text())
    training, settings = {"learning_rate": rate_of(tuned)}, chosen(tuned)
    methods = {"plain": ("plain", {}), DEFAULT: (GUARD, FIXED[DEFAULT])}
    methods |= {name: (method, settings[name]) for name, (method, _) in TRIED.items()}
    jobs = [
        make_job(name, method, own, seed, name, training=training)
        for seed in args.seeds
        for name, (method, own) in methods.items()
    ]
    shared, command = asked(Bench.embedded(method="full"), "python benchmarks/full.py report", args)
    sweep(shared, jobs, args.out, args.processes, command)


def main() -> None:
    args = arguments(__doc__, "full_tuning.json").parse_args()
    (tune if args.what == "tune" else report)(args)


if __name__ == "__main__":
    main()
