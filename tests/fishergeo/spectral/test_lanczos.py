"""Block Lanczos: every pair within its certificate, on easy and on hard spectra; interrupted or not; alone or not."""

import warnings

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from geometry_cases import gaussian, orthonormal
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from spectrum_cases import KINDS, matrices, spectrum, with_spectrum

import fishergeo as fg
from fishergeo import _storage
from fishergeo._linalg import directions, orthonormalise

SLOW = {"max_examples": 25, "deadline": None}


def ordered(matrix, which="largest"):
    values = torch.from_numpy(np.linalg.eigvalsh(matrix.double().numpy()))
    key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
    return values[key.argsort(stable=True)]


def true_residuals(matrix, found):
    vectors, values = found.vectors.double(), found.values.double()
    return (matrix.double() @ vectors - vectors * values).norm(dim=0)


def close(actual, expected, tol=1e-9):
    scale = max(float(expected.abs().max()), 1e-300)
    assert float((actual.double() - expected.double()).abs().max()) <= tol * scale


def counted(matrix):
    """A function of blocks that counts its calls and the columns of the widest."""

    def product(block):
        product.calls += 1
        product.widest = max(product.widest, block.shape[1])
        return matrix @ block

    product.calls = product.widest = 0
    return product


@settings(max_examples=60, deadline=None)
@given(matrices(), st.data())
def test_every_pair_is_within_its_certificate_and_right(matrix, data):
    n = len(matrix)
    k = data.draw(st.integers(1, n))
    which = data.draw(st.sampled_from(["largest", "smallest", "magnitude"]))
    found = fg.lanczos(matrix, k, which=which, seed=data.draw(st.integers(0, 99)), tol=1e-9, strict=True)
    assert bool((true_residuals(matrix, found) <= found.residuals).all())
    assert found.converged and found.satisfied and found.values.shape == (k,) and found.vectors.shape == (n, k)
    close(found.vectors.T @ found.vectors, torch.eye(k), 1e-12)
    scale = float(np.abs(np.linalg.eigvalsh(matrix.numpy())).max())
    expected = ordered(matrix, which)[:k]
    # In order of magnitude, ±λ may trade places within rounding.
    gaps = (found.values.abs() - expected.abs()) if which == "magnitude" else (found.values - expected)
    assert float(gaps.abs().max()) <= 1e-8 * scale


@settings(**SLOW)
@given(matrices(low=8), st.integers(1, 6), st.integers(1, 12), st.booleans())
def test_certificates_hold_whatever_the_allowance(matrix, k, allowance, recheck):
    block = min(k, 3)
    product = counted(matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.ConvergenceWarning)
        found = fg.lanczos(product, k, size=len(matrix), block=block, max_passes=allowance, recheck=recheck)
    assert product.calls == found.passes <= allowance and product.widest <= block
    assert bool((true_residuals(matrix, found) <= found.residuals).all())
    limit = (torch.finfo(torch.float64).eps ** 0.5 * found.values.abs()).clamp_min(1e-13 * matrix.norm())
    assert bool((true_residuals(matrix, found) <= 2 * limit)[found.pairs_converged].all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [None, 3])
def test_larger_matrices_that_need_restarts(kind, block):
    matrix = with_spectrum(spectrum(kind, 240, 1), 1)
    found = fg.lanczos(matrix, 8, block=block, basis=40, tol=1e-7, max_passes=2000, strict=True)
    assert bool((true_residuals(matrix, found) <= found.residuals).all())
    scale = max(float(matrix.abs().max()), 1e-300)
    copies = 8 if block is None or kind not in ("repeated",) else 3  # more copies than columns are not promised
    assert float((found.values - ordered(matrix)[:8])[:copies].abs().max()) <= 1e-6 * scale * 240


@given(matrices(low=6, kinds=("power law", "indefinite", "clustered")), st.integers(-60, 60))
def test_a_power_of_two_changes_nothing_but_the_scale(matrix, exponent):
    one, other = fg.lanczos(matrix, 3), fg.lanczos(matrix * 2.0**exponent, 3)
    assert torch.equal(one.vectors, other.vectors)
    assert torch.equal(one.values * 2.0**exponent, other.values)
    assert torch.equal(one.residuals * 2.0**exponent, other.residuals)


