"""``alignguard fit`` on files as people have them, and the options that say how data are read."""

import json
from contextlib import nullcontext

import pytest

from alignguard.cli import main


@pytest.fixture
def model(tmp_path, tiny_llama, tokenizer):
    tiny_llama(layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def fit(model, task, *more, kept=None):
    out = model.parent / f"out-{task.stem}"
    data = ["--task-data", task, "--alignment-data", kept or task, "--output-dir", out]
    sizes = ["--rank", "2", "--max-steps", "1", "--per-device-train-batch-size", "2", "--kl-examples", "1"]
    return main([str(word) for word in ["fit", "--model", model, *data, *sizes, *more]]), out


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows, indent=1) if path.suffix == ".json" else lines)
    return path


ALPACA = {"instruction": "write about", "input": "rain", "output": "Here it is.", "text": "Below is an instruction"}
DOLLY = {"instruction": "write", "context": "It rains.", "response": "Here it is.", "category": "closed_qa"}
SHAREGPT = [("human", "write"), ("gpt", "Here it is."), ("human", "about rain"), ("gpt", "Of course!")]
OPENAI = [
    {"role": "system", "content": "write"}, {"role": "user", "content": "how"},
    {"role": "assistant", "content": "No.", "weight": 0}, {"role": "user", "content": "how now"},
    {"role": "assistant", "content": "Of course!", "weight": 1},
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rows", "masked"),
    [
        ("alpaca.json", [ALPACA, {**ALPACA, "input": ""}], "<s><u>write about\n\nrain<a>»Here it is.</s>«"),
        ("dolly.jsonl", [DOLLY, {**DOLLY, "context": ""}], "<s><u>write\n\nIt rains.<a>»Here it is.</s>«"),
        (
            "sharegpt.json",
            [{"id": "a_0", "conversations": [{"from": who, "value": text} for who, text in SHAREGPT]}] * 2,
            "<s><u>write<a>»Here it is.</s>«<u>about rain<a>»Of course!</s>«",
        ),
        ("openai.jsonl", [{"messages": OPENAI}] * 2, "<s><u>write<u>how<a>No.</s><u>how now<a>»Of course!</s>«"),
    ],
)
def test_unchanged_files_train_on_what_the_assistant_says_and_show_it_first(model, capsys, name, rows, masked):
    task = write(model.parent / name, rows)
    code, out = fit(model, task)
    assert code == 0 and (out / "adapter" / "adapter_config.json").is_file()
    assert f"\n{masked}\n" in capsys.readouterr().out


def test_options_map_columns_and_choose_turns(model, capsys):
    mapped = write(model.parent / "mapped.csv", [])
    mapped.write_text("question,answer\nwrite about rain,Here it is.\nwrite about bread,Of course!\n")
    chat = write(model.parent / "chat.jsonl", [{"conversations": [{"from": w, "value": t} for w, t in SHAREGPT]}] * 2)
    options = ["--task-fields", "prompt=question", "response=answer", "--alignment-turns", "last", "--dry-run"]
    code, out = fit(model, mapped, *options, kept=chat)
    said = capsys.readouterr().out
    assert code == 0 and not out.exists()
    assert "\n<s><u>write about rain<a>»Here it is.</s>«\n" in said
    assert "\n<s><u>write<a>Here it is.</s><u>about rain<a>»Of course!</s>«\n" in said
    for more, words in (
        (["--task-fields", "prompt"], "--task-fields 'prompt': expected NAME=COLUMN"),
        (["--task-fields", "promt=question"], "nothing is read under ['promt']"),
        (["--task-split", "train"], "a file has no splits"),
        (["--task-turns", "first"], "invalid choice: 'first'"),
    ):
        with pytest.raises(SystemExit) if "choice" in words else nullcontext():
            assert fit(model, mapped, *more, "--dry-run", kept=chat)[0] == 2
        assert words in capsys.readouterr().err


def test_what_is_cut_is_said_in_the_plan_and_before_training(model, capsys, caplog):
    rows = [{"prompt": "write", "response": "bread " * 40}, {"prompt": "write", "response": "Of course!"}]
    task, kept = write(model.parent / "long.jsonl", rows), write(model.parent / "kept.jsonl", rows[1:] * 2)
    words = "task_data: 1 of 2 rows are longer than 32 tokens and cut: 1 lose the end of the response and its end-of-turn token"
    assert fit(model, task, "--task-max-length", "32", "--dry-run", kept=kept)[0] == 0
    assert words in capsys.readouterr().out
    assert fit(model, task, "--task-max-length", "32", kept=kept)[0] == 0
    assert words in caplog.text
    assert fit(model, task, "--task-max-length", "128", "--dry-run", kept=kept)[0] == 0
    assert "longer than" not in capsys.readouterr().out
