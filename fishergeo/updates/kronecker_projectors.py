"""Projectors onto pairs of an output and an input direction, as a Kronecker-factored Fisher A ⊗ S ranks them.

The eigenvectors of kron(S, A) are the pairs u_i v_jᵀ with eigenvalues σ_i·α_j. Protecting the span of the leading
output and the leading input directions is a rectangle of pairs; the truly leading pairs are a staircase within it.
"""

from typing import Any

import torch

from fishergeo._checks import (
    check_basis,
    check_broadcast,
    check_finite,
    check_integer,
    check_not_negative,
    check_same_kind,
    check_tensor,
)
from fishergeo.updates.lowrank import LowRank, as_update
from fishergeo.updates.projectors import SubspaceMap


def _check_update(delta: object, output_basis: torch.Tensor, input_basis: torch.Tensor) -> LowRank | torch.Tensor:
    update = as_update("delta", delta)
    check_same_kind("delta", update, "output_basis", output_basis)
    expected = (output_basis.shape[-2], input_basis.shape[-2])
    if tuple(update.shape[-2:]) != expected:
        raise ValueError(f"delta has shape {tuple(update.shape)}, but the bases are for matrices of {expected}")
    for name, basis in (("output_basis", output_basis), ("input_basis", input_basis)):
        check_broadcast("delta", update.shape[:-2], name, basis.shape[:-2])
    return update


class KroneckerProjector(SubspaceMap):
    """Δ → P_S·Δ·P_A with P_S = UUᵀ on the output and P_A = VVᵀ on the input side, this project's own two-sided split.

    Args:
        output_basis: U, orthonormal columns, (..., p, m).
        input_basis: V, orthonormal columns, (..., q, n), the same dtype and device.

    Raises:
        TypeError: a basis is not a floating tensor, or the dtypes differ.
        ValueError: a basis is not orthonormal or has NaN, or the devices differ.

    Examples:
        >>> part, rest = fg.KroneckerProjector(torch.eye(2)[:, :1], torch.eye(3)[:, :1]).split(torch.ones(2, 3))
        >>> part.tolist()
        [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """

    def __init__(self, output_basis: torch.Tensor, input_basis: torch.Tensor) -> None:
        self.output_basis = check_basis("output_basis", output_basis)
        self.input_basis = check_basis("input_basis", input_basis)
        check_same_kind("output_basis", self.output_basis, "input_basis", self.input_basis)
        check_broadcast("output_basis", self.output_basis.shape[:-2], "input_basis", self.input_basis.shape[:-2])

    def __repr__(self) -> str:
        return f"KroneckerProjector(output={tuple(self.output_basis.shape)}, input={tuple(self.input_basis.shape)})"

    def split(self, delta: Any) -> tuple[Any, Any]:
        """Return (P_S·Δ·P_A, the rest), of the kind of `delta`.

        A LowRank of rank r has a part of rank r and a rest of rank 2r: what P_S leaves of the left factor, and what
        P_A leaves of the right one.

        Args:
            delta: LowRank or dense tensor (..., p, q) of the bases' dtype and device.

        Raises:
            TypeError: not an update, or of another dtype than the bases.
            ValueError: not p×q, or on another device.
        """
        update = _check_update(delta, self.output_basis, self.input_basis)
        u, v = self.output_basis, self.input_basis
        if isinstance(update, LowRank):
            left, right = u @ (u.mT @ update.left), (update.right @ v) @ v.mT
            rest = LowRank(update.left - left, update.right) + LowRank(left, update.right - right)
            return LowRank(left, right), rest
        dense = u @ ((u.mT @ update @ v) @ v.mT)
        return dense, update - dense


