"""Curvature of one matrix: its Fisher and the projector on its leading output directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import fishergeo as fg
from alignguard.guard.config import GuardConfig
from alignguard.updates import Matrix

WIDEST = 16384  # most outputs of a matrix whose output side is held whole


@dataclass(frozen=True)
class LayerCurvature:
    """Fisher of one matrix; the leading directions of its output side are found when first asked for.

    The choice of directions is that of AlignGuard-LoRA (arXiv 2508.02079, section 4).

    Attributes:
        operator: the estimate, (p, p) or (pq, pq), its tensors contiguous.
        config: energy, rank and projection.
        samples: supervised tokens that the estimate is made of; None where they are unknown.
    """

    operator: Any
    config: GuardConfig
    samples: int | None = None

    @property
    def _output(self) -> Any:
        return self.operator.factors()[0]

    @cached_property
    def total(self) -> float:
        """Trace of the output side, so that ``values.sum() / total`` is the energy held."""
        full = getattr(self._output, "full_trace", None)
        return float(self._output.trace() if full is None else full)

    @cached_property
    def _leading(self) -> tuple[Tensor, fg.SoftProjector]:
        """The leading eigenvectors that hold ``energy`` of the trace, at most ``max_rank``, perhaps above noise alone.

        With ``projection="soft"`` all known ones, each with the weight λ/(λ + ε), ε the last eigenvalue that the hard
        projector would have held, which so weighs one half.
        """
        output, c = self._output, self.config
        if isinstance(output, Tensor) and c.projection == "hard" and not c.noise_edge:  # no other pair is asked for
            values, vectors = fg.leading_eigenpairs(output, energy=c.energy, total=self.total, most=c.max_rank)
            return values, fg.Projector(vectors)
        if isinstance(output, Tensor):
            values, vectors = (found.flip(-1) for found in torch.linalg.eigh(output))
        else:  # those it knows: the rest of a sketched factor has no directions
            values, vectors = output.known_eigenpairs()
        values = values.clamp_min(0)  # rounding leaves tiny negative ones
        m = min(
            fg.rank_for_energy(values, energy=c.energy, total=self.total), c.max_rank or len(values), vectors.shape[1]
        )
        if c.noise_edge:
            m = min(m, self._above_noise(values))
        if c.projection == "soft" and m > 0 and float(values[m - 1]) > 0:
            return values, fg.SoftProjector.from_spectrum(vectors.contiguous(), values, float(values[m - 1]))
        return values[:m], fg.Projector(vectors[:, :m].contiguous())

    def _above_noise(self, values: Tensor) -> int:
        """How many eigenvalues stand above the edge of noise.

        A sketch does not know the median, so the noise's variance is that of all that does not stand above the edge,
        which depends on it: the smallest such set is found from below.
        """
        if self.samples is None:
            raise ValueError("noise_edge needs the number of tokens that the Fisher was made of; leave it off")
        size = self._output.shape[-1]
        if len(values) >= min(self.samples, size):
            return fg.rank_by_noise_edge(values, self.samples, size)
        m, above = -1, 0
        while m < above < len(values):
            m = above
            variance = max(self.total - float(values[:m].sum()), 0.0) / (size - m)
            above = fg.rank_by_noise_edge(values, self.samples, size, variance)
        return above

    @property
    def values(self) -> Tensor:
        """The eigenvalues of the projector's directions, (m,), descending, in the operator's dtype."""
        return self._leading[0]

    @property
    def projector(self) -> fg.SoftProjector:
        """On eigenvectors of the output side, m of them."""
        return self._leading[1]

    def turned_from(self, old: Tensor) -> float:
        """Mean principal angle to the span of an earlier estimate's leading directions, in degrees.

        Args:
            old: orthonormal columns, (p, m') of the same p, any floating dtype.

        Returns:
            Over the first min(m, m') of both; 0 where one is empty.
        """
        new = self.projector.basis
        m = min(new.shape[1], old.shape[1])
        if m == 0:
            return 0.0
        return float(torch.rad2deg(fg.principal_angles(new[:, :m].to(old.dtype), old[:, :m]).mean()))

    def summary(self) -> dict[str, Any]:
        """Leading eigenvalues, trace, rank and share of energy, as JSON."""
        held = float(self.values.sum()) / self.total if self.total > 0 else 0.0
        return {"values": self.values.tolist(), "total": self.total, "rank": len(self.values), "energy": held}


def check_widths(matrices: Iterable[Matrix], config: GuardConfig) -> None:
    """Refuse matrices whose output side would not fit in memory.

    Raises:
        ValueError: naming the matrix.
    """
    for matrix in matrices:
        if not config.structure.endswith("sketch") and matrix.shape[0] > WIDEST:
            raise ValueError(
                f"{matrix.plain} has {matrix.shape[0]} outputs, and structure={config.structure!r} would hold the square "
                f"of that; take structure='kfac-sketch', or exclude={matrix.excludable!r}"
            )


def curvatures(
    fisher: Mapping[str, Any], matrices: Iterable[Matrix], config: GuardConfig, samples: int | None = None
) -> dict[str, LayerCurvature]:
    """Curvature of every matrix from a Fisher.

    Args:
        fisher: operator by name, of captured layers or of matrices with or without what peft puts around them.
        matrices: what is guarded.
        config: rank and projection.
        samples: supervised tokens that the Fisher is made of, where they are known.

    Raises:
        ValueError: a matrix has no operator in it, or one of another shape.
    """
    layers = {}
    for matrix in matrices:
        key = next((name for name in (matrix.layer, matrix.name, matrix.plain) if name in fisher), None)
        if key is None:
            raise ValueError(f"the Fisher holds no {matrix.plain!r}; it has {', '.join(list(fisher)[:4])}, ...")
        operator, (p, q) = fisher[key], matrix.shape
        size = p * q if operator.side == "both" else p
        if operator.side == "input" or operator.shape[0] != size:
            raise ValueError(
                f"the Fisher of {matrix.plain!r} has shape {operator.shape} on the {operator.side} side, the matrix "
                f"{matrix.shape}; it is of another model, or not of the output side"
            )
        layers[matrix.name] = LayerCurvature(operator.compact(), config, samples)
    return layers
