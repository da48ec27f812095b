"""fit() end to end on a tiny model: scaling, saving, and errors before anything starts."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from alignguard import GuardConfig
from alignguard.data import collate, encode_example
from alignguard.files import claim_output, save_adapter
from alignguard.guard import Guard
from alignguard.loading import load_adapter
from alignguard.objective import divergence, evaluation_mode, supervised
from alignguard.training import GuardTrainer, fit

TRAINING = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1}
CONFIG = GuardConfig.curvature(
    refresh_every=2, refresh_examples=4, lambda_task=0.1, lambda_collision=0.1, lambda_kl=0.5
)


def train(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path, accumulate, config=CONFIG):
    """Weights after three steps of SGD with 4 rows a step, in `accumulate` micro-batches."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data.copy_(0.05 * torch.randn(p.shape, generator=generator))
    rows = [encode_example(tokenizer, r["prompt"], r["response"]) for r in task_rows]
    kept = [encode_example(tokenizer, r["prompt"], r["response"]) for r in alignment_rows]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "t"), max_steps=3, per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
        max_grad_norm=0.0, logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="no", seed=0,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = GuardTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=lambda b: collate(b, 0),
        guard=Guard(model, kept, config),
    )  # fmt: skip
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return weights, trainer


def test_one_guarded_step_equals_a_loop_by_hand(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path):
    rows = [{"prompt": "write", "response": "Here it is."}] * 4
    config = GuardConfig.curvature(refresh_every=1, refresh_examples=4, lambda_task=0.2, lambda_kl=0.3)
    ours, _ = train(tiny_llama, tokenizer, rows, alignment_rows, tmp_path, 1, config=config)

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.data.copy_(0.05 * torch.randn(p.shape, generator=generator))
    model.train()
    kept = [encode_example(tokenizer, r["prompt"], r["response"]) for r in alignment_rows]
    guard = Guard(model, kept, config)
    batch = collate([encode_example(tokenizer, r["prompt"], r["response"]) for r in rows], 0)
    for step in range(3):
        guard.begin_step(step)
        (model(**batch).loss + guard.penalty()).backward()
        with torch.no_grad():
            for p in parameters:
                p -= 0.1 * p.grad
                p.grad = None
    torch.testing.assert_close(ours, torch.cat([p.detach().flatten() for p in parameters]), rtol=1e-4, atol=1e-6)


def test_terms_are_logged_and_evaluation_is_untouched(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path):
    _, trainer = train(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path, 2)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for name in ("alignment", "task", "overlap", "separation", "kl", "cosine"):
        assert all(f"alignguard/{name}" in entry for entry in logged), name
    rows = [encode_example(tokenizer, r["prompt"], r["response"]) for r in task_rows]
    guarded_loss = trainer.evaluate(rows)["eval_loss"]
    trainer.guard = None
    assert trainer.evaluate(rows)["eval_loss"] == guarded_loss
    assert len(trainer.step_seconds) == 3 and min(trainer.step_seconds) > 0


def test_fit_writes_an_adapter_that_peft_loads_alone(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = fit(
        tmp_path / "model", task_rows, alignment_rows, CONFIG, tmp_path / "out", training=TRAINING, lora={"r": 2}
    )
    batch = collate([encode_example(tokenizer, r["prompt"], r["response"]) for r in task_rows], 0)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out" / "adapter"
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, result.model(**batch).logits)
    saved = json.loads((tmp_path / "out" / "adapter" / "alignguard_config.json").read_text())
    assert GuardConfig.from_dict(saved) == CONFIG
    assert len(json.loads((tmp_path / "out" / "history.json").read_text())) == 3
    assert not list(tmp_path.glob("out/.*")), "no temporary file stays"