class KroneckerMaskProjector(SubspaceMap):
    """Δ → U((UᵀΔV)∘M)Vᵀ: keeps the pairs (i, j) of directions that the mask M names, this project's own generalisation.

    Rows and columns of the mask without an entry are dropped at construction, so the cost is that of the directions
    in use.

    Args:
        output_vectors: U, orthonormal columns, (p, m).
        input_vectors: V, orthonormal columns, (q, n), the same dtype and device.
        mask: bool tensor (m, n), the pairs to keep.

    Raises:
        TypeError: vectors are not floating tensors, dtypes differ, or the mask is not a bool tensor.
        ValueError: vectors are not orthonormal, not two-dimensional or have NaN; shapes or devices do not match.

    Examples:
        >>> mask = torch.tensor([[True, False], [False, False]])
        >>> part, rest = fg.KroneckerMaskProjector(torch.eye(2), torch.eye(2), mask).split(torch.ones(2, 2))
        >>> part.tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """

    def __init__(self, output_vectors: torch.Tensor, input_vectors: torch.Tensor, mask: torch.Tensor) -> None:
        u, v = check_basis("output_vectors", output_vectors), check_basis("input_vectors", input_vectors)
        check_same_kind("output_vectors", u, "input_vectors", v)
        if u.ndim != 2 or v.ndim != 2:
            raise ValueError(f"output_vectors and input_vectors must be matrices, got {u.ndim} and {v.ndim} dimensions")
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != (u.shape[1], v.shape[1]):
            raise ValueError(f"mask has shape {tuple(mask.shape)}, the vectors ask for {(u.shape[1], v.shape[1])}")
        if mask.device != u.device:
            raise ValueError(f"mask is on {mask.device} but output_vectors is on {u.device}; move it with .to(device)")
        rows, columns = mask.any(1), mask.any(0)
        self.output_basis, self.input_basis = u[:, rows], v[:, columns]
        self.mask = mask[rows][:, columns]

    @classmethod
    def from_spectra(
        cls,
        output_values: torch.Tensor,
        output_vectors: torch.Tensor,
        input_values: torch.Tensor,
        input_vectors: torch.Tensor,
        pairs: int,
    ) -> "KroneckerMaskProjector":
        """The `pairs` pairs with the largest products σ_i·α_j: the leading eigenspace of kron(S, A).

        Args:
            output_values: σ, eigenvalues of S, (m,), not negative.
            output_vectors: their eigenvectors, (p, m).
            input_values: α, eigenvalues of A, (n,), not negative.
            input_vectors: their eigenvectors, (q, n).
            pairs: number to keep, from 0 to m·n. Of equal products at the edge, any may be kept.

        Raises:
            TypeError: an argument is not a floating tensor, dtypes differ, or `pairs` is not an int.
            ValueError: negative or NaN values, shapes that do not match, `pairs` out of range, or vectors that are
                not orthonormal.
        """
        for side, values, vectors in (
            ("output", output_values, output_vectors),
            ("input", input_values, input_vectors),
        ):
            columns = check_basis(f"{side}_vectors", vectors).shape[-1]
            check_same_kind(f"{side}_values", check_tensor(f"{side}_values", values), f"{side}_vectors", vectors)
            check_finite(f"{side}_values", values)
            check_not_negative(f"{side}_values", values)
            if values.shape != (columns,):
                raise ValueError(
                    f"{side}_values has shape {tuple(values.shape)}, expected one value for each of the {columns} "
                    f"columns of {side}_vectors"
                )
        check_same_kind("output_values", output_values, "input_values", input_values)
        # Their order is that of the values over their largest, whose products stay within float32's range.
        wide = [v.to(torch.promote_types(v.dtype, torch.float32)) for v in (output_values, input_values)]
        products = torch.outer(*(v / v.max().clamp_min(torch.finfo(v.dtype).tiny) for v in wide))
        kept = products.flatten().topk(check_integer("pairs", pairs, low=0, high=products.numel())).indices
        mask = torch.zeros(products.numel(), dtype=torch.bool, device=products.device)
        mask[kept] = True
        return cls(output_vectors, input_vectors, mask.view(products.shape))

    def __repr__(self) -> str:
        return f"KroneckerMaskProjector(pairs={int(self.mask.sum())}, directions={tuple(self.mask.shape)})"

    def split(self, delta: Any) -> tuple[Any, Any]:
        """Return (U((UᵀΔV)∘M)Vᵀ, the rest), of the kind of `delta`.

        Of a LowRank of rank r, the part has rank min(m, n) of the directions in use and the rest that rank plus r: a
        mask that is no rectangle does not act on one factor.

        Args:
            delta: LowRank or dense tensor (..., p, q) of the vectors' dtype and device.

        Raises:
            TypeError: not an update, or of another dtype than the vectors.
            ValueError: not p×q, or on another device.
        """
        update = _check_update(delta, self.output_basis, self.input_basis)
        u, v = self.output_basis, self.input_basis
        if not isinstance(update, LowRank):
            dense = u @ ((u.mT @ update @ v) * self.mask) @ v.mT
            return dense, update - dense
        core = ((u.mT @ update.left) @ (update.right @ v)) * self.mask
        part = LowRank(u, core @ v.mT) if u.shape[1] <= v.shape[1] else LowRank(u @ core, v.mT)
        return part, update - part
