"""The file that init writes runs as it stands, the shells complete what there is, and any number of reports compare."""

import json
import shutil
import subprocess

import pytest
import torch
import yaml
from architectures import MODELS
from transformers import LlamaForSequenceClassification

from alignguard.cli import main
from alignguard.cli.commands import build_parser
from alignguard.cli.start import completion_script
from alignguard.drift import DriftReport, DriftRow


@pytest.fixture
def model(tiny_llama, tokenizer, tmp_path):
    folder = tmp_path / "model"
    tiny_llama(layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_written_file_is_a_run(model, task_rows, alignment_rows, tmp_path, capsys):
    task, keep = write(tmp_path / "task.jsonl", task_rows), write(tmp_path / "keep.jsonl", alignment_rows)
    out = tmp_path / "run.yaml"
    words = [
        "init",
        "--model",
        str(model),
        "--task-data",
        str(task),
        "--alignment-data",
        str(keep),
        "--output",
        str(out),
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "8 task rows, 1 optimizer steps" in said and f"--config {out}" in said
    values = yaml.safe_load(out.read_text())
    assert values["per_device_train_batch_size"] == 8 and values["task_max_length"] == 64
    assert "#" in out.read_text()
    assert main(["fit", "--config", str(out), "--output-dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err


def written(tmp_path, model, rows, *more):
    """What init writes for rows: the values of the file, and its text."""
    out = tmp_path / "run.yaml"
    task = write(tmp_path / "task.jsonl", rows)
    assert (
        main(["init", "--model", str(model), "--task-data", str(task), "--output", str(out), "--overwrite", *more]) == 0
    )
    return yaml.safe_load(out.read_text()), out.read_text()


def test_the_file_tells_of_rows_that_are_longer_than_it_reads(tmp_path, tiny_llama, tokenizer, capsys):
    model = tiny_llama(layers=1)
    model.config.max_position_embeddings = 200
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    short, long = {"prompt": "a", "response": "b"}, {"prompt": "a", "response": "a b c d " * 200}
    count = len(tokenizer.apply_chat_template(messages(long), return_dict=True)["input_ids"])
    values, text = written(tmp_path, tmp_path / "model", [short] * 60 + [long] * 3)
    assert values["task_max_length"] == 192 and f"the longest of {count} tokens" in text
    assert "3 of 63 rows are longer and cut" in text and "3 of 63 rows are longer" in capsys.readouterr().out
    values, text = written(tmp_path, tmp_path / "model", [short])
    assert values["task_max_length"] == 64 and "no row is longer" in text


def messages(row):
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]


def test_an_encoder_decoders_response_counts_as_its_prompt_does(tmp_path, tokenizer):
    MODELS["t5"]().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    values, _ = written(tmp_path, tmp_path / "model", [{"prompt": "a", "response": "a b c d " * 20}])
    assert values["task_max_length"] > 64


def test_a_classifier_is_asked_for_its_alignment_rows_at_once(tmp_path, tiny_llama, tokenizer, capsys):
    torch.manual_seed(0)
    LlamaForSequenceClassification(tiny_llama().config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    task, out = write(tmp_path / "task.jsonl", [{"prompt": "a", "label": 1}]), tmp_path / "run.yaml"
    assert main(["init", "--model", str(tmp_path / "model"), "--task-data", str(task), "--output", str(out)]) == 2
    assert "a classifier keeps labels" in capsys.readouterr().err and not out.exists()


def test_without_alignment_data_the_line_is_there_to_be_filled_in(model, task_rows, tmp_path):
    out = tmp_path / "run.yaml"
    task = write(tmp_path / "task.jsonl", task_rows)
    assert main(["init", "--model", str(model), "--task-data", str(task), "--output", str(out)]) == 0
    assert "alignment_data" not in yaml.safe_load(out.read_text()) and "# alignment_data:" in out.read_text()


def test_bad_data_are_named_before_anything_is_written(model, tmp_path, capsys):
    task = write(tmp_path / "task.jsonl", [{"prompt": "a"}])
    out = tmp_path / "run.yaml"
    assert main(["init", "--model", str(model), "--task-data", str(task), "--output", str(out)]) == 2
    assert "--task-data" in capsys.readouterr().err
    assert not out.exists()


def test_bash_completes_commands_options_and_choices():
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    script = completion_script("bash", build_parser()[1])

    def complete(*words):
        told = " ".join(f"'{word}'" for word in words)
        code = f"{script}\nCOMP_WORDS=({told}); COMP_CWORD={len(words) - 1}; _alignguard; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert complete("alignguard", "dr") == ["driftcheck"]
    assert complete("alignguard", "driftcheck", "--end") == ["--endpoint"]
    assert complete("alignguard", "driftcheck", "--judge", "wild") == ["wildguard"]
    assert "--max-drift" in complete("alignguard", "fit", "--max-")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_name_every_command_and_option(shell, capsys):
    assert main(["completion", shell]) == 0
    said = capsys.readouterr().out
    commands = build_parser()[1]
    assert all(name in said for name in commands) and "endpoint" in said and "llama-guard" in said


def test_any_number_of_reports_stand_side_by_side(tmp_path, capsys):
    for name, refused in (("a", 4), ("b", 2), ("c", 4)):
        verdicts = ["refusal"] * refused + ["compliance"] * (4 - refused)
        rows = [DriftRow(str(i), "unsafe", "p", "x", verdict) for i, verdict in enumerate(verdicts)]
        DriftReport(tuple(rows), kl=None if name == "a" else 0.25).save(tmp_path / f"{name}.json")
    paths = [str(tmp_path / f"{name}.json") for name in "abc"]
    assert main(["compare", *paths]) == 0
    said = capsys.readouterr().out
    assert "unsafe prompts refused" in said and "50.0 (-50.0, p = 0.5)" in said and "100.0 (+0.0, p = 1)" in said
    assert f"2: {paths[1]}" in said and "0.250" in said
    assert main(["compare", *paths, "--html", str(tmp_path / "p.html")]) == 2


def test_init_reads_the_alignment_data_that_it_is_given(model, task_rows, tmp_path, capsys):
    task, out = write(tmp_path / "task.jsonl", task_rows), tmp_path / "run.yaml"
    words = ["init", "--model", str(model), "--task-data", str(task), "--output", str(out), "--alignment-data"]
    assert main([*words, "/nowhere"]) == 2 and "alignment_data: no such file" in capsys.readouterr().err
    bad = write(tmp_path / "keep.jsonl", [{"prompt": "One.", "category": "violence"}])
    assert main([*words, str(bad)]) == 2 and "unknown category 'violence'" in capsys.readouterr().err
    assert not out.exists()


def test_an_option_that_stands_in_a_file_twice_is_refused(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: m\nlambda_kl: 4.0\nlambda_kl: 0.1\n")
    assert main(["fit", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "'lambda_kl' stands there twice" in capsys.readouterr().err
