"""What an eigensolver found, and what it promises about it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from fishergeo._checks import (
    check_descending,
    check_integer,
    check_number,
)
from fishergeo.operators import SpectralOperator


@dataclass(frozen=True)
class Spectrum:
    """Eigenpairs with certificates: the residual bound of Parlett (1998), and from it that of Kato and Temple.

    Tensors are float32 or float64, as the solver computed.

    Attributes:
        values: (k,), the wanted end of the spectrum first: descending for ``which="largest"``.
        vectors: (size, k), orthonormal; each one's entry of largest magnitude is positive.
        residuals: (k,), upper bounds on ‖A v − θ v‖: the computed residual and an allowance for the rounding of one
            product. Some eigenvalue of A lies within ``residuals[i]`` of ``values[i]``.
        pairs_converged: (k,) bool, which pairs meet the tolerance that was asked for.
        passes: applications of the operator to a block of at most ``block`` columns, each one pass over the data of a
            streamed operator, all of them counted.
        columns: columns multiplied in all of these passes.
        stopped: ``"tolerance"``, ``"energy"``, ``"passes"`` (the allowance ran out) or ``"stalled"`` (nothing is left
            to try: the products are noisier than the tolerance).

    Examples:
        >>> found = fg.lanczos(torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)), 2)
        >>> [round(v, 6) for v in found.values.tolist()], found.converged
        ([3.0, 2.0], True)
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    pairs_converged: Tensor
    passes: int
    columns: int
    stopped: str

    @property
    def converged(self) -> bool:
        """Whether every returned pair meets the tolerance."""
        return bool(self.pairs_converged.all())

    @property
    def satisfied(self) -> bool:
        """Whether the solver stopped because it had what was asked for."""
        return self.stopped == "energy" or (self.stopped == "tolerance" and self.converged)

    def value_bounds(self) -> Tensor:
        """Bounds on |θ_i − λ_i|, (k,): min(r, r²/gap), the Kato-Temple bound, where the gap allows it.

        The gap of a pair is its distance to the nearest other returned value, less that one's residual. Kato and Temple
        ask that no other eigenvalue lies in it. That is taken for granted where the pair and its neighbours have
        converged, and holds unless an eigenvalue of a cluster was missed, as a narrow block may; elsewhere, and for
        the last pair, of which nothing is known that follows, the bound is r, which is certain. Values of both signs
        that fall by magnitude may be those of ``which="magnitude"``: what was not returned then lies anywhere up to the
        last one's magnitude, so the gap ends there too, and all pairs must have converged.

        Returns:
            (k,), at most ``residuals``.
        """
        bounds = self.residuals.clone()
        sizes = self.values.abs()
        signs = bool((self.values > 0).any()) and bool((self.values < 0).any())
        mixed = signs and bool((sizes[1:] <= sizes[:-1]).all())
        for i in range(len(self.values) - 1):
            if not bool(self.pairs_converged[slice(None) if mixed else slice(max(i - 1, 0), i + 2)].all()):
                continue
            gaps = (self.values[i] - self.values).abs() - self.residuals
            gaps[i] = sizes[i] - sizes[-1] - self.residuals[-1] if mixed else torch.inf
            gap = float(gaps.min())
            if gap > float(self.residuals[i]):
                bounds[i] = torch.minimum(bounds[i], self.residuals[i].square() / gap)
        return bounds

    def operator(self, full_trace: Tensor | None = None, side: str = "output") -> SpectralOperator:
        """V diag(θ) Vᵀ as an operator, its largest pair first whichever end of the spectrum was wanted.

        Args:
            full_trace: scalar tensor, the trace of the whole, where known.
            side: side of a layer's weight that the matrix stands for, see :class:`fishergeo.SymmetricOperator`.
        """
        order = self.values.argsort(descending=True, stable=True)
        return SpectralOperator(self.values[order], self.vectors[:, order], full_trace, side)


