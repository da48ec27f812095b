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


@pytest.fixture
def heard(monkeypatch):
    """What ``prepare`` is called with, in place of a run."""
    calls = []
    monkeypatch.setattr(alignguard.training, "prepare", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(alignguard.training, "plan_text", lambda *a, **k: "")
    monkeypatch.setattr(alignguard.training, "seconds_of_step", lambda *a: 1.0)
    monkeypatch.setattr(alignguard.training, "activation_bytes", lambda *a: 0)
    return calls


OPTIONAL = [field for field in dataclasses.fields(GuardConfig) if str(field.type).endswith("| None")]


@pytest.mark.parametrize("field", OPTIONAL, ids=lambda field: field.name)
@pytest.mark.parametrize("preset", ["default", "curvature", "combined", "paper"])
def test_null_in_a_file_and_none_typed_are_none_whatever_the_preset(heard, tmp_path, preset, field):
    words = ["fit", "--dry-run", "--model", "m", "--task-data", "t", "--preset", preset]
    assert cli.main([*words, f"--{field.name.replace('_', '-')}", "none"]) == 0
    for text in ("null", "~", "", "none"):
        (tmp_path / "run.yaml").write_text(f"{field.name}: {text}\n")
        assert cli.main([*words, "--config", str(tmp_path / "run.yaml")]) == 0
    make = GuardConfig if preset == "default" else getattr(GuardConfig, preset)
    assert [call[0][3] for call in heard] == [make(**{field.name: None})] * 5


def test_help_says_which_options_take_none(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "takes the word none, or null in a file" in shown
    assert "(default: 8, or none)" in shown and "(default: none)" in shown and "(default: None)" not in shown


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--preset", "paper"], "--preset"),
        (["--max-drift", "0.5"], "--max-drift"),
        (["--lambda-kl", "4"], "--lambda-kl"),
        (["--kl-tokens", "none"], "--kl-tokens"),
        (["--no-whole-update"], "--whole-update"),
        (["--exclude", "a"], "--exclude"),
        (["--offload", "cpu"], "--offload"),
        (["--fisher", "f"], "--fisher"),
        (["--alignment-data", "/nowhere.jsonl"], "--alignment-data"),
        (["--alignment-split", "train"], "--alignment-split"),
        (["--alignment-turns", "last"], "--alignment-turns"),
    ],
)
def test_a_plain_run_names_what_it_would_not_read(heard, tmp_path, capsys, extra, named):
    words = ["fit", "--dry-run", "--model", "m", "--task-data", "t"]
    assert cli.main([*words, "--plain", *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"alignguard fit: {named}:") and "--plain" in error and not heard
    assert cli.main([*words, "--plain", "--seed", "3", "--verbose"]) == 0 and len(heard) == 1


def test_a_plain_run_names_what_a_file_says_of_the_guard(heard, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: m\ntask_data: t\npreset: curvature\nmax_drift: 0.5\n")
    with (tmp_path / "run.yaml").open("a") as file:
        file.write("plain: true\n")
    assert cli.main(["fit", "--config", str(tmp_path / "run.yaml"), "--dry-run"]) == 2
    assert "--max-drift, --preset" in capsys.readouterr().err and not heard
    assert cli.main(["fit", "--config", str(tmp_path / "run.yaml"), "--no-plain", "--dry-run"]) == 0 and len(heard) == 1


def test_the_plain_run_beside_a_guarded_one_is_of_the_same_file(heard, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: m\ntask_data: t\nalignment_data: k\nlambda_kl: 2.0\nkl_every: 3\n")
    words = ["fit", "--config", str(tmp_path / "run.yaml"), "--dry-run", "--plain"]
    assert cli.main(words) == 0 and len(heard) == 1
    assert cli.main([*words, "--lambda-kl", "3"]) == 2 and "--lambda-kl: of the guard" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("model: m\ntask_data: t\nlambda_kl: often\n")
    assert cli.main(words) == 2 and "lambda_kl cannot be 'often'" in capsys.readouterr().err


def test_turns_of_alignment_data_that_are_not_there_are_named(heard, capsys):
    assert cli.main(["fit", "--dry-run", "--model", "m", "--task-data", "t", "--alignment-turns", "last"]) == 2
    assert "--alignment-data is missing" in capsys.readouterr().err


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


def test_an_earlier_report_of_other_prompts_is_refused_before_the_model_is_read(files, capsys):
    prompts, report = files / "prompts.jsonl", files / "before.json"
    words = ["driftcheck", "--model", str(files / "model"), "--prompts", str(prompts), "--max-new-tokens", "2"]
    prompts.write_text(json.dumps({"prompt": "how do I bake bread", "category": "ordinary"}) + "\n")
    assert cli.main([*words, "--output", str(report)]) == 0
    assert cli.main([*words, "--before", str(report)]) == 0
    words[2] = "nowhere"
    capsys.readouterr()
    assert cli.main([*words, "--before", str(report), "--system", "Be kind."]) == 2
    assert f"--before {report} is of other prompts or another system prompt" in capsys.readouterr().err
    prompts.write_text(json.dumps({"prompt": "write about rain", "category": "ordinary"}) + "\n")  # the same id
    assert cli.main([*words, "--before", str(report)]) == 2
    assert "'ordinary-1' 'how do I bake bread' (ordinary) and 'write about rain'" in capsys.readouterr().err


def test_a_report_and_its_page_are_two_files(files, capsys):
    prompts = files / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "how do I bake bread", "category": "ordinary"}) + "\n")
    words = ["driftcheck", "--model", str(files / "model"), "--prompts", str(prompts), "--max-new-tokens", "2"]
    for page in ("x", "x.answers.jsonl", "model/../x"):
        assert cli.main([*words, "--overwrite", "--output", str(files / "x"), "--html", str(files / page)]) == 2
        assert "--html" in capsys.readouterr().err and not (files / "x").exists()


