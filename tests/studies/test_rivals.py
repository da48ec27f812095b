"""Every rival's formula against a dense computation of its own, and all of them on the same Trainer."""

import copy
import itertools

import pytest
import torch
from architectures import before_alignment
from architectures import t5 as small_t5
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from alignguard.data import collate, encode_example
from alignguard.training import fit
from studies.rivals import (
    EMA,
    EWC,
    KFAC,
    L2,
    RIVALS,
    GradientProjection,
    Interpolation,
    NullSpace,
    OneShot,
    Replay,
    Rival,
    Run,
    SafeLoRA,
    alignment_map,
    make_rival,
    quiet_directions,
    sweep,
    train_rival,
    without_conflict,
)

TARGETS = ["q_proj", "o_proj", "down_proj"]


@pytest.fixture
def run(tiny_llama, tokenizer, alignment_rows):
    """A run on a model with a non-zero adapter, in float64."""
    model = get_peft_model(tiny_llama(torch.float64), LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    fill(model, 1, 0.1)
    rows = [encode_example(tokenizer, r["prompt"], r["response"]) for r in alignment_rows]
    return Run(model.eval(), rows, 0, seed=5)


def fill(model, seed, size):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)


def dense(model):
    """s·B·A by peft's own attributes, with a graph."""
    return {
        name: m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight
        for name, m in model.named_modules()
        if hasattr(m, "lora_A") and "default" in m.lora_A
    }


def gradients_at_start(run):
    """G_i of every adapted matrix at θ0 by plain autograd, one example at a time; and inputs and output gradients."""
    model = copy.deepcopy(run.model).unload()
    found = {}
    for row in run.alignment:
        batch = collate([row], 0)
        tapes = {}

        def keep(name, tapes=tapes):
            def hook(module, inputs, output):
                tapes[name] = (inputs[0].detach()[0], output)
                output.retain_grad()

            return hook

        handles = [
            m.register_forward_hook(keep(n)) for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in TARGETS
        ]
        for p in model.parameters():
            p.requires_grad_(True)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for name, (a, out) in tapes.items():
            found.setdefault(f"base_model.model.{name}", []).append((a, out.grad[0]))
    return found


def with_zero_adapter(run, action):
    """Run a rival's start at θ0, as the trainer does, then put the adapter back."""
    kept = {n: p.detach().clone() for n, p in run.model.named_parameters() if "lora_B" in n}
    for n, p in run.model.named_parameters():
        if n in kept:
            p.data.zero_()
    action()
    for n, p in run.model.named_parameters():
        if n in kept:
            p.data.copy_(kept[n])


def check_penalty(rival, run, expected):
    """Value and gradient, added to what stands in .grad already."""
    parameters = run.parameters()
    reference = torch.autograd.grad(expected, parameters, allow_unused=True)
    for p in parameters:
        p.grad = torch.ones_like(p)
    torch.testing.assert_close(rival.value(run), expected, rtol=1e-6, atol=0)
    rival.gradients(run, 0)
    for p, g in zip(parameters, reference, strict=True):
        torch.testing.assert_close(p.grad - 1, g, rtol=1e-4, atol=1e-7)  # the losses are taken in float32


def test_l2_is_the_squared_norm_of_the_dense_update(run):
    check_penalty(L2(strength=0.3), run, 0.3 * sum(d.square().sum() for d in dense(run.model).values()))


def test_l2_where_every_weight_trains_is_the_squared_distance_of_all_of_them(tiny_llama):
    model = tiny_llama(torch.float64)
    run = Run(model, [], 0, seed=5)
    rival = L2(0.7)
    rival.start(run)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    check_penalty(rival, run, 0.7 * sum((p - start[name]).square().sum() for name, p in model.named_parameters()))


