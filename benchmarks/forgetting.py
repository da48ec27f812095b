"""What each guard keeps on the embedded model: plain LoRA, the paper's terms, refreshed forms, and KL to the base.

    python benchmarks/forgetting.py --out benchmarks/results/forgetting.json

Runs are made one by one and the file is rewritten after each, so an interrupted run goes on where it stopped. All
share data, seed and schedule. Strengths come from a first look at validation prompts (benchmarks/choices.py), not from
a sweep; the numbers here come from DriftCheck's test prompts, which no strength was chosen by.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from alignguard.config import GuardConfig
from alignguard.demo import TRAINING, demo_prompts, measure, train, versions
from alignguard.embedded import model_path
from alignguard.files import write_text
from alignguard.fit import load_model

GUARDS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    # arXiv 2508.02079 as written: one-sided Gram, 80 % of its energy, both collision terms, estimated once in 1000 steps
    "paper": {
        "structure": "gram", "lambda_alignment": 3.0, "lambda_task": 0.01, "lambda_collision": 0.01, "alpha": 0.5,
        "metric": "euclidean", "energy": 0.8, "refresh_every": 1000, "refresh_examples": 128,
    },
    "paper, refreshed": {
        "structure": "gram", "lambda_alignment": 3.0, "lambda_task": 0.01, "lambda_collision": 0.01, "alpha": 0.5,
        "metric": "euclidean", "energy": 0.8, "refresh_every": 25, "refresh_examples": 32,
    },
    # GuardConfig's defaults
    "kfac, refreshed": {"structure": "kfac", "lambda_alignment": 30.0, "refresh_every": 25, "refresh_examples": 32},
    "kl to the base": {"lambda_alignment": 0.0, "lambda_kl": 1.0, "kl_examples": 2},
}  # fmt: skip


def one(name: str, seed: int, prompts: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Train with one guard and seed, measure, and say what it took."""
    settings = GUARDS.get(name)
    config = (
        None if settings is None else GuardConfig.from_dict({**settings, **changes.pop("config", {}), "seed": seed})
    )
    with tempfile.TemporaryDirectory() as folder:
        run = train(Path(folder) / "run", config is not None, seed, config, **changes)
        _, tokenizer = load_model(model_path())
        numbers = measure(run.model, tokenizer, prompts).numbers
    return {
        "guard": name, "seed": seed, **numbers, "step_time": run.step_time,
        "alignment_examples": run.guard.examples_read if run.guard else 0,
        "config": config.to_dict() if config else None,
    }  # fmt: skip


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, default=Path("benchmarks/results/forgetting.json"))
    cli.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    cli.add_argument("--guards", nargs="+", default=list(GUARDS), choices=list(GUARDS))
    cli.add_argument("--fresh", action="store_true", help="forget the runs that the file already holds")
    args = cli.parse_args()
    prompts = demo_prompts()
    done = json.loads(args.out.read_text()) if args.out.is_file() and not args.fresh else {"runs": []}
    if "base" not in done:
        model, tokenizer = load_model(model_path())
        done = {
            "command": "python benchmarks/forgetting.py", "versions": versions(), "threads": torch.get_num_threads(),
            "training": TRAINING, "prompts": len(prompts), "base": measure(model.eval(), tokenizer, prompts).numbers,
            **done,
        }  # fmt: skip
    for seed in args.seeds:
        for name in args.guards:
            if any(r["guard"] == name and r["seed"] == seed for r in done["runs"]):
                continue
            row = one(name, seed, prompts)
            done["runs"].append(row)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.out, json.dumps(done, indent=1) + "\n")
            shown = ("task", "refusal", "compliance", "borderline", "kl", "step_time")
            print(f"{name:<18} seed {seed} " + " ".join(f"{k} {row[k]:.3f}" for k in shown), flush=True)


if __name__ == "__main__":
    main()
