"""Quadratic pulls toward the aligned weights: plain L2, EWC's diagonal Fisher, and KFAC, each at θ0 and never renewed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor

import fishergeo as fg
from alignguard.updates import base_name, lora_updates
from studies.rivals.base import Rival, Run, check_count, check_strength


class UpdatePenalty(Rival):
    """A penalty on ΔW that is added to the task loss; subclasses say which."""

    def value(self, run: Run) -> Tensor:
        """The penalty at the present weights, a differentiable scalar."""
        raise NotImplementedError

    def gradients(self, run: Run, step: int) -> None:
        """Add the penalty's gradient to the task's."""
        run.add_gradient(self.value(run))


@dataclass
class L2(UpdatePenalty):
    """strength · Σ ‖ΔW‖²_F: the pull toward W0 that knows nothing of alignment (L2-SP, Li et al. 2018).

    Where every weight trains, ΔW is of all of them, norms and embeddings too.

    Attributes:
        strength: weight of the sum, not negative.

    Raises:
        ValueError: a strength that is negative or not finite.
    """

    name: ClassVar[str] = "l2"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "strength": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    }
    strength: float = 0.01
    begun: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_strength("strength", self.strength)

    def start(self, run: Run) -> None:
        """Keep the weights of ``run`` where no adapter does."""
        if not isinstance(run.model, PeftModel):
            self.begun = [p.detach().clone() for p in run.parameters()]

    def value(self, run: Run) -> Tensor:
        """Σ ‖ΔW‖² of ``run``, in factors where an adapter trains, times the strength: a scalar in the weights' dtype."""
        if self.begun:
            moved = [(p - start).square().sum() for p, start in zip(run.parameters(), self.begun, strict=True)]
        else:
            moved = [d.squared_norm() for d in lora_updates(run.model).values()]
        return self.strength * torch.stack(moved).sum()


def fisher_at_start(run: Run, structure: str, kind: str, examples: int, batch_size: int = 16) -> dict[str, Any]:
    """Fisher of whole responses at θ0 for every adapted matrix, by the adapted module's name."""
    rows = sorted(run.draw(examples, 0), key=lambda row: len(row["input_ids"]))
    batches = [run.batch(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    names = {base_name(name): name for name in lora_updates(run.model)}
    fisher = fg.estimate_fisher(
        run.model,
        batches,
        structure=structure,
        kind=kind,
        layers=list(names),
        reduction="sum",
        seed=run.seed,
    )
    return {names[name]: operator for name, operator in fisher.items()}


@dataclass
class EWC(UpdatePenalty):
    """strength · Σ F_ij ΔW_ij², F the diagonal Fisher of ΔW at θ0 (Kirkpatrick et al. 2017; EWC-LoRA, 2602.17559).

    Attributes:
        strength: weight of the sum, not negative.
        examples: alignment examples of the estimate.
        kind: where labels come from, as in :func:`fishergeo.estimate_fisher`.

    Raises:
        ValueError: a strength that is negative or not finite, or fewer than one example.
    """

    name: ClassVar[str] = "ewc"
    reads_alignment: ClassVar[bool] = True
    structure: ClassVar[str] = "diagonal"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "strength": (1.0, 10.0, 100.0, 1e3, 1e4, 1e5),
        "kind": ("empirical", "mc"),
    }
    strength: float = 100.0
    examples: int = 128
    kind: str = "empirical"
    fisher: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_strength("strength", self.strength)
        check_count("examples", self.examples)

    def start(self, run: Run) -> None:
        """Estimate F at the aligned weights of ``run``."""
        self.fisher = fisher_at_start(run, self.structure, self.kind, self.examples)

    def value(self, run: Run) -> Tensor:
        """Σ vec(ΔW)ᵀ F vec(ΔW) over the layers of ``run``, times the strength: a scalar in the factors' dtype."""
        updates = lora_updates(run.model)
        return self.strength * torch.stack([self.fisher[name].quadratic(d) for name, d in updates.items()]).sum()


@dataclass
class KFAC(EWC):
    """strength · Σ tr(ΔWᵀ S ΔW A), S ⊗ A the KFAC of the alignment data at θ0 (Chen and Garner, 2402.12220).

    Attributes:
        strength: weight of the sum, not negative.
        examples: alignment examples of the estimate.
        kind: where labels come from, as in :func:`fishergeo.estimate_fisher`.
    """

    name: ClassVar[str] = "kfac"
    structure: ClassVar[str] = "kfac"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "strength": (1.0, 10.0, 100.0, 1e3, 1e4, 1e5),
        "kind": ("empirical", "mc"),
    }
