"""Resuming names what differs one by one, extends a run, and arguments act or are refused."""

import json

import pytest
import torch
from architectures import make
from hypothesis import given
from hypothesis import strategies as st

from alignguard import GuardConfig
from alignguard.cli import main
from alignguard.training import fit
from alignguard.training.record import claim_run

CONFIG = GuardConfig.curvature(refresh_every=2, refresh_examples=2)
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "warmup_steps": 0}


@pytest.fixture
def go(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path):
    def run(training=None, config=CONFIG, **more):
        more = {"resume": True, "save_every": 1, "model": tiny_llama(layers=1), **more}
        model = more.pop("model")
        return fit(model, task_rows, alignment_rows, config, tmp_path / "out", tokenizer=tokenizer, training={**TRAINING, **(training or {})}, **more)  # fmt: skip

    return run


def test_a_finished_run_is_extended_from_where_it_was(go, tmp_path):
    first = go()
    assert len(first.history) == 2
    longer = go({"max_steps": 5})
    assert [entry["step"] for entry in longer.history] == [1, 2, 3, 4, 5]
    assert [e["loss"] for e in longer.history[:2]] == [e["loss"] for e in first.history]
    assert longer.history[-1]["learning_rate"] > 0  # of the longer run's schedule
    assert json.loads((tmp_path / "out" / "run.json").read_text())["steps"] == 5
    again = go({"max_steps": 5})  # nothing is left to do
    assert [e["loss"] for e in again.history] == [e["loss"] for e in longer.history]


def test_more_epochs_extend_a_run_too(go):
    go({"max_steps": -1, "num_train_epochs": 1})
    assert len(go({"max_steps": -1, "num_train_epochs": 2}).history) == 4


def test_what_differs_is_named_one_by_one(go):
    go()
    with pytest.raises(ValueError, match=r"training\.learning_rate \(0\.001 there, 0\.01 now\)"):
        go({"learning_rate": 0.01})
    with pytest.raises(
        ValueError, match=r"config\.lambda_alignment \(1\.0 there, 3\.0 now\), lora.*r \(8 there, 4 now\)"
    ):
        go(config=GuardConfig.curvature(refresh_every=2, refresh_examples=2, lambda_alignment=3.0), lora={"r": 4})
    with pytest.raises(ValueError, match=r"steps \(2 there, 1 now\), training\.max_steps \(2 there, 1 now\)"):
        go({"max_steps": 1})


@given(
    before=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(0, 2)),
    now=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(0, 2)),
    steps=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_a_run_is_taken_over_exactly_where_it_is_the_same_or_longer(tmp_path_factory, before, now, steps):
    folder = tmp_path_factory.mktemp("run")
    there, wanted = ({"training": x, "steps": n} for x, n in zip((before, now), steps, strict=True))
    claim_run(folder, there, overwrite=False, resume=False)
    if before == now and steps[0] <= steps[1]:
        claim_run(folder, wanted, overwrite=False, resume=True)
        assert json.loads((folder / "run.json").read_text()) == wanted
        return
    with pytest.raises(ValueError, match="resume") as error:
        claim_run(folder, wanted, overwrite=False, resume=True)
    differ = {name for name in "abc" if before.get(name) != now.get(name)}
    assert all(f"training.{name} (" in str(error.value) for name in differ)
    assert steps[0] <= steps[1] or f"steps ({steps[0]} there, {steps[1]} now)" in str(error.value)


def test_a_finished_run_without_a_checkpoint_is_not_begun_again(go):
    go(resume=False, save_every=None)
    with pytest.raises(ValueError, match=r"finished run that kept no checkpoint.*save_every"):
        go(save_every=None)


@pytest.mark.parametrize(
    ("training", "words"),
    [({"resume_from_checkpoint": "/nowhere"}, "give resume="), ({"do_train": True}, "do_train does not act"),
     ({"per_device_eval_batch_size": 2}, "does not act")],
)  # fmt: skip
def test_settings_that_would_not_act_are_refused(go, tmp_path, training, words):
    with pytest.raises(ValueError, match=words):
        go(training)
    assert not (tmp_path / "out").exists()


def test_lora_for_a_model_that_has_its_adapter_is_refused(go):
    with pytest.raises(ValueError, match="lora: the model carries its adapter"):
        go(model=make(dtype=torch.float32), lora={"r": 64})


def test_options_of_lora_act_or_are_refused_on_the_command_line(tmp_path, capsys, tiny_llama, tokenizer, task_rows):
    tiny_llama(layers=1).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task_rows))
    words = ["fit", f"--model={tmp_path}/m", f"--task-data={tmp_path}/t.jsonl", "--plain", "--dry-run", "--max-steps=2"]
    assert main([*words, "--method", "full", "--rank", "4"]) == 2
    assert "leave out lora" in capsys.readouterr().err
    assert main([*words, "--method", "full"]) == 0
    assert main([*words, "--target-modules", "all-linear", "--rank", "2"]) == 0
    assert "2 steps" in capsys.readouterr().out