def test_every_weight_trains_as_fit_does_and_what_needs_an_adapter_is_refused(
    tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path
):
    options = {
        "tokenizer": tokenizer, "training": {"max_steps": 5, "learning_rate": 1e-3}, "seed": 3, "method": "full",
    }  # fmt: skip
    ours = train_rival(Rival(), tiny_llama(), task_rows, None, tmp_path / "rival", **options)
    theirs = fit(tiny_llama(), task_rows, None, output_dir=tmp_path / "fit", guarded=False, **options)
    for (name, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, msg=name)
    held = train_rival(L2(1e6), tiny_llama(), task_rows, None, tmp_path / "held", **options)
    start = list(tiny_llama().parameters())

    def distance(model):
        return sum(float((p - q).square().sum()) for p, q in zip(model.parameters(), start, strict=True))

    assert 0 < distance(held.model) < distance(ours.model)
    with pytest.raises(ValueError, match='ewc acts on an adapter; with method="full" there are plain, l2'):
        train_rival(EWC(), tiny_llama(), task_rows, alignment_rows, tmp_path / "refused", **options)


def test_ewc_weighs_every_squared_entry_by_the_mean_squared_gradient(run):
    rival = EWC(strength=2.0)
    with_zero_adapter(run, lambda: rival.start(run))
    assert run.examples_read == len(run.alignment)
    tapes = gradients_at_start(run)
    expected = torch.zeros((), dtype=torch.float64)
    for name, delta in dense(run.model).items():
        fisher = torch.stack([(g.T @ a).square() for a, g in tapes[name]]).mean(0)
        expected = expected + 2.0 * (fisher * delta.square()).sum()
    assert expected > 0
    check_penalty(rival, run, expected)


def test_kfac_is_the_trace_of_both_dense_factors(run):
    rival = KFAC(strength=2.0)
    with_zero_adapter(run, lambda: rival.start(run))
    tapes = gradients_at_start(run)
    expected = torch.zeros((), dtype=torch.float64)
    for name, delta in dense(run.model).items():
        s = sum(g.T @ g for _, g in tapes[name]) / len(run.alignment)
        a = sum(x.T @ x for x, _ in tapes[name]) / sum(len(x) for x, _ in tapes[name])
        expected = expected + 2.0 * torch.trace(delta.T @ s @ delta @ a)
    assert expected > 0
    check_penalty(rival, run, expected)


@given(st.floats(0.001, 0.6), st.integers(1, 200))
@example(0.15, 85)  # 15 rows to the last bit, and a division that says a little more
def test_replayed_rows_make_up_the_share_asked_for(share, rows):
    run = Run(None, [{"input_ids": [i]} for i in range(3)], 0, seed=0)
    mixed = Replay(share).rows([{"input_ids": [9]}] * rows, run)
    replayed = [row for row in mixed if row.get("replayed")]
    assert len(mixed) - len(replayed) == rows
    # one row fewer would fall short of the share, one more is not needed
    assert len(replayed) / len(mixed) >= share - 1e-12
    assert (len(replayed) - 1) / (len(mixed) - 1) < share
    counts = [sum(row["input_ids"] == [i] for row in replayed) for i in range(3)]
    assert max(counts) - min(counts) <= 1


def test_ema_is_the_weighted_sum_of_all_weights(run):
    rival = EMA(decay=0.7)
    rival.start(run)
    seen = [[p.detach().clone() for p in run.parameters()]]
    for step in (1, 2, 3, 4):
        fill(run.model, 10 + step, 0.2)
        seen.append([p.detach().clone() for p in run.parameters()])
        rival.step_done(run, step)
    weights = [0.7**4] + [0.3 * 0.7 ** (3 - i) for i in range(4)]
    assert sum(weights) == pytest.approx(1)
    rival.finish(run)
    for place, p in enumerate(run.parameters()):
        expected = sum(w * s[place] for w, s in zip(weights, seen, strict=True))
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_ema_settings_of_a_sweep_keep_shares_of_the_start_that_differ():
    shares = [decay**200 for decay in EMA.grid["decay"]]  # steps of the packaged schedule
    assert shares == sorted(shares) and shares[0] < 1e-6 and 0.8 < shares[-1] < 1
    assert sum(b - a > 0.02 for a, b in itertools.pairwise(shares)) >= 8


def test_interpolation_scales_the_dense_update(run):
    before = {name: d.detach().clone() for name, d in dense(run.model).items()}
    Interpolation(0.7).finish(run)
    for name, delta in dense(run.model).items():
        torch.testing.assert_close(delta.detach(), 0.7 * before[name])


