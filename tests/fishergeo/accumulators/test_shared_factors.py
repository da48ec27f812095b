"""Layers that read one input hold one input factor, which is right and never that of an earlier state."""

import copy
import itertools

import pytest
import torch
from fisher_oracle import assert_close, collate, make_examples, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import fishergeo as fg
from alignguard.guard import Guard, GuardConfig, load_guard, save_guard
from fishergeo._linalg import mirrored
from fishergeo.accumulators import KfacAccumulator, Shared
from fishergeo.capture import Record

EXAMPLES = make_examples([5, 9, 7, 4])
GROUPS = [
    [f"model.layers.{i}.{module}" for module in modules]
    for i in range(2)
    for modules in (
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    )
]


def kfac(examples, **options):
    return fg.estimate_fisher(tiny_llama(), [collate(examples[:1]), collate(examples[1:])], "kfac", **options)


def input_moments(examples):
    """Layer -> mean a aᵀ over all tokens, by a plain forward of one example at a time."""
    model, rows = tiny_llama(), {}
    for name in itertools.chain(*GROUPS):

        def hook(module, inputs, output, name=name):
            rows.setdefault(name, []).append(inputs[0][0])

        model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        for ids, _ in examples:
            model(input_ids=ids[None])
    return {name: torch.cat(parts).T @ torch.cat(parts) / len(torch.cat(parts)) for name, parts in rows.items()}


def assert_one_factor_a_group(operators):
    pointers = [{operators[name].input_factor.data_ptr() for name in group} for group in GROUPS]
    assert all(len(one) == 1 for one in pointers)
    assert len(set.union(*pointers)) == len(GROUPS)


def test_layers_that_read_one_input_hold_one_factor_whichever_way_the_fisher_came(tmp_path):
    fisher = kfac(EXAMPLES)
    fisher.save(tmp_path / "fisher.safetensors")
    assert_one_factor_a_group(fisher)
    assert_one_factor_a_group({name: fisher[name].compact() for name in fisher})
    for other in (
        *(fg.Fisher.load(tmp_path / "fisher.safetensors", lazy=lazy) for lazy in (True, False)),
        fisher.merge(fisher),
        fisher.scaled(0.5),
        copy.deepcopy(kfac(EXAMPLES)),
    ):
        assert_one_factor_a_group(other)
        for name in fisher:
            assert_close(other[name].input_factor, fisher[name].input_factor, 1e-14)
            assert_close(other[name].output_factor, fisher[name].output_factor, 1e-14)


def test_input_groups_are_named_after_their_first_layer_whichever_way_the_fisher_came(tmp_path):
    model, data = tiny_llama(), [collate(EXAMPLES[:1]), collate(EXAMPLES[1:])]
    expected = {name: group[0] for group in GROUPS for name in group}
    fishers = fg.estimate_fisher(
        model, data, {"kfac": "kfac", "two": "ekfac", "one": fg.Structure("ekfac", basis_examples=1), "gram": "gram"}
    )
    assert {key: dict(fisher.input_groups) for key, fisher in fishers.items()} == {
        **dict.fromkeys(("kfac", "two", "one"), expected),
        "gram": {name: name for name in expected},
    }
    for structure in ("kfac", "two"):
        fisher, path = fishers[structure], tmp_path / f"{structure}.safetensors"
        fisher.save(path)
        given = fg.estimate_fisher(model, data, "ekfac", basis=fisher)
        loaded = [fg.Fisher.load(path, lazy=lazy) for lazy in (True, False)]
        for other in (*loaded, fisher.merge(fisher), fisher.scaled(0.5), copy.deepcopy(loaded[0]), given):
            assert dict(other.input_groups) == expected
            assert {name: other.accumulators[name].group for name in other} == expected
        part = fg.Fisher.load(path, GROUPS[0][1:])
        assert dict(part.input_groups) == dict.fromkeys(GROUPS[0][1:], GROUPS[0][1])
        bases = fg.estimate_fisher(model, data, "ekfac", basis=part, layers=GROUPS[0][1:]).accumulators
        assert bases[GROUPS[0][1]].sums["input_basis"] is bases[GROUPS[0][2]].sums["input_basis"]
    apart = kfac(EXAMPLES, share_inputs=False)
    assert dict(apart.input_groups) == {name: name for name in expected}


def test_factors_are_those_of_a_plain_forward_shared_or_not():
    shared, apart = kfac(EXAMPLES), kfac(EXAMPLES, share_inputs=False)
    assert len({apart[name].input_factor.data_ptr() for name in GROUPS[0]}) == 3
    for name, moment in input_moments(EXAMPLES).items():
        for fisher in (shared, apart):
            factor = fisher[name].input_factor
            assert torch.equal(factor, factor.T)
            assert_close(factor, moment, 1e-12)


