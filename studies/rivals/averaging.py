"""Weight averages: over the steps of training (EMA), and between the aligned and the fine-tuned model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignguard.updates import lora_updates
from studies.rivals.base import Rival, Run, check_strength


@dataclass
class EMA(Rival):
    """The adapter's factors averaged over training: w̄ ← d·w̄ + (1 − d)·w after every step; w̄ is what is kept.

    The average starts at the aligned model and keeps d^T of it after T steps: that share is what a decay near 1 is for,
    so the decay is not made smaller in the first steps, as for an average of late weights it would be. Averages of
    weights: Polyak and Juditsky 1992; against the loss of safety: Kim et al. 2025 (arXiv 2508.12531).

    Attributes:
        decay: d in [0, 1]; 0 keeps the last weights, 1 the aligned model.

    Raises:
        ValueError: a decay outside [0, 1].
    """

    name: ClassVar[str] = "ema"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "decay": (0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.997, 0.998, 0.9985, 0.999)
    }
    decay: float = 0.99
    average: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_strength("decay", self.decay, 1.0)

    def start(self, run: Run) -> None:
        """The average starts where the ``run`` starts."""
        self.average = [p.detach().float().clone() for p in run.parameters()]

    @torch.no_grad()
    def step_done(self, run: Run, step: int) -> None:
        """Move the average toward the present weights of ``run``; ``step`` counts from 1."""
        for mean, p in zip(self.average, run.parameters(), strict=True):
            mean.lerp_(p.detach().float().to(mean.device), 1 - self.decay)

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        """Put the average in the place of the last weights of ``run``."""
        for mean, p in zip(self.average, run.parameters(), strict=True):
            p.copy_(mean.to(p.dtype))


@dataclass
class Interpolation(Rival):
    """ΔW times a factor after training: the line from the aligned to the fine-tuned model (WiSE-FT, 2109.01903).

    Attributes:
        factor: in [0, 1]; 1 is plain LoRA, 0 the aligned model.

    Raises:
        ValueError: a factor outside [0, 1].
    """

    name: ClassVar[str] = "interpolation"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "factor": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
    }
    factor: float = 0.8

    def __post_init__(self) -> None:
        check_strength("factor", self.factor, 1.0)

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        """Scale B in every adapted matrix of ``run``."""
        (adapter,) = run.model.active_adapters
        for name in lora_updates(run.model):
            module: Any = run.model.get_submodule(name)
            module.lora_B[adapter].weight.mul_(self.factor)
