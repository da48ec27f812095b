"""Killed and resumed: the same bits at the end, nothing half-written ever read."""

import json
import random
import shutil
import signal
from functools import partial

import pytest
import torch
from architectures import make, move
from forked import kill_at, run
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from alignguard import GuardConfig, GuardTrainer
from alignguard.data import collator
from alignguard.guard import Guard, load_guard, save_guard
from alignguard.training import fit
from alignguard.training.checkpoint import MARKER, check_complete, latest_checkpoint

CONFIG = GuardConfig.curvature(
    refresh_every=2, refresh_examples=2, lambda_alignment=5.0, lambda_kl=0.5, max_drift=0.05, held_back=1,
    measure_every=1, averaging=0.5,
)  # fmt: skip
TRAINING = {"max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True}
ROWS = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 10], "labels": [-100, 10]}]


def go(folder, data, event=0, method="lora"):
    counted = kill_at(event, folder)
    fit(
        data["model"], data["task"], data["alignment"], CONFIG, folder, lora={"r": 2} if method == "lora" else None,
        training=TRAINING, save_every=2, resume=True, method=method,
    )  # fmt: skip
    (folder.parent / "events").write_text(str(counted["count"]))


@pytest.fixture
def data(tmp_path, tiny_llama, tokenizer, task_rows, alignment_rows):
    model = tiny_llama(layers=1)
    model.config.attention_dropout = 0.1  # so that the random state matters
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return {"model": tmp_path / "base", "task": task_rows, "alignment": alignment_rows}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_at_random_moments_and_resumed_the_weights_are_the_same_bits(tmp_path, data, method):
    whole = tmp_path / "whole"
    assert run(partial(go, method=method), whole, data) == 0
    events = int((tmp_path / "events").read_text())
    draw = random.Random(3)
    cut = tmp_path / "cut"
    kills = 0
    for event in sorted(draw.sample(range(10, events), 4)):
        code = run(partial(go, method=method), cut, data, event)
        kills += code == -signal.SIGKILL
        for path in cut.rglob("*.json"):
            if ".unfinished" not in path.parts and not path.parent.name.startswith("."):
                json.loads(path.read_text())
    assert kills >= 3
    assert run(partial(go, method=method), cut, data) == 0
    name = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    ours, theirs = load_file(cut / name), load_file(whole / name)
    assert set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    history = [json.loads((folder / "history.json").read_text()) for folder in (cut, whole)]
    assert [entry["loss"] for entry in history[0]] == [entry["loss"] for entry in history[1]]
    assert not list(cut.glob(".adapter*")) and not list(cut.glob(".model*"))


def test_an_incomplete_checkpoint_is_passed_over_and_refused(tmp_path, data):
    folder = tmp_path / "run"
    assert run(go, folder, data) == 0
    latest = latest_checkpoint(folder / "checkpoints")
    assert latest.name == "checkpoint-6"
    earlier = folder / "checkpoints" / "checkpoint-4"
    weights = latest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"adapter_model.*cut short"):
        check_complete(latest)
    assert latest_checkpoint(folder / "checkpoints") == earlier
    (earlier / MARKER).unlink()
    with pytest.raises(ValueError, match=r"resume.*checkpoint-6.*no other"):  # finished, and damaged since
        latest_checkpoint(folder / "checkpoints")
    (latest / MARKER).unlink()
    assert latest_checkpoint(folder / "checkpoints") is None
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        check_complete(earlier)


def test_a_checkpoint_of_the_model_alone_is_not_gone_on_from(tmp_path, tiny_llama):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=1, save_only_model=True, per_device_train_batch_size=2,
        report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = GuardTrainer(model=tiny_llama(layers=1), args=arguments, train_dataset=ROWS, data_collator=collator(0, "causal"))  # fmt: skip
    trainer.train()
    assert not (tmp_path / "checkpoint-1" / "optimizer.pt").exists()
    for name in ("checkpoint-1", "checkpoint-2"):  # one in the middle, one at the end
        with pytest.raises(ValueError, match=rf"{name} holds the model alone \(save_only_model\)"):
            trainer.train(resume_from_checkpoint=str(tmp_path / name))
    with pytest.raises(ValueError, match=r"resume: .*save_only_model"):
        latest_checkpoint(tmp_path)


