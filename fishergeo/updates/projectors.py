"""Projectors onto subspaces of a weight's output or input side, and the split of an update that they make.

An update ΔW (..., p, q) is split into ΔW_A = PΔW and ΔW_T = ΔW − ΔW_A. P acts on one factor of a LowRank, so both
parts keep its rank, and no p×p matrix is formed.
"""

from collections.abc import Sequence
from typing import Any, Self, overload

import torch

from fishergeo._checks import (
    check_basis,
    check_broadcast,
    check_choice,
    check_finite,
    check_not_negative,
    check_number,
    check_same_kind,
    check_tensor,
)
from fishergeo.updates.lowrank import LowRank, as_update

SIDES = ("output", "input")


def _check_for_columns(name: str, value: object, basis: torch.Tensor) -> torch.Tensor:
    """Return `value` if it holds one finite number for each column of the basis, of its dtype and device."""
    if isinstance(value, torch.Tensor) and value.ndim and value.shape[-1] == 0 == basis.shape[-1]:
        return value
    checked = check_tensor(name, value, min_dim=1)
    check_same_kind(name, checked, "basis", basis)
    check_finite(name, checked)
    if checked.shape[-1] != basis.shape[-1]:
        raise ValueError(f"{name} has {checked.shape[-1]} entries for a basis of {basis.shape[-1]} columns")
    check_broadcast(name, checked.shape[:-1], "basis", basis.shape[:-2])
    return checked


