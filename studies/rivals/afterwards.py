"""Repair after training: steps on alignment examples, an adapter merged in, or the update cut down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor
from transformers import PreTrainedModel

import fishergeo as fg
from alignguard.loading import adapter_off
from alignguard.objective import IGNORED, aligned_logits, evaluation_mode, response_loss
from alignguard.updates import lora_updates
from studies.rivals.base import Rival, Run, check_count, check_strength, put_updates
from studies.rivals.projections import toward_alignment


@dataclass
class OneShot(Rival):
    """Plain LoRA, then AdamW steps on a single alignment example (Safety at One Shot, 2601.01887).

    Attributes:
        steps: how many, at least 1.
        learning_rate: of those steps.
        example: which alignment example, by its place in the run's order.

    Raises:
        ValueError: fewer than one step, or a learning rate that is negative or not finite.
    """

    name: ClassVar[str] = "one-shot"
    reads_alignment: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"steps": (1, 5, 10, 20), "learning_rate": (1e-4, 5e-4, 2e-3)}
    steps: int = 10
    learning_rate: float = 5e-4
    example: int = 0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_strength("learning_rate", self.learning_rate)

    def finish(self, run: Run) -> None:
        """Take the steps with the model of ``run``; the loss is the mean over the response's tokens."""
        row = run.alignment[self.example % len(run.alignment)]
        run.examples_read += self.steps
        adamw_steps(run, [run.batch([row])] * self.steps, self.learning_rate)


def adamw_steps(run: Run, batches: Sequence[Mapping[str, Tensor]], learning_rate: float) -> None:
    """A step of AdamW without decay on each batch, on the mean loss of its response tokens; dropout is off."""
    optimizer = torch.optim.AdamW(run.parameters(), lr=learning_rate, weight_decay=0.0)
    run.model.eval()
    for batch in batches:
        tokens = (batch["labels"][:, 1:] != IGNORED).sum()
        optimizer.zero_grad()
        (response_loss(run.model, batch).sum() / tokens).backward()
        optimizer.step()
    optimizer.zero_grad()


@dataclass
class Intruders(Rival):
    """After plain LoRA the intruder dimensions are scaled down (Shuttleworth et al., 2410.21228), as peft does it.

    A singular vector of W + ΔW among the ``top`` first is an intruder where no singular vector of W has a cosine of
    ``threshold`` with it. Its part of W + ΔW is multiplied by ``strength``, and what remains of ΔW is cut to the rank
    that it had.

    Attributes:
        strength: share of each intruder that stays, in [0, 1]; peft's default, which its documentation calls the share
            that is subtracted, is 0.75.
        threshold: cosine in [0, 1].
        top: how many singular vectors are looked at.

    Raises:
        ValueError: a share or cosine outside [0, 1], or a count below 1.
    """

    name: ClassVar[str] = "intruders"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"strength": (0.0, 0.25, 0.5, 0.75), "threshold": (0.3, 0.5, 0.7)}
    strength: float = 0.75
    threshold: float = 0.5
    top: int = 10

    def __post_init__(self) -> None:
        check_strength("strength", self.strength, 1.0)
        check_strength("threshold", self.threshold, 1.0)
        check_count("top", self.top)

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        """Let the adapter of ``run`` be what peft makes of it."""
        (adapter,) = run.model.active_adapters
        reduced = "reduced"
        reduce_intruder_dimension(
            run.model, adapter, reduced, self.top, self.threshold, self.strength, logging_sink=None
        )  # it makes an adapter of its own, with the settings of the old one, and activates it
        updates = {name: delta.detach() for name, delta in lora_updates(run.model).items()}
        run.model.set_adapter(adapter)
        run.model.delete_adapter(reduced)
        put_updates(run.model, updates)


def safest_entries(delta: Tensor, cost: Tensor, budget: float, never: float = 0.15) -> Tensor:
    """Which entries of an update stay, (p, q) bool: those of the cheapest inputs first, while their damage fits.

    Args:
        delta: (p, q), W_tuned − W_aligned.
        cost: (q,), damage of a unit change, by its input; above 0.
        budget: largest sum of the damages δ²·cost of what stays.
        never: share of the entries, the costliest, that do not stay whatever the budget is.
    """
    spread = cost.expand_as(delta).flatten()
    order = spread.argsort(stable=True)
    order = order[: len(order) - int(never * len(order))]
    chosen = torch.zeros_like(spread, dtype=torch.bool)
    chosen[order] = (delta.flatten().square() * spread)[order].cumsum(0) <= budget
    return chosen.view_as(delta)


def compensated(delta: Tensor, kept: Tensor, upper: Tensor) -> Tensor:
    """An update of which some entries stay as they are, the others such that what stays does least harm: (p, q).

    Optimal Brain Surgeon, column by column as SparseGPT does it: an entry that stays moves those after it in its row.

    Args:
        delta: (p, q), W_tuned − W_aligned.
        kept: (p, q), entries that stay.
        upper: (q, q), the upper Cholesky factor of the inverse Hessian.
    """
    found = torch.zeros_like(delta)
    for j in range(delta.shape[1]):
        step = torch.where(kept[:, j], delta[:, j] - found[:, j], 0) / upper[j, j]
        found[:, j] = torch.where(kept[:, j], delta[:, j], found[:, j])
        found[:, j + 1 :] += step[:, None] * upper[j, j + 1 :]
    return found