def test_several_adapters_are_resumed_together(tmp_path, data, tokenizer):
    def two():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(data["model"])
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"]))
        model.base_model.set_adapter(["default", "other"])
        return model

    def weights(folder):
        done = fit(two(), data["task"], data["alignment"], CONFIG, folder, tokenizer=tokenizer,
                   training={**TRAINING, "max_steps": 4}, save_every=2, resume=True)  # fmt: skip
        return {n: p.detach().clone() for n, p in done.model.named_parameters() if "lora_" in n}

    whole = weights(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "checkpoint-4")
    resumed = weights(tmp_path / "whole")
    assert any("other" in n and "lora_B" in n and p.any() for n, p in whole.items())
    assert all(torch.equal(resumed[n], p) for n, p in whole.items())


def test_another_run_is_never_resumed(tmp_path, data):
    folder = tmp_path / "run"
    assert run(go, folder, data) == 0
    for change, words in (
        ({"config": GuardConfig.curvature(lambda_alignment=1.0)}, "config"), ({"seed": 3}, "seed"), ({"method": "full"}, "method")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"resume.*{words}"):
            fit(data["model"], data["task"], data["alignment"], **{"config": CONFIG, **change}, output_dir=folder,
                lora=None if change.get("method") else {"r": 2}, training=TRAINING, save_every=2, resume=True)  # fmt: skip
    with pytest.raises(ValueError, match="task_data"):
        fit(data["model"], data["task"][:3], data["alignment"], CONFIG, folder, lora={"r": 2}, training=TRAINING,
            save_every=2, resume=True)  # fmt: skip
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        fit(data["model"], data["task"], data["alignment"], CONFIG, folder, lora={"r": 2}, training=TRAINING,
            save_every=2, resume=True)  # fmt: skip


def test_a_run_is_not_resumed_on_another_model_of_the_same_name_and_shape(tmp_path, data, tiny_llama):
    folder, more = tmp_path / "run", {"lora": {"r": 2}, "save_every": 1, "resume": True}

    def upto(steps):
        return fit(data["model"], data["task"], data["alignment"], GuardConfig(), folder,
                   training={**TRAINING, "max_steps": steps}, **more)  # fmt: skip

    upto(1)
    tiny_llama(layers=1, seed=1).save_pretrained(data["model"])
    before = (folder / "run.json").read_text()
    with pytest.raises(ValueError, match=r"resume: the model's weights are not those that .* load it anew"):
        upto(2)
    assert (folder / "run.json").read_text() == before
    record = json.loads(before)
    assert len(record.pop("model_weights")) == 64
    (folder / "run.json").write_text(json.dumps(record))
    assert len(upto(2).step_seconds) == 2  # of an earlier version, which did not say


def test_the_latest_checkpoint_of_a_finished_run_is_loaded_and_no_step_is_taken(tmp_path, tiny_llama):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to="none",
        disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = GuardTrainer(model=tiny_llama(layers=1), args=arguments, train_dataset=ROWS * 4, data_collator=collator(0, "causal"))  # fmt: skip
    trainer.train()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2 and len(trainer.step_seconds) == 2
    assert all(torch.equal(p, kept) for p, kept in zip(trainer.model.parameters(), before, strict=True))


