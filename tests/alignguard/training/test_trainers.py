"""The guard in every trainer: accumulation, processes, precision and checkpointing do not change the update."""

import importlib
import os
import random
from dataclasses import replace

import pytest
import torch
from architectures import MODELS, RECOMPUTED, from_zero, make, move
from forked import distributed
from safetensors.torch import load_file, save_file
from transformers import Seq2SeqTrainingArguments, TrainerCallback, TrainingArguments

from alignguard.data import collator
from alignguard.guard import Guard, GuardConfig
from alignguard.loading import adapter_off
from alignguard.training import GuardMixin, GuardSeq2SeqTrainer, GuardTrainer
from alignguard.training.trainer import honours_item_count

CONFIG = GuardConfig.curvature(
    refresh_every=1, refresh_examples=2, lambda_alignment=5.0, lambda_task=0.5, lambda_collision=0.5, lambda_kl=0.5
)
REMEMBERED = GuardConfig(lambda_kl=50.0, kl_examples=2, kl_every=2, kl_memory=2, kl_tokens=None)
SETTINGS = {
    "max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 0, "use_cpu": True,
    "remove_unused_columns": False, "dataloader_pin_memory": False, "train_sampling_strategy": "sequential",
}  # fmt: skip


def rows(count, lengths, seed=0, kind="causal"):
    draw = random.Random(seed)
    made = []
    for i in range(count):
        prompt = [draw.randrange(5, 300) for _ in range(4)]
        answer = [draw.randrange(5, 300) for _ in range(lengths[i % len(lengths)])]
        if kind == "causal":
            made.append({"input_ids": prompt + answer, "labels": [-100] * 4 + answer})
        else:
            made.append({"input_ids": prompt, "labels": answer})
    return made


def weights(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters() if p.requires_grad])


def train(
    folder,
    name="llama",
    accumulate=1,
    world=1,
    lengths=(3, 6),
    guard=True,
    model=None,
    trainer=None,
    config=CONFIG,
    loss=None,
    **more,
):
    """Weights after two steps of SGD on four rows each."""
    kind = "seq2seq" if name == "t5" else "causal"
    if model is None:
        model = make(name, dtype=torch.float32)
        move(model, 0.05)
    arguments = (Seq2SeqTrainingArguments if kind == "seq2seq" else TrainingArguments)(
        output_dir=str(folder), per_device_train_batch_size=4 // accumulate // world,
        gradient_accumulation_steps=accumulate, **{**SETTINGS, **more},
    )  # fmt: skip
    kept = rows(2, (4,), seed=1, kind=kind)
    used = (trainer or (GuardSeq2SeqTrainer if kind == "seq2seq" else GuardTrainer))(
        model=model, args=arguments, train_dataset=rows(16, lengths, kind=kind), data_collator=collator(0, kind),
        guard=from_zero(model, lambda: Guard(model, kept, config)) if guard else None, compute_loss_func=loss,
    )  # fmt: skip
    used.train()
    return weights(model), used


def test_the_guard_is_told_how_long_the_run_is(tmp_path):
    _, trainer = train(tmp_path, max_steps=3, config=replace(CONFIG, refresh_every=None))
    assert trainer.guard.schedule.steps == 3 and trainer.guard.refreshes == 3


