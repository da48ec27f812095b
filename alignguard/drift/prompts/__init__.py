"""DriftCheck's prompts: the packaged sets, public benchmarks under their own columns, and any others as files or rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeVar

from alignguard.data import DataSource, check_text, read_rows
from alignguard.drift.prompts.benchmarks import recognised
from alignguard.drift.rules import MATCHES, is_right

CATEGORIES = ("unsafe", "borderline", "ordinary", "capability")

PACKAGED = ("unsafe", "borderline", "ordinary", "capability")

Item = TypeVar("Item")

Prompts = str | Path | Iterable[Mapping[str, Any]] | DataSource


def _checked(row: Mapping[str, Any], where: str, number: int, default: str | None) -> dict[str, Any]:
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: no 'prompt' (found the fields {sorted(map(str, row))})")
    check_text(prompt, where)
    category = row.get("category") or default
    if default is not None and category not in CATEGORIES:  # a kind of harm, as other sets use the word
        row, category = {**row, "harm": row.get("harm") or str(category)}, default
    if category not in CATEGORIES:
        raise ValueError(
            f"{where}: unknown category {category!r}; it must be one of {', '.join(CATEGORIES)}, or give the category of "
            "all rows beside the prompts, and what they name is read as their kind of harm"
        )
    if row.get("match", "words") not in MATCHES:
        raise ValueError(f"{where}: unknown match {row['match']!r}; it must be one of {', '.join(MATCHES)}")
    if category == "capability":
        if row.get("answer") is None or not str(row["answer"]).strip():
            raise ValueError(f"{where}: a capability row needs the right 'answer'")
        try:
            is_right(row, "")  # what it would refuse once everything is asked
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    checked = {**row, "category": category, "id": str(row.get("id", f"{category}-{number}"))}
    if not isinstance(row.get("harm"), str | None):
        raise ValueError(f"{where}: 'harm' must be text, found {row['harm']!r:.80} ({type(row['harm']).__name__})")
    for name in ("id", "harm", "source"):  # they stand in the report
        if isinstance(checked.get(name), str):
            check_text(checked[name], f"{where}: {name!r}")
    return checked


def load_prompts(
    prompts: Prompts | None = None, limit: int | None = None, category: str | None = None
) -> list[dict[str, Any]]:
    """Read and check DriftCheck prompts.

    Args:
        prompts: None for the packaged sets, or where :class:`alignguard.data.DataSource` finds rows. A row has ``prompt`` and
            ``category`` (unsafe, borderline, ordinary or capability), perhaps an ``id``, the ``source`` it is of and,
            on unsafe rows, a kind of ``harm``; with capability the right ``answer`` and how it is told (``match``, see
            :func:`alignguard.drift.rules.is_right`). Files of XSTest, StrongREJECT, HarmBench, OR-Bench and SORRY-Bench
            are read under their own columns (:func:`alignguard.drift.prompts.benchmarks.recognised`).
        limit: keep only so many rows of each category, evenly spaced over it, since many sets stand source by source.
        category: category of rows that name none of these, XSTest's and OR-Bench's among them; what they name instead is
            their kind of harm.

    Returns:
        The rows, each with an ``id`` of its own.

    Raises:
        FileNotFoundError: no such file, and no data set of that name.
        TypeError: not a path and not rows.
        ValueError: no rows at all, a row without a prompt, an unknown category, an id that occurs twice, a right answer
            that its ``match`` cannot compare, or what no report could hold; the message names the file and the row.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    if category is not None and category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}; it must be one of {', '.join(CATEGORIES)}")
    rows: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    subset = prompts.subset if isinstance(prompts, DataSource) else None
    for number, (where, raw) in enumerate(_packaged() if prompts is None else read_rows(prompts), 1):
        row = _checked(recognised(raw, where, category, subset), where, number, category)
        if row["id"] in seen:
            raise ValueError(f"{where}: the id {row['id']!r} stands in {seen[row['id']]} already")
        seen[row["id"]] = where
        rows.append(row)
    if not rows:
        what = f"{prompts}" if isinstance(prompts, (str, Path, DataSource)) else "prompts"
        raise ValueError(f"{what}: no prompts; at least one row with 'prompt' and 'category' is needed")
    if limit is None:
        return rows
    of_each = [[i for i, row in enumerate(rows) if row["category"] == name] for name in CATEGORIES]
    return [rows[i] for i in sorted(i for places in of_each for i in spaced(places, limit))]


def spaced(items: Sequence[Item], most: int) -> list[Item]:
    """So many items at most, evenly spaced over all of them, in their order."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def prompts_of(category: str, prompts: Prompts | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """Prompts of one category: those that name it, or a benchmark's of it; of a set that names none, all.

    Args:
        category: one of ``CATEGORIES``.
        prompts: as in :func:`load_prompts`.
        limit: keep only so many, as :func:`load_prompts` does.

    Raises:
        FileNotFoundError, TypeError, ValueError: as in :func:`load_prompts`, and where no row is of the category.
    """
    try:
        rows = load_prompts(prompts, limit)
    except ValueError:
        if prompts is None:
            raise
        rows = load_prompts(prompts, limit, category)
    found = [row for row in rows if row["category"] == category]
    if not found:
        raise ValueError(f"prompts {prompts}: none is {category}")
    return found


def _packaged() -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in PACKAGED:
        with as_file(files(__name__) / f"{name}.jsonl") as path:
            yield from read_rows(path)
