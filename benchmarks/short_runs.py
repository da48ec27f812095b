"""How often a short run should estimate the curvature anew: chosen on validation prompts, reported on DriftCheck's own.

    python benchmarks/short_runs.py tune   --out benchmarks/results/short_runs_tuning.json
    python benchmarks/short_runs.py report --out benchmarks/results/short_runs.json

Runs of 25, 50 and 100 optimizer steps, each with a schedule of its own, plain and by the default guard with an estimate
every 25 steps (the first after 10), every fifth and every eighth of the run, at its strength and at twice it. ``tune``
takes seeds that nothing is reported for and rows of validation; ``report`` the others. Both go on where they stopped.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from sweeps import SEED, SKETCHED, sweep, validation_bench

from studies.bench import Bench
from studies.jobs import GUARD, make_job

STEPS = (25, 50, 100)
PROMPTS = 100  # of each DriftCheck category


def guards(steps: int) -> dict[str, dict[str, Any]]:
    """Schedules by name for a run of so many steps."""
    fifth, eighth = ({"refresh_every": steps // n, "first_refresh": min(10, steps // n)} for n in (5, 8))
    return {
        "every 25": {"refresh_every": 25, "first_refresh": 10},
        "every fifth": fifth,
        "every eighth": eighth,
        "every fifth, twice as strong": {**fifth, "lambda_alignment": 2.0},
        "every 25, twice as strong": {"refresh_every": 25, "first_refresh": 10, "lambda_alignment": 2.0},
    }


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", choices=["tune", "report"])
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--seeds", type=int, nargs="+", default=None)
    cli.add_argument("--guards", nargs="+", choices=guards(25), default=list(guards(25)))
    cli.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    args = cli.parse_args()
    tune = args.what == "tune"
    seeds = args.seeds or ([SEED, SEED + 1, SEED + 2] if tune else [0, 1, 2])
    jobs = []
    for seed in seeds:
        for steps in STEPS:
            schedule = {"max_steps": steps}
            jobs.append(make_job("plain", "plain", {}, seed, str(steps), training=schedule))
            for name in args.guards:
                settings = {**SKETCHED, **guards(steps)[name]}
                jobs.append(make_job(name, GUARD, settings, seed, str(steps), training=schedule))
    with tempfile.TemporaryDirectory() as folder:
        shared = validation_bench(Path(folder)) if tune else Bench.embedded(limit=PROMPTS)
        sweep(shared, jobs, args.out, args.processes, f"python benchmarks/short_runs.py {args.what}")


if __name__ == "__main__":
    main()
