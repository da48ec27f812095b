"""The guard: curvature of the alignment data at the present weights, and the penalty it puts on the update."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

import fishergeo as fg
from alignguard.config import GuardConfig
from alignguard.data import IGNORED, collate
from alignguard.updates import base_name, check_adapters, lora_updates

TERMS = ("alignment", "task", "overlap", "separation", "kl")


@dataclass(frozen=True)
class LayerCurvature:
    """Fisher of one matrix; the leading directions of its output side are found when first asked for.

    Attributes:
        operator: the estimate, (p, p) or (pq, pq).
        energy: share of the trace that the leading directions hold.
        max_rank: most of them, or None.
    """

    operator: Any
    energy: float
    max_rank: int | None

    @property
    def _output(self) -> Any:
        return getattr(self.operator, "output_factor", self.operator)

    @cached_property
    def total(self) -> float:
        """Trace of the output side, so that ``values.sum() / total`` is the energy held."""
        full = getattr(self._output, "full_trace", None)
        return float(self._output.trace() if full is None else full)

    @cached_property
    def _leading(self) -> tuple[Tensor, Tensor]:
        output = self._output
        values, vectors = torch.linalg.eigh(output) if isinstance(output, Tensor) else output.eigh()
        if isinstance(output, Tensor):
            values, vectors = values.flip(0), vectors.flip(1)
        values = values.clamp_min(0)  # rounding leaves tiny negative ones
        m = min(fg.rank_for_energy(values, self.total, self.energy), self.max_rank or len(values), vectors.shape[1])
        return values[:m], vectors[:, :m]

    @property
    def values(self) -> Tensor:
        """(m,) the leading eigenvalues, descending."""
        return self._leading[0]

    @cached_property
    def projector(self) -> fg.Projector:
        """On their eigenvectors."""
        return fg.Projector(self._leading[1])


def response_loss(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Negative log-likelihood of each example's whole response in nats, (n,): the loss whose Fisher is a drift."""
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return nll.view(labels.shape).sum(1)


