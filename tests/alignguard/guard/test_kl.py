"""KL to the start: of the first response tokens alone, and remembered between two readings as a quadratic of itself."""

import copy
import math

import numpy as np
import pytest
import torch
from alignment_rows import rows
from architectures import make, move
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.integrations.neftune import activate_neftune

from alignguard.guard import Guard, GuardConfig
from alignguard.guard.rows import shortened
from alignguard.objective import IGNORED


def guarded(rows_, dtype=torch.float64, seed=0, **options):
    model = make(dtype=dtype, seed=seed)
    guard = Guard(model, rows_, GuardConfig.curvature(lambda_alignment=0.0, lambda_kl=1.0, **options))
    return model, guard


def weights(model):
    return [p for p in model.parameters() if p.requires_grad]


@given(prompt=st.integers(1, 5), response=st.integers(1, 9), tokens=st.integers(1, 12))
def test_a_row_is_cut_after_its_first_response_tokens(prompt, response, tokens):
    row = {"input_ids": list(range(prompt + response)), "labels": [IGNORED] * prompt + list(range(response))}
    cut = shortened(row, tokens, "causal")
    kept = min(tokens, response)
    assert cut["labels"] == row["labels"][: prompt + kept] and cut["input_ids"] == row["input_ids"][: prompt + kept]
    pair = {"input_ids": [7] * prompt, "labels": list(range(response))}
    assert shortened(pair, tokens, "seq2seq") == {"input_ids": [7] * prompt, "labels": list(range(kept))}
    assert shortened({"input_ids": [1], "labels": 2}, tokens, "classification")["labels"] == 2
    assert shortened(row, None, "causal") is row


def test_first_tokens_cost_what_the_cut_row_costs_and_no_later_position_is_run():
    whole = rows(3)
    model, guard = guarded(whole, kl_tokens=1, kl_examples=3)
    other = Guard(copy.deepcopy(model), [shortened(row, 1, "causal") for row in whole], guard.config)
    seen = []
    handle = model.get_base_model().model.register_forward_pre_hook(
        lambda _, args, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    for each in (guard, other):
        move(each.model)
        each.begin_step(0)
    assert torch.equal(guard.penalty(), other.penalty()) and guard.penalty() > 0
    handle.remove()
    assert max(seen) == 3  # a prompt of two tokens and one of the response


def test_between_readings_the_memory_is_the_quadratic_along_its_own_gradient():
    model, guard = guarded(rows(2), kl_every=4, kl_memory=2, kl_examples=2)
    move(model)
    guard.begin_step(4)
    read = guard.kl.reference.divergence([0, 1])[0].mean()
    slopes = torch.autograd.grad(read, weights(model))
    assert guard.penalty().item() == pytest.approx(read.item(), rel=1e-12)
    before = [p.detach().clone() for p in weights(model)]
    move(model)
    guard.begin_step(5)
    readings = guard.examples_read
    value = guard.penalty()
    assert guard.examples_read == readings  # no pass through the model
    moved = sum(float((g * (p - b)).sum()) for g, p, b in zip(slopes, weights(model), before, strict=True))
    k = float(read)
    assert value.item() == pytest.approx(k + moved + moved**2 / (4 * k), rel=1e-9)
    value.backward()
    for g, p in zip(slopes, weights(model), strict=True):
        torch.testing.assert_close(p.grad, g * (1 + moved / (2 * k)), rtol=1e-9, atol=1e-14)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 99), memory=st.integers(1, 3))
def test_it_is_never_negative_and_forgets_the_oldest_first(seed, memory):
    model, guard = guarded(rows(4, seed), kl_every=1, kl_memory=memory, kl_examples=1)
    torch.manual_seed(seed)  # of the steps; the model is the same
    for step in range(5):
        with torch.no_grad():
            for p in weights(model):
                p.add_(torch.randn_like(p) * 0.2)
        guard.begin_step(step)
        assert float(guard.penalty()) >= 0
    assert len(guard.state_dict()["kl_memory"]) == memory


def test_the_first_steps_are_each_read_and_then_every_so_many_none_twice_in_a_row():
    model, guard = guarded(rows(6), kl_every=3, kl_memory=2, kl_examples=1)
    places = []
    divergence = guard.kl.reference.divergence
    guard.kl.reference.divergence = lambda chosen: places.append(list(chosen)) or divergence(chosen)
    read = []
    for step in range(10):
        move(model)
        guard.begin_step(step)
        before = guard.examples_read
        guard.penalty()
        read.append(guard.examples_read - before)
    assert read == [1, 1, 1, 1, 0, 0, 1, 0, 0, 1]
    assert places == [[0], [1], [2], [3], [4], [5]]


def test_a_model_that_has_not_moved_has_nothing_to_remember():
    _, guard = guarded(rows(2), kl_memory=2)
    guard.begin_step(0)
    assert float(guard.penalty()) == 0 and guard.state_dict()["kl_memory"] == []


def test_a_resumed_guard_remembers_the_same():
    model, guard = guarded(rows(4), kl_every=3, kl_memory=2, kl_examples=1)
    move(model)
    for step in range(5):
        guard.begin_step(step)
        guard.penalty()
    twin = copy.deepcopy(model)
    again = Guard(twin, rows(4), guard.config)
    again.load_state_dict(guard.state_dict())
    for one in (guard, again):
        move(one.model)
        one.begin_step(5)
    assert torch.equal(guard.penalty(), again.penalty())
    state = guard.state_dict()
    state["kl_memory"][0]["gradient"] = torch.zeros(3)
    with pytest.raises(ValueError, match="a remembered gradient is of 3 weights"):
        again.load_state_dict(state)


