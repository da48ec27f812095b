"""Streaming sketches: below the sum, exact where they can be, mergeable, and honest about their error."""

import pytest
import torch
from geometry_cases import SEEDS, assert_close, gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from spectrum_cases import matrices, spectrum, with_spectrum

import fishergeo as fg
from fishergeo.sketching import PsdSketch, factor_eigh, probe_matrix
from fishergeo.sketching.error import factor_error, probe_error

PSD = ("power law", "slow", "clustered", "repeated", "rank deficient", "condition 1e12", "tiny", "identity", "zero")


@given(matrices(kinds=PSD), st.integers(1, 45), st.integers(0, 99))
def test_a_nystrom_sketch_never_exceeds_what_it_sketches(matrix, columns, seed):
    factor = fg.nystrom(matrix, columns, seed=seed).factor()
    scale = torch.linalg.matrix_norm(matrix, 2)
    assert torch.linalg.eigvalsh(matrix - factor @ factor.T)[0] >= -1e-12 * scale
    values = torch.linalg.eigvalsh(matrix).flip(0)
    ours = fg.nystrom(matrix, columns, seed=seed).eigh()[0]
    assert bool((ours <= values[: len(ours)] + 1e-12 * scale).all()) and bool((ours.diff() <= 0).all())


@given(st.integers(1, 8), st.integers(10, 14), SEEDS)  # as few columns as directions may leave one of them nearly out
def test_a_nystrom_sketch_is_exact_up_to_its_width(rank, columns, seed):
    factor = gaussian(seed, 20, rank)
    sketch = fg.nystrom(factor @ factor.T, columns, seed=seed)
    assert_close(sketch.operator().to_dense(), factor @ factor.T, 1e-8)
    assert fg.nystrom(factor @ factor.T, 25, seed=seed).error().spectral == 0


@given(st.integers(1, 6), st.integers(1, 12), SEEDS, st.floats(0, 3))
def test_sketches_add_up_whatever_the_order_and_the_split(count, columns, seed, weight):
    terms = [x @ x.T for x in (gaussian(seed + i, 15, 2) for i in range(count))]
    parts = []
    for term in terms:
        parts.append(fg.NystromSketch(15, columns, seed=3))
        parts[-1].add_operator(term, weight)
    forward, backward = parts[0], parts[-1]
    for part in parts[1:]:
        forward = forward.merge(part)
    for part in parts[-2::-1]:
        backward = backward.merge(part)
    whole = fg.nystrom(weight * sum(terms), columns, seed=3)
    scaled = fg.nystrom(sum(terms), columns, seed=3).scaled(weight)
    for other in (backward, whole, scaled):
        assert_close(forward.product, other.product, 1e-12)
        assert forward.trace == pytest.approx(other.trace)


def test_a_term_without_a_trace_leaves_the_trace_unknown_and_estimated():
    matrix = with_spectrum(spectrum("slow", 40))
    sketch = fg.nystrom(matrix.__matmul__, 6, size=40, probes=30)
    assert sketch.trace is None and sketch.operator().full_trace is None
    estimate, exact = sketch.error(), fg.nystrom(matrix, 6, probes=30).error()
    assert estimate.trace == pytest.approx(exact.trace, rel=0.3) and estimate.trace_bound > exact.trace
    assert exact.trace == exact.trace_bound == pytest.approx(float(matrix.trace() - sketch.eigh()[0].sum()))
    assert estimate.energy < exact.energy


