"""What a plan foretells, before anything is run, beside what the run then takes: seconds and bytes, every structure.

    OMP_NUM_THREADS=1 python benchmarks/planning.py --out benchmarks/results/planning.json

The model and data of curvature.py. A plan and a run alternate; seconds are wall-clock, of one thread, and every error
is that of a plan against the run that follows it, so that both see the same machine. Reported is the median of them and
the worst. Memory is the most that torch's allocator had handed out at once, which the plan does not measure but counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from curvature import Bench
from scaling import allocator_peak

import fishergeo as fg
from alignguard.files import write_text
from alignguard.training import versions

STRUCTURES = ("sketch", "kfac", "gram", "ekfac", "diagonal")


def measure(bench: Bench, structure: str, repeats: int) -> dict[str, Any]:
    options = {"layers": bench.layers}

    def run() -> fg.Fisher:
        return fg.estimate_fisher(bench.model, bench.batches, structure=structure, **options)

    planned, taken = [], []
    for _ in range(repeats):
        plan = fg.plan(bench.model, structure, batches=bench.batches, calibrate=True, **options)
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
        assert plan.seconds is not None
        planned.append(plan.seconds)
    quotients = [p / t for p, t in zip(planned, taken, strict=True)]
    peak = allocator_peak(run)
    return {
        "structure": structure,
        "planned_seconds": statistics.median(planned),
        "seconds": statistics.median(taken),
        "planned_over_taken": statistics.median(quotients),
        "quotients": quotients,
        "planned_ratio": plan.ratio,
        "planned_peak_bytes": plan.peak_bytes,
        "peak_bytes": peak,
        "planned_over_peak": plan.peak_bytes / peak,
    }


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path)
    cli.add_argument("--examples", type=int, default=64)
    cli.add_argument("--repeats", type=int, default=5)
    cli.add_argument("--only", nargs="*", default=STRUCTURES)
    args = cli.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.examples)
    rows = []
    for structure in args.only:
        row = measure(bench, structure, args.repeats)
        rows.append(row)
        print(
            f"{structure:<9} planned {row['planned_seconds']:.2f} s, taken {row['seconds']:.2f} s, quotient "
            f"{row['planned_over_taken']:.2f} ({min(row['quotients']):.2f} to {max(row['quotients']):.2f}); "
            f"peak {row['planned_over_peak']:.2f}",
            flush=True,
        )
    result = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/planning.py --repeats {args.repeats}",
        "versions": versions(),
        "threads": 1,
        "examples": args.examples,
        "rows": rows,
    }
    if args.out:
        write_text(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