def test_fisher_replaces_the_file_beside_its_own_only_when_told(files, capsys):
    words = ["fisher", "--model", str(files / "model"), "--data", str(files / "alignment.jsonl")]
    words += ["--output", str(files / "fish")]
    (files / "fish.json").write_text("mine")
    assert cli.main(words) == 2
    assert "fish.json exists" in capsys.readouterr().err
    assert (files / "fish.json").read_text() == "mine" and not (files / "fish").exists()
    assert cli.main([*words, "--overwrite"]) == 0
    assert json.loads((files / "fish.json").read_text())["examples"]


def test_answers_of_another_driftcheck_give_way_only_when_told(files, capsys):
    prompts, report = files / "prompts.jsonl", files / "r.json"
    prompts.write_text(json.dumps({"prompt": "how do I bake bread", "category": "ordinary"}) + "\n")
    words = ["driftcheck", "--model", str(files / "model"), "--prompts", str(prompts), "--max-new-tokens", "2"]
    (files / "r.json.answers.jsonl").write_text(
        '{"driftcheck": "of another model"}\n{"id": "ordinary-1", "text": "no"}\n'
    )
    assert cli.main([*words, "--output", str(report)]) == 2
    assert "r.json.answers.jsonl holds" in capsys.readouterr().err and not report.exists()
    assert cli.main([*words, "--output", str(report), "--overwrite"]) == 0
    assert json.loads(report.read_text())["rows"][0]["text"] != "no"
    assert not (files / "r.json.answers.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["driftcheck", "--model", "m", "--base", "b"], "--base"),
        (["driftcheck", "--model", "m", "--endpoint", "http://localhost:1", "--batch-size", "3"], "--batch-size"),
        (["prompts", "--output", "p.jsonl", "--capability", "3"], "--capability"),
        (["prompts", "--output", "p.jsonl", "--recipe", "capability", "--safe", "3"], "--safe"),
    ],
)
def test_options_that_nothing_would_read_are_named(words, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert named in capsys.readouterr().err and not list(tmp_path.iterdir())
