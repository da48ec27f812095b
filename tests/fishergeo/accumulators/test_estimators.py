"""Laws of the estimators: batching, merging, weights, decay, traces; what several structures share; refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LAYERS, SmallLM, assert_close, collate, make_examples, split

import fishergeo as fg
from fishergeo._linalg import HalfGram, add_product_, leading_pairs, mirrored

EVERY = ["gram", "sketch", "diagonal", "kfac", "kfac-sketch", "exact"]
EXAMPLES = make_examples([4, 6, 5, 3, 6, 4])


def estimate(batches, structure=EVERY, model=None, **options):
    return fg.estimate_fisher(model or SmallLM(), batches, structure, layers=list(LAYERS), rank=9, **options)


def assert_same(one, other, tolerance=1e-10):
    assert one.header.count == pytest.approx(other.header.count)
    for name in one:
        assert_close(one[name].to_dense(), other[name].to_dense(), tolerance)


@settings(deadline=None, max_examples=6)
@given(
    cuts=st.sets(st.integers(1, 5), max_size=5),
    decay=st.sampled_from([1.0, 0.7]),
    sharing=st.sampled_from(["expand", "reduce"]),
)
def test_batching_changes_nothing_with_or_without_decay_and_weights(cuts, decay, sharing):
    weights = {int(ids.sum()): 0.5 + i for i, (ids, _) in enumerate(EXAMPLES)}
    of = lambda batch: torch.tensor([weights[int(row.sum())] for row in batch["input_ids"]])
    options = {"decay": decay, "sharing": sharing, "example_weights": of}
    whole, parts = estimate([collate(EXAMPLES)], **options), estimate(split(EXAMPLES, cuts), **options)
    for key in EVERY:
        assert_same(whole[key], parts[key])
    one, other = (estimate(b, "ekfac", **options) for b in ([collate(EXAMPLES)], split(EXAMPLES, cuts)))
    for name in LAYERS:  # where factors have full rank the bases are the same up to signs
        assert_close(one[name].trace(), other[name].trace())
        if sharing == "expand":
            assert_close(one[name].to_dense(), other[name].to_dense(), 1e-7)


def test_a_whole_weight_is_that_many_copies():
    weights = [1, 3, 2]
    batch = collate(EXAMPLES[:3], w=torch.tensor(weights))
    copies = [one for one, w in zip(EXAMPLES, weights, strict=False) for _ in range(w)]
    weighted, repeated = estimate([batch], example_weights="w"), estimate([collate(copies)])
    assert weighted["gram"].header.weighted and weighted["gram"].header.examples == 6
    for key in EVERY:
        assert_same(weighted[key], repeated[key])
    reduced = [
        estimate(b, "kfac", sharing="reduce", **o)
        for b, o in (([batch], {"example_weights": "w"}), ([collate(copies)], {}))
    ]
    assert_same(*reduced)


def test_decay_is_a_weight_by_age():
    decay = 0.6
    ages = torch.tensor([decay ** (5 - i) for i in range(6)], dtype=torch.float64)
    decayed = estimate(split(EXAMPLES, {2, 3}), decay=decay)
    weighted = estimate([collate(EXAMPLES, w=ages)], example_weights="w")
    for key in EVERY:
        assert_same(decayed[key], weighted[key])
    assert decayed["gram"].header.decay == decay


def test_a_weight_of_zero_is_absence():
    batch = collate(EXAMPLES[:3], w=torch.tensor([1.0, 0.0, 1.0]))
    for key, fisher in estimate([batch], example_weights="w").items():
        assert_same(fisher, estimate([collate([EXAMPLES[0], EXAMPLES[2]])])[key])


@pytest.mark.parametrize("structure", [*EVERY, "ekfac"])
def test_merging_is_associative_and_commutative_and_adds_up_to_the_whole(structure):
    basis = estimate([collate(EXAMPLES)], "kfac") if structure == "ekfac" else None
    a, b, c = (estimate([collate(EXAMPLES[i : i + 2])], structure, basis=basis) for i in (0, 2, 4))
    whole = estimate([collate(EXAMPLES)], structure, basis=basis)
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_same(a.merge(b), b.merge(a))
    assert_same(a.merge(b).merge(c), whole)
    tripled = a.scaled(3.0).merge(b)
    for name in LAYERS:
        assert_close(a.scaled(3.0)[name].to_dense(), a[name].to_dense())
        if "kfac" not in structure:  # a product of two means is not linear
            expected = (3 * a[name].to_dense() + b[name].to_dense()) / 4
            assert_close(tripled[name].to_dense(), expected)


def test_squares_of_a_scaled_loss():
    loss = lambda factor: lambda model, batch: factor * torch.tanh(model(batch)).sum((1, 2))
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 4).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    one, two = (fg.estimate_fisher(model, [x], [*EVERY, "ekfac"], loss=loss(f)) for f in (1.0, 2.0))
    for key in one:
        assert_close(two[key][""].to_dense(), 4 * one[key][""].to_dense())


@settings(deadline=None, max_examples=5)
@given(kind=st.sampled_from(["empirical", "mc", "margin", "ggn"]), unit=st.sampled_from(["sequence", "token"]))
def test_everything_is_positive_semidefinite_and_traces_agree(kind, unit):
    structures = {**{key: key for key in EVERY}, "in": fg.Structure("gram", side="input"), "ekfac": "ekfac"}
    fishers = estimate([collate(EXAMPLES)], structures, kind=kind, unit=unit)
    for name in LAYERS:
        trace = fishers["exact"][name].trace()
        for key in structures:
            values = torch.linalg.eigvalsh(fishers[key][name].to_dense())
            assert values[0] >= -1e-12 * values[-1]
            if key not in ("kfac", "kfac-sketch"):
                assert_close(fishers[key][name].trace(), trace)


def test_sharing_by_sums_and_by_positions_agree_for_one_token():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 4).double(), torch.randn(5, 3, dtype=torch.float64)
    loss = lambda model, batch: torch.tanh(model(batch)).sum(1)
    expand, reduce = (fg.estimate_fisher(model, [x], "kfac", loss=loss, sharing=s) for s in ("expand", "reduce"))
    assert_close(expand[""].to_dense(), reduce[""].to_dense())


def test_one_pass_feeds_several_structures_with_the_same_result_as_apart():
    reads = []

    class Batches(list):
        def __iter__(self):
            reads.append(1)
            return super().__iter__()

    batches = Batches(split(EXAMPLES, {2}))
    together = estimate(batches, kind="mc")
    assert len(reads) == 1 and list(together) == EVERY
    for key in EVERY:
        assert_same(together[key], estimate(batches, key, kind="mc"), 1e-14)
    reads.clear()
    estimate(batches, [*EVERY, "ekfac"])
    assert len(reads) == 2  # the second for EKFAC's moments; its bases come from the KFAC asked for anyway


def test_ekfac_in_one_sweep_has_the_bases_of_the_leading_part_and_the_moments_of_the_rest():
    batches = split(EXAMPLES, {2, 3, 5})
    reads = iter(batches)
    sweep = estimate(reads, "ekfac", basis_examples=3)
    leading = estimate(batches[:2], "kfac")
    rest = estimate(batches[2:], "ekfac", basis=leading)
    for name in LAYERS:
        assert torch.equal(sweep[name].output_basis, rest[name].output_basis)
        assert_close(sweep[name].values, rest[name].values)
    assert (sweep.header.basis, rest.header.basis) == ("one-sweep", "given")
    assert estimate(batches, "ekfac").header.basis == "two-pass"
    with pytest.raises(ValueError, match=r"basis_examples=6: of 6 examples none"):
        estimate(batches, "ekfac", basis_examples=6)


def test_ekfac_layers_that_share_inputs_share_a_basis():
    fisher = estimate([collate(EXAMPLES)], "ekfac")
    sums = {name: fisher.accumulators[name].sums["input_basis"] for name in LAYERS}
    assert sums["first"] is sums["twin"] and sums["first"] is not sums["second"]


def test_ekfac_moments_in_different_bases_are_not_merged():
    a, b = (estimate([collate(EXAMPLES[i : i + 3])], "ekfac") for i in (0, 3))
    with pytest.raises(ValueError, match=r"'first'.*different eigenbases.*basis="):
        a.merge(b)


def test_the_exact_fisher_finds_its_eigenpairs_through_the_dual_and_its_quadratic_forms_without_weight_gradients():
    fisher = estimate([collate(EXAMPLES)], "exact")
    for name, (p, q) in LAYERS.items():
        operator = fisher[name]
        dense = operator.to_dense()
        values, vectors = operator.eigh()
        assert len(values) == 6 < p * q
        assert_close(values, torch.linalg.eigvalsh(dense).flip(0)[:6])
        assert_close((vectors * values) @ vectors.T, dense)
        assert_close(operator.dual().trace(), operator.trace())
        left, right = torch.randn(p, 2, dtype=torch.float64), torch.randn(2, q, dtype=torch.float64)
        delta = (left @ right).flatten()
        assert_close(operator.quadratic(fg.LowRank(left, right)), delta @ dense @ delta)


@pytest.mark.parametrize("budget", [1, 2**24])
def test_exact_operators_in_small_pieces_and_with_long_examples(budget):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 1, 3, 2])
    d, a = (torch.randn(9, size, dtype=torch.float64, generator=generator) for size in (4, 3))
    operator = fg.ExactOperator(d, a, lengths, 4, budget)
    pieces = [(x.T @ y).flatten() for x, y in zip(d.split(lengths.tolist()), a.split(lengths.tolist()), strict=True)]
    dense = sum(torch.outer(g, g) for g in pieces) / 4
    assert_close(operator.to_dense(), dense)
    assert_close(operator.eigh(3)[0], torch.linalg.eigvalsh(dense).flip(0)[:3])
    assert_close(operator.diagonal(), dense.diagonal())
    with pytest.raises(ValueError, match="belong together"):
        fg.ExactOperator(d, a, lengths[:2], 4)


def test_first_tokens_count_more_where_asked():
    model = SmallLM()
    weigh = fg.FirstTokens(2, 5.0)
    weighted = estimate([collate(EXAMPLES)], "gram", model, token_weights=weigh)
    expected = 0
    for ids, labels in EXAMPLES:
        logits = model(ids[None])["logits"][0, :-1]
        places = (labels[1:] != -100).nonzero()[:, 0]
        w = torch.tensor([5.0 if i < 2 else 1.0 for i in range(len(places))]).double()
        nll = torch.nn.functional.cross_entropy(logits[places], labels[1:][places], reduction="none")
        (g,) = torch.autograd.grad((w * nll).sum() / w.sum(), model.second.weight)
        expected = expected + g @ g.T / len(EXAMPLES)
    assert_close(weighted["second"].to_dense(), expected)
    batch = collate(EXAMPLES)
    by_key = estimate([batch | {"tw": weigh(batch)}], "gram", model, token_weights="tw")
    assert_same(by_key, weighted)


@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["empirical", "mc", "type2", "ggn", "margin"])
def test_weights_of_zero_and_one_are_labels_of_those_tokens_alone(kind, reduction, unit):
    batch = collate(EXAMPLES)
    chosen = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(3)) < 0.5
    chosen[1] = False
    options = {"kind": kind, "reduction": reduction, "unit": unit}
    weighted = estimate(
        [batch], "gram", token_weights=lambda b: chosen[: len(b["labels"])].double(), verify=False, **options
    )
    labelled = estimate([batch | {"labels": batch["labels"].masked_fill(~chosen, -100)}], "gram", **options)
    assert 0 < labelled.header.tokens == weighted.header.tokens and labelled.header.examples == weighted.header.examples
    for name in labelled:
        assert labelled[name].trace() > 0
        assert_close(weighted[name].to_dense(), labelled[name].to_dense())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_scale_of_token_weights_counts_in_a_sum_and_in_a_mean_it_does_not(reduction):
    model, batch = SmallLM(), collate(EXAMPLES)
    base = 0.5 + torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(3))
    trace = lambda weights, kind="empirical": float(
        estimate([batch | {"w": weights}], "gram", model, kind=kind, reduction=reduction, token_weights="w")[
            "second"
        ].trace()
    )
    expected = 0
    for row, (ids, labels) in enumerate(EXAMPLES):
        logits, places = model(ids[None])["logits"][0, :-1], (labels[1:] != -100).nonzero()[:, 0]
        w = base[row, 1:][places].double()
        nll = torch.nn.functional.cross_entropy(logits[places], labels[1:][places], reduction="none")
        value = (w * nll).sum() / (w.sum() if reduction == "mean" else 1)
        (g,) = torch.autograd.grad(value, model.second.weight)
        expected = expected + float(g.square().sum()) / len(EXAMPLES)
    assert trace(base) == pytest.approx(expected, rel=1e-10)
    assert trace(3 * base) == pytest.approx(expected * (9 if reduction == "sum" else 1), rel=1e-6)
    for kind, power in (("type2", 2), ("ggn", 1)):
        grown = trace(4 * base, kind) / trace(base, kind)
        assert grown == pytest.approx(4**power if reduction == "sum" else 1, rel=1e-6)
    if reduction == "mean":  # float32 does not hold the sum, nor a quotient of what is below its normal numbers
        model, ones = SmallLM(dtype=torch.float32), torch.ones_like(base)
        for scale in (1e-40, 3e38):
            found = estimate([batch | {"w": scale * ones}], "gram", model, token_weights="w")["second"].trace()
            assert float(found) == pytest.approx(float(estimate([batch], "gram", model)["second"].trace()), rel=1e-5)


@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_of_the_dtype_asked_for_whatever_the_models(model_dtype, dtype):
    fishers = estimate([collate(EXAMPLES)], [*EVERY, "ekfac"], SmallLM(dtype=model_dtype), dtype=dtype)
    for fisher in fishers.values():
        assert fisher.header.dtype == str(dtype).removeprefix("torch.")
        assert all(operator.dtype == dtype for operator in fisher.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": []}, "structure is empty"),
        ({"structure": ["gram", "gram"]}, "asked for twice"),
        ({"decay": 0.0}, "decay=0.0"),
        ({"dtype": torch.bfloat16}, r"float32 or torch\.float64"),
        ({"structure": "kfac", "sharing": "reduce", "unit": "token"}, "unit='token'"),
        ({"structure": "kfac", "sharing": "some"}, "sharing='some'"),
        ({"structure": "sketch", "checkpoint": "x", "checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"kind": "type2", "max_draws": 3}, r"kind='type2'.*5 classes.*max_draws=3.*kind='mc'"),
        ({"example_weights": "absent"}, "example_weights='absent'.*input_ids"),
        ({"example_weights": lambda b: torch.ones(2)}, r"shape \(2,\)"),
        ({"example_weights": lambda b: -torch.ones(6)}, "non-negative"),
        ({"token_weights": lambda b: -torch.ones(6, 6)}, "non-negative"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, message):
    options = {"structure": "gram", **options}
    with pytest.raises(ValueError, match=message):
        estimate([collate(EXAMPLES)], **options)


def test_batches_that_can_be_read_once_are_refused_where_two_passes_are_needed():
    with pytest.raises(TypeError, match="basis_examples"):
        estimate(iter([collate(EXAMPLES)]), "ekfac")
    with pytest.raises(TypeError, match="once"):
        fg.StreamingFisher(SmallLM(), iter([]))


@settings(deadline=None, max_examples=20)
@given(rows=st.lists(st.integers(0, 700), min_size=1, max_size=4), size=st.sampled_from([1, 5, 200, 257]))
def test_rows_that_wait_and_triangles_by_blocks_give_the_whole_sum(rows, size):
    generator = torch.Generator().manual_seed(sum(rows))
    blocks = [torch.randn(m, size, dtype=torch.float64, generator=generator) for m in rows]
    half = HalfGram(torch.zeros(size, size, dtype=torch.float64))
    total = torch.zeros(size, size, dtype=torch.float64)
    for block in blocks:
        half.add(block)
        add_product_(total, block, 2 * block)
    half.flush()
    expected = sum(block.T @ block for block in blocks)
    assert torch.allclose(mirrored(half.total), expected, atol=1e-10)
    assert torch.allclose(mirrored(total), 2 * expected, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 10, 40])
def test_leading_pairs_are_the_largest(dtype, k):
    factor = torch.randn(40, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = (factor @ factor.T).to(dtype)
    values, vectors = leading_pairs(matrix, k)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(values.double(), torch.linalg.eigvalsh(factor @ factor.T).flip(0)[:k], tolerance)
    assert_close(vectors.T @ vectors, torch.eye(k, dtype=dtype), tolerance * 10)
    assert values.dtype == vectors.dtype == dtype


@pytest.mark.parametrize("structure", ["kfac", "kfac-sketch", "gram", "diagonal", "sketch"])
@pytest.mark.parametrize("large", ["inputs", "gradients"])
def test_squares_past_the_range_of_float32_are_refused_by_layer(structure, large):
    model = torch.nn.Linear(3, 2)
    x, scale = torch.ones(2, 3), 1.0
    if large == "inputs":
        x[1, 2] = 1e25
        model.weight.data[:, 2] = 0
    else:
        scale = 1e25
    loss = lambda model, x: scale * model(x).sum(1)
    with pytest.raises(FloatingPointError, match="layer '': a sum is not finite; pass dtype"):
        fg.estimate_fisher(model, [x], structure, rank=2, loss=loss)
    assert fg.estimate_fisher(model, [x], structure, rank=2, loss=loss, dtype=torch.float64)[""].trace() > 0


@pytest.mark.parametrize("wider", [-1, 1])
def test_token_weights_of_another_length_are_refused(wider):
    batch = collate(EXAMPLES)
    length = batch["labels"].shape[1]
    with pytest.raises(ValueError, match=rf"token_weights returned \(6, {length + wider}\).*labels, \(6, {length}\)"):
        estimate([batch], "gram", token_weights=lambda batch: torch.ones(6, length + wider))
