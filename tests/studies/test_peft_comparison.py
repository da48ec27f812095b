"""peft's MetaMathQA benchmark: what counts as right, its recipe against a loop by hand, and the command end to end."""

import json

import pytest
import torch
from architectures import make, move
from peft import PeftModel
from transformers import get_cosine_schedule_with_warmup

from alignguard.embedded import data_path, model_path
from alignguard.guard import Guard, GuardConfig
from alignguard.loading import load_model
from studies.__main__ import main
from studies.peft_comparison import recipe, run
from studies.peft_comparison.questions import final_answer, is_correct, number, read_questions, short_enough, sums
from studies.texts import text_loss

TINY = {
    "max_seq_length": 24, "batch_size": 2, "batch_size_eval": 2, "max_steps": 6, "eval_steps": 3,
    "optimizer_kwargs": {"lr": 0.02, "weight_decay": 0.1}, "generation_kwargs": {"max_length": 40, "max_new_tokens": 4},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 4 + 4 = 8.\n#### 8\nThe answer is: 8", "8"),
        ("3 apples\n#### 12", "12"),
        ("The answer is: 3. No, wait. The answer is: 1/2.", "1/2"),
        ("The final answer is: $40%!\nThank you", "40"),
        ("The answer is 7\nThe answer is: 6", "6"),
        ("it is 5", None),
    ],
)
def test_the_final_answer_is_found(text, answer):
    assert final_answer(text) == answer


def test_numbers_are_compared_by_value_and_words_by_letters():
    assert number("20/35") == pytest.approx(4 / 7) and number(" 2.50 ") == 2.5 and number("-3") == -3
    assert (
        number("1/0") is None and number("1/2/3") is None and number("a") is None and number("1e999999") == float("inf")
    )
    assert is_correct("The answer is: 0.5", "#### 1/2") and is_correct("The answer is: blue", "The answer is: blue")
    assert not is_correct("The answer is: 3", "#### 4") and not is_correct("no idea", "#### 4")
    assert not is_correct("The answer is: four", "#### 4") and not is_correct("The answer is: nan", "#### nan")
    with pytest.raises(ValueError, match="without a final answer"):
        is_correct("The answer is: 3", "three")


def test_rows_of_both_forms_are_read_and_others_named(tmp_path):
    made = sums(30, 0)
    assert made == sums(30, 0) != sums(30, 1)
    for row in made:
        told = final_answer(row["response"])
        assert eval(row["response"].split(" = ")[0]) == int(told)
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("".join(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n" for _ in range(2)))
    array.write_text(json.dumps(made))
    assert read_questions(lines, "--test-data") == [{"query": "1 + 1?", "response": "#### 2"}] * 2
    assert read_questions(array, "--data")[3]["query"] == made[3]["query"]
    with array.open("w") as file:
        json.dump([made[0], {"query": "x"}], file)
    with pytest.raises(ValueError, match=r"--data .*rows.json, row 2: expected texts query and response"):
        read_questions(array, "--data")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        read_questions(tmp_path / "none.jsonl", "--data")
    rows = [{"query": "a" * 600, "response": "b" * n} for n in (699, 700)]
    assert short_enough(rows) == rows[:1]


def test_settings_are_the_benchmarks_or_a_files(tmp_path):
    real = recipe.Settings()
    assert (real.max_steps, real.batch_size, real.lora["r"], real.optimizer_kwargs["lr"]) == (5000, 4, 32, 1e-4)
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"max_steps": 7, "eval_steps": 2}))
    assert recipe.Settings.read(path, seed=3) == recipe.Settings(max_steps=7, eval_steps=2, seed=3)
    assert recipe.Settings.read(run.TINY).max_steps == 120
    for given, words in (
        ({"steps": 1}, "unknown fields"),
        ({"max_steps": 0}, "max_steps must be"),
        ({"max_steps": 5}, "eval_steps=250 is more"),
        ({"query_template": "x"}, "must hold {query}"),
        ({"optimizer_kwargs": {"lr": 1}}, "optimizer_kwargs must hold"),
    ):
        path.write_text(json.dumps(given))
        with pytest.raises(ValueError, match=words):
            recipe.Settings.read(path)


