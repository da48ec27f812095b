"""The guard inside transformers' Trainer: one mixin, one callback."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from alignguard.guard import TERMS, Guard


class _GuardCallback(TrainerCallback):
    """Tells the guard when an optimizer step begins (never inside an accumulation window) and keeps the time."""

    def __init__(self, trainer: GuardMixin) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._step_started = time.perf_counter()
        if self.trainer.guard is not None:
            self.trainer.guard.begin_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_seconds.append(time.perf_counter() - self.trainer._step_started)


class GuardMixin:
    """Put before a Trainer class: ``class GuardSFTTrainer(GuardMixin, SFTTrainer): ...``.

    Adds ``guard.penalty()`` to the training loss, scaled so that gradient accumulation does not change it, logs each
    term through the Trainer and leaves the evaluation loss untouched. With ``guard=None`` it is the plain trainer.

    Args:
        guard: a :class:`~alignguard.Guard` on the model that is trained, or None.
    """

    def __init__(self, *args: Any, guard: Guard | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guard = guard
        self.step_seconds: list[float] = []
        self._step_started = 0.0
        self._term_sums: dict[str, torch.Tensor] = {}
        self._term_counts = 0
        self.add_callback(_GuardCallback(self))  # type: ignore[attr-defined]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The trainer's own loss, and in training the penalty with it.

        Raises:
            FloatingPointError: the loss is NaN or infinite; names the step.
        """
        result = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if not model.training:
            return result
        loss, rest = (result[0], result[1:]) if return_outputs else (result, ())
        if self.guard is not None:
            loss = loss + self._scaled_penalty(loss, num_items_in_batch)
        if not torch.isfinite(loss.detach()):
            step = self.state.global_step + 1  # type: ignore[attr-defined]
            terms = {name: float(value) for name, value in (self.guard.terms if self.guard else {}).items()}
            raise FloatingPointError(
                f"the training loss is {float(loss)} at step {step} (penalty terms: {terms or 'none'}); "
                "lower the learning rate or look for bad rows in the task data"
            )
        return (loss, *rest) if return_outputs else loss

    def _scaled_penalty(self, loss: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        """The whole penalty once an optimizer step, on the window's last micro-batch: weights do not change within it.

        Where the Trainer divides the loss by the window's size afterwards, the penalty is multiplied by it first.
        """
        if not self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            return loss.new_zeros(())
        with torch.autocast(loss.device.type, enabled=False):
            penalty = self.guard.penalty().to(loss.device)  # type: ignore[union-attr]
        for name, value in self.guard.terms.items():  # type: ignore[union-attr]
            self._term_sums[name] = self._term_sums.get(name, torch.zeros_like(value)) + value
        self._term_counts += 1
        scaled = self.loss_is_scaled_for_ga  # type: ignore[attr-defined]
        if scaled is None:
            scaled = (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None  # type: ignore[attr-defined]
            ) or self.compute_loss_func is not None  # type: ignore[attr-defined]
        return penalty if scaled else penalty * self.current_gradient_accumulation_steps  # type: ignore[attr-defined]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's log, with the mean of each penalty term since the last one as ``alignguard/<term>``."""
        if self._term_counts and "loss" in logs:
            means = {name: float(value) / self._term_counts for name, value in self._term_sums.items()}
            for name in TERMS:
                if name in means:
                    logs[f"alignguard/{name}"] = means[name]
            logs["alignguard/cosine"] = self.guard.cosine()  # type: ignore[union-attr]
            self._term_sums, self._term_counts = {}, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class GuardTrainer(GuardMixin, Trainer):
    """transformers' Trainer with a guard."""
