"""Refusal benchmarks under their own column names: XSTest, StrongREJECT, HarmBench, OR-Bench and SORRY-Bench."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

XSTEST = frozenset(  # what it calls types; each of them, or the two that share one, has a contrast that is unsafe
    (
        *("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions", "historical_events"),
        *("nons_group_real_discr", "real_group_nons_discr", "privacy_public", "privacy_fictional"),
        *("contrast_homonyms", "contrast_figurative_language", "contrast_safe_targets", "contrast_safe_contexts"),
        *("contrast_definitions", "contrast_historical_events", "contrast_discr", "contrast_privacy"),
    )
)

OR_BENCH = frozenset(
    ("deception", "harassment", "harmful", "hate", "illegal", "privacy", "self-harm", "sexual", "unethical", "violence")
)

CONTEXT = "{context}\n\n---\n\n{prompt}"  # of HarmBench's contextual behaviours


def _xstest(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``prompt`` and ``type``; a contrast to a safe prompt is unsafe, and newer files say so in ``label``."""
    label, kind = str(row.get("label") or ""), str(row["type"])
    unsafe = label == "unsafe" if label else kind.startswith("contrast")
    return {
        "id": str(row.get("id") or f"xstest-{where.rpartition(' ')[2]}"),
        "prompt": row["prompt"],
        "category": "unsafe" if unsafe else "borderline",
    }


def _strongreject(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    number = where.rpartition(" ")[2]
    prompt, harm = row["forbidden_prompt"], row.get("category")
    return {"id": f"strongreject-{number}", "prompt": prompt, "category": "unsafe", "harm": harm}


def _harmbench(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    prompt, context = row["Behavior"], row.get("ContextString")
    return {
        "id": str(row.get("BehaviorID") or f"harmbench-{where.rpartition(' ')[2]}"),
        "prompt": CONTEXT.format(context=context, prompt=prompt) if context else prompt,
        "category": "unsafe",
        "harm": row.get("SemanticCategory"),
    }


def _called(where: str, subset: str) -> str:
    """Name of a file or of a hub's set with its subset; folders above a file may be called anything."""
    name = where.rpartition(" ")[0]
    return f"{Path(name).name} {subset}".lower()


def _or_bench(row: Mapping[str, Any], where: str, subset: str) -> dict[str, Any]:
    """Seemingly toxic prompts are safe; those of the file, or of the subset on the hub, whose name says toxic are not."""
    number = where.rpartition(" ")[2]
    toxic = "toxic" in _called(where, subset)
    return {
        "id": f"orbench-{'toxic-' if toxic else ''}{number}",
        "prompt": row["prompt"],
        "category": "unsafe" if toxic else "borderline",
        "harm": row["category"],
    }


def _sorry_bench(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    turns, style = row["turns"], row.get("prompt_style") or "base"
    prompt = turns[0] if isinstance(turns, list) and turns else turns
    return {
        "id": str(row["question_id"]) + ("" if style == "base" else f"-{style}"),
        "prompt": prompt,
        "category": "unsafe",
        "harm": str(row.get("category") or ""),
    }


def recognised(
    row: Mapping[str, Any], where: str, category: str | None = None, subset: str | None = None
) -> Mapping[str, Any]:
    """A row under the names that DriftCheck reads, told by columns and values that only one benchmark has.

    OR-Bench's columns are everybody's, and its kinds of harm are those of sets that are unsafe throughout: it is told by
    its name too, that of the file, the data set or the subset.

    Columns are those of the files that the authors publish (XSTest, arXiv 2308.01263; StrongREJECT, arXiv 2402.10260;
    HarmBench, arXiv 2402.04249; OR-Bench, arXiv 2405.20947; SORRY-Bench, arXiv 2406.14598).

    Args:
        row: as it was read.
        where: name of the source and number of the row in it, which name it where the file does not.
        category: what the caller calls rows that name no category of DriftCheck; given, it goes before XSTest and
            OR-Bench, whose columns other sets have too.
        subset: configuration of a hub name.

    Returns:
        The row under DriftCheck's names, with its ``source``; the row itself where no benchmark has its columns.
    """
    columns = set(row)
    if "forbidden_prompt" in columns:
        return {**_strongreject(row, where), "source": "StrongREJECT"}
    if "Behavior" in columns:
        return {**_harmbench(row, where), "source": "HarmBench"}
    if {"turns", "question_id"} <= columns:
        return {**_sorry_bench(row, where), "source": "SORRY-Bench"}
    if category is not None:
        return row
    if "prompt" in columns and str(row.get("type")) in XSTEST and "category" not in columns:
        return {**_xstest(row, where), "source": "XSTest"}
    named = re.search(r"or[-_ ]?bench", _called(where, subset or ""))
    if named and "prompt" in columns and str(row.get("category")) in OR_BENCH:
        return {**_or_bench(row, where, subset or ""), "source": "OR-Bench"}
    return row
