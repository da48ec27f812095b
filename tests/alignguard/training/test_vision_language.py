"""A vision-language model trained on images and guarded on text: its language model is charged, and nothing else is."""

import random

import pytest
import torch
from architectures import SIZES, from_zero, move
from peft import LoraConfig, get_peft_model
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    TrainingArguments,
)
from transformers.models.mllama.configuration_mllama import MllamaConfig, MllamaTextConfig, MllamaVisionConfig

from alignguard.guard import Guard, GuardConfig
from alignguard.training import GuardTrainer

IMAGE, START = 319, 318  # tokens
EVERYTHING = GuardConfig.curvature(
    refresh_every=1, refresh_examples=2, lambda_alignment=5.0, lambda_task=0.5, lambda_collision=0.5, lambda_kl=0.5
)
LAYERS = "(q|k|v|o|gate|up|down)_proj"
SETTINGS = {
    "max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True,
    "remove_unused_columns": False, "dataloader_pin_memory": False, "train_sampling_strategy": "sequential",
}  # fmt: skip


def _llava():
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=8,
    )  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=IMAGE, image_seq_length=4)
    )


def _qwen():
    vision = {"depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    text = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_start_token_id=START)
    )


MODELS = {"llava": _llava, "qwen2-vl": _qwen}


def make(name="llava", targets=rf".*language_model.*\.{LAYERS}", moved=0.05, **more):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", target_modules=targets, **more)
    model = get_peft_model(MODELS[name](), config).eval()
    move(model, moved)
    return model


def text_rows(count=4, seed=0):
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        ids = [draw.randrange(5, 300) for _ in range(6 + i % 2)]
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


def image_rows(name, count=4):
    """An image, a question and its answer; all of one length."""
    draw, generator = random.Random(1), torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        words = [draw.randrange(5, 300) for _ in range(5)]
        ids = [START, *[IMAGE] * 4, *words]
        row = {"input_ids": torch.tensor(ids), "labels": torch.tensor([-100] * 7 + words[2:])}
        if name == "llava":
            row["pixel_values"] = torch.randn(3, 8, 8, generator=generator)
        else:
            # 4 × 4 patches of two frames, which the model merges two by two
            row["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
            row["image_grid_thw"] = torch.tensor([1, 4, 4])
            row["mm_token_type_ids"] = (row["input_ids"] == IMAGE).int()
        rows.append(row)
    return rows


def collate(rows):
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    if "image_grid_thw" in batch:
        batch["pixel_values"] = batch["pixel_values"].flatten(0, 1)
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def trained(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def train(folder, name, model, config, **more):
    arguments = TrainingArguments(output_dir=str(folder), per_device_train_batch_size=4, **{**SETTINGS, **more})
    trainer = GuardTrainer(
        model=model, args=arguments, train_dataset=image_rows(name), data_collator=collate,
        guard=config and from_zero(model, lambda: Guard(model, text_rows(), config)),
    )  # fmt: skip
    trainer.train()
    return trainer


def read_first(model, method="lora"):
    """A guard at its first step."""
    guard = from_zero(model, lambda: Guard(model, text_rows(), EVERYTHING, method=method))
    guard.begin_run(1)
    guard.begin_step(0)
    return guard


@pytest.mark.parametrize("targets", [rf".*language_model.*\.{LAYERS}", "all-linear"])
def test_the_guard_of_a_vision_language_model_is_its_language_models(targets):
    model = make(targets=targets)
    twin = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**SIZES)), LoraConfig(r=2, lora_alpha=6, target_modules=rf".*\.{LAYERS}")
    ).eval()
    ours = {name.replace("model.language_model.", "model."): value for name, value in model.state_dict().items()}
    twin.load_state_dict({name: ours[name] for name in twin.state_dict()})
    found, expected = read_first(model), read_first(twin)
    assert found.penalty().item() == pytest.approx(expected.penalty().item(), rel=1e-5)
    assert found.terms.keys() == expected.terms.keys() and found.terms["kl"] > 1e-6
    for name, value in expected.terms.items():
        assert float(found.terms[name]) == pytest.approx(float(value), rel=1e-5), name
    assert found.predicted_drift() == pytest.approx(expected.predicted_drift(), rel=1e-5)
    names = [matrix.plain for matrix in found.updates.matrices.values()]
    assert [name.replace("language_model.", "") for name in names] == [
        matrix.plain for matrix in expected.updates.matrices.values()
    ]
    outside = [line for line in found.coverage() if not line.guarded]
    if targets == "all-linear":
        assert {line.name.split(".")[1] for line in outside} == {"vision_tower", "multi_modal_projector"}
        assert all("do not pass through" in line.how for line in outside)
    else:
        assert not outside


