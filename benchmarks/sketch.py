"""The one-pass sketch on a trained model: share of the exact top-32 energy, its error's bound, and its time.

    python benchmarks/sketch.py --out benchmarks/results/sketch.json
    python benchmarks/sketch.py --out benchmarks/results/sketch_larger.json --model FOLDER

Energy of a layer: tr(UᵀFU) over the sketch's leading 32 vectors U, with F the exact Gram matrix of the same examples,
divided by the sum of F's 32 largest eigenvalues. The error's bound is
that on ‖F − F̂‖₂ from 8 probes; a trial is one layer at one seed, and it is covered if the bound is no less than the true
error. The baseline is one plain forward and backward with weight gradients
over the same batches, in the same process, interleaved; ratios are medians, of processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import fishergeo as fg
from alignguard.data import collate, encode_example, read_jsonl
from alignguard.embedded import data_path, model_path
from alignguard.files import write_text
from alignguard.loading import load_model
from alignguard.training import versions


def subject(examples: int, model_folder: Path | None = None) -> tuple[Any, list[dict[str, torch.Tensor]], list[str]]:
    """A model (the embedded one by default), task rows in batches of like length, and its decoder matrices."""
    model, tokenizer = load_model(model_folder or model_path())
    rows = [encode_example(tokenizer, r["prompt"], r["response"]) for r in read_jsonl(data_path("task_train"))]
    rows = sorted(rows[:examples], key=lambda r: len(r["input_ids"]))
    batches = [collate(rows[i : i + 16], 0) for i in range(0, len(rows), 16)]
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    return model.eval(), batches, layers


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--examples", type=int, default=192)
    cli.add_argument("--columns", type=int, default=64)
    cli.add_argument("--repeats", type=int, default=5)
    cli.add_argument("--seeds", type=int, default=5, help="of the trials of the error's bound")
    cli.add_argument("--model", type=Path, default=None, help="another model than the embedded one")
    args = cli.parse_args()
    torch.set_num_threads(1)
    model, batches, layers = subject(args.examples, args.model)

    def plain() -> None:
        for batch in batches:
            model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    def sketch(**options: int) -> fg.Fisher:
        return fg.estimate_fisher(model, batches, structure="sketch", rank=args.columns, layers=layers, **options)

    plain()
    ratios = []
    for _ in range(args.repeats):
        start = time.process_time()
        plain()
        middle = time.process_time()
        sketched = sketch()
        ratios.append((time.process_time() - middle) / (middle - start))
    exact = fg.estimate_fisher(model, batches, structure="gram", layers=layers)
    matrices = {name: exact[name].to_dense().double() for name in layers}
    energies = {}
    for name, matrix in matrices.items():
        best = torch.linalg.eigvalsh(matrix).flip(0)[:32].sum()
        basis = sketched[name].eigh()[1][:, :32].double()
        energies[name] = float(((matrix @ basis) * basis).sum() / best)
    covered = []
    for seed in range(args.seeds):
        for name, operator in sketch(probes=8, seed=seed).items():
            missing = torch.linalg.eigvalsh(matrices[name] - operator.to_dense().double())[-1]
            covered.append(operator.error().spectral >= float(missing))  # type: ignore[attr-defined]
    result = {
        "command": "python benchmarks/sketch.py" + (" --model FOLDER" if args.model else ""), "versions": versions(),
        "threads": 1, "parameters": sum(p.numel() for p in model.parameters()), "examples": args.examples,
        "columns": args.columns, "energy": energies, "worst": min(energies.values()),
        "mean": statistics.mean(energies.values()), "trials": len(covered), "covered": sum(covered) / len(covered),
        "time_ratios": ratios, "time_ratio": statistics.median(ratios),
    }  # fmt: skip
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(
        f"energy worst {result['worst']:.4f} mean {result['mean']:.4f}; covered {result['covered']:.3f} of "
        f"{len(covered)}; time ratio {result['time_ratio']:.2f}"
    )


if __name__ == "__main__":
    main()
