"""Kill a guarded run at random moments, resume it, and compare its adapter with the uninterrupted run's, bit by bit.

    python benchmarks/kill_resume.py --kills 20

Writes benchmarks/results/kill_resume.json. The embedded model, on the CPU, by three ways to train: LoRA under a drift
budget, LoRA under adaptive refreshes, and every weight. A run is a forked process of its own (so that the libraries are
imported once), which is killed at a random moment between its start and the uninterrupted run's end, and resumed until
it ends.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import alignguard.training.run  # noqa: F401  # before forking, so that the children need not
from alignguard.cli import main as alignguard_main
from alignguard.embedded import data_path, model_path
from alignguard.files import write_text
from alignguard.training import versions

RESULT = Path(__file__).parent / "results" / "kill_resume.json"
BUDGET = ["--max-drift", "0.5"]
WAYS = {
    "budget": BUDGET,
    "adaptive": [
        *BUDGET,
        "--adaptive",
        "--refresh-budget",
        "1.0",
        "--measure-every",
        "1",
        "--refresh-tolerance",
        "0.1",
    ],
    "full": [*BUDGET, "--method", "full", "--structure", "sketch", "--sketch-rank", "16"],
}


def options(output: Path, steps: int, way: str) -> list[str]:
    return [
        "fit", "--model", str(model_path()), "--task-data",
        str(data_path("task_train")), "--alignment-data", str(data_path("alignment")), "--output-dir", str(output),
        "--max-steps", str(steps), "--per-device-train-batch-size", "4", "--refresh-every", "5", "--refresh-examples",
        "8", "--save-every", "3", "--resume", *WAYS[way],
    ]  # fmt: skip


def start(arguments: list[str], log: Path) -> multiprocessing.process.BaseProcess:
    def work() -> None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        torch.set_num_threads(1)
        os._exit(alignguard_main(arguments))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def unreadable(folder: Path) -> list[str]:
    """Output files that cannot be read; what is being written aside is no output."""
    bad = []
    for path in folder.rglob("*"):
        aside = any(part.startswith(".") for part in path.relative_to(folder).parts)
        try:
            if aside or not path.is_file():
                continue
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                load_file(path)
        except Exception as error:
            bad.append(f"{path.relative_to(folder)}: {error}")
    return bad


def adapter(output: Path, way: str) -> dict[str, torch.Tensor]:
    """What the run trained: its adapter, or the whole model."""
    return load_file(output / ("model/model.safetensors" if way == "full" else "adapter/adapter_model.safetensors"))


def measure(way: str, root: Path, kills: int, steps: int, draw: random.Random) -> dict[str, Any]:
    log = root / "log"
    begun = time.perf_counter()
    first = start(options(root / "whole", steps, way), log)
    first.join()
    if first.exitcode != 0:
        raise RuntimeError(log.read_text())
    whole = time.perf_counter() - begun
    expected = adapter(root / "whole", way)
    moments: list[float] = []
    bad: list[str] = []
    runs = equal = 0
    while len(moments) < kills:
        runs += 1
        cut = root / f"cut{runs}"
        while True:
            process = start(options(cut, steps, way), log)
            moment = draw.uniform(0.05, 1.0) * whole if len(moments) < kills else None
            process.join(moment)
            if process.exitcode is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            moments.append(round(moment, 2))
            bad += unreadable(cut) if cut.exists() else []
        if process.exitcode != 0:
            raise RuntimeError(log.read_text())
        ours = adapter(cut, way)
        equal += set(ours) == set(expected) and all(torch.equal(ours[name], expected[name]) for name in ours)
        bad += unreadable(cut)
        refreshes = json.loads((cut / "checkpoints" / f"checkpoint-{steps}" / "alignguard_guard.json").read_text())
        shutil.rmtree(cut)
    return {
        "kills": len(moments), "runs": runs, "bit_identical": equal, "unreadable_files": bad,
        "refreshes": refreshes["guard"]["refreshes"], "seconds_uninterrupted": whole, "moments_s": moments,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    result: dict[str, Any] = {
        "command": f"python benchmarks/kill_resume.py --kills {arguments.kills} --steps {arguments.steps}"
    }
    for way in WAYS:
        with tempfile.TemporaryDirectory() as place:
            result[way] = measure(way, Path(place), arguments.kills, arguments.steps, draw)
    result["versions"] = versions()
    write_text(RESULT, json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
