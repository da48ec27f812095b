"""Two real processes on shards of the data end with the Fisher of one process on all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import CUT, LENGTHS, batches_of, estimate
from fisher_oracle import NAMES, assert_close, collate, make_examples, tiny_llama

import fishergeo as fg
from fishergeo.sketching import probe_matrix

TESTS = Path(__file__).parents[2]
HELPERS = TESTS / "helpers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    paths = [str(HELPERS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HELPERS / "distributed_worker.py"), str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            errors = process.communicate(timeout=280)[1]
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    return folder


def whole(structure, rank=4, count=None):
    return estimate(tiny_llama(), [collate(make_examples(LENGTHS)[:count])], structure, rank=rank)


@pytest.mark.parametrize(
    "structure, rank", [("gram", 4), ("diagonal", 4), ("kfac", 4), ("sketch", 20), ("kfac-sketch", 20)]
)
def test_uneven_shards_add_up_to_one_process(folder, structure, rank):
    expected = whole(structure, rank)
    for process in range(2):
        found = fg.Fisher.load(folder / f"{structure}-{process}")
        assert found.header == expected.header
        for name in NAMES:
            assert_close(found[name].to_dense(), expected[name].to_dense(), 1e-10 if "sketch" in structure else 1e-12)


@pytest.mark.parametrize(
    "structure, rank", [("gram", 4), ("diagonal", 4), ("kfac", 4), ("sketch", 20), ("kfac-sketch", 20)]
)
def test_a_process_without_data_takes_part(folder, structure, rank):
    expected = whole(structure, rank, CUT)
    for process in range(2):
        found = fg.Fisher.load(folder / f"{structure}-alone-{process}")
        assert found.header.examples == CUT
        for name in NAMES:
            assert_close(found[name].to_dense(), expected[name].to_dense(), 1e-10 if "sketch" in structure else 1e-12)


def test_lean_sketches_merge_below_the_exact_matrix_and_near_it(folder):
    exact = whole("gram")
    for name in NAMES:
        found = fg.Fisher.load(folder / "lean-0")[name]
        other = fg.Fisher.load(folder / "lean-1")[name]
        assert torch.equal(found.to_dense(), other.to_dense())
        matrix = exact[name].to_dense()
        assert_close(found.full_trace, matrix.trace(), 1e-12)
        assert torch.linalg.eigvalsh(matrix - found.to_dense())[0] >= -1e-12 * matrix.norm()
        best = torch.linalg.eigvalsh(matrix).flip(0)[:6].sum()
        assert found.eigh(6)[0].sum() >= 0.9 * best  # two columns more than pairs asked for


def test_float32_sums_agree_to_a_millionth(folder):
    expected = estimate(tiny_llama().float(), [collate(make_examples(LENGTHS))], "gram")
    for process in range(2):
        found = fg.Fisher.load(folder / f"float32-{process}")
        assert found.header.dtype == "float32"
        for name in NAMES:
            assert_close(found[name].to_dense(), expected[name].to_dense(), 1e-6)


@pytest.mark.parametrize("structure", ["gram", "kfac"])
def test_sharded_parameters_give_the_same_fisher(folder, structure):
    expected = whole(structure)
    for process in range(2):
        found = fg.Fisher.load(folder / f"fsdp-{structure}-{process}")
        found.check_model(tiny_llama())
        for name in NAMES:
            assert_close(found[name].to_dense(), expected[name].to_dense(), 1e-12)


def test_shared_sums_stay_shared_and_errors_reach_every_process(folder):
    for process in range(2):
        facts = torch.load(folder / f"facts-{process}")
        assert facts["shared"] == 1 and facts["marks"]
        assert "every one passed None" in facts["errors"][0]
        assert "ranks 0 and 1 differ in kind: 'empirical' and 'margin'" in facts["errors"][1]


def test_products_with_the_probes_add_up_and_still_measure_the_error(folder):
    exact = whole("gram")
    for process in range(2):
        found = fg.Fisher.load(folder / f"probed-{process}")
        for name in NAMES:
            truth, operator = exact[name].to_dense(), found[name]
            probes = probe_matrix(len(truth), 5, 0, name).double()
            assert_close(found.accumulators[name].sums["probed"] / found.header.count, truth @ probes, 1e-10)
            missing = (truth - operator.to_dense()) @ probes
            assert operator.error().frobenius == pytest.approx(float(missing.square().sum(0).mean().sqrt()), rel=1e-6)


@pytest.mark.parametrize("kind", ["mc", "type2"])
def test_labels_sampled_on_every_process_add_up_to_the_merge_of_its_parts(folder, kind):
    parts = [estimate(tiny_llama(), batches_of(rank), "kfac", kind=kind, seed=rank) for rank in range(2)]
    for process in range(2):
        found = fg.Fisher.load(folder / f"{kind}-{process}")
        for name in NAMES:
            assert_close(found[name].to_dense(), parts[0].merge(parts[1])[name].to_dense(), 1e-12)


def test_without_a_process_group_the_error_says_what_to_call():
    with pytest.raises(RuntimeError, match="init_process_group"):
        fg.all_reduce(None)