@pytest.mark.parametrize("kind", ["slow", "condition 1e12", "one missing"])
@pytest.mark.parametrize("known_trace", [True, False])
def test_error_bounds_cover_the_truth_in_95_percent_of_trials(kind, known_trace):
    values = spectrum("power law" if kind == "one missing" else kind, 30)
    if kind == "one missing":  # rank-one error, the least favourable case
        values = torch.cat([torch.full((5,), 1e3), torch.ones(1), torch.zeros(24)]).double()
    matrix = with_spectrum(values)
    trials, covered, tight = 120, torch.zeros(3), []
    for seed in range(trials):
        sketch = fg.nystrom(matrix.__matmul__, 5, size=30, seed=seed, trace=matrix.trace() if known_trace else None)
        error = matrix - sketch.operator().to_dense()
        found = sketch.error(level=0.95)
        norm, trace = float(torch.linalg.matrix_norm(error, 2)), float(error.trace())
        energy = float(1 - trace / matrix.trace())
        slack = 1 + 1e-9
        covered += torch.tensor(
            [norm <= found.spectral * slack, trace <= found.trace_bound * slack, energy >= found.energy / slack]
        )
        tight.append(found.spectral / norm)
    assert float(covered.min()) >= 0.95 * trials - 3 * (trials * 0.95 * 0.05) ** 0.5
    assert sorted(tight)[trials // 2] < 8  # and the bound says something


def test_the_streaming_sketch_measures_itself_too():
    """Its test matrix learns as it goes; the probes it holds back do not."""
    basis = torch.linalg.qr(gaussian(0, 24, 24)).Q * torch.arange(1, 25, dtype=torch.float64) ** -0.5
    terms = [x @ x.T for x in (basis @ gaussian(i, 24, 2) for i in range(30))]
    whole, trials, covered = sum(terms), 60, 0
    for seed in range(trials):
        images = torch.zeros(24, 6, dtype=torch.float64)
        sketch = PsdSketch(24, 5, seed, "layer", torch.float64, torch.device("cpu"), probed=images)
        bare = PsdSketch(24, 5, seed, "layer", torch.float64, torch.device("cpu"))
        for term in terms:
            sketch.add(term @ sketch.omega, 1)
            bare.add(term @ bare.omega, 1)
        assert torch.allclose(sketch.close(), bare.close(), atol=1e-9)  # holding back changes nothing
        probes = probe_matrix(24, 6, seed, "layer")
        found = factor_error(*factor_eigh(sketch.factor, 5), probes, images)
        norm = float(torch.linalg.matrix_norm(whole - sketch.factor @ sketch.factor.T, 2))
        covered += norm <= found.spectral
        exact = factor_error(*factor_eigh(sketch.factor, 3), probes, images, trace=float(whole.trace()))
        assert exact.trace == pytest.approx(
            float(whole.trace() - torch.linalg.svdvals(sketch.factor)[:3].square().sum())
        )
    assert covered >= 0.95 * trials - 3 * (trials * 0.95 * 0.05) ** 0.5
    with pytest.raises(ValueError, match="probes=0"):
        factor_error(*factor_eigh(bare.factor, 5), probes[:, :0], images[:, :0])


def test_the_frobenius_estimate_is_unbiased_by_its_square():
    matrix = with_spectrum(spectrum("slow", 20))
    error = matrix - fg.nystrom(matrix, 4).operator().to_dense()
    z = gaussian(1, 20, 20000)
    found = probe_error(error @ z, z, 0.0)
    assert found.frobenius == pytest.approx(float(error.norm()), rel=0.02)
    assert found.trace == pytest.approx(float(error.trace()), rel=0.02)


def test_pieces_of_a_rank_are_measured_as_such():
    matrix = with_spectrum(spectrum("power law", 40))
    sketch = fg.nystrom(matrix, 20, probes=40)
    errors = [sketch.error(k).trace for k in (2, 8, 20)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(float(matrix.trace() - sketch.eigh(2)[0].sum()))


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(2, 10), SEEDS, st.floats(0, 2))
def test_frequent_directions_keep_their_deterministic_bound(n, rows, size, seed, decay):
    a = gaussian(seed, n, size) * torch.arange(1, size + 1, dtype=torch.float64) ** -decay
    sketch = fg.FrequentDirections(size, rows)
    for piece in a.split(3):
        sketch.add(piece)
    b = sketch.matrix()
    gap = torch.linalg.eigvalsh(a.T @ a - b.T @ b)
    scale = float(a.square().sum())
    assert len(b) <= rows and float(gap[0]) >= -1e-12 * scale
    assert float(gap[-1]) <= sketch.bound + 1e-12 * scale
    squares = torch.linalg.svdvals(a).square()
    for k in range(rows):
        assert sketch.bound <= float(squares[k:].sum()) / (rows - k) + 1e-12 * scale
    assert sketch.squares == pytest.approx(scale)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), st.integers(1, 6), SEEDS)