def test_going_on_from_an_adapter_holds_what_that_adapter_taught(
    tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path
):
    first = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in first.named_parameters():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    first.save_pretrained(tmp_path / "first")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first", is_trainable=True)
    batch = collate([encode_example(tokenizer, r["prompt"], r["response"]) for r in alignment_rows], 0)

    def said(model):
        with evaluation_mode(model):
            return supervised(model, batch)[0]

    start = said(again)
    with again.disable_adapter():
        taught = float(divergence(start, said(again)).mean())
    assert taught > 0.01, "or going back to the base would not show"
    strong = GuardConfig(lambda_kl=1000.0, kl_climb=None, kl_tokens=None)
    result = fit(
        again, task_rows, alignment_rows, strong, tmp_path / "out", tokenizer=tokenizer,
        training={**TRAINING, "max_steps": 25, "learning_rate": 2e-3, "warmup_steps": 0},
    )  # fmt: skip
    assert 0 < float(divergence(start, said(result.model)).mean()) < 0.02 * taught
    assert "Drift" in (card := (result.adapter_dir / "README.md").read_text()) and "0 before" in card


def test_a_continued_run_resumed_is_bit_by_bit_the_run_without_a_stop(
    tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path
):
    first = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    first.save_pretrained(tmp_path / "first")

    def run(folder, steps, **more):
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first", is_trainable=True)
        # as many steps in the schedule, whenever it stops
        training = {
            **TRAINING,
            "max_steps": steps,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "learning_rate": 1e-2,
        }
        return fit(
            model, task_rows, alignment_rows, GuardConfig(kl_every=1, lambda_kl=50.0), tmp_path / folder,
            tokenizer=tokenizer, training=training, save_every=2, **more,
        )  # fmt: skip

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, resume=True)
    ours, theirs = ({n: p for n, p in r.model.named_parameters() if p.requires_grad} for r in (whole, parts))
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert whole.guard.measured_drift() == parts.guard.measured_drift() > 0


