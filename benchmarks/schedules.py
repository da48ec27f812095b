"""The default on the embedded model at other lengths and rates than it was chosen at, beside plain LoRA.

    python benchmarks/schedules.py DATA --out benchmarks/results/schedules.json

DATA is the folder of the prompt sets, of which ``sweeps.FOREIGN`` are asked too. Goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sweeps import FIXED, foreign_prompts, sweep

from studies.bench import Bench
from studies.jobs import GUARD, make_job

SCHEDULES = {  # fields of TrainingArguments that replace the embedded model's own
    "120 steps": {"max_steps": 120},
    "500 steps": {"max_steps": 500},
    "1500 steps": {"max_steps": 1500},
    "rate 1e-3": {"learning_rate": 1e-3},
    "rate 1e-4": {"learning_rate": 1e-4},
}
PROMPTS = 100  # of each DriftCheck category


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("data", type=Path, help="folder of the prompt sets")
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    cli.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    cli.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    args = cli.parse_args()
    default = "kl with memory"
    jobs = []
    for seed in args.seeds:
        for name in args.schedules:
            jobs.append(make_job("plain", "plain", {}, seed, name, training=SCHEDULES[name]))
            jobs.append(make_job(default, GUARD, FIXED[default], seed, name, training=SCHEDULES[name]))
    shared = Bench.embedded(foreign=foreign_prompts(args.data, args.out.with_suffix(".foreign.jsonl")), limit=PROMPTS)
    sweep(shared, jobs, args.out, args.processes, "python benchmarks/schedules.py DATA")


if __name__ == "__main__":
    main()