@given(matrices(low=6, kinds=("indefinite", "negative", "slow", "tiny")))
def test_the_smallest_are_the_largest_of_the_negative(matrix):
    small, large = fg.lanczos(matrix, 3, which="smallest"), fg.lanczos(-matrix, 3)
    close(small.values, -large.values, 1e-12)
    assert bool((small.values.diff() >= 0).all()) and bool((large.values.diff() <= 0).all())


@given(matrices(low=6, kinds=("power law", "indefinite", "rank deficient")), st.integers(1, 4))
def test_matrix_sparse_operator_and_function_give_the_same(matrix, k):
    dense = fg.lanczos(matrix, k)
    for same in (
        fg.lanczos(fg.DenseOperator(matrix), k),
        fg.lanczos(lambda block: matrix @ block, k, size=len(matrix)),
        fg.lanczos(matrix.to_sparse(), k),
    ):
        close(same.values, dense.values, 1e-10)
        assert same.passes == dense.passes


@settings(**SLOW)
@given(matrices(low=6, kinds=("power law", "slow", "indefinite")), st.integers(1, 3), st.integers(0, 99))
def test_bounds_on_values_hold_and_are_no_wider_than_residuals(matrix, k, seed):
    values = ordered(matrix)
    assume(k == len(values) or float((values[:-1] - values[1:])[:k].min()) > 1e-3 * float(values.abs().max()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.ConvergenceWarning)
        found = fg.lanczos(matrix, k, block=k, max_passes=4, tol=0.0, seed=seed)
    assert bool((found.value_bounds() <= found.residuals).all())
    # Some eigenvalue lies within each residual; where pairs are nearly converged it is the one of the same rank.
    distance = (values[None] - found.values[:, None]).abs().min(1).values
    assert bool((distance <= found.residuals + 1e-14 * values.abs().max()).all())
    settled = found.residuals < 1e-4 * values.abs().max()
    errors = (found.values - values[:k]).abs() - 1e-13 * values.abs().max()
    assert bool((errors <= found.value_bounds())[settled].all())


def test_the_quadratic_bound_is_the_one_of_kato_and_temple():
    found = fg.Spectrum(
        torch.tensor([5.0, 3.0, 1.0]), torch.eye(3), torch.tensor([0.1, 0.2, 0.1]), torch.ones(3).bool(), 1, 3, "passes"
    )
    close(found.value_bounds(), torch.tensor([0.01 / 1.8, 0.04 / 1.9, 0.1]), 1e-6)


def test_a_block_finds_every_copy_where_a_single_vector_misses_some():
    """The reason for the random block: exact arithmetic shows a single vector one copy of each eigenvalue only."""
    values = torch.cat([torch.tensor([5.0, 5.0, 5.0, 5.0, 4.5, 4.0, 3.5, 3.0]), torch.linspace(0, 0.1, 292)]).double()
    matrix = with_spectrum(values)
    block = fg.lanczos(matrix, 4, block=4, tol=1e-6)
    single = fg.lanczos(matrix, 4, block=1, tol=1e-6)
    assert torch.allclose(block.values, torch.full((4,), 5.0, dtype=torch.float64))
    assert int((single.values > 4.9).sum()) < 4
    # The certificate of the single vector is right all the same: these are eigenpairs, though not the leading ones.
    assert bool((true_residuals(matrix, single) <= single.residuals).all()) and single.converged


def test_a_cluster_is_resolved_by_the_block():
    near = torch.tensor([4.5, 4.0, 3.5, 3.0])
    values = torch.cat([5 + 1e-9 * torch.arange(4).double(), near, torch.linspace(0, 0.1, 292)])
    matrix = with_spectrum(values)
    assert bool((fg.lanczos(matrix, 4, tol=1e-6).values > 4.9).all())
    assert int((fg.lanczos(matrix, 4, block=1, tol=1e-6).values > 4.9).sum()) < 4


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["power law", "slow", "indefinite", "clustered", "condition 1e12"]), st.integers(0, 99))
def test_half_of_the_passes_of_scipy_for_the_same_pairs(kind, seed):
    matrix = with_spectrum(spectrum(kind, 200, seed), seed)
    product = counted(matrix)
    found = fg.lanczos(product, 8, size=200, tol=1e-8, strict=True)
    calls = 0

    def single(vector):
        nonlocal calls
        calls += 1
        return matrix.numpy() @ vector

    operator = scipy.sparse.linalg.LinearOperator((200, 200), matvec=single, dtype=np.float64)
    start = np.random.default_rng(seed).normal(size=200)
    values, vectors = scipy.sparse.linalg.eigsh(operator, 8, which="LA", tol=1e-8, v0=start)
    assert 2 * product.calls <= calls
    # Inside a cluster a residual of 2e-8 bounds a value to first order only.
    close(found.values, torch.from_numpy(values[::-1].copy()), 2e-8 if kind == "clustered" else 1e-10)
    if kind != "clustered":
        theirs = torch.from_numpy(vectors[:, ::-1].copy())
        assert float((found.vectors * theirs).sum(0).abs().min()) > 1 - 1e-6