def test_the_alignment_map_is_v_v_transposed_over_its_norm_and_no_projector():
    generator = torch.Generator().manual_seed(3)
    aligned, unaligned = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    v = (aligned - unaligned).numpy()
    expected = torch.from_numpy(v @ v.T / (v**2).sum() ** 0.5)
    c = alignment_map(aligned, unaligned)
    torch.testing.assert_close(c, expected)
    assert not torch.allclose(c @ c, c)
    torch.testing.assert_close(c, c.T)
    assert torch.linalg.matrix_rank(c) == 4
    assert not alignment_map(aligned, aligned).any()


def test_safelora_projects_the_layers_below_the_threshold_and_no_others(run, tiny_llama):
    before = before_alignment(tiny_llama)
    plain = dict(tiny_llama(torch.float64).named_parameters())
    starts = {name: d.detach().clone() for name, d in dense(run.model).items()}
    cosines, moved = {}, {}
    for name, delta in starts.items():
        key = name.removeprefix("base_model.model.") + ".weight"
        v = plain[key].detach() - dict(before.named_parameters())[key].detach()
        moved[name] = v @ v.T / v.norm() @ delta
        cosines[name] = float((moved[name] * delta).sum() / moved[name].norm() / delta.norm())
    threshold = sorted(cosines.values())[len(cosines) // 2] + 1e-9
    rival = SafeLoRA(before, threshold)
    rival.finish(run)
    assert 0 < len(rival.projected) < len(cosines)
    for name, delta in dense(run.model).items():
        expected = moved[name] if cosines[name] <= threshold else starts[name]
        torch.testing.assert_close(delta.detach(), expected, rtol=1e-6, atol=1e-9)
        assert (name in rival.projected) == (cosines[name] <= threshold)


def test_safelora_names_a_layer_that_does_not_fit(run, tiny_llama):
    other = tiny_llama(torch.float64, layers=1)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight should be"):
        SafeLoRA(other, 1.0).finish(run)
    with pytest.raises(ValueError, match="unaligned="):
        SafeLoRA()


@given(st.integers(0, 10_000))
def test_a_cleared_gradient_is_the_nearest_that_does_not_conflict(seed):
    generator = torch.Generator().manual_seed(seed)
    task, alignment = (
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 2), (4,))] for _ in range(2)
    )
    flat = lambda tensors: torch.cat([t.flatten() for t in tensors])
    g, a = flat(task), flat(alignment)
    cleared = flat(without_conflict(task, alignment))
    if g @ a >= 0:
        assert torch.equal(cleared, g)
    else:
        # the projection on the half-space {x: <x, a> >= 0}, by its matrix
        matrix = torch.eye(len(a), dtype=torch.float64) - torch.outer(a, a) / (a @ a)
        torch.testing.assert_close(cleared, matrix @ g)
    assert cleared @ a >= -1e-9
    zero = [torch.zeros_like(t) for t in alignment]
    assert torch.equal(flat(without_conflict(task, zero)), g)


@pytest.mark.parametrize("loss", ["kl", "nll"])
def test_gradient_projection_clears_what_would_raise_the_alignment_loss(run, loss):
    rival = GradientProjection(examples=2, loss=loss)
    rows = run.alignment[:2]
    batch = collate(rows, 0)
    keep = batch["labels"][:, 1:] != -100
    logits = run.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][keep]
    if loss == "nll":
        value = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:][keep])
    else:
        base = copy.deepcopy(run.model).unload()
        with torch.no_grad():
            target = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][keep]
        p, q = target.softmax(-1), logits.softmax(-1)
        value = (p * (p / q).log()).sum(-1).mean()
    alignment = torch.autograd.grad(value, run.parameters())
    for p, a in zip(run.parameters(), alignment, strict=True):
        p.grad = -2 * a.clone() + 0.1
    expected = without_conflict([p.grad.clone() for p in run.parameters()], list(alignment))
    rival.gradients(run, 0)
    assert rival.conflicts == 1 and run.examples_read == 2
    for p, e in zip(run.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-5, atol=1e-7)


