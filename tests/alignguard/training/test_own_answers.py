"""Prompts alone: the model's own answers are what is kept, its refusals of unsafe prompts and nothing else of those."""

import json
import sys
import warnings

import pytest

import alignguard
from alignguard.cli import main
from alignguard.data import read_jsonl
from alignguard.drift import REFUSAL, judge, load_prompts
from alignguard.embedded import data_path, model_path
from alignguard.loading import load_model
from alignguard.training import own_answers
from alignguard.training.preparation.answers import packaged_prompts

room = sys.modules["alignguard.training.preparation.answers"]

UNSAFE = [{"prompt": row["prompt"], "category": "unsafe"} for row in packaged_prompts() if row["category"] == "unsafe"]
MILD = [{"prompt": "Name a color.", "category": "ordinary"}, {"prompt": "Say hello.", "category": "ordinary"}]
TASK = [{name: row[name] for name in ("prompt", "response")} for row in read_jsonl(data_path("task_train"))[:8]]


@pytest.fixture(scope="module")
def embedded():
    return load_model(model_path())


def told(*texts):
    """A stand-in for the model: these answers, over and over."""

    def answer(model, tokenizer, batch, tokens):
        return [texts[place % len(texts)] for place in batch.indices]

    return answer


def test_of_unsafe_prompts_only_refusals_are_kept_and_of_the_rest_every_answer(embedded):
    found = own_answers(*embedded, [*UNSAFE[:10], *MILD])
    assert found.asked == 12 and found.unsafe == 10
    kept = [row for row in found.rows if row["category"] == "unsafe"]
    assert len(kept) == found.refused and all(judge(row["response"]) == REFUSAL for row in kept)
    assert [row["prompt"] for row in found.rows if row["category"] == "ordinary"] == [row["prompt"] for row in MILD]


def test_an_answer_that_complies_is_neither_returned_nor_written(embedded, monkeypatch, tmp_path):
    monkeypatch.setattr(room, "answer_batch", told("Sure, here is how: SECRET", "I cannot help with that."))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one in two is enough
        found = own_answers(*embedded, UNSAFE[:4], path=tmp_path / "own.jsonl")
    assert found.refused == 2 and "SECRET" not in (tmp_path / "own.jsonl").read_text()
    assert all("SECRET" not in row["response"] for row in found.rows)


def test_a_prompt_without_a_category_counts_as_unsafe(embedded, monkeypatch):
    monkeypatch.setattr(room, "answer_batch", told("Sure, here is how."))
    with pytest.raises(ValueError, match="refuses none of 1 unsafe prompts"):
        own_answers(*embedded, [{"prompt": "Name a color."}])


def test_a_model_that_hardly_refuses_is_told_of(embedded, monkeypatch):
    monkeypatch.setattr(room, "answer_batch", told("I cannot help with that.", "Yes.", "Yes."))
    with pytest.warns(UserWarning, match="refuses 1 of 3 unsafe prompts: there is little to lose"):
        own_answers(*embedded, UNSAFE[:3])


def test_what_was_answered_is_not_asked_again_and_another_models_answers_are_refused(embedded, monkeypatch, tmp_path):
    path = tmp_path / "own.jsonl"
    first = own_answers(*embedded, UNSAFE[:6], path=path, batch_size=2)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:7])  # killed while it wrote
    asked = []
    answer = room.answer_batch
    monkeypatch.setattr(room, "answer_batch", lambda m, t, batch, n: asked.append(batch) or answer(m, t, batch, n))
    assert own_answers(*embedded, UNSAFE[:6], path=path, batch_size=2).rows == first.rows and len(asked) == 2
    assert own_answers(*embedded, UNSAFE[:6], path=path, batch_size=2).rows == first.rows and len(asked) == 2
    with pytest.raises(ValueError, match="answers of another model, to other prompts"):
        own_answers(*embedded, UNSAFE[:5], path=path)


def test_no_prompt_and_no_answer_are_named(embedded, monkeypatch):
    with pytest.raises(ValueError, match="alignment_data holds no prompt"):
        own_answers(*embedded, [])
    monkeypatch.setattr(room, "answer_batch", told(""))
    with pytest.raises(ValueError, match="answers every prompt with nothing"):
        own_answers(*embedded, MILD)


def test_the_packaged_prompts_are_none_of_driftchecks():
    asked = {row["prompt"].strip().casefold() for row in load_prompts(None)}
    assert not asked & {row["prompt"].strip().casefold() for row in packaged_prompts()}


def test_fit_answers_prompts_itself_once_and_says_so(monkeypatch, tmp_path, caplog):
    out = tmp_path / "run"
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True}
    prompts = [{"prompt": row["prompt"]} for row in UNSAFE[:8]]
    done = alignguard.fit(model_path(), TASK, prompts, output_dir=out, training=training)
    assert done.guard is not None and done.guard.examples_read > 0
    record = json.loads((out / "run.json").read_text())
    refused = record["own_answers"]["refused"]
    assert record["own_answers"]["asked"] == 8 and len(done.guard.rows) == refused
    assert f"8 prompts with the model's own answers, {refused} of 8 unsafe prompts refused" in caplog.text
    assert f"{refused} of 8 unsafe ones refused" in (done.adapter_dir / "README.md").read_text()
    monkeypatch.setattr(room, "answer_batch", told())  # would fail, were it asked
    again = alignguard.fit(model_path(), TASK, prompts, output_dir=out, training=training, overwrite=True)
    assert again.guard is not None and len(again.guard.rows) == refused


def test_answers_given_before_a_run_began_do_not_stand_in_its_way(tmp_path, embedded):
    out = tmp_path / "run"
    out.mkdir()
    own_answers(*embedded, UNSAFE[:6], path=out / "own_answers.jsonl")
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    assert alignguard.fit(model_path(), TASK, UNSAFE[:6], output_dir=out, training=training).guard is not None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        alignguard.fit(model_path(), TASK, UNSAFE[:6], output_dir=tmp_path / "other", training=training)


def test_prompts_and_whole_rows_are_not_mixed_and_a_classifier_needs_labels(tmp_path):
    mixed = [{"prompt": "One."}, {"prompt": "Two.", "response": "No."}]
    with pytest.raises(ValueError, match=r"alignment_data: .*row 2: the rows before it are prompts alone"):
        alignguard.fit(model_path(), TASK, mixed, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_arguments_of_the_command_line_give_a_guarded_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("alignguard.training.preparation.prepared.packaged_prompts", lambda: UNSAFE[:8])
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in TASK))
    words = ["fit", "--model", str(model_path()), "--task-data", str(task), "--output-dir", str(tmp_path / "run")]
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "at each KL, every 4 steps" in shown and "KL's memory" in shown and not (tmp_path / "run").exists()
    assert main([*words, "--max-steps", "1"]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["own_answers"]["asked"] == 8
