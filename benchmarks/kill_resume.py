"""Kill a guarded run at random moments, resume it, and compare its adapter with the uninterrupted run's, bit by bit.

    python benchmarks/kill_resume.py --kills 20

Writes benchmarks/results/kill_resume.json. The embedded model, on the CPU; a run is a process of its own, so what is
killed is all there is of it.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from alignguard.demo import versions
from alignguard.embedded import data_path, model_path
from alignguard.files import write_text

RESULT = Path(__file__).parent / "results" / "kill_resume.json"


def command(output: Path, steps: int) -> list[str]:
    return [
        sys.executable, "-m", "alignguard", "fit", "--model", str(model_path()), "--task-data",
        str(data_path("task_train")), "--alignment-data", str(data_path("alignment")), "--output-dir", str(output),
        "--max-steps", str(steps), "--per-device-train-batch-size", "4", "--refresh-every", "5", "--refresh-examples",
        "8", "--save-every", "3", "--resume", "--max-drift", "0.5",
    ]  # fmt: skip


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        begun = time.perf_counter()
        subprocess.run(command(root / "whole", arguments.steps), check=True, capture_output=True)
        whole = time.perf_counter() - begun
        expected = load_file(root / "whole/adapter/adapter_model.safetensors")
        moments, bad, runs, equal, kills = [], [], 0, 0, 0
        while kills < arguments.kills:
            runs += 1
            cut = root / f"cut{runs}"
            while True:
                process = subprocess.Popen(
                    command(cut, arguments.steps), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                moment = draw.uniform(0.2, 1.0) * whole if kills < arguments.kills else None
                try:
                    process.wait(moment)
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
                    moments.append(round(moment, 2))
                    bad += unreadable(cut) if cut.exists() else []
            if process.returncode != 0:
                raise RuntimeError(f"the resumed run failed with exit code {process.returncode}")
            ours = load_file(cut / "adapter/adapter_model.safetensors")
            equal += set(ours) == set(expected) and all(torch.equal(ours[name], expected[name]) for name in ours)
        result = {
            "command": f"python benchmarks/kill_resume.py --kills {arguments.kills} --steps {arguments.steps}",
            "kills": kills, "runs": runs, "bit_identical": equal, "unreadable_files": bad,
            "seconds_uninterrupted": whole, "moments_s": moments, "versions": versions(),
        }  # fmt: skip
        write_text(RESULT, json.dumps(result, indent=1))
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
