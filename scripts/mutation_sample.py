"""Mutation testing of the geometry on a seeded random sample of mutants.

    python -m pip install mutmut==3.8.1
    OMP_NUM_THREADS=1 nice -n 19 python scripts/mutation_sample.py --seed 1 --size 400 --work /tmp/mutation

Works on a copy of HEAD under --work: mutmut writes the mutants there, and this script tries them, in random order, so
that what is done when it is stopped is a random sample too. The tests are collected once; each mutant gets a fork of
that process, which runs the tests of its module until one fails. Hypothesis draws 8 derandomized examples. Tests of
other modules might kill more, so the share is a lower bound. Writes sample.json there after each mutant: the counts,
the share killed with its 95 % Wilson interval, and the survivors; `mutmut show NAME` in the copy prints one.
"""

import argparse
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# module -> the tests it is to be killed by, quickest to notice first
TESTS = {
    "_arguments": ["geometry_bad_input", "lowrank", "projector", "rank", "angles", "spd", "stability", "grassmann"],
    "_overlap": ["triton", "collision"],
    "_tiles": ["collision"],
    "angles": ["angles", "geometry_bad_input", "grassmann"],
    "collision": ["collision", "geometry_bad_input"],
    "grassmann": ["grassmann", "geometry_bad_input"],
    "kronecker_projector": ["kronecker_projector", "geometry_bad_input"],
    "lowrank": ["lowrank", "geometry_bad_input", "projector"],
    "projector": ["projector", "geometry_bad_input"],
    "rank": ["rank", "geometry_bad_input"],
    "spd": ["spd", "geometry_bad_input"],
    "stability": ["stability", "geometry_bad_input"],
}
# Seconds of it would be spent on every mutant that survives.
SLOW = "test_at_4096_all_that_value_and_gradient_of_factors_ever_allocate_is_below_64_megabytes"
CPU_SECONDS = 120
CONFTEST = """import hypothesis
import torch

hypothesis.settings.register_profile("mutation", deadline=None, max_examples=8, derandomize=True, database=None)
hypothesis.settings.load_profile("mutation")
torch.set_num_threads(1)
"""


def copy_head(work: Path) -> None:
    work.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "archive", "HEAD", "fishergeo", "tests", "pyproject.toml", "README.md", "LICENSE", "NOTICE"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout
    subprocess.run(["tar", "x", "-C", str(work)], input=archive, check=True)
    kept = {"geometry_cases.py", *(f"test_{name}.py" for names in TESTS.values() for name in names)}
    for path in (work / "tests").glob("*.py"):
        if path.name not in kept:
            path.unlink()
    (work / "tests" / "conftest.py").write_text(CONFTEST)
    config = {
        "source_paths": ["fishergeo"],
        "only_mutate": [f"fishergeo/{name}.py" for name in TESTS],
        "also_copy": ["README.md", "LICENSE", "NOTICE"],
        # mutmut would now time the tests; with nothing to run it stops once the mutants are written.
        "pytest_add_cli_args": ["--collect-only", "-q"],
    }
    with (work / "pyproject.toml").open("a") as file:
        file.write("\n[tool.mutmut]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    subprocess.run([sys.executable, "-m", "mutmut", "run", "--max-children", "1"], cwd=work, capture_output=True)


def every_mutant(work: Path) -> list[str]:
    files = sorted((work / "mutants" / "fishergeo").glob("*.meta"))
    return sorted(name for path in files for name in json.loads(path.read_text())["exit_code_by_key"])


def wilson(hits: int, of: int) -> tuple[float, float]:
    z, share = 1.959964, hits / of
    middle, spread = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return (middle - spread) / (1 + z * z / of), (middle + spread) / (1 + z * z / of)


class Loop:
    """A pytest plugin that, in place of one run of the tests, makes one for each mutant."""

    def __init__(self, names: list[str], report, trust: bool) -> None:
        self.names, self.report, self.trust = names, report, trust

    def pytest_runtestloop(self, session):
        by_file: dict[str, list] = {}
        for item in session.items:
            if not item.name.startswith(SLOW):
                by_file.setdefault(item.path.stem, []).append(item)
        if not self.trust and self.fork("", [item for items in by_file.values() for item in items]) != "survived":
            raise SystemExit("the tests fail without a mutant")
        for name in self.names:
            files = TESTS[name.split(".")[1]]
            self.report(name, self.fork(name, [item for file in files for item in by_file[f"test_{file}"]]))
        return True

    @staticmethod
    def fork(mutant: str, items: list) -> str:
        child = os.fork()
        if child == 0:
            from _pytest.runner import runtestprotocol
            from mutmut.mutation.trampoline import set_mutant_under_test

            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            set_mutant_under_test(mutant)
            failed = False
            try:
                for item in items:
                    if any(r.failed for r in runtestprotocol(item, nextitem=None, log=False)):
                        failed = True
                        break
            except BaseException:
                failed = True
            os._exit(int(failed))
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return "timeout" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "crashed"
        return "killed" if os.WEXITSTATUS(status) else "survived"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, help="mutants to draw")
    parser.add_argument("--work", type=Path, required=True, help="directory for the copy, made if it does not exist")
    parser.add_argument("--trust", action="store_true", help="the tests are known to pass in the copy: do not try")
    options = parser.parse_args()
    if not options.work.exists():
        copy_head(options.work)
    every = every_mutant(options.work)
    if not every:
        raise SystemExit("mutmut made no mutants; run it by hand in the copy to see why")
    drawn = random.Random(options.seed).sample(every, min(options.size, len(every)))
    status: dict[str, str] = {}

    def report(name: str, result: str) -> None:
        status[name] = result
        counts = Counter(status.values())
        killed = len(status) - counts["survived"]
        summary = {
            "seed": options.seed,
            "mutants": len(every),
            "tried": len(status),
            "counts": dict(counts),
            "killed": killed / len(status),
            "interval": wilson(killed, len(status)),
            "survivors": [name for name, result in status.items() if result == "survived"],
        }
        (options.work / "sample.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {len(status):4} {result:8} {name}", flush=True)

    os.chdir(options.work / "mutants")
    sys.path.insert(0, os.getcwd())
    raise SystemExit(
        pytest.main(["-q", "-p", "no:cacheprovider", "tests"], plugins=[Loop(drawn, report, options.trust)])
    )


if __name__ == "__main__":
    main()
