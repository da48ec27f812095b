"""The forgetting law on data that it made, and what it says when data do not pin it down."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.forgetting_law import fit_scaling_law

SIZES, AMOUNTS = (1e6, 4e6, 2e7, 1e8), (1e4, 5e4, 2e5, 1e6, 5e6)


def data(a=30.0, alpha=0.4, beta=0.3, e=0.05, noise=0.0, sizes=SIZES, amounts=AMOUNTS, seed=0):
    grid = [(n, d) for n in sizes for d in amounts]
    n, d = (np.array(column) for column in zip(*grid, strict=True))
    start = 3.0 - 0.1 * np.log10(n)
    rise = a * d**beta / n**alpha + e
    return n, d, start + rise + noise * np.random.default_rng(seed).standard_normal(len(n)), start


@given(st.floats(0.1, 1.2), st.floats(0.1, 1.0), st.floats(-0.1, 0.3))
@settings(max_examples=12)
def test_exact_data_give_the_law_back(alpha, beta, e):
    a = 0.5 * (2e7) ** alpha / (2e5) ** beta  # half a nat in the middle of the data
    fit = fit_scaling_law(*data(a, alpha, beta, e), resamples=3)
    assert fit.values["alpha"] == pytest.approx(alpha, rel=1e-3)
    assert fit.values["beta"] == pytest.approx(beta, rel=1e-3)
    assert fit.values["E"] == pytest.approx(e, abs=1e-3)
    assert fit.values["A"] == pytest.approx(a, rel=2e-2)
    assert fit.predict(5e6, 1e5) == pytest.approx(a * 1e5**beta / 5e6**alpha + e, rel=1e-3)
    assert fit.r2 == pytest.approx(1) and not fit.unidentified


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = {"alpha": 0, "beta": 0}
    for seed in range(12):
        fit = fit_scaling_law(*data(noise=0.02, seed=seed), resamples=60)
        for name, truth in (("alpha", 0.4), ("beta", 0.3)):
            low, high = fit.intervals[name]
            held[name] += low <= truth <= high
    # 95 % of 12 is 11.4; fewer than 8 has a probability below one in a thousand
    assert min(held.values()) >= 8


def test_the_same_seed_gives_the_same_intervals():
    one, two = (fit_scaling_law(*data(noise=0.02), resamples=20, seed=5) for _ in range(2))
    assert one == two
    assert "| alpha |" in one.table() and "20 observations" in one.table()


def test_one_model_size_leaves_alpha_open():
    fit = fit_scaling_law(*data(noise=0.001, sizes=(1e7,), amounts=(*AMOUNTS, 2e7, 1e8)), resamples=20)
    assert "model sizes" in fit.unidentified["alpha"] and "A" in fit.unidentified
    assert "beta" not in fit.unidentified


def test_one_amount_leaves_beta_open():
    fit = fit_scaling_law(*data(noise=1e-4, sizes=(1e6, 3e6, 1e7, 3e7, 1e8, 1e9), amounts=(1e5,)), resamples=20)
    assert "amounts" in fit.unidentified["beta"] and "alpha" not in fit.unidentified


def test_two_by_two_levels_cannot_tell_an_offset_from_exponents():
    n, d, after, start = (np.tile(column, 2) for column in data(noise=0.01, sizes=(1e6, 1e8), amounts=(1e4, 1e6)))
    fit = fit_scaling_law(n, d, after, start, resamples=20)
    assert "no factor has three values" in fit.unidentified["E"]


def test_pure_noise_says_that_nothing_is_seen():
    n, d, _, start = data()
    noise = 0.01 * np.random.default_rng(3).standard_normal(len(n))
    fit = fit_scaling_law(n, d, start + noise, start, resamples=40)
    assert {"alpha", "beta"} <= set(fit.unidentified)
    flat = fit_scaling_law(n, d, start, start, resamples=5)
    assert {"alpha", "beta"} <= set(flat.unidentified) and flat.values["E"] == pytest.approx(0)


def test_growth_with_the_logarithm_leaves_the_offset_open_too():
    # β near zero makes A·D^β + E a logarithm, of which any offset is as good as any other
    n, d, _, _ = data()
    noise = 0.02 * np.random.default_rng(1).standard_normal(len(n))
    fit = fit_scaling_law(n, d, 0.1 * np.log(d) + noise, resamples=40)
    assert {"alpha", "A", "E"} <= set(fit.unidentified)
    assert fit.r2 > 0.9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0] * 4, [1.0] * 4, [1.0] * 4), "at least five"),
        (([1.0] * 6, [1.0] * 5, [1.0] * 6), "one length"),
        (([0.0] * 6, [1.0] * 6, [1.0] * 6), "sizes must be a sequence of finite positive"),
        (([1.0] * 6, [1.0] * 6, [float("nan")] * 6), "losses must be a sequence of finite"),
    ],
)
def test_bad_data_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        fit_scaling_law(*arguments)
