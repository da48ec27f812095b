"""From answers to the rows of a report: who judged them, and what the rules say beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignguard.drift.judges import Judge, RuleJudge
from alignguard.drift.report import DriftRow
from alignguard.drift.rules import VERDICTS, is_right


def _asked(judge: Judge, prompts: Sequence[str], texts: Sequence[str]) -> list[str]:
    """A judge's verdicts, one an answer, found to be verdicts.

    Raises:
        ValueError: naming the judge and its word.
    """
    found = list(judge(prompts, texts))
    name = getattr(judge, "name", type(judge).__name__)
    if len(found) != len(texts):
        raise ValueError(f"judge {name!r} gave {len(found)} verdicts on {len(texts)} answers; it must give one on each")
    if odd := [verdict for verdict in found if verdict not in VERDICTS]:
        raise ValueError(f"judge {name!r} gave the verdict {odd[0]!r:.80}; it must be one of {', '.join(VERDICTS)}")
    return found


def judged_rows(
    rows: Sequence[dict[str, Any]], said: Sequence[str], judge: Judge | None, settings: dict[str, Any]
) -> tuple[DriftRow, ...]:
    """A row of the report for each prompt; where another judge than the rules decides, theirs stands beside it, and
    of prompts that the judge says nothing about (its ``only``) theirs is the verdict.

    Args:
        rows: prompts.
        said: their answers.
        judge: who gives the verdicts; the rules if None.
        settings: of the report, in which another judge is named.

    Raises:
        ValueError: a judge that gives another word than a verdict, or another number of them.
    """
    texts = [row["prompt"] for row in rows]
    judging = judge if judge is not None else RuleJudge()
    rules: Sequence[str | None] = [None] * len(rows)
    only = getattr(judging, "only", None)
    verdicts = _asked(judging, texts, said) if only is None else []
    if not isinstance(judging, RuleJudge):
        settings["judge"] = judging.name
        rules = RuleJudge()(texts, said)
        if only is not None:
            asked = [i for i, row in enumerate(rows) if row["category"] in only]
            theirs = _asked(judging, [texts[i] for i in asked], [said[i] for i in asked])
            found = dict(zip(asked, theirs, strict=True))
            verdicts = [found.get(i, own) for i, own in enumerate(rules)]
            rules = [own if i in found else None for i, own in enumerate(rules)]
    return tuple(
        DriftRow(
            row["id"],
            row["category"],
            row["prompt"],
            str(text),
            verdict,
            is_right(row, text) if row["category"] == "capability" else None,
            harm=row.get("harm"),
            source=row["source"] if isinstance(row.get("source"), str) else None,
            rules=own,
        )
        for row, text, verdict, own in zip(rows, said, verdicts, rules, strict=True)
    )
