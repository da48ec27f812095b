"""Questions with few possible answers: a capability told by the answer that a model finds likeliest, nothing generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
    """Source -> a 0 or 1 for each of its rows: whether the right response scores higher than every other.

    A response's score is its log-likelihood as a whole less that response's mean over the questions of the source, for a small
    model likes some labels better than others whatever is asked (batch calibration in logs, Zhou et al. 2023, arXiv 2309.17249).

    Args:
        model: causal language model or encoder-decoder; left as it was.
        tokenizer: its tokenizer.
        rows: with ``source``, ``prompt``, ``response`` and ``others``, as :func:`with_others` gives them; those of a source
            have the same responses to choose from.
        batch_size: responses of a pass.

    Raises:
        ValueError: rows of a source have different responses to choose from.
    """
    labels = {row["source"]: sorted((row["response"], *row["others"])) for row in rows}
    if mixed := {row["source"] for row in rows if sorted((row["response"], *row["others"])) != labels[row["source"]]}:
        raise ValueError(f"rows of a source must share their possible responses; those of {sorted(mixed)} differ")
    asked = [{"prompt": row["prompt"], "response": response} for row in rows for response in labels[row["source"]]]
    scores = iter(response_likelihoods(model, tokenizer, asked, batch_size=batch_size))
    likelihoods: dict[str, list[list[float]]] = {source: [] for source in labels}
    right: dict[str, list[int]] = {source: [] for source in labels}
    for row in rows:
        of_source = labels[row["source"]]
        likelihoods[row["source"]].append([next(scores).whole for _ in of_source])
        right[row["source"]].append(of_source.index(row["response"]))
    found = {}
    for source, told in likelihoods.items():
        table = np.array(told)
        calibrated = table - table.mean(axis=0)
        found[source] = "".join(
            str(int(best == own)) for best, own in zip(calibrated.argmax(1), right[source], strict=True)
        )
    return found
