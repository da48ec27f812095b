import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.statistics import kept_share, shift


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=7))
@settings(deadline=None, max_examples=25)
def test_the_sign_flip_test_counts_all_patterns(pairs):
    before, after = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    change = shift(before, after)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in signs_of(len(pairs))]
    assert change.p_value == pytest.approx(sum(s >= abs(sum(differences)) - 1e-9 for s in sums) / len(sums))
    assert change.difference == pytest.approx(sum(differences) / len(pairs))
    assert change.low <= change.difference <= change.high


def signs_of(n):
    return [[1 if (pattern >> i) & 1 else -1 for i in range(n)] for pattern in range(2**n)]


def test_students_interval_and_many_pairs():
    # differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.302653
    change = shift([0, 0, 0], [1, 2, 3])
    assert change.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert change.p_value == 0.25
    assert shift([0.0] * 20, [1.0] * 20).p_value < 1e-3
    assert shift([1.0], [2.0]).high == math.inf
    with pytest.raises(ValueError, match="same seeds"):
        shift([1.0], [])


def test_the_share_kept_is_the_ratio_of_means_and_its_interval_holds_the_truth():
    base, plain, method = [1] * 40, [1] * 10 + [0] * 30, [1] * 25 + [0] * 15
    found = kept_share(base, [(plain, method), (plain, method)])
    assert found.value == pytest.approx(15 / 30) and found.n == 40
    assert 0.25 < found.low < found.value < found.high < 0.75
    assert kept_share(base, [(plain, base)]).value == 1
    nothing = kept_share(base, [(plain, plain)])
    # none of the 30 that were lost: Wilson's end is z² / (n + z²)
    assert nothing == type(nothing)(0, 0, pytest.approx(1.959964**2 / (30 + 1.959964**2)), 40)
    all_of_it = kept_share(base, [(plain, base)])
    assert (all_of_it.low, all_of_it.high) == (pytest.approx(1 - nothing.high), 1)
    by_one = kept_share(base, [(plain, [1] * 11 + [0] * 29)])  # one in thirty is for the bootstrap
    assert by_one.value == pytest.approx(1 / 30) and by_one.low == 0 and by_one.high < 0.12
    # one more seed that kept all: between the two, and seeds that part make the interval wider
    spread = kept_share(base, [(plain, method), (plain, base)])
    assert spread.value == pytest.approx(0.75)
    assert spread.high - spread.low > found.high - found.low
    generator, hits = random.Random(0), 0
    for trial in range(60):
        drawn = [[generator.random() < p for _ in range(60)] for p in (0.95, 0.3, 0.7)]
        one = kept_share(drawn[0], [(drawn[1], drawn[2])], resamples=200, seed=trial)
        hits += one.low <= (0.7 - 0.3) / (0.95 - 0.3) <= one.high
    assert hits >= 51  # 57 expected


def test_prompts_of_one_source_count_as_one_draw_of_it():
    """Sources differ in how much is kept; an interval over prompts alone takes them for a fair sample, and is too sure."""
    rates = np.random.default_rng(0)
    truth, covered = (0.7 - 0.05) / (0.95 - 0.05), {"prompts": 0, "sources": 0}
    sources = [source for source in range(12) for _ in range(20)]
    for trial in range(40):
        base, plain = (rates.random(240) < rate for rate in (0.95, 0.05))
        method = rates.random(240) < np.repeat(rates.uniform(0.4, 1.0, 12), 20)
        for name, given_sources in (("prompts", None), ("sources", sources)):
            found = kept_share(base, [(plain, method)], sources=given_sources, resamples=200, seed=trial)
            covered[name] += found.low <= truth <= found.high
    assert covered["sources"] >= 34 and covered["prompts"] <= 30, covered  # 38 expected of an honest one
    one = kept_share(base, [(plain, method)], sources=["same"] * 240, resamples=50)
    assert one == kept_share(base, [(plain, method)], resamples=50)


def test_a_share_kept_of_nothing_is_refused():
    base, plain = [1] * 40, [1] * 10 + [0] * 30
    for refused, options, words in [
        ((base, []), {}, "one seed"),
        ((base, [(plain, [1])]), {}, "same"),
        ((plain, [(base, base)]), {}, "lost nothing"),
        ((base, [(plain, plain)]), {"sources": ["a"]}, "for each of 40 prompts, found 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            kept_share(*refused, **options)
