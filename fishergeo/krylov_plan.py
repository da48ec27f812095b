"""What a run of the eigensolver is asked for, and the choices that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WHICH = ("largest", "smallest", "magnitude")


@dataclass(frozen=True)
class Plan:
    """What a run is asked for.

    Attributes:
        k: pairs.
        block: columns of a product.
        basis: most columns kept.
        tol: a pair has converged when ‖A v − θ v‖ ≤ tol·|θ|, or is at rounding level.
        which: end of the spectrum.
        energy: share of the trace at which to stop, or None.
        trace: gives the trace, where ``energy`` is set.
        max_passes: products allowed, those of the check included.
        recheck: multiply the final vectors once more.
        seed: of random directions.
    """

    k: int
    block: int
    basis: int
    tol: float
    which: str
    energy: float | None
    trace: Callable[[], float] | None
    max_passes: int
    recheck: bool
    seed: int

    def key(self, values: Tensor) -> Tensor:
        """What the wanted values have least of, (m,)."""
        return {"largest": -values, "smallest": values, "magnitude": -values.abs()}[self.which]

    def kept(self, key: Tensor, needed: int, norm: float) -> int:
        """How many Ritz vectors a restart keeps, so that convergence is fastest (Yamazaki et al. 2010).

        With m columns for further block steps of width b, errors fall like exp(−2·(m/b)·√γ), γ the gap from the last
        wanted value to the first that is dropped, relative to the rest of the spectrum. So a cluster is kept whole.

        Args:
            key: of all Ritz values, ascending.
            needed: columns that are to join at once.
            norm: of the operator.

        Returns:
            From k to what fits.
        """
        first, most = min(self.k, len(key)), min(self.basis - needed, len(key) - 1)
        counts = torch.arange(first, most + 1)
        gap = (key[counts] - key[first - 1]) / (key[-1] - key[counts]).clamp_min(1e-6 * norm)
        return int(counts[((self.basis - counts) * gap.sqrt()).argmax()])
