"""What a run cannot use is one named error before anything is written, and a run that trains nothing is refused."""

import json
import logging

import pytest
import torch
from architectures import MODELS, make
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForSequenceClassification

from alignguard import GuardConfig
from alignguard.training import fit
from alignguard.training.preparation.rehearsal import warmup_steps
from alignguard.training.settings import run_settings, training_arguments

CONFIG = GuardConfig.curvature(refresh_every=2, refresh_examples=2)
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}


@pytest.fixture
def go(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path):
    def run(training=None, **more):
        given = {"model": tiny_llama(layers=1), "tokenizer": tokenizer, **more}
        data = given.pop("task_data", task_rows), given.pop("alignment_data", alignment_rows)
        out = given.pop("output_dir", tmp_path / "out")
        return fit(
            given.pop("model"),
            *data,
            given.pop("config", CONFIG),
            out,
            training={**TRAINING, **(training or {})},
            **given,
        )

    return run


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"eval_strategy": "steps"}, "eval_dataset"),
        ({"do_eval": True}, "do_eval does not act"),
        ({"label_names": ["labels"]}, "label_names does not act"),
        ({"push_to_hub": True}, "push_to_hub does not act"),
        ({"hub_model_id": "me/mine"}, "hub_model_id does not act"),
        ({"fp16": True, "use_cpu": True}, "fp16 does not act on a processor"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end does not act"),
        ({"save_strategy": "best"}, "metric_for_best_model"),
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"optim": "schedule_free_adamw"}, "schedulefree"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"use_liger_kernel": True}, "liger"),
        ({"fsdp": True}, "fsdp"),
    ],
)
def test_settings_that_need_something_else_are_named_before_anything_is_written(go, tmp_path, training, words):
    with pytest.raises(ValueError, match=f"training: .*({words})"):
        go(training)
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_whole_batch_is_refused(go, tmp_path):
    with pytest.raises(ValueError, match=r"8 rows make no batch of 64.*dataloader_drop_last"):
        go({"dataloader_drop_last": True, "per_device_train_batch_size": 64, "max_steps": -1})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("training", [{"max_steps": 1, "warmup_steps": 10}, {"max_steps": 1, "warmup_steps": 1}])
def test_a_rate_that_never_rises_above_zero_is_refused(go, training):
    with pytest.raises(ValueError, match=r"run of 1 step the learning rate never rises.*warmup_steps"):
        go(training)


def test_by_default_the_shortest_run_moves_the_adapter(go):
    result = go({"max_steps": -1, "per_device_train_batch_size": 16})
    assert [entry["learning_rate"] for entry in result.history] == [1e-3]
    assert max(float(p.detach().abs().max()) for n, p in result.model.named_parameters() if "lora_B" in n) > 0


@given(steps=st.integers(1, 3000), share=st.floats(0, 0.999) | st.integers(1, 20))
def test_a_share_of_warm_up_is_never_the_whole_run(tmp_path_factory, steps, share):
    settings = run_settings("lora", {"warmup_steps": share}, None, False)
    arguments = training_arguments("causal", tmp_path_factory.getbasetemp(), 0, settings)
    found = warmup_steps(arguments, steps)
    if share >= 1:
        assert found == share
    else:
        assert found < steps and found in (arguments.get_warmup_steps(steps), steps - 1)


def test_weights_that_did_not_move_are_said_to_have_not(go, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        go({"learning_rate": 0.0})
    assert "learning_rate is 0" in caplog.text and "every weight is what it was" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # a rate that bfloat16 rounds away
        model = MODELS["llama"]().bfloat16()
        go({"learning_rate": 1e-12}, model=model, method="full", output_dir=tmp_path / "rounded")
    assert "every weight is what it was" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        go(output_dir=tmp_path / "moved")
    assert "every weight" not in caplog.text


@pytest.mark.parametrize("guarded", [True, False])
def test_frozen_weights_are_refused(go, tmp_path, guarded):
    make(dtype=torch.float32).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(make(dtype=torch.float32).unload(), tmp_path / "adapter")
    for model, method in ((frozen, "lora"), (make(dtype=torch.float32).unload().requires_grad_(False), "full")):
        with pytest.raises(ValueError, match=r"nothing trains.*frozen"):
            go(model=model, method=method, guarded=guarded)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pad", [None, 3])
def test_a_classifier_that_cannot_find_the_end_of_a_row_is_refused(go, tmp_path, pad):
    sizes = dict(vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=2, pad_token_id=pad))
    rows = [{"prompt": "good " * i, "label": i % 2} for i in range(1, 9)]
    with pytest.raises(ValueError, match=rf"pad_token_id={pad}.*model.config.pad_token_id = 0"):
        go(model=model, task_data=rows, alignment_data=rows)
    assert not (tmp_path / "out").exists()
    model.config.pad_token_id = 0
    assert go(model=model, task_data=rows, alignment_data=rows).step_seconds


def test_layers_that_cannot_be_captured_are_named_before_anything_is_written(go, tmp_path, tokenizer):
    config = Llama4TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, head_dim=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"model: the guarded layers cannot be captured.*experts"):
        go(model=Llama4ForCausalLM(config))
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_run_that_never_began_is_taken_again(go, tmp_path, monkeypatch):
    def stop(*arguments, **more):
        raise OSError("the machine went away")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.Trainer.train", stop)
        with pytest.raises(OSError, match="went away"):
            go()
    assert (tmp_path / "out" / "run.json").is_file()
    assert go({"learning_rate": 1e-4}).adapter_dir.is_dir()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["training"]["learning_rate"] == 1e-4
    with pytest.raises(FileExistsError, match="overwrite"):  # now there is work in it
        go()


def test_bf16_runs_on_a_cpu_as_it_is(go):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    assert go({"bf16": True}).step_seconds


def test_smoothed_labels_are_refused_where_the_trainer_does_not_know_whose_they_are(go, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"label_smoothing_factor must be a number of at least 0 and below 1, not 5.0"):
        go({"label_smoothing_factor": 5.0})
    t5 = MODELS["t5"]()
    t5.resize_token_embeddings(len(tokenizer))
    with pytest.raises(ValueError, match="label_smoothing_factor does not work on a T5ForConditionalGeneration"):
        go({"label_smoothing_factor": 0.1}, model=t5, lora={"target_modules": ["q"]})
    assert not (tmp_path / "out").exists()
    assert go({"label_smoothing_factor": 0.1, "max_steps": 1}).step_seconds


def test_an_offload_that_nothing_reads_is_refused(go, tmp_path):
    with pytest.raises(ValueError, match="offload: this LoRA has no reference weights"):
        go(offload="cpu")
    with pytest.raises(ValueError, match="offload is where the guard keeps"):
        go(offload="cpu", guarded=False, method="full")
    assert not (tmp_path / "out").exists()
    saved = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    assert go({"max_steps": 1}, offload="cpu", lora=saved).step_seconds
