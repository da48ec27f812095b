"""Curvature of one matrix: its Fisher, the projector on its leading output directions, and what an update costs there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fishergeo as fg
from alignguard.config import GuardConfig
from alignguard.updates import Update


@dataclass(frozen=True)
class LayerCurvature:
    """Fisher of one matrix and the projector on its leading output directions.

    Attributes:
        operator: the estimate, (p, p) or (pq, pq).
        projector: on eigenvectors of the output side, m of them: the leading ones, or all with soft weights.
        values: (m,) their eigenvalues, descending.
        total: trace of the output side, so that ``values.sum() / total`` is the energy held.
    """

    operator: Any
    projector: fg.SoftProjector
    values: Tensor
    total: float

    @classmethod
    def from_operator(cls, operator: Any, config: GuardConfig) -> LayerCurvature:
        """Take the leading eigenvectors that hold ``config.energy`` of the trace, at most ``config.max_rank``.

        With ``projection="soft"`` all known eigenvectors are taken, each with the weight λ/(λ + ε), ε the last
        eigenvalue that the hard projector would have held, which so weighs one half.
        """
        two_sided = isinstance(operator, fg.KroneckerOperator)
        output = operator.output_factor if two_sided else operator
        values, vectors = torch.linalg.eigh(output) if isinstance(output, Tensor) else output.eigh()
        if isinstance(output, Tensor):
            values, vectors = values.flip(0), vectors.flip(1)
        values = values.clamp_min(0)  # rounding leaves tiny negative ones
        total = float(output.trace())
        m = min(fg.rank_for_energy(values, total, config.energy), config.max_rank or len(values), vectors.shape[1])
        if config.projection == "soft" and m > 0 and float(values[m - 1]) > 0:
            soft = fg.SoftProjector.from_spectrum(vectors, values, float(values[m - 1]))
            return cls(operator, soft, values, total)
        return cls(operator, fg.Projector(vectors[:, :m]), values[:m], total)

    def alignment(self, delta: Update) -> Tensor:
        """‖F^½ ΔW_A‖² without the split: P's columns are eigenvectors of S, so it is Σ_j w_j² λ_j u_jᵀΔW C ΔWᵀu_j.

        C is the input factor of KFAC, the identity for the one-sided forms; O(p·m·r + q²·r) and O(p·m·r + q·r²) on
        factors, O(p·q·m + m·q²) and O(p·q·m) on a dense update.
        """
        inside = self.operator.input_factor if isinstance(self.operator, fg.KroneckerOperator) else None
        basis, values = self.projector.basis, self.values * self.projector.weights.square()
        if isinstance(delta, Tensor):
            rows = basis.to(delta.dtype).mT @ delta  # (m, q)
            weighted = rows if inside is None else rows @ inside.to(delta.dtype)
            return (weighted * rows).sum(1) @ values.to(delta.dtype)
        right = delta.right
        weighted = right if inside is None else right @ inside.to(right.dtype)
        rows = basis.to(right.dtype).mT @ delta.left  # (m, r): u_jᵀ B
        return ((rows @ (weighted @ right.mT)) * rows).sum(1) @ values.to(right.dtype)

    def terms(self, delta: Update, config: GuardConfig, scale: float = 1.0, layers: int = 1) -> dict[str, Tensor]:
        """Every curvature term of the penalty, unweighted by the drift budget.

        Args:
            delta: ΔW.
            config: strengths.
            scale: root mean square of W0, read only with ``config.scale_free``.
            layers: number of guarded matrices, the same.
        """
        terms: dict[str, Tensor] = {}
        if config.lambda_alignment:
            terms["alignment"] = config.lambda_alignment * self.alignment(delta)
        if not (config.lambda_task or config.lambda_collision):
            return terms
        part, rest = self.projector.split(delta)
        share = 1.0
        if config.scale_free:
            part, rest, share = part / scale, rest / scale, 1.0 / layers
        reduction = "mean" if config.scale_free else "sum"
        if config.lambda_task:
            squared = rest.square().sum() if isinstance(rest, Tensor) else rest.squared_norm()
            size = delta.shape[-2] * delta.shape[-1] if config.scale_free else 1
            terms["task"] = config.lambda_task * share * squared / size
        if config.lambda_collision:
            if config.alpha > 0:
                overlap = fg.riemannian_overlap(part, rest, beta=config.beta, tau=config.tau, reduction=reduction)
                terms["overlap"] = config.lambda_collision * config.alpha * share * overlap
            if config.alpha < 1:
                separation = fg.geodesic_separation(part, rest, metric=config.metric)
                terms["separation"] = config.lambda_collision * (1 - config.alpha) * share * separation
        return terms

    def cosine(self, delta: Update) -> Tensor:
        """How alike the inputs of the two parts are, in [0, 1]."""
        part, rest = self.projector.split(delta)
        return fg.geodesic_separation(part, rest, metric="input-gram")

    def turned_from(self, before: LayerCurvature) -> float:
        """Mean principal angle between the leading subspaces of two estimates, in degrees; 0 where one is empty."""
        new, old = self.projector.basis, before.projector.basis
        m = min(new.shape[1], old.shape[1])
        if m == 0:
            return 0.0
        return float(torch.rad2deg(fg.principal_angles(new[:, :m].to(old.dtype), old[:, :m]).mean()))
