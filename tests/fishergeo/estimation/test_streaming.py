"""Operators that re-read their data, the second pass, and the parts of one pass, against weight gradients one by one."""

import pytest
import torch
from geometry_cases import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import EXPERTS, Routed, expert_gradients, routed_batch, summed
from torch import nn

import fishergeo as fg
from fishergeo.accumulators.products import gram_product, gram_trace

NAMES = ("first", "second")
LENGTHS = (5, 3, 6, 4, 6, 2, 5, 4)


class Tagger(nn.Module):
    """Two linear maps over tokens, the second reading a mean over what came before."""

    def __init__(self, width=9, hidden=7, classes=5):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, classes)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
        self.double()

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs))
        steps = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[:, None]
        return self.second(hidden.cumsum(1) / steps)


def loss(model, batch):
    terms = nn.functional.cross_entropy(model(batch["inputs"]).mT, batch["targets"], reduction="none")
    mask = batch["attention_mask"].to(terms.dtype)
    return (terms * mask).sum(1) / mask.sum(1)


def make_batches(cuts=(3,), seed=0):
    generator, rows = torch.Generator().manual_seed(seed), []
    for length in LENGTHS:
        rows.append((gaussian(seed + len(rows), length, 9), torch.randint(0, 5, (length,), generator=generator)))
    edges, batches = [0, *sorted(cuts), len(rows)], []
    for a, b in zip(edges, edges[1:], strict=False):  # noqa: RUF007
        width = max(len(x) for x, _ in rows[a:b])
        batch = {
            "inputs": torch.zeros(b - a, width, 9, dtype=torch.float64),
            "targets": torch.zeros(b - a, width, dtype=torch.long),
            "attention_mask": torch.zeros(b - a, width, dtype=torch.long),
        }
        for i, (x, y) in enumerate(rows[a:b]):
            batch["inputs"][i, : len(x)], batch["targets"][i, : len(x)] = x, y
            batch["attention_mask"][i, : len(x)] = 1
        batches.append(batch)
    return batches


def weight_gradients(model, batches, name):
    """G_i of every example by plain autograd, alone in its batch."""
    found, weight = [], model.get_submodule(name).weight
    for batch in batches:
        for i in range(len(batch["inputs"])):
            n = int(batch["attention_mask"][i].sum())
            one = {key: value[i : i + 1, :n] for key, value in batch.items()}
            found.append(torch.autograd.grad(loss(model, one).sum(), weight)[0])
    return torch.stack(found)


def dense(gradients, side):
    other = gradients if side == "output" else gradients.mT
    return (other @ other.mT).mean(0)


@settings(max_examples=12, deadline=None)
@given(st.sets(st.integers(1, 7), max_size=4), st.sampled_from(["output", "input"]), st.integers(1, 12))
def test_products_and_traces_are_those_of_the_weight_gradients_however_batched(cuts, side, columns):
    model, batches = Tagger(), make_batches(cuts)
    stream = fg.StreamingFisher(model, batches, side=side, layers=list(NAMES), loss=loss)
    blocks = {name: gaussian(1, size, columns) for name, size in stream.sizes.items()}
    products = stream.multi_matmul(blocks)
    for name in NAMES:
        matrix = dense(weight_gradients(model, batches, name), side)
        assert torch.allclose(products[name], matrix @ blocks[name], rtol=1e-10, atol=1e-14)
        assert stream.traces[name] == pytest.approx(float(matrix.trace()), rel=1e-10)
    assert (stream.passes, stream.examples) == (1, len(LENGTHS))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["empirical", "mc", "margin"])
@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_a_language_model_streams_what_its_gram_matrix_holds(tiny_llama, kind, unit, side):
    model, generator = tiny_llama(torch.float64, layers=1), torch.Generator().manual_seed(0)
    batches = []
    for width in (6, 9):
        ids = torch.randint(3, 60, (2, width), generator=generator)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[0, :2], labels[:, :3] = 0, -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    options = {"kind": kind, "unit": unit, "side": side, "layers": ["*.q_proj", "*.down_proj"], "seed": 3}
    stream = fg.StreamingFisher(model, batches, **options)
    exact = fg.estimate_fisher(model, batches, structure="gram", **options)
    for _ in range(2):  # sampled labels are the same in every pass
        products = stream.multi_matmul({name: torch.eye(size) for name, size in stream.sizes.items()})
        for name in exact:
            assert torch.allclose(products[name], exact[name].to_dense(), rtol=1e-9, atol=1e-14)
            assert stream.traces[name] == pytest.approx(float(exact[name].trace()), rel=1e-9)
    assert stream.count == exact.header.count


@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from(["sequence", "token"]), st.integers(0, 99),
)  # fmt: skip
def test_every_order_of_multiplication_gives_the_same(n, t, s, r, c, unit, seed):
    near, far, omega = gaussian(seed, n, t, s), gaussian(seed + 1, n, t, r), gaussian(seed + 2, s, c)
    if unit == "token":
        matrix = torch.einsum("nts,ntu,ntr,ntr->su", near, near, far, far)
    else:
        gradients = torch.einsum("nts,ntr->nsr", near, far)
        matrix = torch.einsum("nsr,nur->su", gradients, gradients)
    assert torch.allclose(gram_product(near, far, omega, unit), matrix @ omega, rtol=1e-9, atol=1e-9)
    assert float(gram_trace(near, far, unit)) == pytest.approx(float(matrix.trace()), rel=1e-9)


