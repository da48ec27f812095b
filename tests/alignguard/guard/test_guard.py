"""The penalty and its gradient against the dense formula, and the guard's manners."""

import copy
import json

import pytest
import torch
from architectures import from_zero
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from alignguard.data import collate, encode_example
from alignguard.guard import Guard, GuardConfig, Leg, load_guard, save_guard
from alignguard.objective import response_loss
from alignguard.updates import base_name, lora_updates

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def adapted(make, dtype=torch.float64, **lora):
    model = get_peft_model(make(dtype), LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS, **lora}))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(dtype)
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def encoded(tokenizer, rows):
    return [encode_example(tokenizer, r["prompt"], r["response"]) for r in rows]


def dense_updates(model):
    """s·B·A of every adapted layer, with gradients through B and A."""
    return {
        name: layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and "default" in layer.lora_A
    }


def per_example_gradients(model, rows):
    """G_i of every guarded matrix by plain autograd on a merged copy, one example at a time."""
    merged = copy.deepcopy(model).merge_and_unload()
    for p in merged.parameters():
        p.requires_grad_(True)
    gradients = []
    for row in rows:
        merged.zero_grad()
        response_loss(merged, collate([row], 0)).sum().backward()
        gradients.append(
            {n: m.weight.grad.clone() for n, m in merged.named_modules() if n.rsplit(".", 1)[-1] in TARGETS}
        )
    return gradients