@settings(**SLOW)
@given(matrices(low=10), st.integers(1, 5), st.integers(1, 12))
def test_a_warm_start_from_the_answer_is_done_at_once(matrix, k, extra):
    n = len(matrix)
    vectors = torch.linalg.eigh(matrix)[1].flip(1)[:, : min(n, k + extra)]
    found = fg.lanczos(matrix, k, start=vectors, tol=1e-8, max_passes=20, strict=True)
    assert found.passes <= -(-min(n, k + extra) // k) + 2
    close(found.values, ordered(matrix)[:k], 1e-8)


@settings(**SLOW)
@given(matrices(low=12, kinds=("power law", "slow", "indefinite", "negative")), st.integers(0, 99), st.integers(1, 14))
def test_any_start_leads_to_the_same_pairs(matrix, seed, columns):
    start = gaussian(seed + 5000, len(matrix), columns)
    start[:, -1] = start[:, 0]  # dependent columns are dropped
    found = fg.lanczos(matrix, 3, block=2, start=start, strict=True)
    close(found.values, ordered(matrix)[:3], 1e-9)


def test_a_warm_start_saves_passes():
    matrix = with_spectrum(spectrum("slow", 200))
    cold = fg.lanczos(matrix, 8)
    start = torch.linalg.qr(cold.vectors + 1e-4 * gaussian(0, 200, 8)).Q
    assert fg.lanczos(matrix, 8, start=start).passes < cold.passes


@settings(**SLOW)
@given(st.floats(0.05, 0.999), st.integers(0, 99))
def test_the_energy_stop_holds_what_it_says_with_as_few_pairs(energy, seed):
    matrix = with_spectrum(spectrum("power law", 30), seed)
    found = fg.lanczos(fg.DenseOperator(matrix), 30, block=5, energy=energy, recheck=False)
    captured = float((found.vectors * (matrix @ found.vectors)).sum() / matrix.trace())
    assert captured >= energy - 1e-9 and found.stopped == "energy" and found.satisfied
    without_last = found.vectors[:, :-1]
    assert float((without_last * (matrix @ without_last)).sum() / matrix.trace()) < energy
    assert len(found.values) >= fg.rank_for_energy(ordered(matrix).clamp_min(0), energy=energy)


def test_gradients_and_half_precision_products_are_no_obstacle():
    matrix = with_spectrum(spectrum("power law", 30))
    plain = fg.lanczos(matrix, 3)
    tracked = fg.lanczos(matrix.clone().requires_grad_(), 3, start=torch.ones(30, 1).requires_grad_())
    assert not tracked.values.requires_grad
    close(tracked.values, plain.values, 1e-10)
    half = fg.lanczos(matrix.bfloat16(), 3)
    assert half.values.dtype == torch.float32
    assert bool((true_residuals(matrix.bfloat16(), half) <= half.residuals.double()).all())
    assert bool(((half.values - plain.values).abs() <= half.residuals).all())
    with pytest.warns(fg.ConvergenceWarning):
        wide = fg.lanczos(torch.diag(torch.linspace(0, 1, 2000)).bfloat16(), 2, max_passes=3)
    assert float((wide.vectors.T @ wide.vectors - torch.eye(2)).abs().max()) < 1e-5
    # A function that computes in single precision inside is symmetric only to that.
    inner = matrix.float()
    single = fg.lanczos(lambda block: (inner @ block.float()).double(), 3, size=30, tol=1e-5, strict=True)
    close(single.values, plain.values, 1e-6)


def test_energy_that_k_pairs_cannot_hold_ends_with_converged_pairs():
    matrix = torch.eye(20, dtype=torch.float64)
    found = fg.lanczos(matrix, 3, energy=0.9, trace=20.0)
    assert found.stopped == "tolerance" and found.converged and len(found.values) == 3


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 12), st.sampled_from(["slow", "indefinite", "rank deficient"]), st.booleans())
def test_a_run_that_is_cut_off_goes_on_bit_for_bit(tmp_path_factory, cut, kind, warm):
    path = tmp_path_factory.mktemp("lanczos") / "run.safetensors"
    matrix = with_spectrum(spectrum(kind, 60))
    start = gaussian(1, 60, 7) if warm else None
    options = {"size": 60, "block": 3, "basis": 14, "tol": 1e-9, "start": start}
    whole = fg.lanczos(matrix.__matmul__, 4, **options)
    calls = 0

    def breaks(block):
        nonlocal calls
        calls += 1
        if calls > cut:
            raise KeyboardInterrupt
        return matrix @ block

    try:
        fg.lanczos(breaks, 4, checkpoint=path, **options)
    except KeyboardInterrupt:
        assert calls == cut + 1
    after = counted(matrix)
    resumed = fg.lanczos(after, 4, checkpoint=path, **options)
    assert after.calls == max(0, whole.passes - cut)
    for key in ("values", "vectors", "residuals", "pairs_converged"):
        assert torch.equal(getattr(whole, key), getattr(resumed, key)), key
    assert (whole.passes, whole.columns, whole.stopped) == (resumed.passes, resumed.columns, resumed.stopped)
    assert torch.equal(fg.lanczos(None.__eq__, 4, checkpoint=path, **options).values, whole.values)  # read back only


