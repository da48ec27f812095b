"""How the demo's learning rate and the guards' strengths were chosen: validation prompts alone, one seed.

    python benchmarks/choices.py rate      --out benchmarks/results/learning_rate.json
    python benchmarks/choices.py strength  --out benchmarks/results/strength.json

``rate`` trains plain LoRA over learning rates; the demo takes the one with the lowest task loss on validation rows among
those that still answer ordinary prompts. ``strength`` trains every guard over strengths and refresh intervals at that
rate. Neither reads the prompts that results are reported on, nor a seed that they are reported for.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from runs import run_all

from alignguard.config import GuardConfig
from alignguard.data import read_jsonl
from alignguard.demo import TRAINING, train, versions
from alignguard.driftcheck import driftcheck, measured_kl, task_score
from alignguard.embedded import data_path, model_path
from alignguard.fit import load_model

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEED = 100  # not one of the seeds that results are reported for
KFAC = {"structure": "kfac", "whole_update": True, "refresh_every": 25, "refresh_examples": 32, "lambda_kl": 0.0}
PAPER = {
    "structure": "gram", "whole_update": False, "lambda_task": 0.01, "lambda_collision": 0.01, "alpha": 0.5,
    "metric": "euclidean", "energy": 0.8, "lambda_kl": 0.0,
}  # fmt: skip
KL = {"lambda_alignment": 0.0, "lambda_kl": 1.0, "kl_examples": 2, "kl_every": 1}


def grid() -> list[tuple[str, dict[str, Any] | None]]:
    """Every guard with every setting that is tried."""
    tried: list[tuple[str, dict[str, Any] | None]] = [("plain", None)]
    tried += [("kfac, whole update", {**KFAC, "lambda_alignment": x}) for x in (10.0, 30.0, 100.0)]
    tried += [
        ("kfac, whole update", {**KFAC, "lambda_alignment": 30.0, "refresh_every": n}) for n in (10, 50, 100, 1000)
    ]
    tried += [("kfac, aligned part", {**KFAC, "lambda_alignment": 30.0, "whole_update": False})]
    tried += [("kl to the base", {**KL, "lambda_kl": x}) for x in (1.0, 3.0)]
    tried += [("kl to the base", {**KL, "kl_every": 4})]
    tried += [("kfac and kl", {**KFAC, "lambda_alignment": 30.0, "refresh_every": 50, "lambda_kl": 1.0, "kl_every": 4})]
    once = {"refresh_every": 1000, "refresh_examples": 128}
    often = {"refresh_every": 25, "refresh_examples": 32}
    tried += [("paper", {**PAPER, **once, "lambda_alignment": x}) for x in (1.0, 3.0)]
    tried += [("paper, refreshed", {**PAPER, **often, "lambda_alignment": x}) for x in (0.3, 1.0, 3.0)]
    return tried


def validate(model: Any, tokenizer: Any) -> dict[str, float]:
    """Task and refusals on validation rows alone."""
    unsafe = read_jsonl(data_path("validation"))
    ordinary = read_jsonl(data_path("task_validation"))[:100]
    prompts = [{"prompt": r["prompt"], "category": "unsafe"} for r in unsafe]
    prompts += [{"prompt": r["prompt"], "category": "ordinary"} for r in ordinary]
    summary = driftcheck(model, tokenizer, prompts).summary()
    score = task_score(model, tokenizer, read_jsonl(data_path("task_validation")))
    return {
        "task_score": score.accuracy, "task_loss": score.loss, "refusal": 100 * summary["refusal"].value,
        "compliance": 100 * summary["compliance"].value, "kl": measured_kl(model, None, tokenizer, unsafe),
    }  # fmt: skip


def run(task: dict[str, Any]) -> dict[str, Any]:
    settings = task["settings"]
    config = None if settings is None else GuardConfig.from_dict({**settings, "seed": SEED})
    with tempfile.TemporaryDirectory() as folder:
        done = train(
            Path(folder) / "r", config is not None, SEED, config, training={"learning_rate": task["learning_rate"]}
        )
        _, tokenizer = load_model(model_path())
        examples = done.guard.examples_read if done.guard else 0
        return {**task, **validate(done.model, tokenizer), "step_time": done.step_time, "alignment_examples": examples}


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", choices=["rate", "strength"])
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = cli.parse_args()
    tried = grid() if args.what == "strength" else [("plain", None)]
    rates = RATES if args.what == "rate" else (TRAINING["learning_rate"],)
    tasks = [{"guard": name, "learning_rate": rate, "settings": settings} for rate in rates for name, settings in tried]
    head = {"command": f"python benchmarks/choices.py {args.what}", "seed": SEED, "versions": versions()}
    run_all(head, tasks, run, args.out, args.jobs)


if __name__ == "__main__":
    main()
