"""Encoded rows as batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignguard.objective import IGNORED

Encoded = Mapping[str, Any]


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int, side: str = "right") -> dict[str, Tensor]:
    """Pad rows of ``input_ids`` and ``labels`` to one batch.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each (n, longest row) int64; padding is masked and −100.
    """
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        place = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, place] = torch.tensor(row["input_ids"])
        labels[i, place] = torch.tensor(row["labels"])
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pad_id(tokenizer: Any) -> int:
    """The id that padding is filled with: the tokenizer's own, else its end of sequence, else 0."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return value
    return 0


def pad_rows(rows: Sequence[Encoded], pad_token_id: int, kind: str = "causal") -> dict[str, Tensor]:
    """A batch of encoded rows.

    Args:
        rows: rows of :func:`encode_source`.
        pad_token_id: fills padded positions of ``input_ids``.
        kind: see :func:`alignguard.objective.model_kind`.

    Returns:
        ``input_ids`` and ``attention_mask`` (n, longest input), ``labels`` (n, longest input) for a decoder,
        (n, longest response) for an encoder-decoder, (n,) for a classifier; int64, labels −100 where padded.
    """
    if kind == "causal":
        return collate(rows, pad_token_id)
    batch = collate([{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows], pad_token_id)
    if kind == "classification":
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}
    width = max(len(row["labels"]) for row in rows)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    for place, row in enumerate(rows):
        labels[place, : len(row["labels"])] = torch.tensor(row["labels"])
    return {**batch, "labels": labels}


def supervised_tokens(row: Encoded) -> int:
    """How many labels of an encoded row are learned from; a class counts as one."""
    labels = row["labels"]
    return 1 if isinstance(labels, int) else sum(label != IGNORED for label in labels)


def collator(pad_token_id: int, kind: str) -> Callable[[Sequence[Encoded]], dict[str, Tensor]]:
    """:func:`pad_rows` for a Trainer; it can be pickled, as a loader's workers need where they are not forked."""
    return partial(pad_rows, pad_token_id=pad_token_id, kind=kind)
