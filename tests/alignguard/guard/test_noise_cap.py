"""The guard's rank by energy, capped where eigenvalues could be noise alone."""

import math

import pytest
import torch
from alignment_rows import rows
from architectures import make, move

import fishergeo as fg
from alignguard.guard import Guard, GuardConfig
from alignguard.guard.layer_curvature import LayerCurvature
from alignguard.guard.terms import TermGroup


def noisy(samples, size=24, signals=3, strength=40.0, seed=0):
    """1/n Σ x xᵀ of n samples: white noise of variance 1, and a few directions well above it."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(draw(size, signals))[0]
    x = draw(size, samples) + math.sqrt(strength) * directions @ draw(signals, samples)
    return x @ x.mT / samples


def forms(matrix):
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(matrix))
    top = fg.SpectralOperator(values[:10].contiguous(), vectors[:, :10].contiguous(), matrix.trace())
    kron = fg.KroneckerOperator(matrix, torch.eye(5, dtype=torch.float64))
    sketched = fg.SpectralOperator(top.values, top.vectors, top.full_trace, rest=float(values[10:].mean()))
    inside = fg.SpectralOperator(torch.ones(2).double(), torch.eye(5, 2).double(), side="input", rest=1.0)
    both = fg.SpectralKroneckerOperator(sketched, inside)
    return {"gram": fg.DenseOperator(matrix), "kfac": kron, "sketch": top, "kfac-sketch": both}


@pytest.mark.parametrize("samples", [400, 60, 16])
@pytest.mark.parametrize("structure", ["gram", "kfac", "sketch", "kfac-sketch"])
def test_directions_within_noise_are_left_out(structure, samples):
    matrix = noisy(samples)
    operator = forms(matrix)[structure]
    config = GuardConfig.curvature(structure=structure, energy=0.97, noise_edge=True)
    capped = LayerCurvature(operator, config, samples)
    free = LayerCurvature(operator, GuardConfig.curvature(structure=structure, energy=0.97), samples)
    assert len(capped.values) == 3 < len(free.values)
    torch.testing.assert_close(capped.projector.basis, free.projector.basis[:, :3])
    # the edge itself, from the noise's true variance
    edge = (1 + math.sqrt(24 / samples)) ** 2
    assert capped.values.min() > edge > torch.linalg.eigvalsh(matrix)[-4]


def test_pure_noise_holds_nothing_and_the_penalty_is_still_finite():
    matrix = noisy(200, signals=1, strength=0.0)
    layer = LayerCurvature(fg.DenseOperator(matrix), GuardConfig.curvature(noise_edge=True, lambda_task=0.1, lambda_collision=0.1,
                                                                 whole_update=False), 200)  # fmt: skip
    assert len(layer.values) <= 1
    delta = fg.LowRank(torch.ones(1, 24, 2, dtype=torch.float64), torch.ones(1, 2, 7, dtype=torch.float64))
    assert all(bool(torch.isfinite(term)) for term in TermGroup([layer], layer.config).terms(delta).values())


def test_the_guard_counts_the_tokens_of_its_estimate():
    model = make()
    move(model)
    config = GuardConfig.curvature(noise_edge=True, refresh_examples=6, averaging=0.5)
    guard = Guard(model, rows(6), config)
    guard.refresh()
    tokens = sum(len(row["input_ids"]) - 2 for row in guard.rows)
    assert {layer.samples for layer in guard.layers.values()} == {tokens}
    free = Guard(model, rows(6), GuardConfig.curvature(refresh_examples=6))
    free.refresh()
    ranks = [[len(layer.values) for layer in one.layers.values()] for one in (guard, free)]
    assert all(a <= b for a, b in zip(*ranks, strict=True)) and sum(ranks[0]) < sum(ranks[1])
    guard.refresh()
    assert {layer.samples for layer in guard.layers.values()} == {round(1.5 * tokens)}
    with pytest.raises(ValueError, match="noise_edge"):
        guard.use_fisher({name: layer.operator for name, layer in guard.layers.items()})
        len(next(iter(guard.layers.values())).values)
