"""A guard says what it believes the drift to be and what it is, and warns once where the two have parted."""

import warnings

import pytest
import torch
from alignment_rows import rows
from architectures import make, move
from hypothesis import given
from hypothesis import strategies as st

from alignguard.guard import Guard, GuardConfig
from alignguard.guard.report import DriftGauge

REMEDY = "do otherwise."


@given(predicted=st.floats(0, 10), measured=st.floats(0, 100))
def test_it_warns_where_more_than_three_times_the_prediction_is_measured_and_only_once(predicted, measured):
    gauge = DriftGauge()
    blind = measured > 0.1 and measured > 3 * predicted
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gauge.compare(predicted, measured, REMEDY)
        gauge.compare(predicted, measured, REMEDY)
    assert len(told) == blind
    if blind:
        assert REMEDY in str(told[0].message) and "nats a response" in str(told[0].message)
    again = DriftGauge()
    again.load_state_dict(gauge.state_dict())
    assert again == gauge and again.numbers() == {"drift_predicted": predicted, "drift_measured": measured}


def test_nothing_is_said_before_the_first_comparison():
    gauge = DriftGauge()
    assert gauge.numbers() == {} and gauge.ratio is None
    gauge.compare(0.5, 0.25, REMEDY)
    assert gauge.ratio == 0.5


def test_every_new_estimate_is_held_against_the_drift_of_the_examples_that_it_reads():
    model = make(dtype=torch.float64)
    config = GuardConfig.curvature(structure="gram", refresh_every=1, first_refresh=None, refresh_examples=2)
    guard = Guard(model, rows(4), config)
    guard.begin_step(0)
    assert "drift_measured" not in guard.numbers()
    move(model)
    predicted = guard.predicted_drift()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guard.begin_step(1)
    with torch.no_grad():
        places = guard.alignment.places(2, 1)
        expected = guard.measured_drift()  # of all four
        few = [guard._readable().drift([place]) for place in places]
    assert guard.gauge.predicted == pytest.approx(predicted, rel=1e-9)
    assert guard.gauge.measured == pytest.approx(sum(few) / 2, rel=1e-9) and expected > 0
    assert guard.numbers()["drift_measured"] == guard.gauge.measured


def test_a_guard_that_is_blind_warns_and_names_the_remedy():
    model = make(dtype=torch.float64)
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(60)  # a model that is sure of what it says can drift far
    config = GuardConfig.curvature(structure="gram", refresh_every=1, first_refresh=None, refresh_examples=2)
    guard = Guard(model, rows(4), config)
    guard.begin_step(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    for layer in guard.layers.values():
        layer.operator.matrix.mul_(1e-9)
    with pytest.warns(UserWarning, match=r"drifted .* nats a response.*GuardConfig\(\)"):
        guard.begin_step(1)