class SubspaceMap:
    """What all projectors share: a linear map P on updates, its application and the split it makes."""

    def apply(self, delta: LowRank | torch.Tensor) -> LowRank | torch.Tensor:
        """Return P applied to an update, of the same shape and kind.

        Args:
            delta: LowRank or dense tensor (..., p, q) of the basis' dtype and device.

        Raises:
            TypeError: not an update, or of another dtype than the basis.
            ValueError: the side that P acts on has another size, or another device.
        """
        return self.split(delta)[0]

    __call__ = apply

    @overload
    def split(self, delta: LowRank) -> tuple[LowRank, LowRank]: ...
    @overload
    def split(self, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def split(self, delta: Any) -> tuple[Any, Any]:
        """Return (part, rest) = (PΔ, Δ − PΔ), each of the same shape and kind as `delta`.

        Args:
            delta: LowRank or dense tensor (..., p, q) of the basis' dtype and device.

        Raises:
            TypeError: not an update, or of another dtype than the basis.
            ValueError: the side that P acts on has another size, or another device.
        """
        raise NotImplementedError

    @property
    def complement(self) -> "Complement":
        """The map I − P, formed without a matrix."""
        return Complement(self)


class Complement(SubspaceMap):
    """I − P for a projector P, the complement by definition; its split is P's with the parts exchanged.

    Args:
        of: the projector P.

    Examples:
        >>> P = fg.Projector(torch.eye(3)[:, :1])
        >>> part, rest = P.complement.split(torch.ones(3, 2))
        >>> part[:, 0].tolist()
        [0.0, 1.0, 1.0]
    """

    def __init__(self, of: SubspaceMap) -> None:
        self.of = of

    def __repr__(self) -> str:
        return f"Complement({self.of!r})"

    def split(self, delta: Any) -> tuple[Any, Any]:
        """Return ((I − P)Δ, PΔ) of the update `delta`; see `Projector.split`."""
        part, rest = self.of.split(delta)
        return rest, part

    @property
    def complement(self) -> SubspaceMap:  # type: ignore[override]
        """P itself."""
        return self.of


class SoftProjector(SubspaceMap):
    """S = U·diag(w)·Uᵀ with w in [0, 1]: protects each direction as far as its weight says.

    Between 0 and 1 the parts SΔ and (I − S)Δ are no longer orthogonal, so the paper's geodesic term means something.
    Akin to scaled gradient projection (Saha and Roy 2023, arXiv 2302.01386); its use on updates is this project's own.
    Weights come from the spectrum (`from_spectrum`), from resampling (`bootstrap_confidence`), or are the user's own.

    Args:
        basis: orthonormal columns, (..., p, m) for side="output", (..., q, m) for side="input"; leading dimensions
            are a batch that broadcasts against the update's.
        weights: shape (m,) or (..., m), in [0, 1], the basis' dtype and device.
        side: "output": ΔW → SΔW; "input": ΔW → ΔW·S.

    Raises:
        TypeError: basis or weights are not floating tensors, or their dtypes differ.
        ValueError: the basis is not orthonormal or has NaN, weights lie outside [0, 1] or do not match its columns.

    Examples:
        >>> P = fg.SoftProjector(torch.eye(3)[:, :2], torch.tensor([1.0, 0.5]))
        >>> part, rest = P.split(torch.ones(3, 1))
        >>> part.flatten().tolist()
        [1.0, 0.5, 0.0]
    """

    def __init__(self, basis: torch.Tensor, weights: torch.Tensor, side: str = "output") -> None:
        self.basis = check_basis("basis", basis)
        self.side = check_choice("side", side, SIDES)
        self.weights = _check_for_columns("weights", weights, self.basis)
        if self.weights.numel() and not (self.weights.min() >= 0 and self.weights.max() <= 1):
            low, high = self.weights.min().item(), self.weights.max().item()
            raise ValueError(f"weights must lie in [0, 1], they span [{low:.3g}, {high:.3g}]")

    @staticmethod
    def from_spectrum(
        basis: torch.Tensor, values: torch.Tensor, epsilon: float, side: str = "output"
    ) -> "SoftProjector":
        """Weights λ/(λ + ε), the ridge filter of a curvature's eigenvalues: one half where λ = ε.

        Args:
            basis: eigenvectors, (..., p, m).
            values: eigenvalues, (..., m), not negative.
            epsilon: ε > 0 in the eigenvalues' unit.
            side: side, as in the constructor.

        Raises:
            TypeError: basis or values are not floating tensors, their dtypes differ, or ε is not a number.
            ValueError: negative eigenvalues, ε ≤ 0, or a basis that is not orthonormal.
        """
        checked = _check_for_columns("values", values, check_basis("basis", basis))
        if check_number("epsilon", epsilon, low=0) == 0:
            raise ValueError("epsilon must be positive, got 0")
        check_not_negative("values", checked)
        return SoftProjector(basis, checked / (checked + epsilon), side)

    @classmethod
    def stacked(cls, projectors: Sequence["SoftProjector"]) -> "SoftProjector":
        """One projector with a batch dimension in the place of several, which may be of different ranks.

        Narrower bases are filled up with columns of zeros and weight 0, which leaves every S as it is.

        Args:
            projectors: at least one, without batch, of one number of rows, side, dtype and device.

        Returns:
            SoftProjector of basis (L, p, m), m the largest rank. Nothing is copied where there is only one.

        Raises:
            TypeError: the dtypes differ.
            ValueError: no projector, one with a batch, or other rows, sides or devices.
        """
        if not projectors:
            raise ValueError("projectors is empty: at least one is needed")
        first = projectors[0]
        for each in projectors:
            check_same_kind("a projector's basis", each.basis, "the first one's", first.basis)
            if each.basis.ndim != 2 or len(each.basis) != len(first.basis) or each.side != first.side:
                raise ValueError(f"{each!r} and {first!r} do not stack: one batch-free shape and side are needed")
        if len(projectors) == 1:
            return SoftProjector._made(first.basis[None], first.weights[None], first.side)
        rank = max(each.rank for each in projectors)
        basis = first.basis.new_zeros(len(projectors), len(first.basis), rank)
        weights = first.weights.new_zeros(len(projectors), rank)
        for place, each in enumerate(projectors):
            basis[place, :, : each.rank] = each.basis
            weights[place, : each.rank] = each.weights
        return SoftProjector._made(basis, weights, first.side)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(basis={tuple(self.basis.shape)}, side={self.side!r})"

    @property
    def rank(self) -> int:
        """Number m of directions."""
        return self.basis.shape[-1]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The projector moved or cast as by `torch.Tensor.to`, without checking it a second time."""
        return self._made(self.basis.to(*args, **kwargs), self.weights.to(*args, **kwargs), self.side)

    def to_dense(self) -> torch.Tensor:
        """The matrix S, (..., p, p); for tests and small sizes."""
        return (self.basis * self.weights.unsqueeze(-2)) @ self.basis.mT

    def _weighted(self, coefficients: torch.Tensor) -> torch.Tensor:
        return coefficients * self.weights.unsqueeze(-2)

    def _apply_left(self, matrix: torch.Tensor) -> torch.Tensor:
        # (XᵀU wUᵀ)ᵀ: with the few columns of a factor as rows on the left, BLAS takes a third of the time.
        return (self._weighted(matrix.mT @ self.basis) @ self.basis.mT).mT

    def split(self, delta: Any) -> tuple[Any, Any]:
        """Return (part, rest) = (SΔ, Δ − SΔ), or (ΔS, Δ − ΔS) for side="input", each of the kind of `delta`.

        A LowRank keeps its rank and the factor on the other side.

        Args:
            delta: LowRank or dense tensor (..., p, q) of the basis' dtype and device.

        Raises:
            TypeError: not an update, or of another dtype than the basis.
            ValueError: the side that the projector acts on has another size, or another device.
        """
        delta = as_update("delta", delta)
        check_same_kind("delta", delta, "the projector's basis", self.basis)
        axis = -2 if self.side == "output" else -1
        if delta.shape[axis] != self.basis.shape[-2]:
            raise ValueError(
                f"delta has shape {tuple(delta.shape)}, but the basis has {self.basis.shape[-2]} rows and acts on the "
                f"{self.side} side, of size {delta.shape[axis]}"
            )
        check_broadcast("delta", delta.shape[:-2], "the projector's basis", self.basis.shape[:-2])
        if self.side == "input":
            part, rest = self._made(self.basis, self.weights, "output").split(delta.mT)
            return part.mT, rest.mT
        if isinstance(delta, LowRank):
            left = self._apply_left(delta.left)
            return LowRank(left, delta.right), LowRank(delta.left - left, delta.right)
        dense = self._apply_left(delta)
        return dense, delta - dense

    @classmethod
    def _made(cls, basis: torch.Tensor, weights: torch.Tensor, side: str) -> Self:
        """A projector whose parts need no check, being those of checked ones."""
        twin = object.__new__(cls)
        twin.basis, twin.weights, twin.side = basis, weights, side
        return twin


class Projector(SoftProjector):
    """The orthogonal projector P = UUᵀ onto the span of `basis` (AlignGuard-LoRA, arXiv 2508.02079, sec. 4).

    Args:
        basis: orthonormal columns, (..., p, m) for side="output", (..., q, m) for side="input", any floating dtype;
            leading dimensions are a batch that broadcasts against the update's. m may be 0 (nothing is protected) or p (everything is).
        side: "output": ΔW → PΔW; "input": ΔW → ΔW·P.

    Raises:
        TypeError: the basis is not a floating tensor.
        ValueError: the basis is not orthonormal (the defect is printed), has NaN, or more columns than rows.

    Examples:
        >>> P = fg.Projector(torch.eye(3)[:, :1])
        >>> part, rest = P.split(fg.LowRank(torch.ones(3, 1), torch.ones(1, 2)))
        >>> part.to_dense().tolist()
        [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
        >>> float(part.inner(rest))
        0.0
    """

    def __init__(self, basis: torch.Tensor, side: str = "output") -> None:
        self.basis = check_basis("basis", basis)
        self.side = check_choice("side", side, SIDES)
        self.weights = self.basis.new_ones(self.basis.shape[-1])

    def _weighted(self, coefficients: torch.Tensor) -> torch.Tensor:
        return coefficients
