"""The quadratic penalty of earlier tasks against dense matrices, and what it refuses."""

import copy

import pytest
import torch
from architectures import make, move
from hypothesis import given, settings
from hypothesis import strategies as st
from uses_cases import LAYERS, STRUCTURES, classifier, dense_fisher, estimated, examples, moved, psd, random, weights

import fishergeo as fg
from fishergeo import _storage


def by_hand(fishers, before, now):
    total = 0.0
    for name in LAYERS:
        delta = (now[name] - before[name]).flatten()
        total = total + 0.5 * delta @ fishers[name] @ delta
    return total


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_is_half_the_quadratic_form_of_the_dense_fisher(structure):
    model, data = classifier(), examples()
    dense, before = dense_fisher(model, data, structure), weights(model)
    penalty = fg.QuadraticPenalty(model, estimated(model, data, structure), strength=3.0)
    assert penalty().item() == 0
    moved(model)
    expected = 3.0 * by_hand(dense, before, weights(model))
    assert abs(penalty().item() - float(expected)) <= 1e-10 * float(expected)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_its_gradient_is_the_fisher_times_the_way_gone(structure):
    model, data = classifier(), examples()
    dense, before = dense_fisher(model, data, structure), weights(model)
    penalty = fg.QuadraticPenalty(model, estimated(model, data, structure))
    moved(model)
    penalty().backward()
    delta = (weights(model)["2"] - before["2"]).flatten()
    assert torch.allclose(model[2].weight.grad.flatten(), dense["2"] @ delta, atol=1e-12)
    joint = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1).flatten()
    assert torch.allclose(joint, dense["0+bias"] @ (weights(model)["0+bias"] - before["0+bias"]).flatten(), atol=1e-12)