@pytest.mark.parametrize("frozen", ["lora_A", ""])
def test_what_is_frozen_stays_frozen_where_the_adapter_is_switched_off(tmp_path, frozen):
    """peft's own switch makes every weight of an adapter train, the optimizer knows nothing of some of them."""
    model = make(dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with adapter_off(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    if before:
        train(tmp_path, model=model, config=GuardConfig(kl_examples=2), max_steps=5)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == before


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_accumulation_changes_nothing(tmp_path, name):
    # T5's loss is a plain mean, which for uneven windows is another number, so its rows are of one length.
    lengths = (5,) if name == "t5" else (3, 6)
    one, trainer = train(tmp_path, name, lengths=lengths)
    plain, _ = train(tmp_path, name, lengths=lengths, guard=False)
    assert (one - plain).norm() > 1e-3, "the guard must matter here, or the test shows nothing"
    for n in (2, 4):
        other, _ = train(tmp_path, name, n, lengths=lengths)
        assert (other - one).norm() < 1e-4 * (one - plain).norm(), n
    assert trainer.model_accepts_loss_kwargs is (name != "t5")


def _squared(outputs, labels, num_items_in_batch=None):
    """A loss of one's own, over the tokens of the whole window."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
    return nats.square().sum() / num_items_in_batch


def _expected_step(task=None):
    """What a step of SGD moves the weights by for the penalty, and for a loss of the model beside it; the penalty's terms."""
    model = make(dtype=torch.float32)
    move(model, 0.05)
    guard = from_zero(model, lambda: Guard(model, rows(2, (4,), seed=1), CONFIG))
    guard.begin_run(1)
    guard.begin_step(0)
    loss = guard.penalty() + (task(model) if task else 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
    return -SETTINGS["learning_rate"] * slope, {name: float(value) for name, value in guard.terms.items()}


def _squared_task(model):
    batch = collator(0, "causal")(rows(4, (3, 6)))
    labels = batch.pop("labels")
    return _squared(model(**batch), labels, (labels != -100).sum())


def _own_loss(folder, accumulate, world=1, **more):
    """The same by a Trainer with ``compute_loss_func``."""
    start = make(dtype=torch.float32)
    move(start, 0.05)
    found, trainer = train(folder, accumulate=accumulate, world=world, loss=_squared, max_steps=1, **more)
    return found - weights(start), trainer


class _Deaf(GuardTrainer):
    """Of a model whose ``forward`` takes no number of items."""

    def __init__(self, **given):
        super().__init__(**given)
        self.model_accepts_loss_kwargs = False


@pytest.mark.parametrize(("accumulate", "kind"), [(1, GuardTrainer), (2, GuardTrainer), (4, _Deaf)])
def test_a_loss_of_ones_own_has_the_penalty_added_once_a_step(tmp_path, accumulate, kind):
    expected, terms = _expected_step(_squared_task)
    moved, trainer = _own_loss(tmp_path, accumulate, trainer=kind)
    assert (moved - expected).norm() < 1e-4 * expected.norm()
    plain, _ = _own_loss(tmp_path, accumulate, guard=False)
    assert (moved - plain).norm() > 0.1 * moved.norm(), "the guard must matter here, or the test shows nothing"
    _, usual = train(tmp_path, accumulate=accumulate, max_steps=1)
    for name, value in terms.items():
        for one in (trainer, usual):
            assert one.state.log_history[0][f"alignguard/{name}"] == pytest.approx(value, rel=1e-5), name
    assert trainer.state.log_history[0]["loss"] != pytest.approx(usual.state.log_history[0]["loss"], rel=1e-2)


def _own_loss_process(folder, accumulate):
    moved, trainer = _own_loss(folder, accumulate, world=2, ddp_backend="gloo")
    save_file({"moved": moved}, str(folder / f"moved-{trainer.args.process_index}.safetensors"))


def test_two_processes_with_a_loss_of_ones_own_take_the_step_of_one(tmp_path):
    expected, _ = _expected_step(_squared_task)
    assert distributed(_own_loss_process, 2, 29561, tmp_path, 2) == [0, 0]
    for rank in (0, 1):
        moved = load_file(tmp_path / f"moved-{rank}.safetensors")["moved"]
        assert (moved - expected).norm() < 1e-4 * expected.norm()


ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.0, "max_steps": 3}


class _Seen(TrainerCallback):
    """Whether what is remembered stood apart from the loss at each step."""

    def __init__(self):
        self.apart = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.apart.append(self.trainer.guard.kl.apart)


def test_a_trainer_attaches_its_guard_while_it_trains(tmp_path):
    seen = _Seen()

    class Watched(GuardTrainer):
        def __init__(self, **given):
            super().__init__(**given)
            seen.trainer = self
            self.add_callback(seen)

    held, trainer = train(tmp_path, trainer=Watched, config=REMEMBERED, **ADAM)
    plain, _ = train(tmp_path, guard=False, **ADAM)
    assert seen.apart == [True] * 3 and not trainer.guard.kl.apart
    assert (held - plain).norm() > 1e-3
    assert any(entry.get("alignguard/kl", 0) > 0 for entry in trainer.state.log_history)
    for n in (2, 4):
        other, _ = train(tmp_path, accumulate=n, config=REMEMBERED, **ADAM)
        assert (other - held).norm() < 1e-3 * (held - plain).norm(), n


def _remembering(folder):
    found, trainer = train(folder, world=2, config=REMEMBERED, ddp_backend="gloo", **ADAM)
    save_file({"weights": found}, str(folder / f"weights-{trainer.args.process_index}.safetensors"))


def test_an_adapter_in_bfloat16_is_moved_by_what_is_remembered(tmp_path):
    seen = []
    for strength in (REMEMBERED.lambda_kl, 1e-6):
        model = make(dtype=torch.bfloat16)
        move(model, 0.05)
        found, trainer = train(tmp_path, model=model, config=replace(REMEMBERED, lambda_kl=strength), **ADAM)
        assert trainer.guard.kl.remembers()
        seen.append(found)
    assert torch.isfinite(seen[0]).all() and (seen[0] - seen[1]).norm() > 1e-3


def test_two_processes_that_remember_take_the_steps_of_one(tmp_path):
    one, _ = train(tmp_path, config=REMEMBERED, **ADAM)
    assert distributed(_remembering, 2, 29549, tmp_path) == [0, 0]
    first, second = (load_file(tmp_path / f"weights-{rank}.safetensors")["weights"] for rank in range(2))
    assert torch.equal(first, second)
    # Sums in another order flip the last of a remembered gradient's eight bits here and there.
    assert (one - first).norm() < 5e-4 * one.norm()


def test_without_the_probe_accumulation_scales_t5_gradients(tmp_path):
    """The fault that the probe mends; should transformers mend it, the probe may go."""

    class Unprobed(GuardSeq2SeqTrainer):
        def _probe(self, *arguments):
            self._probed = True

    class First(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()

    norms = []
    for accumulate in (1, 2):

        class Watched(Unprobed):
            def __init__(self, *a, **k):
                super().__init__(*a, **k)
                self.first = First()
                self.add_callback(self.first)

        _, trainer = train(tmp_path, "t5", accumulate, lengths=(5,), guard=False, trainer=Watched, max_steps=1)
        norms.append(float(trainer.first.norm))
    assert norms[1] / norms[0] == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "heeds"), [("llama", True), ("gpt2", True), ("qwen", True), ("mixtral", True), ("t5", False)]
)
def test_the_probe_tells_who_heeds_the_item_count_and_leaves_no_trace(name, heeds):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    batch = collator(0, "seq2seq" if name == "t5" else "causal")(
        rows(2, (4,), kind="seq2seq" if name == "t5" else "causal")
    )
    state = torch.get_rng_state()
    assert honours_item_count(model, batch) is heeds
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in model.modules())


