"""Comparisons over seeds: the change of a number between two methods, and what a method keeps of what was lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from alignguard.drift import Estimate, check_confidence, finite_values, share_of

PATTERNS = 9_999  # most sign patterns that a test draws; where there are no more, all are tried


@dataclass(frozen=True)
class Shift:
    """The change of a number between two methods, paired by seed.

    Attributes:
        difference: mean of after minus before.
        low: lower end of Student's interval of that mean; −∞ for one pair.
        high: upper end of it.
        p_value: two-sided sign-flip test, exact up to 13 pairs; at least 2^(1−n), so few seeds cannot be significant.
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
    equally likely. Beyond 13 pairs 9,999 patterns are drawn. The interval is Student's (1908).

    Args:
        before: number under the first method, one a seed.
        after: number under the second method, for the same seeds in the same order.
        confidence: level of the interval, in (0, 1).
        seed: seed of the patterns drawn.

    Returns:
        Shift: the mean difference in the numbers' own unit, its interval, and the test.

    Raises:
        ValueError: no values, sequences of unequal length, or ``confidence`` outside (0, 1).
    """
    if len(before) != len(after):
        raise ValueError(f"before and after must be of the same seeds, found {len(before)} and {len(after)}")
    check_confidence(confidence)
    differences = finite_values(after, "after") - finite_values(before, "before")
    n, mean = differences.size, float(differences.mean())
    if n == 1:
        return Shift(mean, -math.inf, math.inf, 1.0, 1)
    test = stats.permutation_test(
        (differences,),
        lambda flipped, axis: np.abs(flipped.sum(axis=axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=PATTERNS,
        rng=np.random.default_rng(seed),
    )
    # Where all differences agree SciPy warns that a variance of 0 is not precise; the interval has no width.
    interval = (mean, mean)
    if np.ptp(differences) > 0:
        interval = stats.ttest_1samp(differences, 0.0).confidence_interval(confidence)
    return Shift(mean, float(interval[0]), float(interval[1]), float(test.pvalue), n)


def kept_share(
    base: Sequence[bool],
    pairs: Sequence[tuple[Sequence[bool], Sequence[bool]]],
    *,
    sources: Sequence[Any] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Share of what plain fine-tuning lost that a method keeps: (method − plain) / (base − plain), over seeds.

    The interval is the percentile bootstrap of that ratio, seeds and prompts both drawn with replacement, the same
    prompts for all models; draws in which plain fine-tuning lost nothing have no ratio and are left out. Prompts of one
    source are alike, so where sources are pooled these are drawn first, and then the prompts within each (Davison and
    Hinkley 1997, section 3.8). Over few sources such an interval is still too narrow. Where less than one prompt tells
    the method from plain fine-tuning, or from the base, a bootstrap has next to no width: there the interval reaches as
    far as Wilson's (1927) for none, or all, of the prompts that were lost.

    Args:
        base: what the model before fine-tuning did on each prompt (1: what is to be kept).
        pairs: for each seed the same of plain fine-tuning and of the method.
        sources: of each prompt, where several are pooled.

    Returns:
        the ratio of the means, 1 where all is kept; ``n`` counts prompts.

    Raises:
        ValueError: no seed, sequences of unequal length, or plain fine-tuning lost nothing.
    """
    check_confidence(confidence)
    first = finite_values(base, "base")
    if not pairs:
        raise ValueError("pairs must hold at least one seed")
    plain, method = (np.stack([finite_values(pair[i], "pairs") for pair in pairs]) for i in (0, 1))
    if plain.shape != method.shape or plain.shape[1] != first.size:
        raise ValueError(
            f"base and pairs must hold the same prompts, found {first.size}, {plain.shape} and {method.shape}"
        )
    lost = first.mean() - plain.mean()
    if lost <= 0:
        raise ValueError("plain fine-tuning lost nothing, so there is no share of it to keep")
    if sources is not None and len(sources) != first.size:
        raise ValueError(f"sources must name one for each of {first.size} prompts, found {len(sources)}")
    places: dict[Any, list[int]] = {}
    for place, source in enumerate(sources or [None] * first.size):
        places.setdefault(source, []).append(place)
    groups = [np.array(found) for found in places.values()]
    generator = np.random.default_rng(seed)
    # How often each source, prompt and seed is drawn: a source drawn twice has its prompts drawn twice as often.
    drawn = generator.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), resamples)
    prompts = np.empty((resamples, first.size))
    for group, times in zip(groups, drawn.T, strict=True):
        prompts[:, group] = generator.multinomial(times * group.size, np.full(group.size, 1 / group.size))
    seeds = generator.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), resamples) / len(pairs)
    start, end, held = prompts @ first, (prompts * (seeds @ plain)).sum(1), (prompts * (seeds @ method)).sum(1)
    lost_some = start > end
    ratios = (held - end)[lost_some] / (start - end)[lost_some]
    tail = 100 * (1 - confidence) / 2
    ratio, (low, high) = (method.mean() - plain.mean()) / lost, np.percentile(ratios, [tail, 100 - tail])
    prompts_lost = max(1, round(lost * first.size))
    if abs(ratio) * prompts_lost < 1:
        high = max(high, share_of([False] * prompts_lost, confidence=confidence).high)
    if abs(1 - ratio) * prompts_lost < 1:
        low = min(low, share_of([True] * prompts_lost, confidence=confidence).low)
    return Estimate(float(ratio), float(low), float(high), int(first.size))


def percents(share: Estimate) -> str:
    """A share and its interval in percent, as tables have them: ``"81 (44 to 104)"``; no zero has a minus."""
    value, low, high = (round(100 * number) for number in (share.value, share.low, share.high))
    return f"{value} ({low} to {high})"
