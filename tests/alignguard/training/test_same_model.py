"""A guard on another model than the trainer's would charge nothing to the end, and is refused in every guise."""

import copy

import pytest
import torch
from architectures import make, move
from peft import LoraConfig, PeftModel, get_peft_model
from test_trainers import CONFIG, SETTINGS, rows
from transformers import TrainingArguments

from alignguard.data import collator
from alignguard.guard import Guard
from alignguard.training import GuardTrainer

OTHER = "made on another model than the trainer trains"


def trainer(folder, guard, **model):
    arguments = TrainingArguments(output_dir=str(folder), **SETTINGS)
    return GuardTrainer(
        **model, args=arguments, train_dataset=rows(8, (3,)), data_collator=collator(0, "causal"), guard=guard
    )


def guard_on(model, **more):
    return Guard(model, rows(2, (4,), seed=1), CONFIG, **more)


def another_of_one_base(model):
    """A second PeftModel, with adapters of its own, around weights that are equal and not the same."""
    base = copy.deepcopy(model).unload()
    return get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("guise", [copy.deepcopy, another_of_one_base, lambda model: make(dtype=torch.float32)])
def test_a_guard_on_another_model_is_refused(tmp_path, guise):
    model = make(dtype=torch.float32)
    with pytest.raises(ValueError, match=OTHER):
        trainer(tmp_path, guard_on(model), model=guise(model))


def test_a_model_init_that_makes_a_new_model_is_refused_before_a_step(tmp_path):
    model = make(dtype=torch.float32)
    given = [model]
    used = trainer(tmp_path, guard_on(model), model_init=lambda: given.pop() if given else make(dtype=torch.float32))
    with pytest.raises(ValueError, match=OTHER):
        used.train()
    assert used.state.global_step == 0 and not used.step_seconds


def test_a_model_init_that_returns_the_guarded_model_is_trained(tmp_path):
    model = make(dtype=torch.float32)
    move(model, 0.05)
    used = trainer(tmp_path, guard_on(model), model_init=lambda: model)
    used.train()
    assert used.guard.predicted_drift() > 0


def test_one_model_in_another_wrapper_is_the_same_model(tmp_path):
    model = make(dtype=torch.float32)
    trainer(tmp_path, guard_on(model), model=model.base_model.model)


def test_a_guard_that_is_put_on_a_trainer_later_is_held_against_it_too(tmp_path):
    model = make(dtype=torch.float32)
    used = trainer(tmp_path, None, model=model)
    used.guard = guard_on(make(dtype=torch.float32))
    with pytest.raises(ValueError, match=OTHER):
        used.train()


def test_full_training_of_a_copy_is_refused(tmp_path):
    model = make(dtype=torch.float32).unload().requires_grad_(True)
    guard = guard_on(model, method="full")
    trainer(tmp_path, guard, model=model)
    with pytest.raises(ValueError, match=OTHER):
        trainer(tmp_path, guard, model=copy.deepcopy(model))


def test_a_frozen_adapter_is_refused(tmp_path):
    make(dtype=torch.float32).save_pretrained(tmp_path / "adapter")
    base = make(dtype=torch.float32).unload()
    frozen = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"frozen.*is_trainable"):
        trainer(tmp_path, guard_on(frozen), model=frozen)
