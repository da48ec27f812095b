"""The penalty's curvature terms, matrices of one shape together: with small matrices most time would go into calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fishergeo as fg
from alignguard.guard.config import GuardConfig
from alignguard.guard.layer_curvature import LayerCurvature
from alignguard.updates import Matrix, Update, WeightUpdates

LARGEST = 1 << 22  # entries of a soft projector's stacked bases, which hold all p eigenvectors: a few tens of MB


@dataclass(frozen=True)
class TermGroup:
    """L matrices of one shape (p, q) whose updates are read together.

    Split and terms are those of AlignGuard-LoRA (arXiv 2508.02079, section 4), the KFAC form of the alignment term that
    of Chen and Garner (2024, arXiv 2402.12220). ``delta`` is everywhere the stack of ΔW, a ``LowRank`` or a tensor
    (L, p, q), float32 or wider.

    Attributes:
        layers: curvature of each; operators of one kind, dtype and device.
        config: strengths.
        scales: root mean square of each W0, read only with ``scale_free``.
        weight: 1 over the number of all guarded matrices, read only with ``scale_free``.
    """

    layers: Sequence[LayerCurvature]
    config: GuardConfig
    scales: Sequence[float] = ()
    weight: float = 1.0

    @cached_property
    def projector(self) -> fg.SoftProjector:
        """On eigenvectors of the output sides, (L, p, m) with the widest m."""
        return fg.SoftProjector.stacked([layer.projector for layer in self.layers])

    @cached_property
    def spectrum(self) -> Tensor:
        """w_j² λ_j of the projector's directions, (L, m)."""
        values = torch.zeros_like(self.projector.weights)
        for row, layer in zip(values, self.layers, strict=True):
            row[: len(layer.values)] = layer.values
        return values * self.projector.weights.square()

    def alignment(self, delta: Update) -> Tensor:
        """‖F^½ ΔW‖², or ‖F^½ ΔW_A‖² without ``whole_update``: P's columns are eigenvectors of S, so Σ_j w_j² λ_j u_jᵀΔW C ΔWᵀu_j.

        (L,). C is the input factor of KFAC, sketched or not, the identity for the one-sided forms; O(p·m·r + q²·r) and O(p·m·r + q·r²) a
        matrix on factors, O(p·q·m + m·q²) and O(p·q·m) on a dense update. The whole update takes p in the place of m
        and needs no eigenvectors.
        """
        operators = [layer.operator for layer in self.layers]
        if self.config.whole_update:
            return fg.stacked_quadratic(operators, delta)
        basis = self.projector.basis.to(delta.dtype)
        right = (delta.mT @ basis).mT if isinstance(delta, Tensor) else delta.right
        factors = [operator.factors()[1] for operator in operators]
        if factors[0] is None:
            gram = right @ right.mT
        else:
            gram = fg.stacked_congruence(factors, right.to(factors[0].dtype)).to(delta.dtype)
        if isinstance(delta, Tensor):
            squares = gram.diagonal(dim1=-2, dim2=-1)  # (L, m)
        else:
            columns = delta.left.mT @ basis  # (L, r, m): Bᵀ u_j, and gram is symmetric
            squares = ((gram @ columns) * columns).sum(-2)
        return (squares * self.spectrum.to(delta.dtype)).sum(-1)

    def terms(self, delta: Update) -> dict[str, Tensor]:
        """Every curvature term of the penalty, summed over the group and unweighted by the drift budget.

        Args:
            delta: the stack of ΔW.

        Returns:
            Scalar tensors by name: ``alignment``, ``task``, ``overlap``, ``separation``, those with a strength above 0.
        """
        config, terms = self.config, dict[str, Tensor]()
        if config.lambda_alignment:
            terms["alignment"] = config.lambda_alignment * self.alignment(delta).sum()
        if not (config.lambda_task or config.lambda_collision):
            return terms
        reduction, share, size = "sum", 1.0, 1
        if config.scale_free:
            delta, reduction, share = self._scaled(delta), "mean", self.weight
            size = delta.shape[-2] * delta.shape[-1]
        part, rest = self.projector.to(delta.dtype).split(delta)
        if config.lambda_task:
            squared = rest.square().sum() if isinstance(rest, Tensor) else rest.squared_norm().sum()
            terms["task"] = config.lambda_task * share * squared / size
        if config.lambda_collision:
            if config.alpha > 0:
                overlap = fg.riemannian_overlap(part, rest, beta=config.beta, tau=config.tau, reduction=reduction)
                terms["overlap"] = config.lambda_collision * config.alpha * share * overlap.sum()
            if config.alpha < 1:
                separation = fg.geodesic_separation(part, rest, metric=config.metric)
                terms["separation"] = config.lambda_collision * (1 - config.alpha) * share * separation.sum()
        return terms

    def _scaled(self, delta: Update) -> Update:
        """ΔW over the root mean square of its W0."""
        scales = torch.tensor(self.scales, dtype=delta.dtype, device=delta.device)[:, None, None]
        return delta / scales if isinstance(delta, Tensor) else fg.LowRank(delta.left / scales, delta.right)

    def cosines(self, delta: Update) -> Tensor:
        """How alike the inputs of the two parts are, (L,) in [0, 1]; see :func:`fishergeo.geodesic_separation`."""
        part, rest = self.projector.to(delta.dtype).split(delta)
        return fg.geodesic_separation(part, rest, metric="input-gram")


