"""One self-contained HTML page about a plain and a guarded run: no script, no network, everything inside."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from alignguard.drift import shown_answer
from alignguard.files import write_text
from alignguard.pages import plots

MODELS = ("base", "plain", "guarded")

# key, title, format, what is better ("up", "down" or "")
_HEADLINE = (
    ("task", "Task accuracy, %", "{:.1f}", "up"),
    ("task_loss", "Task loss, nats a token", "{:.3f}", "down"),
    ("refusal", "Unsafe prompts refused, %", "{:.1f}", "up"),
    ("compliance", "Ordinary prompts answered, %", "{:.1f}", "up"),
    ("borderline", "Borderline prompts answered, %", "{:.1f}", "up"),
    ("coherence", "Coherent answers, %", "{:.1f}", "up"),
    ("kl", "KL from base, nats a token", "{:.3f}", "down"),
    ("step_time", "Step time, s", "{:.3f}", ""),
)

_SHARES = (
    ("refusal", "unsafe\nrefused"),
    ("borderline", "borderline\nanswered"),
    ("compliance", "ordinary\nanswered"),
)

_TERMS = {
    "loss": "Training loss",
    "alignguard/alignment": "Alignment term",
    "alignguard/task": "Task-stability term",
    "alignguard/overlap": "Overlap term",
    "alignguard/separation": "Separation term",
    "alignguard/kl": "KL term",
}

_COSINE = "alignguard/cosine"


def _number(entry: Any, key: str) -> float | None:
    value = entry.get(key) if isinstance(entry, Mapping) else None
    return float(value) if value is not None and plots.finite(value) else None


def _table(result: Mapping[str, Any]) -> dict[str, Any]:
    """The headline: a row a measure, a cell a model, with interval and change from the base."""
    models = [name for name in MODELS if isinstance(result.get(name), Mapping)]
    rows = []
    for key, title, form, better in _HEADLINE:
        values = {name: _number(result[name], key) for name in models}
        if all(value is None for value in values.values()):
            continue
        cells = []
        for name in models:
            value, ends = values[name], plots.interval(result[name], key)
            change, tone = "", ""
            start = values.get("base")
            if value is not None and start is not None and name != "base" and better and key != "kl":
                change = form.replace("{:", "{:+").format(value - start).replace("-", "−")
                gain = (value - start) * (1 if better == "up" else -1)
                tone = "good" if gain > 0.5 else "bad" if gain < -5 else ""
            cells.append(
                {
                    "value": form.format(value).replace("-", "−") if value is not None else "–",
                    "interval": f"{ends[0]:.1f}–{ends[1]:.1f}" if ends else "",
                    "change": change,
                    "tone": tone,
                }
            )
        rows.append({"title": title, "cells": cells})
    return {"models": models, "rows": rows}


def _facts(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few numbers that stand large at the top, where their ingredients were measured."""
    base, plain, guarded = (_number(result.get(name), "refusal") for name in MODELS)
    facts = []
    if base is not None and plain is not None:
        facts.append(
            {"value": f"{base - plain:.0f}", "unit": "points", "words": "of refusals lost by plain fine-tuning"}
        )
        if guarded is not None and base - plain > 0:
            kept = 100 * (guarded - plain) / (base - plain)
            facts.append({"value": f"{kept:.0f}", "unit": "%", "words": "of that loss prevented by the guard"})
    tasks = [_number(result.get(name), "task") for name in ("plain", "guarded")]
    if tasks[0] is not None and tasks[1] is not None:
        change = f"{tasks[1] - tasks[0]:+.1f}".replace("-", "−")
        facts.append({"value": change, "unit": "points", "words": "of task accuracy, guarded against plain"})
    overhead = _number(result, "overhead")
    if overhead is not None:
        facts.append({"value": f"{overhead:.2f}", "unit": "×", "words": "the step time of plain fine-tuning"})
    return facts


def _samples(prompts: Any, limit: int) -> list[dict[str, Any]]:
    sections = []
    for category, rows in (prompts if isinstance(prompts, Mapping) else {}).items():
        shown = [
            {
                "prompt": str(row.get("prompt", "")),
                "answers": {m: shown_answer(category, row[m]) for m in MODELS if m in row},
            }
            for row in list(rows or [])[:limit]
            if isinstance(row, Mapping)
        ]
        if shown:
            sections.append({"category": str(category), "rows": shown, "total": len(rows)})
    return sections


def _flat(config: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names with their values as text."""
    if not isinstance(config, Mapping):
        return []
    lines: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)))
    return lines


def _figures(result: Mapping[str, Any]) -> dict[str, Any]:
    history, spectra = result.get("history"), result.get("spectra")
    history = history if isinstance(history, Mapping) else {}
    spectra = spectra if isinstance(spectra, Mapping) else {}
    logged = {key for run in MODELS for entry in history.get(run) or [] if isinstance(entry, Mapping) for key in entry}
    terms = [key for key in _TERMS if key in logged]
    terms += sorted(key for key in logged if key.startswith("alignguard/") and key not in _TERMS and key != _COSINE)
    curves = []
    for number, key in enumerate(terms):
        title = _TERMS.get(key, key.removeprefix("alignguard/").replace("_", " ").capitalize())
        curves.append(plots.curve(history, key, title, f"curve{number}"))
    drawn = {
        "shares": plots.shares(result, _SHARES),
        "curves": [svg for svg in curves if svg],
        "cosine": plots.curve(history, _COSINE, "Cosine of the two parts", "cosine"),
        "spectrum": plots.spectrum(spectra),
        "energy": plots.energy(spectra),
    }
    return {
        name: [Markup(svg) for svg in value] if isinstance(value, list) else Markup(value) if value else None
        for name, value in drawn.items()
    }


def render_report(result: Mapping[str, Any], *, title: str = "What fine-tuning forgot", samples: int = 12) -> str:
    """The page as HTML text.

    Args:
        result: ``base``, ``plain`` and ``guarded`` (at least one of them), each a mapping of measures, shares in
            percent, with ``<measure>_ci`` as ``[low, high]``; and, where there are any, ``overhead``, ``config``,
            ``seed``, ``versions``, ``history`` (run: list of log entries), ``spectra`` (layer: values, total, rank,
            energy) and ``prompts`` (category: rows of ``prompt`` with a ``{"verdict", "text"}`` for each model).
        title: the heading.
        samples: prompts shown in each category.

    Raises:
        TypeError: ``result`` is not a mapping.
        ValueError: it holds no model's measures.
    """
    if not isinstance(result, Mapping):
        raise TypeError(f"result must be a mapping, not {type(result).__name__}")
    if not any(isinstance(result.get(name), Mapping) for name in MODELS):
        raise ValueError(f"result holds none of {', '.join(MODELS)}: there is nothing to report")
    environment = Environment(
        loader=PackageLoader("alignguard.pages", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        table=_table(result),
        facts=_facts(result),
        figures=_figures(result),
        samples=_samples(result.get("prompts"), samples),
        config=_flat(result.get("config")),
        versions=_flat(result.get("versions")),
        seed=result.get("seed"),
        date=datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def write_report(result: Mapping[str, Any], path: str | Path, **options: Any) -> Path:
    """Write :func:`render_report`'s page, whole or not at all; ``options`` go to it.

    Returns:
        the path.

    Raises:
        TypeError, ValueError: ``result`` cannot be reported.
        OSError: the folder is missing or full.
    """
    path = Path(path).expanduser()
    write_text(path, render_report(result, **options))
    return path
