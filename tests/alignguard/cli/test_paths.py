"""`~` and relative paths mean one place, whoever reads them."""

import json
from pathlib import Path

import pytest

from alignguard import GuardConfig
from alignguard.cli import main
from alignguard.drift import DriftReport, DriftRow
from alignguard.files import check_output
from alignguard.loading import load_model
from alignguard.training import fit

CONFIG = GuardConfig.curvature(refresh_every=2, refresh_examples=2)


@pytest.fixture
def home(tmp_path, monkeypatch, tiny_llama, tokenizer, task_rows, alignment_rows):
    """A home folder with a model and data, and another folder that one stands in."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    tiny_llama(layers=1).save_pretrained(home / "m")
    tokenizer.save_pretrained(home / "m")
    for name, rows in (("t", task_rows), ("k", alignment_rows)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return home


def test_a_run_whose_yaml_says_home_is_wholly_there_and_resumed_there(home, capsys):
    Path("run.yaml").write_text(
        "model: ~/m\ntask_data: ~/t.jsonl\nalignment_data: ~/k.jsonl\noutput_dir: ~/x\nmax_steps: 4\nsave_every: 1\n"
        "per_device_train_batch_size: 2\npreset: curvature\nrefresh_examples: 2\n"
    )
    assert main(["fit", "--config", "run.yaml"]) == 0, capsys.readouterr().err
    assert sorted(p.name for p in (home / "x").iterdir()) == ["adapter", "checkpoints", "history.json", "run.json"]
    assert [p.name for p in Path().iterdir()] == ["run.yaml"]
    state = home / "x" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    before = state.stat().st_mtime_ns
    assert main(["fit", "--config", "run.yaml", "--resume"]) == 0
    assert state.stat().st_mtime_ns == before


def test_arguments_of_python_take_home_too(home):
    result = fit("~/m", "~/t.jsonl", "~/k.jsonl", CONFIG, "~/y", training={"max_steps": 1})
    assert result.adapter_dir == home / "y" / "adapter" and not Path("~").exists()
    load_model(Path("~/m"))
    report = DriftReport((DriftRow("1", "ordinary", "a", "b", "compliance"),))
    report.save("~/r.json")
    assert DriftReport.load("~/r.json") == report and (home / "r.json").is_file()


def test_fisher_and_driftcheck_write_where_they_are_told(home, capsys):
    words = ["fisher", "--model=~/m", "--data=~/k.jsonl", "--output=~/f.safetensors"]
    assert main(words) == 0, capsys.readouterr().err
    assert (home / "f.safetensors").is_file() and (home / "f.safetensors.json").is_file()
    words = ["driftcheck", "--model=~/m", "--limit=1", "--max-new-tokens=2", "--output=~/d.json", "--html=~/d.html"]
    assert main(words) == 0, capsys.readouterr().err
    assert (home / "d.json").is_file() and (home / "d.html").is_file()
    assert not list(Path().iterdir())


def test_a_relative_output_is_one_folder(home):
    result = fit(
        "../home/m", "../home/t.jsonl", "../home/k.jsonl", CONFIG, "out", training={"max_steps": 2}, save_every=1
    )
    assert {p.name for p in Path("out").iterdir()} == {"adapter", "checkpoints", "history.json", "run.json"}
    assert result.adapter_dir.resolve() == Path("out/adapter").resolve()


def test_the_home_of_nobody_is_named(home, capsys):
    with pytest.raises(ValueError, match="output_dir ~nobody-of-that-name"):
        check_output("~nobody-of-that-name/x")
    with pytest.raises(FileNotFoundError, match="~nobody-of-that-name"):
        load_model("~nobody-of-that-name/m")
