"""Would torch.compile help the tiled overlap on a CPU? Time of the sweep as it is and with its tile arithmetic compiled.

    python benchmarks/compiled_overlap.py --out benchmarks/results/compiled_overlap.json

Needs a C++ compiler, and takes a few minutes.

Both sweep value and all four gradients of float32 factors of rank 16 on one thread. The compiled one fuses the
arithmetic of a tile, which may then be larger, since fewer intermediates compete for the cache; its best tile of three
is reported. Times are minima.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from alignguard.files import write_text
from fishergeo.updates import _tiles

RANK, BETA, TAU = 16, 4.0, 0.01


def term(a, t):
    d, x = a + t, a * t
    s, size = torch.sigmoid(d.abs() - TAU), x.abs()
    eta = 1 + BETA * s
    common, signed = BETA * s * (1 - s) * torch.sign(d) * size, eta * torch.sign(x)
    return (size * eta).sum(-1), signed * t + common, signed * a + common


def compiled_sweep(function, factors, rows, columns):
    la, ra, lt, rt = (f[0] for f in factors)
    p, q = la.shape[0], ra.shape[1]
    sums, (grad_la, grad_ra, grad_lt, grad_rt) = la.new_zeros(p), (torch.zeros_like(f) for f in (la, ra, lt, rt))
    for i in (slice(k, k + rows) for k in range(0, p, rows)):
        for j in (slice(k, k + columns) for k in range(0, q, columns)):
            value, by_a, by_t = function(la[i] @ ra[:, j], lt[i] @ rt[:, j])
            sums[i] += value
            grad_la[i].addmm_(by_a, ra[:, j].T)
            grad_lt[i].addmm_(by_t, rt[:, j].T)
            grad_ra[:, j].addmm_(la[i].T, by_a)
            grad_rt[:, j].addmm_(lt[i].T, by_t)
    return sums, [grad_la, grad_ra, grad_lt, grad_rt]


def milliseconds(function, repetitions):
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(min(times) * 1e3, 2)


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, required=True)
    args = cli.parse_args()
    torch.set_num_threads(1)
    function, rows_of_sizes, compile_seconds = torch.compile(term, dynamic=True), [], None
    with torch.no_grad():
        for n in (256, 512, 1024, 2048, 4096):
            generator = torch.Generator().manual_seed(0)
            shapes = [(1, n, RANK), (1, RANK, n)] * 2
            factors = [torch.randn(*s, generator=generator) / n**0.5 for s in shapes]
            start = time.perf_counter()
            _, grads = compiled_sweep(function, factors, 128, 512)
            compile_seconds = compile_seconds or round(time.perf_counter() - start, 1)
            wanted = _tiles.factored_sweep(factors, None, BETA, TAU, [True] * 4)[1]
            assert all(torch.allclose(g, w[0], rtol=1e-4, atol=1e-6) for g, w in zip(grads, wanted, strict=True))
            repetitions = 7 if n > 1024 else 25
            tiled = milliseconds(lambda: _tiles.factored_sweep(factors, None, BETA, TAU, [True] * 4), repetitions)  # noqa: B023
            compiled = min(
                milliseconds(lambda: compiled_sweep(function, factors, rows, 512), repetitions)  # noqa: B023
                for rows in (64, 128, 256)
            )
            rows_of_sizes.append({"size": n, "tiled ms": tiled, "compiled ms": compiled})
            print(rows_of_sizes[-1], flush=True)
    report = {
        "command": "python benchmarks/compiled_overlap.py",
        "rank": RANK,
        "threads": 1,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": platform.machine(),
        "seconds to compile": compile_seconds,
        "rows": rows_of_sizes,
    }
    write_text(args.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
