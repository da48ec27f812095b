"""What a second pass over the data adds to the one-pass sketch, on a trained model: share of the exact energy.

    python benchmarks/second_pass.py --out benchmarks/results/second_pass.json
    python benchmarks/second_pass.py --out benchmarks/results/second_pass_larger.json --model FOLDER

Energy of a layer: tr(UᵀFU) over 32 vectors, divided by the sum of the 32 largest eigenvalues of the exact Gram matrix F
of the same examples. Certificates are compared with the true residuals ‖F v − θ v‖.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from sketch import subject

import fishergeo as fg
from alignguard.files import write_text
from alignguard.training import versions


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--examples", type=int, default=96)
    cli.add_argument("--columns", type=int, default=64)
    cli.add_argument("--k", type=int, default=32)
    cli.add_argument("--model", type=Path, default=None, help="another model than the embedded one")
    args = cli.parse_args()
    torch.set_num_threads(1)
    model, batches, layers = subject(args.examples, args.model)
    sketch = fg.estimate_fisher(model, batches, structure="sketch", rank=args.columns, layers=layers)
    exact = fg.estimate_fisher(model, batches, structure="gram", layers=layers)
    stream = fg.StreamingFisher(model, batches, layers=layers)
    second = fg.second_pass(sketch, stream, args.k)
    passes_of_second = stream.passes
    start = {name: found.vectors for name, found in second.items()}
    certain = fg.lanczos_layers(stream, args.k, start=start, tol=1e-3, max_passes=10)
    table = {}
    for name in layers:
        matrix = exact[name].to_dense().double()
        best = torch.linalg.eigvalsh(matrix).flip(0)[: args.k].sum()

        def energy(vectors: torch.Tensor, matrix: torch.Tensor = matrix, best: torch.Tensor = best) -> float:
            v = vectors.double()
            return float(((matrix @ v) * v).sum() / best)

        def within(found: fg.Spectrum, matrix: torch.Tensor = matrix) -> bool:
            v = found.vectors.double()
            return bool(((matrix @ v - v * found.values.double()).norm(dim=0) <= found.residuals.double()).all())

        table[name] = {
            "one_pass": energy(sketch[name].eigh()[1][:, : args.k]),
            "two_passes": energy(second[name].vectors),
            "lanczos": energy(certain[name].vectors),
            "lanczos_passes": certain[name].passes,
            "certificates_hold": within(second[name]) and within(certain[name]),
        }
    summary = {
        column: {"worst": min(r[column] for r in table.values()), "mean": statistics.mean(r[column] for r in table.values())}
        for column in ("one_pass", "two_passes", "lanczos")
    }  # fmt: skip
    result = {
        "command": "python benchmarks/second_pass.py" + (" --model FOLDER" if args.model else ""),
        "versions": versions(), "parameters": sum(p.numel() for p in model.parameters()), "examples": args.examples,
        "columns": args.columns, "k": args.k, "passes_of_second": passes_of_second,
        "lanczos_passes": stream.passes - passes_of_second, "summary": summary, "layers": table,
        "certificates_hold": all(r["certificates_hold"] for r in table.values()),
    }  # fmt: skip
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
