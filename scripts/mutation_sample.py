"""Mutation testing of the geometry on a seeded random sample of mutants.

    python -m pip install mutmut==3.8.1
    OMP_NUM_THREADS=1 nice -n 19 python scripts/mutation_sample.py --seed 1 --size 400 --work /tmp/mutation

Draws the mutants in random order and tries them in batches, so that what is done when it is stopped is a random sample
too. Works on a copy of HEAD under --work, because mutmut writes its mutants beside the sources. The copy keeps the tests of
the geometry alone and lets hypothesis draw 8 derandomized examples. Writes sample.json there after each batch: the
counts, the share killed with its 95 % Wilson interval, and the survivors; `mutmut show NAME` in the copy prints one.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    "_arguments",
    "_overlap",
    "_tiles",
    "angles",
    "collision",
    "grassmann",
    "kronecker_projector",
    "lowrank",
    "projector",
    "rank",
    "spd",
    "stability",
]
TESTS = [
    "angles",
    "collision",
    "geometry_bad_input",
    "grassmann",
    "kronecker_projector",
    "lowrank",
    "projector",
    "rank",
]
TESTS += ["spd", "stability", "triton"]
SLOW = "test_at_4096_all_that_value_and_gradient_of_factors_ever_allocate_is_below_64_megabytes"
BATCH = 60
CONFTEST = """import hypothesis
import torch

hypothesis.settings.register_profile("mutation", deadline=None, max_examples=8, derandomize=True, database=None)
hypothesis.settings.load_profile("mutation")
torch.set_num_threads(1)
"""
# mutmut 3.8: exit codes of the test run of a mutant.
STATUS = {0: "survived", 1: "killed", 3: "killed", 5: "no tests", 33: "no tests", -9: "crashed", -11: "crashed"}
STATUS |= dict.fromkeys((36, 255, -24, 24, 152), "timeout")


def copy_head(work: Path) -> None:
    work.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "archive", "HEAD", "fishergeo", "tests", "pyproject.toml", "README.md", "LICENSE", "NOTICE"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout
    subprocess.run(["tar", "x", "-C", str(work)], input=archive, check=True)
    kept = {"geometry_cases.py", *(f"test_{name}.py" for name in TESTS)}
    for path in (work / "tests").glob("*.py"):
        if path.name not in kept:
            path.unlink()
    (work / "tests" / "conftest.py").write_text(CONFTEST)
    config = {
        "source_paths": ["fishergeo"],
        "only_mutate": [f"fishergeo/{name}.py" for name in MODULES],
        "also_copy": ["README.md", "LICENSE", "NOTICE"],
        # The test at 4096 takes seconds, which every surviving mutant would spend.
        "pytest_add_cli_args": ["-q", "-x", "-p", "no:cacheprovider", f"--deselect=tests/test_collision.py::{SLOW}"],
        # A busy machine must not pass for a mutant that loops.
        "timeout_multiplier": 300.0,
    }
    with (work / "pyproject.toml").open("a") as file:
        file.write("\n[tool.mutmut]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))


def mutmut(work: Path, *arguments: str, check: bool = True) -> str:
    # The copy must win over an installed package of the same name.
    environment = {**os.environ, "PYTHONPATH": str(work / "mutants")}
    result = subprocess.run(
        [sys.executable, "-m", "mutmut", *arguments], cwd=work, env=environment, capture_output=True, text=True
    )
    if check and result.returncode:
        raise SystemExit(f"mutmut {arguments[0]} failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return result.stdout


def exit_codes(work: Path) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for path in sorted((work / "mutants" / "fishergeo").glob("*.meta")):
        found |= json.loads(path.read_text())["exit_code_by_key"]
    return found


def wilson(hits: int, of: int) -> tuple[float, float]:
    z, share = 1.959964, hits / of
    middle, spread = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return (middle - spread) / (1 + z * z / of), (middle + spread) / (1 + z * z / of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, help="mutants to draw")
    parser.add_argument("--work", type=Path, required=True, help="directory for the copy; must not exist")
    options = parser.parse_args()
    copy_head(options.work)
    # Makes the mutants and times the tests; then finds that no mutant has this name.
    mutmut(options.work, "run", "--max-children", "1", "none_of_them", check=False)
    every = sorted(exit_codes(options.work))
    if not every:
        raise SystemExit("mutmut made no mutants; run it by hand in the copy to see why")
    drawn = random.Random(options.seed).sample(every, min(options.size, len(every)))
    print(f"{len(every)} mutants, {len(drawn)} drawn with seed {options.seed}", flush=True)
    (options.work / "drawn.txt").write_text("\n".join(drawn) + "\n")
    for start in range(0, len(drawn), BATCH):
        mutmut(options.work, "run", "--max-children", "1", *drawn[start : start + BATCH])
        report = summary(options.work, drawn[: start + BATCH], options.seed, len(every))
        (options.work / "sample.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print({k: v for k, v in report.items() if k != "survivors"}, flush=True)


def summary(work: Path, names: list[str], seed: int, mutants: int) -> dict:
    codes = exit_codes(work)
    status = {name: STATUS.get(codes[name], f"exit code {codes[name]}") for name in names}
    counts = Counter(status.values())
    killed = counts["killed"] + counts["timeout"] + counts["crashed"]
    low, high = wilson(killed, len(names))
    return {
        "seed": seed,
        "mutants": mutants,
        "drawn": len(names),
        "counts": dict(counts),
        "killed": killed / len(names),
        "interval": [low, high],
        "survivors": sorted(name for name in names if status[name] in ("survived", "no tests")),
    }


if __name__ == "__main__":
    main()
