"""Intervals and paired tests for shares measured prompt by prompt."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap interval.

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


def _values(values: Sequence[float], name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must be a non-empty sequence of numbers")
    return array


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, found {resamples}")
    generator = np.random.default_rng(seed)
    # One resample at a time: a matrix of all of them would be large for thousands of prompts.
    return np.array([values[generator.integers(0, values.size, values.size)].mean() for _ in range(resamples)])


def bootstrap(values: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean and percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13) over prompts.

    Where all values agree the interval has no width; read the exact binomial bound from ``n`` there.

    Raises:
        ValueError: no values, ``confidence`` outside (0, 1) or ``resamples`` below 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, found {confidence}")
    array = _values(values, "values")
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(_resampled_means(array, resamples, seed), [tail, 100 - tail])
    return Estimate(float(array.mean()), float(low), float(high), int(array.size))


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
    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


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
        after: the same of the second model, on the same prompts in the same order.
        confidence: of the interval, in (0, 1).
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        Comparison: the difference of shares, from −1 to 1, its interval, and the test.

    Raises:
        ValueError: no values, two sequences of unequal length, or options out of range.
    """
    if len(before) != len(after):
        raise ValueError(f"before and after must hold the same prompts, found {len(before)} and {len(after)}")
    first, second = _values(before, "before"), _values(after, "after")
    estimate = bootstrap((second - first).tolist(), confidence=confidence, resamples=resamples, seed=seed)
    lost, gained = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    return Comparison(estimate.value, estimate.low, estimate.high, lost, gained, mcnemar(lost, gained), estimate.n)


@dataclass(frozen=True)
class Shift:
    """The change of a number between two methods, paired by seed.

    Attributes:
        difference: mean of after minus before.
        low: lower end of Student's interval of that mean; −∞ for one pair.
        high: upper end of it.
        p_value: two-sided sign-flip test, exact up to 12 pairs; at least 2^(1−n), so few seeds cannot be significant.
        n: pairs.
    """

    difference: float
    low: float
    high: float
    p_value: float
    n: int


def shift(before: Sequence[float], after: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Shift:
    """Compare one number of two methods over the same seeds.

    The test flips the sign of each difference at random (Fisher 1935): under no effect all 2^n sign patterns are
    equally likely. Beyond 12 pairs 10,000 patterns are drawn. The interval is Student's (1908).

    Args:
        before: the number under the first method, one a seed.
        after: the same under the second, for the same seeds in the same order.
        confidence: of the interval, in (0, 1).
        seed: of the patterns drawn.

    Returns:
        Shift: the mean difference in the numbers' own unit, its interval, and the test.

    Raises:
        ValueError: no values, sequences of unequal length, or ``confidence`` outside (0, 1).
    """
    if len(before) != len(after):
        raise ValueError(f"before and after must be of the same seeds, found {len(before)} and {len(after)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, found {confidence}")
    differences = _values(after, "after") - _values(before, "before")
    n, mean = differences.size, float(differences.mean())
    if n <= 12:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
        p = float((np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean())
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), (10_000, n))
        p = float((1 + (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).sum()) / 10_001)
    if n == 1:
        return Shift(mean, -math.inf, math.inf, p, 1)
    half = float(student.ppf(0.5 + confidence / 2, n - 1) * differences.std(ddof=1) / math.sqrt(n))
    return Shift(mean, mean - half, mean + half, p, n)


def kept_share(
    base: Sequence[bool],
    pairs: Sequence[tuple[Sequence[bool], Sequence[bool]]],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Share of what plain fine-tuning lost that a method keeps: (method − plain) / (base − plain), over seeds.

    The interval is the percentile bootstrap of that ratio, seeds and prompts both drawn with replacement, the same
    prompts for all models; draws in which plain fine-tuning lost nothing have no ratio and are left out.

    Args:
        base: what the model before fine-tuning did on each prompt (1: what is to be kept).
        pairs: for each seed the same of plain fine-tuning and of the method.

    Returns:
        the ratio of the means, 1 where all is kept; ``n`` counts prompts.

    Raises:
        ValueError: no seed, sequences of unequal length, or plain fine-tuning lost nothing.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, found {confidence}")
    first = _values(base, "base")
    if not pairs:
        raise ValueError("pairs must hold at least one seed")
    plain, method = (np.stack([_values(pair[i], "pairs") for pair in pairs]) for i in (0, 1))
    if plain.shape != method.shape or plain.shape[1] != first.size:
        raise ValueError(
            f"base and pairs must hold the same prompts, found {first.size}, {plain.shape} and {method.shape}"
        )
    lost = first.mean() - plain.mean()
    if lost <= 0:
        raise ValueError("plain fine-tuning lost nothing, so there is no share of it to keep")
    generator, ratios = np.random.default_rng(seed), []
    for _ in range(resamples):
        prompts, seeds = generator.integers(0, first.size, first.size), generator.integers(0, len(pairs), len(pairs))
        start, low, high = first[prompts].mean(), plain[seeds][:, prompts].mean(), method[seeds][:, prompts].mean()
        if start > low:
            ratios.append((high - low) / (start - low))
    tail = 100 * (1 - confidence) / 2
    ends = np.percentile(ratios, [tail, 100 - tail])
    return Estimate(float((method.mean() - plain.mean()) / lost), float(ends[0]), float(ends[1]), int(first.size))