@dataclass
class SafeDelta(Rival):
    """After plain LoRA the entries of ΔW stay that cost safety least, and the others make up for them (2505.12038).

    Lu et al.: with H = 2 X Xᵀ of a layer's inputs on alignment examples at the aligned weights, and d the diagonal of
    the Cholesky factor of H⁻¹, entry (i, j) does the damage δ²/d_j². The cheapest inputs' entries stay until their
    damage reaches strength · mean(1/d²) · p/4096 of a (p, q) matrix; the others take the values by which Optimal Brain
    Surgeon makes up for them. The damping of one percent and the costliest 15 % that never stay are the authors'
    code's; its blocks of columns, which share that budget, are one block here.

    Attributes:
        strength: of the budget, not negative; the authors' scripts take about 0.1 for a 7B model.
        examples: alignment examples whose inputs are read.

    Raises:
        ValueError: a strength that is negative or not finite, or fewer than one example.
    """

    name: ClassVar[str] = "safe-delta"
    reads_alignment: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "strength": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4)
    }
    strength: float = 0.1
    examples: int = 128

    def __post_init__(self) -> None:
        check_strength("strength", self.strength)
        check_count("examples", self.examples)

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        """Cut down the update of every matrix of ``run``; its adapter then has full rank."""
        updates = {name: delta.detach() for name, delta in lora_updates(run.model).items()}
        moments = _input_moments(run, list(updates), self.examples)
        cut = {}
        for name, update in updates.items():
            hessian = moments.pop(name)
            dead = hessian.diagonal() == 0
            hessian[dead, dead] = 1
            hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
            upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
            delta = update.to_dense().to(upper)
            cost = upper.diagonal().square().reciprocal()
            budget = self.strength * float(cost.mean()) * len(delta) / 4096
            found = compensated(delta, safest_entries(delta, cost, budget), upper).to(update.dtype)
            eye = torch.eye(min(found.shape), dtype=found.dtype, device=found.device)
            cut[name] = fg.LowRank(found, eye) if found.shape[0] >= found.shape[1] else fg.LowRank(eye, found)
        put_updates(run.model, cut)


def _input_moments(run: Run, names: Sequence[str], examples: int) -> dict[str, Tensor]:
    """2 X Xᵀ over the number of rows, (q, q) in float64, of each layer's inputs at the aligned weights."""
    moments: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            x = inputs[0].detach().flatten(0, -2).double()
            moments[name] = moments.get(name, 0) + 2 * x.mT @ x

        return run.model.get_submodule(name).get_base_layer().register_forward_hook(hook)  # type: ignore[operator]

    handles = [watch(name) for name in names]
    rows = run.draw(examples, 0)
    with evaluation_mode(run.model), adapter_off(run.model):
        for row in rows:
            aligned_logits(run.model, run.batch([row]))
    for handle in handles:
        handle.remove()
    return {name: moment / len(rows) for name, moment in moments.items()}


@dataclass
class SafeMERGE(Rival):
    """After plain LoRA, layers that part from the alignment direction are merged with a safe adapter's (2503.17239).

    Djuhera et al.: where the cosine of SafeLoRA, cos(C ΔW, ΔW), lies below the threshold, ΔW becomes
    (1 − weight)·ΔW + weight·ΔW_safe; the other layers stay. The safe adapter is trained here, after the task's: the
    same LoRA on the alignment examples, from the aligned model. Updates are merged as matrices, in factors.

    Attributes:
        unaligned: the model before alignment, or its path.
        threshold: cosine, in [0, 1].
        weight: of the safe update, in [0, 1].
        steps: AdamW steps of the safe adapter.
        learning_rate: of these.
        batch: alignment examples in each.
        merged: after a run, the names of the layers that were merged.

    Raises:
        ValueError: no ``unaligned`` model, or a setting out of its range.
    """

    name: ClassVar[str] = "safemerge"
    reads_alignment: ClassVar[bool] = True
    needs_unaligned: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"threshold": (0.3, 0.35, 0.4, 1.0), "weight": (0.2, 0.5, 0.8)}
    unaligned: str | Path | PreTrainedModel | None = None
    threshold: float = 0.35
    weight: float = 0.2
    steps: int = 100
    learning_rate: float = 5e-4
    batch: int = 8
    merged: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.unaligned is None:
            raise ValueError("safemerge needs unaligned=, the model (or its path) before alignment training")
        check_strength("threshold", self.threshold, 1.0)
        check_strength("weight", self.weight, 1.0)
        check_strength("learning_rate", self.learning_rate)
        check_count("steps", self.steps)
        check_count("batch", self.batch)

    def finish(self, run: Run) -> None:
        """Train the safe adapter in the place of the task's in ``run``, then merge the two.

        Raises:
            ValueError: the unaligned model lacks a layer, or has it in another shape.
        """
        (adapter,) = run.model.active_adapters
        found: dict[str, fg.LowRank] = {}
        for name, _, delta, cosine in toward_alignment(run, self.unaligned):
            found[name] = fg.LowRank(delta.left.detach().clone(), delta.right.detach().clone())
            if cosine < self.threshold:
                self.merged.append(name)
        with torch.random.fork_rng():
            torch.manual_seed(run.seed)
            for name in found:
                run.model.get_submodule(name).reset_lora_parameters(adapter, True)  # type: ignore[operator]
        batches = [run.batch(run.draw(self.batch, turn)) for turn in range(self.steps)]
        adamw_steps(run, batches, self.learning_rate)
        safe = {name: delta.detach() for name, delta in lora_updates(run.model).items()}
        for name in self.merged:
            found[name] = found[name] * (1 - self.weight) + safe[name] * self.weight
        put_updates(run.model, found)