def test_lockstep_over_a_stream_finds_every_layers_pairs_in_shared_passes():
    model, batches = Tagger(), make_batches()
    stream = fg.StreamingFisher(model, batches, layers=list(NAMES), loss=loss)
    found = fg.lanczos_layers(stream, 3, block=2, strict=True)
    exact = fg.estimate_fisher(model, batches, "gram", layers=list(NAMES), loss=loss)
    for name in NAMES:
        matrix = exact[name].to_dense()
        assert torch.allclose(found[name].values, torch.linalg.eigvalsh(matrix).flip(0)[:3], rtol=1e-8)
        residuals = (matrix @ found[name].vectors - found[name].vectors * found[name].values).norm(dim=0)
        assert bool((residuals <= found[name].residuals).all())
        alone = fg.lanczos_layers(fg.StreamingFisher(model, batches, layers=[name], loss=loss), 3, block=2)[name]
        assert torch.allclose(alone.vectors, found[name].vectors, atol=1e-6)
    assert stream.passes == max(f.passes for f in found.values()) < sum(f.passes for f in found.values())


def test_lockstep_starts_from_a_sketch_and_stops_by_energy():
    model, batches = Tagger(), make_batches()
    stream = fg.StreamingFisher(model, batches, layers=list(NAMES), loss=loss)
    sketch = fg.estimate_fisher(model, batches, "sketch", rank=4, layers=list(NAMES), loss=loss)
    start = {name: sketch[name].eigh()[1] for name in NAMES}
    found = fg.lanczos_layers(stream, 4, start=start, energy=0.6, recheck=False)
    for name, result in found.items():
        matrix = dense(weight_gradients(model, batches, name), "output")
        captured = (result.vectors * (matrix @ result.vectors)).sum() / matrix.trace()
        assert result.stopped == "energy" and float(captured) >= 0.6 - 1e-9
    assert stream.passes == 1


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 50), st.sampled_from(["output", "input"]))
def test_the_second_pass_certifies_its_pairs_and_never_captures_less(rank, k, seed, side):
    model, batches = Tagger(), make_batches(seed=seed)
    options = {"layers": list(NAMES), "loss": loss, "side": side}
    sketch = fg.estimate_fisher(model, batches, "sketch", rank=rank, seed=seed, **options)
    stream = fg.StreamingFisher(model, batches, **options)
    found = fg.second_pass(sketch, stream, k)
    assert stream.passes == 1
    for name, result in found.items():
        matrix = dense(weight_gradients(model, batches, name), side)
        residuals = (matrix @ result.vectors - result.vectors * result.values).norm(dim=0)
        assert bool((residuals <= result.residuals).all())
        assert bool((result.values <= torch.linalg.eigvalsh(matrix).flip(0)[: len(result.values)] + 1e-12).all())
        before = sketch[name].vectors[:, : len(result.values)]
        energy = lambda v, matrix=matrix: float((v * (matrix @ v)).sum())
        assert energy(result.vectors) >= energy(before) * (1 - 1e-6)
        inside = (2e-12 + result.residuals <= 1e-2 * result.values) == result.pairs_converged
        assert bool(inside.all()) or float(result.residuals.max()) < 1e-10


def test_a_second_pass_takes_plain_operators_and_needs_a_trace():
    model, batches = Tagger(), make_batches()
    stream = fg.StreamingFisher(model, batches, layers=["first"], loss=loss)
    matrix = dense(weight_gradients(model, batches, "first"), "output")
    bare = {"first": fg.SpectralOperator(torch.ones(3), torch.linalg.qr(gaussian(0, 7, 3)).Q)}
    assert len(fg.second_pass(bare, stream, 2)["first"].values) == 2
    complete = fg.second_pass({"first": fg.DenseOperator(torch.eye(7).double())}, stream, 7)["first"]
    assert torch.allclose(complete.values, torch.linalg.eigvalsh(matrix).flip(0), atol=1e-12) and complete.converged

    class Blind:
        sizes, dtype, device = stream.sizes, stream.dtype, stream.device
        multi_matmul = stream.multi_matmul

    with pytest.raises(ValueError, match="its trace is not known"):
        fg.second_pass(bare, Blind(), 2)


def test_parts_of_one_pass_are_the_sketches_of_their_examples():
    model, batches = Tagger(), make_batches((3, 4))
    parts = fg.sketch_shards(model, batches, 3, rank=9, layers=list(NAMES), loss=loss)
    for name in NAMES:
        gradients = weight_gradients(model, batches, name)
        for number, part in enumerate(parts):
            assert torch.allclose(part[name].to_dense(), dense(gradients[number::3], "output"), atol=1e-10)
        agreement = fg.shard_agreement([part[name] for part in parts], 3)
        assert agreement.mean.shape == (3,) and bool((agreement.low <= agreement.high).all())


