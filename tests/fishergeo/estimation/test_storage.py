"""Files come back as they were; damaged ones are refused by name; shards add up."""

import copy
import json
import os
import pickle
import zlib
from dataclasses import asdict

import pytest
import safetensors
import torch
from fisher_oracle import NAMES, assert_close, collate, make_examples, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import fishergeo as fg
from fishergeo import _storage

STRUCTURES = ["gram", "sketch", "diagonal", "kfac", "kfac-sketch", "ekfac", "exact"]


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


@pytest.mark.parametrize("structure", [structure for structure in STRUCTURES if structure != "ekfac"])
def test_shards_add_up_to_the_whole(structure):
    examples = make_examples([5, 7, 6, 8])
    # A sketch of full rank is exact; a lean one only agrees where nothing had to be dropped.
    rank = 20 if "sketch" in structure else 4
    whole = estimate(examples, structure, rank=rank)
    merged = estimate(examples[:1], structure, rank=rank).merge(estimate(examples[1:], structure, rank=rank))
    assert merged.header.examples == 4
    for name in whole:
        assert_close(merged[name].to_dense(), whole[name].to_dense())


def test_scaling_forgets_exponentially():
    old, new = make_examples([5, 7]), make_examples([6], 1)
    with pytest.raises(ValueError, match="positive and finite"):
        estimate(old, "gram").scaled(float("inf"))
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


def same_or_refused(path, original):
    """Loads and reads everything: the outcome is the original, or a ValueError that names the file."""
    try:
        loaded = fg.Fisher.load(path)
        assert loaded.header == original.header and list(loaded) == list(original)
        for name in loaded:
            loaded[name].trace()
            sums = loaded.accumulators[name].sums
            for key, tensor in original.accumulators[name].sums.items():
                assert torch.equal(sums[key], tensor)
    except ValueError as error:
        assert str(path) in str(error)
        return False
    return True


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_cut_off_files_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "f.safetensors"
    estimate_once().save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    assert not same_or_refused(path, estimate_once())


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_flipped_bytes_are_refused_or_harmless(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "f.safetensors"
    estimate_once().save(path)
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    ranges = st.one_of(st.integers(0, 7), st.integers(8, header - 1), st.integers(header, len(raw) - 1))
    places = data.draw(st.lists(ranges, min_size=1, max_size=3, unique=True))
    for place in places:
        raw[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(raw))
    assert not (same_or_refused(path, estimate_once()) and max(places) >= header)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_wrong_json_with_a_right_checksum_is_refused_by_name(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "f.safetensors"
    original = estimate_once()
    original.save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["header"])
    holder, key = data.draw(
        st.sampled_from(
            [(None, None)]
            + [(header, key) for key in header]
            + [(header["fisher"], key) for key in header["fisher"]]
            + [(header[group], key) for group in ("sums", "tensors") for key in header[group]]
            + [(header["fisher"]["shapes"], NAMES[0])]
        )
    )
    if holder is None:
        header = data.draw(JSON)
    elif data.draw(st.booleans()):
        del holder[key]
    else:
        holder[key] = data.draw(JSON)
    text = json.dumps(header)
    metadata = {**metadata, "header": text, "checksum": str(zlib.crc32(text.encode()))}
    save_file(tensors, path, metadata=metadata)
    try:
        loaded = fg.Fisher.load(path)
        [loaded[name].trace() for name in loaded]
    except ValueError as error:
        assert str(path) in str(error)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_wrong_tensors_are_refused_by_name(tmp_path_factory, data):
    """Tensors lost, reshaped, cast or exchanged under a header that still promises the old ones."""
    path = tmp_path_factory.mktemp("damaged") / "f.safetensors"
    original = estimate_once()
    original.save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    key = data.draw(st.sampled_from(sorted(tensors)))
    change = data.draw(st.sampled_from(["lost", "reshaped", "cast", "values", "renamed"]))
    if change == "renamed":
        tensors[key + "x"] = tensors.pop(key)
    elif change == "lost":
        del tensors[key]
    elif change == "reshaped":
        tensors[key] = tensors[key].reshape(1, -1)[:, :, None]
    elif change == "cast":
        tensors[key] = tensors[key].to(torch.float16)
    else:
        tensors[key] = tensors[key] + 1
    save_file(tensors, path, metadata=metadata)
    assert not same_or_refused(path, original)


@pytest.mark.parametrize(
    "sums", [{"factor": torch.ones(3, 2), "trace": torch.ones(1)}, {"trace": torch.ones(1)}], ids=["shape", "missing"]
)
def test_sums_that_do_not_fit_their_layer_are_refused_on_opening(tmp_path, sums):
    header = {**asdict(estimate_once().header), "shapes": {"layer": [4, 5]}, "dtype": "float32"}
    tensors = {f"layer|{key}": tensor for key, tensor in sums.items()}
    _storage.write(tmp_path / "f.safetensors", tensors, {"fisher": header, "sums": {"layer": list(sums)}})
    with pytest.raises(ValueError, match=r"f\.safetensors: tensors do not fit the header .*factor"):
        fg.Fisher.load(tmp_path / "f.safetensors")


def test_opening_reads_no_tensor_and_a_layer_is_read_alone(tmp_path):
    path = tmp_path / "f.safetensors"
    estimate(make_examples([5, 7]), "gram").save(path)
    raw = bytearray(path.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    end = 8 + int.from_bytes(raw[:8], "little")
    raw[end + header[f"{NAMES[1]}|gram"]["data_offsets"][0]] ^= 1
    path.write_bytes(bytes(raw))
    loaded = fg.Fisher.load(path)
    assert loaded[NAMES[0]].trace() > 0 and NAMES[1] in loaded
    with pytest.raises(ValueError, match=r"down_proj\|gram' is damaged"):
        loaded[NAMES[1]]
    with pytest.raises(ValueError, match="is damaged"):
        fg.Fisher.load(path, lazy=False)


def test_a_lazily_loaded_file_may_be_replaced_copied_and_pickled(tmp_path):
    path = tmp_path / "f.safetensors"
    old = estimate(make_examples([5, 7]), "kfac")
    old.save(path)
    loaded = fg.Fisher.load(path)
    estimate(make_examples([6]), "kfac").save(path)
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), loaded):
        for name in old:
            assert torch.equal(copied.accumulators[name].sums["output"], old.accumulators[name].sums["output"])


