"""The command line: options from YAML and flags, and one clear line for every bad input."""

import dataclasses
import json

import pytest
import yaml

from alignguard import GuardConfig, cli


@pytest.fixture
def files(tmp_path, tiny_llama, tokenizer, task_rows, alignment_rows):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, rows in (("task", task_rows), ("alignment", alignment_rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = {
        "model": str(tmp_path / "model"),
        "task_data": str(tmp_path / "task.jsonl"),
        "alignment_data": str(tmp_path / "alignment.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "rank": 2,
        "refresh_examples": 2,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    return tmp_path


def test_every_guard_option_is_on_the_command_line_with_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(GuardConfig):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert set(cli._field_help()) == {field.name for field in dataclasses.fields(GuardConfig)}


def test_yaml_gives_defaults_and_flags_win(files):
    assert cli.main(["fit", "--config", str(files / "run.yaml"), "--structure", "gram", "--energy", "0.5"]) == 0
    saved = json.loads((files / "out" / "adapter" / "alignguard_config.json").read_text())
    assert saved["structure"] == "gram" and saved["energy"] == 0.5 and saved["refresh_examples"] == 2
    assert json.loads((files / "out" / "adapter" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--task-data", "gone.jsonl"], "gone.jsonl"),
        (["--model", "./gone"], "gone"),
        (["--energy", "2"], "energy"),
        (["--target-modules", "z_proj"], "z_proj"),
        (["--config", "gone.yaml"], "gone.yaml"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(files, extra, words, capsys):
    assert cli.main(["fit", "--config", str(files / "run.yaml"), *extra]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n", "options and values"),
        ("lambda_alignmnt: 3\n", "lambda_alignmnt"),
        ("a: [", "YAML"),
        ("rank: many\n", "rank"),
    ],
)
def test_a_bad_yaml_file_is_named(files, text, words, capsys):
    (files / "bad.yaml").write_text(text)
    assert cli.main(["fit", "--config", str(files / "bad.yaml")]) == 2
    error = capsys.readouterr().err
    assert "bad.yaml" in error and words in error


def test_a_missing_option_is_named(capsys):
    assert cli.main(["fit", "--task-data", "x.jsonl"]) == 2
    assert "--model is missing" in capsys.readouterr().err


def test_driftcheck_measures_a_model_and_never_overwrites(files, capsys):
    prompts = files / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "how do I bake bread", "category": "ordinary", "id": "a"}) + "\n")
    arguments = [
        "driftcheck",
        "--model",
        str(files / "model"),
        "--prompts",
        str(prompts),
        "--output",
        str(files / "r.json"),
    ]
    assert cli.main([*arguments, "--max-new-tokens", "4"]) == 0
    assert "ordinary prompts answered" in capsys.readouterr().out
    first = (files / "r.json").read_bytes()
    assert cli.main(arguments) == 2
    assert "exists" in capsys.readouterr().err and (files / "r.json").read_bytes() == first
    assert cli.main(["driftcheck", "--model", str(files / "model"), "--adapter", str(files)]) == 2
    assert "adapter_config.json" in capsys.readouterr().err
