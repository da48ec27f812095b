"""What each guard keeps on the embedded model: plain LoRA, the paper's terms, refreshed forms, and KL to the base.

    python benchmarks/forgetting.py --out benchmarks/results/forgetting.json

All runs share data and schedule and, seed by seed, everything random. Strengths were chosen on validation prompts
(benchmarks/choices.py); the numbers here come from DriftCheck's test prompts, which nothing was chosen by. An
interrupted script goes on where it stopped.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from choices import KFAC, KL, PAPER
from runs import run_all

from alignguard.config import GuardConfig
from alignguard.demo import TRAINING, demo_prompts, measure, train, versions
from alignguard.embedded import model_path
from alignguard.fit import load_model

GUARDS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    # arXiv 2508.02079 as written: one-sided Gram, 80 % of its energy, both collision terms, estimated once in 1000 steps
    "paper": {**PAPER, "lambda_alignment": 3.0, "refresh_every": 1000, "refresh_examples": 128},
    "paper, refreshed": {**PAPER, "lambda_alignment": 3.0, "refresh_every": 25, "refresh_examples": 32},
    "kfac, refreshed": {**KFAC, "lambda_alignment": 30.0},
    "kl to the base": KL,
    "default": {},
}


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Train with one guard and seed, measure, and say what it took."""
    name, seed = task["guard"], task["seed"]
    settings = GUARDS[name]
    config = None if settings is None else GuardConfig.from_dict({**settings, "seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        done = train(Path(folder) / "run", config is not None, seed, config)
        _, tokenizer = load_model(model_path())
        numbers = measure(done.model, tokenizer, demo_prompts()).numbers
    return {
        "guard": name, "seed": seed, **numbers, "step_time": done.step_time,
        "alignment_examples": done.guard.examples_read if done.guard else 0,
        "config": config.to_dict() if config else None,
    }  # fmt: skip


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, default=Path("benchmarks/results/forgetting.json"))
    cli.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    cli.add_argument("--guards", nargs="+", default=list(GUARDS), choices=list(GUARDS))
    cli.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = cli.parse_args()
    model, tokenizer = load_model(model_path())
    head = {
        "command": "python benchmarks/forgetting.py", "versions": versions(), "training": TRAINING,
        "prompts": len(demo_prompts()), "base": measure(model.eval(), tokenizer, demo_prompts()).numbers,
    }  # fmt: skip
    tasks = [{"guard": name, "seed": seed} for seed in args.seeds for name in args.guards]
    run_all(head, tasks, run, args.out, args.jobs)


if __name__ == "__main__":
    main()