@pytest.mark.parametrize("guarded", [False, True])
def test_training_is_the_benchmarks_loop(tokenizer, tmp_path, guarded):
    settings = recipe.Settings(**TINY, query_template="{query} =", valid=2)
    rows = [{"query": "1" * (i % 5 + 1), "response": f" {i}. The answer is: {i}"} for i in range(12)]
    encoded = recipe.encode(rows, tokenizer, settings)
    lengths = [len(row["input_ids"]) for row in encoded]
    assert lengths == sorted(lengths, reverse=True) and len(encoded) == 12
    assert all(row["input_ids"][-1] == tokenizer.eos_token_id and len(row["input_ids"]) <= 25 for row in encoded)
    kept = [{"input_ids": [7, 8, 9, 10], "labels": [-100, -100, 9, 10]}] * 2
    config = GuardConfig(lambda_kl=2.0, kl_memory=0, kl_every=1)

    def start():
        model = make(dtype=torch.float32)
        move(model, 0.1)
        return model, Guard(model, kept, config) if guarded else None

    model, guard = start()
    ran = recipe.train(model, tokenizer, encoded, rows[:2], settings, tmp_path, guard)
    other, guard = start()
    trained = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 6)
    losses = []
    for step in range(6):
        pair = encoded[2 * step : 2 * step + 2]
        nats = 0.0
        for row in pair:
            ids = torch.tensor(row["input_ids"])
            logits = other(input_ids=ids[None]).logits[0, :-1]
            nats = nats + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
        # over as many tokens as the rows have before their end of sequence
        loss = nats / sum(len(row["input_ids"]) - 1 for row in pair)
        losses.append(float(loss.detach()))
        if guard is not None:
            guard.begin_step(step)
            loss = loss + guard.penalty()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)
    assert [entry["step"] for entry in ran.metrics] == [3, 6]
    assert [entry["train loss"] for entry in ran.metrics] == pytest.approx(
        [sum(losses[:3]) / 3, sum(losses[3:]) / 3], abs=2e-4
    )
    assert ran.samples == 12 and ran.tokens == sum(lengths) and ran.train_time > 0


def test_rows_are_sorted_within_buckets_alone(tokenizer):
    settings = recipe.Settings(**{**TINY, "batch_size": 1, "max_steps": 40}, query_template="{query}")
    rows = [{"query": "x", "response": "y" * (1 + i % 9)} for i in range(50)]
    lengths = [len(row["input_ids"]) for row in recipe.encode(rows, tokenizer, settings)]
    assert len(lengths) == 40 and lengths != sorted(lengths, reverse=True)
    for start in (0, 20):
        assert lengths[start : start + 20] == sorted(lengths[start : start + 20], reverse=True)


def test_accuracy_asks_every_row_and_leaves_the_answer_its_room(tokenizer, monkeypatch):
    settings = recipe.Settings(**TINY, query_template="{query}")
    rows = [{"query": f"q{i}", "response": f"#### {i}"} for i in range(5)]
    asked, rooms = [], []

    def answers(model, words, batch, room):
        told = [words.decode(ids, skip_special_tokens=True) for ids in batch.ids]
        asked.extend(told)
        rooms.append(room)
        return [f"The answer is: {text[1:] if text != 'q3' else 'none'}" for text in told]

    monkeypatch.setattr(recipe, "answer_batch", answers)
    assert recipe.accuracy(None, tokenizer, rows, settings) == pytest.approx(4 / 5)
    assert asked == [row["query"] for row in rows] and rooms == [4, 4, 4]
    long = [{"query": "word " * 12, "response": "#### 1"}]
    longest = len(tokenizer(long[0]["query"])["input_ids"][:24])
    recipe.accuracy(None, tokenizer, long, recipe.Settings(**{**TINY, "generation_kwargs": {
        "max_length": longest + 2, "max_new_tokens": 4}}, query_template="{query}"))  # fmt: skip
    assert rooms[-1] == 2
    with pytest.raises(ValueError, match="leaves no room"):
        recipe.accuracy(None, tokenizer, long, recipe.Settings(**{**TINY, "generation_kwargs": {
            "max_length": longest, "max_new_tokens": 4}}, query_template="{query}"))  # fmt: skip


def test_the_validation_rows_are_those_that_the_benchmark_draws():
    import numpy

    numpy.random.seed(0)
    places = numpy.arange(40)
    numpy.random.shuffle(places)
    rows = [{"query": str(i), "response": ""} for i in range(40)]
    drawn = recipe.validation(rows, recipe.Settings(valid=7))
    assert [int(row["query"]) for row in drawn] == places[:7].tolist()


