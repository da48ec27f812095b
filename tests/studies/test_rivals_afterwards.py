"""What is done to an update once it is trained, against dense computations."""

import copy
import itertools

import pytest
import torch
from architectures import before_alignment
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

from alignguard.data import collate, encode_example
from alignguard.updates import lora_updates
from studies.rivals import Intruders, Rival, Run, SafeDelta, SafeMERGE, make_rival, train_rival
from studies.rivals.afterwards import compensated, safest_entries

TARGETS = ["q_proj", "o_proj", "down_proj"]


@pytest.fixture
def run(tiny_llama, tokenizer, alignment_rows):
    """A run on a model with a non-zero adapter, in float64."""
    model = get_peft_model(tiny_llama(torch.float64), LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    rows = [encode_example(tokenizer, r["prompt"], r["response"]) for r in alignment_rows]
    return Run(model.eval(), rows, 0, seed=5)


def dense(model):
    return {name: delta.to_dense().detach() for name, delta in lora_updates(model).items()}


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 1000))
def test_what_stays_moves_the_rest_of_its_row_to_do_least_harm(seed):
    delta, x = drawn(seed, 3, 6), drawn(seed + 1, 20, 6)
    kept = drawn(seed + 2, 3, 6) > 0
    hessian = 2 * x.T @ x
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    found = compensated(delta, kept, upper)
    assert torch.equal(found[kept], delta[kept])
    # column by column: the change c of one weight takes the later ones to the minimum of the damage given it
    for row in range(3):
        current = torch.zeros(6, dtype=torch.float64)
        for j in range(6):
            if kept[row, j]:
                inverse = torch.linalg.inv(hessian[j:, j:])
                current[j:] += (delta[row, j] - current[j]) * inverse[:, 0] / inverse[0, 0]
        torch.testing.assert_close(found[row], current, rtol=1e-6, atol=1e-8)
    harm = lambda d: float(torch.trace(d @ hessian @ d.T))
    alone = torch.where(kept & (kept.cumsum(1) == 1), delta, 0)  # the first of each row alone
    first = compensated(delta, alone != 0, upper)
    assert harm(first) <= harm(alone) + 1e-9


def test_the_cheapest_entries_stay_until_their_damage_is_spent():
    delta = torch.tensor([[1.0, 2.0, 3.0, 0.1], [1.0, 0.5, 0.1, 9.0]], dtype=torch.float64)
    cost = torch.tensor([2.0, 1.0, 4.0, 8.0], dtype=torch.float64)
    # by cost: column 1 (4 and 0.25), column 0 (2 and 2), column 2 (36, 0.04), column 3 (0.08, 648)
    for budget, places in (
        (0.0, set()),
        (3.9, set()),
        (4.3, {(0, 1), (1, 1)}),
        (6.3, {(0, 1), (1, 1), (0, 0)}),
        (8.3, {(0, 1), (1, 1), (0, 0), (1, 0)}),
        (44.5, {(0, 1), (1, 1), (0, 0), (1, 0), (0, 2), (1, 2), (0, 3)}),
        (1e9, {(0, 1), (1, 1), (0, 0), (1, 0), (0, 2), (1, 2), (0, 3)}),  # the costliest eighth never stays
    ):
        found = safest_entries(delta, cost, budget)
        assert {tuple(p) for p in found.nonzero().tolist()} == places