class CurvatureTerms:
    """The curvature terms of all guarded matrices, for one estimate of the curvature.

    Args:
        updates: what is guarded and how ΔW is read.
        layers: curvature by matrix.
        config: strengths.
        scale: root mean square of a matrix's W0, asked for with ``scale_free``.
    """

    def __init__(
        self,
        updates: WeightUpdates,
        layers: Mapping[str, LayerCurvature],
        config: GuardConfig,
        scale: Callable[[Matrix], float],
    ) -> None:
        self.updates, self.layers, self.config, self.scale = updates, dict(layers), config, scale
        self._groups: dict[tuple[str, ...], TermGroup] = {}

    def terms(self) -> dict[str, Tensor]:
        """Every term at the present weights, differentiable scalars; see :meth:`TermGroup.terms`."""
        sums: dict[str, Tensor] = {}
        for group, read, dense in self._stacks():
            if dense and torch.is_grad_enabled():
                # A dense ΔW is as large as its weight: the graph keeps none, the backward pass forms each again.
                terms = checkpoint(
                    lambda group=group, read=read: group.terms(read()), use_reentrant=False, preserve_rng_state=False
                )
            else:
                terms = group.terms(read())
            for name, value in terms.items():
                sums[name] = sums[name] + value if name in sums else value
        return sums

    @torch.no_grad()
    def drift(self) -> float:
        """½ Σ tr(ΔWᵀFΔW) over the matrices."""
        parts = [
            fg.stacked_quadratic([layer.operator for layer in group.layers], read()).double().sum()
            for group, read, _ in self._stacks()
        ]
        return 0.5 * float(torch.stack(parts).sum())

    @torch.no_grad()
    def cosine(self) -> float:
        """Mean over matrices of :meth:`TermGroup.cosines`; 0 where there is no curvature yet."""
        if not self.layers:
            return 0.0
        return float(torch.cat([group.cosines(read()) for group, read, _ in self._stacks()]).mean())

    def _stacks(self) -> Iterator[tuple[TermGroup, Callable[[], Update], bool]]:
        """Groups, how to read the stack of their updates, and whether that is dense.

        Factors are small and stacked with those of other matrices; a dense ΔW stays alone and is read when it is asked
        for. The order depends on the matrices alone, so that a resumed run sums alike.

        Raises:
            RuntimeError: other adapters are active than when the guard was made.
        """
        self.updates.check_active()
        factored: dict[Any, list[tuple[Matrix, fg.LowRank]]] = defaultdict(list)
        for matrix in self.updates.matrices.values():
            if matrix.rank is None:
                yield self._group((matrix,)), lambda matrix=matrix: matrix.read()[None], True  # type: ignore[misc]
                continue
            delta = matrix.read()
            assert isinstance(delta, fg.LowRank)
            operator = self.layers[matrix.name].operator
            kind = type(operator), operator.dtype, operator.device
            factored[(delta.shape, delta.rank, delta.dtype, delta.device, *kind)].append((matrix, delta))
        for members in factored.values():
            most = max(1, LARGEST // members[0][0].shape[0] ** 2) if self.config.projection == "soft" else len(members)
            for start in range(0, len(members), most):
                matrices, deltas = zip(*members[start : start + most], strict=True)
                yield self._group(matrices), lambda deltas=deltas: _stack(deltas), False  # type: ignore[misc]

    def _group(self, matrices: Sequence[Matrix]) -> TermGroup:
        names = tuple(matrix.name for matrix in matrices)
        if names not in self._groups:
            scales = [self.scale(matrix) for matrix in matrices] if self.config.scale_free else []
            layers = [self.layers[name] for name in names]
            self._groups[names] = TermGroup(layers, self.config, scales, 1 / len(self.updates.matrices))
        return self._groups[names]


def _stack(deltas: Sequence[fg.LowRank]) -> fg.LowRank:
    return fg.LowRank(torch.stack([delta.left for delta in deltas]), torch.stack([delta.right for delta in deltas]))
