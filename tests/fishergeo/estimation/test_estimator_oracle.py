"""Every structure and kind against a loop over single examples, under random splits, orders and padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LAYERS, SmallLM, assert_close, atoms, collate, make_examples, split

import fishergeo as fg

STRUCTURES = {
    "out": "gram",
    "in": fg.Structure("gram", side="input"),
    "sketch": fg.Structure("sketch", rank=9),
    "sketch in": fg.Structure("sketch", side="input", rank=9),
    "diagonal": "diagonal",
    "kfac": "kfac",
    "reduce": fg.Structure("kfac", sharing="reduce"),
    "kfac-sketch": fg.Structure("kfac-sketch", rank=9),
    "kfac-sketch reduce": fg.Structure("kfac-sketch", rank=9, sharing="reduce"),
    "ekfac": "ekfac",
    "ekfac reduce": fg.Structure("ekfac", sharing="reduce"),
    "exact": "exact",
}


def second_moment(one_example, function):
    """Σ weight · function(G, D, A) over an example's atoms, for each layer."""
    return {name: sum(w * function(*parts[name]) for w, parts in one_example) for name in LAYERS}


def mean_over_examples(everything, function):
    parts = [second_moment(one, function) for one in everything]
    return {name: sum(part[name] for part in parts) / len(parts) for name in LAYERS}


def check_ekfac(operator, kfac, gradients):
    """Bases that diagonalise the factors, and the exact second moments in them."""
    s, a = kfac
    for basis, factor in ((operator.output_basis, s), (operator.input_basis, a)):
        assert_close(basis.T @ basis, torch.eye(len(basis)).double())
        inside = basis.T @ factor @ basis
        assert_close(torch.diag(inside.diagonal()), inside)
    expected = sum(w * (operator.output_basis.T @ g @ operator.input_basis).square() for w, g in gradients)
    assert_close(operator.values, expected)


def of_sums(everything, examples, kind):
    """The atoms of the sum over an example's supervised tokens, from those of the mean."""
    counts = [int((labels[1:] != -100).sum()) for _, labels in examples]
    # ggn of the mean loss carries 1/T, not 1/T².
    factors = [count ** (0.5 if kind == "ggn" else 1) for count in counts]
    return [
        [(w, {name: (f * g, f * d, a) for name, (g, d, a) in parts.items()}) for w, parts in one]
        for one, f in zip(everything, factors, strict=True)
    ]


