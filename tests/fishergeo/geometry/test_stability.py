"""Bounds hold on random perturbations; resampling tells planted directions from noise; cosines compare runs."""

import pytest
import torch
from geometry_cases import SEEDS, assert_close, gaussian, orthonormal
from hypothesis import assume, given
from hypothesis import strategies as st

import fishergeo as fg


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(3, 9), SEEDS, st.floats(1e-6, 0.5), st.data())
def test_the_bounds_hold_for_perturbed_matrices(p, seed, size, data):
    m = data.draw(st.integers(1, p - 1))
    root = gaussian(seed, p, p)
    a, e = root @ root.mT / p, size * (gaussian(seed + 1, p, p) + gaussian(seed + 1, p, p).mT)
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh(a))
    shifted = torch.linalg.eigh(a + e)[1].flip(-1)[:, :m]
    sines = torch.sin(fg.principal_angles(vectors[:, :m], shifted))
    bound = fg.eigenspace_shift_bound(values, m, float(torch.linalg.matrix_norm(e, 2)))
    assert float(sines.norm()) <= bound + 1e-9
    assert bound <= m**0.5


@given(st.integers(3, 9), SEEDS, st.floats(1e-6, 0.3), st.data())
def test_the_residual_bounds_the_angle_of_a_computed_eigenspace(p, seed, size, data):
    m = data.draw(st.integers(1, p - 1))
    root = gaussian(seed, p, p)
    a = root @ root.mT / p
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh(a))
    u = torch.linalg.qr(vectors[:, :m] + size * gaussian(seed + 1, p, m)).Q
    ritz = u.mT @ a @ u
    gap = float(torch.linalg.eigvalsh(ritz).min() - values[m])
    assume(gap > 0)
    residual = float(torch.linalg.matrix_norm(a @ u - u @ ritz, 2))
    largest = float(torch.sin(fg.principal_angles(u, vectors[:, :m])).max())
    assert largest <= fg.davis_kahan_bound(residual, gap) + 1e-9


def test_known_values_of_the_bounds():
    assert fg.davis_kahan_bound(0.5, 2.0) == 0.25
    assert fg.davis_kahan_bound(3.0, 2.0) == 1.0
    assert fg.davis_kahan_bound(0.0, 0.0) == 1.0
    values = torch.tensor([5.0, 4.0, 1.0, 1.0])
    assert fg.eigenspace_shift_bound(values, 2, 0.3) == pytest.approx(2**0.5 * 0.2)
    assert fg.eigenspace_shift_bound(values, 1, 0.0) == 0.0
    assert fg.eigenspace_shift_bound(values, 3, 0.1) == pytest.approx(3**0.5)


def planted(n=400, p=24, k=3, signal=4.0, seed=0, columns=None):
    """Examples of unit noise with k strong directions of falling strength."""
    shape = (n, p) if columns is None else (n, p, columns)
    basis = orthonormal(seed, p, k)
    strengths = signal * torch.linspace(1.5, 1.0, k, dtype=torch.float64)
    coefficients = gaussian(seed + 1, n, k, *shape[2:])
    signal_part = torch.einsum("pk,nk...->np...", basis * strengths, coefficients)
    return signal_part + gaussian(seed + 2, *shape), basis


@pytest.mark.parametrize("columns", [None, 2])
def test_split_halves_find_as_many_dimensions_as_were_planted(columns):
    samples, _ = planted(columns=columns)
    agreement = fg.split_half_agreement(samples, 8, seeded())
    assert agreement.dimensions(0.8) == 3
    assert float(agreement.mean[2]) > 0.9 and float(agreement.mean[7]) < 0.8


def test_split_halves_of_pure_noise_agree_by_chance():
    agreement = fg.split_half_agreement(gaussian(0, 200, 24), 6, seeded(), draws=100)
    assert agreement.dimensions() == 0
    assert torch.allclose(agreement.mean, agreement.chance, atol=0.12)
    assert_close(agreement.chance, torch.arange(1, 7, dtype=torch.float64) / 24)


def test_the_bootstrap_flatters_noise_where_split_halves_do_not():
    noise = gaussian(0, 12, 200)
    boot, split = fg.bootstrap_agreement(noise, 4, seeded()), fg.split_half_agreement(noise, 4, seeded())
    assert float(boot.mean[3]) > 0.5 > 0.2 > float(split.mean[3])


