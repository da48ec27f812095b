"""Spectra and the course of drift as images, in the reporters that a Trainer logs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import TrainerCallback

from alignguard.training.drift_callback import DriftCallback


def _pixels(figure: Figure) -> np.ndarray:
    """(height, width, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _wandb(callback: Any, name: str, figure: Figure, step: int) -> None:
    callback._wandb.log({name: callback._wandb.Image(_pixels(figure)), "train/global_step": step})


def _trackio(callback: Any, name: str, figure: Figure, step: int) -> None:
    callback._trackio.log({name: callback._trackio.Image(_pixels(figure)), "train/global_step": step})


def _tensorboard(callback: Any, name: str, figure: Figure, step: int) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_image(name, _pixels(figure), step, dataformats="HWC")


def _mlflow(callback: Any, name: str, figure: Figure, step: int) -> None:
    callback._ml_flow.log_image(_pixels(figure), f"{name}/{step}.png")


# By the names of transformers' own callbacks, which hold their tool already set up; no tool is imported here.
REPORTERS: dict[str, Callable[[Any, str, Figure, int], None]] = {
    "TensorBoardCallback": _tensorboard,
    "WandbCallback": _wandb,
    "MLflowCallback": _mlflow,
    "TrackioCallback": _trackio,
}


class PictureCallback(TrainerCallback):
    """Draws the guard's spectra, and the course of a :class:`~alignguard.DriftCallback` beside it, every so many steps.

    The pictures go where the Trainer's own reporters go: TensorBoard, wandb, MLflow and trackio, as ``report_to`` says.

    Args:
        trainer: trainer whose reporters get them; a guard is read where it has one.
        every: optimizer steps between two pictures.

    Raises:
        ValueError: ``every`` below 1.

    Examples:
        >>> alignguard.PictureCallback(None, every=100).every
        100
    """

    def __init__(self, trainer: Any, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, found {every}")
        self.trainer, self.every = trainer, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw, where it is due.

        Args:
            args: arguments of the Trainer.
            state: state of the run.
            control: what to do next.
            **kwargs: not read.
        """
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        reporters = [
            (callback, send)
            for callback in self.trainer.callback_handler.callbacks
            if (send := REPORTERS.get(type(callback).__name__)) is not None
        ]
        for name, figure in self._figures() if reporters else ():
            for callback, send in reporters:
                send(callback, name, figure, state.global_step)

    def _figures(self) -> Iterator[tuple[str, Figure]]:
        guard = getattr(self.trainer, "guard", None)
        if guard is not None and guard.layers:
            yield "alignguard/spectra", _spectra(guard.spectra())
        watching = [one for one in self.trainer.callback_handler.callbacks if isinstance(one, DriftCallback)]
        if watching and watching[0].logged:
            yield "driftcheck/course", _course(watching[0].logged)


def _spectra(spectra: dict[str, dict[str, Any]]) -> Figure:
    """Leading eigenvalues of every matrix as shares of its trace."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for layer in spectra.values():
        if layer["total"] > 0 and layer["values"]:
            axes.semilogy(range(1, len(layer["values"]) + 1), np.array(layer["values"]) / layer["total"], alpha=0.6)
    axes.set(xlabel="eigenvector", ylabel="share of the trace", title="Output side of the alignment data's Fisher")
    return figure


def _course(logged: dict[int, dict[str, float]]) -> Figure:
    """Shares and drift against the optimizer step."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    other = axes.twinx()
    for name in dict.fromkeys(name for found in logged.values() for name in found):
        steps = [step for step, found in logged.items() if name in found]
        drift = name.endswith("/drift")
        values = [logged[step][name] * (1 if drift else 100) for step in steps]
        (other if drift else axes).plot(
            steps, values, "k--" if drift else "-", marker=".", label=name.partition("/")[2]
        )
    axes.set(xlabel="step", ylabel="%", title="DriftCheck while training")
    other.set_ylabel("drift, nats a response")
    axes.legend(fontsize=8)
    return figure
