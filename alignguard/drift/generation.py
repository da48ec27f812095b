"""Greedy answers to many prompts: the chat template rendered, left padding, KV cache, batches of like length."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from alignguard.data import collate, instructed, pad_id, render_prompt
from alignguard.drift.rules import OPEN_THOUGHT, THOUGHT_TAG
from alignguard.files import ResumableLog
from alignguard.objective import IGNORED, base_model, evaluation_mode, model_kind, positions

CUE = 32  # tokens at the end of a prompt among which a thought is looked for that the template opens

_OPENED = re.compile(rf"({OPEN_THOUGHT.pattern})\s*$", re.IGNORECASE)

# What a config says of where it was read and how fast it runs; no answer depends on it.
NOT_READ = ("_name_or_path", "architectures", "transformers_version", "use_cache")


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are answered together.

    Attributes:
        indices: the places of these prompts in the sequence that was planned.
        ids: token ids of each rendered prompt, unpadded.
        cut: how many of them lost their beginning.
    """

    indices: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    cut: int = 0


class Answer(str):
    """An answer's text, and what it was decoded from.

    Attributes:
        ids: token ids as the model wrote them, its end of turn among them where it came to one.
    """

    ids: tuple[int, ...]

    def __new__(cls, text: str, ids: Iterable[int] = ()) -> Answer:
        """The text, which carries its ids."""
        made = super().__new__(cls, text)
        made.ids = tuple(ids)
        return made


