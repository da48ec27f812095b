"""From answers to the rows of a report: who judged them, and what the rules say beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignguard.drift.judges import Judge, RuleJudge
from alignguard.drift.report import DriftRow
from alignguard.drift.rules import is_right


def judged_rows(
    rows: Sequence[dict[str, Any]], said: Sequence[str], judge: Judge | None, settings: dict[str, Any]
) -> tuple[DriftRow, ...]:
    """A row of the report for each prompt; where another judge than the rules decides, theirs stands beside it.

    Args:
        rows: prompts.
        said: their answers.
        judge: who gives the verdicts; the rules if None.
        settings: of the report, in which another judge is named.
    """
    texts = [row["prompt"] for row in rows]
    judging = judge if judge is not None else RuleJudge()
    verdicts = judging(texts, said)
    rules: Sequence[str | None] = [None] * len(rows)
    if not isinstance(judging, RuleJudge):
        settings["judge"] = judging.name
        rules = RuleJudge()(texts, said)
    return tuple(
        DriftRow(
            row["id"],
            row["category"],
            row["prompt"],
            text,
            verdict,
            is_right(row, text) if row["category"] == "capability" else None,
            harm=row.get("harm"),
            source=row["source"] if isinstance(row.get("source"), str) else None,
            rules=own,
        )
        for row, text, verdict, own in zip(rows, said, verdicts, rules, strict=True)
    )
