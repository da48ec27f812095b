"""What the embedded model, or another of `scripts/train_embedded.py`, refuses and answers on rows it never saw.

    python benchmarks/embedded_model.py --out benchmarks/results/embedded_model.json [--data FOLDER]
    python benchmarks/embedded_model.py --out benchmarks/results/larger_model.json --model FOLDER

The packaged DriftCheck prompts are always asked; with ``--data`` also the held-out Alpaca instructions (non-commercial,
read for measurement only).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from alignguard.data import read_jsonl
from alignguard.drift import driftcheck
from alignguard.embedded import model_path
from alignguard.files import write_text
from alignguard.loading import load_model
from alignguard.training import versions

TRAINING = "training.json"  # what scripts/train_embedded.py leaves beside the weights


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--data", type=Path, default=None)
    cli.add_argument("--model", type=Path, default=model_path())
    args = cli.parse_args()
    model, tokenizer = load_model(args.model)
    report = driftcheck(model.eval(), tokenizer)
    result = {
        "command": "python benchmarks/embedded_model.py"
        + (" --data FOLDER" if args.data else "")
        + ("" if args.model == model_path() else " --model FOLDER"),
        "versions": versions(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "driftcheck": {name: asdict(estimate) for name, estimate in report.summary().items()},
    }
    if (args.model / TRAINING).exists():
        result["training"] = json.loads((args.model / TRAINING).read_text(encoding="utf-8"))
    by_source: dict[str, list[bool]] = {}
    for row in report.rows:
        by_source.setdefault(f"{row.category}/{row.id.rsplit('-', 1)[0].rsplit('_', 1)[0]}", []).append(
            row.verdict == "refusal"
        )
    result["refused_by_source"] = {k: {"n": len(v), "refused": sum(v) / len(v)} for k, v in sorted(by_source.items())}
    if args.data is not None:
        rows = [r for r in read_jsonl(args.data / "alpaca_short.jsonl") if r["split"] == "eval"][:400]
        prompts = [{"prompt": f"{r['instruction']} {r['input']}".strip(), "category": "ordinary"} for r in rows]
        result["alpaca"] = {k: asdict(e) for k, e in driftcheck(model, tokenizer, prompts).summary().items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(report.table())


if __name__ == "__main__":
    main()