@pytest.mark.parametrize("targets", [rf".*language_model.*\.{LAYERS}", "all-linear"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_on_images_has_the_penaltys_gradient_added_and_nothing_else(tmp_path, name, targets):
    held, free = make(name, targets), make(name, targets)
    logged = train(tmp_path, name, held, EVERYTHING).state.log_history[0]
    train(tmp_path, name, free, None)
    start = make(name, targets)
    guard = read_first(start)
    leaves = [p for p in start.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(guard.penalty(), leaves, allow_unused=True, materialize_grads=True)
    expected = -SETTINGS["learning_rate"] * torch.cat([slope.flatten() for slope in slopes])
    assert (trained(free) - trained(start)).norm() > 1e-4, "the task must train, or the test shows nothing"
    assert expected.norm() > 1e-3 and (trained(held) - trained(free) - expected).norm() < 1e-4 * expected.norm()
    for term, value in guard.terms.items():
        assert logged[f"alignguard/{term}"] == pytest.approx(float(value), rel=1e-5), term


@pytest.mark.parametrize("name", MODELS)
def test_the_default_guard_holds_text_while_images_train(tmp_path, name):
    held, free = make(name, "all-linear", 0.0), make(name, "all-linear", 0.0)
    for model in (held, free):
        model.get_base_model().lm_head.weight.data *= 20  # or it would say next to nothing, and have nothing to keep
    more = {"max_steps": 12, "optim": "adamw_torch", "learning_rate": 0.02}
    config = GuardConfig(lambda_kl=50.0)
    trainer = train(tmp_path, name, held, config, **more)
    train(tmp_path, name, free, None, **more)
    logged = [entry["alignguard/kl"] for entry in trainer.state.log_history if "alignguard/kl" in entry]
    assert len(logged) == 11 and min(logged) > 0  # nothing has moved at the first step
    guards = [from_zero(model, lambda model=model: Guard(model, text_rows(), config)) for model in (held, free)]
    drifts = [guard.measured_drift() for guard in guards]
    assert 0 < drifts[0] < 0.5 * drifts[1]
    # What sees the image trains on beside it: B begins at zero.
    assert any(p.any() for n, p in held.named_parameters() if "lora_B" in n and "language_model" not in n)


def test_trained_whole_its_language_model_alone_is_guarded():
    model = make().unload()
    model.requires_grad_(True)
    guard = read_first(model, "full")
    assert {matrix.split(".")[1] for matrix in guard.updates.matrices} == {"language_model"}
    saved = make(modules_to_save=["multi_modal_projector"])
    assert len(Guard(saved, text_rows(), EVERYTHING).updates.matrices) == 7


def test_layers_of_cross_attention_are_left_out():
    text = MllamaTextConfig(**{**SIZES, "num_hidden_layers": 2}, cross_attention_layers=[1])
    vision = MllamaVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_global_layers=1, attention_heads=2, image_size=8,
        patch_size=4, vision_output_dim=32, intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1]],
        max_num_tiles=1,
    )  # fmt: skip
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
    model = get_peft_model(MllamaForConditionalGeneration(config), lora).eval()
    move(model, 0.05)
    guard = read_first(model)
    assert guard.penalty() > 0 and guard.terms["kl"] > 0
    assert len(guard.updates.matrices) == 7 and all(".layers.0." in name for name in guard.updates.matrices)


def test_what_cannot_be_guarded_is_named():
    with pytest.raises(ValueError, match=r"nothing to guard.*vision_tower.*do not pass through"):
        Guard(make(targets=r".*vision_tower.*\.(q|v)_proj"), text_rows(), GuardConfig())
    rows = [*text_rows(2), {"input_ids": [5, IMAGE, 7], "labels": [-100, -100, 7]}]
    with pytest.raises(ValueError, match=f"alignment example 2 holds token {IMAGE}, the place of an image"):
        Guard(make(), rows, GuardConfig())
