"""Lean sketches of KFAC's factors: what of the exact factors they keep, and the laws of their operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LAYERS, SmallLM, assert_close, collate, make_examples, split

import fishergeo as fg

EXAMPLES = make_examples([4, 6, 5, 3, 6, 4, 5, 6, 3, 4, 6, 5, 4, 6, 5, 3, 6, 4, 5, 6])


def estimate(batches, structure, rank=3, **options):
    return fg.estimate_fisher(SmallLM(), batches, structure, layers=list(LAYERS), rank=rank, **options)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@settings(deadline=None, max_examples=8)
@given(rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_known_part_never_exceeds_the_factor_and_the_trace_is_exact(sharing, rank, seed):
    sketched = estimate([collate(EXAMPLES)], "kfac-sketch", rank, sharing=sharing, seed=seed)
    for name, exact in estimate([collate(EXAMPLES)], "kfac", sharing=sharing).items():
        for side in ("output_factor", "input_factor"):
            factor, found = getattr(exact, side), getattr(sketched[name], side)
            known = fg.SpectralOperator(found.values, found.vectors).to_dense()
            assert torch.linalg.eigvalsh(factor - known)[0] >= -1e-12 * factor.trace()
            assert_close(found.trace(), factor.trace(), 1e-12)
            assert_close(found.full_trace, factor.trace(), 1e-12)
            assert found.rest >= 0 and len(found.values) == min(rank, len(factor))
        assert_close(sketched[name].trace(), exact.trace(), 1e-12)


@settings(deadline=None, max_examples=6)
@given(cuts=st.sets(st.integers(1, 19), max_size=6), decay=st.sampled_from([1.0, 0.8]))
def test_how_data_are_batched_changes_nothing_of_a_lean_sketch(cuts, decay):
    whole, parts = (
        estimate(b, "kfac-sketch", 2, decay=1.0 if decay == 1 else decay)
        for b in ([collate(EXAMPLES)], split(EXAMPLES, cuts))
    )
    if decay != 1:  # a batch fades as one, so only what is exact agrees
        for name in whole:
            assert_close(whole[name].trace(), parts[name].trace(), 1e-10)
        return
    for name in whole:
        assert_close(whole[name].to_dense(), parts[name].to_dense(), 1e-9)


def test_lean_sketches_of_shards_merge_below_the_factor_with_the_exact_trace():
    one, other = (estimate([collate(part)], "kfac-sketch", 2) for part in (EXAMPLES[:7], EXAMPLES[7:]))
    merged, exact = one.merge(other), estimate([collate(EXAMPLES)], "kfac")
    for name in exact:
        for side in ("output_factor", "input_factor"):
            factor, found = getattr(exact[name], side), getattr(merged[name], side)
            known = fg.SpectralOperator(found.values, found.vectors).to_dense()
            assert torch.linalg.eigvalsh(factor - known)[0] >= -1e-12 * factor.trace()
            assert_close(found.trace(), factor.trace(), 1e-12)


def test_a_spectrum_that_falls_off_is_known_almost_whole():
    """Inputs near a plane and gradients near a line: rank 3 holds what there is."""
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 30, dtype=torch.float64)
    scale = 10.0 ** -torch.arange(40, dtype=torch.float64)
    data = [torch.randn(16, 40, dtype=torch.float64) * scale for _ in range(8)]
    weights = 10.0 ** -torch.arange(30, dtype=torch.float64)
    loss = lambda model, x: (model(x).sin() * weights).sum(1)
    sketched, exact = (fg.estimate_fisher(model, data, s, rank=4, loss=loss)[""] for s in ("kfac-sketch", "kfac"))
    delta = torch.randn(30, 40, dtype=torch.float64)
    assert_close(sketched.quadratic(delta), exact.quadratic(delta), 1e-3)
    assert_close(sketched.to_dense(), exact.to_dense(), 1e-3)


def test_memory_goes_by_the_rank_not_by_the_square_of_the_width():
    with torch.device("meta"):
        model = torch.nn.Linear(4096, 4096)
    loss = lambda model, x: model(x).square().sum(1)
    options = {"batches": [torch.empty(4, 4096)], "loss": loss, "rank": 64, "verify": False}
    plans = [fg.plan(model, s, **options) for s in ("kfac", "kfac-sketch")]
    assert plans[1].state_bytes < 2 * 4 * 4096 * 64 + 100
    assert plans[0].state_bytes > 2 * 4 * 4096**2 - 100
    assert plans[1].peak_bytes < plans[0].peak_bytes / 5


def test_factors_that_are_no_spectral_operators_are_refused():
    with pytest.raises(TypeError, match="output_factor must be a SpectralOperator, got Tensor"):
        fg.SpectralKroneckerOperator(torch.eye(2), torch.eye(2))
