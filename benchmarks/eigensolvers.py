"""Passes and time of block Lanczos against SciPy's eigsh and lobpcg, on the same operators and at the same tolerance.

    python benchmarks/eigensolvers.py --out benchmarks/results/eigensolvers.json

A pass is one application of the operator, to a block of any number of columns: what one reading of the data costs where
the operator is a Fisher. eigsh applies it to one vector at a time, lobpcg and ours to a block of k columns. Each solver
gets the same counted function; true residuals are measured afterwards, with the dense matrix.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from pathlib import Path

import numpy as np
import scipy
import scipy.sparse.linalg
import torch

import fishergeo as fg


def spectra(n: int) -> dict[str, torch.Tensor]:
    index = torch.arange(1, n + 1, dtype=torch.float64)
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {
        "power law 1": index**-1.0,
        "power law 0.5": index**-0.5,
        "linear": index / n,
        "condition 1e12": torch.logspace(0, -12, n, dtype=torch.float64),
        "cluster of 12": torch.cat([2 + 1e-6 * index[:12], uniform[12:]]),
        "each value twice": torch.repeat_interleave(index[: n // 2] ** -0.5, 2),
        "rank 20": torch.where(index <= 20, 1 / index, 0.0),
        "indefinite": 2 * uniform - 1,
    }


def run(matrix: torch.Tensor, k: int, tol: float, solver: str) -> dict[str, object]:
    passes = columns = 0

    def apply(block: torch.Tensor) -> torch.Tensor:
        nonlocal passes, columns
        passes, columns = passes + 1, columns + block.shape[1]
        return matrix @ block

    def on_arrays(array: np.ndarray) -> np.ndarray:
        return apply(torch.from_numpy(array.reshape(len(array), -1))).numpy().reshape(array.shape)

    n = len(matrix)
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    note = ""
    try:
        if solver == "fishergeo":
            found = fg.lanczos(apply, k, size=n, tol=tol)
            vectors, note = found.vectors, "" if found.satisfied else found.stopped
        else:
            operator = scipy.sparse.linalg.LinearOperator((n, n), matvec=on_arrays, matmat=on_arrays, dtype=np.float64)
            if solver == "eigsh":
                out = scipy.sparse.linalg.eigsh(operator, k, which="LA", tol=tol, v0=rng.normal(size=n))[1]
            else:
                guess = rng.normal(size=(n, k))
                limit = tol * float(torch.linalg.matrix_norm(matrix, 2))
                out = scipy.sparse.linalg.lobpcg(operator, guess, tol=limit, maxiter=400, largest=True)[1]
            vectors = torch.from_numpy(np.ascontiguousarray(out))
    except Exception as error:
        return {"failed": str(error)[:200], "passes": passes, "columns": columns}
    seconds = time.perf_counter() - start
    vectors = torch.linalg.qr(vectors)[0]
    values = (vectors * (matrix @ vectors)).sum(0)
    residuals = (matrix @ vectors - vectors * values).norm(dim=0)
    truth = torch.linalg.eigvalsh(matrix).flip(0)[:k]
    scale = float(truth.abs().max())
    missed = int(((values.sort(descending=True).values - truth).abs() > 1e-6 * scale).sum())
    return {
        "passes": passes, "columns": columns, "seconds": seconds, "missed": missed, "note": note,
        "worst_residual": float(residuals.max()) / scale,
    }  # fmt: skip


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--size", type=int, default=300)
    cli.add_argument("--k", type=int, nargs="+", default=[8, 32])
    cli.add_argument("--tol", type=float, default=1e-6)
    args = cli.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(args.size, args.size, generator=generator, dtype=torch.float64))[0]
    table = []
    for name, values in spectra(args.size).items():
        matrix = (basis * values) @ basis.T
        matrix = (matrix + matrix.T) / 2
        for k in args.k:
            row = {"spectrum": name, "k": k}
            for solver in ("fishergeo", "eigsh", "lobpcg"):
                row[solver] = run(matrix, k, args.tol, solver)
            table.append(row)
            counts = "  ".join(f"{s} {row[s]['passes']:4d}" for s in ("fishergeo", "eigsh", "lobpcg"))
            print(f"{name:18s} k={k:3d} passes: {counts}", flush=True)
    ratios = [row["fishergeo"]["passes"] / row["eigsh"]["passes"] for row in table]
    result = {
        "command": f"python benchmarks/eigensolvers.py --size {args.size} --tol {args.tol:g}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "scipy": scipy.__version__,
                     "numpy": np.__version__, "fishergeo": fg.__version__},
        "threads": 1, "size": args.size, "tol": args.tol, "rows": table, "worst_pass_ratio_to_eigsh": max(ratios),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"passes against eigsh: at most {max(ratios):.2f}")


if __name__ == "__main__":
    main()
