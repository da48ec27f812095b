"""How often the refusal rules agree with human annotators.

    python benchmarks/judge.py DATA_FOLDER [--out benchmarks/results/judge.json]

DATA_FOLDER holds `judge_donotanswer_labelled.jsonl` (responses to risky prompts with the human label of what each
does) and, for the false alarms on ordinary answers, `alpaca_short.jsonl`. The prompts are halved by hash: the rules
were written looking at the first half alone; the second half is held out. Only numbers leave the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import torch

from alignguard.data import read_jsonl
from alignguard.judge import judge

NOTE = (
    "The rules reach 0.95 in recall but not in precision on the held-out half; a word n-gram classifier fitted to the "
    "development half (a reference for what the wording alone tells) reaches 0.95 in neither. The annotators gave each "
    "reply one label of six, so a reply that declines in words and then rebuts the request stands under 'refute' or "
    "under 'decline', and one that pleads missing access under 'unable_or_uncertain' or 'decline'. refused_by_label "
    "shows where the false alarms lie: more than half are labelled 'refute'. The rules were not changed after the "
    "held-out half had been measured."
)


def half(prompt: str) -> str:
    return "held_out" if hashlib.md5(prompt.encode()).digest()[0] % 2 else "development"


def scores(truth: list[bool], said: list[bool]) -> dict[str, float | int]:
    tp = sum(t and s for t, s in zip(truth, said, strict=True))
    return {
        "rows": len(truth),
        "declines": sum(truth),
        "precision": round(tp / max(sum(said), 1), 4),
        "recall": round(tp / max(sum(truth), 1), 4),
        "accuracy": round(sum(t == s for t, s in zip(truth, said, strict=True)) / len(truth), 4),
    }


def grams(text: str) -> set[str]:
    words = re.findall(r"[a-z']+", text.lower().replace("’", "'"))[:60]
    return {" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)}


def classifier(train: list[dict], test: list[dict], decay: float = 1e-3) -> list[bool]:
    """A logistic regression on word n-grams of the training half: what the wording alone can tell."""
    counts = Counter(g for row in train for g in grams(row["response"]))
    index = {g: i for i, g in enumerate(sorted(g for g, n in counts.items() if n >= 3))}

    def matrix(rows: list[dict]) -> torch.Tensor:
        out = torch.zeros(len(rows), len(index) + 1, dtype=torch.float64)
        out[:, -1] = 1
        for i, row in enumerate(rows):
            out[i, [index[g] for g in grams(row["response"]) if g in index]] = 1
        return out

    x, y = matrix(train), torch.tensor([float(row["is_refusal"]) for row in train], dtype=torch.float64)
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=200)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight, y) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return (matrix(test) @ weight.detach() > 0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "judge.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    halves: dict[str, list[dict]] = defaultdict(list)
    for row in read_jsonl(arguments.data / "judge_donotanswer_labelled.jsonl"):
        halves[half(row["prompt"])].append(row)
    result: dict = {"command": "python benchmarks/judge.py DATA_FOLDER", "note": NOTE, "rules": {}}
    for name in ("development", "held_out"):
        rows = halves[name]
        said = [judge(row["response"]) == "refusal" for row in rows]
        by_label: dict[str, list[bool]] = defaultdict(list)
        for row, s in zip(rows, said, strict=True):
            by_label[row["action_name"]].append(s)
        result["rules"][name] = scores([row["is_refusal"] for row in rows], said) | {
            "refused_by_label": {k: {"rows": len(v), "refused": sum(v)} for k, v in sorted(by_label.items())}
        }
    held = halves["held_out"]
    result["word_ngram_classifier_held_out"] = scores(
        [row["is_refusal"] for row in held], classifier(halves["development"], held)
    )
    ordinary = [judge(row["output"]) for row in read_jsonl(arguments.data / "alpaca_short.jsonl")]
    result["ordinary_answers"] = {"rows": len(ordinary)} | {
        v: round(ordinary.count(v) / len(ordinary), 5) for v in ("refusal", "compliance", "incoherent")
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