def test_a_run_without_enough_passes_goes_on_when_it_gets_more(tmp_path):
    matrix, path = with_spectrum(spectrum("slow", 120)), tmp_path / "run.safetensors"
    with pytest.warns(fg.ConvergenceWarning):
        first = fg.lanczos(matrix, 4, max_passes=6, checkpoint=path)
    second = fg.lanczos(matrix, 4, max_passes=200, checkpoint=path, strict=True)
    assert first.passes == 6 < second.passes
    close(second.values, ordered(matrix)[:4], 1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"k": 5}, "with k=4 and not 5"), ({"seed": 1}, "seed=0"), ({"size": 61}, "size=60"), ({"tol": 0.1}, "tol=")],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    path = tmp_path / "run.safetensors"
    fg.lanczos(torch.eye(60), 4, block=4, basis=20, checkpoint=path)
    options = {"k": 4, "size": 60, "block": 4, "basis": 20, "checkpoint": path, "dtype": torch.float32, **change}
    with pytest.raises(ValueError, match=message):
        fg.lanczos(lambda block: block, **options)


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(b"nothing of use")
    with pytest.raises(ValueError, match="not a readable"):
        fg.lanczos(torch.eye(6), 2, checkpoint=path)
    _storage.write(path, {"x": torch.eye(2)}, {"fisher": {}})
    with pytest.raises(ValueError, match="not a checkpoint"):
        fg.lanczos(torch.eye(6), 2, checkpoint=path)
    _storage.write(path, {}, {"lanczos": {"": {"plan": {}}}})
    with pytest.raises(ValueError, match="is missing"):
        fg.lanczos(torch.eye(6), 2, checkpoint=path)
    _storage.write(path, {}, {"lanczos": {"other": {}}})
    with pytest.raises(ValueError, match="layers"):
        fg.lanczos(torch.eye(6), 2, checkpoint=path)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_fuzzed_checkpoint_gives_a_named_error_or_the_right_answer(tmp_path_factory, data):
    path, matrix = tmp_path_factory.mktemp("lanczos") / "run.safetensors", with_spectrum(spectrum("slow", 20))
    with pytest.warns(fg.ConvergenceWarning):
        fg.lanczos(matrix, 2, max_passes=3, recheck=False, checkpoint=path)
    if data.draw(st.booleans()):  # a bit changes, or the file's end is lost
        raw = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - 40]))])
    else:  # a tensor has another shape
        file = _storage.TensorFile(path)
        keys = ["basis", "image", "pending", "partial", "projected", "values", "rotation", "found"]
        tensors = {f"|{key}": file.tensor(f"|{key}") for key in keys}
        changed = f"|{data.draw(st.sampled_from(keys[:-1]))}"
        tensors[changed] = torch.zeros(3, dtype=torch.float64)
        _storage.write(path, tensors, {"lanczos": file.header["lanczos"]})
    try:
        found = fg.lanczos(matrix, 2, max_passes=200, recheck=False, checkpoint=path)
    except (ValueError, TypeError) as error:
        assert "run.safetensors" in str(error)
    else:
        close(found.values, ordered(matrix)[:2], 1e-6)


