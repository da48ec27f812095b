"""Defects that other libraries' estimators have, each by a test that would show it here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LAYERS, SmallLM, assert_close, collate, make_examples
from torch.utils.flop_counter import FlopCounterMode

import fishergeo as fg
from fishergeo._linalg import orthonormalise
from fishergeo.accumulators import EkfacAccumulator, Layout, Shared
from fishergeo.capture import Record

EXAMPLES = make_examples([4, 6, 5, 3, 6])
EVERY = ["gram", "sketch", "diagonal", "kfac", "kfac-sketch", "ekfac", "exact"]


def estimate(batches, structure=EVERY, model=None, **options):
    return fg.estimate_fisher(model or SmallLM(), batches, structure, layers=list(LAYERS), rank=9, **options)


def test_the_one_sided_gram_does_not_take_the_gradient_of_the_summed_batch():
    one_batch, single = estimate([collate(EXAMPLES)], "gram"), estimate([collate([e]) for e in EXAMPLES], "gram")
    for name in LAYERS:
        assert_close(one_batch[name].to_dense(), single[name].to_dense())


def test_a_ragged_last_batch_weighs_by_its_examples_not_as_a_batch():
    ragged, even = estimate([collate(EXAMPLES[:4]), collate(EXAMPLES[4:])]), estimate([collate(EXAMPLES)])
    for key in EVERY:
        for name in LAYERS:
            assert_close(ragged[key][name].trace(), even[key][name].trace())


def test_a_streaming_product_weighs_a_ragged_last_batch_the_same_way():
    ones = {name: torch.ones(p * q, 1, dtype=torch.float64) for name, (p, q) in LAYERS.items()}
    ragged = fg.StreamingFisher(
        SmallLM(), [collate(EXAMPLES[:4]), collate(EXAMPLES[4:])], side="both", layers=list(LAYERS)
    )
    even = fg.StreamingFisher(SmallLM(), [collate(EXAMPLES)], side="both", layers=list(LAYERS))
    for name, product in ragged.multi_matmul(ones).items():
        assert_close(product, even.multi_matmul(ones)[name])


def test_factors_of_a_bfloat16_model_are_not_summed_in_bfloat16():
    """Enough equal batches that a bfloat16 sum stops growing: beyond 256 terms an addend is below half a unit."""
    model, batch = SmallLM(dtype=torch.bfloat16), collate(EXAMPLES[:1])
    once = estimate([batch], ["kfac", "gram", "diagonal"], model)
    often = estimate([batch] * 300, ["kfac", "gram", "diagonal"], model)
    for key, fisher in once.items():
        for name in LAYERS:
            assert fisher[name].dtype == torch.float32
            assert_close(often[key][name].to_dense(), fisher[name].to_dense(), 1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_enters_no_factor(side):
    padded = collate([*EXAMPLES, make_examples([12])[0]], side)
    padded = {key: value[:-1] for key, value in padded.items()}  # twice as wide as any example left
    clean = estimate([collate([e]) for e in EXAMPLES], ["kfac", "kfac-sketch", "gram", "diagonal", "exact"])
    for key, fisher in estimate([padded], list(clean)).items():
        for name in LAYERS:
            assert_close(fisher[name].to_dense(), clean[key][name].to_dense())


def test_a_longer_example_does_not_count_more_in_the_output_factor_by_its_positions():
    """The mean over positions is part of the objective; the sum of g gᵀ is divided by examples, not by positions."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 4).double(), torch.randn(2, 6, 3, dtype=torch.float64)
    loss = lambda model, batch: torch.tanh(model(batch)).sum(2).mean(1)
    g = (1 - torch.tanh(model(x).detach()) ** 2) / 6
    s = torch.einsum("nti,ntj->ij", g, g) / 2
    assert_close(fg.estimate_fisher(model, [x], "kfac", loss=loss)[""].output_factor, s)


def test_the_unit_is_named_in_the_result_and_changes_it(tmp_path):
    by = {unit: estimate([collate(EXAMPLES)], "gram", unit=unit) for unit in ("sequence", "token")}
    for unit, fisher in by.items():
        fisher.save(tmp_path / "f.safetensors")
        assert fg.Fisher.load(tmp_path / "f.safetensors").header.unit == unit and unit in repr(fisher)
    assert (by["sequence"]["first"].to_dense() - by["token"]["first"].to_dense()).norm() > 1e-6
    with pytest.raises(ValueError, match="unit"):
        by["sequence"].merge(by["token"])