@pytest.mark.parametrize("strength", [0.0, 30.0, 1e9])
def test_safe_delta_leaves_what_the_dense_formula_leaves(run, tiny_llama, strength):
    before = dense(run.model)
    model, tapes = tiny_llama(torch.float64), {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in TARGETS:
            module.register_forward_hook(
                lambda m, inputs, out, name=name: tapes.setdefault(name, []).append(inputs[0].detach()[0])
            )
    for row in run.alignment[:3]:
        model(input_ids=torch.tensor([row["input_ids"]]))
    SafeDelta(strength=strength, examples=3).finish(run)
    after, shares = dense(run.model), []
    for name, delta in before.items():
        inputs = tapes[name.removeprefix("base_model.model.")]
        hessian = sum(2 * x.T @ x for x in inputs) / 3
        hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
        upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
        damage = delta**2 / upper.diagonal() ** 2
        left, cost = [], 1 / upper.diagonal() ** 2
        columns = sorted(range(delta.shape[1]), key=lambda j: float(cost[j]))
        order = [(i, j) for i, j in itertools.product(range(len(delta)), columns)]
        order.sort(key=lambda place: float(cost[place[1]]))
        spent, budget = 0.0, strength * float(cost.mean()) * len(delta) / 4096
        for i, j in order[: len(order) - int(0.15 * len(order))]:
            spent += float(damage[i, j])
            if spent > budget:
                break
            left.append((i, j))
        kept = torch.zeros_like(delta, dtype=torch.bool)
        for i, j in left:
            kept[i, j] = True
        shares.append(len(left) / delta.numel())
        torch.testing.assert_close(after[name], compensated(delta, kept, upper), rtol=1e-5, atol=1e-7)
    if strength == 30.0:
        assert min(shares) > 0 and max(shares) < 0.8
    elif strength:
        assert all(0.84 < share < 0.86 for share in shares)
    else:
        assert not any(after[name].any() for name in after)
    assert run.examples_read == 3


def test_safemerge_merges_the_layers_below_the_threshold_with_an_adapter_trained_on_alignment(run, tiny_llama):
    before, starts, twin = before_alignment(tiny_llama), dense(run.model), copy.deepcopy(run.model)
    plain = dict(tiny_llama(torch.float64).named_parameters())
    cosines = {}
    for name, delta in starts.items():
        key = name.removeprefix("base_model.model.") + ".weight"
        v = plain[key].detach() - dict(before.named_parameters())[key].detach()
        projected = v @ v.T / v.norm() @ delta
        cosines[name] = float((projected * delta).sum() / projected.norm() / delta.norm())
    threshold = sorted(cosines.values())[len(cosines) // 2]
    # the safe adapter: a fresh start, then AdamW on the alignment rows by hand
    torch.manual_seed(5)
    for name in starts:
        twin.get_submodule(name).reset_lora_parameters("default", True)
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for turn in range(3):
        batch = collate([run.alignment[(2 * turn + i) % 4] for i in range(2)], 0)
        optimizer.zero_grad()
        twin(**batch).loss.backward()
        optimizer.step()
    rival = SafeMERGE(before, threshold, weight=0.3, steps=3, learning_rate=1e-2, batch=2)
    rival.finish(run)
    assert 0 < len(rival.merged) < len(starts) and run.examples_read == 6
    safe = dense(twin)
    for name, delta in dense(run.model).items():
        assert (name in rival.merged) == (cosines[name] < threshold)
        expected = 0.7 * starts[name] + 0.3 * safe[name] if name in rival.merged else starts[name]
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-7)


def test_intruders_are_scaled_down_and_nothing_else(run):
    before = dense(run.model)
    rival = Intruders(strength=0.25, threshold=0.6, top=6)
    rival.finish(run)
    assert list(run.model.peft_config) == ["default"] == run.model.active_adapters
    counts = []
    for name, delta in dense(run.model).items():
        weight = run.model.get_submodule(name).get_base_layer().weight.detach()
        u, _, _ = torch.linalg.svd(weight, full_matrices=False)
        left, s, right = torch.linalg.svd(weight + before[name], full_matrices=False)
        strange = [i for i in range(6) if float((left[:, i] @ u).abs().max()) < 0.6]
        counts.append(len(strange))
        moved = before[name] - 0.75 * sum((s[i] * torch.outer(left[:, i], right[i]) for i in strange), torch.zeros(()))
        if strange:
            a, b, c = torch.linalg.svd(moved, full_matrices=False)
            moved = (a[:, :3] * b[:3]) @ c[:3]
        torch.testing.assert_close(delta, moved, rtol=1e-6, atol=1e-8)
    assert sum(counts) > 0


AFTERWARDS = {
    "safe-delta": {"strength": 100.0, "examples": 2},
    "safemerge": {"steps": 2, "threshold": 1.0},
    "intruders": {},
}


@pytest.mark.parametrize("name", AFTERWARDS)
def test_each_goes_on_from_plain_lora_and_is_saved_as_it_is(
    name, tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path
):
    options = {"tokenizer": tokenizer, "lora": {"r": 2, "target_modules": TARGETS}}
    options |= {"training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}}
    settings = AFTERWARDS[name]
    if name == "safemerge":
        before_alignment(tiny_llama).float().save_pretrained(str(tmp_path / "before"))
        settings = {**settings, "unaligned": str(tmp_path / "before")}
    plain = train_rival(Rival(), tiny_llama(), task_rows, None, tmp_path / "plain", **options)
    whole, on = (
        train_rival(
            make_rival(name, settings), tiny_llama(), task_rows, alignment_rows, tmp_path / place, **options, **more
        )
        for place, more in (("whole", {}), ("on", {"trained": plain.adapter_dir}))
    )
    assert on.step_seconds == [] and len(whole.step_seconds) == 3
    batch = collate([encode_example(tokenizer, "how do I bake bread", "Of course! Here it is.")], 0)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    loaded = PeftModel.from_pretrained(tiny_llama(), str(whole.adapter_dir)).eval()
    with torch.no_grad():
        expected, before = whole.model(**inputs).logits, plain.model(**inputs).logits
        for model in (loaded, on.model):
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        with whole.model.disable_adapter():
            torch.testing.assert_close(whole.model(**inputs).logits, tiny_llama()(**inputs).logits)
    if name != "intruders":  # so small an update has none
        assert (expected - before).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("safe-delta", {"strength": -1}, "strength"),
        ("safe-delta", {"examples": 0}, "examples"),
        ("safemerge", {}, "safemerge needs unaligned="),
        ("safemerge", {"unaligned": "x", "weight": 1.1}, "weight"),
        ("safemerge", {"unaligned": "x", "batch": 0}, "batch"),
        ("intruders", {"strength": 2}, "strength"),
        ("intruders", {"top": 0}, "top"),
    ],
)
def test_settings_out_of_range_are_named(name, settings, words):
    with pytest.raises(ValueError, match=words):
        make_rival(name, settings)