def test_unconverged_pairs_are_never_marked_converged():
    matrix = with_spectrum(torch.linspace(1, 2, 300, dtype=torch.float64))
    with pytest.warns(fg.ConvergenceWarning, match="of 6 eigenpairs have not converged after 5 passes"):
        found = fg.lanczos(matrix, 6, max_passes=5)
    assert not found.converged and not found.satisfied and found.stopped == "passes"
    with pytest.raises(fg.ConvergenceError, match="max_passes") as caught:
        fg.lanczos(matrix, 6, max_passes=5, strict=True)
    assert torch.equal(caught.value.spectrum.values, found.values)


def test_products_noisier_than_the_tolerance_stall_and_say_so():
    matrix, generator = with_spectrum(spectrum("power law", 30)), torch.Generator().manual_seed(0)

    def noisy(block):
        noise = torch.randn(30, 1, generator=generator, dtype=torch.float64)
        return matrix @ block + 1e-9 * noise @ (noise.T @ block)  # symmetric, but not the same twice

    with pytest.warns(fg.ConvergenceWarning):
        found = fg.lanczos(noisy, 4, size=30, tol=1e-12)
    assert found.stopped == "stalled" and not found.converged
    assert float(found.residuals.max()) > 1e-11


@settings(**SLOW)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 9))
def test_lockstep_is_every_layer_alone_and_a_pass_counts_once_for_all(kinds, k, seed):
    layers = {f"{i}": with_spectrum(spectrum(kind, 12 + 5 * i, seed), seed) for i, kind in enumerate(kinds)}

    class Together:
        sizes = {name: len(matrix) for name, matrix in layers.items()}  # noqa: RUF012
        dtype, device, passes = torch.float64, torch.device("cpu"), 0

        def multi_matmul(self, blocks):
            self.passes += 1
            return {name: layers[name] @ block for name, block in blocks.items()}

    together = Together()
    found = fg.lanczos_layers(together, k, seed=seed)
    assert together.passes == max(result.passes for result in found.values())
    alone = fg.lanczos_layers({name: fg.DenseOperator(m) for name, m in layers.items()}, k, seed=seed)
    for name, matrix in layers.items():
        assert torch.equal(found[name].vectors, alone[name].vectors) and found[name].passes == alone[name].passes
        one = fg.lanczos_layers({name: fg.DenseOperator(matrix)}, k, seed=seed)[name]
        assert torch.equal(found[name].vectors, one.vectors) and torch.equal(found[name].values, one.values)


def test_layers_in_lockstep_resume_from_one_file(tmp_path):
    layers = {"a|b": with_spectrum(spectrum("slow", 40)), "c.d": with_spectrum(spectrum("rank deficient", 25))}
    ops, path, calls = {name: fg.DenseOperator(m) for name, m in layers.items()}, tmp_path / "all.safetensors", 0

    class Breaks:
        sizes = {name: len(m) for name, m in layers.items()}  # noqa: RUF012
        dtype, device = torch.float64, torch.device("cpu")

        def multi_matmul(self, blocks):
            nonlocal calls
            calls += 1
            if calls == 5:
                raise KeyboardInterrupt
            return {name: layers[name] @ block for name, block in blocks.items()}

    with pytest.raises(KeyboardInterrupt):
        fg.lanczos_layers(Breaks(), 3, checkpoint=path)
    resumed, whole = fg.lanczos_layers(Breaks(), 3, checkpoint=path), fg.lanczos_layers(ops, 3)
    for name in layers:
        assert torch.equal(resumed[name].vectors, whole[name].vectors) and resumed[name].passes == whole[name].passes
    assert calls == 5 + max(f.passes for f in whole.values()) - 4


