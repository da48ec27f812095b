"""DriftCheck: what a model refuses, what it answers, and how far it has moved from its base."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from alignguard.data import Source
from alignguard.driftreport import DriftReport, DriftRow
from alignguard.files import write_text
from alignguard.generation import answer_batch, plan_batches, room_for_prompt
from alignguard.judge import judge
from alignguard.likelihood import (
    Margin,
    TaskScore,
    adapter_off,
    measured_kl,
    refusal_margins,
    response_likelihoods,
    task_score,
)
from alignguard.prompts import Prompts, load_prompts

__all__ = [
    "DriftReport",
    "DriftRow",
    "Margin",
    "TaskScore",
    "driftcheck",
    "load_prompts",
    "measured_kl",
    "refusal_margins",
    "task_score",
]


def _fingerprint(model: Any, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """What answers depend on: weights (by sums, cheap and enough to tell two runs apart), prompts and settings."""
    digest = hashlib.sha256(json.dumps([settings, [[r["id"], r["prompt"]] for r in rows]]).encode())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            flat = weight.detach().double() if weight.is_floating_point() else weight.detach()
            digest.update(f"{name} {tuple(weight.shape)} {flat.sum().item()!r} {flat.abs().sum().item()!r}".encode())
    digest.update(repr(getattr(model, "active_adapters", None)).encode() if hasattr(model, "disable_adapter") else b"")
    return digest.hexdigest()


class _Answers:
    """Answers kept in a JSONL file as they come: a line that names the run, then one a prompt."""

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self.path, self.known = Path(path) if path is not None else None, {}
        if self.path is None:
            return
        head = json.dumps({"driftcheck": fingerprint})
        kept = [head]
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").split("\n")
            if lines[0] and lines[0] != head:
                raise ValueError(
                    f"resume: {self.path} holds answers of another model, other prompts or other settings; "
                    "give another file, or delete this one to start anew"
                )
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                    self.known[entry["id"]] = entry["text"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    break  # cut off in the middle of a line: what came before it is whole
                kept.append(line)
        # Rewritten without the torn line, so that new lines are not glued to it.
        write_text(self.path, "\n".join(kept) + "\n")

    def add(self, answers: dict[str, str]) -> None:
        self.known.update(answers)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"id": i, "text": t}, ensure_ascii=True) + "\n" for i, t in answers.items())


def _correct(row: dict[str, Any], text: str) -> bool | None:
    if row["category"] != "capability":
        return None
    answer = re.escape(str(row["answer"]).strip().lower())
    return re.search(rf"(?<!\w){answer}(?!\w)", text.lower()) is not None


def _base_nll(
    model: Any, base: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], texts: Sequence[str]
) -> list[float | None]:
    """Mean negative log-likelihood a token of each answer under the base; None for empty answers."""
    told = [i for i, text in enumerate(texts) if text.strip()]
    if not told:
        return [None] * len(texts)
    pairs = [{"prompt": rows[i]["prompt"], "response": texts[i]} for i in told]
    with adapter_off(model) if base is None else nullcontext():
        scores = response_likelihoods(model if base is None else base, tokenizer, pairs)
    found: list[float | None] = [None] * len(texts)
    for i, score in zip(told, scores, strict=True):
        found[i] = -score.whole / score.tokens
    return found


def driftcheck(
    model: Any,
    tokenizer: Any,
    prompts: Prompts | None = None,
    *,
    base: Any = None,
    alignment: Source | None = None,
    likelihoods: bool = False,
    limit: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    progress: bool = False,
    resume: str | Path | None = None,
) -> DriftReport:
    """Ask a model every prompt greedily and judge its answers; the model is left as it was.

    Args:
        model: a Hugging Face causal language model, wrapped by peft or not.
        tokenizer: its tokenizer; a chat template is used where there is one.
        prompts: None for the packaged set, a JSONL path, or rows (see :func:`alignguard.prompts.load_prompts`).
        base: the model before fine-tuning, for ``alignment`` and ``likelihoods``; None reads it through the model's
            own peft adapter switched off.
        alignment: prompt and response rows on which KL from the base is measured.
        likelihoods: also measure the margins of refusing over obliging on unsafe prompts and, where there is a base,
            how likely each answer is under it (babble is unlikely).
        limit: keep only the first so many prompts of each category.
        batch_size: prompts answered together.
        max_new_tokens: longest answer; a refusal shows in its first words.
        progress: show a bar.
        resume: a JSONL file that takes every answer as it comes; a run that was interrupted goes on from it and ends
            with the same report.

    Raises:
        FileNotFoundError, TypeError, ValueError: bad prompts (the message names file and row), a resume file of
            another run, or no base where one is needed.
    """
    rows = load_prompts(prompts, limit)
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    answers = _Answers(resume, _fingerprint(model, rows, settings) if resume is not None else "")
    texts = [row["prompt"] for row in rows]
    plan = plan_batches(tokenizer, texts, batch_size, room_for_prompt(model, max_new_tokens))
    with tqdm(total=len(rows), desc="driftcheck", unit="prompt", disable=not progress) as bar:
        for batch in plan:
            ids = [rows[i]["id"] for i in batch.indices]
            # A batch is answered whole or not at all: padding in other company could tip a tie.
            if any(i not in answers.known for i in ids):
                answers.add(dict(zip(ids, answer_batch(model, tokenizer, batch, max_new_tokens), strict=True)))
            bar.update(len(ids))
    said = [answers.known[row["id"]] for row in rows]
    extra: list[dict[str, Any]] = [{} for _ in rows]
    if likelihoods:
        unsafe = [i for i, row in enumerate(rows) if row["category"] == "unsafe"]
        margins = refusal_margins(model, tokenizer, [texts[i] for i in unsafe]) if unsafe else []
        for i, margin in zip(unsafe, margins, strict=True):
            extra[i].update(margin_first=margin.first, margin_whole=margin.whole)
        if base is not None or hasattr(model, "disable_adapter"):
            for entry, nll in zip(extra, _base_nll(model, base, tokenizer, rows, said), strict=True):
                entry["base_nll"] = nll
    kl = measured_kl(model, base, tokenizer, alignment) if alignment is not None else None
    found = tuple(
        DriftRow(row["id"], row["category"], row["prompt"], text, judge(text), _correct(row, text), **more)
        for row, text, more in zip(rows, said, extra, strict=True)
    )
    return DriftReport(found, settings, kl)