def plan_batches(
    tokenizer: Any,
    prompts: Sequence[str],
    batch_size: int = 32,
    max_prompt_tokens: int | None = None,
    encoder: bool = False,
    system: str | None = None,
) -> list[PromptBatch]:
    """Render prompts with the chat template and group them by length, longest first.

    The plan depends on the prompts and the batch size alone, so a run that is resumed sees the same batches, and
    the longest batch, which needs the most memory, comes first.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompts: one user message each.
        batch_size: prompts in a batch.
        max_prompt_tokens: longer prompts lose their beginning, so that the cue for the assistant stays; None keeps all.
        encoder: whether an encoder reads the prompts.
        system: system prompt before every one of them (see :func:`alignguard.data.instructed`); None for none.

    Raises:
        ValueError: ``batch_size`` or ``max_prompt_tokens`` below 1, or a prompt that renders to no token at all, or of which
            the chat template leaves something out.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    if max_prompt_tokens is not None and max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens must be at least 1, found {max_prompt_tokens}")
    encoded = []
    for i, prompt in enumerate(prompts):
        messages = [{"role": "user", "content": prompt}]
        asked = messages if system is None else instructed(tokenizer, messages, system)
        try:
            ids = render_prompt(tokenizer, asked, encoder=encoder)
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from error
        if not ids:
            raise ValueError(f"prompt {i} renders to no token at all: {prompt!r}")
        encoded.append(tuple(ids))
    room = max(map(len, encoded), default=0) if max_prompt_tokens is None else max_prompt_tokens
    whole, encoded = encoded, [ids[-room:] for ids in encoded]
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [
        PromptBatch(tuple(group), tuple(encoded[i] for i in group), sum(len(whole[i]) > room for i in group))
        for group in groups
    ]


def room_for_prompt(model: Any, max_new_tokens: int) -> int | None:
    """How many prompt tokens leave ``max_new_tokens`` of the model's positions free; None where it sets no limit.

    An encoder-decoder has positions for each of the two.
    """
    limit = positions(model.config)
    if limit is None:
        return None
    if limit <= max_new_tokens:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room in the model's {limit} positions")
    return limit if model_kind(model) == "seq2seq" else limit - max_new_tokens


def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """A configuration of our own; of what a model ships only where its answers begin and end is taken over."""
    own = getattr(model, "generation_config", None)
    ends: list[int] = []
    for value in (tokenizer.eos_token_id, getattr(own, "eos_token_id", None)):
        ends += [value] if isinstance(value, int) else list(value or [])
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=sorted(set(ends)) or None,
        decoder_start_token_id=_starts(model),
        forced_bos_token_id=getattr(own, "forced_bos_token_id", None),
        pad_token_id=pad_id(tokenizer),
    )


@contextmanager
def _unbiased(model: Any) -> Iterator[None]:
    """Put aside what the model, and models inside it, ship for generation: sampling, penalties, tokens held back.

    ``generate`` fills whatever the configuration that it is given leaves at None from the model's own, and for most of
    these None is the only value that does nothing.
    """
    own = [
        (module, vars(module)["generation_config"]) for module in model.modules() if "generation_config" in vars(module)
    ]
    try:
        for module, _ in own:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, config in own:
            module.generation_config = config


def _starts(model: Any) -> int | None:
    """The token that an encoder-decoder's answers begin with; None for other models."""
    if model_kind(model) != "seq2seq":
        return None
    for source in (getattr(model, "generation_config", None), model.config):
        start = getattr(source, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    raise ValueError(f"{type(model).__name__} has no decoder_start_token_id; set it in the model's config")


def _special_tags(tokenizer: Any) -> dict[int, str]:
    """The tags of thoughts that are special tokens of a tokenizer, by their ids."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i: token.content for i, token in added.items() if token.special and THOUGHT_TAG.fullmatch(token.content)}


def _decoded(tokenizer: Any, ids: Sequence[int], tags: Mapping[int, str]) -> str:
    """Token ids as text without special tokens, but for the tags of thoughts."""
    text, start = "", 0
    for place, token in enumerate(ids):
        if token in tags:
            text += tokenizer.decode(ids[start:place], skip_special_tokens=True) + tags[token]
            start = place + 1
    return text + str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def answer_batch(model: Any, tokenizer: Any, batch: PromptBatch, max_new_tokens: int = 32) -> list[Answer]:
    """Greedy answers to one batch, in its order, without special tokens; the model is left as it was.

    The tags of a thought stay, and one that the prompt opens stands before the answer, so that a thought is told from what
    follows it.

    Args:
        model: a Hugging Face causal language model or encoder-decoder, wrapped by peft or not.
        tokenizer: its tokenizer.
        batch: from :func:`plan_batches`.
        max_new_tokens: longest answer.

    Raises:
        ValueError: ``max_new_tokens`` below 1, or a model that gives no answers.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    kind, device = model_kind(model), next(model.parameters()).device
    if kind == "classification":
        raise ValueError("the model is a sequence classifier, which gives no answers; ask a generative model")
    rows = [{"input_ids": ids, "labels": [IGNORED] * len(ids)} for ids in batch.ids]
    # A decoder's answer goes on from its prompt's last token; an encoder counts positions from its prompt's first.
    inputs = collate(rows, pad_id(tokenizer), side="right" if kind == "seq2seq" else "left")
    greedy = _greedy(model, tokenizer, max_new_tokens)
    with evaluation_mode(model), _unbiased(model):
        out = model.generate(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            generation_config=greedy,
        )
    answers, ends, tags = [], set(greedy.eos_token_id or ()), _special_tags(tokenizer)
    written = out[:, 1 if kind == "seq2seq" else inputs["input_ids"].shape[1] :].tolist()
    for asked, ids in zip(batch.ids, written, strict=True):
        said = ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))]
        text = _decoded(tokenizer, said, tags).strip()
        if text and kind != "seq2seq" and (opened := _OPENED.search(tokenizer.decode(list(asked[-CUE:])))):
            text = f"{opened[1]}\n{text}"
        answers.append(Answer(text, said))
    return answers


