"""Traces, diagonals, densities and noise edges against dense float64 oracles, and what their error bars promise."""

import math

import pytest
import scipy.integrate
import torch
from geometry_cases import SEEDS, assert_close, gaussian, orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st
from spectrum_cases import matrices, spectrum, with_spectrum

import fishergeo as fg
from fishergeo.spectral.rank import marchenko_pastur_median

METHODS = ("xtrace", "hutch++", "hutchinson")


@given(matrices(low=12), st.sampled_from(METHODS), st.integers(0, 99))
def test_enough_products_give_the_exact_trace_and_diagonal(matrix, method, seed):
    scale = float(matrix.abs().max())
    found = fg.trace(matrix, 2 * len(matrix), method, seed=seed)
    assert float((found.value - matrix.trace()).abs()) <= 1e-12 * scale * len(matrix) and float(found.error) == 0
    diag = fg.diagonal(matrix, 2 * len(matrix), seed=seed)
    assert float((diag.value - matrix.diagonal()).abs().max()) <= 1e-12 * scale


@given(st.integers(1, 4), SEEDS, st.sampled_from(["xtrace", "hutch++"]), st.booleans())
def test_low_rank_operators_have_their_trace_and_diagonal_found_exactly(rank, seed, method, indefinite):
    factor = gaussian(seed, 60, rank)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])[:rank].double() if indefinite else torch.ones(rank).double()
    matrix = (factor * signs) @ factor.T
    scale = float(factor.square().sum())
    found = fg.trace(matrix, 18, method, seed=seed % 100)
    assert float(found) == pytest.approx(float(matrix.trace()), abs=1e-9 * scale)
    assert float(found.error) <= 1e-9 * scale
    assert float((fg.diagonal(matrix, 18, seed=seed % 100).value - matrix.diagonal()).abs().max()) <= 1e-8 * scale


def xtrace_by_its_definition(matrix, omega):
    """Leave-one-out, written out: a QR factorisation of all other samples for each one."""
    n, s = omega.shape
    y, samples = matrix @ omega, []
    for i in range(s):
        others = [j for j in range(s) if j != i]
        q = torch.linalg.qr(y[:, others]).Q
        left = omega[:, i] - q @ (q.T @ omega[:, i])
        left = left * ((n - s + 1) ** 0.5 / left.norm())
        samples.append((q * (matrix @ q)).sum() + left @ matrix @ left)
    return torch.stack(samples)


@given(matrices(low=20, kinds=("power law", "slow", "indefinite", "negative")), st.integers(2, 8), st.integers(0, 99))
def test_xtrace_is_its_definition(matrix, half, seed):
    from fishergeo._linalg import directions

    n = len(matrix)
    omega = directions(n, half, seed, "trace") * n**0.5
    samples = xtrace_by_its_definition(matrix, omega)
    found = fg.trace(matrix, 2 * half, seed=seed)
    assert float(found) == pytest.approx(float(samples.mean()), rel=1e-8, abs=1e-9)
    assert float(found.error) == pytest.approx(float(samples.std() / half**0.5), rel=1e-6, abs=1e-9)
    assert found.products == 2 * half


@given(matrices(low=20, kinds=("power law", "slow", "indefinite")), st.integers(2, 8), st.integers(0, 99))
def test_xdiag_is_its_definition(matrix, half, seed):
    from fishergeo._linalg import directions

    n = len(matrix)
    omega = torch.where(directions(n, half, seed, "diagonal") < 0, -1.0, 1.0).double()
    y, samples = matrix @ omega, []
    for i in range(half):
        q = torch.linalg.qr(y[:, [j for j in range(half) if j != i]]).Q
        rest = matrix @ omega[:, i] - q @ (q.T @ (matrix @ omega[:, i]))
        samples.append((q @ (q.T @ matrix)).diagonal() + omega[:, i] * rest)
    found, table = fg.diagonal(matrix, 2 * half, seed=seed), torch.stack(samples, 1)
    assert_close(found.value, table.mean(1), 1e-8)
    assert_close(found.error, table.std(1) / half**0.5, 1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["slow", "indefinite"])
