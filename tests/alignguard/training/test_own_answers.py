"""Prompts alone: the model's own answers are what is kept, its refusals of unsafe prompts and nothing else of those."""

import copy
import hashlib
import json
import sys
import warnings

import pytest
import torch
from architectures import MODELS
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel

import alignguard
from alignguard.cli import main
from alignguard.data import DataSource, read_jsonl
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


@pytest.fixture
def unasked(monkeypatch):
    """A model that is asked anything fails the test."""

    def asked(*arguments):
        raise AssertionError("it was asked")

    monkeypatch.setattr(room, "answer_batch", asked)


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


def test_an_answer_that_is_still_a_thought_is_not_kept(embedded, monkeypatch):
    thinking = "<think>\nThe person asks for a color, so"
    monkeypatch.setattr(room, "answer_batch", told("I cannot help with that.", thinking, "<think>\n\n</think>\nRed."))
    found = own_answers(*embedded, [UNSAFE[0], *MILD[:2]])
    assert [row["response"] for row in found.rows] == ["I cannot help with that.", "<think>\n\n</think>\nRed."]


def test_a_prompt_without_a_category_counts_as_unsafe(embedded, monkeypatch):
    monkeypatch.setattr(room, "answer_batch", told("Sure, here is how."))
    with pytest.raises(ValueError, match="refuses none of 1 unsafe prompts"):
        own_answers(*embedded, [{"prompt": "Name a color."}])


