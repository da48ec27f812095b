"""What a study runs: terms of the guard added one by one, knobs turned one at a time, rivals and their sweeps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from alignguard.guard import METRICS, GuardConfig
from studies.jobs import GUARD, make_job
from studies.rivals import RIVALS, sweep

NEVER = 1_000_000  # steps between refreshes that no run reaches

# knob: (values, what else must be set for the knob to matter)
KNOBS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "max_rank": ((4, 16, 32, 64, 128), {"energy": 1.0}),  # with all energy allowed, m is what max_rank says
    "energy": ((0.5, 0.8, 0.95, 1.0), {}),
    "lambda_alignment": ((0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), {}),
    "lambda_task": ((0.0, 1e-3, 1e-2, 5e-2), {}),
    "alpha": ((0.0, 0.25, 0.5, 0.75, 1.0), {"lambda_collision": 0.01}),
    "beta": ((0.0, 1.0, 4.0, 10.0), {"lambda_collision": 0.01}),
    "tau": ((0.001, 0.01, 0.1), {"lambda_collision": 0.01}),
    "structure": (("kfac", "kfac-sketch", "gram", "sketch"), {}),  # both sides twice, and the output side twice
    "kind": (("empirical", "mc", "margin"), {}),
    "refresh_every": ((10, 25, 50, 100, NEVER), {}),
    "refresh_examples": ((4, 16, 32, 64, 256), {}),
}

# what a tuning sweep tries of each: 12 settings, as of every rival
SWEEPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "guard": {"lambda_alignment": (0.03, 0.1, 0.3, 1.0), "refresh_every": (25, 50, 100)},
    "kl": {"lambda_kl": (0.3, 1.0, 3.0, 10.0), "kl_every": (1, 4, 8)},
    "guard and kl": {
        "lambda_alignment": (0.03, 0.1, 0.3),
        "lambda_kl": (0.1, 0.3),
        "kl_every": (4, 8),
        "refresh_every": (100,),
    },
    "plain": {"learning_rate": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), "max_steps": (100, 200)},
}

# what the guard's own sweeps vary strengths of: both factors exact, twice the examples of the default
EXACT = {"structure": "kfac", "refresh_examples": 16}

GUARDS = ("guard", "kl", "guard and kl")  # curvature, KL to the base, and both: GuardConfig's own settings

ANCHOR = {"lambda_alignment": 0.0, "lambda_task": 0.0, "lambda_collision": 0.0}  # KL to the base alone


def terms_plan(
    base: Mapping[str, Any], seeds: Sequence[int], stability: float = 0.01, collision: float = 0.01
) -> list[dict[str, Any]]:
    """The paper's terms added one by one, and the Fisher term and each collision term taken away alone.

    A term keeps its weight from row to row: with α between 0 and 1 the collision strength is divided between the two
    terms, so where one stands alone the strength is that term's share.

    Args:
        base: GuardConfig fields that all rows share (structure, λ_A, schedule).
        seeds: one run each.
        stability: λ_T once it is added.
        collision: weight of each collision term once it is added.
    """
    plain = {**base, "lambda_task": 0.0, "lambda_collision": 0.0}
    stable = {**plain, "lambda_task": stability}
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("task alone", "plain", {}),
        ("+ Fisher", GUARD, plain),
        ("+ stability", GUARD, stable),
        ("+ overlap", GUARD, {**stable, "lambda_collision": collision, "alpha": 1.0}),
    ]
    for metric in METRICS:
        both = {"lambda_collision": 2 * collision, "alpha": 0.5, "metric": metric}
        rows.append((f"+ separation ({metric})", GUARD, {**stable, **both}))
    for metric in METRICS:
        alone = {"lambda_collision": collision, "alpha": 0.0, "metric": metric}
        rows.append((f"− overlap ({metric})", GUARD, {**stable, **alone}))
    every = {"lambda_collision": 2 * collision, "alpha": 0.5, "metric": METRICS[0]}
    rows.append((f"− Fisher ({METRICS[0]})", GUARD, {**stable, **every, "lambda_alignment": 0.0}))
    return [make_job(name, method, settings, seed, "terms") for name, method, settings in rows for seed in seeds]


def knob_jobs(knob: str, values: Sequence[Any], base: Mapping[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One knob turned, all else as in ``base``.

    Raises:
        ValueError: a name that is no GuardConfig field, or a value out of its range.
    """
    needed = {k: v for k, v in KNOBS.get(knob, ((), {}))[1].items() if not base.get(k)}
    return [
        make_job(f"{knob} = {label(knob, value)}", GUARD, {**base, **needed, knob: value}, seed, knob)
        for value in values
        for seed in seeds
    ]


def label(knob: str, value: Any) -> str:
    """A value as tables show it."""
    if knob == "refresh_every" and isinstance(value, int) and value >= NEVER:
        return "never"
    return f"{value:g}" if isinstance(value, float) else str(value)


def knobs_plan(base: Mapping[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every knob of :data:`KNOBS` that this version's GuardConfig has."""
    known = {field.name for field in dataclasses.fields(GuardConfig)}
    jobs = [job for knob, (values, _) in KNOBS.items() if knob in known for job in knob_jobs(knob, values, base, seeds)]
    return jobs


def rivals_plan(
    base: Mapping[str, Any],
    seeds: Sequence[int],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    whole_grid: bool = False,
    unaligned: str | None = None,
) -> list[dict[str, Any]]:
    """The guard, KL to the base, both together, and every rival.

    Args:
        base: GuardConfig fields of the guard.
        seeds: one run each.
        settings: of single methods, by name; the rest take their defaults.
        whole_grid: every setting of each method's sweep instead, 12 of each, and plain LoRA as the bench has it.
        unaligned: the model before alignment training; without it the rivals that need it are left out.
    """
    jobs = [make_job("plain", "plain", {}, seed, "sweep") for seed in seeds] if whole_grid else []
    for name in (*GUARDS, *RIVALS):
        before = {"unaligned": unaligned} if name in RIVALS and RIVALS[name].needs_unaligned else {}
        if before and unaligned is None:
            continue
        guarded = {**EXACT, **base} if whole_grid else base
        own_of = {"guard": guarded, "guard and kl": guarded, "kl": ANCHOR}
        usual = {
            "kl": {"lambda_kl": 1.0},
            "guard and kl": {"lambda_alignment": 0.3, "lambda_kl": 0.3, "kl_every": 4, "refresh_every": 100},
        }
        fixed, chosen = {**own_of.get(name, {}), **before}, dict((settings or {}).get(name, usual.get(name, {})))
        for entry in settings_of(name) if whole_grid else [chosen]:
            shown = ", ".join(f"{k}={label(k, v)}" for k, v in entry.items())
            title, group = (f"{name} ({shown})", "sweep") if whole_grid else (name, "rivals")
            method, training = (GUARD, {}) if name in GUARDS else (name, entry if name == "plain" else {})
            own = {**fixed, **({} if name == "plain" else entry)}
            jobs += [make_job(title, method, own, seed, group, training) for seed in seeds]
    return jobs


def settings_of(name: str) -> list[dict[str, Any]]:
    """What a tuning sweep tries of a method; for plain LoRA fields of ``TrainingArguments``, otherwise its own."""
    if name not in SWEEPS:
        return sweep(name)
    grid = SWEEPS[name]
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