@pytest.mark.parametrize("value", [-1, True, 1.5, "many"])
def test_a_memory_that_is_no_count_is_refused(value):
    with pytest.raises(ValueError, match="kl_memory must be a whole number of at least 0"):
        GuardConfig.curvature(kl_memory=value)


def far(model):
    """‖ΔW‖ over all adapted matrices, dense, by peft's own product."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    return math.sqrt(sum(float(layer.get_delta_weight("default").square().sum()) for layer in layers))


def carried(read, distances, now, kept):
    """The root of KL as a multiple of ‖ΔW‖, by least squares over the last readings, at the present ‖ΔW‖."""
    columns, roots = np.array(distances[-kept:])[:, None], np.sqrt(np.maximum(0, read[-kept:]))
    return float(np.linalg.lstsq(columns, roots, rcond=None)[0][0] * now) ** 2


@pytest.mark.parametrize(("examples", "kept", "over"), [(1, 6, 24), (2, 3, 12), (5, 2, 5)])
def test_what_is_believed_are_the_last_readings_carried_on_to_the_present_distance(examples, kept, over):
    model, guard = guarded(rows(6), kl_every=2, kl_memory=2, kl_examples=examples)
    found, distances, believed = [], [], []
    for step in range(56):  # more readings than are compared
        guard.begin_step(step)
        if found:
            now = carried(found, distances, far(model), kept)
            assert guard.predicted_drift() == pytest.approx(now, rel=1e-6, abs=1e-12)
        guard.penalty()
        leg = guard.kl
        if step < 2 or step % 2 == 0:
            turn = min(step, 1) + step // 2
            with torch.no_grad():
                nats = leg.reference.divergence(guard.alignment.places(examples, turn))[0]
            if found:
                believed.append(carried(found, distances, far(model), kept))
            found.append(float(nats.sum()) / examples)
            distances.append(far(model))
        move(model)
    assert guard.gauge.predicted == pytest.approx(np.mean(believed[-over:]), rel=1e-6)
    assert guard.gauge.measured == pytest.approx(np.mean(found[1:][-over:]), rel=1e-9)


def test_where_every_weight_trains_the_last_readings_are_what_is_believed():
    model = make(dtype=torch.float64).unload().requires_grad_(True)
    guard = Guard(model, rows(4), GuardConfig(kl_examples=1, kl_memory=0), method="full")
    found = []
    for step in range(8):
        guard.begin_step(step)
        guard.penalty()
        with torch.no_grad():
            found.append(float(guard.kl.reference.divergence(guard.alignment.places(1, step))[0].sum()))
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    assert found[-1] > 0
    assert guard.predicted_drift() == pytest.approx(np.sqrt(np.maximum(0, found[-6:])).mean() ** 2, rel=1e-6)


def test_a_memory_of_sharded_weights_is_refused_if_asked_for_and_else_left_out(monkeypatch):
    model, guard = guarded(rows(4), kl_memory=2)
    _, plain = guarded(rows(4), kl_memory=None, kl_every=None)
    for each in (guard, plain):
        monkeypatch.setattr("alignguard.guard.legs.kl.DTensor", torch.nn.Parameter)  # as if every weight were one
        each.begin_step(0)
    with pytest.raises(ValueError, match="kl_memory keeps gradients of the trainable weights, which are sharded"):
        guard.penalty()
    plain.penalty()
    assert plain.state_dict()["kl_memory"] == [] and "kl" in plain.terms


def test_where_every_weight_trains_each_step_is_read_and_nothing_remembered():
    model = make(dtype=torch.float64).unload().requires_grad_(True)
    guard = Guard(model, rows(4), GuardConfig(kl_examples=1), method="full")
    for step in range(3):
        guard.begin_step(step)
        before = guard.examples_read
        guard.penalty()
        assert guard.examples_read == before + 1
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 1e-3)
    assert guard.state_dict()["kl_memory"] == []


def noisy(kind):
    """A model that has not moved, in training mode, with noise of one kind on."""
    if kind == "gpt2":
        config = GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0.2,
                            embd_pdrop=0.2, attn_pdrop=0.2)  # fmt: skip
        model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(r=2, target_modules="all-linear"))
    else:
        drop = 0.5 if kind == "lora_dropout" else 0.0
        model = get_peft_model(make().unload(), LoraConfig(r=2, target_modules=["down_proj"], lora_dropout=drop))
    if kind == "neftune":
        activate_neftune(model, 5.0, None)
    return model.double().train()


@pytest.mark.parametrize("kind", ["gpt2", "lora_dropout", "neftune"])
@pytest.mark.parametrize("memory", [0, 2])
def test_what_has_not_moved_has_no_kl_whatever_noise_training_makes(kind, memory):
    model = noisy(kind)
    guard = Guard(
        model, rows(2), GuardConfig.curvature(lambda_alignment=0.0, lambda_kl=1.0, kl_examples=2, kl_memory=memory)
    )
    guard.begin_step(0)
    state = torch.random.get_rng_state()
    assert abs(float(guard.penalty())) < 1e-12
    assert all(module.training for module in model.modules()) and torch.equal(state, torch.random.get_rng_state())
    move(model, 1.0)
    guard.begin_step(1)
    charged = guard.penalty()
    assert charged.requires_grad and float(charged.detach()) > 0


def test_a_bias_that_trains_with_the_adapter_does_not_move_the_start():
    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(r=2, target_modules=["c_attn"], bias="all")).double()
    assert any(name.endswith("bias") and p.requires_grad for name, p in model.named_parameters())
    guard = Guard(model, rows(2), GuardConfig.curvature(lambda_alignment=0.0, lambda_kl=1.0, kl_examples=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter.add_(0.3)
    guard.begin_step(0)
    assert float(guard.penalty().detach()) > 1e-3  # read with the adapter off it would be zero
