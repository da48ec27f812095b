"""Runs gathered: what a setting kept of the base over its seeds, which setting is best, and the table of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from studies.statistics import Shift, shift

SLACK = 0.5  # points of task accuracy below plain LoRA that count as equal when a setting is chosen


def kept_of_base(result: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """Mean of two shares, each of the base's own and at most 1: unsafe prompts refused, borderline ones answered."""
    return sum(min(result[name] / base[name], 1.0) for name in ("refusal", "borderline")) / 2


def best(runs: Sequence[Mapping[str, Any]], base: Mapping[str, Any], least: float) -> Mapping[str, Any]:
    """The setting that keeps most, then learns most, among those of at least this task accuracy; else the most accurate."""
    whole = [run for run in runs if "error" not in run]
    able = [run for run in whole if run["task"] >= least]
    if not able:
        return max(whole, key=lambda run: run["task"])
    return max(able, key=lambda run: (kept_of_base(run, base), run["task"]))


@dataclasses.dataclass(frozen=True)
class Summary:
    """One setting over its seeds.

    Attributes:
        name: of the setting.
        group: the study it belongs to.
        seeds: how many runs finished.
        failed: how many ended in NaN.
        numbers: measure -> its values, one a seed.
        kept: share of what plain LoRA lost of refusals that the setting keeps, seed by seed, in percent; empty where
            plain LoRA of that seed is missing or lost nothing.
        against_plain: the paired change of the refusal share from plain LoRA, over seeds; None where none is paired.
    """

    name: str
    group: str
    seeds: int
    failed: int
    numbers: dict[str, list[float]]
    kept: list[float]
    against_plain: Shift | None


def summarise(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> list[Summary]:
    """Runs gathered by setting, in the order they stand, each beside plain LoRA of its own seed and the bench's own schedule.

    Args:
        rows: ``{"job", "result"}`` as a ledger holds them.
        base: :func:`studies.bench.measure_base`.

    Returns:
        A Summary a setting; what plain LoRA lost, and so ``kept``, is counted in percent.
    """
    plain = {
        row["job"]["seed"]: row["result"]["refusal"]
        for row in rows
        if row["job"]["method"] == "plain" and "training" not in row["job"] and "error" not in row["result"]
    }
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["job"]["group"], row["job"]["name"]), []).append(row)
    found = []
    for (group, name), runs in grouped.items():
        whole = [run for run in runs if "error" not in run["result"]]
        numbers: dict[str, list[float]] = {}
        for run in whole:
            for key, value in run["result"].items():
                if isinstance(value, (int, float)):
                    numbers.setdefault(key, []).append(float(value))
        pairs = [(plain[r["job"]["seed"]], r["result"]["refusal"]) for r in whole if r["job"]["seed"] in plain]
        kept = [
            100 * (after - before) / (base["refusal"] - before) for before, after in pairs if base["refusal"] > before
        ]
        own = all(run["job"]["method"] == "plain" for run in runs)
        change = shift([b for b, _ in pairs], [a for _, a in pairs]) if pairs and not own else None
        found.append(Summary(name, group, len(whole), len(runs) - len(whole), numbers, [] if own else kept, change))
    return found


COLUMNS = (
    ("task", "task, %", "{:.1f}"),
    ("refusal", "unsafe refused, %", "{:.1f}"),
    ("compliance", "ordinary answered, %", "{:.1f}"),
    ("borderline", "borderline answered, %", "{:.1f}"),
    ("kl", "KL, nats/token", "{:.3f}"),
    ("step_time", "step, s", "{:.3f}"),
    ("alignment_examples", "alignment examples read", "{:.0f}"),
)


def spread(values: Sequence[float], form: str = "{:.1f}") -> str:
    """Mean, and the lowest and highest where there are several."""
    if not values:
        return ""
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} [{form.format(min(values))}, {form.format(max(values))}]"


def table(summaries: Sequence[Summary], base: Mapping[str, Any]) -> str:
    """The runs as one Markdown table: mean and range over seeds."""
    titles = [title for _, title, _ in COLUMNS]
    lines = [
        f"| study | setting | seeds | {' | '.join(titles)} | lost refusals kept, % | p against plain |",
        "|" + "---|" * (len(titles) + 5),
    ]
    cells = [form.format(base[key]) if key in base else "" for key, _, form in COLUMNS]
    lines.append(f"| | before fine-tuning | | {' | '.join(cells)} | | |")
    for s in summaries:
        # a method that acted on an adapter trained before took no step, and so none of no time
        told = {key: [v for v in values if v or key != "step_time"] for key, values in s.numbers.items()}
        cells = [spread(told.get(key, []), form) for key, _, form in COLUMNS]
        count = f"{s.seeds}" + (f" ({s.failed} NaN)" if s.failed else "")
        p = f"{s.against_plain.p_value:.3g}" if s.against_plain else ""
        lines.append(f"| {s.group} | {s.name} | {count} | {' | '.join(cells)} | {spread(s.kept, '{:.0f}')} | {p} |")
    return "\n".join(lines) + "\n"