def leading(matrix, energy):
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    m = 1
    while values[:m].sum() < energy * matrix.trace():
        m += 1
    return values[:m], vectors[:, :m]


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 9}, "rank_pattern": {"v_proj": 2}}]
)
def test_updates_equal_peft_merge(tiny_llama, lora):
    model = adapted(tiny_llama, **lora)
    base = {n: p.detach().clone() for n, p in model.get_base_model().named_parameters() if "base_layer" in n}
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    for name, delta in lora_updates(model).items():
        short = name.removeprefix("base_model.model.")
        difference = merged[f"{short}.weight"] - base[f"{short}.base_layer.weight"]
        torch.testing.assert_close(delta.to_dense(), difference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("metric", ["input-gram", "euclidean"])
def test_one_sided_penalty_and_gradient_equal_the_dense_formula(tiny_llama, tokenizer, alignment_rows, metric):
    model = adapted(tiny_llama)
    rows = encoded(tokenizer, alignment_rows)
    config = GuardConfig.curvature(
        structure="gram", lambda_alignment=0.7, lambda_task=0.3, lambda_collision=0.2, alpha=0.4, metric=metric,
        energy=0.6, refresh_examples=4, batch_size=3, whole_update=False,
    )  # fmt: skip
    guard = from_zero(model, lambda: Guard(model, rows, config))
    guard.refresh()
    penalty = guard.penalty()
    penalty.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    gradients = per_example_gradients(model, rows)
    total = torch.zeros((), dtype=torch.float64)
    for name, delta in dense_updates(model).items():
        short = name.removeprefix("base_model.model.")
        fisher = sum(g[short] @ g[short].T for g in gradients) / len(rows)
        values, vectors = leading(fisher, config.energy)
        part = vectors @ (vectors.T @ delta)
        rest = delta - part
        eta = 1 + config.beta * torch.sigmoid(delta.abs() - config.tau)
        overlap = (eta * (part * rest).abs()).sum()
        if metric == "euclidean":
            separation = (part * rest).sum() ** 2 / (part.square().sum() * rest.square().sum())
        else:
            p, r = part.T @ part, rest.T @ rest
            separation = (p * r).sum() / (p.norm() * r.norm())
        total = total + (
            config.lambda_alignment * (values @ (vectors.T @ delta).square().sum(1))
            + config.lambda_task * rest.square().sum()
            + config.lambda_collision * (config.alpha * overlap + (1 - config.alpha) * separation)
        )
    total.backward()
    torch.testing.assert_close(penalty, total, rtol=1e-10, atol=0)
    for name, p in model.named_parameters():
        if p.grad is not None:
            scale = p.grad.norm()
            assert (ours[name] - p.grad).norm() <= 1e-10 * scale, name


@pytest.mark.parametrize("whole", [True, False], ids=["whole update", "aligned part"])
def test_kfac_penalty_and_gradient_equal_the_dense_formula(tiny_llama, tokenizer, alignment_rows, whole):
    model = adapted(tiny_llama)
    config = GuardConfig.curvature(
        structure="kfac", lambda_alignment=2.0, energy=0.7, refresh_examples=4, whole_update=whole
    )
    guard = from_zero(model, lambda: Guard(model, encoded(tokenizer, alignment_rows), config))
    guard.refresh()
    penalty = guard.penalty()
    penalty.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for name, delta in dense_updates(model).items():
        operator = guard.layers[name].operator
        _, u = leading(operator.output_factor, config.energy)
        part = (delta if whole else u @ (u.T @ delta)).flatten()
        dense = torch.kron(operator.output_factor, operator.input_factor)
        total = total + 2.0 * part @ dense @ part
    total.backward()
    torch.testing.assert_close(penalty, total, rtol=1e-10, atol=0)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (ours[name] - p.grad).norm() <= 1e-10 * p.grad.norm(), name


def test_euclidean_separation_is_identically_zero_under_the_hard_projector(tiny_llama, tokenizer, alignment_rows):
    model = adapted(tiny_llama)
    config = GuardConfig.curvature(
        structure="gram", lambda_alignment=0.0, lambda_collision=1.0, alpha=0.0, metric="euclidean", refresh_examples=4
    )
    guard = from_zero(model, lambda: Guard(model, encoded(tokenizer, alignment_rows), config))
    guard.refresh()
    penalty = guard.penalty()
    penalty.backward()
    assert abs(float(penalty)) < 1e-25
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-12


def test_kl_is_zero_at_the_start_and_equals_the_formula(tiny_llama, tokenizer, alignment_rows):
    rows = encoded(tokenizer, alignment_rows)
    fresh = get_peft_model(tiny_llama(torch.float64), LoraConfig(r=2, target_modules=TARGETS))
    config = GuardConfig.curvature(lambda_alignment=0.0, lambda_kl=1.0, kl_examples=4)
    assert abs(float(Guard(fresh, rows, config).penalty())) < 1e-12

    model = adapted(tiny_llama)
    batch = collate(rows, 0)
    keep = batch["labels"][:, 1:] != -100
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        present = model(**inputs).logits[:, :-1][keep].log_softmax(-1)
        with model.disable_adapter():
            base = model(**inputs).logits[:, :-1][keep].log_softmax(-1)
    expected = torch.nn.functional.kl_div(present, base, log_target=True, reduction="batchmean")
    guard = from_zero(model, lambda: Guard(model, rows, config))
    torch.testing.assert_close(guard.penalty(), expected, rtol=1e-10, atol=1e-12)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_a_penalty_without_a_curvature_is_refused_and_estimates_nothing(tiny_llama, tokenizer, alignment_rows):
    model, config = adapted(tiny_llama), GuardConfig.curvature(refresh_examples=2)
    guard = from_zero(model, lambda: Guard(model, encoded(tokenizer, alignment_rows), config))
    with pytest.raises(RuntimeError, match="begin_step"):
        guard.penalty()
    assert guard.examples_read == 0 and guard.refreshes == 0
    guard.begin_step(0)
    assert guard.penalty() > 0 and guard.examples_read == 2


class SizeLeg(Leg):
    """Charges the size of the first trained weight; its estimate counts how often it was asked for."""

    name = "size"
    turns = 0

    def terms(self, step):
        weight = next(p for p in self.rows.model.parameters() if p.requires_grad)
        return {"size": weight.square().sum()} if step % 2 == 0 else {}

    def refresh(self, step, turn, progress=False):
        self.turns += 1
        self.rows.readings += 1

    def state_dict(self):
        return {"size": {"turns": self.turns, "mark": torch.arange(3)}}

    def load_state_dict(self, state):
        self.turns, self.mark = state["size"]["turns"], state["size"]["mark"]


def test_a_leg_of_ones_own_is_charged_refreshed_and_kept(tmp_path, tiny_llama, tokenizer, alignment_rows):
    config = GuardConfig.curvature(refresh_every=3, first_refresh=None, refresh_examples=2)
    model = adapted(tiny_llama)
    guards = [Guard(model, encoded(tokenizer, alignment_rows), config) for _ in range(3)]
    for guard in guards[1:]:
        guard.legs["size"] = SizeLeg(guard.alignment, config, None)
    plain, ours, other = guards
    for step in range(4):
        for guard in (plain, ours):
            guard.begin_step(step)
        charged = next(p for p in model.parameters() if p.requires_grad).square().sum() if step % 2 == 0 else 0.0
        torch.testing.assert_close(ours.penalty(), plain.penalty() + charged)
    assert ours.legs["size"].turns == 2 == ours.refreshes and ours.examples_read == plain.examples_read + 2
    save_guard(tmp_path, ours, {})
    load_guard(tmp_path, other)
    assert other.legs["size"].turns == 2 and torch.equal(other.legs["size"].mark, torch.arange(3))
    assert torch.equal(other.penalty(), ours.penalty())


def flat(state):
    """Every value of nested dicts."""
    return [one for value in state.values() for one in flat(value)] if isinstance(state, dict) else [state]


def test_a_state_dict_is_of_tensors_and_plain_values_and_comes_back(tiny_llama, tokenizer, alignment_rows):
    config = GuardConfig.curvature(structure="kfac", max_drift=0.1, held_back=1, averaging=0.5, refresh_every=2, measure_every=1,
                         lambda_kl=0.1, scale_free=True, lambda_task=0.1, refresh_examples=2)  # fmt: skip
    model, rows = adapted(tiny_llama, dtype=torch.float32), encoded(tokenizer, alignment_rows)
    guard, other = Guard(model, rows, config), Guard(model, rows, config)
    for step in range(4):
        guard.begin_step(step)
    state = guard.state_dict()
    plain = (str, int, float, bool, type(None), list, tuple)
    assert all(isinstance(value, (torch.Tensor, *plain)) for value in flat(state))
    other.load_state_dict(state)
    ours, theirs = flat(state), flat(other.state_dict())
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    for one in (guard, other):
        one.begin_step(4)
    assert guard.refreshes == 3 == other.refreshes and torch.equal(guard.penalty(), other.penalty())


@pytest.mark.parametrize("structure", ["kfac", "kfac-sketch", "gram", "sketch"])
def test_refresh_leaves_no_trace(tiny_llama, tokenizer, alignment_rows, structure):
    model = adapted(tiny_llama, dtype=torch.float32).train()
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    parameter = next(p for n, p in model.named_parameters() if "lora_A" in n)
    parameter.grad = torch.ones_like(parameter)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    config = GuardConfig.curvature(
        structure=structure, kind="mc" if structure == "kfac" else "empirical", sketch_rank=8
    )
    Guard.from_alignment(model, encoded(tokenizer, alignment_rows), config)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(m.training for m in model.modules())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1], name
        assert p is parameter or p.grad is None
    assert torch.equal(parameter.grad, torch.ones_like(parameter))


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [({"first_refresh": None}, [0, 4, 8]), ({"first_refresh": 1}, [0, 1, 5, 9]), ({"first_refresh": 6}, [0, 4, 8])],
)
def test_refreshes_come_when_they_are_due(tiny_llama, tokenizer, alignment_rows, schedule, steps):
    model = adapted(tiny_llama)
    rows = encoded(tokenizer, alignment_rows)
    guard = Guard(model, rows, GuardConfig.curvature(refresh_every=4, refresh_examples=2, **schedule))
    seen = []
    for step in range(11):
        before = guard.refreshes
        guard.begin_step(step)
        seen += [step] * (guard.refreshes - before)
    assert seen == steps


