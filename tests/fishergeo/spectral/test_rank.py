"""The energy rule keeps the fewest leading directions that hold the share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fishergeo as fg

SPECTRA = st.lists(st.floats(0, 1e6), min_size=1, max_size=12).map(lambda x: sorted(x, reverse=True))


@given(SPECTRA, st.floats(0.01, 1.0))
def test_the_share_is_reached_and_not_with_one_direction_fewer(values, energy):
    m, total = fg.rank_for_energy(values, energy=energy), sum(values)
    if total == 0:
        assert m == 0
    else:
        assert 1 <= m <= len(values)
        assert sum(values[:m]) >= energy * total * (1 - 1e-9)
        assert sum(values[: m - 1]) < energy * total or m == 1


@given(SPECTRA, st.floats(1e-3, 1e3))
def test_the_rank_does_not_depend_on_the_unit(values, unit):
    # A share on the edge could fall either way by rounding, so the unit is a power of two.
    scale = 2.0 ** round(unit**0.3)
    assert fg.rank_for_energy([v * scale for v in values]) == fg.rank_for_energy(values)


@pytest.mark.parametrize(
    ("values", "total", "energy", "expected"),
    [
        ([5.0, 3.0, 2.0], None, 0.8, 2),
        ([5.0, 3.0, 2.0], None, 0.81, 3),
        ([5.0, 3.0, 2.0], 12.5, 0.8, 3),
        ([5.0, 3.0, 2.0], 20.0, 0.8, 3),
        ([1.0] * 10, None, 0.3, 3),
        ([5.0], 5.0 - 1e-7, 1.0, 1),
        ([4.0, 0.0], None, 1.0, 1),
    ],
)
def test_known_cases(values, total, energy, expected):
    assert fg.rank_for_energy(values, total=total, energy=energy) == expected
    assert fg.rank_for_energy(torch.tensor(values), total=total, energy=energy) == expected


def test_the_default_share_is_80_percent_and_a_total_may_be_a_tensor():
    assert fg.rank_for_energy([7.9, 2.0, 0.1]) == 2
    assert fg.rank_for_energy([8.0, 1.0], total=torch.tensor(10.0)) == 1


@pytest.mark.parametrize(
    ("values", "keywords", "error", "message"),
    [
        ([1.0, 2.0], {}, ValueError, "values must be descending"),
        ([1.0, -1.0], {}, ValueError, "values must not be negative"),
        ([float("nan")], {}, ValueError, "values has 1 entries"),
        ([], {}, ValueError, "values is empty"),
        (torch.ones(2, 2), {}, ValueError, "values must have one dimension"),
        (torch.ones(2, dtype=torch.int64), {}, TypeError, "values must be a real floating"),
        (3.0, {}, TypeError, "values must be a tensor or a sequence"),
        ([1.0], {"energy": 0.0}, ValueError, "energy must lie"),
        ([1.0], {"energy": 1.1}, ValueError, "energy must be a finite number"),
        ([1.0], {"energy": float("nan")}, ValueError, "energy"),
        ([1.0], {"total": 0.5}, ValueError, "total is 0.5, less than the sum"),
        (torch.ones(200, dtype=torch.bfloat16), {"total": -5.0}, ValueError, "total is -5, less than the sum"),
        ([1.0], {"total": float("inf")}, ValueError, "total must be a finite"),
        ([1.0], {"total": "1"}, TypeError, "total must be a real number"),
    ],
)
def test_bad_input_is_refused_by_name(values, keywords, error, message):
    with pytest.raises(error, match=message):
        fg.rank_for_energy(values, **keywords)


def test_the_exact_trace_of_a_sketched_operator_is_enough():
    rows = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    operator = fg.nystrom(rows @ rows.T, 256).operator()
    assert float(operator.values.sum()) > float(operator.full_trace)  # by the shift of 264 columns
    assert fg.rank_for_energy(operator.values, total=operator.full_trace) == 1


def test_shares_are_summed_in_float64():
    assert fg.rank_for_energy([0.7, 0.3], energy=0.7) == 1
    many = torch.tensor([1.0] + [1e-8] * 100, dtype=torch.float32)
    assert fg.rank_for_energy(many, energy=1 - 5.05e-7) in (50, 51)


def test_the_message_about_the_order_says_how_to_sort():
    with pytest.raises(
        ValueError, match=r"^values must be descending; sort them with \.sort\(descending=True\)\.values$"
    ):
        fg.rank_for_energy([1.0, 2.0])
    assert fg.rank_for_energy(torch.tensor([3.0, 1.0]).sort(descending=True).values) == 2


def test_a_one_sided_fisher_takes_a_known_variance_once_it_is_a_mean_over_columns():
    torch.manual_seed(0)
    examples, columns, size = 100, 10, 40
    spikes = torch.randn(examples * columns, 2).double() @ torch.randn(2, size).double()
    rows = spikes + torch.randn(examples * columns, size).double()
    fisher = rows.T @ rows / examples  # as fishergeo has it: over examples
    values = torch.linalg.eigvalsh(fisher).flip(0)
    n = examples * columns
    for rank in (fg.rank_by_noise_edge, fg.rank_by_gavish_donoho):
        assert rank(values, n, size) == 2
        assert rank(values * examples / n, n, size, variance=1.0) == 2
        assert rank(values, n, size, variance=1.0) == size  # what the scale is for