def response_logprobs(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probabilities over the vocabulary at every supervised position, (tokens, vocabulary) float32."""
    keep = batch["labels"][:, 1:] != IGNORED
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return logits[keep].float().log_softmax(-1)


class Guard:
    """Holds what alignment needs of the model and charges the update for touching it.

    In a loop of one's own::

        guard = Guard.from_alignment(model, rows, config, pad_token_id=tokenizer.pad_token_id)
        for step, batch in enumerate(batches):
            guard.begin_step(step)
            loss = model(**batch).loss + guard.penalty()

    Args:
        model: a peft model with one active LoRA adapter.
        rows: encoded alignment examples, ``{"input_ids": list, "labels": list}`` (:func:`alignguard.data.encode_messages`).
        config: strengths and schedule.
        pad_token_id: fills padded positions.

    Raises:
        TypeError, ValueError: a model whose ΔW is not understood, or no alignment example.
    """

    def __init__(
        self, model: PeftModel, rows: Sequence[Mapping[str, Any]], config: GuardConfig, pad_token_id: int = 0
    ) -> None:
        check_adapters(model)
        if not rows:
            raise ValueError("the guard needs at least one alignment example")
        self.model, self.config, self.pad_token_id = model, config, pad_token_id
        self.rows = list(rows)
        random.Random(config.seed).shuffle(self.rows)
        self.layers: dict[str, LayerCurvature] = {}
        self.terms: dict[str, Tensor] = {}
        self.step = 0
        self.examples_read = 0
        self._estimated_at: int | None = None

    @classmethod
    def from_alignment(
        cls,
        model: PeftModel,
        rows: Sequence[Mapping[str, Any]],
        config: GuardConfig | None = None,
        pad_token_id: int = 0,
        progress: bool = False,
    ) -> Guard:
        """Build a guard and estimate its curvature at the present weights."""
        guard = cls(model, rows, config or GuardConfig(), pad_token_id)
        guard.refresh(progress=progress)
        return guard

    def begin_step(self, step: int) -> None:
        """Tell the guard which optimizer step begins; re-estimates the curvature when it is due."""
        self.step = step
        due = self._estimated_at is None or step - self._estimated_at >= self.config.refresh_every
        if due and self.uses_curvature:
            self.refresh()

    @property
    def uses_curvature(self) -> bool:
        """Whether any term needs the Fisher; false for the KL term alone."""
        c = self.config
        return bool(c.lambda_alignment or c.lambda_task or c.lambda_collision)

    def _draw(self, count: int, turn: int) -> list[Mapping[str, Any]]:
        """``count`` examples in rotation: the turn decides, so that a resumed run reads the same ones."""
        count = min(count, len(self.rows))
        return [self.rows[(turn * count + i) % len(self.rows)] for i in range(count)]

    def _batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        return {k: v.to(device) for k, v in collate(rows, self.pad_token_id).items()}

    def refresh(self, progress: bool = False) -> None:
        """Estimate the Fisher of the next alignment examples at the present weights; one forward and backward each.

        Gradients, optimizer state, training mode and random state are left as they were.
        """
        c = self.config
        rows = sorted(self._draw(c.refresh_examples, self.step // c.refresh_every), key=lambda r: len(r["input_ids"]))
        batches = [self._batch(rows[i : i + c.batch_size]) for i in range(0, len(rows), c.batch_size)]
        names = {base_name(name): name for name in lora_updates(self.model)}
        fisher = fg.estimate_fisher(
            self.model,
            batches,
            structure=c.structure,
            kind=c.kind,
            rank=c.sketch_rank,
            layers=list(names),
            loss=response_loss if c.kind == "empirical" else None,
            progress=progress,
            seed=c.seed + self.step,
        )
        self.layers = {names[key]: LayerCurvature(op, c.energy, c.max_rank) for key, op in fisher.items()}
        self._estimated_at = self.step
        self.examples_read += len(rows)

    def penalty(self) -> Tensor:
        """The penalty at the present weights, a differentiable scalar; its parts are left in ``terms``."""
        c = self.config
        sums: dict[str, Tensor] = {}

        def add(term: str, value: Tensor) -> None:
            sums[term] = sums[term] + value if term in sums else value

        if self.uses_curvature:
            if not self.layers:
                self.refresh()
            for name, delta in lora_updates(self.model).items():
                layer = self.layers[name]
                if c.lambda_alignment:
                    add("alignment", c.lambda_alignment * self._alignment(layer, delta))
                if not (c.lambda_task or c.lambda_collision):
                    continue
                part, rest = layer.projector.split(delta)
                if c.lambda_task:
                    add("task", c.lambda_task * rest.squared_norm())
                if c.lambda_collision:
                    if c.alpha > 0:
                        overlap = fg.riemannian_overlap(part, rest, beta=c.beta, tau=c.tau)
                        add("overlap", c.lambda_collision * c.alpha * overlap)
                    if c.alpha < 1:
                        separation = fg.geodesic_separation(part, rest, metric=c.metric)
                        add("separation", c.lambda_collision * (1 - c.alpha) * separation)
        if c.lambda_kl and self.step % c.kl_every == 0:
            add("kl", c.lambda_kl * c.kl_every * self.kl(self._draw(c.kl_examples, self.step // c.kl_every)))
            self.examples_read += min(c.kl_examples, len(self.rows))
        self.terms = {term: value.detach() for term, value in sums.items()}
        if not sums:
            return next(self.model.parameters()).new_zeros(())
        return torch.stack(list(sums.values())).sum()

    def _alignment(self, layer: LayerCurvature, delta: fg.LowRank) -> Tensor:
        """‖F^½ ΔW‖², or ‖F^½ ΔW_A‖² without the split: P's columns are eigenvectors of S, so it is Σ_j λ_j u_jᵀΔW C ΔWᵀu_j.

        C is the input factor of KFAC, the identity for the one-sided forms; O(p·m·r + q²·r) and O(p·m·r + q·r²). The
        whole update takes p in the place of m and needs no eigenvectors.
        """
        if self.config.whole_update:
            return layer.operator.quadratic(delta)
        right = delta.right
        weighted = right @ layer.operator.input_factor.to(right.dtype) if self.config.structure == "kfac" else right
        rows = layer.projector.basis.to(right.dtype).mT @ delta.left  # (m, r): u_jᵀ B
        return ((rows @ (weighted @ right.mT)) * rows).sum(1) @ layer.values.to(right.dtype)

    def kl(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """KL(base ‖ present) in nats a response token on encoded examples; the base is read by disabling the adapter."""
        batch = self._batch(rows)
        with torch.no_grad(), self.model.disable_adapter():
            base = response_logprobs(self.model, batch)
        present = response_logprobs(self.model, batch)
        return (base.exp() * (base - present)).sum(-1).mean()

    @torch.no_grad()
    def cosine(self) -> float:
        """Mean over layers of how alike the two parts' inputs are: <ΔW_AᵀΔW_A, ΔW_TᵀΔW_T> / (‖·‖‖·‖), in [0, 1]."""
        if not self.layers:
            return 0.0
        cosines = []
        for name, delta in lora_updates(self.model).items():
            part, rest = self.layers[name].projector.split(delta)
            cosines.append(fg.geodesic_separation(part, rest, metric="input-gram"))
        return float(torch.stack(cosines).mean())

    def spectra(self) -> dict[str, dict[str, Any]]:
        """Leading eigenvalues, trace, rank and share of energy of every layer, for reports."""
        return {
            name: {
                "values": layer.values.tolist(),
                "total": layer.total,
                "rank": len(layer.values),
                "energy": float(layer.values.sum()) / layer.total if layer.total > 0 else 0.0,
            }
            for name, layer in self.layers.items()
        }
