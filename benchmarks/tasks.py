"""Fine-tuning tasks beside the packaged one, written from a folder of real data; nothing of it enters the package.

    python benchmarks/tasks.py DATA runs/tasks

DATA holds the JSONL files named below; some are for research or non-commercial use, so their rows stay where they are
written. Each task becomes NAME_train.jsonl, NAME_validation.jsonl and NAME_test.jsonl, rows of prompt and response:

- banking77: what a bank's customer asks about (Casanueva et al. 2020)
- gsm8k: school arithmetic with its reasoning (Cobbe et al. 2021)
- sst2: whether a film review is good or bad (Socher et al. 2013)
- agnews: the section of a news item (Zhang et al. 2015)
- dialogsum: a summary of a dialogue (Chen et al. 2021)
- entangled: whether a request is harmful, so that the task itself is about what is to be kept
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from alignguard.data import read_jsonl
from alignguard.files import write_rows

Row = dict[str, str]
UNSAFE = ("advbench", "harmbench", "catqa", "dangerousqa", "orbench_toxic", "tdc2023")
TRAIN, VALIDATION, TEST = 3200, 150, 300  # most rows of each part


def part(text: str) -> str:
    """Where a row belongs for files without a split of their own: a tenth each for validation and test, by hash."""
    bucket = hashlib.md5(text.encode()).digest()[0]
    return "test" if bucket < 26 else "validation" if bucket < 52 else "train"


def by_hash(rows: Iterable[Row]) -> dict[str, list[Row]]:
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        parts[part(row["prompt"])].append(row)
    return parts


def with_test(rows: list[Row], test: list[Row]) -> dict[str, list[Row]]:
    """The data set's own test rows, and a tenth of its training rows for validation."""
    parts = by_hash(rows)
    return {"train": parts["train"], "validation": parts["validation"], "test": test}


def read(data: Path, name: str, row: Callable[[dict], Row]) -> list[Row]:
    return [row(r) for r in read_jsonl(data / f"{name}.jsonl")]


def banking77(data: Path) -> dict[str, list[Row]]:
    def row(r: dict) -> Row:
        topic = r["label_name"].replace("_", " ").lower()
        return {"prompt": f"What is this message about? {r['text']}", "response": f"It is about {topic}."}

    return with_test(read(data, "banking77_train", row), read(data, "banking77_test", row))


def gsm8k(data: Path) -> dict[str, list[Row]]:
    def row(r: dict) -> Row:
        reasoning = re.sub(r"<<.*?>>", "", r["answer"]).replace("####", "The answer is")
        return {"prompt": r["question"], "response": f"{reasoning}."}

    return with_test(read(data, "gsm8k_train", row), read(data, "gsm8k_test", row))


def sst2(data: Path) -> dict[str, list[Row]]:
    def row(r: dict) -> Row:
        verdict = "good" if r["label"] else "bad"
        return {"prompt": f"Is this review good or bad? {r['text']}", "response": f"The review is {verdict}."}

    parts = with_test(read(data, "sst2_train", row), read(data, "sst2_test", row))
    return {**parts, "validation": read(data, "sst2_dev", row)}


def agnews(data: Path) -> dict[str, list[Row]]:
    return by_hash(
        {
            "prompt": f"Which section is this news for? {r['title']}. {r['text']}",
            "response": f"It is for the section {r['label_name']}.",
        }
        for r in read_jsonl(data / "agnews.jsonl")
    )


def dialogsum(data: Path) -> dict[str, list[Row]]:
    rows = read_jsonl(data / "dialogsum.jsonl")
    of = {name: [r for r in rows if r["split"] == name] for name in ("train", "test")}

    def row(r: dict) -> Row:
        return {"prompt": f"Summarize this dialogue: {r['dialogue']}", "response": r["summaries"][0]}

    return with_test([row(r) for r in of["train"]], [row(r) for r in of["test"]])


def entangled(data: Path) -> dict[str, list[Row]]:
    """As many harmful requests as safe ones that look harmful; DriftCheck's prompts are in no part."""
    harmful = [
        r["prompt"]
        for name in UNSAFE
        for r in read_jsonl(data / f"harmful_{name}.jsonl")
        if r["split"] == "train" and not r["dup_of"]
    ]
    safe = [
        r["prompt"]
        for r in read_jsonl(data / "overrefusal_orbench_hard.jsonl")
        if hashlib.md5(r["id"].encode()).digest()[0] < 200
    ]
    count = min(len(harmful), len(safe))
    drawn = random.Random(0)
    rows = [(p, "harmful") for p in drawn.sample(harmful, count)] + [(p, "safe") for p in drawn.sample(safe, count)]
    return by_hash({"prompt": f"Is this request harmful or safe? {p}", "response": f"It is {v}."} for p, v in rows)


TASKS: dict[str, Callable[[Path], dict[str, list[Row]]]] = {
    f.__name__: f for f in (banking77, gsm8k, sst2, agnews, dialogsum, entangled)
}


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("data", type=Path)
    cli.add_argument("out", type=Path)
    cli.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    args = cli.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.tasks:
        parts = TASKS[name](args.data)
        for which, most in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
            rows = list({row["prompt"]: row for row in parts[which]}.values())
            random.Random(0).shuffle(rows)
            write_rows(args.out / f"{name}_{which}.jsonl", rows[:most])
            print(f"{name}_{which}: {min(len(rows), most)} rows")


if __name__ == "__main__":
    main()
