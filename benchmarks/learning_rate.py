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
from typing import Any

from alignguard.data import read_jsonl
from alignguard.embedded import TRAINING, data_path
from alignguard.files import write_text
from alignguard.training import versions
from studies.bench import Bench, make_job, run_job
from studies.ledger import Ledger, run_jobs

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEED = 100  # not one of the seeds that results are reported for


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


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, required=True)
    args = cli.parse_args()
    head = {"command": "python benchmarks/learning_rate.py", "versions": versions(), "training": TRAINING}
    with tempfile.TemporaryDirectory() as folder:
        shared = bench(Path(folder))
        jobs = [make_job("plain", "plain", {}, SEED, training={"learning_rate": rate}) for rate in RATES]
        ledger = Ledger(args.out.with_suffix(".runs.jsonl"), {**head, **shared.describe()})
        rows = run_jobs(jobs, functools.partial(run_job, shared), ledger, progress=True)
        runs = [{**row["result"], **row["job"]["training"]} for row in rows]
        write_text(args.out, json.dumps({**head, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
