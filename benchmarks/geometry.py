"""Time and peak memory of the geometry's metrics against their dense formulas.

    python benchmarks/geometry.py                      # sizes 256 to 8192, a few minutes on one core
    python benchmarks/geometry.py --sizes 256 1024     # fewer

Each measurement runs in a process of its own. Memory is the growth of the peak resident size (ru_maxrss) over what
was resident once the inputs were made and everything had run once on a small problem. Time is the median of the
repetitions. Writes benchmarks/results/geometry.json.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import fishergeo as fg

RANK, PROTECTED = 16, 64
SIZES = [256, 512, 1024, 2048, 4096, 8192]
RESULT = Path(__file__).parent / "results" / "geometry.json"


def inputs(n: int):
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=generator) / n**0.5

    left, right = make(n, RANK).requires_grad_(), make(RANK, n).requires_grad_()
    basis = torch.linalg.qr(make(n, PROTECTED)).Q
    return left, right, basis


def dense_parts(left, right, basis):
    delta = left @ right
    part = basis @ (basis.mT @ delta)
    return part, delta - part


def factored_parts(left, right, basis):
    return fg.Projector(basis).split(fg.LowRank(left, right))


def dense_overlap(part, rest):
    eta = 1 + 4.0 * torch.sigmoid((part + rest).abs() - 0.01)
    return (eta * (part * rest).abs()).sum()


def dense_input_gram(part, rest):
    x, y = part.mT @ part, rest.mT @ rest
    return (x * y).sum() / (x.norm() * y.norm())


def dense_euclidean(part, rest):
    return (part * rest).sum() ** 2 / (part.square().sum() * rest.square().sum())


def both_products(left, right, basis):
    """The two dense rank-r products that any way to the coordinates needs: the unit the overlap is measured in."""
    with torch.no_grad():
        part, rest = factored_parts(left, right, basis)
        return part.left @ part.right, rest.left @ rest.right


def backward(value):
    def run(left, right, basis):
        return torch.autograd.grad(value(left, right, basis), (left, right))

    return run


def sampled(left, right, basis):
    rows = max(2, left.shape[0] // 16)
    parts = factored_parts(left, right, basis)
    return fg.sampled_riemannian_overlap(*parts, rows, torch.Generator().manual_seed(0)).value


def angles_of(method):
    def run(left, right, basis):
        other = torch.linalg.qr(basis + 0.1 * torch.randn(basis.shape, generator=torch.Generator().manual_seed(1))).Q
        return method(basis, other)

    return run


def dense_projection_distance(u, v):
    return (u @ u.mT - v @ v.mT).norm() / 2**0.5


# name -> (what it stands for, largest size worth waiting for, function)
CASES = {
    "two dense rank-r products": ("reference", 8192, both_products),
    "overlap, tiled": ("value and gradient", 8192, backward(lambda *x: fg.riemannian_overlap(*factored_parts(*x)))),
    "overlap, dense": ("value and gradient", 8192, backward(lambda *x: dense_overlap(*dense_parts(*x)))),
    "overlap, rows sampled 1/16": ("value and gradient", 8192, backward(sampled)),
    "input-gram, factored": (
        "value and gradient",
        8192,
        backward(lambda *x: fg.geodesic_separation(*factored_parts(*x))),
    ),
    "input-gram, dense": ("value and gradient", 2048, backward(lambda *x: dense_input_gram(*dense_parts(*x)))),
    "euclidean, factored": (
        "value and gradient",
        8192,
        backward(lambda *x: fg.geodesic_separation(*factored_parts(*x), "euclidean")),
    ),
    "euclidean, dense": ("value and gradient", 8192, backward(lambda *x: dense_euclidean(*dense_parts(*x)))),
    "projection distance, angles": ("value", 8192, angles_of(lambda u, v: fg.subspace_distance(u, v, "projection"))),
    "projection distance, dense": ("value", 8192, angles_of(dense_projection_distance)),
}


def measure(name: str, n: int, repetitions: int) -> dict:
    torch.set_num_threads(1)
    function = CASES[name][2]
    function(*inputs(PROTECTED))
    problem = inputs(n)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        out = function(*problem)
        times.append(time.perf_counter() - start)
        del out
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "name": name,
        "measures": CASES[name][0],
        "size": n,
        "milliseconds": round(statistics.median(times) * 1e3, 3),
        "peak_megabytes": round((after - before) / 1024, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.repetitions)))
        return
    rows = []
    for name, (_, largest, _) in CASES.items():
        for n in (n for n in options.sizes if n <= largest):
            command = [sys.executable, __file__, "--one", name, str(n), "--repetitions", str(options.repetitions)]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(
                f"{name:32} {n:6} {rows[-1]['milliseconds']:10.2f} ms {rows[-1]['peak_megabytes']:8.1f} MB", flush=True
            )

    def by_size(name):
        return {r["size"]: r for r in rows if r["name"] == name}

    tiled, unit = by_size("overlap, tiled"), by_size("two dense rank-r products")
    report = {
        "command": "python benchmarks/geometry.py",
        "rank": RANK,
        "protected": PROTECTED,
        "dtype": "float32",
        "threads": 1,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "fishergeo": fg.__version__},
        "machine": platform.machine(),
        "tiled overlap over the two products": {
            str(n): round(tiled[n]["milliseconds"] / unit[n]["milliseconds"], 2) for n in tiled
        },
        "rows": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