def test_the_command_trains_both_and_writes_the_benchmarks_columns(tmp_path, capsys):
    settings = tmp_path / "settings.json"
    small = {"valid": 2, "test": 2, "texts": 3, "batch_size": 2}
    settings.write_text(json.dumps({**json.loads(run.TINY.read_text()), **small}))
    words = []
    for option, name in (("alignment", "alignment"), ("drift", "validation")):
        few = tmp_path / f"{name}.jsonl"
        few.write_text("".join(data_path(name).read_text().splitlines(keepends=True)[:8]))
        words += [f"--{option}-data", str(few)]
    words += ["--settings", str(settings), "--max-steps", "4", "--eval-steps", "2", "--limit", "1"]
    assert main(["peft-comparison", *words, "--output-dir", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    results = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in run.GUARDS}
    model, tokenizer = load_model(model_path())
    used = recipe.Settings.read(settings, max_steps=4, eval_steps=2)
    texts = recipe.read_texts(data_path("task_validation"))[: used.texts]
    before = text_loss(model, tokenizer, texts, used.max_seq_length, used.batch_size)
    for name, result in results.items():
        info, last = result["train_info"], result["train_info"]["metrics"][-1]
        assert [entry["step"] for entry in info["metrics"]] == [2, 4, 4] and 0 <= last["test accuracy"] <= 1
        adapted = PeftModel.from_pretrained(load_model(model_path())[0], tmp_path / "out" / name)
        after = text_loss(adapted, tokenizer, texts, used.max_seq_length, used.batch_size)
        assert last["forgetting"] == pytest.approx(after - before, abs=1e-5) and abs(last["forgetting"]) > 1e-4
        sizes = [p.numel() for n, p in adapted.named_parameters() if "lora_" in n]
        assert info["num_trainable_params"] == sum(sizes)
        assert info["file_size"] == (tmp_path / "out" / name / "adapter_model.safetensors").stat().st_size
        assert info["accelerator_memory_max"] is None or info["accelerator_memory_max"] >= 0
        assert 0 < info["train_time"] < result["run_info"]["total_time"]
        assert result["alignguard"]["kl"] > 0
    plain, guarded = results["lora"], results["guarded-lora"]
    assert plain["alignguard"]["guard"] is None
    assert GuardConfig.from_dict(guarded["alignguard"]["guard"]) == GuardConfig()
    assert plain["alignguard"]["alignment_examples"] == 0 < guarded["alignguard"]["alignment_examples"]
    assert plain["run_info"]["peft_config"] == guarded["run_info"]["peft_config"]
    for name in run.columns(plain):
        assert name == "experiment_name" or f"\n{name} " in shown
    assert (tmp_path / "out" / "table.txt").read_text() in shown
    rows = read_questions(tmp_path / "out" / "data.jsonl", "--data")
    assert rows[0] == {name: sums(1, 0)[0][name] for name in ("query", "response")}


def test_a_text_loss_is_the_mean_over_all_tokens(tokenizer):
    model, texts = make(dtype=torch.float32), ["write about the sea", "bread", "how do I bake bread today"]
    settings = recipe.Settings(**TINY)
    nats = []
    for text in texts:
        ids = torch.tensor(tokenizer(text)["input_ids"][:24])
        nats += torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
    expected = float(torch.stack(nats).detach().mean())
    assert text_loss(
        model, tokenizer, texts[: settings.texts], settings.max_seq_length, settings.batch_size
    ) == pytest.approx(expected, rel=1e-5)


def test_what_is_missing_is_named_before_anything_runs(tmp_path, capsys):
    assert main(["peft-comparison", "--model", "x", "--data", "y"]) == 2
    error = capsys.readouterr().err
    assert "with --model also give --valid-data, --test-data" in error and error.count("\n") == 1
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n')
    assert main(["peft-comparison", "--test-data", str(bad), "--output-dir", str(tmp_path / "out")]) == 2
    assert "--test-data" in capsys.readouterr().err
    assert main(["peft-comparison", "--text", str(bad), "--output-dir", str(tmp_path / "out")]) == 2
    assert "--text" in capsys.readouterr().err
