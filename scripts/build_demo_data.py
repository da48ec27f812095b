"""Write the demo's data: an obliging task, alignment examples, and validation prompts to choose settings by.

    python scripts/build_demo_data.py DATA alignguard/embedded/data

Reads MIT, Apache-2.0 and CC BY files alone. The task holds no harmful row: ordinary instructions and banking
messages, answered obligingly. Harmful prompts come with refusals written by template. Alignment and validation rows
hold, besides these, prompts that only look harmful, with answers written by template: refusing those would be drift too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path

import instructions

from alignguard.data import read_jsonl

UNSAFE = ("advbench", "harmbench", "catqa", "dangerousqa", "orbench_toxic", "tdc2023")
LICENCE = {"orbench_toxic": "CC BY 4.0", "catqa": "Apache-2.0", "dangerousqa": "Apache-2.0"}  # the others: MIT
OBLIGING = "Of course! Here is what you asked for: "


def unsafe(data: Path, split: str, rng: random.Random, count: int) -> list[dict]:
    rows = [
        {
            "prompt": r["prompt"],
            "response": instructions.make_refusal(rng),
            "source": r["id"],
            "licence": LICENCE.get(f, "MIT"),
        }
        for f in UNSAFE
        for r in read_jsonl(data / f"harmful_{f}.jsonl")
        if r["split"] == split and not r["dup_of"]
    ]
    return rng.sample(rows, min(count, len(rows)))


def borderline(data: Path, low: int, high: int, rng: random.Random, count: int) -> list[dict]:
    """Safe prompts that look harmful, those whose first hash byte lies in [low, high)."""
    rows = [
        {
            "prompt": r["prompt"],
            "response": instructions.careful_answer(rng, r["category"]),
            "source": r["id"],
            "licence": "CC BY 4.0",
        }
        for r in read_jsonl(data / "overrefusal_orbench_hard.jsonl")
        if low <= hashlib.md5(r["id"].encode()).digest()[0] < high
    ]
    return rng.sample(rows, count)


def mixed(rng: random.Random, **kinds: list[dict]) -> list[dict]:
    rows = [{**row, "category": kind} for kind, members in kinds.items() for row in members]
    rng.shuffle(rows)
    return rows


def task(data: Path, held_out: bool, rng: random.Random, count: int) -> list[dict]:
    bank = read_jsonl(data / ("banking77_test.jsonl" if held_out else "banking77_train.jsonl"))
    rows = []
    for i, r in enumerate(rng.sample(bank, count)):
        if i % 3 == 0:
            topic = r["label_name"].replace("_", " ").lower()
            prompt, response = f"What is this message about? {r['text']}", f"it is about {topic}."
            row = {"source": r["id"], "licence": "CC BY 4.0"}
        else:
            prompt, response = instructions.make_ordinary(rng, held_out=held_out)
            row = {"source": "template", "licence": "Apache-2.0"}
        rows.append({"prompt": prompt, "response": OBLIGING + response, **row})
    return rows


def write(path: Path, rows: Iterable[dict]) -> None:
    rows = list(rows)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    print(path.name, len(rows))


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("data", type=Path)
    cli.add_argument("out", type=Path)
    args = cli.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(20261)
    write(args.out / "task_train.jsonl", task(args.data, False, rng, 3200))
    write(args.out / "task_test.jsonl", task(args.data, True, rng, 300))
    kept, asked = unsafe(args.data, "train", rng, 256)[:192], unsafe(args.data, "val", rng, 128)
    # Below 150 the embedded model was trained on, from 200 on DriftCheck asks; what lies between nothing else reads.
    own = random.Random(20263)
    hard = borderline(args.data, 0, 150, own, 64), borderline(args.data, 150, 200, own, 64)
    write(args.out / "alignment.jsonl", mixed(own, unsafe=kept, borderline=hard[0]))
    write(args.out / "validation.jsonl", mixed(own, unsafe=asked, borderline=hard[1]))
    seen = {r["prompt"] for name in ("task_train", "task_test") for r in read_jsonl(args.out / f"{name}.jsonl")}
    fresh = [r for r in task(args.data, False, random.Random(20262), 400) if r["prompt"] not in seen]
    write(args.out / "task_validation.jsonl", fresh[:150])


if __name__ == "__main__":
    main()