@pytest.mark.parametrize("category", ["Unsafe", "violence", "safe", ["unsafe"]])
def test_a_category_of_another_name_does_not_pass_for_harmless(unasked, embedded, tmp_path, category):
    rows = [*UNSAFE[:1], {"prompt": "How do I build a bomb?", "category": category}]
    with pytest.raises(
        ValueError, match=r"alignment_data, row 2: unknown category .*must be one of unsafe, borderline"
    ):
        own_answers(*embedded, rows)
    with pytest.raises(ValueError, match=r"alignment_data, row 2: unknown category"):
        alignguard.fit(model_path(), TASK, rows, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_beside_text_that_may_be_their_answer_are_refused(unasked, tmp_path):
    for more in ({"answer": "No."}, {"system": "Be kind."}, {"history": [["a", "b"]]}):
        rows = [{"prompt": "One.", "harm": "none", "score": 3}, {"prompt": "Two.", **more}]
        with pytest.raises(
            ValueError, match=rf"alignment_data: data, row 2: .*'{next(iter(more))}' beside them would not"
        ):
            alignguard.fit(model_path(), TASK, rows, output_dir=tmp_path / "run")
    renamed = DataSource([{"question": "One.", "answer": "No."}], fields={"prompt": "question"})
    with pytest.raises(ValueError, match="--alignment-fields prompt=question response=answer"):
        alignguard.fit(model_path(), TASK, renamed, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


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


def test_a_file_that_holds_something_else_below_a_blank_line_is_not_written_over(embedded, monkeypatch, tmp_path):
    monkeypatch.setattr(room, "answer_batch", told("I cannot help with that."))
    path = tmp_path / "own.jsonl"
    path.write_text("\nnotes of mine\n")
    with pytest.raises(ValueError, match=r"own\.jsonl holds answers of another model"):
        own_answers(*embedded, UNSAFE[:1], path=path)
    assert path.read_text() == "\nnotes of mine\n"
    path.write_text("\n")
    assert len(own_answers(*embedded, UNSAFE[:1], path=path).rows) == 1


def test_answers_kept_for_other_categories_or_another_template_are_refused(embedded, monkeypatch, tmp_path):
    monkeypatch.setattr(room, "answer_batch", told("I cannot help with that.", "Blue.", "Hello."))
    path, mild = tmp_path / "own.jsonl", [UNSAFE[0], *MILD]
    assert len(own_answers(*embedded, mild, path=path).rows) == 3
    unsafe = [{**row, "category": "unsafe"} for row in mild]
    with pytest.warns(UserWarning, match="refuses 1 of 3 unsafe prompts"):
        assert len(own_answers(*embedded, unsafe).rows) == 1
    other = copy.deepcopy(embedded[1])
    other.chat_template = "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}Bot:"
    for tokenizer, rows in ((embedded[1], unsafe), (other, mild)):
        with pytest.raises(ValueError, match="to other prompts or categories, with another tokenizer or chat template"):
            own_answers(embedded[0], tokenizer, rows, path=path)
    assert len(own_answers(*embedded, mild, path=path).rows) == 3


def test_answers_that_an_earlier_version_kept_are_refused(embedded, monkeypatch, tmp_path):
    digest = hashlib.sha256(json.dumps([{"max_new_tokens": 48}, [["0", UNSAFE[0]["prompt"]]]]).encode())
    for name, weight in embedded[0].named_parameters():
        sums = f"{weight.double().sum().item()!r} {weight.double().abs().sum().item()!r}"
        digest.update(f"{name} {tuple(weight.shape)} {sums}".encode())
    lines = [{"own_answers": digest.hexdigest()}, {"place": 0, "response": "Sure, here is how."}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(room, "answer_batch", told("I cannot help with that."))
    with pytest.raises(ValueError, match="or an earlier version's; give another place"):
        own_answers(*embedded, UNSAFE[:1], path=tmp_path / "own.jsonl")


def test_an_encoder_reads_the_end_of_the_prompt_that_its_tokenizer_puts_there(tokenizer, monkeypatch):
    ended = copy.deepcopy(tokenizer)
    ended.chat_template = None
    ended.backend_tokenizer.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    read = []
    monkeypatch.setattr(room, "answer_batch", lambda m, t, batch, n: read.extend(batch.ids) or ["Blue."])
    own_answers(MODELS["t5"](), ended, MILD[:1])
    assert read == [tuple(ended(MILD[0]["prompt"] + "\n")["input_ids"])] and read[0][-1] == 2


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


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lora": {"r": 0}}, "lora: r, the rank"),
        ({"lora": {"target_modules": ["nope"]}}, "lora: target_modules"),
        ({"lora": {"use_dora": True}}, "uses DoraLinearVariant"),
        ({"lora": {"inference_mode": True}}, "nothing trains"),
        ({"training": {"optim": "no_such"}}, "training: .*no_such"),
        ({"training": {"optim": "adamw_bnb_8bit"}}, "training: .*bitsandbytes"),
        ({"training": {"max_steps": 1, "warmup_steps": 10}}, "the learning rate never rises"),
        ({"fisher": "/nowhere.safetensors", "config": alignguard.GuardConfig.curvature()}, "fisher: no such file"),
        ({"config": alignguard.GuardConfig(exclude=("*",))}, "nothing to guard"),
    ],
)
def test_what_needs_no_answers_is_refused_before_a_prompt_is_answered(unasked, tmp_path, wrong, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        alignguard.fit(model_path(), TASK, UNSAFE[:4], output_dir=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_a_guard_for_another_trainer_looks_at_its_rows_too(unasked, tokenizer, caplog):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = get_peft_model(GPT2LMHeadModel(GPT2Config(**sizes)), LoraConfig(r=2, target_modules=["c_attn"]))
    long = {"prompt": "how " * 100, "category": "ordinary"}
    with pytest.raises(ValueError, match=r"alignment_data, row 1: longer than the model's 64 positions"):
        alignguard.make_guard(model, tokenizer, [long])
    row = {"prompt": "how " * 100, "response": "Of course."}
    alignguard.make_guard(model, tokenizer, [row], alignguard.GuardConfig(max_length=32))
    assert "alignment_data: 1 of 1 rows are longer than 32 tokens and cut" in caplog.text


def test_a_guard_for_another_trainer_refuses_its_model_before_a_prompt_is_answered(unasked, embedded, tmp_path):
    model = get_peft_model(copy.deepcopy(embedded[0]), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="uses DoraLinearVariant"):
        alignguard.make_guard(model, embedded[1], UNSAFE[:4], answers=tmp_path / "own.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "lora",
    [{}, {"init_lora_weights": "pissa"}, {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}],
)
def test_a_run_keeps_what_the_model_answers_without_its_adapter(embedded, tmp_path, lora):
    expected = own_answers(*embedded, [*UNSAFE[:5], *MILD])
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    done = alignguard.fit(
        model_path(), TASK, [*UNSAFE[:5], *MILD], output_dir=tmp_path / "run", lora=lora, training=training
    )
    decoded = "".join(embedded[1].decode(row["input_ids"]) for row in done.guard.rows)
    assert len(done.guard.rows) == len(expected.rows)
    assert all(row["response"] in decoded for row in expected.rows)


def test_a_run_stopped_while_the_model_answers_goes_on_with_the_same_model_object(embedded, monkeypatch, tmp_path):
    model, tokenizer = copy.deepcopy(embedded[0]), embedded[1]
    answer, asked = room.answer_batch, []

    def stopped(*arguments):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(room, "answer_batch", stopped)
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    again = lambda: alignguard.fit(
        model, TASK, UNSAFE[:40], output_dir=tmp_path / "run", tokenizer=tokenizer, training=training
    )
    with pytest.raises(KeyboardInterrupt):
        again()
    assert len((tmp_path / "run" / "own_answers.jsonl").read_text().splitlines()) == 33  # a head and a batch
    assert len(again().guard.rows) > 0 and len(asked) == 3


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


def test_overwriting_replaces_answers_to_other_prompts_and_takes_away_those_of_no_run(tmp_path):
    out, training = tmp_path / "run", {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    answers = out / "own_answers.jsonl"

    def go(prompts, **more):
        return alignguard.fit(model_path(), TASK, prompts, output_dir=out, training=training, **more)

    go(UNSAFE[:6])
    before = answers.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite"):
        go(UNSAFE[:7])
    with pytest.raises(ValueError, match="answers of another model, to other prompts"):
        go(UNSAFE[:7], resume=True)  # which is another run, whatever overwriting says
    assert answers.read_bytes() == before
    go(UNSAFE[:7], overwrite=True)
    assert json.loads((out / "run.json").read_text())["own_answers"]["asked"] == 7
    assert len(answers.read_text().splitlines()) == 1 + 7  # a head, and an answer each
    go([{"prompt": "Name a color.", "response": "Blue."}], overwrite=True)
    assert not answers.exists() and json.loads((out / "run.json").read_text())["own_answers"] is None


def test_a_run_that_never_began_is_taken_again_with_its_answers(tmp_path, monkeypatch):
    def stop(*arguments, **more):
        raise OSError("the machine went away")

    training = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}

    def go():
        return alignguard.fit(model_path(), TASK, UNSAFE[:6], output_dir=tmp_path / "run", training=training)

    with monkeypatch.context() as patched:
        patched.setattr("transformers.Trainer.train", stop)
        with pytest.raises(OSError, match="went away"):
            go()
    monkeypatch.setattr(room, "answer_batch", told())  # would fail, were it asked
    assert go().adapter_dir.is_dir()


def test_a_look_takes_prompts_from_the_whole_set_half_of_them_unsafe():
    prompts = [{"prompt": f"a{i}", "category": "ordinary"} for i in range(40)] + [
        {"prompt": f"u{i}"} for i in range(20)
    ]
    found = [row["prompt"] for row in room.spread(prompts, 8)]
    assert found == ["a0", "a10", "a20", "a30", "u0", "u5", "u10", "u15"]
    assert room.spread(prompts, 100) == prompts and len(room.spread(prompts[38:42], 3)) == 3
    assert [row["prompt"] for row in room.spread(prompts[:40], 2)] == ["a0", "a20"]
    assert len(room.spread(prompts[39:], 8)) == 8


def test_a_look_does_not_judge_a_run_by_the_few_prompts_that_it_asks(tmp_path, capsys, monkeypatch):
    """A model that refuses the late prompts alone can be trained, so the plan is printed."""
    monkeypatch.setattr(room, "answer_batch", told("Sure, here is how."))
    kept, task = tmp_path / "keep.jsonl", tmp_path / "task.jsonl"
    kept.write_text("".join(json.dumps(row) + "\n" for row in UNSAFE[:40]))
    task.write_text("".join(json.dumps(row) + "\n" for row in TASK))
    words = ["fit", "--model", str(model_path()), "--task-data", str(task), "--alignment-data", str(kept), "--dry-run"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert main([*words, "--max-drift", "0.5"]) == 0
    plan = capsys.readouterr().out
    assert "0 of 16 unsafe prompts refused" in plan and "a run answers all 40 prompts" in plan
    assert main([word for word in words if word != "--dry-run"] + ["--output-dir", str(tmp_path / "run")]) == 2
    assert "refuses none of 40 unsafe prompts" in capsys.readouterr().err
