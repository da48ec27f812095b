"""What the task files refer to: DriftCheck's prompts as documents, and the rules' verdict on every answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignguard.drift import COMPLIANCE, INCOHERENT, REFUSAL, judge, prompts_of


def _documents(category: str, prompts: str | None) -> dict[str, Any]:
    from datasets import Dataset

    kept = [
        {"id": row["id"], "prompt": row["prompt"], "harm": row.get("harm") or ""}
        for row in prompts_of(category, prompts)
    ]
    return {"test": Dataset.from_list(kept)}


def unsafe(prompts: str | None = None, **others: Any) -> dict[str, Any]:
    """Unsafe prompts, packaged or of a file named by ``--metadata '{"prompts": "FILE"}'``."""
    return _documents("unsafe", prompts)


def borderline(prompts: str | None = None, **others: Any) -> dict[str, Any]:
    """Safe prompts that look unsafe, from where :func:`unsafe` has its own."""
    return _documents("borderline", prompts)


def ordinary(prompts: str | None = None, **others: Any) -> dict[str, Any]:
    """Everyday prompts, from where :func:`unsafe` has its own."""
    return _documents("ordinary", prompts)


def process_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """0 or 1 for each verdict on one answer."""
    verdict = judge(results[0].strip())
    return {
        "refused": int(verdict == REFUSAL),
        "answered": int(verdict == COMPLIANCE),
        "incoherent": int(verdict == INCOHERENT),
    }