class OneOrBoth(torch.nn.Module):
    """Two layers read the input, of which batches of three examples take the first alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (torch.nn.Linear(3, 2, bias=False).double() for _ in range(2))

    def forward(self, x):
        return self.first(x) if len(x) == 3 else self.first(x) + self.second(x)


def test_a_batch_that_a_layer_of_a_group_misses_is_no_part_of_its_own_factor():
    model, x = OneOrBoth(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    options = {"layers": ["first", "second"], "loss": lambda model, x: model(x).square().sum(1)}
    with pytest.raises(
        RuntimeError, match=r"layer 'second' shared its input .* not in batch 1; pass share_inputs=False"
    ):
        fg.estimate_fisher(model, [x[:2], x[2:]], "kfac", **options)
    fisher = fg.estimate_fisher(model, [x[:2], x[2:]], "kfac", share_inputs=False, **options)
    assert_close(fisher["first"].input_factor, x.T @ x / 5)
    assert_close(fisher["second"].input_factor, x[:2].T @ x[:2] / 2)


def test_a_factor_that_was_read_is_not_that_of_what_comes_after():
    one, other = kfac(EXAMPLES), kfac(make_examples([6, 8], seed=1))
    read = {name: one[name].input_factor.clone() for name in one}
    both, halved = one.merge(other), one.scaled(0.5).merge(other)
    whole = input_moments([*EXAMPLES, *make_examples([6, 8], seed=1)])
    alone, rest = input_moments(EXAMPLES), input_moments(make_examples([6, 8], seed=1))
    for name in one:
        assert_close(both[name].input_factor, whole[name], 1e-12)
        assert_close(halved[name].input_factor, (25 / 2 * alone[name] + 14 * rest[name]) / (25 / 2 + 14), 1e-12)
        assert torch.equal(one[name].input_factor, read[name])


def test_an_accumulator_may_be_read_between_batches_and_after_a_decay():
    generator = torch.Generator().manual_seed(0)
    layout = kfac(EXAMPLES).header.layout(GROUPS[0][0])
    accumulators = [KfacAccumulator.empty(layout, torch.float64, torch.device("cpu")) for _ in range(2)]
    accumulators[1].join(accumulators[0])
    moment, output, weight, tokens = 0.0, 0.0, 0.0, 0.0
    for number in range(3):
        a, d = torch.randn(2, 2, 5, 12, generator=generator, dtype=torch.float64)
        for accumulator in accumulators:
            accumulator.add(Record(layout.name, a, d, None, 0), Shared(number))
        moment, output, tokens, weight = (
            moment + a.flatten(0, 1).T @ a.flatten(0, 1),
            output + d.flatten(0, 1).T @ d.flatten(0, 1),
            tokens + 10,
            weight + 2,
        )
        if number == 1:
            done = set()
            for accumulator in accumulators:
                accumulator.decay_(0.25, done)
            moment, output, tokens, weight = (0.25 * x for x in (moment, output, tokens, weight))
        made = {}
        for accumulator in accumulators:
            accumulator.finish()
            operator = accumulator.operator(weight, made)
            assert_close(operator.input_factor, moment / tokens, 1e-12)
            assert_close(operator.output_factor, output / weight, 1e-12)
        assert len(made) == 1


@settings(deadline=None, max_examples=25)
@given(
    size=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    number=st.booleans(),
)
def test_a_mirrored_triangle_is_bit_for_bit_symmetric_and_leaves_the_sum(size, dtype, number):
    total = torch.randn(size, size, dtype=dtype, generator=torch.Generator().manual_seed(size))
    total[torch.ones(size, size).triu(1).bool()] = torch.nan  # BLAS leaves anything there
    before = total.clone()
    divisor = 7.0 if number else torch.tensor([7.0], dtype=dtype)
    whole = mirrored(total, divisor)
    assert whole.is_contiguous() and torch.equal(whole, whole.T)
    assert torch.equal(whole.tril(), (total / divisor).tril())
    assert torch.equal(total.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("size", [500, 1000])
def test_mirroring_makes_one_tensor_of_that_size(size):
    total = torch.ones(size, size)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        mirrored(total, 2.0)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    born = [e.nbytes() for e in events if e.nbytes() > 0]
    assert sum(nbytes >= 4 * size * size for nbytes in born) == 1
    assert max(nbytes for nbytes in born if nbytes < 4 * size * size) <= 4 * size * size / 10


def test_a_guard_holds_one_factor_before_and_after_its_checkpoint(tmp_path):
    rows = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in EXAMPLES]
    config = GuardConfig.curvature(structure="kfac", refresh_examples=4)
    guards = [Guard(tiny_llama(), rows, config, method="full") for _ in range(2)]
    guards[0].refresh()
    save_guard(tmp_path, guards[0], {})
    load_guard(tmp_path, guards[1])
    for guard in guards:
        matrices = guard.updates.matrices.items()
        assert_one_factor_a_group({matrix.plain: guard.layers[name].operator for name, matrix in matrices})


class Pair(torch.nn.Module):
    """Two layers that read one tensor, or each its own."""

    def __init__(self, together):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (torch.nn.Linear(3, 2).double() for _ in range(2))
        self.together = together

    def forward(self, x):
        return self.a(x) + self.b(x if self.together else x.flip(1))


def test_estimates_that_share_inputs_otherwise_are_not_added():
    data = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = lambda model, batch: model(batch).sin().sum(1)
    one, other = (fg.estimate_fisher(Pair(t), [data], "kfac", loss=loss) for t in (True, False))
    for first, second in ((one, other), (other, one)):
        with pytest.raises(ValueError, match=r"layer 'a' shares its input with .* share_inputs=False"):
            first.merge(second)
    apart = [fg.estimate_fisher(Pair(t), [data], "kfac", loss=loss, share_inputs=False) for t in (True, False)]
    moments = data.T @ data, data.flip(1).T @ data.flip(1)
    assert_close(apart[0].merge(apart[1])["b"].input_factor, (moments[0] + moments[1]) / 8)


def test_moments_in_equal_bases_are_added_however_they_were_shared():
    data = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = lambda model, batch: model(batch).sin().sum(1)
    together, apart = (fg.estimate_fisher(Pair(True), [data], "kfac", loss=loss, share_inputs=s) for s in (True, False))
    first, second = (fg.estimate_fisher(Pair(True), [data], "ekfac", loss=loss, basis=b) for b in (together, apart))
    assert first.input_groups != second.input_groups
    merged = first.merge(second)
    for layer in "ab":  # a mean over the same data twice
        assert torch.allclose(merged[layer].to_dense(), first[layer].to_dense(), rtol=1e-12, atol=0)