def test_traces_are_unbiased_and_their_error_bars_right(method, kind):
    matrix = with_spectrum(spectrum(kind, 60))
    found = [fg.trace(matrix, 24, method, seed=seed) for seed in range(80)]
    values = torch.tensor([float(f) for f in found]).double()
    errors = torch.tensor([float(f.error) for f in found]).double()
    truth = float(matrix.trace())
    assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / 80**0.5 + 1e-9
    assert 0.5 < float(errors.square().mean().sqrt() / values.std()) < 2.5
    inside = ((values - truth).abs() <= 2.5 * errors).double().mean()
    assert float(inside) > 0.8


def test_spectra_that_decay_are_where_hutch_plus_plus_and_xtrace_win():
    matrix = with_spectrum(spectrum("condition 1e12", 100))

    def spread(method):
        return torch.tensor([float(fg.trace(matrix, 30, method, seed=s)) for s in range(40)]).sub(matrix.trace()).norm()

    plain, plus, best = (float(spread(m)) for m in ("hutchinson", "hutch++", "xtrace"))
    assert best < plus / 2 < plain / 4


@settings(deadline=None, max_examples=15)
@given(matrices(low=4, high=25), st.integers(0, 99))
def test_quadrature_nodes_lie_in_the_spectrum_and_weights_are_a_measure(matrix, seed):
    density = fg.spectral_density(matrix, 3, 12, seed=seed)
    values, slack = torch.linalg.eigvalsh(matrix), 1e-10 * float(matrix.abs().max()) * len(matrix)
    counted = density.weights > 1e-20  # beyond the end of an exhausted chain nodes carry no weight
    assert float(density.nodes[counted].min()) >= float(values[0]) - slack
    assert float(density.nodes[counted].max()) <= float(values[-1]) + slack
    assert bool((density.weights >= 0).all())
    assert_close(density.weights.sum(1), torch.ones(3, dtype=torch.float64), 1e-10)
    assert float(density.moment(0)) == pytest.approx(len(matrix))


@given(matrices(low=6, high=20, kinds=("power law", "indefinite", "repeated", "rank deficient")), SEEDS)
def test_moments_are_exact_for_each_probe_up_to_twice_the_steps(matrix, seed):
    from fishergeo._linalg import directions

    seed, n = seed % 100, len(matrix)
    density = fg.spectral_density(matrix, 2, 4, seed=seed)
    z = directions(n, 2, seed, "density")
    z = z / z.norm(dim=0)
    power = z.clone()
    for p in range(8):
        assert_close((density.weights * density.nodes**p).sum(1), (z * power).sum(0), 1e-8)
        power = matrix @ power


def test_counts_and_functions_of_the_spectrum_are_within_their_error_bars():
    values = torch.cat([torch.linspace(5, 6, 20), torch.linspace(0, 1, 180)]).double()
    matrix = with_spectrum(values)
    density = fg.spectral_density(matrix, 30, 30)
    for low, high in ((4, 7), (-0.5, 2.0), (0.25, 0.75)):
        count = density.count(low, high)
        truth = int(((values >= low) & (values <= high)).sum())
        assert abs(float(count) - truth) < 4 * float(count.error) + 2
    log_det = density.integrate(lambda x: (x + 0.1).log())
    assert abs(float(log_det) - float((values + 0.1).log().sum())) < 4 * float(log_det.error)
    grid = torch.linspace(-2, 8, 2001, dtype=torch.float64)
    curve = density.density(grid, 0.1)
    assert float(torch.trapezoid(curve, grid)) == pytest.approx(1, abs=1e-6) and bool((curve >= 0).all())
    assert float(density.density(grid).max()) > 0


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.floats(1e-3, 1e3))
def test_effective_dimension_is_its_sum_and_falls_with_damping(values, damping):
    spectrum_ = torch.tensor(values, dtype=torch.float64)
    expected = sum(v / (v + damping) for v in values)
    assert fg.effective_dimension(spectrum_, damping) == pytest.approx(expected)
    operator = fg.DenseOperator(with_spectrum(spectrum_, 1))
    assert fg.effective_dimension(operator, damping) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert fg.effective_dimension(spectrum_, 2 * damping) <= expected + 1e-12
    assert 0 <= expected <= len(values)


