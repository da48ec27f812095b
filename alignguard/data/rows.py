"""One row in any of the common forms as one conversation: its messages, tools, and which turns are learned from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignguard.data.sources import PAIRS, Row, Source, as_source, read_rows

# Who speaks, by the names of ShareGPT and its relatives and of OpenAI's older files.
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant", "bot": "assistant", "observation": "tool", "function": "tool", "ipython": "tool",
    "developer": "system",
}  # fmt: skip

SPEAKERS = ("system", "user", "assistant", "tool")

LEARNED = ("train", "training", "loss")  # true or false of a message, as other trainers say what is learned from

THOUGHTS = ("reasoning_content", "reasoning", "thinking")

ANSWERS = ("response", "completion", "output", "messages", "conversations", "chosen", "label")

# What a label says, as text, of a response that is to be avoided: TRL's false, or a 0 from a table.
AVOIDED = ("false", "0", "0.0")

UNREAD = ("image", "images", "audio", "audios", "video", "videos", "documents", "functions")


def check_text(text: str, where: str) -> None:
    """Refuse what no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half a surrogate pair at character {error.start}, which is no text") from error


def text_of(row: Row, name: str, where: str) -> str:
    """The text of a field that must hold some.

    Raises:
        ValueError: it is not there, no text, or empty.
    """
    value = row.get(name)
    if value is None:
        raise ValueError(f"{where}: no {name!r} (found the fields {sorted(map(str, row))})")
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} must be text, found {value!r:.80} ({type(value).__name__})")
    if not value.strip():
        raise ValueError(f"{where}: {name!r} is empty")
    check_text(value, where)
    return value


def _parsed(value: Any, name: str, where: str) -> Any:
    """A field that may hold its JSON as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {name!r} is text that is no JSON ({error})") from error


def _called(call: Any, where: str) -> dict[str, Any]:
    """A tool call as templates expect it, its arguments a mapping."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ValueError(f"{where}: a tool call needs the name of a function, found {call!r:.200}")
    arguments = inner.get("arguments") or {}
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # a call that was written wrong is rendered as it was written
            arguments = json.loads(arguments)
    rest = call if inner is not call else {}
    return {"type": "function", **rest, "function": {**inner, "arguments": arguments}}