@pytest.mark.parametrize("kind", ["empirical", "mc", "type2", "ggn", "margin"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@settings(deadline=None, max_examples=2)
@given(
    order=st.permutations(range(5)),
    cuts=st.sets(st.integers(1, 4), max_size=4),
    padding=st.sampled_from(["left", "right"]),
)
def test_every_structure_and_kind_agrees_with_the_loop_over_single_examples(kind, reduction, order, cuts, padding):
    model = SmallLM()
    examples = [make_examples([4, 6, 5, 3, 6])[i] for i in order]
    everything = atoms(model, examples, kind, LAYERS)
    if reduction == "sum":
        everything = of_sums(everything, examples, kind)
    fishers = fg.estimate_fisher(
        model,
        split(examples, cuts, padding),
        structure=STRUCTURES,
        kind=kind,
        layers=list(LAYERS),
        reduction=reduction,
    )
    assert fishers["out"].header.reduction == reduction
    count = len(examples)
    expected = {
        "out": mean_over_examples(everything, lambda g, d, a: g @ g.T),
        "in": mean_over_examples(everything, lambda g, d, a: g.T @ g),
        "exact": mean_over_examples(everything, lambda g, d, a: torch.outer(g.flatten(), g.flatten())),
    }
    expected |= {"sketch": expected["out"], "sketch in": expected["in"]}
    for key, dense in expected.items():
        for name in LAYERS:
            assert_close(fishers[key][name].to_dense(), dense[name])
    squares = mean_over_examples(everything, lambda g, d, a: g.square())
    s = mean_over_examples(everything, lambda g, d, a: d.T @ d)
    s_reduced = mean_over_examples(everything, lambda g, d, a: torch.outer(d.sum(0), d.sum(0)))
    for name in LAYERS:
        inputs = [one[0][1][name][2] for one in everything]
        a = sum(x.T @ x for x in inputs) / sum(map(len, inputs))
        a_reduced = sum(torch.outer(x.mean(0), x.mean(0)) for x in inputs) / count
        gradients = [(w / count, parts[name][0]) for one in everything for w, parts in one]
        assert_close(fishers["diagonal"][name].diagonal(), squares[name].flatten())
        for key, factors in (("kfac", (s[name], a)), ("reduce", (s_reduced[name], a_reduced))):
            assert_close(fishers[key][name].output_factor, factors[0])
            assert_close(fishers[key][name].input_factor, factors[1])
            assert_close(fishers[key][name].to_dense(), torch.kron(*factors))
            sketched = fishers[key.replace("kfac", "kfac-sketch") if key == "kfac" else f"kfac-sketch {key}"][name]
            assert_close(sketched.to_dense(), torch.kron(*factors))
        check_ekfac(fishers["ekfac"][name], (s[name], a), gradients)
        check_ekfac(fishers["ekfac reduce"][name], (s_reduced[name], a_reduced), gradients)
        trace = squares[name].sum()
        for key in ("out", "in", "ekfac", "exact", "diagonal"):
            assert_close(fishers[key][name].trace(), trace)
        assert_close(fishers["sketch"][name].full_trace, trace)


@pytest.mark.parametrize("kind", ["empirical", "type2", "ggn"])
def test_every_structure_takes_tokens_as_data_where_asked(kind):
    """G_t = g_t a_tᵀ with g_t of the sum over the supervised tokens; sums over M supervised tokens."""
    model, examples = SmallLM(), make_examples([4, 6, 5])
    counts = [int((labels[1:] != -100).sum()) for _, labels in examples]
    keys = {key: one for key, one in STRUCTURES.items() if "reduce" not in key}
    fishers = fg.estimate_fisher(
        model, [collate(examples)], structure=keys, kind=kind, unit="token", layers=list(LAYERS)
    )
    # ggn of the mean loss carries 1/T, not 1/T², so the sum's is T times it.
    power = 1 if kind == "ggn" else 2
    everything = atoms(model, examples, kind, LAYERS)
    for name in LAYERS:
        data = [
            (w * count**power / sum(counts), torch.outer(g, a))
            for one, count in zip(everything, counts, strict=True)
            for w, parts in one
            for g, a in zip(parts[name][1], parts[name][2], strict=True)
        ]
        assert_close(fishers["out"][name].to_dense(), sum(w * g @ g.T for w, g in data))
        assert_close(fishers["in"][name].to_dense(), sum(w * g.T @ g for w, g in data))
        assert_close(fishers["sketch"][name].to_dense(), sum(w * g @ g.T for w, g in data))
        assert_close(fishers["diagonal"][name].diagonal(), sum(w * g.square() for w, g in data).flatten())
        assert_close(fishers["exact"][name].to_dense(), sum(w * torch.outer(g.flatten(), g.flatten()) for w, g in data))
        ekfac = fishers["ekfac"][name]
        rotated = sum(w * (ekfac.output_basis.T @ g @ ekfac.input_basis).square() for w, g in data)
        assert_close(ekfac.values, rotated)


@settings(deadline=None, max_examples=4)
@given(cuts=st.sets(st.integers(1, 3), max_size=3), side=st.sampled_from(["both", "output", "input"]))
def test_streaming_products_are_those_of_the_oracle_for_all_layers_in_one_pass(cuts, side):
    model, examples = SmallLM(), make_examples([4, 6, 5, 3])
    everything = of_sums(atoms(model, examples, "empirical", LAYERS), examples, "empirical")
    gradients = {name: torch.stack([one[0][1][name][0] for one in everything]) for name in LAYERS}
    fisher = fg.StreamingFisher(model, split(examples, cuts), side=side, layers=list(LAYERS), reduction="sum")
    generator = torch.Generator().manual_seed(0)
    blocks = {name: torch.randn(fisher[name].shape[0], 3, dtype=torch.float64, generator=generator) for name in LAYERS}
    products = fisher.multi_matmul(blocks)
    assert fisher.passes == 1
    for name, g in gradients.items():
        if side == "both":
            dense = g.flatten(1).T @ g.flatten(1) / len(g)
        else:
            dense = (g @ g.mT).mean(0) if side == "output" else (g.mT @ g).mean(0)
        assert_close(products[name], dense @ blocks[name])
        assert_close(fisher[name].trace(), g.square().sum() / len(g))
    assert fisher.passes == 2  # the traces of all layers are found together


def test_gauss_newton_of_a_squared_error_is_the_gram_matrix_of_the_outputs_jacobian():
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 4).double()

        def forward(self, x):
            return torch.sin(self.layer(x))

    model, x = Net(), torch.randn(5, 3, dtype=torch.float64)
    batches = [{"x": x[:2], "labels": torch.zeros(2, 4)}, {"x": x[2:], "labels": torch.zeros(3, 4)}]
    fisher = fg.estimate_fisher(model, batches, structure="exact", kind="ggn")
    expected = 0
    for one in x:
        jacobian = torch.autograd.functional.jacobian(
            lambda w, one=one: torch.sin(w @ one + model.layer.bias.detach()), model.layer.weight.detach()
        ).flatten(1)
        expected = expected + 2 / 4 * jacobian.T @ jacobian / len(x)
    assert_close(fisher["layer"].to_dense(), expected)


class Classifier(torch.nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 4, bias=False).double()
        self.scale = scale

    def forward(self, x):
        return self.layer(x) * self.scale


def classification(copies=1):
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return {"x": x.repeat(copies, 1), "labels": torch.tensor([0, 1, 2]).repeat(copies)}


def test_gauss_newton_of_softmax_cross_entropy_is_the_type_2_fisher_and_the_mean_of_sampled_ones():
    model, batch = Classifier(), classification()
    p = model(batch["x"]).softmax(1).detach()
    hessian = [
        torch.kron(torch.diag(r) - torch.outer(r, r), torch.outer(x, x)) for r, x in zip(p, batch["x"], strict=True)
    ]
    expected = sum(hessian) / 3
    for kind in ("type2", "ggn"):
        assert_close(fg.estimate_fisher(model, [batch], structure="exact", kind=kind)["layer"].to_dense(), expected)
    sampled = fg.estimate_fisher(model, [classification(4000)], structure="exact", kind="mc")
    assert_close(sampled["layer"].to_dense(), expected, 0.06)


def test_margins_do_not_vanish_where_likelihoods_do():
    """At confidence 1 − ε the likelihood's gradient is ε times the margin's: g_likelihood = (1 − p_y) g_margin."""
    for scale, labels in ((1.0, None), (60.0, "own")):
        model, batch = Classifier(scale), classification()
        if labels == "own":
            batch["labels"] = model(batch["x"]).argmax(1).detach()
        p = model(batch["x"]).softmax(1).gather(1, batch["labels"][:, None])[:, 0].detach()
        traces = {
            kind: [
                float(
                    fg.estimate_fisher(model, [{k: v[i : i + 1] for k, v in batch.items()}], "gram", kind)[
                        "layer"
                    ].trace()
                )
                for i in range(3)
            ]
            for kind in ("empirical", "margin")
        }
        for one, likelihood, margin in zip(p, traces["empirical"], traces["margin"], strict=True):
            assert likelihood == pytest.approx(float(1 - one) ** 2 * margin, rel=1e-6, abs=1e-300)
            assert margin > 1e-3


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"structure": "sketch", "rank": 2.5}, TypeError, "rank must be an int"),
        ({"structure": "sketch", "rank": True}, TypeError, "rank must be an int"),
        ({"structure": "sketch", "rank": 0}, ValueError, "rank must be at least 1"),
        ({"structure": "sketch", "probes": 1.5}, TypeError, "probes must be an int"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"decay": True}, TypeError, "decay must be a real number"),
        ({"decay": float("nan")}, ValueError, "decay"),
        ({"decay": 0.0}, ValueError, "decay"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1"),
        ({"checkpoint_every": 1.5}, TypeError, "checkpoint_every must be an int"),
        ({"layers": []}, ValueError, "layers is empty; there are "),
    ],
)
def test_numbers_that_are_none_of_their_kind_are_named(options, error, words, tmp_path):
    batches = [collate(make_examples([4, 3]))]
    if "checkpoint_every" in options:
        options = options | {"checkpoint": tmp_path / "state.safetensors"}
    with pytest.raises(error, match=words):
        fg.estimate_fisher(SmallLM(), batches, **{"structure": "gram", **options})


def test_a_bare_linear_layer_is_named_as_the_model_itself():
    with pytest.raises(ValueError, match=r"layers is empty; there are '' \(the model itself\)"):
        fg.estimate_fisher(torch.nn.Linear(3, 2), [torch.eye(3)], "gram", layers=[], loss=lambda m, b: m(b).sum(1))
