"""Files come back as they were; damaged ones are refused by name; shards add up."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_fisher_oracle import NAMES, assert_close, collate, make_examples, tiny_llama

import fishergeo as fg

STRUCTURES = ["gram", "sketch", "diagonal", "kfac"]


def estimate(examples, structure, rank=4, **options):
    batches = [collate(examples)]
    return fg.estimate_fisher(tiny_llama(), batches, structure=structure, layers=list(NAMES), rank=rank, **options)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_file_comes_back_equal(tmp_path, structure):
    fisher = estimate(make_examples([5, 7]), structure)
    fisher.save(tmp_path / "f.safetensors")
    loaded = fg.Fisher.load(tmp_path / "f.safetensors")
    assert loaded.header == fisher.header and list(loaded) == list(fisher)
    for name in fisher:
        for key, tensor in fisher.accumulators[name].sums.items():
            assert torch.equal(loaded.accumulators[name].sums[key], tensor)
        assert_close(loaded[name].to_dense(), fisher[name].to_dense(), 1e-12)
    assert os.listdir(tmp_path) == ["f.safetensors"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_shards_add_up_to_the_whole(structure):
    examples = make_examples([5, 7, 6, 8])
    # A sketch of full rank is exact; a lean one only agrees where nothing had to be dropped.
    rank = 20 if structure == "sketch" else 4
    whole = estimate(examples, structure, rank=rank)
    merged = estimate(examples[:1], structure, rank=rank).merge(estimate(examples[1:], structure, rank=rank))
    assert merged.header.examples == 4
    for name in whole:
        assert_close(merged[name].to_dense(), whole[name].to_dense())


def test_scaling_forgets_exponentially():
    old, new = make_examples([5, 7]), make_examples([6], 1)
    forgotten = estimate(old, "gram").scaled(0.25).merge(estimate(new, "gram"))
    for name in NAMES:
        expected = (0.5 * estimate(old, "gram")[name].to_dense() + estimate(new, "gram")[name].to_dense()) / 1.5
        assert_close(forgotten[name].to_dense(), expected)


def test_merging_what_differs_names_the_difference():
    one = estimate(make_examples([5]), "sketch")
    with pytest.raises(ValueError, match="kind"):
        one.merge(estimate(make_examples([5]), "sketch", kind="margin"))
    with pytest.raises(ValueError, match="structure"):
        one.merge(estimate(make_examples([5]), "gram"))


def test_loading_chosen_layers_only(tmp_path):
    fisher = estimate(make_examples([5, 7]), "kfac")
    fisher.save(tmp_path / "f.safetensors")
    assert list(fg.Fisher.load(tmp_path / "f.safetensors", layers=[NAMES[1]])) == [NAMES[1]]
    with pytest.raises(ValueError, match="no layer 'absent'"):
        fg.Fisher.load(tmp_path / "f.safetensors", layers=["absent"])


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_damaged_files_are_refused_with_a_named_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "f.safetensors"
    estimate_once().save(path)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        place = data.draw(st.integers(0, 1500))
        raw[place] = data.draw(st.integers(0, 255).filter(lambda b: b != raw[place]))
    path.write_bytes(bytes(raw))
    try:
        loaded = fg.Fisher.load(path)
        list(loaded)
    except ValueError as error:
        assert "f.safetensors" in str(error)


_cache = []


def estimate_once():
    if not _cache:
        _cache.append(estimate(make_examples([5]), "sketch"))
    return _cache[0]


def test_foreign_files_and_missing_files_are_named(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="not one of fishergeo's"):
        fg.Fisher.load(tmp_path / "foreign.safetensors")
    with pytest.raises(FileNotFoundError, match="absent"):
        fg.Fisher.load(tmp_path / "absent.safetensors")


def test_files_of_a_later_format_ask_for_an_upgrade(tmp_path):
    header = {"format": "fishergeo", "version": "99", "header": '{"aliases": {}}'}
    save_file({"x": torch.ones(2)}, tmp_path / "later.safetensors", metadata=header)
    with pytest.raises(ValueError, match=r"format 99.*upgrade"):
        fg.Fisher.load(tmp_path / "later.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    fisher = estimate_once()
    path = tmp_path / "f.safetensors"
    fisher.save(path)
    old = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        estimate(make_examples([7]), "sketch").save(path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["f.safetensors"]
