"""Presets say what they stand for: the paper's printed values, and the recommended combination."""

import dataclasses

import pytest
import torch

from alignguard.data import encode_source
from alignguard.guard import Guard, GuardConfig
from alignguard.loading import adapt


def test_the_papers_preset_equals_its_printed_values():
    config = GuardConfig.paper()
    printed = {
        "structure": "gram",
        "whole_update": False,
        "max_rank": 32,
        "lambda_alignment": 0.1,
        "lambda_task": 0.01,
        "lambda_collision": 0.1,
        "alpha": 0.5,
        "beta": 4.0,
        "tau": 0.01,
        "metric": "euclidean",
        "refresh_every": 1000,
        "first_refresh": None,
        "lambda_kl": 0.0,
        "projection": "hard",
        "scale_free": False,
        "adaptive": False,
        "max_drift": None,
    }
    assert {name: getattr(config, name) for name in printed} == printed
    assert config.interval(5000) == 1000


@pytest.mark.parametrize("preset", [GuardConfig.paper, GuardConfig.combined])
def test_a_preset_can_be_changed_field_by_field(preset):
    changed = preset(seed=7)
    assert dataclasses.replace(changed, seed=preset().seed) == preset()
    with pytest.raises(ValueError, match="alpha"):
        preset(alpha=2.0)


def test_fields_of_the_fisher_are_told_where_no_term_reads_it():
    assert GuardConfig(refresh_every=3, energy=0.5).unread() == ["energy", "refresh_every"]
    assert GuardConfig().unread() == [] and GuardConfig(lambda_kl=1.0, exclude=("x",)).unread() == []
    assert GuardConfig.curvature(refresh_every=3).unread() == []
    assert GuardConfig(kl_memory=0, kl_climb=0.3).unread() == ["kl_climb"] and GuardConfig(kl_memory=0).unread() == []
    assert GuardConfig(lambda_collision=0.1, refresh_every=3).unread() == []


def test_the_default_reads_kl_and_remembers_it_by_what_trains():
    config = GuardConfig()
    assert (config.lambda_alignment, config.lambda_task, config.lambda_collision) == (0, 0, 0) and config.lambda_kl > 0
    assert config.kl_schedule("lora") == (4, 8) and config.kl_schedule("full") == (3, 2)
    for method in ("lora", "full"):
        assert config.kl_schedule(method, sharded=True) == (1, 0)
        assert GuardConfig(kl_memory=0).kl_schedule(method) == (1, 0)
    assert GuardConfig(kl_memory=4).kl_schedule("full") == (3, 4)
    assert GuardConfig(kl_every=2).kl_schedule("lora") == (2, 8) and GuardConfig(kl_every=5).kl_schedule("full") == (
        5,
        2,
    )


def test_fields_of_kl_and_of_measuring_are_told_where_nothing_reads_them():
    assert GuardConfig.curvature(kl_examples=4, kl_climb=None).unread() == ["kl_examples", "kl_climb"]
    assert GuardConfig(held_back=2, measure_every=2).unread() == ["held_back", "measure_every"]
    assert GuardConfig(max_drift=0.5, held_back=2, measure_every=2).unread() == []
    assert GuardConfig.curvature(adaptive=True, held_back=2).unread() == []
    for preset in (GuardConfig, GuardConfig.curvature, GuardConfig.paper, GuardConfig.combined):
        assert preset().unread() == []


def test_fields_of_terms_that_are_not_charged_are_told():
    collision = {"alpha": 0.1, "beta": 9.0, "tau": 5.0}
    assert GuardConfig.curvature(**collision).unread() == list(collision)
    assert GuardConfig.curvature(**collision, lambda_collision=0.1).unread() == []
    assert GuardConfig.curvature(scale_free=True).unread() == ["scale_free"]
    assert GuardConfig.curvature(scale_free=True, lambda_task=0.1).unread() == []
    assert GuardConfig.curvature(structure="gram", sketch_rank=3).unread() == ["sketch_rank"]
    assert GuardConfig.curvature(sketch_rank=3).unread() == []
    assert GuardConfig.curvature(refresh_budget=0.1).unread() == ["refresh_budget"]
    assert GuardConfig.curvature(refresh_budget=0.1, adaptive=True).unread() == []
    # An ablation turns a term of a preset off, and is no slip.
    for off in ({"lambda_collision": 0.0}, {"lambda_task": 0.0}, {"lambda_alignment": 0.0}, {"structure": "kfac"}):
        assert GuardConfig.paper(**off).unread() == []


def test_what_is_told_moves_no_gradient(tiny_llama, tokenizer, alignment_rows):
    """Two guards that differ in unread fields alone charge the same."""
    found = []
    for more in ({}, {"alpha": 0.1, "beta": 9.0, "tau": 5.0, "scale_free": True, "refresh_budget": 0.5}):
        config = GuardConfig.curvature(structure="kfac", **more)
        model = adapt(tiny_llama(), {"r": 2})
        guard = Guard(model, encode_source(alignment_rows, "rows", tokenizer, "causal", 64), config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * p.requires_grad)
        guard.begin_step(0)
        found.append(guard.penalty())
    assert found[0] == found[1] > 0


def test_an_example_has_a_token_to_predict_another_from():
    with pytest.raises(ValueError, match="max_length must be a whole number of at least 2, not 1"):
        GuardConfig(max_length=1)
