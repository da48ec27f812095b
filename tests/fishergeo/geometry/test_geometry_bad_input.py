"""Any one argument spoilt in any way is refused by a ValueError or TypeError that names it, never answered."""

import re

import pytest
import torch
from geometry_cases import gaussian, orthonormal
from hypothesis import given
from hypothesis import strategies as st

import fishergeo as fg

P, Q, M = 6, 5, 2


def seeded():
    return torch.Generator().manual_seed(0)


def definite(seed):
    root = gaussian(seed, P, P)
    return root @ root.mT + torch.eye(P, dtype=torch.float64)


def lowrank(seed):
    return fg.LowRank(gaussian(seed, P, 3), gaussian(seed + 1, 3, Q))


def names(argument, error):
    """The message has the argument's name as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(argument)}(?!\w)", str(error)) is not None


# What is wrong with a tensor, whatever it is for.
ANY_TENSOR = {
    "none": lambda x: None,
    "text": lambda x: "tensor",
    "list": lambda x: x.tolist(),
    "integers": lambda x: x.to(torch.int64),
    "booleans": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex128),
    "no dimension": lambda x: x.flatten()[0],
}
EMPTY = {"empty": lambda x: x[:0], "empty last": lambda x: x[..., :0]}
NOT_FINITE = {
    "nan": lambda x: x.clone().index_fill_(0, torch.tensor(0), float("nan")),
    "infinite": lambda x: x.clone().index_fill_(0, torch.tensor(0), float("inf")),
}
OTHER_KIND = {"other dtype": lambda x: x.to(torch.float32), "other device": lambda x: x.to("meta")}
MATRIX = {**ANY_TENSOR, **NOT_FINITE, "vector": lambda x: x[:, 0], "empty": lambda x: x[:0]}
BATCHED = {"other batch": lambda x: torch.stack([x] * 3)}
BASIS = {
    **MATRIX,
    "on meta": lambda x: x.to("meta"),
    "scaled": lambda x: 1.1 * x,
    "skewed": lambda x: x + 0.1 * gaussian(9, *x.shape),
    "transposed": lambda x: x.mT,
    "repeated": lambda x: x[:, :1].expand_as(x),
}
CURVATURE = {
    **MATRIX,
    "not square": lambda x: x[:, 1:],
    "not symmetric": lambda x: x + gaussian(9, *x.shape),
    "on meta": lambda x: x.to("meta"),
    "indefinite": lambda x: x - 3 * x.trace() * torch.eye(len(x), dtype=x.dtype),
}
UPDATE = {
    "none": lambda x: None,
    "text": lambda x: "update",
    "integers": lambda x: x.to_dense().to(torch.int64),
    "other rows": lambda x: fg.LowRank(x.left[1:], x.right),
    "other dtype": lambda x: x.to(torch.float32),
    "other device": lambda x: x.to("meta"),
}
PART = {
    **UPDATE,
    "other columns": lambda x: fg.LowRank(x.left, x.right[:, 1:]),
    "dense": lambda x: x.to_dense(),
    "nan left": lambda x: fg.LowRank(NOT_FINITE["nan"](x.left), x.right),
    "infinite right": lambda x: fg.LowRank(x.left, NOT_FINITE["infinite"](x.right)),
}
NUMBER = {
    "none": lambda x: None,
    "text": lambda x: "1",
    "nan": lambda x: float("nan"),
    "infinite": lambda x: float("inf"),
    "boolean": lambda x: True,
}
COUNT = {**{k: NUMBER[k] for k in ("none", "text", "boolean")}, "fraction": lambda x: 1.5, "negative": lambda x: -1}
CHOICE = {"none": lambda x: None, "unknown": lambda x: "no such", "number": lambda x: 3}
WEIGHTS = {**ANY_TENSOR, **NOT_FINITE, **EMPTY, "negative": lambda x: -x - 0.1, "too few": lambda x: x[1:]}


def second_run(spoil):
    return lambda runs: [runs[0], {"x": spoil(runs[1]["x"])}]


GENERATOR = {"none": lambda x: None, "seed": lambda x: 0}

# function -> (its arguments, what can be wrong with each)
CALLS = {
    "LowRank": (
        fg.LowRank,
        lambda: {"left": gaussian(0, P, 3), "right": gaussian(1, 3, Q)},
        {
            "left": {
                **ANY_TENSOR,
                **OTHER_KIND,
                **EMPTY,
                "vector": lambda x: x[:, 0],
                "other rank": lambda x: x[:, 1:],
            },
            "right": {**ANY_TENSOR, **OTHER_KIND, "empty": lambda x: x[:, :0], "other rank": lambda x: x[1:]},
        },
    ),
    "Projector": (
        fg.Projector,
        lambda: {"basis": orthonormal(0, P, M), "side": "output"},
        {"basis": BASIS, "side": CHOICE},
    ),
    "SoftProjector": (
        fg.SoftProjector,
        lambda: {"basis": orthonormal(0, P, M), "weights": torch.tensor([0.2, 0.9]).double(), "side": "input"},
        {
            "basis": BASIS,
            "weights": {**WEIGHTS, "above one": lambda x: x + 1, "other dtype": lambda x: x.float()},
            "side": CHOICE,
        },
    ),
    "SoftProjector.from_spectrum": (
        fg.SoftProjector.from_spectrum,
        lambda: {"basis": orthonormal(0, P, M), "values": torch.tensor([3.0, 1.0]).double(), "epsilon": 0.5},
        {
            "basis": BASIS,
            "values": {
                **ANY_TENSOR,
                **NOT_FINITE,
                **EMPTY,
                **OTHER_KIND,
                "negative": lambda x: -x,
                "too few": lambda x: x[1:],
                "too many": lambda x: x.repeat(2),
            },
            "epsilon": {**NUMBER, "zero": lambda x: 0.0, "negative": lambda x: -1.0},
        },
    ),
    "Projector.split": (
        fg.Projector(orthonormal(0, P, M)).split,
        lambda: {"delta": lowrank(1)},
        {"delta": UPDATE},
    ),
    "KroneckerProjector": (
        fg.KroneckerProjector,
        lambda: {"output_basis": orthonormal(0, P, M), "input_basis": orthonormal(1, Q, M)},
        {"output_basis": BASIS, "input_basis": BASIS},
    ),
    "KroneckerProjector.split": (
        fg.KroneckerProjector(orthonormal(0, P, M), orthonormal(1, Q, M)).split,
        lambda: {"delta": lowrank(1)},
        {"delta": UPDATE},
    ),
    "KroneckerMaskProjector": (
        fg.KroneckerMaskProjector,
        lambda: {
            "output_vectors": orthonormal(0, P, M),
            "input_vectors": orthonormal(1, Q, M),
            "mask": torch.ones(M, M, dtype=torch.bool),
        },
        {
            "output_vectors": BASIS,
            "input_vectors": BASIS,
            "mask": {"none": lambda x: None, "floating": lambda x: x.float(), "other shape": lambda x: x[1:]},
        },
    ),
    "KroneckerMaskProjector.from_spectra": (
        fg.KroneckerMaskProjector.from_spectra,
        lambda: {
            "output_values": torch.tensor([3.0, 1.0]).double(),
            "output_vectors": orthonormal(0, P, M),
            "input_values": torch.tensor([2.0, 1.0]).double(),
            "input_vectors": orthonormal(1, Q, M),
            "pairs": 2,
        },
        {
            "output_values": {**WEIGHTS, **OTHER_KIND, "matrix": lambda x: x[None]},
            "output_vectors": {**BASIS, **OTHER_KIND, "fewer": lambda x: x[:, :1]},
            "input_values": {**WEIGHTS, **OTHER_KIND, "matrix": lambda x: x[None]},
            "input_vectors": {**BASIS, **OTHER_KIND, "fewer": lambda x: x[:, :1]},
            "pairs": {**COUNT, "many": lambda x: M * M + 1},
        },
    ),
    "KroneckerMaskProjector.split": (
        fg.KroneckerMaskProjector(orthonormal(0, P, M), orthonormal(1, Q, M), torch.eye(M) > 0).split,
        lambda: {"delta": lowrank(1)},
        {"delta": UPDATE},
    ),
    "rank_for_energy": (
        fg.rank_for_energy,
        lambda: {"values": torch.tensor([3.0, 1.0]), "total": 5.0, "energy": 0.8},
        {
            "values": {
                **{k: v for k, v in ANY_TENSOR.items() if k != "list"},
                **NOT_FINITE,
                **EMPTY,
                "negative": lambda x: -x,
                "ascending": lambda x: x.flip(0),
            },
            "total": {**{k: v for k, v in NUMBER.items() if k != "none"}, "small": lambda x: 1.0},
            "energy": {**NUMBER, "zero": lambda x: 0.0, "above one": lambda x: 1.1},
        },
    ),
    "riemannian_overlap": (
        fg.riemannian_overlap,
        lambda: {
            "part": lowrank(0),
            "rest": lowrank(2),
            "beta": 4.0,
            "tau": 0.01,
            "weight": gaussian(4, P, Q),
            "reduction": "sum",
        },
        {
            "part": PART,
            "rest": PART,
            "beta": {**NUMBER, "negative": lambda x: -1.0},
            "tau": NUMBER,
            "weight": {**{k: v for k, v in MATRIX.items() if k != "none"}, **OTHER_KIND},
            "reduction": CHOICE,
        },
    ),
    "sampled_riemannian_overlap": (
        fg.sampled_riemannian_overlap,
        lambda: {
            "part": lowrank(0),
            "rest": lowrank(2),
            "rows": 3,
            "generator": seeded(),
            "beta": 1.0,
            "tau": 0.0,
            "reduction": "sum",
        },
        {
            "part": PART,
            "rest": PART,
            "rows": {**COUNT, "one": lambda x: 1, "many": lambda x: P + 1},
            "generator": GENERATOR,
            "beta": {**NUMBER, "negative": lambda x: -1.0},
            "tau": NUMBER,
            "reduction": CHOICE,
        },
    ),
    "geodesic_separation": (
        fg.geodesic_separation,
        lambda: {"part": lowrank(0), "rest": lowrank(2), "metric": definite(4)},
        {"part": PART, "rest": PART, "metric": {**CURVATURE, **OTHER_KIND}},
    ),
    "principal_angles": (
        fg.principal_angles,
        lambda: {"u": orthonormal(0, P, M), "v": orthonormal(1, P, M)},
        {"u": BASIS, "v": BASIS},
    ),
    "subspace_distance": (
        fg.subspace_distance,
        lambda: {"u": orthonormal(0, P, M), "v": orthonormal(1, P, M), "kind": "chordal"},
        {"u": {**BASIS, "fewer": lambda x: x[:, :1]}, "v": BASIS, "kind": CHOICE},
    ),
    "subspace_overlap": (
        fg.subspace_overlap,
        lambda: {"u": orthonormal(0, P, M), "v": orthonormal(1, P, M)},
        {"u": {**BASIS, "no columns": lambda x: x[:, :0]}, "v": BASIS},
    ),
    "karcher_mean": (
        fg.karcher_mean,
        lambda: {
            "points": torch.stack([orthonormal(0, P, M)] * 2),
            "weights": torch.ones(2).double(),
            "tol": 1e-9,
            "max_iter": 50,
        },
        {
            "points": {**MATRIX, "scaled": lambda x: 2 * x, "one": lambda x: x[0]},
            "weights": {**{k: v for k, v in WEIGHTS.items() if k != "none"}, "zero": lambda x: 0 * x},
            "tol": {**NUMBER, "negative": lambda x: -1.0},
            "max_iter": COUNT,
        },
    ),
    "affine_invariant_distance": (
        fg.affine_invariant_distance,
        lambda: {"a": definite(0), "b": definite(1)},
        {"a": CURVATURE, "b": CURVATURE},
    ),
    "log_euclidean_distance": (
        fg.log_euclidean_distance,
        lambda: {"a": definite(0), "b": definite(1)},
        {"a": CURVATURE, "b": CURVATURE},
    ),
    "bures_wasserstein_distance": (
        fg.bures_wasserstein_distance,
        lambda: {"a": definite(0), "b": definite(1)},
        {"a": CURVATURE, "b": CURVATURE},
    ),
    "fisher_rao_distance": (
        fg.fisher_rao_distance,
        lambda: {"p": torch.tensor([0.2, 0.8]).double(), "q": torch.tensor([0.5, 0.5]).double()},
        {"p": WEIGHTS, "q": WEIGHTS},
    ),
    "split_half_agreement": (
        fg.split_half_agreement,
        lambda: {"samples": gaussian(0, 8, 4), "m": 2, "generator": seeded(), "draws": 3, "level": 0.9},
        {
            "samples": MATRIX,
            "m": {**COUNT, "many": lambda x: 5},
            "generator": GENERATOR,
            "draws": COUNT,
            "level": NUMBER,
        },
    ),
    "bootstrap_agreement": (
        fg.bootstrap_agreement,
        lambda: {"samples": gaussian(0, 8, 4), "m": 2, "generator": seeded(), "draws": 3, "level": 0.9},
        {
            "samples": {**MATRIX, "three examples": lambda x: x[:3]},
            "m": {**COUNT, "zero": lambda x: 0, "many": lambda x: 5},
            "generator": GENERATOR,
            "draws": {**COUNT, "one": lambda x: 1},
            "level": {**NUMBER, "one": lambda x: 1.0, "zero": lambda x: 0.0},
        },
    ),
    "bootstrap_confidence": (
        fg.bootstrap_confidence,
        lambda: {"samples": gaussian(0, 8, 4), "m": 2, "generator": seeded(), "draws": 3},
        {
            "samples": {**MATRIX, "three examples": lambda x: x[:3]},
            "m": {**COUNT, "zero": lambda x: 0, "many": lambda x: 5},
            "generator": GENERATOR,
            "draws": {**COUNT, "one": lambda x: 1},
        },
    ),
    "layer_cosines": (
        fg.layer_cosines,
        lambda: {"runs": [{"x": lowrank(0)}, {"x": lowrank(2)}]},
        {
            "runs": {
                **{name: second_run(spoil) for name, spoil in PART.items() if name != "dense"},
                "empty": lambda x: [],
                "other layers": lambda x: [x[0], {"y": x[1]["x"]}],
                "batched": lambda x: [{"x": torch.ones(2, P, Q)}] * 2,
            }
        },
    ),
    "eigenspace_shift_bound": (
        fg.eigenspace_shift_bound,
        lambda: {"values": torch.tensor([3.0, 2.0, 1.0]), "m": 1, "perturbation": 0.1},
        {
            "values": {**ANY_TENSOR, **NOT_FINITE, **EMPTY, "ascending": lambda x: x.flip(0)},
            "m": COUNT,
            "perturbation": NUMBER,
        },
    ),
    "davis_kahan_bound": (
        fg.davis_kahan_bound,
        lambda: {"residual": 0.1, "gap": 1.0},
        {"residual": NUMBER, "gap": NUMBER},
    ),
}
# Of two arguments that must go together, the message names both: whichever of them it was that was wrong.
TOGETHER = [
    ("SoftProjector", "weights", "basis"),
    ("SoftProjector.from_spectrum", "values", "basis"),
    ("Projector.split", "delta", "basis"),
    ("KroneckerProjector", "input_basis", "output_basis"),
    ("KroneckerProjector.split", "delta", "output_basis"),
    ("KroneckerMaskProjector", "input_vectors", "output_vectors"),
    ("KroneckerMaskProjector.split", "delta", "output_basis"),
    ("KroneckerMaskProjector.from_spectra", "output_values", "output_vectors"),
    ("KroneckerMaskProjector.from_spectra", "input_values", "input_vectors"),
    ("riemannian_overlap", "rest", "part"),
    ("riemannian_overlap", "weight", "part"),
    ("geodesic_separation", "rest", "part"),
    ("geodesic_separation", "metric", "part"),
    ("principal_angles", "v", "u"),
    ("subspace_distance", "v", "u"),
    ("subspace_overlap", "v", "u"),
    ("karcher_mean", "weights", "points"),
    ("affine_invariant_distance", "b", "a"),
    ("log_euclidean_distance", "b", "a"),
    ("bures_wasserstein_distance", "b", "a"),
    ("fisher_rao_distance", "q", "p"),
]
MANY = [
    ("SoftProjector", "weights", "basis"),
    ("SoftProjector.from_spectrum", "values", "basis"),
    ("Projector.split", "delta", "basis"),
    ("KroneckerProjector", "input_basis", "output_basis"),
    ("KroneckerProjector.split", "delta", "output_basis"),
    ("principal_angles", "v", "u"),
    ("subspace_distance", "v", "u"),
    ("subspace_overlap", "v", "u"),
    ("affine_invariant_distance", "b", "a"),
    ("log_euclidean_distance", "b", "a"),
    ("bures_wasserstein_distance", "b", "a"),
    ("fisher_rao_distance", "q", "p"),
]
SPOILT = [
    (function, argument, fault)
    for function, (_, _, arguments) in CALLS.items()
    for argument, faults in arguments.items()
    for fault in faults
]


@pytest.mark.parametrize("function", CALLS)
def test_the_arguments_that_are_spoilt_below_are_fine_as_they_are(function):
    call, arguments, _ = CALLS[function]
    call(**arguments())


@pytest.mark.parametrize(("function", "argument", "fault"), SPOILT)
def test_one_spoilt_argument_is_refused_by_name(function, argument, fault):
    call, make, faults = CALLS[function]
    arguments = make()
    arguments[argument] = faults[argument][fault](arguments[argument])
    with pytest.raises((ValueError, TypeError)) as caught:
        call(**arguments)
    assert names(argument, caught.value)


@pytest.mark.parametrize(("function", "argument", "partner"), TOGETHER)
def test_mixed_dtypes_are_a_type_error_that_names_both(function, argument, partner):
    call, make, _ = CALLS[function]
    arguments = make()
    arguments[argument] = arguments[argument].to(torch.float32)
    with pytest.raises(TypeError) as caught:
        call(**arguments)
    assert names(argument, caught.value) and names(partner, caught.value)


@pytest.mark.parametrize(("function", "argument", "partner"), MANY)
def test_batches_that_do_not_broadcast_are_refused_by_both_names(function, argument, partner):
    call, make, _ = CALLS[function]
    arguments, repeat = make(), lambda x, n: x.expand(n, *x.shape)
    if partner in arguments:
        arguments[partner] = repeat(arguments[partner], 3)
        arguments[argument] = repeat(arguments[argument], 2)
    else:
        u, v = (repeat(orthonormal(i, size, M), 3) for i, size in ((0, P), (1, Q)))
        call = fg.Projector(u).split if function == "Projector.split" else fg.KroneckerProjector(u, v).split
        update = lowrank(1)
        arguments[argument] = fg.LowRank(repeat(update.left, 2), repeat(update.right, 2))
    with pytest.raises(ValueError, match="do not broadcast") as caught:
        call(**arguments)
    assert names(argument, caught.value) and names(partner, caught.value)


def test_batches_of_a_metric_or_a_weight_must_be_those_of_the_update():
    a = gaussian(0, 2, P, Q)
    for metric in (torch.stack([definite(0)] * 3), definite(0)[None, None].expand(4, 1, P, P)):
        with pytest.raises(ValueError) as caught:
            fg.geodesic_separation(a, a, metric)
        assert names("metric", caught.value)
    with pytest.raises(ValueError, match="weight has shape"):
        fg.riemannian_overlap(a, a, weight=gaussian(1, 3, P, Q))


@pytest.mark.parametrize(
    "combine", [lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x @ y.mT, lambda x, y: x.inner(y)]
)
def test_low_ranks_whose_batches_do_not_broadcast_are_refused(combine):
    two, three = (fg.LowRank(gaussian(0, n, P, 2), gaussian(1, n, 2, Q)) for n in (2, 3))
    with pytest.raises(ValueError, match=r"this LowRank has batch shape .* do not broadcast"):
        combine(two, three)
    with pytest.raises(ValueError, match=r"the left operand has batch shape .* this LowRank .*do not broadcast"):
        gaussian(0, 3, P, P) @ two


def test_matrices_of_two_sizes_are_refused_with_both_sizes_even_in_batches():
    first, second = (torch.eye(n, dtype=torch.float64).expand(2, 7, n, n) for n in (3, 4))
    with pytest.raises(ValueError, match="a is 3×3 but b is 4×4"):
        fg.affine_invariant_distance(first, second)


def test_weights_without_a_batch_serve_every_basis_of_one():
    bases = torch.stack([orthonormal(i, P, 2) for i in range(3)])
    weights = torch.tensor([0.5, 1.0], dtype=torch.float64)
    delta = gaussian(0, 3, P, Q)
    part = fg.SoftProjector(bases, weights).apply(delta)
    for i in range(3):
        torch.testing.assert_close(part[i], bases[i] @ torch.diag(weights) @ bases[i].T @ delta[i])


@pytest.mark.parametrize("batched", ["output_basis", "input_basis"])
def test_the_basis_whose_batch_does_not_fit_the_update_is_named(batched):
    bases = {"output_basis": orthonormal(0, P, 2), "input_basis": orthonormal(1, Q, 2)}
    bases[batched] = bases[batched].expand(3, *bases[batched].shape)
    projector = fg.KroneckerProjector(**bases)
    with pytest.raises(ValueError, match="do not broadcast") as caught:
        projector.split(gaussian(0, 2, P, Q))
    assert names("delta", caught.value) and names(batched, caught.value)


@given(st.data())
def test_several_spoilt_arguments_are_refused_by_the_name_of_one_of_them(data):
    function = data.draw(st.sampled_from(sorted(CALLS)))
    call, make, faults = CALLS[function]
    arguments = make()
    spoilt = data.draw(st.lists(st.sampled_from(sorted(faults)), min_size=1, unique=True))
    for argument in spoilt:
        fault = data.draw(st.sampled_from(sorted(faults[argument])))
        arguments[argument] = faults[argument][fault](arguments[argument])
    with pytest.raises((ValueError, TypeError)) as caught:
        call(**arguments)
    assert any(names(argument, caught.value) for argument in arguments)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=4), st.lists(st.integers(0, 4), min_size=2, max_size=4))
def test_factors_of_any_shape_are_either_refused_or_multiply_as_torch_would(left, right):
    left, right = torch.ones(left, dtype=torch.float64), torch.ones(right, dtype=torch.float64)
    try:
        update = fg.LowRank(left, right)
    except ValueError as error:
        assert "left" in str(error) or "right" in str(error)
    else:
        assert torch.equal(update.to_dense(), left @ right) and update.shape == (left @ right).shape


@given(st.lists(st.integers(0, 4), max_size=3))
def test_operands_of_any_shape_are_either_refused_or_multiply_as_torch_would(shape):
    update, other = lowrank(0), torch.ones(shape, dtype=torch.float64)
    for multiply in (lambda: update @ other, lambda: other @ update):
        try:
            product = multiply()
        except ValueError as error:
            assert "multiply" in str(error) or "left" in str(error) or "right" in str(error)
        else:
            dense = product.to_dense() if isinstance(product, fg.LowRank) else product
            assert dense.numel() > 0 and torch.isfinite(dense).all()


def test_arithmetic_with_what_is_no_low_rank_is_a_type_error():
    update = lowrank(0)
    for operation in (
        lambda: update + 1,
        lambda: update + update.to_dense(),
        lambda: update.to_dense() - update,
        lambda: update * "2",
        lambda: update / update,
        lambda: update @ "x",
        lambda: update * True,
        lambda: update.inner(None),
        lambda: update + update.to(torch.float32),
        lambda: update.truncate(1.0),
    ):
        with pytest.raises(TypeError):
            operation()
    for operation in (
        lambda: update * torch.ones(2, dtype=torch.float64),
        lambda: update + fg.LowRank(update.left[1:], update.right),
        lambda: update.inner(torch.ones(3, 3, dtype=torch.float64)),
        lambda: update.trace(),
        lambda: update.truncate(-1),
    ):
        with pytest.raises(ValueError):
            operation()
