"""What every rival of the guard is: plain LoRA with a hook before training, at each step, and afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor

import fishergeo as fg
from alignguard.data import pad_rows
from alignguard.objective import model_kind

Encoded = Mapping[str, Any]


@dataclass
class Run:
    """One training run as a rival sees it.

    Attributes:
        model: the peft model that trains, or the model itself where every weight does.
        alignment: encoded alignment examples, ``{"input_ids": list, "labels": list}``, in the run's own order.
        pad_token_id: fills padded positions.
        seed: of whatever the rival draws.
        examples_read: how often an alignment example was read so far; repeats count.
        tokenizer: of the model, for rivals that read or write text.
        task: the task's rows as conversations, for the same.
        max_length: longest row in tokens.
        read: places of the task's rows that the run comes to read; None for all of them. A row that is marked as
            ``unread`` and read after all ends the run.
    """

    model: PeftModel
    alignment: Sequence[Encoded]
    pad_token_id: int
    seed: int
    examples_read: int = 0
    tokenizer: Any = None
    task: Sequence[Mapping[str, Any]] = ()
    max_length: int = 256
    read: frozenset[int] | None = None

    def draw(self, count: int, turn: int) -> list[Encoded]:
        """The ``count`` alignment examples of a turn, in rotation; reading them is counted."""
        count = min(count, len(self.alignment))
        self.examples_read += count
        return [self.alignment[(turn * count + i) % len(self.alignment)] for i in range(count)]

    def batch(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Rows padded to one batch on the model's device."""
        device = next(self.model.parameters()).device
        batch = pad_rows(rows, self.pad_token_id, model_kind(self.model))
        return {key: value.to(device) for key, value in batch.items()}

    def parameters(self) -> list[torch.nn.Parameter]:
        """What trains, in the model's order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def add_gradient(self, value: Tensor) -> None:
        """Add the gradient of a scalar to what the task left in ``.grad``."""
        parameters = self.parameters()
        for p, gradient in zip(parameters, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad + gradient


class Rival:
    """Plain LoRA; every other rival overrides one or two of these hooks. An instance serves one run.

    ``run`` holds the model and the alignment examples (:class:`studies.rivals.Run`), ``step`` counts optimizer steps,
    ``task`` are the encoded rows to learn.

    Attributes:
        name: what tables call it.
        reads_alignment: whether it needs alignment examples.
        reads_text: whether it needs the task's rows as text.
        needs_unaligned: whether its setting ``unaligned``, the model before its alignment, must be given.
        grid: values of each setting that a tuning sweep tries; their product is the sweep.
    """

    name: ClassVar[str] = "plain"
    reads_alignment: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False
    needs_unaligned: ClassVar[bool] = False
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def adapter(self, model: Any, lora: LoraConfig, alignment: Sequence[Encoded]) -> PeftConfig:
        """The adapter's configuration, once ``model`` is loaded and has none yet; ``lora`` is what the run asks for."""
        return lora

    def rows(self, task: Sequence[Encoded], run: Run) -> list[Encoded]:
        """The rows that are trained on."""
        return list(task)

    def start(self, run: Run) -> None:
        """Before the optimizer is made; the adapter is new, so the model is the aligned one."""

    def token_losses(self, run: Run, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The loss of every supervised token of a task batch, (tokens,) of any floating dtype; None for cross entropy."""
        return None

    def gradients(self, run: Run, step: int) -> None:
        """Once an optimizer step: the task's gradients stand in ``.grad``, not clipped yet; ``step`` counts from 0."""

    def step_done(self, run: Run, step: int) -> None:
        """After the optimizer's step; ``step`` counts from 1."""

    def finish(self, run: Run) -> None:
        """After training, before the adapter is saved."""

    def asked_with(self) -> str | None:
        """The system prompt that the trained model is asked with; None for none."""
        return None

    @classmethod
    def after_training(cls) -> bool:
        """Whether it trains as plain LoRA does and acts afterwards alone."""
        hooks = ("adapter", "rows", "start", "token_losses", "gradients", "step_done")
        return all(getattr(cls, hook) is getattr(Rival, hook) for hook in hooks)


@torch.no_grad()
def put_updates(model: PeftModel, updates: Mapping[str, fg.LowRank]) -> None:
    """Let the adapter of ``model`` be these updates, whatever their ranks; what it held is gone.

    Args:
        model: with one active LoRA adapter, in training or after it; no optimizer may hold its factors any longer.
        updates: name of each adapted module -> its ΔW.
    """
    (adapter,) = model.active_adapters
    config: Any = model.peft_config[adapter]
    ranks = {}
    for name, delta in updates.items():
        module: Any = model.get_submodule(name)
        for factors, factor in ((module.lora_A, delta.right), (module.lora_B, delta.left)):
            layer = torch.nn.Linear(factor.shape[1], factor.shape[0], bias=False)
            weight = factors[adapter].weight
            layer.weight = torch.nn.Parameter(factor.detach().to(weight, copy=True), weight.requires_grad)
            factors[adapter] = layer
        rank = ranks[name.removeprefix("base_model.model.")] = delta.right.shape[0]
        module.r[adapter], module.lora_alpha[adapter], module.scaling[adapter] = rank, rank, 1.0
    # so that the saved adapter is loaded as it is
    config.rank_pattern, config.alpha_pattern, config.use_rslora = ranks, dict(ranks), False
    config.init_lora_weights = True


def check_strength(name: str, value: float, high: float | None = None) -> None:
    """Refuse strengths that are not finite numbers from 0 up to ``high``.

    Raises:
        ValueError: names the setting and its range.
    """
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
    if not good or (high is not None and value > high):
        raise ValueError(f"{name} must lie in [0, {'∞' if high is None else high}], not {value!r}")


def check_count(name: str, value: int) -> None:
    """Refuse counts below 1.

    Raises:
        ValueError: names the setting.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