def test_layers_that_share_a_sum_share_it_after_loading(tmp_path):
    layers = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    fisher = fg.estimate_fisher(tiny_llama(), [collate(make_examples([5, 7]))], structure="kfac", layers=layers)
    fisher.save(tmp_path / "f.safetensors")
    for lazy in (True, False):
        loaded = fg.Fisher.load(tmp_path / "f.safetensors", lazy=lazy)
        inputs = [loaded.accumulators[name].sums["input"] for name in layers]
        assert inputs[0] is inputs[1] is inputs[2]


def test_the_header_says_what_the_fisher_is_of(tmp_path):
    fisher = estimate(make_examples([5, 7]), "sketch", unit="token", kind="mc", side="input", seed=5)
    fisher.save(tmp_path / "f.safetensors")
    header = fg.Fisher.load(tmp_path / "f.safetensors").header
    assert (header.structure, header.kind, header.unit, header.side) == ("sketch", "mc", "token", "input")
    assert (header.rank, header.seed, header.examples, header.dtype) == (4, 5, 2, "float64")
    assert header.tokens > header.examples and len(header.fingerprint) == 16


def test_a_fisher_knows_its_model(tmp_path):
    fisher = estimate_once()
    fisher.check_model(tiny_llama())
    with pytest.raises(ValueError, match="fingerprint"):
        fisher.check_model(tiny_llama(seed=1))
    fisher.check_model(tiny_llama(seed=1), values=False)
    inner = tiny_llama().model
    with pytest.raises(ValueError, match=r"no layer 'model\.layers\.0.*nearest is 'layers\.0"):
        fisher.check_model(inner)
    other = tiny_llama()
    other.model.layers[1].mlp.down_proj = torch.nn.Linear(21, 12)
    with pytest.raises(ValueError, match=r"down_proj' has shape \(12, 21\) in this model, \(12, 20\)"):
        fisher.check_model(other)
    other.model.layers[1].mlp.down_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="Identity"):
        fisher.check_model(other)


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


@pytest.mark.parametrize(
    "version, message", [("99", r"format 99.*upgrade"), ("1", r"format 1.*estimate it again"), ("x", "no version")]
)
def test_files_of_another_format_say_what_to_do(tmp_path, version, message):
    header = {"format": "fishergeo", "version": version, "header": '{"aliases": {}}'}
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors", metadata=header)
    with pytest.raises(ValueError, match=message):
        fg.Fisher.load(tmp_path / "other.safetensors")


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