def test_a_foreign_folder_is_not_resumed_into(tmp_path, data):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "precious.txt").write_text("keep me")
    with pytest.raises(FileExistsError):
        fit(data["model"], data["task"], data["alignment"], CONFIG, folder, training=TRAINING, resume=True)
    assert [p.name for p in folder.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("structure", ["kfac", "kfac-sketch", "gram", "sketch"])
@pytest.mark.parametrize(("projection", "edge"), [("hard", False), ("soft", False), ("hard", True)])
def test_a_guard_comes_back_bit_by_bit(tmp_path, structure, projection, edge):
    config = GuardConfig.curvature(structure=structure, projection=projection, sketch_rank=4, lambda_task=0.1, scale_free=True,
                         max_drift=0.1, held_back=1, averaging=0.5, noise_edge=edge)  # fmt: skip
    model = make("llama", "pissa", torch.float32)
    guard = Guard(model, ROWS, config)
    move(model)
    for step in range(7):
        guard.begin_step(step)
    value = guard.penalty()
    save_guard(tmp_path, guard, {"note": 1})
    other = Guard(make("llama", "pissa", torch.float32), ROWS, config)
    other.model.load_state_dict(model.state_dict())
    assert load_guard(tmp_path, other) == {"note": 1}
    assert torch.equal(other.penalty(), value)
    assert (other.step, other.examples_read, other.refreshes) == (guard.step, guard.examples_read, guard.refreshes)
    assert (
        other.budget.state_dict() == guard.budget.state_dict()
        and other.freshness.state_dict() == guard.freshness.state_dict()
    )
    assert other.predicted_drift() == guard.predicted_drift()
    ranks = [{name: len(layer.values) for name, layer in one.layers.items()} for one in (guard, other)]
    assert ranks[0] == ranks[1]


def test_damaged_or_foreign_guard_files_are_named(tmp_path):
    config = GuardConfig.curvature(structure="gram")
    guard = Guard.from_alignment(make("llama", dtype=torch.float32), ROWS, config)
    save_guard(tmp_path, guard, {})
    with pytest.raises(ValueError, match=r"other settings.*energy"):
        load_guard(tmp_path, Guard(make("llama"), ROWS, GuardConfig.curvature(structure="gram", energy=0.5)))
    with pytest.raises(ValueError, match="another model"):
        load_guard(tmp_path, Guard(make("gpt2"), ROWS, config))
    with pytest.raises(ValueError, match="with a guard"):
        load_guard(tmp_path, None)
    tensors = tmp_path / "alignguard_guard.safetensors"
    kept = tensors.read_bytes()
    tensors.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ValueError, match="safetensors"):
        load_guard(tmp_path, guard)
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    with pytest.raises(ValueError, match="no readable"):
        load_guard(tmp_path / "gone", guard)


@given(st.data())
def test_a_spoilt_counter_file_is_one_named_error(saved_guard, data):
    folder, guard, text = saved_guard
    counters = json.loads(text)
    junk = st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.lists(st.integers(), max_size=2))
    spot = data.draw(st.sampled_from(["format", "guard", *[f"guard.{k}" for k in counters["guard"]], "cut"]))
    if spot == "cut":
        spoilt = text[: data.draw(st.integers(0, len(text) - 1))]
    else:
        *path, last = spot.split(".")
        place = counters[path[0]] if path else counters
        if data.draw(st.booleans()):
            del place[last]
        else:
            place[last] = data.draw(junk)
        spoilt = json.dumps(counters)
    (folder / "alignguard_guard.json").write_text(spoilt)
    try:
        load_guard(folder, guard)
    except ValueError as error:
        assert str(folder) in str(error)
    else:  # nothing was lost, or what was drawn may stand there: no estimate yet, or no readings
        told = json.loads(spoilt)
        assert told == json.loads(text) or (spot.startswith("guard.") and told["guard"][last] in (None, []))


@pytest.fixture(scope="module")
def saved_guard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    config = GuardConfig.curvature(structure="gram", max_drift=0.1, held_back=1)
    guard = Guard.from_alignment(make("llama", dtype=torch.float32), ROWS, config)
    save_guard(folder, guard, {})
    return folder, guard, (folder / "alignguard_guard.json").read_text()
