"""One encoded row as people can read it, with what is learned from marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from alignguard.data.batches import Encoded, supervised_tokens
from alignguard.objective import IGNORED

OPEN, CLOSE = "»", "«"

LONGEST = 400  # characters of a stretch; longer ones lose their middle


def _shortened(text: str) -> str:
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def shown_row(tokenizer: Any, rows: Sequence[Encoded], name: str, kind: str = "causal") -> str:
    """The first row of encoded ones, special tokens included, with what is learned from between » and «.

    Args:
        tokenizer: that encoded them.
        rows: rows of :func:`alignguard.data.encode_source`.
        name: what they are called.
        kind: see :func:`alignguard.objective.model_kind`.

    Returns:
        A line of counts and the text, which keeps its line breaks.
    """
    row = rows[0]
    head = f"{name}, row 1: {len(row['input_ids'])} tokens, {supervised_tokens(row)} learned from, between {OPEN} and {CLOSE}"
    if kind == "classification":
        return f"{head}\n{_shortened(tokenizer.decode(row['input_ids']))}{OPEN}class {row['labels']}{CLOSE}"
    if kind == "seq2seq":
        answer = _shortened(tokenizer.decode([token for token in row["labels"] if token != IGNORED]))
        return f"{head}\n{_shortened(tokenizer.decode(row['input_ids']))}\n{OPEN}{answer}{CLOSE}"
    parts = []
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for learned, stretch in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = _shortened(tokenizer.decode([token for token, _ in stretch]))
        parts.append(f"{OPEN}{text}{CLOSE}" if learned else text)
    return f"{head}\n{''.join(parts)}"