def test_the_bootstrap_is_sure_of_strong_directions():
    samples, _ = planted()
    agreement = fg.bootstrap_agreement(samples, 5, seeded())
    assert float(agreement.low[2]) > 0.95 > float(agreement.low[4])


@given(st.integers(4, 12), st.integers(1, 6), SEEDS)
def test_agreements_are_overlaps_with_ordered_ends(n, p, seed):
    samples = gaussian(seed, n, p)
    for agree in (fg.split_half_agreement, fg.bootstrap_agreement):
        a = agree(samples, min(2, p), seeded(seed), draws=5)
        assert ((a.low <= a.mean + 1e-9) & (a.mean <= a.high + 1e-9)).all()
        assert (a.low >= -1e-9).all() and (a.high <= 1 + 1e-9).all()
        assert a.mean.shape == a.chance.shape == (min(2, p),)


@given(SEEDS)
def test_the_whole_space_always_agrees_and_results_do_not_see_coordinates_or_scale(seed):
    samples = gaussian(seed, 10, 3)
    whole = fg.split_half_agreement(samples, 3, seeded(), draws=4)
    assert float(whole.mean[2]) == pytest.approx(1)
    turned = fg.split_half_agreement(7 * samples @ orthonormal(seed, 3, 3), 3, seeded(), draws=4)
    assert_close(turned.mean, whole.mean, 1e-6)


def test_the_same_seed_gives_the_same_agreement_and_a_wider_level_a_wider_interval():
    samples, _ = planted(n=40)
    for agree in (fg.split_half_agreement, fg.bootstrap_agreement):
        one, two = agree(samples, 4, seeded(3)), agree(samples, 4, seeded(3))
        assert torch.equal(one.mean, two.mean)
        narrow = agree(samples, 4, seeded(3), level=0.5)
        assert (narrow.low >= one.low).all() and (narrow.high <= one.high).all()
        assert (narrow.high - narrow.low).sum() < (one.high - one.low).sum()


def test_more_examples_than_coordinates_and_fewer_give_the_same_as_the_dense_formula():
    for n, p in ((30, 5), (6, 40)):
        samples = gaussian(0, n, p)
        agreement = fg.bootstrap_agreement(samples, 2, seeded(1), draws=2)
        generator, tables = seeded(1), []
        top = lambda x: torch.linalg.eigh(x.mT @ x)[1][:, -2:]
        for _ in range(2):
            picked = samples[torch.randint(n, (n,), generator=generator)]
            tables.append(fg.subspace_overlap(top(samples), top(picked)))
        assert_close(agreement.mean[1], torch.stack(tables).mean(), 1e-8)


def test_dimensions_need_both_the_threshold_and_more_than_chance():
    agreement = fg.Agreement(
        mean=torch.tensor([0.9, 0.8, 0.7]),
        low=torch.tensor([0.9, 0.4, 0.65]),
        high=torch.tensor([1.0, 0.9, 0.9]),
        chance=torch.tensor([0.1, 0.2, 0.7]),
    )
    assert agreement.dimensions() == 1
    assert agreement.dimensions(0.4) == 2
    assert agreement.dimensions(0.95) == 0
    with pytest.raises(ValueError, match="threshold"):
        agreement.dimensions(1.5)


def test_cosines_of_layers_across_runs_factored_and_dense():
    a = fg.LowRank(gaussian(0, 5, 2), gaussian(1, 2, 4))
    b = fg.LowRank(gaussian(2, 5, 3), gaussian(3, 3, 4))
    runs = [{"x": a, "y": 0.0 * a}, {"x": -2.0 * a, "y": b.to_dense()}, {"x": b, "y": a}]
    cosines = fg.layer_cosines(runs)
    assert list(cosines) == ["x", "y"]
    x, y = a.to_dense(), b.to_dense()
    c = float((x * y).sum() / (x.norm() * y.norm()))
    assert_close(cosines["x"], torch.tensor([[1, -1, c], [-1, 1, -c], [c, -c, 1]], dtype=torch.float64))
    assert_close(cosines["y"], torch.tensor([[0, 0, 0], [0, 1, c], [0, c, 1]], dtype=torch.float64))