def test_effective_dimension_of_a_density_is_close():
    values = spectrum("slow", 100)
    density = fg.spectral_density(with_spectrum(values), 30, 50)
    assert fg.effective_dimension(density, 0.3) == pytest.approx(float((values / (values + 0.3)).sum()), rel=0.1)


def test_the_published_constants_of_gavish_and_donoho():
    assert fg.gavish_donoho_factor(1.0, known_noise=True) == pytest.approx(4 / 3**0.5, abs=1e-12)
    assert fg.gavish_donoho_factor(1.0) == pytest.approx(2.858, abs=5e-4)
    # Their cubic approximation of ω(β), within 0.02 everywhere.
    for beta in (0.05, 0.1, 0.3, 0.5, 0.7, 0.9):
        cubic = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
        assert fg.gavish_donoho_factor(beta) == pytest.approx(cubic, abs=0.02)


@given(st.floats(0.02, 1.0))
def test_the_median_halves_the_marchenko_pastur_law(ratio):
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    density = lambda x: math.sqrt(max(0.0, (high - x) * (x - low))) / (2 * math.pi * ratio * x)
    below, _ = scipy.integrate.quad(density, low, marchenko_pastur_median(ratio), limit=400)
    assert below == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(("n", "p"), [(200, 50), (100, 100), (50, 200)])
def test_planted_directions_are_counted_and_noise_is_not(n, p):
    noise = 3.0 * gaussian(0, n, p)
    strengths = 3.0 * (n + p) ** 0.5 * torch.linspace(3.0, 1.5, 4, dtype=torch.float64)
    signal = (orthonormal(1, n, 4) * strengths) @ orthonormal(2, p, 4).T
    for data, expected in ((noise, 0), (noise + signal, 4)):
        values = torch.linalg.svdvals(data).square() / n
        for variance in (None, 9.0):
            edge = fg.rank_by_noise_edge(values, n, p, variance)
            assert expected <= edge <= expected + 2  # the largest noise value sits at the edge itself
            assert fg.rank_by_gavish_donoho(values, n, p, variance) == expected
        assert fg.rank_by_sign_flips(data, torch.Generator().manual_seed(0), 8) == expected


@given(st.integers(2, 40), st.integers(2, 40), SEEDS, st.floats(0.1, 10))
def test_ranks_do_not_see_the_scale_and_order_as_they_should(n, p, seed, scale):
    values = torch.linalg.svdvals(gaussian(seed, n, p)).square() / n
    for rank in (fg.rank_by_noise_edge, fg.rank_by_gavish_donoho):
        assert rank(values, n, p) == rank(values * scale, n, p)
        assert rank(values, n, p, 1.0) == rank(values * scale, n, p, scale)
    assert fg.rank_by_gavish_donoho(values, n, p, 1.0) <= fg.rank_by_noise_edge(values, n, p, 1.0)


def test_sign_flips_hold_their_level_where_the_edge_is_fooled_by_unequal_variances():
    rejected = edge = 0
    for seed in range(10):
        heavy = gaussian(seed, 60, 30) * torch.linspace(0.2, 3, 30, dtype=torch.float64)
        rejected += fg.rank_by_sign_flips(heavy, torch.Generator().manual_seed(seed), 19) > 0
        edge += fg.rank_by_noise_edge(torch.linalg.svdvals(heavy).square() / 60, 60, 30) > 0
    assert rejected <= 3 and edge == 10


