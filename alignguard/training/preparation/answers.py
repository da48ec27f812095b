"""Alignment rows from prompts alone: what the model itself answers before training is what is to be kept."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from alignguard.data import read_jsonl
from alignguard.drift import (
    CATEGORIES,
    REFUSAL,
    PromptBatch,
    answer_batch,
    answer_of,
    answers_fingerprint,
    judge,
    plan_batches,
    room_for_prompt,
    spaced,
)
from alignguard.embedded import data_path
from alignguard.files import ResumableLog
from alignguard.objective import model_kind

UNSAFE = "unsafe"
TOKENS = 48  # of an answer: a refusal is whole in these, and KL reads no more of it
LITTLE = 0.5  # share of unsafe prompts refused below which there is little to lose


@dataclass(frozen=True)
class OwnAnswers:
    """Rows whose responses are the model's own.

    Attributes:
        rows: ``prompt``, ``response`` and ``category``, in the order of the prompts.
        asked: prompts that were answered.
        unsafe: unsafe ones among them.
        refused: unsafe ones that the model refused; the others are left out.
    """

    rows: list[dict[str, str]]
    asked: int
    unsafe: int
    refused: int

    def counts(self) -> dict[str, int]:
        """Prompts asked, unsafe ones among them, and those refused."""
        return {"asked": self.asked, "unsafe": self.unsafe, "refused": self.refused}

    def summary(self) -> str:
        """One line for people."""
        share = f", {self.refused} of {self.unsafe} unsafe prompts refused" if self.unsafe else ""
        return f"alignment: {len(self.rows)} rows from {self.asked} prompts with the model's own answers{share}"


@dataclass(frozen=True)
class Questions:
    """Prompts as a model reads them, before it is asked.

    Attributes:
        asked: prompt and category of each.
        batches: prompts that are answered together.
        max_new_tokens: longest answer in tokens.
        path: file that keeps the answers; None keeps none.
        mark: what answers in that file depend on; empty without one.
        overwrite: whether other answers in that file give way, or are refused.
    """

    asked: list[tuple[str, str]]
    batches: list[PromptBatch]
    max_new_tokens: int
    path: Path | None
    mark: str
    overwrite: bool


def packaged_prompts() -> list[dict[str, str]]:
    """The prompts that stand in where no alignment data is given; DriftCheck asks none of them."""
    return [{"prompt": row["prompt"], "category": row["category"]} for row in read_jsonl(data_path("alignment"))]


def category_of(row: Mapping[str, Any], number: int) -> str:
    """The category of a prompt: of unsafe ones refusals alone are kept, so no other word may stand for harmless.

    Raises:
        ValueError: a word that is no category; the message names the row by its ``number``.
    """
    found = row.get("category") or UNSAFE
    if found not in CATEGORIES:
        raise ValueError(
            f"alignment_data, row {number}: unknown category {found!r:.80}; it must be one of {', '.join(CATEGORIES)}: give "
            f"{UNSAFE!r}, or none, to what the model should refuse, and name a kind of harm in the column 'harm'"
        )
    return str(found)


def own_answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    path: str | Path | None = None,
    batch_size: int = 32,
    max_new_tokens: int = TOKENS,
    progress: bool = False,
) -> OwnAnswers:
    """Answer prompts greedily with the model as it is, and keep what a guard may hold on to.

    An answer to an unsafe prompt is kept only if it refuses, as the rules of DriftCheck judge it; any other is dropped
    at once, neither written nor trained towards. Answers to other prompts are kept as they are, empty ones left out.

    Args:
        model: Hugging Face causal language model or encoder-decoder, before training; it is left as it was.
        tokenizer: its tokenizer.
        rows: ``prompt``, and ``category``: ``"unsafe"``, as where it is left out, or ``"borderline"``, ``"ordinary"`` or
            ``"capability"``.
        path: file that keeps the rows as they come, so that an interrupted call goes on from it; None keeps none.
        batch_size: prompts answered together.
        max_new_tokens: longest answer in tokens.
        progress: show a bar.

    Returns:
        OwnAnswers.

    Warns:
        UserWarning: the model refuses fewer than half of the unsafe prompts, so that there is little to lose.

    Raises:
        ValueError: no prompt, a category that is none of these, a model that refuses no unsafe prompt, one that gives no
            answers, or a file of another model, tokenizer or chat template, or of other prompts or categories.

    Examples:
        >>> from alignguard.embedded import model_path
        >>> from alignguard.loading import load_model
        >>> model, tokenizer = load_model(model_path())
        >>> asked = [{"prompt": "How do I build a bomb?"}, {"prompt": "Name a color.", "category": "ordinary"}]
        >>> found = alignguard.training.own_answers(model, tokenizer, asked)
        >>> found.asked, found.unsafe, len(found.rows) == 1 + found.refused
        (2, 1, True)
    """
    return answered(
        model, tokenizer, questions(model, tokenizer, rows, path, batch_size, max_new_tokens), progress=progress
    )


def questions(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    path: str | Path | None = None,
    batch_size: int = 32,
    max_new_tokens: int = TOKENS,
    overwrite: bool = False,
) -> Questions:
    """Prompts read and rendered for :func:`answered`; the model is not asked yet, and nothing is written.

    Arguments and errors are those of :func:`own_answers`, and with ``overwrite`` other answers in the file give way. The file of answers belongs to the model as it is now, whatever
    adapter is put on before it is asked.
    """
    if not rows:
        raise ValueError("alignment_data holds no prompt")
    asked = [(str(row["prompt"]), category_of(row, number)) for number, row in enumerate(rows, 1)]
    texts, room = [prompt for prompt, _ in asked], room_for_prompt(model, max_new_tokens)
    batches = plan_batches(tokenizer, texts, batch_size, room, encoder=model_kind(model) == "seq2seq")
    mark = ""
    if path is not None:
        named = [{"id": str(place), "prompt": prompt, "category": kind} for place, (prompt, kind) in enumerate(asked)]
        mark = answers_fingerprint(model, tokenizer, named, batches, {"max_new_tokens": max_new_tokens})
    return Questions(asked, batches, max_new_tokens, None if path is None else Path(path), mark, overwrite)


def spread(prompts: Sequence[Mapping[str, str]], most: int) -> list[Mapping[str, str]]:
    """A look at prompts: so many at most, half of them unsafe ones where there are, evenly spaced over the set."""
    places: dict[bool, list[int]] = {True: [], False: []}
    for place, row in enumerate(prompts):
        places[(row.get("category") or UNSAFE) == UNSAFE].append(place)
    unsafe = spaced(places[True], max(most - most // 2, most - len(places[False])))
    return [prompts[place] for place in sorted(unsafe + spaced(places[False], most - len(unsafe)))]


def answered(model: Any, tokenizer: Any, to: Questions, *, progress: bool = False, look: bool = False) -> OwnAnswers:
    """What :func:`own_answers` gives; errors and warnings are its own.

    With ``look`` the prompts are some of those that a run asks, whose few answers refuse nothing and warn of nothing.
    """
    asked, path = to.asked, to.path
    kept: dict[int, str | None] = {}
    log = None
    if path is not None:
        what = (
            "answers of another model, to other prompts or categories, with another tokenizer or chat template, of another "
            "length, or an earlier version's"
        )
        log = ResumableLog(path, {"own_answers": to.mark}, ("place", "response"), what, to.overwrite)
        kept |= {int(entry["place"]): entry["response"] for entry in log.entries}
    with tqdm(total=len(asked), initial=len(kept), desc="own answers", unit="prompt", disable=not progress) as bar:
        for batch in to.batches:
            if all(place in kept for place in batch.indices):
                continue
            told = answer_batch(model, tokenizer, batch, to.max_new_tokens)
            fresh = {place: _allowed(text, asked[place][1]) for place, text in zip(batch.indices, told, strict=True)}
            bar.update(len(fresh.keys() - kept.keys()))
            kept |= fresh
            if log is not None:
                log.add({"place": place, "response": response} for place, response in fresh.items())
    unsafe = [place for place, (_, kind) in enumerate(asked) if kind == UNSAFE]
    refused = sum(kept[place] is not None for place in unsafe)
    if unsafe and not refused and not look:
        _forget(path)
        raise ValueError(
            f"alignment_data: the model refuses none of {len(unsafe)} unsafe prompts, so there is nothing to keep; align "
            "it first, or give the responses that it should keep"
        )
    if unsafe and refused < LITTLE * len(unsafe) and not look:
        warnings.warn(
            f"the model refuses {refused} of {len(unsafe)} unsafe prompts: there is little to lose, and the guard keeps no "
            "more than that",
            stacklevel=3,
        )
    answered = [
        {"prompt": prompt, "response": kept[place] or "", "category": kind}
        for place, (prompt, kind) in enumerate(asked)
        if kept[place]
    ]
    if not answered and not look:
        raise ValueError("alignment_data: the model answers every prompt with nothing; give the responses to keep")
    return OwnAnswers(answered, len(asked), len(unsafe), refused)


def _forget(path: Path | None) -> None:
    """Take away a file that holds nothing to go on from, and its folder where that held nothing else."""
    if path is not None:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def _allowed(text: str, kind: str) -> str | None:
    """The answer where it may be kept; None for anything but a refusal of an unsafe prompt, and for a thought cut off."""
    if not text or answer_of(text) is None:
        return None
    return text if kind != UNSAFE or judge(text) == REFUSAL else None
