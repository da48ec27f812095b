"""DriftCheck's prompts: the packaged sets, and any others as JSONL or rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from alignguard.data import check_text, read_jsonl
from alignguard.drift.rules import MATCHES

CATEGORIES = ("unsafe", "borderline", "ordinary", "capability")

PACKAGED = ("unsafe", "borderline", "ordinary", "capability")

Prompts = str | Path | Iterable[Mapping[str, Any]]


def _checked(row: Any, where: str, number: int) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise TypeError(f"{where}: expected an object with 'prompt' and 'category', found {type(row).__name__}")
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: no 'prompt' (found the fields {sorted(map(str, row))})")
    check_text(prompt, where)
    category = row.get("category")
    if category not in CATEGORIES:
        raise ValueError(f"{where}: unknown category {category!r}; it must be one of {', '.join(CATEGORIES)}")
    if category == "capability" and not str(row.get("answer", "")).strip():
        raise ValueError(f"{where}: a capability row needs the right 'answer'")
    if row.get("match", "words") not in MATCHES:
        raise ValueError(f"{where}: unknown match {row['match']!r}; it must be one of {', '.join(MATCHES)}")
    return {**row, "id": str(row.get("id", f"{category}-{number}"))}


def load_prompts(prompts: Prompts | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """Read and check DriftCheck prompts.

    Args:
        prompts: None for the packaged sets, the path of a JSONL file, or rows. A row has ``prompt`` and ``category``
            (unsafe, borderline, ordinary or capability), perhaps an ``id`` and, on unsafe rows, a kind of ``harm``; with
            capability the right ``answer`` and how it is told (``match``, see :func:`alignguard.drift.rules.is_right`).
        limit: keep only the first so many rows of each category.

    Returns:
        The rows, each with an ``id`` of its own.

    Raises:
        FileNotFoundError: no such file.
        TypeError: not a path and not rows.
        ValueError: no rows at all, a row without a prompt, an unknown category or an id that occurs twice; the message
            names the file and the row.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    sources: list[tuple[str, Iterable[Any]]] = []
    if prompts is None:
        for name in PACKAGED:
            with as_file(files(__name__) / f"{name}.jsonl") as path:
                sources.append((f"{name}.jsonl", read_jsonl(path)))
    elif isinstance(prompts, (str, Path)):
        sources.append((str(prompts), read_jsonl(prompts)))
    elif isinstance(prompts, Iterable) and not isinstance(prompts, Mapping):
        sources.append(("prompts", prompts))
    else:
        raise TypeError(f"prompts must be a path or an iterable of rows, not {type(prompts).__name__}")
    rows: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    kept = dict.fromkeys(CATEGORIES, 0)
    for name, source in sources:
        for number, raw in enumerate(source, 1):
            where = f"{name}, line {number}" if name != "prompts" else f"prompts, row {number}"
            row = _checked(raw, where, number)
            if row["id"] in seen:
                raise ValueError(f"{where}: the id {row['id']!r} stands in {seen[row['id']]} already")
            seen[row["id"]] = where
            kept[row["category"]] += 1
            if limit is None or kept[row["category"]] <= limit:
                rows.append(row)
    if not rows:
        raise ValueError(f"{sources[0][0]}: no prompts; at least one row with 'prompt' and 'category' is needed")
    return rows