@pytest.mark.parametrize("guarded", [True, False])
def test_a_model_object_that_an_earlier_run_has_put_its_adapter_on_is_refused(
    tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path, guarded
):
    model = tiny_llama()
    go = lambda name, **more: fit(
        more.pop("model", model), task_rows, alignment_rows, output_dir=tmp_path / name, tokenizer=tokenizer,
        training=TRAINING, guarded=guarded, **more,
    )  # fmt: skip
    done = go("first")
    for more in ({"lora": {"target_modules": ["q_proj"]}}, {"method": "full"}):
        with pytest.raises(ValueError, match=r"model: .*carries layers of an adapter already.*load it anew.*unload"):
            go("second", **more)
    assert not (tmp_path / "second").exists()
    alone = go("alone", model=tiny_llama(), lora={"target_modules": ["q_proj"]})
    freed = go("freed", model=done.model.unload(), lora={"target_modules": ["q_proj"]})
    ours, theirs = (r.model.state_dict() for r in (alone, freed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_refused_run_leaves_the_model_as_it_was_given(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path):
    model = tiny_llama()
    go = lambda **more: fit(
        model, task_rows, alignment_rows, output_dir=tmp_path / "out", tokenizer=tokenizer, training=TRAINING, **more
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="Dora"):
        go(lora={"use_dora": True})
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    model.lm_head.weight.requires_grad_(False)
    trains = [p.requires_grad for p in model.parameters()]
    for wrong in (
        {"lora": {"use_dora": True}},
        {"lora": {"target_modules": ["nope"]}},
        {"lora": {"modules_to_save": ["norm"], "use_dora": True}},
        {"lora": {"init_lora_weights": "eva"}},
        {"lora": {"target_modules": "q_proj"}},
    ):
        with pytest.raises(ValueError, match=r"use_dora=False|nope|initialize_lora_eva_weights|so give a list"):
            go(**wrong)
        assert [p.requires_grad for p in model.parameters()] == trains and True in trains
    assert go(lora={"r": 2}).step_seconds


@pytest.mark.parametrize("kind", ["named", "second", "summed"])
def test_an_adapter_of_any_name_is_found_where_the_result_says(
    kind, tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path
):
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(tiny_llama(), config, adapter_name="mine" if kind == "named" else "default")
    if kind != "named":
        model.add_adapter("mine", LoraConfig(r=3, target_modules=["q_proj"]))
        model.base_model.set_adapter(["mine"] if kind == "second" else ["default", "mine"])
    result = fit(
        model, task_rows, alignment_rows, CONFIG, tmp_path / "out", tokenizer=tokenizer,
        training={**TRAINING, "learning_rate": 0.05, "warmup_steps": 0},
    )  # fmt: skip
    batch = collate([encode_example(tokenizer, r["prompt"], r["response"]) for r in task_rows], 0)
    if kind == "summed":  # one alone would be another model
        with pytest.raises(ValueError, match="adapter_config"):
            PeftModel.from_pretrained(tiny_llama(), result.adapter_dir)
        loaded = PeftModel.from_pretrained(tiny_llama(), result.adapter_dir / "default")
        loaded.load_adapter(result.adapter_dir / "mine", "mine")
        loaded.base_model.set_adapter(["default", "mine"])
    else:
        loaded = load_adapter(tiny_llama(), result.adapter_dir)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, result.model(**batch).logits)


def test_the_plain_run_starts_from_the_same_adapter_and_sees_the_same_data(
    tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path
):
    off = GuardConfig.curvature(lambda_alignment=1e-30, refresh_examples=2)
    runs = [
        fit(tiny_llama(), task_rows, alignment_rows, off, tmp_path / name, tokenizer=tokenizer, training=TRAINING, guarded=guarded)
        for name, guarded in (("plain", False), ("guarded", True))
    ]  # fmt: skip
    plain, guarded = ({n: p for n, p in r.model.named_parameters() if p.requires_grad} for r in runs)
    assert all(torch.equal(plain[n], guarded[n]) for n in plain)


def test_an_output_folder_that_holds_something_is_never_touched(
    tmp_path, tiny_llama, tokenizer, task_rows, alignment_rows
):
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="overwrite"):
        fit(tiny_llama(), task_rows, alignment_rows, output_dir=tmp_path, tokenizer=tokenizer, training=TRAINING)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]
    assert claim_output(tmp_path, overwrite=True) == tmp_path
    with pytest.raises(NotADirectoryError, match="file"):
        claim_output(tmp_path / "precious.txt")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"task_data": []}, ValueError, "task_data is empty"),
        ({"alignment_data": []}, ValueError, "alignment_data is empty"),
        ({"alignment_data": None}, ValueError, "alignment_data: the model refuses none of 192"),
        ({"task_data": [{"prompt": "a"}]}, ValueError, "task_data.*row 1.*response"),
        ({"task_data": "nowhere.jsonl"}, FileNotFoundError, "nowhere.jsonl"),
        ({"model": "./nowhere"}, FileNotFoundError, "nowhere"),
        ({"tokenizer": None}, ValueError, "tokenizer"),
        ({"lora": {"target_modules": ["z_proj"]}}, ValueError, "z_proj.*q_proj"),
        ({"training": {"learning_rat": 1}}, ValueError, "learning_rat"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(
    change, error, words, tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path
):
    arguments = {"model": tiny_llama(), "task_data": task_rows, "alignment_data": alignment_rows, "tokenizer": tokenizer, "training": TRAINING}  # fmt: skip
    with pytest.raises(error, match=words):
        fit(**{**arguments, **change}, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_adapter_is_refused(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        fit(model, task_rows, alignment_rows, output_dir=tmp_path / "out", tokenizer=tokenizer, training=TRAINING)


def test_nan_in_the_loss_stops_the_run_and_names_the_step(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path):
    model = tiny_llama()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 1"):
        fit(model, task_rows, None, output_dir=tmp_path / "out", tokenizer=tokenizer, training=TRAINING, guarded=False)
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_full_disk_at_save_is_one_clear_error_and_leaves_nothing_half_written(tiny_llama, tmp_path, monkeypatch):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    target = save_adapter(model, tmp_path / "adapter")
    before = sorted(p.name for p in target.iterdir())

    def full(self, path, **kwargs):
        Path(path).mkdir()
        (Path(path) / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    with pytest.raises(OSError, match=r"adapter.*no space"):
        save_adapter(model, target)
    assert sorted(p.name for p in target.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
