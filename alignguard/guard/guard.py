"""The guard: curvature of the alignment data at the present weights, and the penalty it puts on the update."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import fishergeo as fg
from alignguard.data import pad_rows, supervised_tokens
from alignguard.guard.config import GuardConfig
from alignguard.guard.curvature import LayerCurvature, check_widths, curvatures
from alignguard.guard.distributed import agreed, pooled_fisher, pooled_mean, world
from alignguard.guard.reference import Reference
from alignguard.guard.schedule import DriftBudget, Freshness
from alignguard.guard.terms import CurvatureTerms
from alignguard.objective import model_kind
from alignguard.updates import Covered, Matrix, WeightUpdates, coverage

TERMS = ("alignment", "task", "overlap", "separation", "kl")


class Guard:
    """Holds what alignment needs of the model and charges the update for touching it.

    The split and its terms are those of AlignGuard-LoRA (arXiv 2508.02079, section 4), see :class:`GuardConfig`; that
    ½ tr(ΔWᵀFΔW) is a drift in nats is the second-order expansion of KL (Martens 2020, arXiv 1412.1193).

    In a loop of one's own:

        guard = Guard.from_alignment(model, rows, config, pad_token_id=tokenizer.pad_token_id)
        guard.begin_run(len(batches))
        for step, batch in enumerate(batches):
            guard.begin_step(step)
            loss = model(**batch).loss + guard.penalty()

    Args:
        model: a peft model with LoRA adapters, or with ``method="full"`` any model whose weights train. Make the
            guard before training: its references are the weights of this moment.
        rows: encoded alignment examples, ``{"input_ids": list, "labels": list}``
            (:func:`alignguard.data.encode_source`).
        config: strengths and schedule.
        pad_token_id: fills padded positions.
        method: ``"lora"`` or ``"full"``.
        offload: device of the reference weights of dense updates; their weight's own if None.

    Attributes:
        updates: what is guarded and how ΔW is read.
        terms: the parts of the last penalty.
        examples_read: alignment examples read so far, each reading counted.

    Raises:
        TypeError, ValueError: a model whose ΔW is not understood, or no alignment example.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
        >>> model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(r=2, target_modules=["q_proj"]))
        >>> rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}]
        >>> guard = alignguard.Guard.from_alignment(model, rows)
        >>> guard.penalty().item(), sorted(guard.terms)  # nothing has moved yet
        (0.0, ['alignment'])
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: Sequence[Mapping[str, Any]],
        config: GuardConfig,
        pad_token_id: int = 0,
        method: str = "lora",
        offload: str | torch.device | None = None,
    ) -> None:
        self.updates = WeightUpdates(model, method, config.exclude, config.include_router, offload)
        if not rows:
            raise ValueError("the guard needs at least one alignment example")
        self.model, self.config, self.pad_token_id = model, config, pad_token_id
        if self.uses_curvature:
            check_widths(self.updates.matrices.values(), config)
        self.rows = list(rows)
        random.Random(config.seed).shuffle(self.rows)
        held = self._hold_back()
        self.terms: dict[str, Tensor] = {}
        self.step = 0
        self.steps: int | None = None
        self.examples_read = 0
        self.refreshes = 0
        self._shown: tuple[int, dict[str, Tensor]] | None = None
        self._angle: float | None = None
        self.running: fg.Fisher | None = None
        self._estimated_at: int | None = None
        self._scales: dict[str, float] = {}
        self.layers = {}
        self._kind = model_kind(model)
        steady, limit = self.updates.base_is_reference, config.kl_cache_mb << 20
        self._anchor = Reference(model, self.rows, self._batch, steady, limit) if config.lambda_kl else None
        self._held = Reference(model, held, self._batch, steady, limit) if held else None
        self.budget = DriftBudget(config.max_drift) if config.max_drift is not None else None
        self.freshness = Freshness(config) if held else None

    @classmethod
    def from_alignment(
        cls,
        model: torch.nn.Module,
        rows: Sequence[Mapping[str, Any]],
        config: GuardConfig | None = None,
        pad_token_id: int = 0,
        progress: bool = False,
        **options: Any,
    ) -> Guard:
        """Build a guard and estimate its curvature at the present weights.

        Args:
            model: as for the constructor, like ``rows`` and ``pad_token_id``.
            rows: encoded alignment examples.
            config: strengths and schedule; the defaults if None.
            pad_token_id: fills padded positions.
            progress: show a bar over the batches of the estimate.
            **options: ``method`` and ``offload`` of the constructor.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        guard = cls(model, rows, config or GuardConfig(), pad_token_id, **options)
        guard.refresh(progress=progress)
        return guard

    def _hold_back(self) -> list[Mapping[str, Any]]:
        """Take the examples on which drift is measured out of the rows, where drift is measured at all."""
        if self.config.max_drift is None and not self.config.adaptive:
            return []
        count = min(self.config.held_back, len(self.rows) // 2)
        if count < 1:
            raise ValueError("measuring drift needs at least two alignment examples, one of them held back")
        held, self.rows = self.rows[-count:], self.rows[:-count]
        return held

    @property
    def layers(self) -> dict[str, LayerCurvature]:
        """Curvature by matrix, empty before the first estimate."""
        return self._curvature.layers

    @layers.setter
    def layers(self, layers: Mapping[str, LayerCurvature]) -> None:
        self._curvature = CurvatureTerms(self.updates, layers, self.config, self._scale)

    @property
    def uses_curvature(self) -> bool:
        """Whether any term needs the Fisher; false for the KL term alone."""
        c = self.config
        return bool(c.lambda_alignment or c.lambda_task or c.lambda_collision or c.max_drift is not None)

    def coverage(self) -> list[Covered]:
        """What is guarded, matrix by matrix, and what trains outside the guard."""
        return coverage(self.updates)

    # schedule

    def begin_run(self, steps: int) -> None:
        """Tell the guard how many optimizer steps the run has: where ``refresh_every`` is None, a short one has estimates
        more often. A Trainer's guard is told.

        Args:
            steps: optimizer steps of the whole run, those before a resumed one's checkpoint too.

        Raises:
            ValueError: no positive number of steps.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        self.steps = steps

    def begin_step(self, step: int, task_examples: int | None = None) -> None:
        """Tell the guard which optimizer step begins; measures drift and estimates the curvature anew when due.

        With torch.distributed every process must call this alike. Alignment examples are then shared out among them,
        and all decide by the same numbers.

        Args:
            step: optimizer steps done.
            task_examples: task examples of this step, of all processes, which adaptive refreshes count their budget in.

        Raises:
            ValueError: adaptive refreshes without ``task_examples``.
        """
        self.step = step
        if self._estimated_at is None and self.uses_curvature:
            self.refresh()
        parted = False
        if self.freshness is not None:
            told = self.config.adaptive and task_examples is not None
            self.freshness.spend_on(agreed(task_examples) if told else task_examples)  # type: ignore[arg-type]
            if self.freshness.may_measure(step, len(self._held.rows)):  # type: ignore[union-attr]
                parted = self._measure()
        if self.uses_curvature and step >= self._due():
            examples = min(self.config.refresh_examples, len(self.rows))
            if not self.config.adaptive or (parted and self.freshness.may_refresh(examples)):  # type: ignore[union-attr]
                self._renew()
        if self.budget is not None:
            self.budget.update(step, agreed(self.predicted_drift()))

    def _due(self) -> int:
        """The step from which the curvature is to be estimated anew."""
        last, interval = self._estimated_at or 0, self.config.interval(self.steps)
        return last + (interval if last else min(self.config.first_refresh or interval, interval))

    def _measure(self) -> bool:
        """Measure drift on the examples held back; whether the prediction is off by more than the tolerance."""
        held = range(len(self._held.rows))  # type: ignore[union-attr]
        drift = pooled_mean(held, self.model, self._held.drift)  # type: ignore[union-attr]
        self.examples_read += len(held)
        predicted = agreed(self.predicted_drift())
        if self.budget is not None:
            self.budget.measured(drift, predicted)
        return self.freshness.measured(self.step, drift, predicted)  # type: ignore[union-attr]

    def _renew(self) -> None:
        """Refresh, and where drift is measured tell those who compare it with the prediction that it has changed."""
        if self.freshness is None:
            self.refresh()
            return
        before = agreed(self.predicted_drift())
        self.refresh()
        after = agreed(self.predicted_drift())
        self.freshness.calibrate(after)
        if self.budget is not None:
            self.budget.renewed(before, after)

    def _draw(self, count: int, turn: int) -> list[int]:
        """Places of ``count`` examples in rotation: the turn decides, so that a resumed run reads the same ones."""
        count = min(count, len(self.rows))
        return [(turn * count + i) % len(self.rows) for i in range(count)]

    def _batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        return {k: v.to(device) for k, v in pad_rows(rows, self.pad_token_id, self._kind).items()}

    def refresh(self, progress: bool = False) -> None:
        """Estimate the Fisher of the next alignment examples at the present weights; one forward and backward each.

        With ``progress`` a bar is shown. Several processes read a share each. Gradients, optimizer state, training mode
        and random state are left as they were.
        """
        c = self.config
        if not c.averaging:
            self.layers = {}  # or the old factors would stand beside the new ones; should this fail, penalty() tries anew
        chosen = [self.rows[place] for place in self._draw(c.refresh_examples, self.refreshes)]
        rows = sorted(chosen, key=lambda r: len(r["input_ids"]))
        fisher = pooled_fisher(rows, self.model, lambda mine: self._estimate(mine, progress))
        if c.averaging:
            fisher = fisher if self.running is None else fisher.merge(self.running.scaled(c.averaging))
            self.running = fisher
        self.examples_read += len(rows)
        tokens = float(sum(supervised_tokens(row) for row in rows))
        if c.averaging:
            tokens += c.averaging * next((layer.samples or 0 for layer in self.layers.values()), 0)
        self.use_fisher(fisher, round(tokens))

    def _estimate(self, rows: Sequence[Mapping[str, Any]], progress: bool) -> fg.Fisher:
        c = self.config
        return fg.estimate_fisher(
            self.model,
            [self._batch(rows[i : i + c.batch_size]) for i in range(0, len(rows), c.batch_size)],
            structure=c.structure,
            kind=c.kind,
            rank=c.sketch_rank,
            layers=[matrix.layer for matrix in self.updates.matrices.values()],
            reduction="sum",  # of whole responses, so that the quadratic is in nats a response
            progress=progress,
            seed=c.seed + self.step + 1_000_003 * world()[0],  # what is drawn for one share is not drawn for the next
        )

    def use_fisher(self, fisher: Mapping[str, Any], samples: int | None = None) -> None:
        """Take curvatures that were estimated elsewhere.

        Args:
            fisher: operator by name, of captured layers or of matrices with or without what peft puts around them.
            samples: supervised tokens that it was made of, which ``noise_edge`` needs.

        Raises:
            ValueError: a guarded matrix has no operator in it, or one of another shape.
        """
        self.layers = curvatures(fisher, self.updates.matrices.values(), self.config, samples)
        self._estimated_at = self.step
        self.refreshes += 1

    # penalty

    def penalty(self) -> Tensor:
        """The penalty at the present weights, a differentiable scalar, float32 or wider; its parts are left in ``terms``."""
        c = self.config
        factor, scale = (1.0, 1.0) if self.budget is None else (self.budget.multiplier, self.budget.scale)
        sums: dict[str, Tensor] = {}
        if self.uses_curvature:
            if not self.layers:
                self.refresh()
            sums = self._curvature.terms()
            if self.budget is not None and "alignment" in sums:
                sums["alignment"] = sums["alignment"] * (factor * scale)
        if self._anchor is not None and self.step % c.kl_every == 0:
            places = self._draw(c.kl_examples, self.step // c.kl_every)
            sums["kl"] = c.lambda_kl * factor * c.kl_every * self._anchor.divergence(places)[0].mean()
            self.examples_read += len(places)
        self.terms = {term: value.detach() for term, value in sums.items()}
        if not sums:
            return next(self.model.parameters()).new_zeros(())
        return torch.stack(list(sums.values())).sum()

    def _scale(self, matrix: Matrix) -> float:
        """Root mean square of W0."""
        if matrix.name not in self._scales:
            weight = matrix.weight().detach()
            self._scales[matrix.name] = float(weight.float().square().mean().sqrt()) or 1.0
        return self._scales[matrix.name]

    # what people look at

    def predicted_drift(self) -> float:
        """½ Σ tr(ΔWᵀFΔW) over the matrices: to second order the drift from the start in nats a response."""
        return self._curvature.drift()

    def measured_drift(self, examples: int = 16) -> float | None:
        """KL(start ‖ present) of whole responses in nats, on the examples held back, else on the first few.

        Args:
            examples: most examples to read.

        Returns:
            Nats a response, the mean over the examples; None where the model's start can no longer be read.
        """
        reference = self._held or self._anchor
        if reference is None and self.updates.base_is_reference:
            reference = Reference(self.model, self.rows[:examples], self._batch, True, 0)
        return None if reference is None else reference.drift(range(min(examples, len(reference.rows))))

    def cosine(self) -> float:
        """Mean over matrices of how alike the two parts' inputs are: <ΔW_AᵀΔW_A, ΔW_TᵀΔW_T> / (‖·‖‖·‖), in [0, 1]."""
        return self._curvature.cosine()

    @torch.no_grad()
    def angle(self) -> float | None:
        """Mean principal angle in degrees between the leading directions and those of the estimate shown before it.

        Found when asked for, as the eigenvectors are: a run that logs nothing pays for none. None until two estimates
        have been shown.
        """
        if self.layers and (self._shown is None or self._shown[0] != self.refreshes):
            bases = {name: layer.projector.basis for name, layer in self.layers.items()}
            if self._shown is not None:
                angles = [layer.turned_from(self._shown[1][name]) for name, layer in self.layers.items()]
                self._angle = sum(angles) / len(angles)
            self._shown = self.refreshes, bases
        return self._angle

    def numbers(self) -> dict[str, float]:
        """What a log line should show beside the terms: cosine, drift, multiplier, angle to the last basis shown.

        The first call after a refresh finds the leading eigenvectors of every matrix.
        """
        shown = {"cosine": self.cosine()}
        if (angle := self.angle()) is not None:
            shown["angle"] = angle
        if self.freshness is not None:
            shown |= {"drift_predicted": self.predicted_drift(), "drift_measured": self.freshness.drift}
        if self.budget is not None:
            shown |= {"multiplier": self.budget.multiplier, "scale": self.budget.scale}
        return shown

    def spectra(self) -> dict[str, dict[str, Any]]:
        """Leading eigenvalues, trace, rank and share of energy of every layer, for reports."""
        return {name: layer.summary() for name, layer in self.layers.items()}