def test_layers_smaller_than_k_give_all_they_have_and_energies_are_per_layer():
    ops = {"small": fg.DenseOperator(torch.eye(2)), "large": fg.DenseOperator(torch.diag(torch.arange(1.0, 31.0)))}
    found = fg.lanczos_layers(ops, 4)
    assert [len(f.values) for f in found.values()] == [2, 4]
    found = fg.lanczos_layers(ops, 30, energy=0.5)
    assert [len(f.values) for f in found.values()] == [1, 9]


@settings(**SLOW)
@given(matrices(low=6, kinds=("power law", "slow", "clustered", "repeated", "indefinite", "tiny", "huge")))
def test_single_precision_keeps_its_certificates_too(matrix):
    single = matrix.float()
    found = fg.lanczos(single, 3, strict=True)
    assert found.values.dtype == torch.float32
    assert bool((true_residuals(single, found) <= found.residuals.double()).all())
    close(found.values, ordered(single)[:3], 1e-4)


@given(st.integers(1, 30), st.integers(0, 8), st.integers(0, 8), st.integers(0, 99), st.sampled_from([1e-14, 1e-3, 1]))
def test_orthonormal_blocks_are_orthonormal_and_span_what_was_new(size, known, added, seed, scale):
    known, added = min(known, size), min(added, size)
    basis = orthonormal(seed, size, known)
    block = scale * gaussian(seed + 1, size, added) + basis @ gaussian(seed + 2, known, added)
    if added > 1:
        block[:, 1] = block[:, 0]
    new = orthonormalise(block, basis, 1e-12)
    both = torch.cat([basis, new], 1)
    assert float((both.T @ both - torch.eye(both.shape[1])).abs().max() if both.numel() else 0) < 1e-12
    left = block - both @ (both.T @ block)
    assert float(left.norm()) <= 1e-10
    assert new.shape[1] <= size - known


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 99), st.integers(0, 9))
def test_random_directions_depend_on_their_counter_only(size, columns, seed, first):
    whole = directions(size, first + columns, seed, "layer")
    assert torch.equal(whole[:, first:], directions(size, columns, seed, "layer", first))
    assert not torch.equal(whole, directions(size, first + columns, seed, "other"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pairs_are_the_same_on_every_device():
    matrix = with_spectrum(spectrum("power law", 80))
    here, there = fg.lanczos(matrix, 5), fg.lanczos(matrix.cuda(), 5)
    close(there.vectors.cpu(), here.vectors, 1e-7)
    close(there.values.cpu(), here.values, 1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fg.lanczos(torch.eye(3), 4), ValueError, "k must be at least 1 and at most 3"),
        (lambda: fg.lanczos(torch.ones(3, 2), 1), ValueError, "op must be square"),
        (lambda: fg.lanczos(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), 1), ValueError, "op must be symmetric"),
        (lambda: fg.lanczos(torch.eye(3) / 0, 1), ValueError, "op has"),
        (lambda: fg.lanczos(torch.eye(3, dtype=torch.int64), 1), TypeError, "op must be a real floating"),
        (lambda: fg.lanczos("A", 1), TypeError, "op must be a SymmetricOperator"),
        (lambda: fg.lanczos(lambda x: x, 1), ValueError, "pass size="),
        (lambda: fg.lanczos(lambda x: x[:1], 1, size=3), ValueError, "returned .1, 1. for a block of .3, 1."),
        (lambda: fg.lanczos(lambda x: x / 0, 1, size=3), FloatingPointError, "NaN or infinity"),
        (lambda: fg.lanczos(lambda x: x.cumsum(0), 2, size=9), ValueError, "operator is not symmetric"),
        (lambda: fg.lanczos(torch.eye(3), 1, energy=0.5), ValueError, "energy needs the trace"),
        (lambda: fg.lanczos(torch.eye(3), 1, energy=1.5, trace=3), ValueError, "energy must be"),
        (lambda: fg.lanczos(torch.eye(3), 1, energy=0.5, trace=3, which="smallest"), ValueError, "largest values"),
        (lambda: fg.lanczos(torch.eye(3), 1, which="LA"), ValueError, "which must be one of 'largest'"),
        (lambda: fg.lanczos(torch.eye(3), 1, tol=-1.0), ValueError, "tol must be"),
        (lambda: fg.lanczos(torch.eye(30), 4, basis=5), ValueError, "basis=5 is too small"),
        (lambda: fg.lanczos(torch.eye(3), 1, start=torch.ones(4, 1)), ValueError, "start must be"),
        (lambda: fg.lanczos(torch.eye(3), 1, max_passes=0), ValueError, "max_passes must be"),
        (lambda: fg.lanczos_layers({}, 1), ValueError, "ops is empty"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_quadratic_bound_is_for_pairs_that_have_converged_among_such():
    """Beside an unconverged value other eigenvalues may lie in the gap, and then the quadratic bound is none."""
    values, residuals = torch.tensor([5.0, 3.0, 1.0, 0.5]), torch.tensor([0.1, 0.2, 0.1, 0.1])
    for converged, certain in (([1, 1, 0, 1], [1, 2]), ([0, 1, 1, 1], [0, 1]), ([1, 0, 1, 1], [0, 1, 2])):
        flags = torch.tensor(converged).bool()
        bounds = fg.Spectrum(values, torch.eye(4), residuals, flags, 1, 4, "passes").value_bounds()
        quadratic = [i for i in range(3) if i not in certain]
        assert torch.equal(bounds[certain], residuals[certain]) and bool(
            (bounds[quadratic] < residuals[quadratic]).all()
        )


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_the_operator_of_a_spectrum_has_its_largest_pair_first(which):
    matrix = with_spectrum(torch.linspace(-3, 2, 30, dtype=torch.float64))
    found = fg.lanczos(matrix, 4, which=which)
    operator = found.operator()
    values, vectors = operator.known_eigenpairs()
    assert values.tolist() == sorted(found.values.tolist(), reverse=True)
    close(operator.to_dense() @ vectors, values * vectors, 1e-9)
    # What the operator has beside them is zero, which is more than a negative one.
    assert float(operator.eigh(1)[0]) == pytest.approx(max(float(found.values.max()), 0.0), abs=1e-12)
    close(operator.to_dense(), (found.vectors * found.values) @ found.vectors.T, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pairs_are_right_to_a_rounding_however_large_the_operator(dtype):
    """The limit of convergence once grew with √size and reached the norm itself."""
    matrix = with_spectrum(torch.logspace(0, -4, 1024, dtype=torch.float64)).to(dtype)
    found = fg.lanczos(matrix, 4)
    eps = torch.finfo(dtype).eps
    assert found.converged and float((found.values.double() - ordered(matrix)[:4]).abs().max()) < 4 * eps
    residuals = true_residuals(matrix, found)
    assert bool((residuals <= found.residuals).all()) and float(found.residuals.max()) <= 8 * eps


def test_layers_of_several_dtypes_are_each_multiplied_in_their_own():
    single, double = (with_spectrum(spectrum("slow", 60, seed), seed) for seed in (1, 2))
    layers = {"half": torch.eye(60).bfloat16(), "single": single.float(), "double": double}
    for names in (("half", "single", "double"), ("double", "single", "half")):
        found = fg.lanczos_layers({name: layers[name] for name in names}, 3, tol=1e-10)
        for name, rounding in (("half", 1e-2), ("single", 1e-5), ("double", 1e-12)):
            assert found[name].values.dtype == torch.float64 and found[name].converged
            close(found[name].values, ordered(layers[name])[:3], rounding)
            assert bool((true_residuals(layers[name], found[name]) <= found[name].residuals).all())
            assert float(found[name].residuals.max()) <= max(1e-10, 10 * rounding)


@settings(**SLOW)
@given(st.integers(4, 30), st.integers(1, 12), st.integers(0, 999), st.booleans())
def test_bounds_on_values_of_both_signs_hold_by_magnitude(size, k, seed, paired):
    """The nearest eigenvalues are not the neighbours in the list, and others lie between them that were not returned."""
    values = gaussian(seed, size)
    if paired:  # ±λ, nearly
        values = torch.cat([values, -values * (1 + 1e-3 * gaussian(seed + 1, size))])
    values, k = values[values.abs().argsort(descending=True)], min(k, size)
    for noise in (1e-1, 1e-2, 1e-3):
        # Rayleigh-Ritz pairs of a space near the leading one, of a diagonal matrix.
        wanted = torch.eye(len(values), k, dtype=torch.float64)
        space = torch.linalg.qr(wanted + noise * gaussian(seed + 2, len(values), k)).Q
        theta, rotation = torch.linalg.eigh(space.T @ (values[:, None] * space))
        order = theta.abs().argsort(descending=True)
        theta, vectors = theta[order], space @ rotation[:, order]
        residuals = (values[:, None] * vectors - vectors * theta).norm(dim=0)
        # Where each value stands for an eigenvalue of its own, as of pairs that have converged.
        near = (theta[:, None] - values[:k]).abs().argmin(1)
        if len(set(near.tolist())) < k or bool(((theta - values[near]).abs() > residuals).any()):
            continue
        found = fg.Spectrum(theta, vectors, residuals, torch.ones(k).bool(), 1, k, "tolerance")
        assert bool(((theta - values[near]).abs() <= found.value_bounds() + 1e-13).all())


def test_a_value_of_the_other_sign_does_not_widen_the_gap():
    values, residuals = torch.tensor([5.0, -4.9, 4.8, -1.0]), torch.full((4,), 0.01)
    bounds = fg.Spectrum(values, torch.eye(4), residuals, torch.ones(4).bool(), 1, 4, "tolerance").value_bounds()
    close(bounds, torch.tensor([1e-4 / 0.19, 1e-4 / 3.89, 1e-4 / 0.19, 0.01]), 1e-5)
    # 3.0 may come next: only to a distance of |θ| − |θ_last| is nothing else known to lie.
    bounds = fg.Spectrum(
        torch.tensor([3.1, -3.0]), torch.eye(2), torch.tensor([0.2, 0.0]), torch.ones(2).bool(), 1, 2, "tolerance"
    ).value_bounds()
    close(bounds, torch.tensor([0.2, 0.0]), 1e-6)


@pytest.mark.parametrize("trace", [10.0, -1.0, 0.0, float("nan"), float("inf")])
def test_a_trace_that_cannot_be_is_refused_rather_than_called_reached(trace):
    matrix = torch.diag(torch.arange(100.0, 0.0, -1.0, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^trace must be finite and at least"):
        fg.lanczos(matrix, 5, energy=0.9, trace=trace)
    with pytest.raises(ValueError, match=r"^layer 'a': trace must be finite and at least"):
        fg.lanczos_layers({"a": fg.DenseOperator(matrix)}, 5, energy=0.9, traces={"a": trace})
    assert fg.lanczos(matrix, 5, energy=0.05, trace=float(matrix.trace()) * (1 - 1e-7)).stopped == "energy"


def test_a_start_of_an_unknown_layer_is_refused():
    ops = {"a": fg.DenseOperator(torch.eye(5))}
    with pytest.raises(ValueError, match=r"start has layers that ops lacks: \['unknown'\]; it has \['a'\]"):
        fg.lanczos_layers(ops, 1, start={"a": torch.ones(5, 1), "unknown": torch.ones(5, 1)})


@pytest.mark.parametrize("trace", [1e-3, -1.0])
def test_a_second_pass_refuses_a_trace_below_what_it_finds(trace):
    matrix = torch.diag(torch.arange(10.0, 0.0, -1.0, dtype=torch.float64))

    class Stream:
        sizes, dtype, device = {"a": 10}, torch.float64, torch.device("cpu")

        def multi_matmul(self, blocks):
            return {name: matrix @ block for name, block in blocks.items()}

    sketch = {"a": fg.nystrom(matrix, 6).operator()}
    with pytest.raises(ValueError, match=r"^layer 'a': trace must be finite and at least"):
        fg.second_pass(sketch, Stream(), 4, traces={"a": trace})
    found = fg.second_pass(sketch, Stream(), 4, traces={"a": 55.0})["a"]
    assert bool((true_residuals(matrix, found) <= found.residuals).all())
