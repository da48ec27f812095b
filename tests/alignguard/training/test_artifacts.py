"""Fisher files and model cards say what they are of; the command line writes them and refuses what does not fit."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from malformed import digest

import alignguard.training
import fishergeo as fg
from alignguard import GuardConfig, cli
from alignguard.training import fit, origin_path, write_fisher
from alignguard.training.fisher_file import load_fisher

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True}


@pytest.fixture
def folder(tmp_path, tiny_llama, tokenizer, task_rows, alignment_rows):
    tiny_llama(layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, rows in (("task", task_rows), ("alignment", alignment_rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_a_fisher_file_serves_the_model_it_came_from_and_no_other(folder, capsys):
    path = folder / "f.safetensors"
    arguments = ["fisher", "--model", str(folder / "model"), "--data", str(folder / "alignment.jsonl"), "--output", str(path)]  # fmt: skip
    assert cli.main(arguments) == 0
    origin = json.loads(origin_path(path).read_text())
    assert origin["model"] == str(folder / "model") and origin["examples"] == 4 and len(origin["data_sha256"]) == 64
    assert cli.main(arguments) == 2
    assert "exists" in capsys.readouterr().err
    run = ["fit", "--model", str(folder / "model"), "--task-data", str(folder / "task.jsonl"), "--alignment-data",
           str(folder / "alignment.jsonl"), "--output-dir", str(folder / "out"), "--max-steps", "1", "--rank", "2", "--preset", "curvature"]  # fmt: skip
    assert cli.main([*run, "--fisher", str(path)]) == 0
    assert cli.main([*run, "--fisher", str(path), "--structure", "gram", "--overwrite"]) == 2
    assert "structure" in capsys.readouterr().err
    assert cli.main([*run, "--fisher", str(folder / "gone"), "--overwrite"]) == 2


def test_a_fisher_file_tells_of_cut_rows_and_refuses_another_models_tokens(
    tmp_path, tiny_llama, tokenizer, alignment_rows, caplog
):
    model, config = tiny_llama(layers=1), GuardConfig.curvature(structure="gram", max_length=8)
    write_fisher(tmp_path / "f", model, tokenizer, alignment_rows, config, name="x")
    assert f"data: {len(alignment_rows)} of {len(alignment_rows)} rows are longer than 8 tokens and cut" in caplog.text
    model.resize_token_embeddings(4)
    with pytest.raises(ValueError, match=r"^data, row 1: token \d+ is beyond the model's vocabulary of 4"):
        write_fisher(tmp_path / "g", model, tokenizer, alignment_rows, config, name="x")
    assert not (tmp_path / "g").exists()


def test_a_fisher_of_other_weights_or_layers_is_refused(tmp_path, tiny_llama, tokenizer, alignment_rows):
    model, config = tiny_llama(layers=1), GuardConfig.curvature(structure="gram")
    write_fisher(tmp_path / "f", model, tokenizer, alignment_rows, config, name="x")
    assert isinstance(load_fisher(tmp_path / "f", model, config), fg.Fisher)
    with pytest.raises(ValueError, match="another model"):
        load_fisher(tmp_path / "f", tiny_llama(layers=1, seed=1), config)
    write_fisher(tmp_path / "g", tiny_llama(layers=2), tokenizer, alignment_rows, config, name="x")
    with pytest.raises(ValueError, match=r"another model.*layers\.1"):
        load_fisher(tmp_path / "g", model, config)
    (tmp_path / "h").write_bytes((tmp_path / "f").read_bytes()[:100])
    with pytest.raises(ValueError, match="h: not a readable"):
        load_fisher(tmp_path / "h", model, config)


def test_a_run_is_not_resumed_with_another_fisher_or_none(tmp_path, tiny_llama, tokenizer, alignment_rows):
    config = GuardConfig.curvature(structure="gram")
    for name, rows in (("f", alignment_rows), ("g", alignment_rows[:1])):
        write_fisher(tmp_path / name, tiny_llama(layers=1), tokenizer, rows, config, name="x")

    def run(fisher):
        fit(
            tiny_llama(layers=1), alignment_rows, alignment_rows, config, tmp_path / "run", tokenizer=tokenizer, fisher=fisher,
            training={"max_steps": 1, "use_cpu": True}, save_every=1, resume=True,
        )  # fmt: skip

    run(tmp_path / "f")
    for other in (tmp_path / "g", None):
        with pytest.raises(ValueError, match=r"resume: .* holds a run with other settings: fisher"):
            run(other)
    run(tmp_path / "f")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": "mean"}, "reduction='mean', the guard asks for reduction='sum'"),
        ({"kind": "mc"}, "kind='mc', .* or give kind='mc'"),
        ({"decay": 0.5}, "decay=0.5"),
        ({"unit": "token"}, "unit='token'"),
        ({"example_weights": lambda batch: torch.ones(len(batch["labels"]))}, "weighted=True"),
    ],
)
def test_a_fisher_of_another_making_than_the_guards_is_refused(tmp_path, tiny_llama, options, words):
    model, config = tiny_llama(layers=1), GuardConfig.curvature(structure="gram")
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])}
    fg.estimate_fisher(model, [batch], structure="gram", **{"reduction": "sum", **options}).save(tmp_path / "f")
    with pytest.raises(ValueError, match=rf"fisher: .* was estimated with {words}"):
        load_fisher(tmp_path / "f", model, config)


def test_the_model_card_tells_data_strengths_drift_and_versions(folder, task_rows, alignment_rows):
    for name, config, words in (
        ("a", GuardConfig.curvature(), "λ_A = 1"), ("b", GuardConfig.curvature(max_drift=0.5, held_back=1), "Drift budget: 0.5 nats"),
    ):  # fmt: skip
        fit(folder / "model", task_rows, alignment_rows, config, folder / name, training=TRAINING, lora={"r": 2})
        card = (folder / name / "adapter" / "README.md").read_text()
        assert "base_model" in card, "peft's own card stays"
        for part in (words, "8 rows (sha256", "4 rows (sha256", "Drift from the start", "fishergeo 0.1.0", "peft "):
            assert part in card, part
    fit(folder / "model", task_rows, None, None, folder / "c", training=TRAINING, lora={"r": 2}, guarded=False)
    assert "without a guard" in (folder / "c" / "adapter" / "README.md").read_text()


def test_a_dry_run_prints_the_plan_and_touches_nothing(folder, capsys):
    options = {
        "model": str(folder / "model"), "task_data": str(folder / "task.jsonl"), "max_steps": 4, "rank": 2,
        "alignment_data": str(folder / "alignment.jsonl"), "output_dir": str(folder / "out"),
        "preset": "curvature", "exclude": ["*.k_proj"], "scale_free": True, "lambda_task": 0.01, "refresh_every": 2,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    (folder / "out").mkdir()
    (folder / "out" / "precious.txt").write_text("keep me")
    before, here = digest(folder), sorted(Path.cwd().iterdir())
    for flags in ([], ["--save-every", "1"], ["--overwrite"], ["--resume"]):
        assert cli.main(["fit", "--config", str(folder / "run.yaml"), "--dry-run", *flags]) == 0
    shown = capsys.readouterr().out
    for part in (
        "4 steps",
        "time: about",
        "curvature",
        "% more examples",
        "model.layers.0.self_attn.q_proj",
        "NOT GUARDED: excluded",
        "6 matrices",
    ):
        assert part in shown, part
    assert digest(folder) == before and sorted(Path.cwd().iterdir()) == here


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scale_free: yes please\n", "true or false"), ("exclude: '*.k_proj'\n", "list"), ("max_steps: 1.5\n", "whole number"),
        ("rank: true\n", "rank"), ("method: partial\n", "one of"), ("max_drift: [1]\n", "max_drift"),
        ("max_drift: -1\n", "max_drift"), ("learning_rate: .inf\nmax_steps: .inf\n", "max_steps"), ("\xff: 1\n", "unknown"),
    ],
)  # fmt: skip
def test_bad_values_in_yaml_are_named(folder, text, words, capsys):
    (folder / "bad.yaml").write_text(text)
    more = ["--model", "m", "--task-data", "t", "--alignment-data", "a"]
    assert cli.main(["fit", "--config", str(folder / "bad.yaml"), *more]) == 2
    assert words in capsys.readouterr().err


def test_a_run_that_fails_is_told_from_bad_input(folder, capsys, monkeypatch):
    module = alignguard.training

    def diverge(*arguments, **options):
        raise FloatingPointError("the training loss is nan at step 1")

    monkeypatch.setattr(module, "fit", diverge)
    more = ["--model", "m", "--task-data", "t", "--alignment-data", "a"]
    assert cli.main(["fit", *more]) == 1
    assert "nan at step 1" in capsys.readouterr().err
    monkeypatch.setattr(module, "fit", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert cli.main(["fit", *more]) == 130


@pytest.mark.parametrize("name", ["t5", "classifier", "mixtral-dense"])
def test_fit_takes_other_kinds_of_models(name, tmp_path, tokenizer, task_rows, alignment_rows):
    from architectures import MODELS

    torch.manual_seed(0)
    if name == "mixtral-dense":
        model, lora = MODELS["mixtral"](), {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    else:
        model, lora = MODELS[name](), {"r": 2}
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = 0
    task, kept = task_rows, alignment_rows
    if name == "classifier":
        task, kept = ([{"prompt": r["prompt"], "label": i % 3} for i, r in enumerate(rows)] for rows in (task, kept))
    config = GuardConfig.curvature(refresh_every=1, refresh_examples=2, lambda_kl=0.5, lambda_task=0.1)
    result = fit(model, task, kept, config, tmp_path / "out", tokenizer=tokenizer, training=TRAINING, lora=lora)
    assert len(result.history) == 2 and result.guard.examples_read >= 6
    assert all(p.is_floating_point() and bool(torch.isfinite(p).all()) for p in result.model.parameters())
    if name == "classifier":
        with pytest.raises(ValueError, match=r"label.*class number"):
            fit(model, [{"prompt": "x", "label": "two"}], kept, config, tmp_path / "b", tokenizer=tokenizer)
