"""Distances where the two are the same, and batches whose members differ in scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fishergeo as fg

SPD = (fg.affine_invariant_distance, fg.log_euclidean_distance, fg.bures_wasserstein_distance)
KINDS = ("geodesic", "chordal", "projection", "fubini-study", "asimov")


def definite(size, seed, dtype=torch.float64):
    r = torch.randn(size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return r @ r.T + torch.eye(size, dtype=dtype)


@pytest.mark.parametrize("distance", SPD)
@settings(max_examples=10)
@given(size=st.integers(1, 6), seed=st.integers(0, 99), scale=st.sampled_from([1e-12, 1.0, 1e12]), batch=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.float64]))  # fmt: skip
def test_the_gradient_is_zero_where_two_matrices_are_the_same(distance, size, seed, scale, batch, dtype):
    c = definite(size, seed, dtype) * scale
    x = c.clone().requires_grad_(True)
    other = torch.stack([c, 2 * c]) if batch else c
    found = distance(x, other)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert float(found.flatten()[0]) == 0 and bool(torch.isfinite(gradient).all())
    if batch:
        (gradient,) = torch.autograd.grad(distance(x, other)[0], x)
    assert bool((gradient == 0).all())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(rows=st.integers(2, 30), columns=st.integers(1, 5), seed=st.integers(0, 99), turned=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.float64]))  # fmt: skip
def test_the_gradient_is_zero_where_two_subspaces_are_the_same(kind, rows, columns, seed, turned, dtype):
    columns, generator = min(columns, rows), torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, columns, dtype=dtype, generator=generator)).Q
    rotation = torch.linalg.qr(torch.randn(columns, columns, dtype=dtype, generator=generator)).Q
    x = u.clone().requires_grad_(True)
    other = u @ rotation if turned else u
    for distance in (lambda: fg.subspace_distance(x, other, kind), lambda: fg.Grassmann().dist(x, other)):
        (gradient,) = torch.autograd.grad(distance(), x)
        assert bool((gradient == 0).all())


@pytest.mark.parametrize("angle", [1e-13, 1e-9, 1e-3])
def test_a_tiny_angle_keeps_its_gradient(angle):
    angle = torch.tensor(angle, dtype=torch.float64)
    u = torch.eye(6, dtype=torch.float64)[:, :1].requires_grad_(True)
    v = torch.zeros(6, 1, dtype=torch.float64)
    v[0], v[1] = torch.cos(angle), torch.sin(angle)
    (gradient,) = torch.autograd.grad(fg.subspace_distance(u, v), u)
    assert float(gradient[1]) == pytest.approx(-1, rel=1e-3)


@pytest.mark.parametrize("distance", SPD)
@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e18])
def test_matrices_of_a_batch_are_held_to_their_own_rounding(distance, scale):
    c, other = definite(3, 0), definite(3, 1)
    alone = torch.stack([distance(c, other), distance(c * scale, other * scale)])
    together = distance(torch.stack([c, c * scale]), torch.stack([other, other * scale]))
    assert torch.allclose(together, alone, rtol=1e-12)


@pytest.mark.parametrize("distance", SPD)
def test_a_bad_matrix_does_not_hide_behind_a_large_one(distance):
    eye = torch.eye(3, dtype=torch.float64)
    skew = eye * 1e-9
    skew[0, 1] = 1e-10
    for bad, words in ((-1e-9 * eye, "positive"), (skew, "symmetric")):
        with pytest.raises(ValueError, match=f"a must be {words}"):
            distance(torch.stack([1e8 * eye, bad]), torch.stack([eye, eye]))
        with pytest.raises(ValueError, match=f"b must be {words}"):
            distance(eye, torch.stack([1e8 * eye, bad]))
