"""Matrices known by two thin factors, and the algebra that never multiplies them out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fishergeo._checks import (
    FLOAT_DTYPES,
    check_broadcast,
    check_finite,
    check_integer,
    check_same_kind,
    check_tensor,
)
from fishergeo._linalg import power_below


def _check_factor(name: str, factor: object) -> torch.Tensor:
    """Like `check_tensor`, but the rank (a dimension of size zero) may be 0: the zero matrix has such factors."""
    if not isinstance(factor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(factor).__name__}")
    if factor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be a real floating tensor, got {factor.dtype}")
    if factor.ndim < 2:
        raise ValueError(f"{name} must have at least 2 dimensions, got shape {tuple(factor.shape)}")
    return factor


def magnitude(*matrices: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    """The power of two below the largest magnitude of all over `dim`, which is kept: a constant, 1 where all is zero.

    What is divided by it is not rounded: of factors that cancel, a rounding of each would be much of the matrix.
    """
    size = matrices[0].new_zeros(()).expand(*matrices[0].shape[:-2], 1, 1)
    for matrix in matrices:
        if matrix.numel():
            size = torch.maximum(size, matrix.detach().abs().amax(dim=dim, keepdim=True))
    return power_below(size)


def summing_dtype(factor: Any) -> torch.dtype:
    """The dtype in which thin factors are multiplied and summed: of those that cancel, float32 would leave noise.

    float64, for r×r matrices cost little; on Apple's GPUs, which have none, float32.
    """
    return torch.float32 if factor.device.type == "mps" else torch.float64


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix `left @ right`, kept as its factors; for a LoRA update these are s·B and A (Hu et al. 2021).

    Sums concatenate factors (so ranks add), products multiply into the thinner side, and norms and inner products
    go through r×r matrices, tr(LᵀL·RRᵀ): nothing of size p×q is ever formed but by `to_dense`. Leading
    dimensions are a batch, for example of experts. Everything stays in the factors' dtype and is differentiable; norms and
    inner products of factors are summed in float64, what else is summed to a number in float32 or wider.

    A difference of nearly equal matrices has large factors that cancel: its norm is good to about eps·‖left‖·‖right‖ in
    absolute terms, eps that of the factors, and what it makes of a dense tensor (`inner`, quadratic forms) to no more than
    eps·‖left‖²·‖right‖². Where both have factors of
    one shape, as a weight before and after a step, `change_from` gives the difference in factors that are small themselves.

    Args:
        left: shape (..., p, r), any real floating dtype.
        right: shape (..., r, q), the same dtype and device; batch dimensions broadcast against those of `left`.

    Raises:
        TypeError: a factor is not a floating tensor, or the dtypes differ.
        ValueError: fewer than two dimensions, an empty p, q or batch, inner sizes that differ, batches that do not
            broadcast, or factors on different devices. The rank r may be 0: the zero matrix.

    Examples:
        >>> delta = fg.LowRank(torch.ones(4, 1), torch.ones(1, 3))
        >>> delta.shape, delta.rank, float(delta.squared_norm())
        (torch.Size([4, 3]), 1, 12.0)
        >>> (delta + delta).to_dense()[0].tolist()
        [2.0, 2.0, 2.0]
    """

    left: torch.Tensor
    right: torch.Tensor

    def __post_init__(self) -> None:
        left, right = _check_factor("left", self.left), _check_factor("right", self.right)
        check_same_kind("left", left, "right", right)
        if left.shape[-1] != right.shape[-2]:
            raise ValueError(
                f"left has shape {tuple(left.shape)} and right {tuple(right.shape)}: the last size of left must "
                "equal the second to last of right"
            )
        if 0 in (*left.shape[:-1], *right.shape[:-2], right.shape[-1]):
            raise ValueError(f"left or right is empty: shapes {tuple(left.shape)} and {tuple(right.shape)}")
        if left.shape[:-2] != right.shape[:-2]:
            batch = check_broadcast("left", left.shape[:-2], "right", right.shape[:-2])
            object.__setattr__(self, "left", left.expand(*batch, *left.shape[-2:]))
            object.__setattr__(self, "right", right.expand(*batch, *right.shape[-2:]))

    @property
    def shape(self) -> torch.Size:
        """Shape (..., p, q) of the product."""
        return torch.Size((*self.left.shape[:-1], self.right.shape[-1]))

    @property
    def ndim(self) -> int:
        """Number of dimensions of the product, batch included."""
        return self.left.ndim

    @property
    def rank(self) -> int:
        """Inner size r: an upper bound of the true rank, which rank-deficient factors do not reach."""
        return self.left.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The factors' dtype."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        """The factors' device."""
        return self.left.device

    @property
    def requires_grad(self) -> bool:
        """Whether either factor asks for a gradient."""
        return self.left.requires_grad or self.right.requires_grad

    @property
    def mT(self) -> "LowRank":
        """The transpose, rightᵀ @ leftᵀ, shape (..., q, p)."""
        return LowRank(self.right.mT, self.left.mT)

    def __repr__(self) -> str:
        return f"LowRank(shape={tuple(self.shape)}, rank={self.rank}, dtype={self.dtype}, device={self.device})"

    def __getitem__(self, index: object) -> "LowRank":
        """Index the batch dimensions; the matrix dimensions stay whole.

        Raises:
            IndexError: there is no batch, or the index reaches into the matrix.
        """
        if self.ndim == 2:
            raise IndexError("this LowRank has no batch dimension to index; use to_dense() for entries")
        places = torch.arange(self.shape[:-2].numel(), device=self.device).reshape(self.shape[:-2])
        parts = index if isinstance(index, tuple) else (index,)
        parts = parts[:-1] if parts and parts[-1] is Ellipsis else parts  # what follows is the matrix, whole
        try:
            if any(part is Ellipsis for part in parts):
                raise IndexError("... before another index counts from the end, where the matrix is")
            places = places[parts]
        except IndexError as error:
            raise IndexError(
                f"index {index!r} of a LowRank of shape {tuple(self.shape)} reaches into the matrix dimensions, or does not "
                f"fit the batch: {error}; use to_dense() for entries"
            ) from error
        return LowRank(self.left.flatten(0, -3)[places], self.right.flatten(0, -3)[places])

    def to(self, *args: Any, **kwargs: Any) -> "LowRank":
        """Factors moved or cast as by `torch.Tensor.to`."""
        return LowRank(self.left.to(*args, **kwargs), self.right.to(*args, **kwargs))

    def detach(self) -> "LowRank":
        """The same factors, cut from the autograd graph."""
        return LowRank(self.left.detach(), self.right.detach())

    def to_dense(self) -> torch.Tensor:
        """Multiply out.

        Returns:
            Tensor (..., p, q).
        """
        return self.left @ self.right

    def _check_like(self, other: "LowRank | torch.Tensor") -> torch.Size:
        """Refuse an operand of another kind or shape; return the batch shape of both."""
        check_same_kind("this LowRank", self, "other", other)
        if other.shape[-2:] != self.shape[-2:]:
            raise ValueError(f"other has shape {tuple(other.shape)}, which does not match {tuple(self.shape)}")
        return check_broadcast("this LowRank", self.shape[:-2], "other", other.shape[:-2])

    def __add__(self, other: "LowRank") -> "LowRank":
        if not isinstance(other, LowRank):
            return NotImplemented
        batch = self._check_like(other)
        lefts = [x.left.expand(*batch, *x.left.shape[-2:]) for x in (self, other)]
        rights = [x.right.expand(*batch, *x.right.shape[-2:]) for x in (self, other)]
        return LowRank(torch.cat(lefts, dim=-1), torch.cat(rights, dim=-2))

    def __sub__(self, other: "LowRank") -> "LowRank":
        if not isinstance(other, LowRank):
            return NotImplemented
        return self + (-other)

    def change_from(self, start: "LowRank") -> "LowRank":
        """LR − L0R0 as (L − L0)R + L0(R − R0): exactly zero where nothing has moved, with no large terms that cancel.

        Args:
            start: L0 and R0, of the same shapes, dtype and device.

        Returns:
            LowRank of rank 2r.

        Raises:
            TypeError: `start` is no LowRank, or has another dtype.
            ValueError: factors of other shapes or on another device.
        """
        if not isinstance(start, LowRank):
            raise TypeError(f"start must be a LowRank, got {type(start).__name__}")
        check_same_kind("this LowRank", self, "start", start)
        if (start.left.shape, start.right.shape) != (self.left.shape, self.right.shape):
            raise ValueError(
                f"start has factors of shapes {tuple(start.left.shape)} and {tuple(start.right.shape)}, this LowRank "
                f"{tuple(self.left.shape)} and {tuple(self.right.shape)}; use - where they differ"
            )
        left = torch.cat([self.left - start.left, start.left], dim=-1)
        return LowRank(left, torch.cat([self.right, self.right - start.right], dim=-2))

    def __neg__(self) -> "LowRank":
        return LowRank(-self.left, self.right)

    def __mul__(self, scalar: float | torch.Tensor) -> "LowRank":
        if isinstance(scalar, torch.Tensor):
            if scalar.ndim != 0:
                raise ValueError(
                    f"a LowRank is scaled by a number or a 0-dimensional tensor, got {tuple(scalar.shape)}"
                )
            return LowRank(self.left * scalar.to(self.dtype), self.right)
        if isinstance(scalar, bool) or not isinstance(scalar, (int, float)):
            return NotImplemented
        return LowRank(self.left * scalar, self.right)

    __rmul__ = __mul__

    def __truediv__(self, scalar: float | torch.Tensor) -> "LowRank":
        if isinstance(scalar, LowRank):
            return NotImplemented
        return self * (1 / scalar)

    def __matmul__(self, other: "torch.Tensor | LowRank") -> "LowRank | torch.Tensor":
        """Product with a matrix (..., q, k), dense or factored, as a LowRank; with a vector (q,), a dense vector."""
        if not isinstance(other, (torch.Tensor, LowRank)):
            return NotImplemented
        check_same_kind("this LowRank", self, "the right operand", other)
        inner = other.shape[-2] if other.ndim > 1 else other.shape[0] if other.ndim else 0
        if inner != self.shape[-1]:
            raise ValueError(f"cannot multiply {tuple(self.shape)} by {tuple(other.shape)}: inner sizes differ")
        check_broadcast("this LowRank", self.shape[:-2], "the right operand", other.shape[:-2])
        if isinstance(other, torch.Tensor):
            if other.ndim == 1:
                return (self.left @ (self.right @ other).unsqueeze(-1)).squeeze(-1)
            return LowRank(self.left, self.right @ other)
        middle = self.right @ other.left
        if self.rank <= other.rank:
            return LowRank(self.left, middle @ other.right)
        return LowRank(self.left @ middle, other.right)

    def __rmatmul__(self, other: torch.Tensor) -> "LowRank | torch.Tensor":
        """Product of a dense matrix (..., k, p) with this, as a LowRank; of a vector (p,), a dense vector."""
        if not isinstance(other, torch.Tensor):
            return NotImplemented
        check_same_kind("the left operand", other, "this LowRank", self)
        if other.ndim == 0 or other.shape[-1] != self.shape[-2]:
            raise ValueError(f"cannot multiply {tuple(other.shape)} by {tuple(self.shape)}: inner sizes differ")
        check_broadcast("the left operand", other.shape[:-2], "this LowRank", self.shape[:-2])
        if other.ndim == 1:
            return ((other @ self.left).unsqueeze(-2) @ self.right).squeeze(-2)
        return LowRank(other @ self.left, self.right)

    def inner(self, other: "LowRank | torch.Tensor") -> torch.Tensor:
        """Frobenius inner product ⟨self, other⟩ = tr(selfᵀ other), in O((p+q)·r·r') for factors.

        Args:
            other: LowRank or dense tensor of shape (..., p, q), the same dtype and device.

        Returns:
            Tensor of the batch shape.

        Raises:
            TypeError: `other` is neither, or has another dtype.
            ValueError: shapes or devices do not match.
        """
        if not isinstance(other, (torch.Tensor, LowRank)):
            raise TypeError(f"other must be a LowRank or a torch.Tensor, got {type(other).__name__}")
        self._check_like(other)
        # In half precision the Gram matrices and their products would leave the dtype's range long before the sum does.
        if isinstance(other, torch.Tensor):
            work = torch.promote_types(self.dtype, torch.float32)
            image = other.to(work) @ self.right.to(work).mT
            return (self.left.to(work) * image).sum(dim=(-2, -1)).to(self.dtype)
        work = summing_dtype(self)
        grams = self.left.to(work).mT @ other.left.to(work), self.right.to(work) @ other.right.to(work).mT
        return (grams[0] * grams[1]).sum(dim=(-2, -1)).to(self.dtype)

    def _balanced(self) -> tuple["LowRank", torch.Tensor]:
        """The matrix over a constant of its own size, in float32 or wider, and that constant, (..., 1, 1).

        Every row of `right` and `left` as a whole have entries below two, so that nothing that matters leaves the
        dtype's range where it is squared.
        """
        work = torch.promote_types(self.dtype, torch.float32)
        left, right = self.left.to(work), self.right.to(work)
        rows = magnitude(right, dim=-1)
        left = left * rows.mT
        whole = magnitude(left, dim=(-2, -1))
        return LowRank(left / whole, right / rows), whole

    def squared_norm(self) -> torch.Tensor:
        """Squared Frobenius norm tr(LᵀL·RRᵀ), never negative, of the batch shape; its gradient at zero is zero."""
        balanced, size = self._balanced()
        size = size[..., 0, 0]  # whose square may leave the dtype's range where the product does not
        return (balanced._squares() * size * size).to(self.dtype)

    def _squares(self) -> torch.Tensor:
        """Squared norm of balanced factors, differentiable through their Gram matrices."""
        value = self.inner(self)
        with torch.no_grad():
            exact = value.clamp(min=0) if summing_dtype(self) != self.dtype else self._uncancelled()
        # Of factors that cancel the Gram matrices leave noise, perhaps below zero; their gradient, linear in the matrix,
        # is good to rounding.
        return value + (exact - value).detach()

    def _uncancelled(self) -> torch.Tensor:
        """Squared norm of which cancellation between the factors takes eps·‖left‖·‖right‖ and not the root of that."""
        left, right = (torch.linalg.qr(factor, mode="r").R for factor in (self.left, self.right.mT))
        return (left @ right.mT).square().sum(dim=(-2, -1))

    def norm(self) -> torch.Tensor:
        """Frobenius norm, of the batch shape; at zero its gradient is taken to be zero (the least subgradient)."""
        balanced, size = self._balanced()
        squared = balanced._squares()
        positive = squared > 0
        root = torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)
        return (root * size[..., 0, 0]).to(self.dtype)

    def trace(self) -> torch.Tensor:
        """Trace, of the batch shape, in O(p·r).

        Raises:
            ValueError: the matrix is not square.
        """
        if self.shape[-1] != self.shape[-2]:
            raise ValueError(f"only a square LowRank has a trace, this one has shape {tuple(self.shape)}")
        work = torch.promote_types(self.dtype, torch.float32)
        return (self.left.to(work) * self.right.to(work).mT).sum(dim=(-2, -1)).to(self.dtype)

    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Thin singular value decomposition by QR of both factors and an SVD of the small core.

        Gradients flow where both factors have full rank and the singular values in use are distinct, as for
        `torch.linalg.svd`. Half precision is decomposed in float32, LAPACK having nothing narrower.

        Returns:
            (U, S, Vh) with U (..., p, k), S (..., k) descending, Vh (..., k, q), k = min(p, q, r).
        """
        work = torch.promote_types(self.dtype, torch.float32)
        left_q, left_r = torch.linalg.qr(self.left.to(work))
        right_q, right_r = torch.linalg.qr(self.right.mT.to(work))
        u, values, vh = torch.linalg.svd(left_r @ right_r.mT, full_matrices=False)
        return (left_q @ u).to(self.dtype), values.to(self.dtype), (vh @ right_q.mT).to(self.dtype)

    def truncate(self, k: int) -> "LowRank":
        """Best approximation of rank at most k (Eckart and Young 1936): left is U·diag(S), right is Vh.

        Args:
            k: rank to keep, at least 0; more than the present rank changes nothing but the factors.

        Returns:
            LowRank of rank min(k, p, q, r).

        Raises:
            TypeError: k is not an int.
            ValueError: k is negative.
        """
        k = check_integer("k", k, low=0)
        u, values, vh = self.svd()
        # The values stay whole on one side: their square roots would have no gradient where a value is zero.
        return LowRank(u[..., :k] * values[..., None, :k], vh[..., :k, :])

    def numerical_rank(self) -> torch.Tensor:
        """Rank up to rounding: singular values above max(p, q)·eps·Σ_k ‖left_k‖‖right_k‖, integers of the batch shape.

        The threshold is the rounding of the product itself, not of its largest singular value, so that a difference
        of equal matrices has rank 0. Factors count as exact: in half precision eps is that of float32, which they are
        decomposed in.
        """
        exact, _ = self._balanced()
        scale = (exact.left.norm(dim=-2) * exact.right.norm(dim=-1)).sum(-1, keepdim=True)
        threshold = max(self.shape[-2:]) * torch.finfo(exact.dtype).eps * scale
        return (exact.svd()[1] > threshold).sum(-1)

    def column_basis(self) -> torch.Tensor:
        """Orthonormal basis of the column space, most important direction first.

        Returns:
            Tensor (..., p, k), k the numerical rank.

        Raises:
            ValueError: the matrices of a batch have different ranks, so no one tensor holds their bases.
        """
        ranks = self.numerical_rank()
        if int(ranks.min()) != int(ranks.max()):
            raise ValueError(
                f"the matrices of the batch have ranks {int(ranks.min())} to {int(ranks.max())}; index the batch and "
                "take the bases one by one"
            )
        return self.svd()[0][..., : int(ranks.max())]

    def row_basis(self) -> torch.Tensor:
        """Orthonormal basis of the row space as columns.

        Returns:
            Tensor (..., q, k), k the numerical rank.

        Raises:
            ValueError: the matrices of a batch have different ranks.
        """
        return self.mT.column_basis()


def as_update(name: str, value: object) -> LowRank | torch.Tensor:
    """Return `value` if it is an update: a LowRank, or a dense floating tensor of at least two dimensions.

    Args:
        name: the argument's name, for the message.
        value: value that the caller passed.

    Raises:
        TypeError: neither LowRank nor floating tensor.
        ValueError: a dense tensor of fewer than two dimensions, or empty.
    """
    if isinstance(value, LowRank):
        return value
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a LowRank or a torch.Tensor, got {type(value).__name__}")
    return check_tensor(name, value, min_dim=2)


def check_finite_update(name: str, update: LowRank | torch.Tensor) -> None:
    """Refuse NaN and infinity in a dense update or in the factors of another.

    Args:
        name: the argument's name, for the message.
        update: LowRank or dense tensor.

    Raises:
        ValueError: there are entries that are not finite.
    """
    for matrix in (update.left, update.right) if isinstance(update, LowRank) else (update,):
        check_finite(name, matrix)


def layer_cosines(runs: Sequence[Mapping[str, LowRank | torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Cosines between the updates that several runs (seeds, say) made to each layer; of ΔW_A, if that is passed.

    By definition ⟨Δ, Δ'⟩/(‖Δ‖‖Δ'‖) in the Frobenius inner product.

    Args:
        runs: for every run a mapping from layer name to update, LowRank or dense (p, q) of any floating dtype, all with
            the same names.

    Returns:
        For each layer a symmetric tensor (runs, runs) with ones on the diagonal; 0 where an update is zero.

    Raises:
        TypeError: an update is neither LowRank nor a floating tensor, or dtypes differ.
        ValueError: no runs, different names, or updates of different shapes or devices, batched, or not finite.

    Examples:
        >>> runs = [{"w": torch.tensor([[1.0, 0.0]])}, {"w": torch.tensor([[0.0, 1.0]])}]
        >>> fg.layer_cosines(runs)["w"].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if not runs:
        raise ValueError("runs is empty: at least one mapping of updates is needed")
    names = set(runs[0])
    for i, run in enumerate(runs):
        if set(run) != names:
            raise ValueError(f"runs[{i}] and runs[0] differ in the layers {sorted(names ^ set(run))}")
    return {name: _cosines([run[name] for run in runs], name) for name in runs[0]}


def _cosines(updates: list[Any], name: str) -> torch.Tensor:
    checked = [as_update(f"runs[{i}][{name!r}]", update) for i, update in enumerate(updates)]
    for i, update in enumerate(checked):
        check_same_kind(f"runs[{i}][{name!r}]", update, f"runs[0][{name!r}]", checked[0])
        if update.shape != checked[0].shape or update.ndim != 2:
            raise ValueError(f"runs[{i}][{name!r}] has shape {tuple(update.shape)}, runs[0] {tuple(checked[0].shape)}")
        check_finite_update(f"runs[{i}][{name!r}]", update)
    work = torch.promote_types(checked[0].dtype, torch.float32)
    checked = [x.detach().to(work) for x in checked]
    # A cosine does not see scale, but squares of very small or large entries would leave the dtype's range.
    checked = [x._balanced()[0] if isinstance(x, LowRank) else x / magnitude(x, dim=(-2, -1)) for x in checked]
    norms = torch.stack([x.norm() for x in checked])
    gram = torch.stack([torch.stack([_inner(x, y) for y in checked]) for x in checked])
    scale = norms[:, None] * norms
    cosines = torch.where(scale > 0, gram / torch.where(scale > 0, scale, 1), 0).clamp(-1, 1)
    return torch.where(torch.eye(len(norms), dtype=torch.bool, device=norms.device) & (scale > 0), 1, cosines)


def _inner(x: LowRank | torch.Tensor, y: LowRank | torch.Tensor) -> torch.Tensor:
    if isinstance(x, LowRank):
        return x.inner(y)
    return y.inner(x) if isinstance(y, LowRank) else (x * y).sum()
