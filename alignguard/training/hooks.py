"""What a method other than the guard may do in a run, and the Trainers that let it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from alignguard.training.trainer import GuardMixin


class Hooks(Protocol):
    """Hooks of a method that is trained in the guard's place, with all else as in a plain run."""

    def describe(self) -> dict[str, Any]:
        """The method and its settings as JSON, for the run's record."""

    def rows(self, task: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The rows that are trained on, given the encoded task rows."""

    def start(self) -> None:
        """Called once the model is on its device, before the optimizer is made."""

    def fetched(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Called with the rows of every batch that the data loader makes."""

    def token_losses(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The loss of every supervised token of a batch, (tokens,), in place of the model's own; None leaves that."""

    def gradients(self, step: int) -> None:
        """Called once an optimizer step: the task's gradients stand in ``.grad``, not clipped; ``step`` is from 0."""

    def step_done(self, step: int) -> None:
        """Called after the optimizer's step; ``step`` counts from 1."""

    def finish(self) -> None:
        """Called after training, before anything is saved."""


class _StepDone(TrainerCallback):
    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hooks.step_done(state.global_step)


class OwnLossMixin:
    """Between the guard's mixin and the Trainer: a method's own loss where it has one, averaged as the model's would be."""

    hooks: Hooks
    model_accepts_loss_kwargs: bool

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The mean over the supervised tokens of the accumulation window, or of the batch as the Trainer takes it."""
        losses = self.hooks.token_losses(inputs) if model.training and not return_outputs else None
        if losses is None:
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
        window = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return losses.sum() / (num_items_in_batch if window else max(losses.numel(), 1))


class HookMixin(GuardMixin):
    """A Trainer without a guard that calls hooks.

    Args:
        hooks: hooks of the method.
    """

    def __init__(self, *args: Any, hooks: Hooks, **kwargs: Any) -> None:
        super().__init__(*args, guard=None, **kwargs)
        self.hooks = hooks
        self.add_callback(_StepDone(hooks))  # type: ignore[attr-defined]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, and on an accumulation window's last micro-batch the method's turn at the gradients."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            self.hooks.gradients(self.state.global_step)  # type: ignore[attr-defined]
        return loss


class HookTrainer(HookMixin, OwnLossMixin, Trainer):
    """The guard's Trainer with hooks in place of a guard."""


class HookSeq2SeqTrainer(HookMixin, OwnLossMixin, Seq2SeqTrainer):
    """The guard's Seq2SeqTrainer with hooks in place of a guard."""
