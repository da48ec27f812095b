"""The command line: options from YAML and flags, and one clear line for every bad input."""

import dataclasses
import inspect
import json

import pytest
import yaml
from transformers import TrainingArguments

import alignguard.training
from alignguard import GuardConfig
from alignguard.cli import commands as cli
from alignguard.data import DataSource
from alignguard.training import fit, prepare


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
        "preset": "curvature",
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
        assert field.metadata["summary"]
        assert f"        {field.name}: " in (GuardConfig.__doc__ or "")


def test_every_option_of_every_command_has_help():
    _, commands = cli.build_parser()
    bare = [
        f"{name} {action.dest}" for name, parser in commands.items() for action in parser._actions if not action.help
    ]
    assert not bare


# What alignguard.fit is told in Python, and how the command line and YAML say it.
SAID_OTHERWISE = {"guarded": "plain", "max_length": "task_max_length"}
ONLY_PYTHON = {
    "config",
    "lora",
    "training",
    "progress",
}  # objects, or taken apart into options of their own
ONLY_TYPED = {"config", "dry_run", "preset", "rank", "lora_alpha", "target_modules"}
OF_LOOKS = {"answers", "most_prompts"}  # of prepare: where answers are kept, and how many a dry run asks for
OF_SOURCES = {f"{what}_{name}" for what in ("task", "alignment") for name in ("split", "subset", "fields", "turns")}


def test_python_command_line_and_yaml_offer_the_same():
    parser = cli.build_parser()[1]["fit"]
    flags = {action.dest for action in parser._actions} - {"help"}
    fields = {field.name for field in dataclasses.fields(GuardConfig)}
    arguments = set(inspect.signature(fit).parameters) - ONLY_PYTHON
    assert flags - ONLY_TYPED - OF_SOURCES == fields | {SAID_OTHERWISE.get(n, n) for n in arguments} | set(
        cli.TRAINING_FIELDS
    )
    assert set(cli.TRAINING_FIELDS) <= set(TrainingArguments.__dataclass_fields__)
    assert set(inspect.signature(prepare).parameters) - {"progress", "read_alignment", "adapter"} - OF_LOOKS <= set(
        inspect.signature(fit).parameters
    )


def other(field):
    """A value that is allowed and not the default."""
    named = {"structure": "gram", "kind": "margin", "metric": "euclidean", "projection": "soft", "tau": 0.5, "seed": 7}
    if field.name in named:
        return named[field.name]
    if isinstance(field.default, bool):
        return not field.default
    if isinstance(field.default, tuple):
        return ("*.k_proj", "lm_head")
    kind = str(field.type).removesuffix(" | None")
    if kind == "int":
        return (field.default or 2) + 1
    return 0.37 if field.default != 0.37 else 0.36


def test_a_value_means_the_same_as_a_flag_in_yaml_and_in_python(tmp_path, monkeypatch):
    values = {field.name: other(field) for field in dataclasses.fields(GuardConfig)}
    expected = GuardConfig.curvature(**values)
    assert all(getattr(expected, field.name) != field.default for field in dataclasses.fields(GuardConfig))
    heard = []
    monkeypatch.setattr(alignguard.training, "prepare", lambda *a, **k: heard.append((a, k)))
    monkeypatch.setattr(alignguard.training, "plan_text", lambda *a, **k: "")
    monkeypatch.setattr(alignguard.training, "seconds_of_step", lambda *a: 1.0)
    monkeypatch.setattr(alignguard.training, "activation_bytes", lambda *a: 0)
    more = {"model": "m", "task_data": "t", "alignment_data": "a", "output_dir": "o", "offload": "cpu", "save_every": 3,
            "max_steps": 9, "learning_rate": 0.5, "rank": 3, "target_modules": ["q_proj"], "task_max_length": 50}  # fmt: skip
    flags = ["fit", "--dry-run"]
    for name, value in {**values, **more}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", *map(str, value)] if isinstance(value, (list, tuple)) else [f"--{flag}", str(value)]
    assert cli.main(flags) == 0
    for spelling in (str, lambda name: name.replace("_", "-")):
        plain = {
            spelling(n): list(v) if isinstance(v, tuple) else v for n, v in {**values, **more, "dry_run": True}.items()
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
        assert cli.main(["fit", "--config", str(tmp_path / "run.yaml")]) == 0
    for arguments, options in heard:
        assert arguments == ("m", DataSource("t"), DataSource("a"), expected)
        assert options["training"] == {"max_steps": 9, "learning_rate": 0.5} and options["save_every"] == 3
        assert options["lora"] == {"r": 3, "target_modules": ["q_proj"]} and options["max_length"] == 50
        assert options["seed"] == 7 and options["offload"] == "cpu"
    assert len(heard) == 3


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
    assert cli.main([*arguments, "--max-new-tokens", "4", "--system", "Be kind."]) == 0
    shown = capsys.readouterr().out
    assert "ordinary prompts answered" in shown and "Be kind." in shown
    assert json.loads((files / "r.json").read_text())["settings"]["system"] == "Be kind."
    first = (files / "r.json").read_bytes()
    assert cli.main(arguments) == 2
    assert "exists" in capsys.readouterr().err and (files / "r.json").read_bytes() == first
    assert cli.main(["driftcheck", "--model", str(files / "model"), "--adapter", str(files)]) == 2
    assert "adapter_config.json" in capsys.readouterr().err