@settings(deadline=None, max_examples=10)
@given(strengths=st.lists(st.floats(0, 10), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_tasks_add_up_each_around_its_own_weights(strengths, seed):
    model, penalty, expected = classifier(seed), None, []
    for place, strength in enumerate(strengths):
        data = examples(seed=seed + place)
        fisher, dense = estimated(model, data, "kfac"), dense_fisher(model, data, "kfac")
        expected.append((strength, dense, weights(model)))
        if penalty is None:
            penalty = fg.QuadraticPenalty(model, fisher, strength)
        else:
            penalty.add(fisher, strength)
        moved(model, seed=seed + 10 * place)
    assert len(penalty) == len(strengths)
    total = sum(s * float(by_hand(dense, before, weights(model))) for s, dense, before in expected)
    assert abs(penalty().item() - total) <= 1e-9 * max(total, 1e-9)


@settings(deadline=None, max_examples=10)
@given(factor=st.floats(0.1, 5), seed=st.integers(0, 99))
def test_it_grows_with_the_square_of_the_way_and_is_never_negative(factor, seed):
    model = classifier(seed)
    before = copy.deepcopy(model.state_dict())
    penalty = fg.QuadraticPenalty(model, estimated(model, examples(seed=seed), "ekfac"))
    moved(model, seed=seed)
    once = penalty().item()
    model.load_state_dict({n: before[n] + factor * (p - before[n]) for n, p in model.state_dict().items()})
    assert once >= 0 and abs(penalty().item() - factor**2 * once) <= 1e-9 * max(once, 1e-9) * max(factor, 1) ** 2


def test_an_identity_fisher_makes_it_weight_decay_towards_the_start():
    model = classifier()
    before = model[2].weight.detach().clone()
    penalty = fg.QuadraticPenalty(model, {"2": fg.DiagonalOperator(torch.ones(3, 4).double())})
    moved(model)
    assert torch.isclose(penalty(), 0.5 * (model[2].weight - before).square().sum())


def test_one_sided_operators_are_charged_on_their_side():
    model = classifier()
    before = model[2].weight.detach().clone()
    output, inputs = psd(3), psd(4, 1)
    penalties = [
        fg.QuadraticPenalty(model, {"2": fg.DenseOperator(matrix, side)})
        for matrix, side in ((output, "output"), (inputs, "input"))
    ]
    moved(model)
    delta = model[2].weight.detach() - before
    assert torch.isclose(penalties[0](), 0.5 * torch.trace(delta.T @ output @ delta))
    assert torch.isclose(penalties[1](), 0.5 * torch.trace(delta @ inputs @ delta.T))


@pytest.mark.parametrize("structure", [*STRUCTURES, "gram", "sketch", "kfac-sketch"])
def test_a_saved_penalty_is_the_same_to_the_bit(structure, tmp_path):
    model = classifier()
    penalty = fg.QuadraticPenalty(model, estimated(model, examples(), structure), strength=0.7)
    moved(model)
    penalty.add(estimated(model, examples(seed=3), structure), 0.2)
    moved(model, seed=8)
    penalty.save(tmp_path / "penalty.safetensors")
    again = fg.QuadraticPenalty.load(tmp_path / "penalty.safetensors", model)
    assert len(again) == 2 and torch.equal(again(), penalty())
    assert torch.equal(again.anchor(1, "2"), penalty.anchor(1, "2"))


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_an_adapter_is_charged_through_its_factors(model, tmp_path):
    adapted = make(model)
    move(adapted)
    names = [n for n, _ in adapted.named_modules() if n.endswith(("q_proj.base_layer", "c_attn.base_layer"))]
    shapes = {n: (m.weight.T if model == "gpt2" else m.weight).shape for n, m in adapted.named_modules() if n in names}
    fishers = {n: fg.KroneckerOperator(psd(p), psd(q, 1)) for n, (p, q) in shapes.items()}
    penalty = fg.QuadraticPenalty(adapted, fishers)

    def update(name):
        wrapper = adapted.get_submodule(name.removesuffix(".base_layer"))
        return 3.0 * wrapper.lora_B["default"].weight @ wrapper.lora_A["default"].weight  # alpha 6 over rank 2

    before = {name: update(name).detach() for name in names}
    move(adapted, seed=9)
    penalty.save(tmp_path / "penalty.safetensors")
    for one in (penalty, fg.QuadraticPenalty.load(tmp_path / "penalty.safetensors", adapted)):
        expected = sum(0.5 * op.quadratic(update(n) - before[n]) for n, op in fishers.items())
        assert torch.isclose(one(), expected, rtol=1e-9)
    assert all(set(task) == {"left", "right"} for task in penalty._tasks[0].anchors.values())
    value = penalty()
    value.backward()
    assert adapted.get_submodule(names[0].removesuffix(".base_layer")).lora_B["default"].weight.grad.abs().sum() > 0


def test_an_adapter_merged_into_its_base_is_refused():
    adapted = make()
    name = next(n for n, _ in adapted.named_modules() if n.endswith("q_proj.base_layer"))
    penalty = fg.QuadraticPenalty(adapted, {name: fg.DenseOperator(psd(16))})
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="merged into its base"):
        penalty()


def test_what_is_refused_is_named(tmp_path):
    model, other = classifier(0), classifier(1)
    fisher = estimated(model, examples(), "kfac")
    with pytest.raises(ValueError, match="fingerprint"):
        fg.QuadraticPenalty(other, fisher)
    with pytest.raises(ValueError, match="'0\\+bias'"):
        fg.QuadraticPenalty(torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)), fisher)
    with pytest.raises(ValueError, match="strength"):
        fg.QuadraticPenalty(model, fisher, strength=-1.0)
    with pytest.raises(ValueError, match="no layer"):
        fg.QuadraticPenalty(model, {})
    with pytest.raises(ValueError, match=r"layer '2' has shape \(3, 4\)"):
        fg.QuadraticPenalty(model, {"2": fg.DenseOperator(random(4, 4))})
    fg.QuadraticPenalty(model, fisher).save(tmp_path / "penalty")
    with pytest.raises(ValueError, match="'2'"):
        fg.QuadraticPenalty.load(tmp_path / "penalty", torch.nn.Sequential(torch.nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="does not fit"):
        shorter = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        fg.QuadraticPenalty.load(tmp_path / "penalty", shorter)
    _storage.write(tmp_path / "else", {}, {"fisher": {}})
    with pytest.raises(ValueError, match="not one of a penalty"):
        fg.QuadraticPenalty.load(tmp_path / "else", model)


def test_an_operator_of_half_precision_charges_what_it_could_not_tell_apart():
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    penalty = fg.QuadraticPenalty(model, {"": fg.DiagonalOperator(torch.ones(1, 2, dtype=torch.bfloat16))}, 2.0)
    torch.nn.init.constant_(model.weight, 1.001)
    value = penalty()
    value.backward()
    assert value.dtype == torch.float32 and value.item() == pytest.approx(2e-6, rel=1e-3)
    assert model.weight.grad.tolist()[0] == pytest.approx([2e-3, 2e-3], rel=1e-3)


@pytest.mark.parametrize("step", [1e-3, 1e-5])
def test_a_small_step_of_an_adapter_is_charged_for_what_it_is(step):
    adapted = make(dtype=torch.float32)
    move(adapted)
    name = next(n for n, _ in adapted.named_modules() if n.endswith("q_proj.base_layer"))
    wrapper = adapted.get_submodule(name.removesuffix(".base_layer"))
    halves = wrapper.lora_B["default"].weight, wrapper.lora_A["default"].weight

    def update():
        return 3.0 * halves[0].detach().double() @ halves[1].detach().double()  # alpha 6 over rank 2

    p, q = wrapper.base_layer.weight.shape
    operator, before = fg.KroneckerOperator(psd(p), psd(q, 1)), update()
    penalty = fg.QuadraticPenalty(adapted, {name: fg.KroneckerOperator(*(f.float() for f in operator.factors()))})
    with torch.no_grad():
        for place, half in enumerate(halves):
            half.add_(step * half.abs().mean() * random(*half.shape, seed=place))
    assert penalty().item() == pytest.approx(0.5 * operator.quadratic(update() - before).item(), rel=1e-2)


def test_a_base_that_trains_later_is_refused():
    model = make("llama")
    names = [name for name, _ in model.named_modules() if name.endswith("q_proj.base_layer")]
    fisher = {n: fg.DiagonalOperator(torch.ones_like(model.get_submodule(n).weight)) for n in names}
    for name in names:
        model.get_submodule(name).weight.requires_grad_(False)
    penalty = fg.QuadraticPenalty(model, fisher)
    assert float(penalty()) == 0
    model.get_submodule(names[0]).weight.requires_grad_(True)
    with pytest.raises(ValueError, match="trains now, and was frozen under its adapter"):
        penalty()
    penalty = fg.QuadraticPenalty(model, fisher)
    assert float(penalty()) == 0
