"""What a one-pass sketch gives as an operator: its eigenpairs, and how far they are from all that was seen."""

from __future__ import annotations

from torch import Tensor

from fishergeo.operators import SpectralOperator, checked_rank
from fishergeo.sketch_error import ErrorEstimate, factor_error


class SketchOperator(SpectralOperator):
    """The leading pairs of F̂ ≤ F, with an estimate of F − F̂ where the estimate held probes back.

    F̂ is a one-pass Nyström approximation (Tropp et al. 2017); the estimate's bounds are those of
    :class:`fishergeo.ErrorEstimate`.

    Args:
        values: (k,), descending.
        vectors: (size, k), orthonormal columns, of the dtype of the sums, float32 or float64.
        full_trace: tr(F), exact, a scalar tensor.
        side: see :class:`SymmetricOperator`.
        probes: Z, (size, s), standard Gaussian and independent of ``vectors``; no columns if the error is not asked
            for.
        images: F·Z, (size, s).

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
        self, values: Tensor, vectors: Tensor, full_trace: Tensor, side: str, probes: Tensor, images: Tensor
    ) -> None:
        super().__init__(values, vectors, full_trace, side)
        self._probes = probes
        self._images = images

    def error(self, k: int | None = None, level: float = 0.95) -> ErrorEstimate:
        """How far F̂, cut to its k leading pairs, is from the F of all data seen.

        Args:
            k: pairs, all known ones if left out.
            level: probability of the bounds, in [0.5, 1).

        Returns:
            ErrorEstimate; its trace is exact.

        Raises:
            ValueError: if the estimate was made without ``probes``, or for arguments out of range.
        """
        k = checked_rank(k, len(self.values))
        if not self._probes.shape[1]:
            raise ValueError("this sketch held no columns back to measure its error with; estimate it with probes=8")
        trace = float(self.full_trace)
        return factor_error(self.values[:k], self.vectors[:, :k], self._probes, self._images, trace, level)
