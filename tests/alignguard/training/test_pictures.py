"""Images reach every reporter that a Trainer has, by the calls that its tool takes; TensorBoard's are read back where it is."""

import types

import numpy as np
import pytest
import torch
from alignment_rows import rows
from architectures import from_zero, make, move
from transformers import TrainerCallback, TrainingArguments

from alignguard.data import collator
from alignguard.guard import Guard, GuardConfig
from alignguard.training import DriftCallback, GuardTrainer, PictureCallback

CONFIG = GuardConfig.curvature(refresh_every=1, refresh_examples=2, lambda_kl=0.5)
SETTINGS = {
    "max_steps": 2, "learning_rate": 0.01, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
    "save_strategy": "no", "use_cpu": True, "remove_unused_columns": False, "dataloader_pin_memory": False,
}  # fmt: skip


class Tool:
    """What wandb, trackio and MLflow have in common, as far as pictures go."""

    def __init__(self):
        self.got = []

    def Image(self, pixels):
        return pixels

    def log(self, entries):
        (name, pixels), (_, step) = entries.items()
        self.got.append((name, step, pixels))

    def log_image(self, pixels, path):
        name, _, step = path.removesuffix(".png").rpartition("/")
        self.got.append((name, int(step), pixels))

    def add_image(self, name, pixels, step, dataformats):
        assert dataformats == "HWC"
        self.got.append((name, step, pixels))


def train(folder, reporters=(), **more):
    model = make(dtype=torch.float32)
    move(model, 0.05)
    arguments = TrainingArguments(output_dir=str(folder), per_device_train_batch_size=4, **{**SETTINGS, **more})
    trainer = GuardTrainer(
        model=model, args=arguments, train_dataset=rows(16), data_collator=collator(0, "causal"),
        guard=from_zero(model, lambda: Guard(model, rows(2, seed=1), CONFIG)), callbacks=list(reporters),
    )  # fmt: skip
    trainer.add_callback(PictureCallback(trainer, every=2))
    trainer.train()
    return trainer


def test_every_reporter_gets_the_spectra(tmp_path):
    tools, reporters = {}, []
    for name, attribute in (
        ("WandbCallback", "_wandb"), ("TrackioCallback", "_trackio"), ("MLflowCallback", "_ml_flow"),
        ("TensorBoardCallback", "tb_writer"),
    ):  # fmt: skip
        callback = type(name, (TrainerCallback,), {})()
        tools[name] = Tool()
        setattr(callback, attribute, tools[name])
        reporters.append(callback)
    train(tmp_path, reporters)
    for name, tool in tools.items():
        ((tag, step, pixels),) = tool.got
        assert (tag, step) == ("alignguard/spectra", 2), name
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.std() > 5, "an empty page shows nothing"


def test_a_drift_callbacks_course_is_drawn_too(tmp_path):
    watch = DriftCallback([{"id": "1", "prompt": "x", "category": "unsafe"}])
    watch.logged = {
        0: {"driftcheck/refusal": 1.0, "driftcheck/drift": 0.0},
        2: {"driftcheck/refusal": 0.5, "driftcheck/drift": 1.0},
    }
    handler = types.SimpleNamespace(callbacks=[watch])
    callback = PictureCallback(types.SimpleNamespace(callback_handler=handler, guard=None))
    ((name, figure),) = callback._figures()
    assert name == "driftcheck/course" and len(figure.axes) == 2
    assert [list(line.get_ydata()) for axes in figure.axes for line in axes.lines] == [[100.0, 50.0], [0.0, 1.0]]


def test_tensorboard_itself_shows_them(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = train(tmp_path, report_to=["tensorboard"])
    (callback,) = (c for c in trainer.callback_handler.callbacks if type(c).__name__ == "TensorBoardCallback")
    events = EventAccumulator(callback.logging_dir, size_guidance={"images": 0})
    events.Reload()
    (image,) = events.Images("alignguard/spectra")
    assert image.step == 2 and image.encoded_image_string[:4] == b"\x89PNG"
    assert "train/alignguard/kl" in events.Tags()["scalars"]


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="every"):
        PictureCallback(None, every=0)