def test_one_shot_takes_the_adamw_steps_of_a_loop_by_hand(run):
    twin = copy.deepcopy(run.model)
    OneShot(steps=3, learning_rate=1e-2, example=1).finish(run)
    assert run.examples_read == 3
    batch = collate([run.alignment[1]], 0)
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        loss = twin(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for ours, theirs in zip(run.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@given(st.integers(0, 1000), st.floats(0.1, 1.0))
def test_quiet_directions_are_the_trailing_eigenvectors(seed, energy):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 6, generator=generator, dtype=torch.float64) * torch.tensor([9.0, 5, 3, 2, 1, 0.5])
    covariance = x.T @ x
    quiet = quiet_directions(covariance, energy, 2)
    assert quiet.shape[1] >= 2
    torch.testing.assert_close(quiet.T @ quiet, torch.eye(quiet.shape[1], dtype=torch.float64))
    held = torch.trace(quiet.T @ covariance @ quiet) / covariance.trace()
    least = torch.linalg.eigvalsh(covariance)[: quiet.shape[1]].sum() / covariance.trace()
    assert float(held) == pytest.approx(float(least), abs=1e-9)
    assert quiet.shape[1] == 2 or held <= 1 - energy + 1e-9


def test_the_null_space_start_hides_alignment_inputs_from_the_adapter(run):
    rival = NullSpace(energy=0.9)
    norms = {n: float(p.detach().norm()) for n, p in run.model.named_parameters() if "lora_A" in n}
    with_zero_adapter(run, lambda: rival.start(run))
    tapes = gradients_at_start(run)
    for name, module in run.model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        a = module.lora_A["default"].weight
        assert float(a.norm()) == pytest.approx(norms[f"{name}.lora_A.default.weight"]) and not a.requires_grad
        x = torch.cat([inputs for inputs, _ in tapes[name]])
        seen = (x @ a.detach().T).norm() / (x.norm() * a.detach().norm())
        chance = (x @ torch.randn(200, x.shape[1], dtype=torch.float64).T).norm() / x.norm() / (200 * x.shape[1]) ** 0.5
        assert seen < 0.6 * chance


SETTINGS = {
    "plain": {},
    "ema": {"decay": 0.5},
    "interpolation": {},
    "l2": {"strength": 1.0},
    "ewc": {"examples": 2},
    "kfac": {"examples": 2},
    "replay": {"share": 0.3},
    "one-shot": {"steps": 1},
    "gradient-projection": {"examples": 1},
    "null-space": {"examples": 2},
}


def updates(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@pytest.fixture
def trained(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path):
    counter = itertools.count()

    def train(rival, **options):
        training = {"max_steps": 3, "per_device_train_batch_size": 4, **options.pop("training", {})}
        return train_rival(
            rival,
            tiny_llama(),
            task_rows,
            alignment_rows,
            tmp_path / str(next(counter)),
            tokenizer=tokenizer,
            lora={"r": 2, "target_modules": TARGETS},
            training=training,
            **options,
        )

    return train


@pytest.mark.parametrize("name", SETTINGS)
def test_every_rival_trains_saves_and_differs_from_plain(trained, name):
    result = trained(make_rival(name, SETTINGS[name]))
    assert (result.adapter_dir / "adapter_model.safetensors").is_file()
    assert result.step_time > 0 and len(result.step_seconds) == 3
    assert (result.examples_read > 0) == RIVALS[name].reads_alignment
    assert all(p.isfinite().all() for p in updates(result.model).values())
    if name != "plain":
        plain = updates(trained(Rival()).model)
        assert any(not torch.equal(p, plain[n]) for n, p in updates(result.model).items())


def test_plain_is_what_fit_trains_without_a_guard(trained, tiny_llama, tokenizer, task_rows, tmp_path):
    ours = updates(trained(Rival()).model)
    theirs = fit(
        tiny_llama(),
        task_rows,
        None,
        output_dir=tmp_path / "fit",
        tokenizer=tokenizer,
        lora={"r": 2, "target_modules": TARGETS},
        training={"max_steps": 3, "per_device_train_batch_size": 4},
        guarded=False,
    )
    for name, p in updates(theirs.model).items():
        torch.testing.assert_close(ours[name], p, rtol=0, atol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_rival_trains_an_encoder_decoder_as_fit_does(name, tokenizer, task_rows, alignment_rows, tmp_path):
    options = {"tokenizer": tokenizer, "lora": {"r": 2, "target_modules": ["q", "wo"]}}
    options |= {"training": {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}}
    seen = []

    class Watched(RIVALS[name]):
        def start(self, run):
            batch = run.batch(run.alignment[:2])
            seen.append((tokenizer.batch_decode(batch["input_ids"]), batch["labels"]))
            super().start(run)

    def model():
        torch.manual_seed(0)
        return small_t5()

    ours = train_rival(Watched(**SETTINGS[name]), model(), task_rows, alignment_rows, tmp_path / "rival", **options)
    asked, labels = seen[0]
    responses = [row["response"] for row in alignment_rows]
    assert not any(response in text for text in asked for response in responses)
    assert all(any(r in tokenizer.decode(row[row >= 0]) for r in responses) for row in labels)
    if name == "plain":
        theirs = updates(fit(model(), task_rows, None, output_dir=tmp_path / "fit", guarded=False, **options).model)
        assert len(theirs) > 4
        for key, p in updates(ours.model).items():
            torch.testing.assert_close(p, theirs[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["plain", "interpolation", "one-shot"])
def test_what_acts_after_training_goes_on_from_plain_lora(trained, name):
    plain = trained(Rival())
    whole = updates(trained(make_rival(name, SETTINGS[name])).model)
    gone_on = trained(make_rival(name, SETTINGS[name]), trained=plain.adapter_dir)
    assert gone_on.step_seconds == [] and gone_on.step_time == 0
    for key, p in updates(gone_on.model).items():
        torch.testing.assert_close(p, whole[key], rtol=0, atol=0)


def test_what_acts_while_training_cannot_go_on_from_plain_lora(trained):
    for name in set(SETTINGS) - {"plain", "interpolation", "one-shot"}:
        with pytest.raises(ValueError, match=f"{name} acts while it trains"):
            trained(make_rival(name, SETTINGS[name]), trained="anywhere")


def test_gradient_accumulation_does_not_change_a_penalty(trained):
    whole = updates(trained(L2(5.0), training={"per_device_train_batch_size": 4, "max_steps": 2}).model)
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    parts = updates(trained(L2(5.0), training=halves).model)
    for name, p in whole.items():
        torch.testing.assert_close(parts[name], p, rtol=1e-4, atol=1e-6)


def test_bad_settings_are_named_before_anything_is_written(tmp_path, tiny_llama, tokenizer, task_rows):
    with pytest.raises(ValueError, match="unknown rival 'ewca'"):
        make_rival("ewca")
    with pytest.raises(ValueError, match=r"l2: unknown settings \['strenght'\]"):
        make_rival("l2", {"strenght": 1})
    for name, settings, words in [
        ("l2", {"strength": -1}, "strength"),
        ("ema", {"decay": 1.5}, "decay"),
        ("replay", {"share": 1}, "share"),
        ("one-shot", {"steps": 0}, "steps"),
        ("gradient-projection", {"loss": "mse"}, "loss"),
        ("null-space", {"energy": 0}, "energy"),
    ]:
        with pytest.raises(ValueError, match=words):
            make_rival(name, settings)
    with pytest.raises(ValueError, match="ewc reads alignment examples"):
        train_rival(EWC(), tiny_llama(), task_rows, None, tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


# settings that there are of rivals with few to choose
FEWER = {"mlp-targets": 1, "self-rewritten": 2, "system-prompt": 3, "corda": 3}


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "plain"])
def test_every_sweep_has_the_same_budget_of_settings(name):
    settings = sweep(name)
    assert len(settings) == FEWER.get(name, 12)
    for entry in settings:
        make_rival(name, {**entry, **({"unaligned": "x"} if RIVALS[name].needs_unaligned else {})})
