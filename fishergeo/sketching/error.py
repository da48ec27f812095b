"""How far an approximation from below is from what it approximates, by random columns that were held back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import scipy.special
import torch
from torch import Tensor

from fishergeo._checks import check_number
from fishergeo.operators import SpectralOperator, checked_rank


@dataclass(frozen=True)
class ErrorEstimate:
    """How far an approximation F̂ ≤ F is from F. Every bound marked so holds with the probability asked for.

    Hutchinson (1990) for the unbiased estimates; the bounds are this project's own derivation, from the least favourable
    error of rank one, see :func:`fishergeo.sketching.error.probe_error`. All in the unit of F, but for the last two.

    Attributes:
        spectral: bound on ‖F − F̂‖₂ from the probes.
        frobenius: unbiased estimate of ‖F − F̂‖_F, by its square.
        trace: tr(F) − tr(F̂): exact where the trace of F was given, else an unbiased estimate.
        trace_bound: bound on tr(F) − tr(F̂), and so on ‖F − F̂‖₂ too; equal to ``trace`` where that is exact.
        energy: bound from below on the captured share tr(F̂)/tr(F), in [0, 1].
        level: the probability.

    Examples:
        >>> F = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64))
        >>> error = fg.nystrom(F, 4, probes=2).error()
        >>> abs(error.trace) < 1e-9, error.energy > 0.99
        (True, True)
    """

    spectral: float
    frobenius: float
    trace: float
    trace_bound: float
    energy: float
    level: float


def check_trace(trace: float, held: float, eps: float, columns: int = 0, name: str = "") -> None:
    """Refuse a trace of F that is less than that of some F̂ ≤ F, from which every bound would come out as zero.

    Args:
        trace: tr(F), as the caller has it.
        held: tr(F̂).
        eps: rounding unit of the products that F̂ was made of; the two traces may differ by a rounding.
        columns: columns of a sketch, each of which may add the shift that keeps its factorisation positive.
        name: name of the layer.

    Raises:
        ValueError: for such a trace, NaN or infinity.
    """
    if not held * (1 - max(1e-5, eps**0.5, min(0.1, 10 * columns * eps))) <= trace < math.inf:
        where = f"layer {name!r}: " if name else ""
        raise ValueError(
            f"{where}trace must be finite and at least {held:.6g}, the sum of the eigenvalues that were found, got "
            f"{trace:.6g}; pass the trace of the whole operator, or none"
        )


def probe_error(
    differences: Tensor, probes: Tensor, known: float, trace: float | None = None, level: float = 0.95
) -> ErrorEstimate:
    """The error of F̂ from E·Z, with E = F − F̂ ⪰ 0 and Z Gaussian and independent of F̂.

    Spectral: ‖E z‖ ≥ ‖E‖·|g| with g standard normal, so the largest of s probes falls below ‖E‖·c with probability at
    most P(|g| < c)^s, for every E. Trace: Σ zᵀE z / s is a mean of weighted χ² variables, which is least likely to
    be large if E has rank one: tr E ≤ mean·s/χ²_s(1 − level).

    Args:
        differences: E·Z, (size, s).
        probes: Z, (size, s), standard Gaussian.
        known: tr(F̂).
        trace: tr(F), where it is known exactly.
        level: probability of the bounds, each by itself.

    Returns:
        ErrorEstimate.
    """
    count = probes.shape[1]
    images, z = differences.double(), probes.double()
    lengths = torch.linalg.vector_norm(images, dim=0)
    smallest = scipy.special.ndtri((1 + (1 - level) ** (1 / count)) / 2)
    spectral = float(lengths.max()) / smallest
    mean = max(0.0, float((z * images).sum() / count))
    bound = mean * count / scipy.special.chdtri(count, level)
    missing = mean if trace is None else max(0.0, trace - known)
    bound = bound if trace is None else missing
    whole = known + bound
    return ErrorEstimate(
        # Only a bound that is certain may be combined: two that hold with 95 % each hold together with 90 %.
        spectral=spectral if trace is None else min(spectral, bound),
        frobenius=float(lengths.square().mean().sqrt()),
        trace=missing,
        trace_bound=bound,
        energy=known / whole if whole > 0 else 1.0,
        level=level,
    )


def factor_error(
    values: Tensor,
    vectors: Tensor,
    probes: Tensor,
    images: Tensor,
    trace: float | None = None,
    level: float = 0.95,
    k: int | None = None,
    eps: float = 0.0,
) -> ErrorEstimate:
    """The error of F̂ = U diag(λ) Uᵀ, known by its eigenpairs and cut to k of them, from F·Z.

    Args:
        values: λ, (m,), descending.
        vectors: U, (size, m).
        probes: Z, (size, s), standard Gaussian and independent of F̂.
        images: F·Z, (size, s).
        trace: tr(F), where it is known exactly.
        level: probability of the bounds, in [0.5, 1).
        k: pairs of F̂, all if left out.
        eps: rounding unit of the products, where they were made in a lower precision than that of ``images``.

    Returns:
        ErrorEstimate.

    Raises:
        ValueError: if there are no probes, level is out of range, or the trace is less than the sum of all values.
    """
    check_number("level", level, low=0.5, high=1 - 1e-9)
    if not probes.shape[1]:
        raise ValueError("probes=0: no columns were held back to measure the error with")
    if trace is not None:
        check_trace(trace, float(values.double().sum()), max(eps, torch.finfo(images.dtype).eps), len(values))
    u, z, known = vectors[:, :k].double(), probes.double(), values[:k].double()
    return probe_error(images.double() - u @ (known[:, None] * (u.T @ z)), z, float(known.sum()), trace, level)


class SketchOperator(SpectralOperator):
    """The leading pairs of F̂ ≤ F, with an estimate of F − F̂ where the estimate held probes back.

    F̂ is a one-pass Nyström approximation (Tropp et al. 2017); the estimate's bounds are those of
    :class:`fishergeo.ErrorEstimate`.

    Args:
        values: (k,), descending.
        vectors: (size, k), orthonormal columns, of the dtype of the sums, float32 or float64.
        full_trace: tr(F), exact, a scalar tensor.
        side: side of a layer's weight that the matrix stands for, see :class:`SymmetricOperator`.
        probes: Z, (size, s), standard Gaussian and independent of ``vectors``; no columns if the error is not asked
            for.
        images: F·Z, (size, s).
        factor: V with V Vᵀ the whole of the sketch, (size, columns), of which ``vectors`` are the leading directions;
            None where it was not kept. :func:`fishergeo.second_pass` starts from all of it.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> batches = [(torch.eye(3), torch.zeros(3, 2))]
        >>> def loss(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().sum(1)
        ...
        >>> sketch = fg.estimate_fisher(model, batches, rank=2, loss=loss)[""]
        >>> torch.allclose(sketch.full_trace, sketch.trace())  # the whole of a (2, 2) F is known
        True
    """

    full_trace: Tensor

    def __init__(
        self,
        values: Tensor,
        vectors: Tensor,
        full_trace: Tensor,
        side: str,
        probes: Tensor,
        images: Tensor,
        factor: Tensor | None = None,
    ) -> None:
        super().__init__(values, vectors, full_trace, side)
        self._probes = probes
        self._images = images
        self.factor = factor

    def tensors(self) -> dict[str, Tensor]:
        """Those of a :class:`SpectralOperator`, ``probes`` and ``images``, (size, s), and ``factor``, (size, columns),
        where it was kept.
        """
        kept = {} if self.factor is None else {"factor": self.factor}
        return super().tensors() | {"probes": self._probes, "images": self._images} | kept

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], side: str = "output") -> Self:
        """The operator whose :meth:`tensors` these were; see :meth:`SymmetricOperator.from_tensors`."""
        values, vectors, trace = tensors["eigenvalues"], tensors["eigenvectors"], tensors["full_trace"]
        return cls(values, vectors, trace, side, tensors["probes"], tensors["images"], tensors.get("factor"))

    def compact(self) -> SpectralOperator:
        """The leading pairs alone, contiguous, without what the error is measured with."""
        values, vectors = self.values.contiguous(), self.vectors.contiguous()
        return SpectralOperator(values, vectors, self.full_trace, self.side)

    def error(self, k: int | None = None, level: float = 0.95) -> ErrorEstimate:
        """How far F̂, cut to its k leading pairs, is from the F of all data seen.

        Args:
            k: pairs, all known ones if left out.
            level: probability of the bounds, in [0.5, 1).

        Returns:
            ErrorEstimate; its trace is exact.

        Raises:
            ValueError: if the estimate was made without ``probes``, for arguments out of range, or a ``full_trace`` that
                is less than the sum of the values.
        """
        k = checked_rank(k, len(self.values))
        if not self._probes.shape[1]:
            raise ValueError("this sketch held no columns back to measure its error with; estimate it with probes=8")
        trace = float(self.full_trace)
        return factor_error(self.values, self.vectors, self._probes, self._images, trace, level, k)