def asked_digest(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> hashlib._Hash:
    """A SHA-256 of prompts, their categories and settings, to which more may be added."""
    # An answer's room depends on the category, and so does whether the model's own may be kept.
    return hashlib.sha256(json.dumps([settings, [[r["id"], r["prompt"], r["category"]] for r in rows]]).encode())


def fingerprint(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    batches: Iterable[PromptBatch],
    settings: dict[str, Any],
) -> str:
    """What answers depend on.

    Args:
        model: its weights count by sums, which are cheap and enough to tell two runs apart; its configuration and the
            scaling of each LoRA layer count whole.
        tokenizer: where an answer ends is read from it.
        rows: prompts and their categories.
        batches: the prompts as the model reads them, from :func:`plan_batches`; which stand together does not count.
        settings: whatever else.
    """
    digest = asked_digest(rows, settings)
    read = sorted((place, ids) for batch in batches for place, ids in zip(batch.indices, batch.ids, strict=True))
    greedy = _greedy(model, tokenizer, 1)
    bounds = [greedy.eos_token_id, greedy.decoder_start_token_id, greedy.forced_bos_token_id]
    digest.update(json.dumps([read, bounds]).encode())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            flat = weight.detach().double() if weight.is_floating_point() else weight.detach()
            digest.update(f"{name} {tuple(weight.shape)} {flat.sum().item()!r} {flat.abs().sum().item()!r}".encode())
    digest.update(repr(getattr(model, "active_adapters", None)).encode() if hasattr(model, "disable_adapter") else b"")
    scalings = {n: m.scaling for n, m in model.named_modules() if isinstance(getattr(m, "scaling", None), dict)}
    digest.update(repr(scalings).encode())
    config = json.loads(base_model(model).config.to_json_string(use_diff=False))
    read_of = {name: value for name, value in config.items() if name not in NOT_READ}
    digest.update(json.dumps(read_of, sort_keys=True).encode())
    return str(digest.hexdigest())


class Answers:
    """Answers by the prompt's id; with a path they are kept in a file as they come, and a later run begins with them.

    Args:
        path: the file; None keeps nothing.
        fingerprint: what the answers depend on.
        overwrite: begin a file of other answers anew in place of refusing it.

    Raises:
        ValueError: the file holds answers of another model, tokenizer, prompts or settings, or an earlier version's.
    """

    def __init__(self, path: str | Path | None, fingerprint: str, overwrite: bool = False) -> None:
        self.known: dict[str, str] = {}
        self._log: ResumableLog | None = None
        if path is not None:
            what = (
                "answers of another model, tokenizer or chat template, to other prompts or with other settings, or an "
                "earlier version's"
            )
            self._log = ResumableLog(path, {"driftcheck": fingerprint}, ("id", "text"), what, overwrite)
            self.known = {entry["id"]: Answer(entry["text"], entry.get("ids", ())) for entry in self._log.entries}

    def add(self, answers: Mapping[str, str]) -> None:
        """Take in answers by the prompt's id."""
        self.known.update(answers)
        if self._log is not None:
            self._log.add({"id": name, "text": text, "ids": getattr(text, "ids", ())} for name, text in answers.items())


def plan_answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    short: int,
    long: int,
    system: str | None = None,
) -> list[tuple[int, PromptBatch]]:
    """Batches with the longest answer each may give; capability prompts have room to reason, and batches of their own.

    The room is halved where the model has few positions, so that the prompt keeps its half.

    Raises:
        ValueError: a system prompt with which no prompt fits.
    """
    limit = room_for_prompt(model, short)
    if limit is not None:
        long = max(short, min(long, (limit + short) // 2))
    plan = []
    encoder = model_kind(model) == "seq2seq"
    for tokens, capable in ((short, False), (long, True)):
        places = [i for i, row in enumerate(rows) if (row["category"] == "capability") == capable]
        texts = [rows[i]["prompt"] for i in places]
        room = room_for_prompt(model, tokens)
        batches = plan_batches(tokenizer, texts, batch_size, room, encoder, system)
        if system is not None and texts and sum(batch.cut for batch in batches) == len(texts):
            raise ValueError(
                f"system: it has {len(tokenizer(system, add_special_tokens=False)['input_ids'])} tokens, and with it every "
                f"prompt is longer than the {room} that the model's positions leave before an answer of {tokens}, so its "
                "beginning would be cut; shorten it"
            )
        for batch in batches:
            plan.append((tokens, PromptBatch(tuple(places[i] for i in batch.indices), batch.ids, batch.cut)))
    return plan