def test_sign_flips_of_the_dual_find_what_examples_have_in_common():
    noise = gaussian(0, 30, 2000)
    shared = noise + 0.5 * gaussian(1, 30, 2) @ gaussian(2, 2, 2000)
    for data, expected in ((noise, 0), (shared, 2)):
        assert fg.rank_by_sign_flips(data @ data.T, torch.Generator().manual_seed(0), dual=True) == expected


def test_sign_flips_take_examples_of_several_columns():
    noise, basis = gaussian(0, 30, 50, 4), orthonormal(1, 50, 3)
    shared = noise + 3 * torch.einsum("pk,nkc->npc", basis, gaussian(2, 30, 3, 4))
    for data, expected in ((noise, 0), (shared, 3)):
        assert fg.rank_by_sign_flips(data, torch.Generator().manual_seed(0)) == expected
        flat = data.movedim(1, 2).reshape(120, 50)
        assert fg.rank_by_sign_flips(flat, torch.Generator().manual_seed(0)) == expected


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fg.trace(torch.eye(3), 2), ValueError, "products must be"),
        (lambda: fg.trace(torch.eye(9), method="best"), ValueError, "method must be one of"),
        (lambda: fg.trace(torch.ones(3, 2)), ValueError, "op must be square"),
        (lambda: fg.diagonal(torch.eye(9), method="best"), ValueError, "method must be one of"),
        (lambda: fg.spectral_density(torch.eye(3), 0), ValueError, "probes must be"),
        (lambda: fg.spectral_density(lambda x: x / 0, size=3), FloatingPointError, "NaN or infinity"),
        (lambda: fg.spectral_density(torch.eye(3)).density(torch.ones(2), 0.0), ValueError, "width must be positive"),
        (lambda: fg.effective_dimension(torch.ones(3), 0.0), ValueError, "damping must be positive"),
        (lambda: fg.effective_dimension(torch.ones(3) / 0, 1.0), ValueError, "spectrum has"),
        (lambda: fg.gavish_donoho_factor(0.0), ValueError, "ratio must be positive"),
        (lambda: fg.gavish_donoho_factor(1.5), ValueError, "ratio must be"),
        (lambda: fg.marchenko_pastur_edge(0, 3), ValueError, "samples must be"),
        (lambda: fg.rank_by_noise_edge(torch.tensor([1.0, 2.0]), 3, 3), ValueError, "one descending sequence"),
        (lambda: fg.rank_by_noise_edge(torch.ones(2), 3, 3), ValueError, "pass variance="),
        (lambda: fg.rank_by_noise_edge(torch.ones(4), 3, 3), ValueError, "4 eigenvalues of an operator of size 3"),
        (lambda: fg.rank_by_sign_flips(torch.ones(3, 2), 0), TypeError, "generator must be"),
        (lambda: fg.rank_by_sign_flips(torch.ones(3, 2), torch.Generator(), dual=True), ValueError, "must be square"),
        (lambda: fg.rank_by_sign_flips(torch.ones(3, 2) / 0, torch.Generator()), ValueError, "samples has"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top", [1e6, 1e10])
def test_a_flat_tail_below_one_large_eigenvalue_is_measured_not_dropped(dtype, top):
    """The samples are of rank one to a casual look, but 1999 ones lie beyond it."""
    values = torch.cat([torch.tensor([top], dtype=dtype), torch.ones(1999, dtype=dtype)])
    op = fg.DiagonalOperator(values[None])
    found = [fg.trace(op, 32, seed=seed) for seed in range(10)]
    missed = torch.stack([f.value for f in found]).double() - float(values.double().sum())
    errors = torch.stack([f.error for f in found]).double()
    rounding = 4 * torch.finfo(dtype).eps * top
    assert float(errors.min()) > 0
    assert float(missed.square().mean().sqrt()) <= 3 * float(errors.square().mean().sqrt()) + rounding
    diag = fg.diagonal(op, 32)
    assert float(diag.value[1:].mean()) == pytest.approx(1, abs=0.02) and float(diag.error[1:].min()) > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_traces_and_diagonals_of_half_precision_operators_come_in_float32(method, dtype):
    factor = gaussian(0, 60, 2) / 8
    matrix = (factor @ factor.T + torch.diag(torch.linspace(0, 1, 60))).to(dtype)
    truth = float(matrix.double().trace())
    for products in (24, 120):
        found = fg.trace(matrix, products, method)
        assert found.value.dtype == found.error.dtype == torch.float32
        assert abs(float(found) - truth) <= 5 * float(found.error) + 2 * torch.finfo(dtype).eps * truth
    diag = fg.diagonal(fg.DenseOperator(matrix), 24, "hutchinson" if method == "hutchinson" else "xdiag")
    assert diag.value.dtype == torch.float32 and float((diag.value - matrix.diagonal().float()).abs().mean()) < 0.3


@pytest.mark.parametrize("spectrum_", [torch.eye(4), torch.tensor(2.0), torch.ones(2, 1)])
def test_effective_dimension_takes_a_matrix_for_no_eigenvalues(spectrum_):
    with pytest.raises(ValueError, match="spectrum must be one sequence of eigenvalues"):
        fg.effective_dimension(spectrum_, 1.0)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-25), (torch.float32, 1e25), (torch.float64, 1e-200)])
