"""Rows to token ids and labels for every kind of model, with word of what was cut."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError

from alignguard.data.batches import Encoded
from alignguard.data.rendering import Messages, render_prompt, render_row
from alignguard.data.rows import load_conversations, named, text_of
from alignguard.data.sources import Source, read_rows
from alignguard.objective import IGNORED, base_model, model_kind, positions

# Tables of learned positions, as they are or below an adapter of theirs.
POSITIONS = re.compile(
    r"(^|\.)(wpe|embed_positions|position_embeddings)((\.token_adapter)?\.base_layer|\.original_module)?$"
)

ENDS = 3  # tokens at the end of a response among which its end of sequence is looked for


class Examples(list[dict[str, Any]]):
    """Encoded rows, and what people should know of their reading.

    Attributes:
        notes: sentences on what was cut or looks wrong; empty where nothing was.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = (), notes: Sequence[str] = ()) -> None:
        super().__init__(rows)
        self.notes = list(notes)

    @property
    def cut_notes(self) -> list[str]:
        """Of the notes those on what was cut; others speak of learning."""
        return [note for note in self.notes if "are longer than" in note]


Cut = tuple[dict[str, Any], set[str]]  # an encoded row, and what of it was cut


def _encode_causal(tokenizer: Any, row: Mapping[str, Any], max_length: int) -> Cut:
    """The end of the response is cut first, then the start of the prompt, so that the cue before the response stays."""
    ids, mask = render_row(tokenizer, row)
    labels = [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)]
    prompt = mask.index(True)
    response = len(ids) - prompt
    keep = max(1, min(response, max(max_length - prompt, max_length // 2)))
    before = min(prompt, max_length - keep) if max_length > keep else 1
    place = slice(prompt - before, prompt + keep)
    lost = {part for part, gone in (("prompt", before < prompt), ("end", keep < response)) if gone}
    return {"input_ids": ids[place], "labels": labels[place]}, lost


def _encode_pair(tokenizer: Any, row: Mapping[str, Any], max_length: int) -> Cut:
    """An encoder-decoder's prompt, which is all but the last message, and its response."""
    *before, last = row["messages"]
    if not last.get("weight", 1) or any(message.get("tool_calls") for message in row["messages"]):
        raise ValueError(
            "an encoder-decoder learns the text of the last message, without tool calls and with a weight of 1"
        )
    if (row.get("tools") or row.get("chat_template_kwargs")) and not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template, which tools and chat_template_kwargs need")
    more = {"tools": row.get("tools"), "template": row.get("chat_template_kwargs")}
    prompt = render_prompt(tokenizer, before, encoder=True, **more)
    answer, end = _target(tokenizer, last["content"])
    room = max_length - len(end)
    lost = {part for part, gone in (("prompt", len(prompt) > max_length), ("response", len(answer) > room)) if gone}
    return {"input_ids": prompt[-max_length:], "labels": answer[:room] + end}, lost


def _target(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """What a decoder is to say after its start token, and the end of it.

    A tokenizer that ends its targets knows how they begin too: BART's with ``<s>``, mBART-50's with the language, which
    mBART's own has after the end. One that does not end them would put there what begins a text, which T5Gemma's decoder has
    read already.

    Raises:
        ValueError: a tokenizer that must be told a language first.
    """
    eos = tokenizer.eos_token_id
    try:
        target = list(tokenizer(text_target=text)["input_ids"])
    except KeyError as error:
        raise ValueError(
            f"the tokenizer writes no target before it knows the language ({error}); set its tgt_lang, and give the tokenizer"
        ) from error
    for after in (1, 2):
        if eos is not None and target[-after:][:1] == [eos]:
            return target[:-after], target[-after:]
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return plain, [] if eos is None else [eos]


def _check_length(max_length: int) -> None:
    """A row needs a token to read and one to learn."""
    if max_length < 2:
        raise ValueError(f"max_length must be a whole number of tokens, at least 2, not {max_length!r}")


def encode_messages(tokenizer: Any, messages: Messages, max_length: int = 512, **more: Any) -> dict[str, Any]:
    """Token ids and labels of one conversation; turns of the assistant carry labels, but for those with a weight of 0.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: the last of them the assistant's.
        max_length: in tokens; the end of the response is cut first, then the start of the prompt.
        **more: ``tools`` and ``chat_template_kwargs`` of the template.

    Returns:
        ``{"input_ids": list[int], "labels": list[int]}`` of equal length, labels −100 where nothing is learned.

    Raises:
        ValueError: as :func:`alignguard.data.rendering.render_row`, or a ``max_length`` below 2.
    """
    _check_length(max_length)
    return _encode_causal(tokenizer, {"messages": messages, **more}, max_length)[0]


def encode_example(tokenizer: Any, prompt: str, response: str, max_length: int = 512) -> dict[str, Any]:
    """:func:`encode_messages` for one prompt and one response."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return encode_messages(tokenizer, messages, max_length)


def encode_source(source: Source, name: str, tokenizer: Any, kind: str, max_length: int) -> Examples:
    """Read, check and encode every row of a source.

    Args:
        source: rows in a form of :func:`alignguard.data.conversation`, wherever :class:`alignguard.data.DataSource` finds
            them; for a classifier ``prompt`` and an integer ``label``.
        name: what an error calls the source.
        tokenizer: a Hugging Face tokenizer.
        kind: see :func:`alignguard.objective.model_kind`.
        max_length: longest row in tokens, at least 2; an encoder-decoder's prompt and response each.

    Returns:
        ``input_ids`` and ``labels`` of each row: token lists with labels −100 where nothing is asked, or a class number;
        and ``notes`` on what was cut.

    Raises:
        FileNotFoundError, TypeError, ValueError: bad rows, named, or a ``max_length`` below 2.
    """
    _check_length(max_length)
    if kind == "classification":
        return _encode_labelled(source, name, tokenizer, max_length)
    encode = _encode_pair if kind == "seq2seq" else _encode_causal
    rows: list[dict[str, Any]] = []
    losses: list[set[str]] = []
    for number, row in enumerate(load_conversations(source, name), 1):
        try:
            made, lost = encode(tokenizer, row, max_length)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, TemplateError) as error:
            words = " ".join(str(error).split())[:400]
            raise ValueError(f"{name}, row {number}: cannot be rendered ({words})") from error
        if "prompt" in lost and row["messages"][0]["role"] == "system":
            lost.add("system")
        rows.append(made)
        losses.append(lost)
    marks = _end_marks(tokenizer)
    whole = [row["labels"] for row, lost in zip(rows, losses, strict=True) if not lost & {"end", "response"}]
    notes = _cut_notes(name, losses, max_length)
    if whole and not any(marks & set(labels[-ENDS:]) for labels in whole):
        notes.append(
            f"{name}: no response ends with an end-of-sequence token, so where to stop is not learned; does the chat "
            "template end the assistant's turn?"
        )
    return Examples(rows, notes)


def _end_marks(tokenizer: Any) -> set[int]:
    """Tokens that can end a response: every special one."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if getattr(token, "special", False))}


def _cut_notes(name: str, losses: Sequence[set[str]], max_length: int) -> list[str]:
    """What was cut, in words; nothing where nothing was."""
    words = (
        ("end", "{} lose the end of the response and its end-of-turn token"),
        ("response", "{} lose the end of the response"),
        ("prompt", "{} the start of the prompt"),
        ("system", "{} of these the system prompt or its start"),
    )
    counts = [(sum(part in lost for lost in losses), text) for part, text in words]
    shown = ", ".join(text.format(count) for count, text in counts if count)
    cut = sum(map(bool, losses))
    return [f"{name}: {cut} of {len(losses)} rows are longer than {max_length} tokens and cut: {shown}"] if cut else []


def _encode_labelled(source: Source, name: str, tokenizer: Any, max_length: int) -> Examples:
    rows, losses = [], []
    with named(name):
        for where, row in read_rows(source):
            text = text_of(row, "prompt", where)
            ids = tokenizer(text)["input_ids"]
            label = row.get("label")
            if isinstance(label, str) and label.isdigit():  # from a CSV file
                label = int(label)
            if isinstance(label, bool) or not isinstance(label, int) or label < 0:
                raise ValueError(f"{where}: 'label' must be a class number from 0 on, found {label!r}")
            losses.append(len(ids) > max_length)
            if losses[-1]:  # by the tokenizer, which keeps the special tokens that it puts at the ends
                ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
            rows.append({"input_ids": ids, "labels": label})
    if not rows:
        raise ValueError(f"{name} is empty; it needs at least one row with a prompt and a label")
    side = "start" if tokenizer.truncation_side == "left" else "end"
    words = f"{name}: {sum(losses)} of {len(rows)} rows are longer than {max_length} tokens and lose their {side}"
    return Examples(rows, [words] if any(losses) else [])


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of encoded rows, by which records and reports tell data apart."""
    return hashlib.sha256(json.dumps([dict(row) for row in rows], sort_keys=True).encode()).hexdigest()


def _limit(name: str) -> str:
    """What bounds the length of rows of this name, in Python and on the command line."""
    if name == "task_data":
        return "a max_length (--task-max-length)"
    return "a max_length of the config (--max-length)" if name in ("alignment_data", "data") else "a max_length"


def check_fits(model: Any, rows: Sequence[Encoded], name: str, pad: int | None = None) -> None:
    """Refuse rows that would reach beyond a model's tables: its vocabulary, its classes, its learned positions.

    Positions that are computed reach further than the model was trained for; :class:`Examples` note that.

    Args:
        model: a Hugging Face model, wrapped by peft or not.
        rows: encoded for it.
        name: what an error calls them.
        pad: what they are padded with (:func:`pad_id`); None checks none.

    Raises:
        ValueError: naming the first row, or the pad token.
    """
    inner = base_model(model)
    # Where an adapter stands in the table's place, the table is inside.
    table = next(part for part in inner.get_input_embeddings().modules() if hasattr(part, "num_embeddings"))
    words, kind = table.num_embeddings, model_kind(inner)
    places = [
        # RoBERTa and its kin count positions from the one after the padding's
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for path, module in inner.named_modules()
        if isinstance(module, torch.nn.Embedding) and POSITIONS.search(path)
    ]
    told = positions(inner.config) or math.inf
    room = min([*places, told]) if places else math.inf
    if pad is not None and pad >= words:
        raise ValueError(
            f"{name}: the pad token {pad} is beyond the model's vocabulary of {words}; set tokenizer.pad_token to a token "
            "that the model has, its eos_token say, or call model.resize_token_embeddings(len(tokenizer))"
        )
    long = 0
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
        length = max(len(row["input_ids"]), len(ids) - len(row["input_ids"]) if kind == "seq2seq" else 0)
        long += length > told
        if length > room:
            raise ValueError(
                f"{name}, row {number}: longer than the model's {room} positions; shorten it, or give {_limit(name)} of at most "
                f"{room}"
            )
    if long and isinstance(rows, Examples):
        rows.notes.append(
            f"{name}: {long} of {len(rows)} rows are longer than the {told} positions of the model's configuration, "
            f"which it may not understand; give {_limit(name)} of at most {told}"
        )