class ConvergenceWarning(UserWarning):
    """An eigensolver stopped before it had what was asked for.

    Examples:
        >>> import warnings
        >>> A = torch.diag(torch.linspace(1, 2, 200, dtype=torch.float64))
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     found = fg.lanczos(A, 2, tol=1e-12, max_passes=2)
        ...
        >>> caught[0].category.__name__
        'ConvergenceWarning'
    """


class ConvergenceError(RuntimeError):
    """The same, where ``strict=True`` was passed.

    Args:
        message: what has not converged, and what to allow for it.
        spectrum: what there is, with honest flags; kept as the attribute of that name.

    Examples:
        >>> A = torch.diag(torch.linspace(1, 2, 200, dtype=torch.float64))
        >>> try:
        ...     fg.lanczos(A, 2, tol=1e-12, max_passes=2, strict=True)
        ... except fg.ConvergenceError as error:
        ...     print(error.spectrum.converged)
        ...
        False
    """

    def __init__(self, message: str, spectrum: Spectrum) -> None:
        super().__init__(message)
        self.spectrum = spectrum


def enforce(spectrum: Spectrum, name: str, strict: bool) -> Spectrum:
    """Warns, or raises, where a spectrum is not what was asked for.

    Args:
        spectrum: spectrum to check.
        name: name of the layer, or empty.
        strict: raise rather than warn.

    Returns:
        The same spectrum.

    Raises:
        ConvergenceError: with ``strict``.
    """
    if spectrum.satisfied:
        return spectrum
    missing = int((~spectrum.pairs_converged).sum())
    where = f"layer {name!r}: " if name else ""
    message = (
        f"{where}{missing} of {len(spectrum.values)} eigenpairs have not converged after {spectrum.passes} passes "
        f"(stopped: {spectrum.stopped}); allow more with max_passes, a wider basis, or a larger tol"
    )
    if strict:
        raise ConvergenceError(message, spectrum)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
    return spectrum


def davis_kahan_bound(residual: float, gap: float) -> float:
    """Bound on the sine of the largest angle between computed and true eigenspace: min(1, ‖R‖/gap).

    The sin Θ theorem (Davis and Kahan 1970) for R = A·U − U·Ritz of an orthonormal U: the Ritz values lie in an
    interval, and every other eigenvalue of A is at least `gap` away from it.

    Args:
        residual: spectral norm ‖R‖, not negative; the Frobenius norm, which is larger, will do.
        gap: distance from the Ritz values to the rest of the spectrum, not negative; 0 bounds nothing.

    Returns:
        The bound in [0, 1].

    Raises:
        TypeError: not numbers.
        ValueError: negative or not finite.

    Examples:
        >>> fg.davis_kahan_bound(0.1, gap=0.5)
        0.2
    """
    residual, gap = check_number("residual", residual, low=0), check_number("gap", gap, low=0)
    return 1.0 if residual >= gap else residual / gap


def eigenspace_shift_bound(values: torch.Tensor, m: int, perturbation: float) -> float:
    """Bound on ‖sin Θ‖_F between the top-m eigenspaces of A and A + E: min(√m, 2√m·‖E‖/(λ_m − λ_{m+1})).

    The variant of Yu, Wang and Samworth (2015, thm. 2), which needs the gap of one of the two matrices only, as an
    estimate has it.

    Args:
        values: eigenvalues of A, (k,), descending, at least m + 1 of them.
        m: dimension of the eigenspace, at least 1.
        perturbation: spectral norm ‖E‖, not negative.

    Returns:
        The bound in [0, √m].

    Raises:
        TypeError: `values` is not a floating tensor, or another argument has the wrong type.
        ValueError: values that are not descending, or arguments out of range.

    Examples:
        >>> round(fg.eigenspace_shift_bound(torch.tensor([5.0, 1.0]), m=1, perturbation=0.2), 4)
        0.1
    """
    values = check_descending("values", values)
    m = check_integer("m", m, low=1, high=len(values) - 1)
    shift = 2 * check_number("perturbation", perturbation, low=0)
    gap = float(values[m - 1] - values[m])
    return m**0.5 * (1.0 if shift >= gap else shift / gap)
