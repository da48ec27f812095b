"""The Triton kernels against the tiles: in Triton's interpreter where there is no GPU, compiled where there is one.

    pip install triton && TRITON_INTERPRET=1 pytest tests/test_triton.py     # no GPU needed

Triton reads the variable when it is first imported, and other packages import it, so it must come from outside.
"""

import importlib.util
import os
import sys

import pytest
import torch
from geometry_cases import gaussian, orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st

import fishergeo as fg
from fishergeo.updates import _overlap, _tiles

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
interpreted = pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton with TRITON_INTERPRET=1"
)
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not HAS_GPU or not HAS_TRITON, reason="needs a CUDA device and triton")


@pytest.fixture
def kernels(monkeypatch):
    """The public functions with the kernels in the place of the tiles, whatever the device."""
    from fishergeo.updates import _triton

    used = []

    def choose(device, dtype, rank=1):
        used.append(rank)
        return _triton if dtype != torch.float64 else _tiles

    monkeypatch.setattr(_overlap, "sweeps", choose)
    monkeypatch.setattr(_triton, "ROWS", 16)
    monkeypatch.setattr(_triton, "COLUMNS", 16)
    yield _triton
    assert used


def formula(a, t, beta, tau, weight):
    d = a + t if weight is None else weight + a + t
    return ((1 + beta * torch.sigmoid(d.abs() - tau)) * (a * t).abs()).sum((-1, -2))


def compare(actual, expected, tol):
    assert actual.shape == expected.shape
    scale = max(1e-30, float(expected.abs().max()))
    assert float((actual.double() - expected.double()).abs().max()) <= tol * scale


def check(
    shape, ranks, beta=4.0, tau=0.01, with_weight=False, reduction="sum", kind="factored", device="cpu", **options
):
    """Value and gradients of the public function against the formula in float64 from the same, rounded inputs."""
    dtype, tol = options.get("dtype", torch.float32), options.get("tol", 2e-6)
    *batch, p, q = shape
    r, k = ranks
    shapes = [(*batch, p, r), (*batch, r, q), (*batch, p, k), (*batch, k, q)]
    stored = [gaussian(i, *s, dtype=dtype).to(device) for i, s in enumerate(shapes)]
    weight = gaussian(9, *shape, dtype=dtype).to(device) if with_weight else None
    if kind == "dense":
        stored = [stored[0] @ stored[1], stored[2] @ stored[3]]
    inputs = [x.requires_grad_() for x in stored]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    pair = inputs if kind == "dense" else (fg.LowRank(*inputs[:2]), fg.LowRank(*inputs[2:]))
    dense = exact if kind == "dense" else (exact[0] @ exact[1], exact[2] @ exact[3])
    value = fg.riemannian_overlap(*pair, beta, tau, weight, reduction)
    expected = formula(*dense, beta, tau, None if weight is None else weight.double())
    expected = expected / (p * q) if reduction == "mean" else expected
    assert value.dtype == torch.float32
    compare(value.detach(), expected.detach(), tol)
    coefficients = torch.linspace(-1, 2, max(1, value.numel()), device=device).reshape(value.shape)
    got = torch.autograd.grad((value * coefficients).sum(), inputs)
    wanted = torch.autograd.grad((expected * coefficients.double()).sum(), exact)
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == dtype
        compare(g, w, max(tol, 4 * torch.finfo(dtype).eps))


@interpreted
@settings(max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    batch=st.sampled_from([(), (2,), (2, 2)]),
    ranks=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    numbers=st.tuples(st.floats(0, 8), st.floats(-1, 1)),
    with_weight=st.booleans(),
    reduction=st.sampled_from(["sum", "mean"]),
    kind=st.sampled_from(["factored", "dense"]),
)
def test_value_and_gradient_are_the_papers_sum_for_any_shape_and_option(
    shape, batch, ranks, numbers, with_weight, reduction, kind
):
    from fishergeo.updates import _triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_overlap, "sweeps", lambda device, dtype, rank=1: _triton)
        patch.setattr(_triton, "ROWS", 16)
        patch.setattr(_triton, "COLUMNS", 16)
        check((*batch, *shape), ranks, *numbers, with_weight, reduction, kind)


@interpreted
@pytest.mark.parametrize("kind", ["factored", "dense"])
def test_splitting_the_columns_over_programs_changes_nothing(kernels, monkeypatch, kind):
    for programs in (1, 3, 1000):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        check((35, 100), (3, 5), with_weight=True, kind=kind)