def test_merged_frequent_directions_keep_the_bound_of_both_streams(lengths, rows, seed):
    parts, pieces = [], []
    for i, n in enumerate(lengths):
        pieces.append(gaussian(seed + i, n, 8))
        parts.append(fg.FrequentDirections(8, rows))
        parts[-1].add(pieces[-1])
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    a, b = torch.cat(pieces), merged.matrix()
    gap, squares = torch.linalg.eigvalsh(a.T @ a - b.T @ b), torch.linalg.svdvals(a).square()
    assert len(b) <= rows and float(gap[0]) >= -1e-10 and float(gap[-1]) <= merged.bound + 1e-10
    for k in range(rows):
        assert merged.bound <= float(squares[k:].sum()) / (rows - k) + 1e-10


@given(st.integers(1, 5), SEEDS)
def test_frequent_directions_are_exact_below_their_rank(rank, seed):
    a = gaussian(seed, 40, rank) @ gaussian(seed + 1, rank, 9)
    sketch = fg.FrequentDirections(9, 6)
    sketch.add(a)
    assert_close(sketch.operator().to_dense(), a.T @ a, 1e-8)
    assert sketch.bound <= 1e-12 * sketch.squares
    assert float(sketch.operator().full_trace) == pytest.approx(float(a.square().sum()))


def test_an_empty_stream_is_zero():
    assert fg.FrequentDirections(4, 2).matrix().shape == (0, 4)
    assert float(fg.NystromSketch(4, 2).operator().to_dense().abs().max()) == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fg.NystromSketch(0, 2), ValueError, "size must be"),
        (lambda: fg.NystromSketch(3, 2, dtype=torch.float16), TypeError, "dtype must be"),
        (lambda: fg.NystromSketch(3, 2).add(torch.ones(3, 2)), ValueError, "product must have shape"),
        (lambda: fg.NystromSketch(3, 2).add(torch.ones(3, 10) / 0), ValueError, "product has"),
        (lambda: fg.NystromSketch(3, 2).add_operator(torch.eye(4)), ValueError, "term has size 4"),
        (lambda: fg.NystromSketch(3, 2).merge(fg.NystromSketch(3, 2, seed=1)), ValueError, "sketches differ"),
        (lambda: fg.NystromSketch(3, 2, probes=0).error(), ValueError, "probes=0"),
        (lambda: fg.NystromSketch(3, 2).error(level=1.0), ValueError, "level must be"),
        (lambda: fg.NystromSketch(3, 2).scaled(-1.0), ValueError, "weight must be"),
        (lambda: fg.NystromSketch(3, 2).eigh(3), ValueError, "k must be"),
        (lambda: fg.nystrom(-torch.eye(3), 2).factor(), FloatingPointError, "not positive semi-definite"),
        (lambda: fg.FrequentDirections(3, 0), ValueError, "rows must be"),
        (lambda: fg.FrequentDirections(3, 2, torch.bfloat16), TypeError, "dtype must be"),
        (lambda: fg.FrequentDirections(3, 2).add(torch.ones(2, 4)), ValueError, "rows must be"),
        (lambda: fg.FrequentDirections(3, 2).add(torch.ones(2, 3) / 0), ValueError, "rows has"),
        (lambda: fg.FrequentDirections(3, 2).merge(fg.FrequentDirections(3, 1)), ValueError, "sketches differ"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]))
def test_single_precision_terms_go_into_a_double_precision_sketch(size, columns, seed, decay):
    """Their products are not symmetric, nor positive, beyond single precision: of low rank or of fast decay it shows."""
    factor = gaussian(seed, size, min(size, 12)) * 10.0 ** (-decay * torch.arange(min(size, 12), dtype=torch.float64))
    term = (factor @ factor.T).float()
    sketch = fg.NystromSketch(size, columns, seed=seed)
    sketch.add_operator(term)
    lacking = term.double() - sketch.operator().to_dense()
    scale = float(torch.linalg.matrix_norm(term.double()))
    assert float(torch.linalg.eigvalsh(lacking)[0]) >= -4 * torch.finfo(torch.float32).eps * size**0.5 * scale
    other = fg.NystromSketch(size, columns, seed=seed)
    other.add_operator(term.double())
    for both in (sketch.merge(other), other.merge(sketch), other.scaled(0.5).merge(sketch.scaled(2.0))):
        assert bool((both.eigh()[0] >= 0).all())


