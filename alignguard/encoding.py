"""Rows to tokens and batches, by the kind of model: decoder, encoder-decoder, sequence classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignguard.data import IGNORED, Source, collate, encode_messages, load_conversations, read_rows, render_prompt

Encoded = Mapping[str, Any]


def pad_rows(rows: Sequence[Encoded], pad_token_id: int, kind: str = "causal") -> dict[str, Tensor]:
    """A batch of encoded rows.

    Args:
        rows: of :func:`encode_source`.
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


def encode_source(source: Source, name: str, tokenizer: Any, kind: str, max_length: int) -> list[dict[str, Any]]:
    """Read, check and encode every row of a source.

    Args:
        source: rows with ``prompt`` and ``response``, or ``messages``; for a classifier ``prompt`` and an integer
            ``label``.
        name: what an error calls the source.
        tokenizer: a Hugging Face tokenizer.
        kind: see :func:`alignguard.objective.model_kind`.
        max_length: longest row in tokens; an encoder-decoder's prompt and response each.

    Returns:
        ``input_ids`` and ``labels`` of each row: token lists with labels −100 where nothing is asked, or a class number.

    Raises:
        FileNotFoundError, TypeError, ValueError: bad rows, named.
    """
    if kind == "classification":
        return _encode_labelled(source, name, tokenizer, max_length)
    conversations = load_conversations(source, name)
    if kind == "causal":
        return [encode_messages(tokenizer, messages, max_length) for messages in conversations]
    rows = []
    for messages in conversations:
        answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        prompt = render_prompt(tokenizer, messages[:-1])[-max_length:]
        rows.append({"input_ids": prompt, "labels": answer[: max_length - len(end)] + end})
    return rows


def _encode_labelled(source: Source, name: str, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    labels: list[Any] = []
    rows = load_conversations(_with_response(source, labels), name)
    return [
        {"input_ids": tokenizer(messages[0]["content"])["input_ids"][:max_length], "labels": label}
        for messages, label in zip(rows, labels, strict=True)
    ]


def _with_response(source: Source, labels: list[Any]) -> Iterable[Any]:
    """Rows as the reader of conversations wants them; their labels go to ``labels``."""
    for where, row in read_rows(source):
        label = row.get("label")
        if isinstance(label, str) and label.isdigit():  # from a CSV file
            label = int(label)
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise ValueError(f"{where}: 'label' must be a class number from 0 on, found {label!r}")
        labels.append(label)
        yield {"prompt": row.get("prompt"), "response": str(label)}


def collator(pad_token_id: int, kind: str) -> Callable[[Sequence[Encoded]], dict[str, Tensor]]:
    """:func:`pad_rows` for a Trainer."""
    return lambda rows: pad_rows(rows, pad_token_id, kind)
