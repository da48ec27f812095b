"""Data in: prompt/response pairs or chat messages, rendered by the model's own chat template, loss on the response."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from alignguard.objective import IGNORED, model_kind

Row = Mapping[str, Any]

Source = str | Path | Iterable[Row]


def read_text(path: str | Path) -> str:
    """A UTF-8 file's text, line ends as they stand.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8; the message names the file.
    """
    try:
        there = Path(path).is_file()
    except (OSError, ValueError):  # a name longer than the system takes, or with a NUL in it
        there = False
    if not there:
        raise FileNotFoundError(f"no such file: {path!s:.200}")
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSONL file of objects.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a JSON object; the message names the file and the line.
    """
    rows = []
    for number, line in enumerate(io.StringIO(read_text(path), newline=None), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            words = getattr(error, "msg", None) or str(error)
            raise ValueError(f"{path}, line {number}: not valid JSON ({words}); give one object a line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Row]:
    try:
        return list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    except csv.Error as error:
        raise ValueError(f"{path}: not a readable CSV file ({error}); give columns prompt and response") from error


def read_rows(source: Source) -> Iterator[tuple[str, Row]]:
    """Every row of a source with the name that an error should call it by."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix == ".csv":
            rows: Iterable[Row] = _read_csv(path)
        elif path.suffix in {".jsonl", ".json"}:
            rows = read_jsonl(path)
        else:
            read_text(path)
            raise ValueError(f"{path}: unknown kind of file {path.suffix!r}; give .jsonl or .csv")
        name = str(path)
    elif isinstance(source, (Mapping, bytes)) or not isinstance(source, Iterable):
        raise TypeError(
            f"data must be a path, a datasets.Dataset or an iterable of rows, not {type(source).__name__}; "
            "for a DatasetDict, choose a split"
        )
    else:
        rows, name = source, "data"
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise TypeError(f"{name}, row {number}: expected a mapping, found {type(row).__name__}")
        yield f"{name}, row {number}", row


def check_text(text: str, where: str) -> None:
    """Refuse what no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half a surrogate pair at character {error.start}, which is no text") from error


def conversation(row: Row, where: str = "row") -> list[dict[str, str]]:
    """The chat messages of one row, the last of them the assistant's.

    Args:
        row: ``{"prompt": ..., "response": ...}`` or ``{"messages": [{"role": ..., "content": ...}, ...]}``.
        where: what an error calls the row.

    Raises:
        ValueError: no prompt, no response, or messages that do not end with the assistant.
    """
    if row.get("messages") is not None:
        messages = row["messages"]
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise ValueError(f"{where}: 'messages' must be a non-empty list of {{role, content}}")
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise ValueError(f"{where}: each message needs 'role' and 'content', found {message!r}")
            if not isinstance(message["content"], str) or not isinstance(message["role"], str):
                raise ValueError(f"{where}: 'role' and 'content' of a message must be text, found {message!r}")
            check_text(message["content"] + message["role"], where)
        if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
            raise ValueError(f"{where}: 'messages' must end with a non-empty message of the assistant")
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    for field in ("prompt", "response"):
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: no {field!r} (found the fields {sorted(map(str, row))})")
        check_text(value, where)
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]


def load_conversations(source: Source, name: str = "data") -> list[list[dict[str, str]]]:
    """Read and check every row of a source.

    Args:
        source: path of a .jsonl or .csv file, a ``datasets.Dataset``, or any iterable of rows.
        name: what an error about emptiness calls the source ("task_data", say).

    Raises:
        FileNotFoundError, TypeError, ValueError: each names the file and the row.
    """
    try:
        conversations = [conversation(row, f"{name}: {where}") for where, row in read_rows(source)]
    except (FileNotFoundError, TypeError, ValueError) as error:
        if name in str(error):
            raise
        kind = next(kind for kind in (FileNotFoundError, TypeError, ValueError) if isinstance(error, kind))
        raise kind(f"{name}: {error}") from error
    if not conversations:
        where = f" ({source})" if isinstance(source, (str, Path)) else ""
        raise ValueError(f"{name} is empty{where}; it needs at least one row with a prompt and a response")
    return conversations


def render_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation up to and including the cue for the assistant."""
    if getattr(tokenizer, "chat_template", None):
        encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True)
        return list(encoded["input_ids"]) if isinstance(encoded, Mapping) else list(encoded)
    return tokenizer("\n".join(message["content"] for message in messages) + "\n")["input_ids"]


def _render_whole(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        encoded = tokenizer.apply_chat_template(list(messages), tokenize=True)
        return list(encoded["input_ids"]) if isinstance(encoded, Mapping) else list(encoded)
    ids = render_prompt(tokenizer, messages[:-1])
    answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    return ids + answer + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])


def encode_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]], max_length: int = 512) -> dict[str, Any]:
    """Token ids and labels of one conversation; only the last message carries labels.

    Truncation drops the end of the response first, then the start of the prompt, so that the cue before the
    response always stays.

    Returns:
        ``{"input_ids": list[int], "labels": list[int]}`` of equal length, labels −100 outside the response.

    Raises:
        ValueError: the chat template renders the prompt otherwise once the response follows.
    """
    prompt = render_prompt(tokenizer, messages[:-1])
    whole = _render_whole(tokenizer, messages)
    if whole[: len(prompt)] != prompt:
        raise ValueError(
            "the chat template renders the prompt differently when the response follows it, so the response's "
            "tokens cannot be told apart; use a template whose generation prompt is a prefix of the whole"
        )
    response = whole[len(prompt) :]
    keep = max(1, min(len(response), max(max_length - len(prompt), max_length // 2)))
    prompt, response = prompt[-(max_length - keep) :] if max_length > keep else prompt[-1:], response[:keep]
    return {"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response}


def encode_example(tokenizer: Any, prompt: str, response: str, max_length: int = 512) -> dict[str, Any]:
    """:func:`encode_messages` for one prompt and one response."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return encode_messages(tokenizer, messages, max_length)


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