def test_a_density_does_not_depend_on_the_unit(dtype, scale):
    matrix = torch.diag(torch.arange(1.0, 11.0)).to(dtype)
    one, other = (fg.spectral_density(matrix * unit, 6, 10) for unit in (1.0, scale))
    assert_close(other.nodes / scale, torch.arange(1.0, 11.0, dtype=torch.float64).expand(6, 10), 1e-5)
    assert_close(other.weights, one.weights, 1e-4)
    assert float(other.moment(1)) == pytest.approx(float(one.moment(1)) * scale, rel=1e-4)


@pytest.mark.parametrize("rank", [0, 5])
def test_functions_are_not_asked_past_the_end_of_an_exhausted_chain(rank):
    factor = gaussian(3, 20, rank)
    matrix = factor @ factor.T + (1 if rank else 2) * torch.eye(20, dtype=torch.float64)
    density = fg.spectral_density(matrix, 40, 16)
    found, truth = density.integrate(torch.log), float(torch.linalg.eigvalsh(matrix).log().sum())
    assert abs(float(found) - truth) <= 4 * float(found.error) + 1e-9
    reciprocal = density.integrate(lambda x: 1 / x)
    assert abs(float(reciprocal) - float(torch.linalg.inv(matrix).trace())) <= 4 * float(reciprocal.error) + 1e-9


def test_the_median_singular_value_is_not_the_root_of_the_median_eigenvalue():
    assert fg.rank_by_gavish_donoho(torch.tensor([12.0, 4.0, 0.0, 0.0]), 4, 4) == 1


@pytest.mark.parametrize("scale", [1e-170, 1e170])
def test_sign_flips_do_not_see_the_scale(scale):
    noise = gaussian(0, 20, 10)
    signal = noise + 5 * gaussian(1, 20, 1) * gaussian(2, 1, 10)
    for samples, expected in ((noise, 0), (signal, 1), (torch.zeros(4, 3, dtype=torch.float64), 0)):
        assert fg.rank_by_sign_flips(samples * scale, torch.Generator().manual_seed(0)) == expected


@pytest.mark.parametrize("use", [fg.trace, fg.diagonal, fg.spectral_density])
def test_a_size_that_is_not_the_operators_is_refused(use):
    with pytest.raises(ValueError, match="size=7, but op has size 5; size is for functions, leave it out"):
        use(torch.eye(5), 20, size=7)
    use(torch.eye(5), 20, size=5)


def test_an_indefinite_spectrum_has_no_effective_dimension():
    values = torch.tensor([-5.0, 1.0])
    for one in (values, fg.DenseOperator(torch.diag(values))):
        with pytest.raises(ValueError, match="its least eigenvalue is -5"):
            fg.effective_dimension(one, 1.0)
    assert fg.effective_dimension(torch.tensor([1.0, -1e-9]), 1.0) == 0.5
