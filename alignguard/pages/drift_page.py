"""A DriftCheck report, or two compared, as one self-contained HTML page."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from alignguard.drift import CATEGORIES, MEASURES, OTHER_SHARES, DriftReport, shown_answer
from alignguard.files import write_text
from alignguard.pages import plots
from alignguard.tables import text_table

_STYLES = ("base", "plain")  # colours of the page, for the first report and the second


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _rows(reports: list[DriftReport]) -> list[dict[str, Any]]:
    titles = {name: title[0].upper() + title[1:] for name, (_, title) in MEASURES.items()}
    titles |= {name: title[0].upper() + title[1:] for name, title in OTHER_SHARES.items()}
    summaries = [report.summary() for report in reports]
    changes = reports[0].compare(reports[1]) if len(reports) == 2 else {}
    rows = []
    for name, title in titles.items():
        if not any(name in summary for summary in summaries):
            continue
        cells = []
        for summary in summaries:
            e = summary.get(name)
            interval = f"{100 * e.low:.1f}–{100 * e.high:.1f}, n = {e.n}" if e else ""
            cells.append({"value": f"{100 * e.value:.1f}" if e else "–", "interval": interval})
        row: dict[str, Any] = {"title": f"{title}, %", "cells": cells, "change": "", "pairs": "", "p": ""}
        if change := changes.get(name):
            ends = f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
            row["change"] = _minus(f"{100 * change.difference:+.1f} {ends}")
            row["pairs"] = f"{change.lost}, {change.gained}"
            row["p"] = f"{change.p_value:.2g}"
        rows.append(row)
    for name in ("margin_first", "margin_whole", "base_nll"):
        if any(name in summary for summary in summaries):
            told = {"margin_first": "first token", "margin_whole": "whole response"}.get(name)
            title = f"Margin of refusing, {told}, nats" if told else "Answer under the base, nats a token"
            found = [summary.get(name) for summary in summaries]
            cells = [{"value": _minus(f"{e.value:.3f}") if e else "–", "interval": ""} for e in found]
            rows.append({"title": title, "cells": cells})
    scalars = [("KL from base, nats a token", [report.kl for report in reports])]
    for key, title in (("accuracy", "Task accuracy, % of tokens"), ("loss", "Task loss, nats a token")):
        scalars.append((title, [report.task[key] if report.task else None for report in reports]))
    for title, values in scalars:
        if any(value is not None for value in values):
            cells = [{"value": f"{v:.3f}" if v is not None else "–", "interval": ""} for v in values]
            rows.append({"title": title, "cells": cells})
    return rows


def _figure(reports: list[DriftReport], labels: list[str]) -> Markup | None:
    result: dict[str, Any] = {}
    for style, report in zip(_STYLES, reports, strict=False):
        entry: dict[str, Any] = {}
        for name, e in report.summary().items():
            if name in MEASURES:
                entry |= {name: 100 * e.value, f"{name}_ci": [100 * e.low, 100 * e.high]}
        result[style] = entry
    shown = {"refusal": "unsafe\nrefused", "borderline": "borderline\nanswered", "compliance": "ordinary\nanswered"}
    shown |= {"capability": "capability\nright", "coherence": "coherent"}
    svg = plots.shares(result, list(shown.items()), dict(zip(_STYLES, labels, strict=False)))
    return Markup(svg) if svg else None


def _samples(reports: list[DriftReport], labels: list[str], most: int) -> list[dict[str, Any]]:
    by_id = [{row.id: row for row in report.rows} for report in reports]
    sections = []
    for category in CATEGORIES:
        rows = [row for row in reports[0].rows if row.category == category and all(row.id in known for known in by_id)]
        # a stable sort: changed verdicts first, otherwise the order of the prompts
        rows.sort(key=lambda row: len({known[row.id].verdict for known in by_id}) == 1)
        shown = [
            {
                "prompt": row.prompt,
                "answers": [
                    (
                        style,
                        label,
                        shown_answer(category, {"verdict": known[row.id].verdict, "text": known[row.id].text}),
                    )
                    for style, label, known in zip(_STYLES, labels, by_id, strict=False)
                ],
            }
            for row in rows[:most]
        ]
        if shown:
            sections.append({"category": category, "rows": shown})
    return sections


def render_drift(
    report: DriftReport,
    after: DriftReport | None = None,
    *,
    labels: tuple[str, str] = ("before", "after"),
    title: str = "DriftCheck",
    samples: int = 12,
) -> str:
    """The page as HTML text: no script, nothing loaded from elsewhere.

    Args:
        report: report of one model, or of the model before.
        after: of the model after, on the same prompts.
        labels: what the two are called.
        title: the heading.
        samples: answers shown in each category.

    Returns:
        A whole page.

    Raises:
        ValueError: the reports are of different prompts, or were asked after different system prompts.
    """
    reports = [report] if after is None else [report, after]
    called = list(labels[: len(reports)]) if after is not None else ["model"]
    settings = [
        (name if after is None else f"{label}: {name}", json.dumps(value) if not isinstance(value, str) else value)
        for label, each in zip(called, reports, strict=True)
        for name, value in each.settings.items()
    ]
    environment = Environment(
        loader=PackageLoader("alignguard.pages", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("drift.html.j2").render(
        title=title,
        two=after is not None,
        prompts=len(report.rows),
        judge=" and ".join(dict.fromkeys(str(each.settings.get("judge", "rules")) for each in reports)),
        models=list(zip(_STYLES, called, strict=False)),
        rows=_rows(reports),
        figure=_figure(reports, called),
        samples=_samples(reports, called, samples),
        settings=settings,
        date=datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def write_drift(path: str | Path, report: DriftReport, after: DriftReport | None = None, **options: Any) -> Path:
    """Write :func:`render_drift`'s page, whole or not at all; ``options`` go to it.

    Raises:
        ValueError: the reports are of different prompts, or were asked after different system prompts.
        OSError: the folder is missing or full.
    """
    write_text(path, render_drift(report, after, **options))
    return Path(path).expanduser()


def compare_text(before: DriftReport, after: DriftReport) -> str:
    """The paired comparison as plain text, one line a measure."""
    rows = []
    for name, change in before.compare(after).items():
        ends = f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
        counts = f"lost {change.lost}, gained {change.gained} of {change.n}"
        rows.append((MEASURES[name][1], f"{100 * change.difference:+.1f} %", ends, counts, f"p = {change.p_value:.2g}"))
    sides = {"measure": "left", "change": "right", "95 % interval": "left", "prompts": "left", "test": "left"}
    return text_table(sides, rows, header=False)


def side_by_side(reports: Mapping[str, DriftReport]) -> str:
    """Every share of any number of reports, a column each; behind a share its change from the first, and how sure that is.

    Args:
        reports: reports by name, all of the same prompts.

    Raises:
        ValueError: reports of different prompts, or asked after different system prompts.
    """
    first, *others = reports
    changes = {name: reports[first].compare(reports[name]) for name in others}
    summaries = {name: report.summary() for name, report in reports.items()}
    numbers = {name: f"{place}" for place, name in enumerate(reports, 1)}
    rows = []
    for measure, (_, title) in MEASURES.items():
        if measure not in summaries[first]:
            continue
        cells = [title, f"{100 * summaries[first][measure].value:.1f}"]
        for name in others:
            change = changes[name][measure]
            told = (
                f"{100 * summaries[name][measure].value:.1f} ({100 * change.difference:+.1f}, p = {change.p_value:.2g})"
            )
            cells.append(told)
        rows.append(cells)
    kl = [report.kl for report in reports.values()]
    if any(value is not None for value in kl):
        rows.append(["KL from base, nats a token", *("" if v is None else f"{v:.3f}" for v in kl)])
    named = "\n".join(f"{number}: {name}" for name, number in numbers.items())
    return f"{named}\n" + text_table({"%": "left", **dict.fromkeys(numbers.values(), "right")}, rows)