def test_cosines_of_half_precision_updates_are_float32():
    update = gaussian(0, 4, 3).bfloat16()
    assert fg.layer_cosines([{"x": update}, {"x": update}])["x"].dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fg.davis_kahan_bound(-1.0, 1.0), ValueError, "residual must be"),
        (lambda: fg.davis_kahan_bound(1.0, float("nan")), ValueError, "gap must be"),
        (lambda: fg.eigenspace_shift_bound(torch.tensor([1.0, 2.0]), 1, 0.1), ValueError, "values must be descending"),
        (lambda: fg.eigenspace_shift_bound(torch.tensor([2.0, 1.0]), 2, 0.1), ValueError, "m must be at least 1"),
        (lambda: fg.eigenspace_shift_bound(torch.ones(2, 2), 1, 0.1), ValueError, "values must have one dimension"),
        (lambda: fg.split_half_agreement(gaussian(0, 3, 4), 1, seeded()), ValueError, "samples holds 3 examples"),
        (
            lambda: fg.split_half_agreement(gaussian(0, 8, 4), 5, seeded()),
            ValueError,
            "m must be at least 1 and at most 4",
        ),
        (lambda: fg.split_half_agreement(gaussian(0, 8), 1, seeded()), ValueError, "samples must have"),
        (lambda: fg.split_half_agreement(gaussian(0, 8, 2, 2, 2), 1, seeded()), ValueError, "samples must have shape"),
        (lambda: fg.bootstrap_agreement(gaussian(0, 8, 4), 1, 0), TypeError, "generator must be"),
        (
            lambda: fg.bootstrap_agreement(gaussian(0, 8, 4), 1, seeded(), draws=1),
            ValueError,
            "draws must be at least 2",
        ),
        (lambda: fg.bootstrap_agreement(gaussian(0, 8, 4), 1, seeded(), level=1.0), ValueError, "level must be"),
        (lambda: fg.bootstrap_agreement(gaussian(0, 8, 4) / 0, 1, seeded()), ValueError, "samples has"),
        (lambda: fg.layer_cosines([]), ValueError, "runs is empty"),
        (lambda: fg.layer_cosines([{"x": torch.eye(2)}, {"y": torch.eye(2)}]), ValueError, "differ in the layers"),
        (
            lambda: fg.layer_cosines([{"x": torch.eye(2)}, {"x": torch.eye(3)}]),
            ValueError,
            r"^runs\[1\]\['x'\] has shape \(3, 3\), runs\[0\] \(2, 2\)",
        ),
        (lambda: fg.davis_kahan_bound(0.1, -1.0), ValueError, "gap must be"),
        (lambda: fg.eigenspace_shift_bound(torch.tensor([2.0, 1.0]), 0, 0.1), ValueError, "m must be at least 1"),
        (lambda: fg.eigenspace_shift_bound(torch.tensor([2.0, 1.0]), 1, -0.1), ValueError, "perturbation must be"),
        (lambda: fg.layer_cosines([{"x": torch.eye(2)}, {"y": torch.eye(2)}]), ValueError, r"\['x', 'y'\]"),
        (lambda: fg.layer_cosines([{"x": torch.eye(2)}, {"x": torch.eye(2).double()}]), TypeError, r"runs\[1\]"),
        (lambda: fg.layer_cosines([{"x": torch.eye(2)}, {"x": None}]), TypeError, r"runs\[1\]\['x'\] must be"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_split_half_agreement_is_its_definition_written_out():
    samples, generator, tables = gaussian(0, 9, 6), seeded(2), []
    top = lambda x: torch.linalg.eigh(x.mT @ x)[1][:, -2:]
    for _ in range(7):
        order = torch.randperm(9, generator=generator)
        tables.append(fg.subspace_overlap(top(samples[order[:4]]), top(samples[order[4:]])))
    agreement, table = fg.split_half_agreement(samples, 2, seeded(2), draws=7, level=0.5), torch.stack(tables)
    assert_close(agreement.mean[1], table.mean(), 1e-8)
    assert_close(agreement.low[1], table.quantile(0.25), 1e-8)
    assert_close(agreement.high[1], table.quantile(0.75), 1e-8)


@pytest.mark.parametrize("agree", [fg.split_half_agreement, fg.bootstrap_agreement])
@pytest.mark.parametrize("level", [0.0, -0.1, 1.0, 1.5])
def test_levels_outside_the_open_interval_are_refused(agree, level):
    with pytest.raises(ValueError, match="level must be"):
        agree(gaussian(0, 8, 4), 1, seeded(), level=level)
    with pytest.raises(ValueError, match="level must be"):
        fg.shard_agreement([fg.DenseOperator(torch.eye(4))] * 2, 1, level=level)
    with pytest.raises(ValueError, match="m must be"):
        fg.shard_agreement([fg.DenseOperator(torch.eye(4))] * 2, 5)
    with pytest.raises(ValueError, match=r"shards\[1\] has shape \(3, 3\), shards\[0\] \(4, 4\)"):
        fg.shard_agreement([fg.DenseOperator(torch.eye(4)), fg.DenseOperator(torch.eye(3))], 1)
    with pytest.raises(ValueError, match=r"shards\[1\] is of side 'input'"):
        fg.shard_agreement([fg.DenseOperator(torch.eye(4)), fg.DenseOperator(torch.eye(4), "input")], 1)


def test_the_shift_bound_of_a_closed_gap_says_nothing_even_without_a_perturbation():
    values = torch.tensor([2.0, 1.0, 1.0])
    assert fg.eigenspace_shift_bound(values, 2, 0.0) == pytest.approx(2**0.5)
    assert fg.eigenspace_shift_bound(values, 1, 0.5) == pytest.approx(1.0)  # twice the perturbation closes the gap


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_thresholds_outside_the_unit_interval_are_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be"):
        fg.Agreement(*[torch.ones(2)] * 4).dimensions(threshold)


def test_defaults_are_fifty_draws_and_95_percent():
    samples = gaussian(0, 10, 4)
    for agree in (fg.split_half_agreement, fg.bootstrap_agreement):
        default, stated = agree(samples, 2, seeded()), agree(samples, 2, seeded(), draws=50, level=0.95)
        assert torch.equal(default.mean, stated.mean) and torch.equal(default.low, stated.low)
    default, stated = (
        fg.bootstrap_confidence(samples, 2, seeded()),
        fg.bootstrap_confidence(samples, 2, seeded(), draws=50),
    )
    assert torch.equal(default.weights, stated.weights)


def test_one_run_agrees_with_itself_and_cosines_never_leave_the_interval():
    assert fg.layer_cosines([{"x": torch.eye(3)}])["x"].tolist() == [[1.0]]
    for seed in range(40):
        x = gaussian(seed, 5, 4, dtype=torch.float32)
        cosines = fg.layer_cosines([{"x": x}, {"x": 3 * x}, {"x": -x}])["x"]
        assert float(cosines.max()) <= 1 and float(cosines.min()) >= -1


# --- confidence as weights of a soft projector ----------------------------------------------------------------------


@pytest.mark.parametrize("columns", [None, 2])
def test_confidence_is_its_definition_written_out(columns):
    samples = gaussian(0, 9, 6) if columns is None else gaussian(0, 9, 6, columns)
    flat = samples if columns is None else samples.transpose(1, 2).reshape(-1, 6)
    generator, found = seeded(3), []
    top = lambda weights: torch.linalg.eigh(flat.mT @ (weights[:, None] * flat))[1].flip(-1)[:, :2]
    whole = top(torch.ones(len(flat), dtype=torch.float64))
    for _ in range(4):
        counts = torch.bincount(torch.randint(9, (9,), generator=generator), minlength=9).double()
        resample = top(counts.repeat_interleave(columns or 1))
        found.append((resample.mT @ whole).square().sum(0))
    expected = (torch.stack(found).mean(0) - 2 / 6) / (1 - 2 / 6)
    basis, weights = fg.bootstrap_confidence(samples, 2, seeded(3), draws=4)
    assert_close(basis @ basis.mT, whole @ whole.mT, 1e-9)
    assert_close((basis.mT @ whole).abs(), torch.eye(2, dtype=torch.float64), 1e-6)
    assert_close(weights, expected.clamp(0, 1), 1e-9)


def test_confidence_is_high_for_planted_directions_and_low_for_the_rest_and_weighs_a_soft_projector():
    samples, planted_basis = planted()
    confidence = fg.bootstrap_confidence(samples, 8, seeded())
    assert float(confidence.weights[:3].min()) > 0.9 > 0.8 > float(confidence.weights[5:].max())
    soft = fg.SoftProjector(*confidence)
    part = soft(planted_basis)
    assert float(part.norm() / planted_basis.norm()) > 0.9
    part, rest = soft.split(gaussian(9, samples.shape[1], 5))
    assert float(fg.geodesic_separation(part, rest, "euclidean")) > 0


@given(st.integers(4, 10), st.integers(1, 7), SEEDS, st.data())
def test_confidences_lie_in_the_unit_interval_in_an_orthonormal_basis(n, p, seed, data):
    samples = gaussian(seed, n, p)
    m = data.draw(st.integers(1, min(n, p)))
    basis, weights = fg.bootstrap_confidence(samples, m, seeded(seed), draws=3)
    assert basis.shape == (p, m) and weights.shape == (m,)
    assert_close(basis.mT @ basis, torch.eye(m, dtype=torch.float64), 1e-9)
    assert (weights >= 0).all() and (weights <= 1).all()
    if m == min(n, p):
        assert (weights == 1).all()


def test_confidence_does_not_see_the_scale_and_half_precision_becomes_float32():
    samples = gaussian(0, 12, 5)
    one, two = (fg.bootstrap_confidence(c * samples, 2, seeded(1)) for c in (1.0, 100.0))
    assert_close(one.weights, two.weights, 1e-9)
    assert fg.bootstrap_confidence(samples.bfloat16(), 2, seeded()).weights.dtype == torch.float32


# --- directions without data ----------------------------------------------------------------------------------------

AGREEMENTS = (fg.split_half_agreement, fg.bootstrap_agreement, fg.bootstrap_confidence)


@pytest.mark.parametrize("agree", AGREEMENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_directions_without_data_are_refused_not_found_certain(agree, dtype, turned):
    """Dead units leave rows of zeros, and every resample agrees on those."""
    samples = gaussian(0, 60, 2) @ (orthonormal(1, 12, 2).mT if turned else torch.eye(2, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"m is 3, but samples have only 2 directions above rounding"):
        agree(samples.to(dtype), 3, seeded(), draws=3)
    agree(samples.to(dtype), 2, seeded(), draws=3)
    with pytest.raises(ValueError, match="samples are all zero"):
        agree(torch.zeros(60, 12, dtype=dtype), 1, seeded(), draws=3)


@pytest.mark.parametrize("scale", [1e-24, 1e25])
def test_noise_of_any_scale_has_no_dimensions(scale):
    noise = gaussian(0, 40, 20, dtype=torch.float32)
    found, plain = (fg.split_half_agreement(c * noise, 5, seeded()) for c in (scale, 1.0))
    assert found.dimensions(0.9) == 0 and found.mean.dtype == torch.float32
    assert_close(found.mean, plain.mean, 1e-3)


def test_halves_agree_on_nothing_that_only_one_of_them_has_seen():
    """The span of all examples is a plane, so the vector that a half without data for it makes up is the right one."""
    samples = torch.zeros(40, 6, dtype=torch.float64)
    samples[:, 0] = 3 * gaussian(0, 40)
    samples[0, 1] = 1.0
    agreement = fg.split_half_agreement(samples, 2, seeded())
    assert float(agreement.mean[0]) > 0.99 and float(agreement.high[1]) <= 0.5 + 1e-9


def test_shards_agree_on_nothing_that_they_have_no_data_of():
    two, one = (fg.DenseOperator(torch.diag(torch.tensor(v))) for v in ([3.0, 2.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="m is 3, but shards have only 2 directions above rounding"):
        fg.shard_agreement([two, two], 3)
    assert_close(fg.shard_agreement([two, two], 2).mean, torch.ones(2, dtype=torch.float64))
    assert_close(fg.shard_agreement([two, one], 2).mean, torch.tensor([1.0, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-24, 1e25])
def test_cosines_do_not_see_the_scale(scale):
    a, b = gaussian(0, 5, 4, dtype=torch.float32), gaussian(1, 5, 4, dtype=torch.float32)
    factored = fg.LowRank(scale * a, torch.eye(4))
    expected = float((a.double() * b).sum() / (a.double().norm() * b.double().norm()))
    for first in (scale * a, factored):
        found = fg.layer_cosines([{"x": first}, {"x": scale * b}, {"x": -1.0 * first}])["x"]
        assert found[0].tolist() == pytest.approx([1.0, expected, -1.0], abs=1e-5)
