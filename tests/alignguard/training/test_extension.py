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
     ({"per_device_eval_batch_size": 2}, "does not act"), ({"save_only_model": True}, "save_only_model must be False"),
     ({"ignore_data_skip": True}, "ignore_data_skip must be False"), ({"save_steps": 3}, "save_steps is what save_every sets"),
     ({"save_strategy": "no"}, "save_strategy is what save_every sets")],
)  # fmt: skip
def test_settings_that_would_not_act_are_refused(go, tmp_path, training, words):
    with pytest.raises(ValueError, match=words):
        go(training)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["save_steps", "save_total_limit"])
def test_checkpoints_that_would_not_be_kept_are_not_described(go, tmp_path, field):
    with pytest.raises(ValueError, match=rf"{field} does not act.*save_every"):
        go({field: 3}, save_every=None)
    assert not (tmp_path / "out").exists()


class Killed(BaseException):
    """What no one catches."""


@pytest.fixture
def killed(monkeypatch):
    """Run something that dies before its second optimizer step."""

    def go(action):
        def stop(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr("transformers.TrainerCallback.on_step_begin", stop)
            patched.setattr("alignguard.training.trainer._GuardCallback.on_step_begin", stop)
            with pytest.raises(Killed):
                action()

    return go


@pytest.mark.parametrize("method", ["lora", "full"])
def test_overwriting_leaves_nothing_of_the_earlier_run_and_everything_of_the_user(go, killed, tmp_path, method):
    out = tmp_path / "out"
    go(method=method)
    mine = {"precious.txt": "keep me", "notes/README.md": "mine", "report.json": "{}"}
    for name, text in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    (out / ".adapter.0123abcd").mkdir()  # of a run that was killed while it saved
    (out / "own_answers.jsonl").write_text("{}\n")
    later = {"seed": 7, "resume": False, "overwrite": True, "save_every": 2}
    killed(lambda: go(**later))
    assert json.loads((out / "run.json").read_text())["seed"] == 7
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert left == {"run.json", *mine} and all((out / name).read_text() == text for name, text in mine.items())
    resumed = go(**{**later, "resume": True, "overwrite": False})  # nothing was finished, so it begins
    assert len(resumed.history) == 2 and resumed.adapter_dir == out / "adapter"
    assert {path.name for path in out.iterdir()} == {
        *("adapter", "checkpoints", "history.json", "run.json", "precious.txt", "notes", "report.json")
    }


def test_a_folder_of_the_users_with_a_runs_name_stays(go, tmp_path):
    model = tmp_path / "out" / "model"
    model.mkdir(parents=True)
    (model / "README.md").write_text("# My base model\n")
    go(resume=False, overwrite=True)
    assert (model / "README.md").read_text() == "# My base model\n" and (tmp_path / "out" / "adapter").is_dir()


def test_a_model_that_overwriting_would_remove_is_named_and_stays(go, tmp_path):
    whole = go(method="full", resume=False).adapter_dir
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for method in ("lora", "full"):
        for place in (whole, tmp_path / "out" / "checkpoints" / "checkpoint-2"):
            with pytest.raises(ValueError, match=r"model .*: overwriting output_dir .* removes"):
                go(model=str(place), method=method, resume=False, overwrite=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_resume_beside_overwrite_begins_where_no_run_is(go, tmp_path):
    go()
    (tmp_path / "out" / "run.json").unlink()
    assert len(go({"max_steps": 1}, overwrite=True).history) == 1
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-1"]


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