def test_activation_checkpointing_changes_nothing(tmp_path):
    one, _ = train(tmp_path)
    model = make(dtype=torch.float32)
    move(model, 0.05)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    other, _ = train(tmp_path, model=model)
    assert (one - other).norm() < 1e-6 * one.norm()


BF16 = {"llama": 2e-2, "t5": 5e-2}  # of the update: bfloat16 has 8 bits, and T5 does not scale its attention


@pytest.mark.parametrize(("name", "accumulate"), [("llama", 1), ("llama", 4), ("t5", 1), ("t5", 4)])
def test_bf16_autocast_makes_nearly_the_same_update(tmp_path, name, accumulate):
    start = make(name, dtype=torch.float32)
    move(start, 0.05)
    before, lengths = weights(start), (5,) if name == "t5" else (3, 6)
    # one step: the rank that holds the energy is a whole number, and may jump between two close estimates
    full, _ = train(tmp_path, name, lengths=lengths, max_steps=1)
    half, _ = train(tmp_path, name, accumulate, lengths=lengths, bf16=True, max_steps=1)
    assert 0 < (half - full).norm() < BF16[name] * (full - before).norm()


@pytest.mark.parametrize("budget", [None, 0.5])
def test_a_model_that_has_not_moved_is_not_charged_for_its_precision(tmp_path, budget):
    """What it said before training is read when the guard is made, and the present under accelerate's autocast."""
    torch.manual_seed(0)
    model = MODELS["llama"]()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, **{**SETTINGS, "learning_rate": 0.0, "bf16": True}
    )
    config = GuardConfig(kl_examples=1, kl_tokens=2, kl_memory=0, max_drift=budget)
    trainer = GuardTrainer(
        model=model, args=arguments, train_dataset=rows(16, (3, 6)), data_collator=collator(0, "causal"),
        guard=lambda model, _: Guard(model, rows(4, (4,), seed=1), config, method="full"),
    )  # fmt: skip
    trainer.train()
    logged = [entry["alignguard/kl"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([0.0, 0.0], abs=1e-9)
    assert trainer.guard.measured_drift() == pytest.approx(0.0, abs=1e-6)  # read in twos, which rounds otherwise


def test_every_weight_trains_under_the_full_method(tmp_path):
    torch.manual_seed(0)
    model = MODELS["llama"]()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = rows(2, (4,), seed=1)
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, **SETTINGS)
    trainer = GuardTrainer(
        model=model, args=arguments, train_dataset=rows(16, (3, 6)), data_collator=collator(0, "causal"),
        guard=Guard(model, kept, CONFIG, method="full"),
    )  # fmt: skip
    trainer.train()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[1]["alignguard/alignment"] > 0 and logged[1]["alignguard/kl"] > 0


def _process(folder, name, accumulate, checkpointing):
    model = make(name, dtype=torch.float32)
    move(model, 0.05)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lengths = (5,) if name == "t5" else (3, 6)
    found, trainer = train(folder, name, accumulate, 2, lengths, model=model, ddp_backend="gloo")
    assert trainer.args.world_size == 2 and type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    if trainer.is_world_process_zero():
        save_file({"weights": found}, str(folder / "weights.safetensors"))


@pytest.mark.parametrize(
    ("name", "accumulate", "checkpointing"),
    [("llama", 1, False), ("llama", 2, False), ("llama", 2, True), ("t5", 1, False), ("t5", 2, False)],
)
def test_two_processes_make_the_update_of_one(tmp_path, name, accumulate, checkpointing):
    one, _ = train(tmp_path, name, lengths=(5,) if name == "t5" else (3, 6))
    port = 29511 + 4 * accumulate + 2 * checkpointing + (name == "t5")
    assert distributed(_process, 2, port, tmp_path, name, accumulate, checkpointing) == [0, 0]
    two = load_file(tmp_path / "weights.safetensors")["weights"]
    # the second step is taken with eigenvectors of weights that differ in rounding, which they amplify
    assert (one - two).norm() < 1e-5 * one.norm()


# TRL, where it is installed


def _trl(tokenizer, tmp_path, accumulate, kind, guard=True, world=1, seen=None, loss=None, **more):
    """Weights after one step; into ``seen`` go the arguments of every forward pass."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    subjects = ["the sea", "bread", "a song", "rain"]
    data = [{"prompt": f"write about {s}", "completion": f" Of course! {s}"} for s in subjects]
    extra = {} if loss is None else {"compute_loss_func": loss}
    if kind in ("DPO", "ORPO"):
        data = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " no"} for r in data]
    elif kind == "KTO":
        data = [{**r, "label": place % 2 == 0} for place, r in enumerate(data)]
    elif kind == "GRPO":
        data, extra = [{"prompt": r["prompt"]} for r in data], {"reward_funcs": _lengths}
        more = {"num_generations": 2, "max_completion_length": 4, **more}
    home = importlib.import_module("trl.experimental.orpo") if kind == "ORPO" else trl
    base = getattr(home, f"{kind}Trainer")
    model = make(dtype=torch.float32)
    move(model, 0.05)
    settings = {k: v for k, v in SETTINGS.items() if k != "remove_unused_columns"}
    if kind != "GRPO":
        more = {"max_length": 64 if kind == "ORPO" else None, **more}
    arguments = getattr(home, f"{kind}Config")(
        output_dir=str(tmp_path), per_device_train_batch_size=4 // accumulate // world,
        gradient_accumulation_steps=accumulate, **RECOMPUTED,
        **{**settings, "max_steps": 1, "bf16": False, **more},
    )  # fmt: skip
    trainer = type(f"Guard{kind}Trainer", (GuardMixin, base), {})(
        model=model, args=arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
        guard=from_zero(model, lambda: Guard(model, rows(2, (4,), seed=1), CONFIG)) if guard else None, **extra,
    )  # fmt: skip
    if seen is not None:
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer.train()
    return weights(model)


def _lengths(completions, **columns):
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "GRPO", "ORPO"])
def test_the_guard_adds_the_penaltys_gradient_to_a_trl_trainers_step_and_nothing_else(
    tokenizer, tmp_path, monkeypatch, kind, accumulate
):
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    added = _trl(tokenizer, tmp_path, accumulate, kind) - _trl(tokenizer, tmp_path, accumulate, kind, guard=False)
    expected, _ = _expected_step()
    assert expected.norm() > 1e-3 and (added - expected).norm() < 1e-4 * expected.norm()


FLAT = {
    "padding-free": {"padding_free": True},
    "packed": {"packing": True, "max_length": 48},
    "packed, cut": {"packing": True, "packing_strategy": "bfd_split", "max_length": 24},
}


@pytest.mark.parametrize("form", FLAT)
def test_packed_and_padding_free_batches_leave_the_guards_own_rows_alone(tokenizer, tmp_path, monkeypatch, form):
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    seen = []
    added = _trl(tokenizer, tmp_path, 2, "SFT", seen=seen, **FLAT[form])
    added = added - _trl(tokenizer, tmp_path, 2, "SFT", guard=False, **FLAT[form])
    expected, _ = _expected_step()
    assert expected.norm() > 1e-3 and (added - expected).norm() < 1e-4 * expected.norm()
    task = [call for call in seen if "position_ids" in call]
    restarts = [int((call["position_ids"] == 0).sum()) for call in task]
    assert max(restarts) > 1 and all(len(call["input_ids"]) == 1 for call in task), "no batch was flat"
    # The guard reads its rows as they are: whole, one a line, under a mask.
    kept = [row["input_ids"] for row in rows(2, (4,), seed=1)]
    guards = [call for call in seen if "position_ids" not in call]
    assert guards and all("cu_seq_lens_q" not in call for call in guards)
    for call in guards:
        for ids, mask in zip(call["input_ids"], call["attention_mask"], strict=True):
            assert ids[mask.bool()].tolist() in kept


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_of_ones_own_under_trl_has_the_penalty_added_too(tokenizer, tmp_path, monkeypatch, accumulate):
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    added = _trl(tokenizer, tmp_path, accumulate, "SFT", loss=_squared)
    added = added - _trl(tokenizer, tmp_path, accumulate, "SFT", guard=False, loss=_squared)
    expected, _ = _expected_step()
    assert expected.norm() > 1e-3 and (added - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl_trainers_take_the_mixin_and_accumulation_changes_nothing(tokenizer, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    one = _trl(tokenizer, tmp_path, 1, kind)
    plain = _trl(tokenizer, tmp_path, 1, kind, guard=False)
    effect = (one - plain).norm()
    assert effect > 1e-3
    for n in (2, 4):
        assert (_trl(tokenizer, tmp_path, n, kind) - one).norm() < 1e-4 * effect, n


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_two_processes_under_trl_make_the_update_of_one(tokenizer, tmp_path, monkeypatch, kind, accumulate):
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    one = _trl(tokenizer, tmp_path, 1, kind)
    effect = (one - _trl(tokenizer, tmp_path, 1, kind, guard=False)).norm()

    def process():
        found = _trl(tokenizer, tmp_path, accumulate, kind, world=2, ddp_backend="gloo")
        save_file({"weights": found}, str(tmp_path / f"weights-{os.environ['RANK']}.safetensors"))

    assert distributed(process, 2, 29551 + 2 * accumulate + (kind == "DPO")) == [0, 0]
    for rank in (0, 1):
        two = load_file(tmp_path / f"weights-{rank}.safetensors")["weights"]
        assert (two - one).norm() < 1e-3 * effect


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_bf16_under_trl_makes_nearly_the_same_update(tokenizer, tmp_path, monkeypatch, kind, accumulate):
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    start = make(dtype=torch.float32)
    move(start, 0.05)
    full = _trl(tokenizer, tmp_path, 1, kind)
    half = _trl(tokenizer, tmp_path, accumulate, kind, bf16=True)
    assert 0 < (half - full).norm() < BF16["llama"] * (full - weights(start)).norm()


class _RunsOut(TrainerCallback):
    """Memory is full once, when so many steps are done."""

    def __init__(self, after):
        self.after = after

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            self.after = None
            raise RuntimeError("CUDA out of memory. Tried to allocate")


@pytest.mark.parametrize("after", [0, 1])
def test_smaller_batches_are_not_begun_with_on_weights_that_have_moved(tmp_path, after):
    model = make(dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, auto_find_batch_size=True, **SETTINGS
    )
    trainer = GuardTrainer(
        model=model, args=arguments, train_dataset=rows(16, (3, 6)), data_collator=collator(0, "causal"),
        guard=Guard(model, rows(2, (4,), seed=1), GuardConfig()), callbacks=[_RunsOut(after)],
    )  # fmt: skip
    if after:
        with pytest.raises(ValueError, match=r"auto_find_batch_size: memory ran out after 1 steps.*batch_size=3"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.state.global_step == 2
