"""Distances between curvatures (positive definite matrices), and between categorical distributions."""

from typing import Any

import torch

from fishergeo._checks import (
    check_broadcast,
    check_finite,
    check_not_negative,
    check_same_kind,
    check_symmetric,
    check_tensor,
    refuse_second_order,
)


def _check_pair(a: object, b: object, definite: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Two positive (semi)definite matrices of one size, symmetrised, in float32 or wider."""
    first, second = check_symmetric("a", a), check_symmetric("b", b)
    check_same_kind("a", first, "b", second)
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(f"a is {first.shape[-1]}×{first.shape[-1]} but b is {second.shape[-1]}×{second.shape[-1]}")
    check_broadcast("a", first.shape[:-2], "b", second.shape[:-2])
    work = torch.promote_types(first.dtype, torch.float32)
    pair = []
    for name, matrix in (("a", first), ("b", second)):
        wide = matrix.to(work)
        wide = (wide + wide.mT) / 2
        values = torch.linalg.eigvalsh(wide.detach())
        # Each matrix of a batch has a rounding of its own: of the eigensolver, and of the entries in half precision.
        eps = max(matrix.shape[-1] * torch.finfo(work).eps, 2 * torch.finfo(matrix.dtype).eps)
        rounding = eps * values.abs().amax(-1)
        least = values.amin(-1)
        wrong = least <= rounding if definite else least < -rounding
        if bool(wrong.any()):
            wanted = "positive definite; add damping, M + εI" if definite else "positive semidefinite"
            raise ValueError(f"{name} must be {wanted}: its least eigenvalue is {float(least[wrong].min()):.3g}")
        pair.append(wide)
    return pair[0], pair[1]


class _MatrixFunction(torch.autograd.Function):
    """V·f(λ)·Vᵀ for f = log or sqrt, with the gradient of Daleckii and Krein (Higham 2008, thm. 3.11).

    Divided differences are written without cancellation, so equal eigenvalues, where the gradient of an eigenvector
    does not exist, are no exception.
    """

    @staticmethod
    def forward(ctx: Any, matrix: torch.Tensor, function: str) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        values = values.clamp(min=0)
        column, row = values.unsqueeze(-1), values.unsqueeze(-2)
        if function == "sqrt":
            image = values.sqrt()
            divided = 1 / (column.sqrt() + row.sqrt())
        else:
            image = values.log()
            step = (column - row) / row
            divided = torch.where(step == 0, 1, torch.log1p(step) / torch.where(step == 0, 1, step)) / row
        ctx.save_for_backward(vectors, divided)
        return (vectors * image.unsqueeze(-2)) @ vectors.mT

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        refuse_second_order("a distance between positive definite matrices")
        vectors, divided = ctx.saved_tensors
        return vectors @ (divided * (vectors.mT @ grad @ vectors)) @ vectors.mT, None


def _apart(a: torch.Tensor, b: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """The distance, zero with gradient zero where a = b: rounding would leave a gradient of any direction there."""
    return torch.where((a == b).all(-1).all(-1), 0, distance)


def _length(values: torch.Tensor, dims: int | tuple[int, ...]) -> torch.Tensor:
    """Euclidean norm, with gradient zero at zero."""
    return torch.linalg.vector_norm(values, dim=dims)


def affine_invariant_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Affine-invariant Riemannian distance ‖log(A^−½ B A^−½)‖ = √Σ log² λ_i(A⁻¹B) (Pennec et al. 2006, eq. 3.5).

    It does not change under A, B → CACᵀ, CBCᵀ nor under inversion of both: of two Fishers it says how far apart they
    are whatever the parameters' coordinates. The λ_i are the squared singular values of L⁻¹M, with the Cholesky factors
    A = LLᵀ and B = MMᵀ: they keep the small ones that forming L⁻¹BL⁻ᵀ loses, as far as the entries of A and B
    determine them, to ε·κ of the worse condition number κ.

    Args:
        a: symmetric positive definite, (..., n, n), any floating dtype; half precision is computed in float32.
        b: second matrix, of the same size, dtype and device; batches broadcast.

    Returns:
        Tensor of the batch shape, float32 or wider; gradient zero where a = b.

    Raises:
        TypeError: not floating tensors, or the dtypes differ.
        ValueError: not square, symmetric, finite and positive definite, sizes or devices differ, or matrices so
            ill-conditioned that their relative eigenvalues are rounding.

    Examples:
        >>> a = torch.eye(2, dtype=torch.float64)
        >>> round(float(fg.affine_invariant_distance(a, a * torch.e)), 4)  # ‖log e·I‖ = √2
        1.4142
    """
    first, second = _check_pair(a, b, definite=True)
    factors = []
    for name, matrix in (("a", first), ("b", second)):
        lower, failed = torch.linalg.cholesky_ex(matrix.double())
        if bool(failed.any()):
            raise ValueError(f"{name} must be positive definite beyond rounding; add damping, M + εI")
        factors.append(lower)
    roots = torch.linalg.svdvals(torch.linalg.solve_triangular(*factors, upper=False))
    least = first.shape[-1] * torch.finfo(torch.float64).eps
    if bool((roots[..., -1] <= least * roots[..., 0]).any()):
        raise ValueError(
            "a and b are so ill-conditioned that the least of their relative eigenvalues is rounding; add damping, M + εI"
        )
    return _apart(first, second, _length(2 * roots.log(), -1).to(first.dtype))


def log_euclidean_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Log-Euclidean distance ‖log A − log B‖ (Arsigny et al. 2007): cheaper to average, invariant under rotations.

    Never more than the affine-invariant distance, and equal to it where A and B commute.

    Args:
        a: symmetric positive definite, (..., n, n), any floating dtype; half precision is computed in float32.
        b: second matrix, of the same size, dtype and device; batches broadcast.

    Returns:
        Tensor of the batch shape, float32 or wider; once differentiable, gradient zero where a = b.

    Raises:
        TypeError: not floating tensors, or the dtypes differ.
        ValueError: not square, symmetric, finite and positive definite, or sizes or devices differ.

    Examples:
        >>> a = torch.eye(2, dtype=torch.float64)
        >>> round(float(fg.log_euclidean_distance(a, a * torch.e)), 4)
        1.4142
    """
    first, second = _check_pair(a, b, definite=True)
    log_a, log_b = _MatrixFunction.apply(first, "log"), _MatrixFunction.apply(second, "log")  # type: ignore[no-untyped-call]
    return _apart(first, second, _length(log_a - log_b, (-2, -1)))


def bures_wasserstein_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Bures–Wasserstein distance √(tr A + tr B − 2 tr (A^½ B A^½)^½) (Bhatia, Jain and Lim 2019, eq. 1).

    Computed as min_Q ‖A^½ − B^½ Q‖ over orthogonal Q (thm. 1 there), which keeps small distances that the difference
    of traces cancels. Rank-deficient curvatures are allowed, but determine it to about √(ε·tr) only: a zero eigenvalue is
    known to ε, and the distance goes by its root. The gradient needs positive definite ones.

    Args:
        a: symmetric positive semidefinite, (..., n, n), any floating dtype; half precision is computed in float32.
        b: second matrix, of the same size, dtype and device; batches broadcast.

    Returns:
        Tensor of the batch shape, float32 or wider; once differentiable, gradient zero where a = b.

    Raises:
        TypeError: not floating tensors, or the dtypes differ.
        ValueError: not square, symmetric, finite and positive semidefinite, or sizes or devices differ.

    Examples:
        >>> a = torch.eye(2, dtype=torch.float64)
        >>> round(float(fg.bures_wasserstein_distance(a, 4 * a)), 4)  # ‖1·I − 2·I‖
        1.4142
    """
    first, second = _check_pair(a, b, definite=False)
    root_a, root_b = _MatrixFunction.apply(first, "sqrt"), _MatrixFunction.apply(second, "sqrt")  # type: ignore[no-untyped-call]
    # Q is where the least is attained, so by the envelope theorem it counts as a constant in the gradient.
    u, _, vh = torch.linalg.svd((root_b.mT @ root_a).detach())
    return _apart(first, second, _length(root_a - root_b @ (u @ vh), (-2, -1)))


def fisher_rao_distance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Fisher–Rao distance 2·arccos Σ √(p_i q_i) between categorical distributions, in radians, in [0, π].

    The geodesic distance of the Fisher metric, by way of the sphere that p → 2√p maps to (Rao 1945). Near p = q it is
    √(2 KL). Computed as 4·arcsin(‖√p − √q‖/2), which keeps small distances. Differentiable where all entries are
    positive; gradient zero where p = q.

    Args:
        p: probabilities along the last dimension, (..., c), any floating dtype; half precision is computed in float32.
        q: second distribution, of the same number of classes, dtype and device; batches broadcast.

    Returns:
        Tensor of the batch shape, float32 or wider.

    Raises:
        TypeError: not floating tensors, or the dtypes differ.
        ValueError: negative or non-finite entries, sums other than one, or numbers of classes or devices that differ.

    Examples:
        >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> round(float(fg.fisher_rao_distance(p, q)), 4)
        3.1416
    """
    for name, value in (("p", p), ("q", q)):
        check_finite(name, check_tensor(name, value, min_dim=1))
        check_not_negative(name, value)
        off = float((value.detach().double().sum(-1) - 1).abs().max())
        if off > max(torch.finfo(value.dtype).eps ** 0.5, 1e-5):
            raise ValueError(f"{name} must sum to one along the last dimension, it is off by {off:.3g}")
    check_same_kind("p", p, "q", q)
    if p.shape[-1] != q.shape[-1]:
        raise ValueError(f"p has {p.shape[-1]} classes but q has {q.shape[-1]}")
    check_broadcast("p", p.shape[:-1], "q", q.shape[:-1])
    work = torch.promote_types(p.dtype, torch.float32)
    return 4 * torch.asin((_length(p.to(work).sqrt() - q.to(work).sqrt(), -1) / 2).clamp(max=0.5**0.5))
