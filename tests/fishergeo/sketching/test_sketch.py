"""The one-pass sketch never overstates, is exact where it can be, and finds the leading space."""

import pytest
import torch
from fisher_oracle import NAMES, assert_close, collate, make_examples, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import fishergeo as fg
from fishergeo._linalg import add_gram_, mirrored
from fishergeo.accumulators.sketch import kernels_trace
from fishergeo.sketching import PsdSketch, compress, factor_eigh, nystrom_factor, probe_matrix


def stream(size, count, decay, seed, rank=2):
    """Random positive semi-definite terms whose sum has a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, size + 1, dtype=torch.float64) ** -decay
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    for _ in range(count):
        factor = basis @ (scales[:, None] * torch.randn(size, rank, generator=generator, dtype=torch.float64))
        yield factor @ factor.T


def sketch_of(terms, columns, seed=0):
    sketch = PsdSketch(len(terms[0]), columns, seed, "layer", torch.float64, torch.device("cpu"))
    for term in terms:
        sketch.add(term @ sketch.omega, 1)
    return sketch.close()


@settings(deadline=None, max_examples=25)
@given(columns=st.integers(1, 24), count=st.integers(1, 40), decay=st.floats(0, 3), seed=st.integers(0, 99))
def test_the_sketch_never_exceeds_the_sum(columns, count, decay, seed):
    terms = list(stream(24, count, decay, seed))
    factor = sketch_of(terms, columns)
    whole = sum(terms)
    smallest = torch.linalg.eigvalsh(whole - factor @ factor.T)[0]
    assert smallest >= -1e-12 * torch.linalg.matrix_norm(whole, 2)
    assert factor.shape[1] <= columns


@settings(deadline=None, max_examples=25)
@given(rank=st.integers(0, 6), seed=st.integers(0, 99))
def test_the_sketch_is_exact_up_to_its_rank(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(20, max(rank, 1), generator=generator, dtype=torch.float64) * (rank > 0)
    terms = [(basis * w) @ basis.T for w in torch.rand(30, generator=generator, dtype=torch.float64)]
    factor = sketch_of(terms, 8)
    assert (factor @ factor.T - sum(terms)).norm() <= 1e-9 * (1e-300 + sum(terms).norm())


@pytest.mark.parametrize("decay", [0.3, 0.6, 1.0])
def test_learning_the_test_matrix_beats_a_fixed_one(decay):
    """The reason for segments: a fixed random Ω of the same width loses several per cent more on slow spectra."""
    terms = list(stream(200, 96, decay, 1, rank=6))
    whole = sum(terms)
    best = torch.linalg.eigvalsh(whole).flip(0)[:32].sum()
    vectors = factor_eigh(sketch_of(terms, 64), 32)[1]
    omega = torch.linalg.qr(torch.randn(200, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    fixed = factor_eigh(nystrom_factor(whole @ omega, omega), 32)[1]
    ours, theirs = ((v.T @ whole @ v).trace() / best for v in (vectors, fixed))
    assert 1 - ours < 0.4 * (1 - theirs)
    assert ours > 0.97


def test_compression_keeps_the_leading_part():
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    left, singular, _ = torch.linalg.svd(factor)
    kept = compress(factor, 5)
    assert_close(kept @ kept.T, (left[:, :5] * singular[:5] ** 2) @ left[:, :5].T, 1e-12)


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-12])
def test_eigenpairs_of_a_factor_are_orthonormal_whatever_the_range(smallest):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 6, generator=generator, dtype=torch.float64))[0]
    scales = torch.logspace(0, torch.log10(torch.tensor(smallest)).item(), 6, dtype=torch.float64)
    values, vectors = factor_eigh(basis * scales.sqrt(), 6)
    assert (vectors.T @ vectors - torch.eye(6)).abs().max() < 1e-7
    assert torch.allclose(values, scales, rtol=1e-6)


@settings(deadline=None, max_examples=10)
@given(cuts=st.sets(st.integers(1, 11), max_size=6), side=st.sampled_from(["output", "input"]))
def test_a_lean_sketch_does_not_depend_on_batching(cuts, side):
    model = tiny_llama()
    examples = make_examples([5, 9, 7, 9, 4, 6, 8, 5, 7, 6, 9, 5])
    edges = [0, *sorted(cuts), 12]
    batches = [collate(examples[a:b]) for a, b in zip(edges, edges[1:], strict=False)]  # noqa: RUF007
    options = {"structure": "sketch", "rank": 4, "layers": list(NAMES), "side": side}
    whole = fg.estimate_fisher(model, [collate(examples)], **options)
    parts = fg.estimate_fisher(model, batches, **options)
    for name in NAMES:
        assert_close(parts[name].to_dense(), whole[name].to_dense(), 1e-8)


def test_the_trace_is_exact_and_bounds_the_error():
    model = tiny_llama()
    batches = [collate(make_examples([5, 9, 7, 9]))]
    sketch = fg.estimate_fisher(model, batches, structure="sketch", rank=3)
    exact = fg.estimate_fisher(model, batches, structure="gram")
    for name in sketch:
        error = torch.linalg.matrix_norm(exact[name].to_dense() - sketch[name].to_dense(), 2)
        assert_close(sketch[name].full_trace, exact[name].trace(), 1e-12)
        assert error <= (sketch[name].full_trace - sketch[name].trace()) * (1 + 1e-9)


def probed(model, examples, **options):
    batches = [collate(examples[i : i + 3]) for i in range(0, len(examples), 3)]
    return fg.estimate_fisher(model, batches, structure="sketch", rank=3, probes=5, layers=list(NAMES), **options)


def test_the_error_of_a_sketch_covers_the_truth_in_95_percent_of_trials():
    model, examples = tiny_llama(), make_examples([5, 9, 7, 9, 4, 6])
    batches = [collate(examples[:3]), collate(examples[3:])]
    exact = fg.estimate_fisher(model, batches, structure="gram", layers=list(NAMES))
    whole = {name: exact[name].to_dense() for name in NAMES}
    covered, tight = [], []
    for seed in range(20):
        sketch = probed(model, examples, seed=seed)
        for name in NAMES:
            for k in (1, 3):
                values, vectors = sketch[name].eigh(k)
                found = sketch[name].error(k)
                norm = float(torch.linalg.matrix_norm(whole[name] - (vectors * values) @ vectors.T, 2))
                assert found.trace == pytest.approx(float(whole[name].trace() - values.sum()), rel=1e-9)
                covered.append(norm <= found.spectral * (1 + 1e-9))
                tight.append(found.spectral / norm)
    trials = len(covered)
    assert sum(covered) >= 0.95 * trials - 3 * (trials * 0.95 * 0.05) ** 0.5
    assert sorted(tight)[trials // 2] < 8  # and the bound says something


def test_products_with_the_probes_are_those_of_the_whole_fisher_however_it_came_about(tmp_path):
    model, examples = tiny_llama(), make_examples([5, 9, 7, 9, 4, 6, 8, 5])
    exact = fg.estimate_fisher(model, [collate(examples)], structure="gram", layers=list(NAMES))
    parts = [probed(model, examples[:3], seed=4), probed(model, examples[3:], seed=4)]
    whole = probed(model, examples, seed=4)
    whole.save(tmp_path / "fisher.safetensors")
    for fisher in (whole, parts[0].merge(parts[1]), parts[1].merge(parts[0]), whole.scaled(0.5),
                   fg.Fisher.load(tmp_path / "fisher.safetensors")):  # fmt: skip
        for name in NAMES:
            truth, operator = exact[name].to_dense(), fisher[name]
            probes = probe_matrix(len(truth), 5, 4, name).double()
            assert_close(fisher.accumulators[name].sums["probed"] / fisher.header.count, truth @ probes, 1e-10)
            differences = (truth - operator.to_dense()) @ probes
            found = operator.error(level=0.9)
            assert found.frobenius == pytest.approx(float(differences.square().sum(0).mean().sqrt()), rel=1e-6)
            assert found.level == 0.9


def test_probes_and_test_matrices_do_not_hang_on_the_default_dtype(tmp_path):
    model, examples = tiny_llama(), make_examples([5, 9, 7, 9])
    found = []
    try:
        for dtype in (torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            fisher = probed(model, examples)
            path = tmp_path / "fisher.safetensors"
            if dtype == torch.float64:
                fisher.save(path)
            errors = [one[NAMES[0]].error() for one in (fisher, fg.Fisher.load(path))]
            assert probe_matrix(6, 2, 0, "a").dtype == torch.float32
            found += [errors, [fisher[NAMES[0]].to_dense(), probe_matrix(6, 2, 0, "a")]]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[0][0] == found[0][1] == found[2][0] == found[2][1]
    assert all(torch.equal(one, other) for one, other in zip(found[1], found[3], strict=True))


def test_decay_reaches_the_products_with_the_probes():
    model, examples = tiny_llama(), make_examples([5, 9, 7, 9])
    options = {"layers": list(NAMES), "decay": 0.5}
    exact = fg.estimate_fisher(model, [collate(examples[:3]), collate(examples[3:])], structure="gram", **options)
    sketch = probed(model, examples, decay=0.5)
    for name in NAMES:
        truth = exact[name].to_dense()
        product = truth @ probe_matrix(len(truth), 5, 0, name).double()
        assert_close(sketch.accumulators[name].sums["probed"] / sketch.header.count, product, 1e-10)


def test_probes_are_refused_where_they_mean_nothing():
    model, examples = tiny_llama(), make_examples([5, 9])
    bare = fg.estimate_fisher(model, [collate(examples)], structure="sketch", rank=3, layers=list(NAMES))
    with pytest.raises(ValueError, match="probes=8"):
        bare[NAMES[0]].error()
    with pytest.raises(ValueError, match="k=4"):
        probed(model, examples)[NAMES[0]].error(4)
    with pytest.raises(ValueError, match="seeds 0 and 1"):
        probed(model, examples).merge(probed(model, examples, seed=1))
    with pytest.raises(ValueError, match="probes must be at least 0"):
        fg.Structure("sketch", probes=-1)
    with pytest.raises(ValueError, match="probes"):
        fg.Structure("gram", probes=2)
    with pytest.raises(ValueError, match="sketch' only"):
        fg.estimate_fisher(model, [collate(examples)], structure="gram", probes=2)


def test_long_sequences_take_the_other_order_of_products_to_the_same_end():
    model = tiny_llama()
    name = NAMES[0]
    batch = collate(make_examples([40, 33]))
    # Twelve wide and forty long: the weight gradient is formed; shorter ones go through the kernel.
    sketch = fg.estimate_fisher(model, [batch], structure="sketch", rank=12, layers=[name])
    gram = fg.estimate_fisher(model, [batch], structure="gram", layers=[name])
    assert_close(sketch[name].to_dense(), gram[name].to_dense())


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(0, 9), size=st.integers(1, 9), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_half_products_are_whole_once_mirrored(rows, size, dtype):
    x = torch.randn(rows, size, dtype=dtype, generator=torch.Generator().manual_seed(rows))
    total = torch.zeros(size, size, dtype=dtype)
    add_gram_(total, x)
    add_gram_(total, x)
    assert torch.allclose(mirrored(total), 2 * x.T @ x, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(examples=st.integers(1, 3), tokens=st.integers(2, 9), width=st.sampled_from([3, 511, 512, 700]))
def test_the_trace_of_two_kernels_is_that_of_their_product(examples, tokens, width):
    generator = torch.Generator().manual_seed(tokens)
    far = torch.randn(examples, tokens, 4, dtype=torch.float64, generator=generator)
    near = torch.randn(examples, tokens, width, dtype=torch.float64, generator=generator)
    expected = sum((f.T @ n).square().sum() for f, n in zip(far, near, strict=True))
    assert float(kernels_trace(far @ far.mT, near)) == pytest.approx(float(expected), rel=1e-12)