@interpreted
@pytest.mark.parametrize("kind", ["factored", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(kernels, kind, dtype):
    check((20, 18), (3, 2), with_weight=True, kind=kind, dtype=dtype)


@interpreted
@pytest.mark.parametrize("frozen", [(0,), (1, 3), (0, 2), (0, 1, 2), (0, 1, 2, 3)])
def test_frozen_factors_get_no_gradient_and_the_others_the_right_one(kernels, frozen):
    factors = [gaussian(i, *s, dtype=torch.float32) for i, s in enumerate([(20, 2), (2, 17), (20, 3), (3, 17)])]
    needs = [i not in frozen for i in range(4)]
    batched = [f[None] for f in factors]
    sums, grads = kernels.factored_sweep(batched, None, 4.0, 0.01, needs)
    tiled_sums, tiled = _tiles.factored_sweep(batched, None, 4.0, 0.01, needs)
    compare(sums, tiled_sums, 2e-6)
    for g, w, need in zip(grads, tiled, needs, strict=True):
        assert (g is not None) == (w is not None) == need
        if need:
            compare(g, w, 2e-6)
    fg.riemannian_overlap(fg.LowRank(*factors[:2]), fg.LowRank(*factors[2:]))


@interpreted
def test_one_dense_part_may_be_frozen_and_strides_are_respected(kernels):
    a, t = gaussian(0, 17, 20, dtype=torch.float32).mT, gaussian(1, 20, 34, dtype=torch.float32)[:, ::2]
    a.requires_grad_()
    (got,) = torch.autograd.grad(fg.riemannian_overlap(a, t), a)
    (wanted,) = torch.autograd.grad(formula(a.double(), t.double(), 4.0, 0.01, None), a)
    compare(got, wanted, 2e-6)


@interpreted
def test_a_zero_update_has_value_and_gradient_zero(kernels):
    left, right = torch.zeros(20, 2).requires_grad_(), gaussian(1, 2, 18, dtype=torch.float32).requires_grad_()
    parts = fg.Projector(orthonormal(0, 20, 5, torch.float32)).split(fg.LowRank(left, right))
    value = fg.riemannian_overlap(*parts)
    assert float(value) == 0
    assert all(float(g.abs().max()) == 0 for g in torch.autograd.grad(value, (left, right)))


@interpreted
def test_sampled_rows_go_through_the_kernels_too(kernels):
    a, t = gaussian(0, 30, 21, dtype=torch.float32), gaussian(1, 30, 21, dtype=torch.float32)
    estimate = fg.sampled_riemannian_overlap(a, t, 30, torch.Generator().manual_seed(0))
    compare(estimate.value, formula(a.double(), t.double(), 4.0, 0.01, None), 2e-6)


@interpreted
def test_the_probe_accepts_the_kernels_and_notices_a_wrong_result(monkeypatch):
    from fishergeo.updates import _triton

    _triton.probe(torch.device("cpu"))
    monkeypatch.setattr(_triton, "factored_sweep", lambda *_: (torch.ones(1, 1), [torch.ones(1)] * 4))
    with pytest.raises(RuntimeError, match=r"rank 1 came out wrong by 0\.75"):
        _triton.probe(torch.device("cpu"))


# --- the choice, which needs neither triton nor a GPU ---------------------------------------------------------------


def test_tiles_serve_wherever_the_kernels_do_not(monkeypatch):
    class Kernels:
        LARGEST_RANK = 64

    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(_overlap, "_kernels", lambda device: Kernels)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert _overlap.sweeps(cuda, dtype, 64) is _overlap.sweeps(cuda, dtype, 1) is Kernels
        assert _overlap.sweeps(cpu, dtype) is _tiles
    assert _overlap.sweeps(cuda, torch.float64) is _tiles
    assert _overlap.sweeps(cuda, torch.float32, 65) is _overlap.sweeps(cuda, torch.float32, 0) is _tiles
    monkeypatch.setattr(_overlap, "_kernels", lambda device: None)
    assert _overlap.sweeps(cuda, torch.float32) is _tiles


def test_kernels_that_cannot_be_imported_are_passed_over_in_silence(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "fishergeo.updates._triton", raising=False)
    monkeypatch.delattr(fg, "_triton", raising=False)
    assert _overlap._kernels.__wrapped__(torch.device("cuda")) is None
    assert not [w for w in recwarn if "Triton" in str(w.message)]


def test_kernels_that_fail_their_probe_are_warned_about_and_passed_over(monkeypatch):
    class Broken:
        @staticmethod
        def probe(device):
            raise OSError("no C compiler")

    monkeypatch.setitem(sys.modules, "fishergeo.updates._triton", Broken)
    monkeypatch.setattr(fg, "_triton", Broken, raising=False)
    with pytest.warns(UserWarning, match="tiled way is taken: no C compiler"):
        assert _overlap._kernels.__wrapped__(torch.device("cuda")) is None


# --- on a GPU -------------------------------------------------------------------------------------------------------


@gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["factored", "dense"])
@pytest.mark.parametrize("shape", [(1, 1), (129, 513), (2, 200, 300), (1024, 4096)])
@pytest.mark.parametrize("ranks", [(3, 2), (16, 32), (64, 64)])
@pytest.mark.parametrize("with_weight", [False, True])
def test_on_a_gpu_the_kernels_are_chosen_and_agree_with_float64(kind, shape, ranks, with_weight):
    assert _overlap.sweeps(torch.device("cuda"), torch.float32, max(ranks)).__name__ == "fishergeo.updates._triton"
    check(shape, ranks, with_weight=with_weight, kind=kind, device="cuda", tol=2e-5)


@gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["factored", "dense"])
def test_on_a_gpu_the_kernels_agree_with_the_tiles_and_repeat_to_the_bit(kind, monkeypatch):
    p, q = 700, 900
    factors = [gaussian(i, *s, dtype=torch.float32).cuda() for i, s in enumerate([(p, 8), (8, q), (p, 8), (8, q)])]
    pair = fg.LowRank(*factors[:2]), fg.LowRank(*factors[2:])
    if kind == "dense":
        factors = [x.to_dense() for x in pair]
        pair = tuple(factors)
    for f in factors:
        f.requires_grad_()

    def run():
        value = fg.riemannian_overlap(*pair)
        return value.detach(), *torch.autograd.grad(value, factors)

    first, second = run(), run()
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    monkeypatch.setattr(_overlap, "sweeps", lambda *_: _tiles)
    for x, y in zip(first, run(), strict=True):
        compare(x, y, 2e-5)


@gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_mixed_devices_are_refused_by_name():
    a = torch.ones(4, 3)
    with pytest.raises(ValueError, match="part is on cpu but rest is on cuda"):
        fg.riemannian_overlap(a, a.cuda())
    with pytest.raises(ValueError, match="weight is on cuda"):
        fg.riemannian_overlap(a, a, weight=a.cuda())
