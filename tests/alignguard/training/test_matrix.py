"""fit() on every architecture with every kind of adapter: penalty and gradient against the dense formula.

ΔW is what peft's own merge makes of the trained model, less the weights that the model had before fit saw it.
"""

import pytest
import torch
from architectures import EXPERTS, MODELS, TASKS, merged_weights
from dense_penalty import compare
from peft import LoraConfig, get_peft_model

from alignguard import GuardConfig
from alignguard.training import fit

CONFIG = GuardConfig.curvature(
    structure="gram", lambda_alignment=0.7, lambda_task=0.3, lambda_collision=0.2, alpha=0.4, energy=0.6,
    whole_update=False, refresh_every=2, refresh_examples=4,
)  # fmt: skip
TRAINING = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.05, "warmup_steps": 0, "use_cpu": True}
TARGETS = {"gpt2": ["c_attn", "c_proj"], "t5": ["q", "v", "wi"]}  # of the others q_proj, v_proj and up_proj
SAVED = {"gpt2": "c_fc", "t5": "wo", "mixtral": "k_proj", "classifier": "down_proj"}  # of the others down_proj
KINDS = ("lora", "rslora", "patterns", "pissa", "olora", "saved", "summed", "second")


def fields(name, kind):
    targets = TARGETS.get(name, ["q_proj", "v_proj", "up_proj"])
    made = {"r": 2, "lora_alpha": 6, "task_type": TASKS.get(name, "CAUSAL_LM"), "target_modules": targets}
    if name == "mixtral" and kind not in ("pissa", "olora"):  # peft has no such start for stacked experts
        made |= {"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS}
    return made | {
        "rslora": {"use_rslora": True},
        "patterns": {"rank_pattern": {targets[0]: 1}, "alpha_pattern": {targets[0]: 9, targets[1]: 2}},
        "pissa": {"init_lora_weights": "pissa"},
        "olora": {"init_lora_weights": "olora"},
        "saved": {"modules_to_save": [SAVED.get(name, "down_proj")]},
        # the head of a classifier would be saved with the adapter, and only one such can be active
        "summed": {"task_type": None if name == "classifier" else made["task_type"]},
    }.get(kind, {})


def adapted(name, kind, dtype):
    """A fresh model, and what fit is given of it: itself with a configuration, or itself with two adapters."""
    torch.manual_seed(0)
    model = MODELS[name]()
    model.config.pad_token_id = 0
    if name == "mixtral":
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    if kind in ("pissa", "olora") and dtype == torch.float64:  # peft makes these starts in float32
        started = get_peft_model(model, LoraConfig(**fields(name, kind))).to(dtype)
        return merged_weights(started) if (name, kind) != ("gpt2", "olora") else {}, started, None
    model = model.to(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    if kind not in ("summed", "second"):
        return before, model, LoraConfig(**fields(name, kind))
    two = get_peft_model(model, LoraConfig(**fields(name, kind)))
    two.add_adapter("other", LoraConfig(**{**fields(name, kind), "r": 3}))
    if kind == "summed":
        two.base_model.set_adapter(["default", "other"])
    else:
        two.set_adapter("other")
    return before, two.to(dtype), None


CASES = [(name, kind, torch.float64) for name in MODELS for kind in KINDS]
CASES += [(name, "lora", torch.float32) for name in MODELS] + [("llama", kind, torch.float32) for kind in KINDS[1:]]


@pytest.mark.parametrize(
    ("name", "kind", "dtype"), CASES, ids=[f"{name}-{kind}-{str(dtype)[6:]}" for name, kind, dtype in CASES]
)
def test_after_fit_penalty_and_gradient_are_the_dense_formula_on_what_was_trained(
    name, kind, dtype, tokenizer, task_rows, alignment_rows, tmp_path
):
    before, model, lora = adapted(name, kind, dtype)
    task, kept = task_rows, alignment_rows
    if name == "classifier":
        task, kept = ([{"prompt": r["prompt"], "label": i % 3} for i, r in enumerate(rows)] for rows in (task, kept))
    arguments = {"tokenizer": tokenizer, "lora": lora, "training": TRAINING}
    if (name, kind) == ("gpt2", "olora"):
        with pytest.raises(ValueError, match=r"OLoRA.*Conv1D"):
            fit(model, task, kept, CONFIG, tmp_path / "out", **arguments)
        return
    result = fit(model, task, kept, CONFIG, tmp_path / "out", **arguments)
    guard = result.guard
    assert guard.refreshes == 2 and {p.dtype for p in result.model.parameters()} == {dtype}
    active = list(result.model.active_adapters)
    assert active == {"summed": ["default", "other"], "second": ["other"]}.get(kind, ["default"])
    # neither factor is where it began, or the gradient would show half of it
    trained = [p for n, p in result.model.named_parameters() if p.requires_grad and "lora_" in n]
    assert trained and all(bool(p.any()) for p in trained)
    if kind == "saved":
        assert any(m.rank is None for m in guard.updates.matrices.values())
    compare(result.model, guard, before, CONFIG, dtype)
