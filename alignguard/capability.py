"""Whether an answer to a capability prompt is right: by its final number, the option it chooses, or the words it holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MATCHES = ("words", "number", "choice")

_NUMBER = re.compile(r"(?<![\w.])[-−]?\$?\d[\d,]*(?:\.\d+)?")
_CHOSEN = re.compile(r"(?:answer|option|choice)\s*(?:is|:)?\s*\(?([A-Z])\b", re.IGNORECASE)
_LETTER = re.compile(r"(?<![A-Za-z'])([A-Z])(?![A-Za-z'])")


def final_number(text: str) -> float | None:
    """The last number of a text, as GSM8K is scored; thousands commas and a dollar sign are read over."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    return float(found[-1].replace(",", "").replace("$", "").replace("−", "-"))


def chosen_option(text: str) -> str | None:
    """The option letter that an answer names: after "answer is", else the first capital letter standing alone."""
    named = _CHOSEN.search(text)
    if named:
        return named.group(1).upper()
    alone = _LETTER.search(text)
    return alone.group(1) if alone else None


def is_right(row: Mapping[str, Any], text: str) -> bool:
    """Whether ``text`` answers a capability row rightly.

    Args:
        row: holds ``answer``, and ``match``: ``"words"`` (the default: the answer stands in the text as whole words),
            ``"number"`` (the text's last number equals it) or ``"choice"`` (the option letter that the text names).
        text: the model's answer.

    Returns:
        Whether it does.
    """
    answer, match = str(row["answer"]).strip(), row.get("match", "words")
    if match == "number":
        found = final_number(text)
        return found is not None and abs(found - float(answer.replace(",", ""))) < 1e-6
    if match == "choice":
        return chosen_option(text) == answer.upper()
    return re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", text.lower()) is not None