@pytest.mark.parametrize(
    ("run", "steps"),
    [(None, [0, 10, 35, 60]), (200, [0, 10, 35, 60]), (100, [0, 10, 30, 50]), (25, [0, 5, 10, 15, 20]), (3, [0, 1, 2])],
)
def test_short_runs_have_estimates_more_often(tiny_llama, tokenizer, alignment_rows, run, steps):
    guard = Guard(adapted(tiny_llama), encoded(tokenizer, alignment_rows), GuardConfig.curvature(refresh_examples=2))
    if run is not None:
        guard.begin_run(run)
    seen = []
    for step in range(min(run or 70, 70)):
        before = guard.refreshes
        guard.begin_step(step)
        seen += [step] * (guard.refreshes - before)
    assert seen == steps


def test_a_given_interval_holds_for_every_run():
    config = GuardConfig.curvature(refresh_every=40)
    assert {config.interval(steps) for steps in (None, 1, 25, 1000)} == {40}
    assert [GuardConfig.curvature().interval(steps) for steps in (1, 4, 5, 49, 124, 125, 1000)] == [
        1,
        1,
        1,
        9,
        24,
        25,
        25,
    ]


def test_a_run_has_steps(tiny_llama, tokenizer, alignment_rows):
    guard = Guard(adapted(tiny_llama), encoded(tokenizer, alignment_rows), GuardConfig.curvature())
    with pytest.raises(ValueError, match="steps must be at least 1, not -1"):
        guard.begin_run(-1)