@pytest.mark.parametrize("cuts", [(8,), (3, 5)])
@pytest.mark.parametrize("length", [1, 5])
def test_parts_count_the_examples_that_an_expert_does_not_see(cuts, length):
    model, x = Routed(), routed_batch(8, length)
    gradients = expert_gradients(model, x)[EXPERTS[1]]
    parts = fg.sketch_shards(model, list(x.split(cuts)), 2, rank=3, layers=list(EXPERTS[1:]), loss=summed)
    for number, part in enumerate(parts):
        own = gradients[number::2]
        assert torch.allclose(part[EXPERTS[1]].to_dense(), torch.einsum("ijk,ilk->jl", own, own) / 4, atol=1e-12)


def test_agreement_of_two_parts_is_their_overlap_and_of_equal_ones_is_complete():
    one, two = (fg.DenseOperator(x.T @ x) for x in (gaussian(0, 20, 6), gaussian(1, 20, 6)))
    agreement = fg.shard_agreement([one, two], 4)
    for j in range(1, 5):
        overlap = fg.subspace_overlap(one.eigh(j)[1], two.eigh(j)[1])
        assert float(agreement.mean[j - 1]) == pytest.approx(float(overlap), abs=1e-8)
    assert torch.equal(agreement.low, agreement.high)
    assert float(fg.shard_agreement([one, one, one], 4).low.min()) == pytest.approx(1)


def test_data_that_change_between_passes_are_noticed():
    calls = []

    def fresh():
        calls.append(1)
        return make_batches()[: 3 - len(calls)]

    stream = fg.StreamingFisher(Tagger(), fresh, layers=["first"], loss=loss)
    block = {"first": torch.eye(7).double()}
    stream.multi_matmul(block)
    with pytest.raises(RuntimeError, match="batches changed between passes: 8 examples"):
        stream.multi_matmul(block)


def test_a_model_that_has_moved_since_the_first_pass_is_noticed():
    model = Tagger()
    stream = fg.StreamingFisher(model, make_batches(), layers=["first"], loss=loss)
    trace = stream["first"].trace()
    with torch.no_grad():
        model.first.weight.mul_(10)
    for call in (stream["first"].trace, stream["first"].diagonal, lambda: stream["first"] @ torch.eye(7).double()):
        with pytest.raises(RuntimeError, match="weights have changed since the first pass"):
            call()
    fresh = fg.StreamingFisher(model, make_batches(), layers=["first"], loss=loss)
    assert float(fresh["first"].trace()) != float(trace)


def bad_batches():
    batches = make_batches()
    batches[1]["inputs"][0, 0, 0] = torch.nan
    return batches


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fg.StreamingFisher(Tagger(), iter(make_batches())), TypeError, "can be read only once"),
        (lambda: fg.StreamingFisher(Tagger(), [], unit="word"), ValueError, "unit must be one of"),
        (lambda: fg.StreamingFisher(Tagger(), [], side="left"), ValueError, "side must be one of"),
        (lambda: fg.StreamingFisher(Tagger(), [], kind="true"), ValueError, "kind must be one of"),
        (lambda: fg.StreamingFisher(Tagger(), [], layers="third"), ValueError, "third"),
        (lambda: fg.StreamingFisher(Tagger(), [], loss=loss, dtype=torch.bfloat16), ValueError, "dtype=torch.bfloat16"),
        (
            lambda: fg.StreamingFisher(Tagger(), [], loss=loss).multi_matmul({"first": torch.eye(3)}),
            ValueError,
            "block of layer 'first' must be",
        ),
        (
            lambda: fg.StreamingFisher(Tagger(), [], loss=loss).multi_matmul({"third": torch.eye(3)}),
            KeyError,
            "no layer 'third'",
        ),
        (
            lambda: fg.StreamingFisher(Tagger(), [], loss=loss).multi_matmul({"first": torch.eye(7)}),
            ValueError,
            "no example",
        ),
        (
            lambda: fg.StreamingFisher(Tagger(), bad_batches(), loss=loss).multi_matmul({"first": torch.eye(7)}),
            FloatingPointError,
            "batch 1",
        ),
        (lambda: fg.sketch_shards(Tagger(), make_batches(), 1, loss=loss), ValueError, "shards must be"),
        (lambda: fg.sketch_shards(Tagger(), make_batches(), 9, loss=loss), ValueError, "part 8 of 9 has no example"),
        (lambda: fg.sketch_shards(Tagger(), bad_batches(), loss=loss), FloatingPointError, "batch 1"),
        (lambda: fg.shard_agreement([fg.DenseOperator(torch.eye(3))], 1), ValueError, "shards holds 1"),
        (lambda: fg.shard_agreement([torch.eye(3)] * 2, 1), TypeError, "shards.0. must be"),
        (
            lambda: fg.shard_agreement([fg.DenseOperator(torch.eye(3)), fg.DenseOperator(torch.eye(2))], 1),
            ValueError,
            "shards.1. has shape",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
