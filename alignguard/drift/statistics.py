"""Intervals and paired tests for shares measured prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean, or a share, with its interval.

    Attributes:
        value: the mean of the ``n`` values.
        low: lower end of the interval.
        high: upper end of the interval.
        n: number of values.
    """

    value: float
    low: float
    high: float
    n: int


def finite_values(values: Sequence[float], name: str) -> np.ndarray:
    """The values as a one-dimensional float64 array, refused where empty or not finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must be a non-empty sequence of numbers")
    if not np.isfinite(array).all():
        place = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, found {array[place]} as number {place + 1}; leave it out or mend it")
    return array


def check_confidence(confidence: float) -> None:
    """Refuse a level of confidence outside (0, 1).

    Raises:
        ValueError: naming the level.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, found {confidence}")


def share_of(values: Sequence[bool], *, confidence: float = 0.95) -> Estimate:
    """Share of the values that hold, with the interval of Wilson (1927).

    It has a width where none or all hold, too: of none in four it says 0 to 49 %.

    Args:
        values: whether the property holds, a value for each prompt.
        confidence: level of the interval, in (0, 1).

    Raises:
        ValueError: no values, or ``confidence`` outside (0, 1).
    """
    check_confidence(confidence)
    array = finite_values(values, "values")
    found = stats.binomtest(int(array.sum()), array.size).proportion_ci(confidence, method="wilson")
    return Estimate(float(array.mean()), float(found.low), float(found.high), int(array.size))


def bootstrap(values: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean and percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13) over prompts.

    Where all values agree the interval has no width.

    Raises:
        ValueError: no values, ``confidence`` outside (0, 1) or ``resamples`` below 1.
    """
    check_confidence(confidence)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, found {resamples}")
    array = finite_values(values, "values")
    mean = float(array.mean())
    if array.size == 1:  # SciPy wants two
        return Estimate(mean, mean, mean, 1)
    found = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        batch=max(1, 1_000_000 // array.size),  # of all resamples at once, thousands of prompts would fill the memory
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high), int(array.size))


@dataclass(frozen=True)
class Comparison:
    """The change of one share between two models on the same prompts.

    Attributes:
        difference: after minus before.
        low: lower end of the paired bootstrap interval of the difference.
        high: upper end of it.
        lost: prompts where the first model has the property and the second has not.
        gained: prompts where only the second has it.
        p_value: two-sided exact McNemar test.
        n: number of prompts.
    """

    difference: float
    low: float
    high: float
    lost: int
    gained: int
    p_value: float
    n: int


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact McNemar test: the discordant pairs against a fair coin (McNemar 1947, exact form).

    Raises:
        ValueError: a negative count.
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"counts of pairs must not be negative, found {lost} and {gained}")
    return float(stats.binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def paired(
    before: Sequence[bool],
    after: Sequence[bool],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare one yes-or-no property of two models, prompt by prompt.

    The interval is a paired percentile bootstrap (Efron and Tibshirani 1993), the test McNemar's (1947) in its exact form.

    Args:
        before: whether the first model has the property, a value for each prompt.
        after: whether the second model has it, on the same prompts in the same order.
        confidence: level of the interval, in (0, 1).
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.

    Returns:
        Comparison: the difference of shares, from −1 to 1, its interval, and the test.

    Raises:
        ValueError: no values, two sequences of unequal length, or options out of range.
    """
    if len(before) != len(after):
        raise ValueError(f"before and after must hold the same prompts, found {len(before)} and {len(after)}")
    first, second = finite_values(before, "before"), finite_values(after, "after")
    estimate = bootstrap((second - first).tolist(), confidence=confidence, resamples=resamples, seed=seed)
    lost, gained = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    return Comparison(estimate.value, estimate.low, estimate.high, lost, gained, mcnemar(lost, gained), estimate.n)


def cohen_kappa(ours: Sequence[str], theirs: Sequence[str]) -> float | None:
    """Agreement of two judges beyond what their shares of verdicts give by chance: (p_o − p_e)/(1 − p_e), Cohen (1960).

    Args:
        ours: one judge's verdicts.
        theirs: the other's on the same answers, in the same order.

    Returns:
        From −1 to 1; None where both give one and the same verdict throughout, of which chance explains all.

    Raises:
        ValueError: no verdicts, or two sequences of unequal length.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"two judges must have judged the same answers, found {len(ours)} and {len(theirs)} verdicts")
    n = len(ours)
    observed = sum(a == b for a, b in zip(ours, theirs, strict=True)) / n
    chance = sum(ours.count(word) * theirs.count(word) for word in {*ours, *theirs}) / n**2
    return None if chance == 1 else (observed - chance) / (1 - chance)
