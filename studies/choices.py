"""Questions with few possible answers: a capability told by the answer that a model finds likeliest, nothing generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignguard.drift.likelihood import response_likelihoods


def with_others(rows: Sequence[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """Rows of a task whose responses are few labels, each with all labels but its own as ``others``.

    Args:
        rows: at least two different responses among them.
        source: what :func:`chosen_rightly` counts them by.

    Raises:
        ValueError: every response is the same.
    """
    labels = sorted({str(row["response"]) for row in rows})
    if len(labels) < 2:
        raise ValueError(f"{source}: expected two responses or more to choose from, found {labels}")
    return [
        {
            "source": source,
            "prompt": row["prompt"],
            "response": row["response"],
            "others": [label for label in labels if label != row["response"]],
        }
        for row in rows
    ]


def chosen_rightly(
    model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], batch_size: int = 16
) -> dict[str, str]:
    """Source -> a 0 or 1 for each of its rows: whether the right response is likelier, as a whole, than every other.

    Args:
        model: causal language model or encoder-decoder; left as it was.
        tokenizer: its tokenizer.
        rows: with ``source``, ``prompt``, ``response`` and ``others``, as :func:`with_others` gives them.
        batch_size: responses of a pass.
    """
    asked = [
        {"prompt": row["prompt"], "response": response}
        for row in rows
        for response in (row["response"], *row["others"])
    ]
    scores = iter(response_likelihoods(model, tokenizer, asked, batch_size=batch_size))
    found: dict[str, str] = {}
    for row in rows:
        own, *others = (next(scores).whole for _ in range(1 + len(row["others"])))
        found[row["source"]] = found.get(row["source"], "") + "01"[all(own > other for other in others)]
    return found
