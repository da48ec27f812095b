"""How the demo's learning rate and the guard's strengths were chosen: validation prompts alone, one seed.

    python benchmarks/choices.py rate      --out benchmarks/results/learning_rate.json
    python benchmarks/choices.py strength  --out benchmarks/results/strength.json

``rate`` trains plain LoRA over learning rates and reports task and refusals on validation rows. The task's loss still
falls at the largest rate; the demo takes 2e-3, where the task is nearly learned and the rate is a usual one for LoRA.
Larger rates forget more. ``strength`` trains the guards over strengths at that rate. Neither reads the prompts that
results are reported on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from forgetting import GUARDS

from alignguard.config import GuardConfig
from alignguard.data import read_jsonl
from alignguard.demo import TRAINING, train, versions
from alignguard.driftcheck import driftcheck, measured_kl, task_score
from alignguard.embedded import data_path, model_path
from alignguard.files import write_text
from alignguard.fit import load_model

RATES = (3e-4, 1e-3, 2e-3, 4e-3)
SEED = 100  # not one of the seeds that results are reported for


def validate(model: Any, tokenizer: Any) -> dict[str, float]:
    """Task and refusals on validation rows alone."""
    unsafe = read_jsonl(data_path("validation"))
    ordinary = read_jsonl(data_path("task_validation"))[:100]
    prompts = [{"prompt": r["prompt"], "category": "unsafe"} for r in unsafe]
    prompts += [{"prompt": r["prompt"], "category": "ordinary"} for r in ordinary]
    summary = driftcheck(model, tokenizer, prompts).summary()
    score = task_score(model, tokenizer, read_jsonl(data_path("task_validation")))
    return {
        "task": score.accuracy, "task_loss": score.loss, "refusal": 100 * summary["refusal"].value,
        "compliance": 100 * summary["compliance"].value, "kl": measured_kl(model, None, tokenizer, unsafe),
    }  # fmt: skip


def run(settings: dict[str, Any] | None, rate: float) -> dict[str, Any]:
    config = None if settings is None else GuardConfig.from_dict({**settings, "seed": SEED})
    with tempfile.TemporaryDirectory() as folder:
        done = train(Path(folder) / "r", config is not None, SEED, config, training={"learning_rate": rate})
        _, tokenizer = load_model(model_path())
        row = {
            "learning_rate": rate,
            "settings": settings,
            **validate(done.model, tokenizer),
            "step_time": done.step_time,
        }
    print({k: v if not isinstance(v, float) else round(v, 4) for k, v in row.items()}, flush=True)
    return row


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", choices=["rate", "strength"])
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--guards", nargs="+", default=[name for name in GUARDS if name not in ("plain", "default")])
    cli.add_argument("--factors", nargs="+", type=float, default=[0.1, 1.0, 10.0], help="of each guard's strength")
    args = cli.parse_args()
    rows = []
    if args.what == "rate":
        rows = [{"guard": "plain", **run(None, rate)} for rate in RATES]
    else:
        rows.append({"guard": "plain", **run(None, TRAINING["learning_rate"])})
        for name in args.guards:
            for factor in args.factors:
                settings = dict(GUARDS[name] or {})
                for key in ("lambda_alignment", "lambda_task", "lambda_collision", "lambda_kl"):
                    if key in settings:
                        settings[key] *= factor
                rows.append({"guard": name, "factor": factor, **run(settings, TRAINING["learning_rate"])})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    head = {"command": f"python benchmarks/choices.py {args.what}", "seed": SEED, "versions": versions()}
    write_text(args.out, json.dumps({**head, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
