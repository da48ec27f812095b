"""How the demo's learning rate was chosen: validation prompts alone, one seed.

    python benchmarks/learning_rate.py --out benchmarks/results/learning_rate.json

Trains plain LoRA over learning rates; the demo takes the smallest one whose task accuracy on validation rows lies within
half a point of the best. Reads neither the prompts that results are reported on, nor a seed that they are reported for.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from pathlib import Path

from sweeps import SEED, validation_bench

from alignguard.embedded import TRAINING
from alignguard.files import write_text
from alignguard.training import versions
from studies.jobs import make_job, run_job
from studies.ledger import Ledger, run_jobs

RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, required=True)
    args = cli.parse_args()
    head = {"command": "python benchmarks/learning_rate.py", "versions": versions(), "training": TRAINING}
    with tempfile.TemporaryDirectory() as folder:
        shared = validation_bench(Path(folder))
        jobs = [make_job("plain", "plain", {}, SEED, training={"learning_rate": rate}) for rate in RATES]
        ledger = Ledger(args.out.with_suffix(".runs.jsonl"), {**head, **shared.describe()})
        rows = run_jobs(jobs, functools.partial(run_job, shared), ledger, progress=True)
        runs = [{**row["result"], **row["job"]["training"]} for row in rows]
        write_text(args.out, json.dumps({**head, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
