"""What each guard keeps on the embedded model: plain LoRA, the paper's terms, refreshed forms, and KL to the base.

    python benchmarks/forgetting.py --out benchmarks/results/forgetting.json

All runs share data and schedule and, seed by seed, everything random. Strengths were chosen on validation prompts
(benchmarks/choices.py); the numbers here come from DriftCheck's test prompts, which nothing was chosen by. An
interrupted script goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from choices import KFAC, KL, LIGHT, PAPER, sweep

from alignguard.demo import TRAINING, versions
from alignguard.experiment import GUARD, Bench, make_job, measure_base

ASKED = 150  # prompts of each category

GUARDS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    # arXiv 2508.02079 as written: one-sided Gram, 80 % of its energy, both collision terms, estimated once in 1000 steps
    "paper": {**PAPER, **LIGHT, "refresh_every": 1000, "refresh_examples": 128},
    "paper, refreshed": {**PAPER, **LIGHT, "refresh_every": 25, "refresh_examples": 32},
    "kfac, refreshed every 25": {**KFAC, "lambda_alignment": 1.0},
    "kfac, refreshed every 50": {**KFAC, "lambda_alignment": 3.0, "refresh_every": 50},
    "kl to the base, every step": KL,
    "kl to the base, every 8th": {**KL, "kl_every": 8},
}


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, default=Path("benchmarks/results/forgetting.json"))
    cli.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    cli.add_argument("--guards", nargs="+", default=list(GUARDS), choices=list(GUARDS))
    cli.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    args = cli.parse_args()
    shared = Bench.embedded(limit=ASKED)
    jobs = [
        make_job(name, "plain" if GUARDS[name] is None else GUARD, GUARDS[name] or {}, seed)
        for seed in args.seeds
        for name in args.guards
    ]
    head = {"command": "python benchmarks/forgetting.py", "versions": versions(), "training": TRAINING}
    sweep(jobs, shared, head, args.out, args.processes)
    result = json.loads(args.out.read_text())
    args.out.write_text(
        json.dumps({**result, "prompts_of_each_category": ASKED, "base": measure_base(shared)}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