def test_no_weight_gradient_is_computed(monkeypatch):
    """Every parameter is frozen while the model runs, so that back-propagation never multiplies for one."""
    model, seen = SmallLM(), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, args: seen.extend(p.requires_grad for p in m.parameters()))
    estimate([collate(EXAMPLES)], EVERY, model, verify=False)  # the proof asks autograd for them
    assert seen and not any(seen)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_graph_is_not_followed_below_the_first_layer_asked_for():
    model = SmallLM()
    reached = []
    model.embed.register_forward_hook(lambda m, a, output: reached.append(output.requires_grad))
    estimate([collate(EXAMPLES)], "gram", model, verify=False)
    assert reached == [False]


@pytest.mark.parametrize("structure", EVERY)
def test_not_a_number_is_found_in_its_batch_and_layer_not_at_the_last_eigendecomposition(structure):
    model, calls = SmallLM(), []

    def poison(module, arguments):
        calls.append(1)
        return (torch.where(torch.arange(7) == 3, torch.nan, arguments[0]),) if len(calls) == 2 else None

    model.second.register_forward_pre_hook(poison)
    with pytest.raises(FloatingPointError, match="batch 1"):
        estimate([collate(EXAMPLES[:2]), collate(EXAMPLES[2:])], structure, model, verify=False)


def test_an_infinite_gradient_names_its_layer():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    loss = lambda model, batch: (0 * model(batch)).sum(1).sqrt()  # zero, with an infinite derivative times zero
    with pytest.raises(FloatingPointError, match=r"batch 0: layer '[02]': NaN or Inf"):
        fg.estimate_fisher(model, [torch.ones(2, 3).double()], "gram", loss=loss)


def test_sums_that_overflow_are_named():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(FloatingPointError, match=r"layer ''.*float64"):
        fg.estimate_fisher(model, [torch.ones(2, 2)], "gram", loss=lambda m, b: m(b).sum(1) * 1e25)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), known=st.integers(1, 6), sign=st.sampled_from([-1.0, 1.0]), new=st.integers(1, 4))
def test_negative_inner_products_with_the_basis_are_removed_like_positive_ones(seed, known, sign, new):
    """A test of the signed products would let a block through that points against the basis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(20, known, dtype=torch.float64, generator=generator))[0]
    added = torch.randn(20, new, dtype=torch.float64, generator=generator)
    against = sign * 1e6 * basis @ torch.rand(known, new, dtype=torch.float64, generator=generator)
    found = orthonormalise(against + added, basis, 0.0)
    assert found.shape == (20, new)
    assert (basis.T @ found).abs().max() < 1e-13
    span = added - basis @ (basis.T @ added)
    assert_close(found @ (found.T @ span), span, 1e-8)


@pytest.mark.parametrize("kind", ["empirical", "mc", "type2", "ggn", "margin"])
def test_no_parameter_is_written_to_not_even_to_be_put_back(kind):
    """A finite difference would move the weights; every write to a tensor counts its version up."""
    model = SmallLM()
    before = {name: (p.data_ptr(), p._version, p.detach().clone()) for name, p in model.named_parameters()}
    estimate([collate(EXAMPLES)], EVERY, model, kind=kind)
    fg.StreamingFisher(model, [collate(EXAMPLES)], kind=kind, layers=list(LAYERS))["first"] @ torch.ones(7).double()
    for name, parameter in model.named_parameters():
        place, version, values = before[name]
        assert (parameter.data_ptr(), parameter._version) == (place, version)
        assert torch.equal(parameter, values)


@settings(deadline=None, max_examples=20)
@given(p=st.integers(1, 40), q=st.integers(1, 40), t=st.integers(2, 40), examples=st.integers(1, 3))
def test_ekfac_rotates_the_shorter_of_activations_and_gradients(p, q, t, examples):
    """Two rotations of a (p, q) gradient cost 2pq(p + q) an example, those of its factors 2T(p² + q²)."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0] for n in (p, q))
    d = torch.randn(examples, t, p, dtype=torch.float64, generator=generator)
    a = torch.randn(examples, t, q, dtype=torch.float64, generator=generator)
    sums = EkfacAccumulator.in_bases(Layout("layer", p, q), u, v)
    with FlopCounterMode(display=False) as counter:
        sums.add(Record("layer", a, d, None, 0), Shared())
    product = 2 * t * p * q
    rotation = min(2 * t * (p * p + q * q), 2 * p * q * (p + q))
    assert counter.get_total_flops() == examples * (product + rotation)
    assert_close(sums.sums["moments"], (u.T @ (d.mT @ a) @ v).square().sum(0))