def _content(value: Any, where: str) -> str:
    """Text, also where it comes in parts."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not all(
            isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in value
        ):
            raise ValueError(
                f"{where}: parts of a message's 'content' must be {{type: text, text}}, found {value!r:.200}"
            )
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: 'role' and 'content' of a message must be text, found {value!r:.200}")
    check_text(value, where)
    return value


def _message(given: Any, where: str) -> dict[str, Any]:
    """One message under the names that chat templates read.

    Raises:
        ValueError: no role or one that no template tells apart, no content, or a weight other than 0 and 1.
    """
    found = {name: value for name, value in given.items() if value is not None} if isinstance(given, Mapping) else {}
    if "from" in found and "role" not in found:
        found["role"], found["content"] = found.pop("from"), found.pop("value", None)
    calls = _parsed(found.pop("tool_calls", None), "tool_calls", where) or []
    if "function_call" in found:
        calls = [*calls, found.pop("function_call")]
    role = found.get("role")
    role = role.lower() if isinstance(role, str) else role
    if role == "function_call":
        role, calls, found["content"] = "assistant", [_parsed(found.get("content"), "function_call", where)], ""
    if role is None or (found.get("content") is None and not calls):
        raise ValueError(f"{where}: each message needs 'role' and 'content', found {given!r:.200}")
    if not isinstance(role, str):
        raise ValueError(f"{where}: 'role' and 'content' of a message must be text, found {given!r:.200}")
    check_text(role, where)
    role = ROLES.get(role, role)
    if role not in SPEAKERS:
        raise ValueError(
            f"{where}: the role of a message must be {', '.join(SPEAKERS)} or another name of one, found {given!r:.200}"
        )
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"{where}: 'tool_calls' must be a list, found {calls!r:.200}")
    message = {**found, "role": role, "content": _content(found.get("content") or "", where)}
    if calls:
        message["tool_calls"] = [_called(call, where) for call in calls]
    for name in THOUGHTS:
        if name in message:
            message[name] = _content(message[name], where)
    for name in (name for name in LEARNED if name in message):
        if (learned := message.pop(name)) not in (0, 1):
            raise ValueError(f"{where}: {name!r} of a message must be true or false, found {learned!r:.200}")
        if message.setdefault("weight", int(learned)) != learned:
            raise ValueError(f"{where}: {name!r} of a message says otherwise than its 'weight'; leave out one of them")
    if "weight" in message and message["weight"] not in (0, 1):
        raise ValueError(f"{where}: the weight of a message must be 0 or 1, found {message['weight']!r}")
    return message


def _chat(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"{where}: {name!r} must be a non-empty list of {{role, content}}")
    return [_message(message, where) for message in value]


def _turns(row: Row, where: str) -> list[dict[str, Any]]:
    """The messages of a row, by the form that its fields show."""
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return _chat(row[name], name, where)
    form = next((pair for pair in PAIRS if pair[0] in row and pair[2] in row), None)
    if form is None:
        begun = next((pair for pair in PAIRS if pair[0] in row), PAIRS[0])
        text_of(row, begun[0], where)
        text_of(row, begun[2], where)
        raise AssertionError  # one of the two is not there
    question, more, answer = form
    added = [name for name in ("input", "context") if row.get(name) not in (None, "")]
    if beside := added[:-1] if more else added and [question]:
        raise ValueError(
            f"{where}: {added[-1]!r} would not be read beside {beside[0]!r}; put its text into {question!r}, or leave it out "
            f"by naming what is read (fields={{{question!r}: {question!r}, {answer!r}: {answer!r}}})"
        )
    if isinstance(row[question], Sequence) and not isinstance(row[question], str) and answer == "completion":
        before = [{**message, "weight": 0} for message in _chat(row[question], question, where)]
        after = row[answer]
        return before + _chat(
            [{"role": "assistant", "content": after}] if isinstance(after, str) else after, answer, where
        )
    prompt = text_of(row, question, where)
    if added:
        prompt = f"{prompt}\n\n{text_of(row, added[0], where)}"
    history = row.get("history") or []
    if not isinstance(history, Sequence) or not all(
        isinstance(p, Sequence) and not isinstance(p, str) and len(p) == 2 for p in history
    ):
        raise ValueError(f"{where}: 'history' must be a list of [prompt, response], found {history!r:.200}")
    texts = [*(text for pair in history for text in pair), prompt, text_of(row, answer, where)]
    return _chat(
        [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)], "history", where
    )


def conversation(row: Row, where: str = "row", turns: str = "all") -> dict[str, Any]:
    """A row as chat templates and TRL take it.

    Args:
        row: ``messages`` of ``{"role", "content"}``, ShareGPT's ``conversations`` of ``{"from", "value"}``, ``prompt``
            with ``response`` or ``completion`` (text, or messages), Alpaca's ``instruction``, ``input``, ``output``,
            ``system`` and ``history``, or Dolly's ``instruction``, ``context`` and ``response``; with any of them
            ``system``, ``tools`` and ``chat_template_kwargs``.
        where: what an error calls the row.
        turns: ``"all"`` or ``"last"``, see :class:`alignguard.data.DataSource`.

    Returns:
        ``messages``, the last of them the assistant's, with a ``weight`` of 0 on turns of the assistant that nothing is
        learned from, and ``tools`` and ``chat_template_kwargs`` where the row has them.

    Raises:
        ValueError: no prompt, no response, messages that do not end with the assistant, or a field that cannot be heeded.
    """
    if unread := [name for name in UNREAD if _holds(row.get(name))]:
        raise ValueError(f"{where}: {unread[0]!r} cannot be read along with text; leave it out, or leave out the row")
    if str(row.get("label")).strip().lower() in AVOIDED:
        raise ValueError(
            f"{where}: the label {row['label']!r} says that the response is one to avoid; leave out such rows, or, if "
            "it says something else, rename the column 'label' in the data"
        )
    messages = _turns(row, where)
    system = row.get("system")
    if system not in (None, ""):
        if messages[0]["role"] == "system":
            raise ValueError(f"{where}: a column 'system' and a system message; leave one of them out")
        messages.insert(0, {"role": "system", "content": text_of(row, "system", where)})
    last = messages[-1]
    if last["role"] != "assistant" or not (last["content"].strip() or last.get("tool_calls")):
        raise ValueError(f"{where}: 'messages' must end with a non-empty message of the assistant")
    if turns == "last":
        messages = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages[:-1]] + [last]
    if not learned_turns(messages):
        raise ValueError(
            f"{where}: nothing to learn from: every turn of the assistant has a weight of 0 or answers nothing"
        )
    found: dict[str, Any] = {"messages": messages}
    for name, kind, words in (("tools", list, "a list"), ("chat_template_kwargs", dict, "a mapping")):
        value = _parsed(row.get(name) or None, name, where)
        if value and not isinstance(value, kind):
            raise ValueError(f"{where}: {name!r} must be {words}, found {value!r:.200}")
        if value:
            found[name] = value
    return found


def _holds(value: Any) -> bool:
    return any(map(_holds, value)) if isinstance(value, (list, tuple)) else bool(value)


def learned_turns(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of the messages that are learned from: the assistant's, if they answer something and weigh more than 0.

    Those without text and tool calls answer nothing.
    """
    return [
        i
        for i, m in enumerate(messages)
        if i > 0 and m["role"] == "assistant" and m.get("weight", 1) and (m["content"].strip() or m.get("tool_calls"))
    ]


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the name of what is read before the errors of reading it."""
    try:
        yield
    except (FileNotFoundError, TypeError, ValueError) as error:
        if name in str(error):
            raise
        kind = next(kind for kind in (FileNotFoundError, TypeError, ValueError) if isinstance(error, kind))
        raise kind(f"{name}: {error}") from error


def prompts_alone(source: Source, name: str = "data") -> list[dict[str, str]] | None:
    """Rows of a source that holds prompts without any response.

    Args:
        source: as of :func:`load_conversations`, but no iterator, which could be read only once.
        name: what an error calls the source.

    Returns:
        ``prompt``, and ``category`` where a row has one; None where the first row has more than a prompt.

    Raises:
        FileNotFoundError, TypeError, ValueError: a source that cannot be read, a row without a prompt, or one with a
            response after a first one without.
    """
    found: list[dict[str, str]] = []
    with named(name):
        for where, row in read_rows(source):
            answered = "prompt" not in row or any(row.get(field) not in (None, "", []) for field in ANSWERS)
            if answered and not found:
                return None
            if answered:
                raise ValueError(f"{where}: the rows before it are prompts alone; give every row a response, or none")
            prompt = text_of(row, "prompt", where)
            found.append({"prompt": prompt, **({"category": str(row["category"])} if row.get("category") else {})})
    return found or None


def load_conversations(source: Source, name: str = "data") -> list[dict[str, Any]]:
    """Read and check every row of a source.

    Args:
        source: path, hub name, ``datasets`` object, iterable of rows, or :class:`alignguard.data.DataSource`.
        name: what an error about emptiness calls the source ("task_data", say).

    Returns:
        What :func:`conversation` makes of each row.

    Raises:
        FileNotFoundError, TypeError, ValueError: each names the file and the row.
    """
    given = as_source(source)
    with named(name):
        conversations = [conversation(row, where, given.turns) for where, row in read_rows(given)]
    if not conversations:
        where = f" ({given})" if isinstance(given.source, (str, Path)) else ""
        raise ValueError(f"{name} is empty{where}; it needs at least one row with a prompt and a response")
    return conversations