def test_refresh_reads_the_present_weights(tiny_llama, tokenizer, alignment_rows):
    model = adapted(tiny_llama)
    rows = encoded(tokenizer, alignment_rows)
    config = GuardConfig.curvature(structure="kfac", refresh_every=2, refresh_examples=4)
    guard = from_zero(model, lambda: Guard(model, rows, config))
    guard.refresh()
    name = next(iter(guard.layers))
    first = guard.layers[name].operator.output_factor
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(3.0)
    guard.begin_step(1)
    assert guard.layers[name].operator.output_factor is first, "not due yet"
    guard.begin_step(2)
    moved = guard.layers[name].operator.output_factor
    assert not torch.allclose(moved, first)
    fresh = Guard.from_alignment(model, rows, config)
    torch.testing.assert_close(moved, fresh.layers[name].operator.output_factor)
    assert guard.examples_read == 4 + 2 + 4  # two of the second estimate's were first asked how far they had drifted


def test_names_of_the_fisher_are_the_plain_layers_inside(tiny_llama):
    model = adapted(tiny_llama)
    modules = dict(model.named_modules())
    for name in lora_updates(model):
        assert type(modules[base_name(name)]) is torch.nn.Linear


def test_what_is_not_understood_is_refused_by_name(tiny_llama, tokenizer, alignment_rows):
    rows = encoded(tokenizer, alignment_rows)
    with pytest.raises(TypeError, match="PeftModel"):
        Guard(tiny_llama(), rows, GuardConfig.curvature())
    merged = adapted(tiny_llama)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        Guard(merged, rows, GuardConfig.curvature())
    dora = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="Dora"):
        Guard(dora, rows, GuardConfig.curvature())
    with pytest.raises(ValueError, match="at least one"):
        Guard(adapted(tiny_llama), [], GuardConfig.curvature())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("structure", "shampoo"), ("kind", "hessian"), ("metric", "angle"), ("lambda_alignment", -1.0),
        ("lambda_kl", float("nan")), ("alpha", 1.2), ("energy", 0.0), ("refresh_every", 0), ("first_refresh", 0), ("refresh_examples", 2.5),
        ("max_rank", 0), ("tau", float("inf")),
    ],
)  # fmt: skip
def test_a_bad_setting_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        GuardConfig.curvature(**{field: value})


def test_config_survives_a_round_trip_and_names_unknown_fields():
    config = GuardConfig.curvature(structure="gram", lambda_kl=0.5)
    assert GuardConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="lamda"):
        GuardConfig.from_dict({"lamda": 1})


@given(
    st.sampled_from(sorted(GuardConfig.curvature().to_dict())),
    st.one_of(
        st.none(), st.booleans(), st.text(max_size=4), st.floats(), st.integers(), st.lists(st.integers(), max_size=2),
        st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    ),
)  # fmt: skip
def test_any_value_of_any_setting_is_taken_or_named(field, value):
    try:
        taken = GuardConfig.curvature(**{field: value})
    except ValueError as error:
        assert field in str(error)
    else:
        assert GuardConfig.from_dict(json.loads(json.dumps(taken.to_dict()))) == taken
