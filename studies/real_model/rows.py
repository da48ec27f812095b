"""Which prompts of the data folder align the model, and which only measure it.

What is trained on is of permissive licence (MIT, Apache-2.0, CC BY, CC BY-SA, or written for this project). Unsafe
prompts come without any completion, and only ever get refusals. The ``FOREIGN`` sources take no part in alignment.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alignguard.data import read_jsonl
from scripts.instructions import make_ordinary

HOME = {"advbench": 210, "catqa": 210, "harmfulqa": 170, "dangerousqa": 90, "orbench_toxic": 170}
# Never trained on. Of some, the part named calls for a refusal beyond doubt, and the rest is measured apart: HarmBench's
# contextual requests lack their context here, Do-Not-Answer's other areas hold many questions that are merely delicate,
# and the other evaluations of Safety-Tuned LLaMAs are opinions, hateful statements and household advice.
FOREIGN = {
    "harmbench": {"functional": "standard"},
    "tdc2023": {},
    "malicious_instruct": {},
    "donotanswer": {"risk_area": "Malicious Uses"},
    "safetytuned_eval": {"subset": "I-MaliciousInstructions"},
}
MILD = ("Tailored Financial Advice", "Political Campaigning")  # CatQA: advice that many models rightly give
ORDINARY = {"templates": 240, "gsm8k": 40, "banking77": 80, "e2e_nlg": 40}
HARD = 260  # rows of OR-Bench hard
HARD_SPLITS = {"train": range(150), "val": range(150, 200), "test": range(200, 256)}  # as the packaged prompts are cut

Row = dict[str, Any]


def read_source(data: str | Path, name: str) -> list[Row]:
    """The rows of a file of the data folder, without those that repeat another file's.

    Raises:
        FileNotFoundError: the folder or the file is missing; says what ``--data`` must hold.
    """
    path = Path(data) / f"{name}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; --data takes the folder of the prompt sets, as JSONL")
    return [row for row in read_jsonl(path) if not row.get("dup_of")]


def hashed(rows: Iterable[Row], seed: int, field: str = "id") -> list[Row]:
    """Rows in an order given by a hash, so that the first n are a fair sample."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed} {row[field]}".encode()).digest())


def unsafe(data: str | Path, name: str, splits: Iterable[str]) -> list[Row]:
    """Unsafe prompts of a source in the splits named: ``id``, ``prompt``, ``split``, and whether they are ``plain``."""
    chosen, part = set(splits), FOREIGN.get(name, {})
    return [
        {
            "id": row["id"],
            "prompt": row["prompt"].strip(),
            "split": row["split"],
            "plain": all(row[field] == value for field, value in part.items()),
        }
        for row in read_source(data, f"harmful_{name}")
        if row["split"] in chosen and row.get("category") not in MILD
    ]


def hard(data: str | Path, split: str) -> list[Row]:
    """OR-Bench hard: harmless prompts that look alarming. The test part is what the packaged set holds."""
    return [
        {"id": row["id"], "prompt": row["prompt"].strip(), "source": "orbench_hard"}
        for row in read_source(data, "overrefusal_orbench_hard")
        if hashlib.md5(row["id"].encode()).digest()[0] in HARD_SPLITS[split]
    ]


def ordinary(data: str | Path, seed: int) -> list[Row]:
    """Everyday prompts of training: instructions from templates, sums, a bank's customers, facts to put into words."""
    generator = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < ORDINARY["templates"]:
        prompts[make_ordinary(generator)[0].strip()] = None
    found = [{"id": f"templates-{i}", "prompt": p, "source": "templates"} for i, p in enumerate(prompts)]
    for name, file, field in (
        ("gsm8k", "gsm8k_train", "question"), ("banking77", "banking77_train", "text"), ("e2e_nlg", "e2e_nlg_train", "mr")
    ):  # fmt: skip
        cue = "Put these facts about a restaurant into a sentence: " if name == "e2e_nlg" else ""
        taken = hashed(read_source(data, file), seed)[: ORDINARY[name]]
        found += [{"id": row["id"], "prompt": cue + row[field].strip(), "source": name} for row in taken]
    return found


def paragraphs(data: str | Path, split: str) -> list[str]:
    """Paragraphs of WikiText-2 in which perplexity is measured, in an order given by a hash; ``split`` train or test."""
    found = (row for row in read_source(data, "text_wikitext2") if row["split"] == split)
    return [row["text"] for row in hashed(found, 0)]


def texts(data: str | Path, count: int, seed: int) -> list[str]:
    """Plain paragraphs on which the model is held to the original: half WikiText-2's validation articles."""
    found = []
    for name, part in (("text_wikitext2", count // 2), ("text_masc", count // 4), ("text_state_union", count // 4)):
        kept = [row for row in read_source(data, name) if row["split"] == "train"]
        found += [row["text"] for row in hashed(kept, seed)[:part]]
    return found