@pytest.mark.parametrize("trace", [1.0, -1.0, 41.0])
def test_a_trace_below_what_was_found_is_refused_rather_than_made_a_bound_of_zero(trace):
    matrix = torch.diag(torch.arange(10.0, 0.0, -1.0, dtype=torch.float64))
    found = float(fg.nystrom(matrix, 9).eigh()[0].sum())
    assert found > 41
    for k in (None, 1):
        with pytest.raises(ValueError, match="trace must be"):
            fg.nystrom(matrix.to_sparse(), 9, trace=trace).error(k)
    assert fg.nystrom(matrix.to_sparse(), 9, trace=55.0).error().trace == pytest.approx(55 - found)
    op = fg.nystrom(matrix, 9)
    probes, images = op.test_matrix[:, 9:], op.product[:, 9:]
    sketch = fg.SketchOperator(*op.eigh(), torch.tensor(trace, dtype=torch.float64), "output", probes, images)
    with pytest.raises(ValueError, match="trace must be finite and at least"):
        sketch.error(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["dense", "sparse", "operator", "term"])
def test_half_precision_terms_have_bounds_that_hold(dtype, form):
    matrix = torch.diag(torch.tensor([256.0] + [2.0**-10] * 255)).to(dtype)
    for seed in range(5):
        if form == "term":
            sketch = fg.NystromSketch(256, 16, seed=seed)
            sketch.add_operator(matrix)
        else:
            op = {
                "dense": matrix,
                "sparse": matrix.float().to_sparse().to(dtype),
                "operator": fg.DenseOperator(matrix),
            }[form]
            sketch = fg.nystrom(op, 16, seed=seed)
        lacking = matrix.double() - sketch.operator().to_dense().double()
        error, rounding = sketch.error(level=1 - 1e-6), 256 * 1e-6
        assert float(torch.linalg.matrix_norm(lacking, 2)) <= error.spectral + rounding
        assert float(lacking.trace()) <= error.trace_bound + rounding
        assert error.trace_bound < 1 or sketch.trace is None


class Halved(fg.SymmetricOperator):
    """Known by products in half precision alone."""

    def __init__(self):
        super().__init__(8, torch.bfloat16, torch.device("cpu"))

    def _matmat(self, block):
        return 3 * block

    def diagonal(self):
        return torch.full((8,), 3.0, dtype=torch.bfloat16)


def test_products_in_half_precision_have_no_bounds_on_their_error():
    by_hand = fg.NystromSketch(8, 4)
    by_hand.add((3 * by_hand.test_matrix).bfloat16(), 24.0)
    for sketch in (by_hand, by_hand.merge(fg.NystromSketch(8, 4)), by_hand.scaled(2.0), fg.nystrom(Halved(), 4)):
        assert float((sketch.eigh()[0] / sketch.eigh()[0][0] - 1).abs().max()) < 0.1
        with pytest.raises(ValueError, match=r"products of torch\.bfloat16 were added"):
            sketch.error()


@pytest.mark.parametrize("double", [True, False])
def test_a_trace_that_differs_by_rounding_alone_is_not_refused(double):
    """Of one direction in single precision, where every column adds the shift of the factorisation."""
    factor = gaussian(0, 1000, 1).float()
    term = factor @ factor.T
    sketch = fg.NystromSketch(1000, 600) if double else fg.nystrom(term, 600)
    if double:
        sketch.add_operator(term)
    assert float(sketch.eigh()[0].double().sum()) > sketch.trace * (1 + 1e-5)
    assert sketch.error().energy > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frequent_directions_are_the_same_matrix_whenever_asked(dtype):
    torch.manual_seed(0)
    sketch = fg.FrequentDirections(12, 5, dtype)
    rows = torch.randn(40, 12, dtype=torch.float64)
    sketch.add(rows)
    first = sketch.matrix()
    assert torch.equal(first, sketch.matrix()) and torch.equal(first, sketch.matrix())
    lost = torch.linalg.matrix_norm(rows.T @ rows - (sketch.matrix().T @ sketch.matrix()).double(), 2)
    assert lost <= sketch.bound * (1 + 1e-5)
    sketch.add(rows[:1])
    assert not torch.equal(first, sketch.matrix())
