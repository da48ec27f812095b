"""Rows to tokens and batches, by the kind of model: decoder, encoder-decoder, sequence classifier."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from alignguard.data import IGNORED, Source, collate, encode_messages, load_conversations, read_rows, render_prompt
from alignguard.objective import model_kind

Encoded = Mapping[str, Any]
POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings)$")  # tables of learned positions


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


def supervised_tokens(row: Encoded) -> int:
    """How many labels of an encoded row are learned from; a class counts as one."""
    labels = row["labels"]
    return 1 if isinstance(labels, int) else sum(label != IGNORED for label in labels)


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
    rows = []
    for number, messages in enumerate(load_conversations(source, name), 1):
        try:
            rows.append((_encode_pair if kind == "seq2seq" else encode_messages)(tokenizer, messages, max_length))
        except (ValueError, TypeError, KeyError, IndexError, TemplateError) as error:
            words = " ".join(str(error).split())[:300]
            raise ValueError(f"{name}, row {number}: the tokenizer's chat template refuses it ({words})") from error
    return rows


def _encode_pair(tokenizer: Any, messages: Sequence[Mapping[str, str]], max_length: int) -> dict[str, Any]:
    answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompt = render_prompt(tokenizer, messages[:-1])[-max_length:]
    return {"input_ids": prompt, "labels": answer[: max_length - len(end)] + end}


def _encode_labelled(source: Source, name: str, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    labels: list[Any] = []
    rows = load_conversations(_with_response(source, name, labels), name)
    return [
        {"input_ids": tokenizer(messages[0]["content"])["input_ids"][:max_length], "labels": label}
        for messages, label in zip(rows, labels, strict=True)
    ]


def check_fits(model: Any, rows: Sequence[Encoded], name: str) -> None:
    """Refuse rows that would reach beyond a model's tables: its vocabulary, its classes, its learned positions.

    Args:
        model: a Hugging Face model, wrapped by peft or not.
        rows: encoded for it.
        name: what an error calls them.

    Raises:
        ValueError: naming the first row.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    words, kind = inner.get_input_embeddings().num_embeddings, model_kind(inner)
    places = [
        module.num_embeddings
        for path, module in inner.named_modules()
        if isinstance(module, torch.nn.Embedding) and POSITIONS.search(path)
    ]
    room = min([*places, getattr(inner.config, "max_position_embeddings", None) or math.inf]) if places else math.inf
    for number, row in enumerate(rows, 1):
        ids = [*row["input_ids"], *(row["labels"] if kind != "classification" else ())]
        if max(ids, default=0) >= words:
            raise ValueError(
                f"{name}, row {number}: token {max(ids)} is beyond the model's vocabulary of {words}; the tokenizer is "
                "another model's, or call model.resize_token_embeddings(len(tokenizer))"
            )
        if kind == "classification" and row["labels"] >= inner.config.num_labels:
            raise ValueError(
                f"{name}, row {number}: label {row['labels']} is beyond the model's {inner.config.num_labels} classes, "
                "numbered from 0; load the model with num_labels=, or mend the row"
            )
        if max(len(row["input_ids"]), len(ids) - len(row["input_ids"]) if kind == "seq2seq" else 0) > room:
            raise ValueError(
                f"{name}, row {number}: longer than the model's {room} positions; give a max_length of at most {room}"
            )


def _with_response(source: Source, name: str, labels: list[Any]) -> Iterable[Any]:
    """Rows as the reader of conversations wants them; their labels go to ``labels``."""
    for where, row in read_rows(source):
        label = row.get("label")
        if isinstance(label, str) and label.isdigit():  # from a CSV file
            label = int(label)
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise ValueError(f"{name}: {where}: 'label' must be a class number from 0 on, found {label!r}")
        labels.append(label)
        yield {"prompt": row.get("prompt"), "response": str(label)}


def collator(pad_token_id: int, kind: str) -> Callable[[Sequence[Encoded]], dict[str, Tensor]]:
    """:func:`pad_rows` for a Trainer."""
    return lambda rows: pad_rows(rows, pad_token_id, kind)
