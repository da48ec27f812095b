"""Conversations as text by the model's own chat template, and as tokens that tell what is learned from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, TypeVar

from jinja2 import TemplateError

from alignguard.data.rows import THOUGHTS, learned_turns

THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)

_PART = re.compile(r"""\{\s*["']type["']\s*:\s*["']text["']""")

Messages = Sequence[Mapping[str, Any]]
Made = TypeVar("Made")


def render_prompt(
    tokenizer: Any,
    messages: Messages,
    *,
    encoder: bool = False,
    tools: Any = None,
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation up to and including the cue for the assistant.

    As :func:`render_row` does, it finds every text again in what the template makes of it, and gives content in parts to
    templates that read it so.

    Args:
        tokenizer: a Hugging Face tokenizer; without a chat template the contents stand one a line.
        messages: ``{"role", "content"}`` each.
        encoder: whether an encoder reads them, which wants the end of sequence that its tokenizer puts there.
        tools: passed to the template.
        template: further arguments of the template.

    Raises:
        ValueError: a template that leaves something out; the message names it.
    """
    if getattr(tokenizer, "chat_template", None):
        text = _prompt_text(tokenizer, messages, tools, template)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer("\n".join(message["content"] for message in messages) + "\n")["input_ids"])
    # some tokenizers end whatever they read, and a decoder must not read an end before its answer
    return ids if encoder or not ids or ids[-1] != tokenizer.eos_token_id else ids[:-1]


def _prompt_text(
    tokenizer: Any, messages: Messages, tools: Any = None, options: Mapping[str, Any] | None = None
) -> str:
    """What the chat template makes of a conversation, the cue for the assistant at its end."""

    def rendered(shown: Messages) -> str:
        text = _template(tokenizer, shown, tools, options)(len(shown), True)
        _check_rendered(text, {}, messages, tools)
        return text

    return _as_read(messages, rendered)


def _as_read(messages: Messages, make: Callable[[Messages], Made]) -> Made:
    """What is made of messages, their contents as text or, where the template does not take that, in parts."""
    try:
        return make(messages)
    except (ValueError, TypeError, AttributeError, TemplateError) as error:
        parts = [{**m, "content": [{"type": "text", "text": m["content"]}] if m["content"] else []} for m in messages]
        try:
            made = make(parts)
        except Exception:  # a template that takes no parts fails in its own way
            raise error from None
        rendered = made[0] if isinstance(made, tuple) else made
        if _PART.search(str(rendered)) and not any(_PART.search(m["content"]) for m in messages):
            raise error from None  # or prints them as they stand
        return made


def check_system(system: Any) -> None:
    """Refuse a system prompt that says nothing.

    Raises:
        ValueError: it is no text, or empty.
    """
    if not isinstance(system, str) or not system.strip():
        raise ValueError(f"system must be a text that says something, not {system!r}")


def instructed(tokenizer: Any, messages: Messages, system: str) -> list[dict[str, Any]]:
    """A conversation led by a system prompt, in the place of one that it may have.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: ``{"role", "content"}`` each.
        system: the system prompt.

    Returns:
        Messages with one of the role ``system`` first. Where the chat template refuses that role, leaves it out, or
        renders it as a turn of the user or the assistant, the text stands before the first user message instead, an
        empty line between them.

    Raises:
        ValueError: an empty system prompt.
    """
    check_system(system)
    rest = [dict(message) for message in messages if message["role"] != "system"]
    if not getattr(tokenizer, "chat_template", None) or _knows_system(tokenizer, system):
        return [{"role": "system", "content": system}, *rest]
    for message in rest:
        if message["role"] == "user":
            message["content"] = f"{system}\n\n{message['content']}"
            break
    return rest


def _knows_system(tokenizer: Any, system: str) -> bool:
    """Whether the chat template has a place of its own for a system prompt."""

    def shown(role: str) -> str | None:
        try:
            return _prompt_text(tokenizer, [{"role": role, "content": system}, {"role": "user", "content": "?"}])
        except (TemplateError, ValueError, TypeError, AttributeError):  # refused, or left out
            return None

    told = shown("system")
    return told is not None and told not in (shown("user"), shown("assistant"))


def _template(tokenizer: Any, messages: Messages, tools: Any, options: Mapping[str, Any] | None) -> Any:
    """(how many messages, with the cue for the assistant) -> text.

    Raises:
        ValueError: options that the template does not know.
    """
    if unknown := [name for name in options or () if name not in str(tokenizer.chat_template)]:
        raise ValueError(f"the chat template knows no {unknown[0]!r} of chat_template_kwargs")
    shown = [{name: value for name, value in message.items() if name != "weight"} for message in messages]

    def render(count: int, cue: bool = False) -> str:
        more = {**(options or {}), **({"tools": tools} if tools else {})}
        return tokenizer.apply_chat_template(shown[:count], tokenize=False, add_generation_prompt=cue, **more)

    return render


def render_row(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them are learned from.

    Every text of the row must be found again in what the template makes of it: a template that leaves out what it does
    not know would train on something else than the row says. Templates that read content in parts get it so.

    Args:
        tokenizer: a Hugging Face tokenizer.
        row: of :func:`alignguard.data.conversation`.

    Returns:
        ids, and for each whether it belongs to a learned turn of the assistant, its end included.

    Raises:
        ValueError: a template that leaves something out, that renders the prompt otherwise once the response follows, or
            turns that cannot be told apart.
    """
    if not getattr(tokenizer, "chat_template", None):
        return _without_template(tokenizer, row)
    text, spans = _as_read(row["messages"], lambda shown: _spans(tokenizer, row, shown))
    return tokens_of(tokenizer, text, spans)


def _without_template(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    messages = row["messages"]
    if row.get("tools") or row.get("chat_template_kwargs") or any(m.get("tool_calls") for m in messages):
        raise ValueError("the tokenizer has no chat template, which tools and chat_template_kwargs need")
    if learned_turns(messages) != [len(messages) - 1]:
        raise ValueError(
            "the tokenizer has no chat template to tell several turns apart; learn from the last (turns='last')"
        )
    prompt = render_prompt(tokenizer, messages[:-1])
    answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    answer = answer + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def _spans(tokenizer: Any, row: Mapping[str, Any], messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    """The whole text and where each learned turn stands in it."""
    render = _template(tokenizer, messages, row.get("tools"), row.get("chat_template_kwargs"))
    whole, spans = render(len(messages)), []
    places = learned_turns(row["messages"])
    for place in places:
        before = render(place, True)
        if not whole.startswith(before):
            raise ValueError(
                "the chat template renders the prompt differently when the response follows it, so the response's "
                "tokens cannot be told apart; use a template whose generation prompt is a prefix of the whole"
                + (", or learn from the last turn alone (turns='last')" if place < len(messages) - 1 else "")
            )
        spans.append((len(before), _end(whole, render, row["messages"], place, len(before))))
    _check_rendered(whole, dict(zip(places, spans, strict=True)), row["messages"], row.get("tools"))
    return whole, spans


def _end(whole: str, render: Any, messages: Messages, place: int, start: int) -> int:
    """Where a learned turn ends, with what the template puts after it."""
    if place == len(messages) - 1:
        return len(whole)
    if whole.startswith(after := render(place + 1)):
        return len(after)
    # Qwen3 and others render a turn otherwise while it is the last: the text, and the end that the last one has
    content, last = messages[place]["content"].strip(), messages[-1]["content"].strip()
    tail = whole[whole.rfind(last) + len(last) :] if last and last in whole else ""
    at = whole.find(content, start)
    end = at + len(content)
    closing = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole[end:], tail, strict=False)))
    if not content or at < 0 or whole[start:at].strip() or not closing:
        raise ValueError(
            "the chat template renders earlier turns otherwise than the last; learn from that alone (turns='last')"
        )
    return end + len(closing)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _spellings(value: Any) -> list[str]:
    """How templates write a value of a tool call: plainly, as Python does, or as JSON, itself in JSON perhaps."""
    text = isinstance(value, str)
    plain = [value, repr(value)[1:-1]] if text else [str(value), repr(value)]
    once = [json.dumps(value, ensure_ascii=ascii, default=str) for ascii in (True, False)]
    once = [quoted[1:-1] for quoted in once] if text else once
    twice = [json.dumps(quoted, ensure_ascii=False)[1:-1] for quoted in once]
    return [_squeezed(spelling) for spelling in (*plain, *once, *twice)]


def _has(text: str, value: Any) -> bool:
    """Whether every name and value within a tool call's arguments stands in a squeezed text."""
    if isinstance(value, Mapping):
        return all(_has(text, name) and _has(text, inner) for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(_has(text, inner) for inner in value)
    return any(spelling in text for spelling in _spellings(value))


def _check_rendered(whole: str, learned: Mapping[int, tuple[int, int]], messages: Messages, tools: Any) -> None:
    """Refuse a template that leaves out text, thoughts, tool calls or tools; learned turns stand where they are said to."""
    text = _squeezed(whole)
    for tool in tools or ():
        name = tool.get("function", tool).get("name") if isinstance(tool, Mapping) else None
        if not isinstance(name, str):
            raise ValueError(f"each of 'tools' needs the name of a function, found {tool!r:.200}")
        if _squeezed(name) not in text:
            raise ValueError(
                f"the chat template leaves out the tool {name!r}; use one that renders tools, or leave them out"
            )
    for place, message in enumerate(messages):
        span = learned.get(place)
        within = text if span is None else _squeezed(whole[slice(*span)])
        content = message["content"]
        wordings = [content, json.dumps(content, ensure_ascii=False)[1:-1]]  # tool messages may be quoted
        if span is None and message["role"] == "assistant":  # earlier thoughts are left out by design
            wordings.append(THOUGHT.sub("", content))
        lost = [] if any(_squeezed(wording) in within for wording in wordings) else ["its text"]
        if span is not None:
            lost += [name for name in THOUGHTS if _squeezed(message.get(name) or "") not in within]
        for call in message.get("tool_calls") or ():
            called = call["function"]
            if not _has(within, called["name"]):
                lost.append(f"the tool call {called['name']!r}")
            elif not _has(within, called["arguments"]):
                lost.append(f"arguments of the tool call {called['name']!r}")
        if lost:
            raise ValueError(
                f"the chat template leaves out {lost[0]} of message {place + 1} ({message['role']}); use a template that "
                "renders it, or leave it out"
            )


def tokens_of(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Token ids of a text, and which of them stand in the spans.

    Where a token would reach across the edge of a span, the parts are tokenised one by one: the model's own answer begins
    with a token of its own as well.

    Raises:
        ValueError: the parts do not make the text again.
    """

    def ids_of(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    whole = ids_of(text)
    edges = sorted({edge for span in spans for edge in span if edge < len(text)})
    heads = [ids_of(text[:edge]) for edge in edges]
    if all(whole[: len(head)] == head for head in heads):
        places = {0: 0, len(text): len(whole), **{edge: len(head) for edge, head in zip(edges, heads, strict=True)}}
        mask = [False] * len(whole)
        for start, end in spans:
            mask[places[start] : places[end]] = [True] * (places[end] - places[start])
        return whole, mask
    ids: list[int] = []
    mask = []
    starts = {start for start, _ in spans}
    for start, end in zip([0, *edges], [*edges, len(text)], strict=True):
        part = ids_of(text[start:end])
        ids, mask = ids + part, mask + [start in starts] * len(part)
    if tokenizer.decode(ids) != tokenizer.decode(whole):
        raise ValueError(
            "the tokenizer reads prompt and response together otherwise than one by one, so they cannot be told apart"
        )
    return ids, mask
