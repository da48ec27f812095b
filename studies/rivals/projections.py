"""Projections: of the finished update onto what alignment training moved (SafeLoRA), and of each task gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import fishergeo as fg
from alignguard.objective import divergence, response_loss
from alignguard.updates import lora_updates
from studies.rivals.base import Rival, Run, check_count, check_strength
from studies.rivals.distillation import base_and_present

LOSSES = ("kl", "nll")


def alignment_map(aligned: Tensor, unaligned: Tensor) -> Tensor:
    """C = V Vᵀ / ‖V‖_F of V = W_aligned − W_unaligned, (p, p) (Hsu et al. 2024, 2405.16833).

    C is symmetric and positive, but no projector: C·C is not C, so it also rescales what lies in V's column space.
    A layer that alignment did not move gives C = 0.
    """
    v = (aligned - unaligned).to(torch.promote_types(aligned.dtype, torch.float32))
    norm = v.norm()
    return v @ v.mT / norm if norm > 0 else torch.zeros(len(v), len(v), dtype=v.dtype, device=v.device)


def toward_alignment(
    run: Run, unaligned: str | Path | PreTrainedModel | None
) -> Iterator[tuple[str, Tensor, fg.LowRank, float]]:
    """Of every adapted matrix its name, C of :func:`alignment_map`, ΔW, and cos(C ΔW, ΔW).

    Raises:
        ValueError: the unaligned model lacks a layer, or has it in another shape.
    """
    model = unaligned
    if not isinstance(model, PreTrainedModel):
        model = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    before = model.state_dict()
    for name, delta in lora_updates(run.model).items():
        delta = delta.detach()
        module: Any = run.model.get_submodule(name)
        weight = module.get_base_layer().weight.detach()
        key = f"{name.removeprefix('base_model.model.')}.weight"
        if key not in before or before[key].shape != weight.shape:
            found = tuple(before[key].shape) if key in before else "nothing"
            raise ValueError(f"unaligned model: {key} should be {tuple(weight.shape)}, found {found}")
        c = alignment_map(weight, before[key].to(weight)).to(delta.dtype)
        moved = c @ delta.left @ delta.right
        cosine = torch.nn.functional.cosine_similarity(moved.flatten(), delta.to_dense().flatten(), dim=0)
        yield name, c, delta, float(cosine)


@dataclass
class SafeLoRA(Rival):
    """After training: where cos(C ΔW, ΔW) ≤ threshold, B becomes C B (Hsu et al. 2024, 2405.16833).

    Needs the model before alignment, since V is what alignment training moved; it reads no alignment example.

    Attributes:
        unaligned: that model, or its path.
        threshold: cosine, in [0, 1]; layers above it stay as they are.
        projected: after a run, the names of the layers that were projected.

    Raises:
        ValueError: no ``unaligned`` model, or a threshold outside [0, 1].
    """

    name: ClassVar[str] = "safelora"
    needs_unaligned: ClassVar[bool] = True
    # dense where the layers of the embedded model lie: from one coarse step to the next half of them would be projected
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "threshold": (0.2, 0.3, 0.34, 0.36, 0.37, 0.38, 0.39, 0.4, 0.42, 0.45, 0.5, 0.7)
    }
    unaligned: str | Path | PreTrainedModel | None = None
    threshold: float = 0.35
    projected: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        check_strength("threshold", self.threshold, 1.0)
        if self.unaligned is None:
            raise ValueError("safelora needs unaligned=, the model (or its path) before alignment training")

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        """Project the layers of ``run`` that part from the alignment direction.

        Raises:
            ValueError: the unaligned model lacks a layer, or has it in another shape.
        """
        (adapter,) = run.model.active_adapters
        for name, c, _, cosine in toward_alignment(run, self.unaligned):
            if cosine <= self.threshold:
                module: Any = run.model.get_submodule(name)
                b = module.lora_B[adapter].weight
                b.copy_(c.to(b) @ b)
                self.projected.append(name)


def without_conflict(task: list[Tensor], alignment: list[Tensor]) -> list[Tensor]:
    """The task's gradient less its part along the alignment gradient, where the two conflict.

    All tensors together are one vector: g ← g − (⟨g, a⟩ / ‖a‖²) a where ⟨g, a⟩ < 0, else g (PCGrad, Yu et al. 2020;
    as SafeGrad, 2508.07172, uses it). What remains is orthogonal to a, so to first order the step leaves the
    alignment loss where it is.
    """
    inner = torch.stack([(g * a).sum() for g, a in zip(task, alignment, strict=True)]).sum()
    norm = torch.stack([a.square().sum() for a in alignment]).sum()
    if inner >= 0 or norm == 0:
        return task
    return [g - inner / norm * a for g, a in zip(task, alignment, strict=True)]


@dataclass
class GradientProjection(Rival):
    """Each task gradient loses its part that would raise the alignment loss (SafeGrad, 2508.07172).

    Attributes:
        examples: alignment examples of each gradient.
        loss: ``"kl"``, KL from the aligned model (zero at the start, as in SafeGrad), or ``"nll"`` of the responses.
        every: optimizer steps from one projection to the next.

    Raises:
        ValueError: an unknown loss, or a count below 1.
    """

    name: ClassVar[str] = "gradient-projection"
    reads_alignment: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "examples": (1, 2, 4, 8, 16, 32),
        "loss": LOSSES,
    }
    examples: int = 4
    loss: str = "kl"
    every: int = 1
    conflicts: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_count("examples", self.examples)
        check_count("every", self.every)
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {LOSSES}, not {self.loss!r}")

    def gradients(self, run: Run, step: int) -> None:
        """Project ``.grad`` of ``run``, in every ``every``-th ``step``."""
        if step % self.every:
            return
        batch = run.batch(run.draw(self.examples, step // self.every))
        if self.loss == "nll":
            tokens = (batch["labels"][:, 1:] != -100).sum()
            loss = response_loss(run.model, batch).sum() / tokens
        else:
            base, present, *_ = base_and_present(run, batch)
            loss = divergence(base, present).mean()
        parameters = [p for p in run.parameters() if p.grad is not None]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        alignment = [torch.zeros_like(p) if a is None else a for p, a in zip(parameters, found, strict=True)]
        task = [p.grad for p in parameters if p.grad is not None]
        cleared = without_conflict(task, alignment)
        self.conflicts += cleared is not task
        for p, g in zip(parameters, cleared, strict=True):
            p.grad = g
