"""How far two parts of an update collide: coordinate by coordinate, and as an angle in a chosen metric.

The coordinate-wise term is E_rm and the angle E_geo of AlignGuard-LoRA (arXiv 2508.02079, App. C). Its angle is the
Euclidean one, and that is identically zero, gradient included, when the parts come from a hard orthogonal projector:
⟨PΔ, (I − P)Δ⟩ = 0 for every Δ, and likewise in every metric that commutes with P. `geodesic_separation` therefore
offers metrics in which the question has an answer.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fishergeo._checks import (
    check_broadcast,
    check_choice,
    check_finite,
    check_generator,
    check_integer,
    check_number,
    check_same_kind,
    check_symmetric,
    check_tensor,
)
from fishergeo.updates._overlap import DenseOverlap, FactoredOverlap
from fishergeo.updates.lowrank import LowRank, as_update, check_finite_update, magnitude, summing_dtype

REDUCTIONS = ("sum", "mean")

METRICS = ("input-gram", "output-gram", "euclidean")


class SampledOverlap(NamedTuple):
    """An estimate of the coordinate-wise term from sampled rows.

    Attributes:
        value: the unbiased estimate, differentiable, of the updates' batch shape; float32 or wider.
        variance: unbiased estimate of the variance of `value` over the choice of rows, the same shape; no gradient.

    Examples:
        >>> g = torch.Generator().manual_seed(0)
        >>> one = torch.ones(4, 2)
        >>> estimate = fg.sampled_riemannian_overlap(one, one, rows=2, generator=g)
        >>> round(float(estimate.value), 2), round(float(estimate.variance), 2)  # all rows alike
        (36.15, 0.0)
    """

    value: torch.Tensor
    variance: torch.Tensor


def _check_pair(part: object, rest: object) -> tuple[LowRank | torch.Tensor, LowRank | torch.Tensor]:
    """Two finite updates of one kind, shape, dtype and device."""
    first, second = as_update("part", part), as_update("rest", rest)
    if isinstance(first, LowRank) != isinstance(second, LowRank):
        raise TypeError("part and rest must both be LowRank or both be dense; use to_dense() on the factored one")
    check_same_kind("part", first, "rest", second)
    if first.shape != second.shape:
        raise ValueError(f"part has shape {tuple(first.shape)} but rest has {tuple(second.shape)}")
    for name, update in (("part", first), ("rest", second)):
        check_finite_update(name, update)
    return first, second


def _check_weight(weight: object, like: LowRank | torch.Tensor) -> torch.Tensor | None:
    if weight is None:
        return None
    checked = check_tensor("weight", weight, min_dim=2)
    check_same_kind("weight", checked, "part", like)
    if checked.shape != like.shape:
        raise ValueError(f"weight has shape {tuple(checked.shape)} but the update has {tuple(like.shape)}")
    if checked.requires_grad:
        raise ValueError("weight is the fixed W0 and gets no gradient here; pass weight.detach()")
    check_finite("weight", checked)
    return checked


def _flat(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.reshape(math.prod(matrices.shape[:-2]), *matrices.shape[-2:])


def _overlap(
    part: Any, rest: Any, beta: float, tau: float, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checked totals (batch) and row sums (batch, p); only the totals are differentiable."""
    beta, tau = check_number("beta", beta, low=0), check_number("tau", tau)
    # Sums over p·q products leave the range of half precision, so there it is only a storage format. What is as large
    # as the update, the weight and dense parts, is widened tile by tile.
    base = None if weight is None else _flat(weight)
    if isinstance(part, LowRank):
        work = torch.promote_types(part.dtype, torch.float32)
        factors = [_flat(f.to(work)) for f in (part.left, part.right, rest.left, rest.right)]
        total, sums = FactoredOverlap.apply(*factors, base, beta, tau)  # type: ignore[no-untyped-call]
    else:
        total, sums = DenseOverlap.apply(_flat(part), _flat(rest), base, beta, tau)  # type: ignore[no-untyped-call]
    batch = part.shape[:-2]
    return total.reshape(batch), sums.reshape(*batch, sums.shape[-1])


def riemannian_overlap(
    part: LowRank | torch.Tensor,
    rest: LowRank | torch.Tensor,
    beta: float = 4.0,
    tau: float = 0.01,
    weight: torch.Tensor | None = None,
    reduction: str = "sum",
) -> torch.Tensor:
    """Coordinate-wise collision Σ_ij η_ij·|part_ij·rest_ij| with η = 1 + β·σ(|D| − τ).

    E_rm of AlignGuard-LoRA (arXiv 2508.02079, sec. 4.2). D is part + rest, the update itself, or with `weight` the
    weight W0 + part + rest that it leads to. The value depends on the coordinates: a rotation of the output or input
    space changes it.

    Exact, computed tile by tile: beyond its inputs it holds a few tiles and, for factors, their gradients; for dense
    updates the backward pass recomputes. On CUDA a Triton kernel does it where triton is installed, for float32 and
    narrower and ranks to 64. The gradient is a subgradient where part_ij, rest_ij or D_ij is zero, zero
    at a zero update; a backward pass with create_graph=True is refused, for there are no second derivatives.

    Args:
        part: LowRank or dense tensor (..., p, q), any floating dtype; half precision is computed in float32.
        rest: other part, of the same kind, shape, dtype and device.
        beta: β, finite and not negative.
        tau: τ, finite.
        weight: W0 (..., p, q), a constant of the updates' shape, dtype and device, or None.
        reduction: "sum" over the p·q coordinates, or "mean".

    Returns:
        Tensor of the batch shape, float32 or wider.

    Raises:
        TypeError: one update is factored and the other dense, dtypes differ, or β or τ is no number.
        ValueError: shapes or devices differ, NaN or infinity in an input, a negative β, a `weight` that asks for a
            gradient, or an unknown reduction.

    Examples:
        >>> part, rest = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> float(fg.riemannian_overlap(part, rest)), round(float(fg.riemannian_overlap(part, part)), 2)
        (0.0, 4.52)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    part, rest = _check_pair(part, rest)
    total, _ = _overlap(part, rest, beta, tau, _check_weight(weight, part))
    return total if reduction == "sum" else total / (part.shape[-2] * part.shape[-1])


def sampled_riemannian_overlap(
    part: LowRank | torch.Tensor,
    rest: LowRank | torch.Tensor,
    rows: int,
    generator: torch.Generator,
    beta: float = 4.0,
    tau: float = 0.01,
    weight: torch.Tensor | None = None,
    reduction: str = "sum",
) -> SampledOverlap:
    """Unbiased estimate of `riemannian_overlap` from `rows` of the p output rows, drawn without replacement.

    The estimate is p/n times the sum over the n sampled rows; its gradient is unbiased too. With S² the sample
    variance of the row sums, its variance is estimated without bias by p²·(1 − n/p)·S²/n (Cochran 1977, sec. 2.5).
    All matrices of a batch share the sampled rows.

    Args:
        part: LowRank or dense tensor (..., p, q).
        rest: other part, of the same kind, shape, dtype and device.
        rows: n, from 2 (a variance needs two) to p; p gives the exact value. For p = 1, n = 1.
        generator: source of the choice, on the CPU.
        beta: β, finite and not negative.
        tau: τ, finite.
        weight: W0 (..., p, q) or None.
        reduction: "sum" or "mean" over all p·q coordinates.

    Returns:
        SampledOverlap(value, variance), each of the batch shape.

    Raises:
        TypeError: as `riemannian_overlap`; `rows` is not an int, or `generator` not a torch.Generator.
        ValueError: as `riemannian_overlap`; `rows` is out of range.

    Examples:
        >>> g = torch.Generator().manual_seed(0)
        >>> one = torch.ones(4, 2)
        >>> value, variance = fg.sampled_riemannian_overlap(one, one, rows=4, generator=g)
        >>> torch.allclose(value, fg.riemannian_overlap(one, one))
        True
    """
    check_choice("reduction", reduction, REDUCTIONS)
    part, rest = _check_pair(part, rest)
    weight = _check_weight(weight, part)
    p, q = part.shape[-2:]
    n = check_integer("rows", rows, low=min(2, p), high=p)
    chosen = torch.randperm(p, generator=check_generator("generator", generator))[:n].to(part.device)

    def take(update: Any) -> Any:
        if isinstance(update, LowRank):
            return LowRank(update.left[..., chosen, :], update.right)
        return update[..., chosen, :]

    total, sums = _overlap(take(part), take(rest), beta, tau, None if weight is None else take(weight))
    spread = sums.var(-1) if n > 1 else torch.zeros_like(total)
    scale = 1 if reduction == "sum" else 1 / (p * q)
    return SampledOverlap(total * (p / n) * scale, spread * (p * p * (1 - n / p) / n) * scale**2)


class _ApplyOperator(torch.autograd.Function):
    """operator @ matrix for a symmetric operator that need not know autograd: the gradient is operator @ gradient."""

    @staticmethod
    def forward(ctx: Any, operator: Any, matrix: torch.Tensor) -> torch.Tensor:
        ctx.operator = operator
        image = operator @ matrix
        return image.to(matrix.dtype) if isinstance(image, torch.Tensor) else image

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, _ApplyOperator.apply(ctx.operator, grad)  # type: ignore[no-untyped-call]


def _apply_metric(metric: object, update: LowRank | torch.Tensor, work: torch.dtype) -> LowRank | torch.Tensor:
    matrix = update.left if isinstance(update, LowRank) else update
    shown = matrix.to(work)
    image = metric @ shown if isinstance(metric, torch.Tensor) else _ApplyOperator.apply(metric, shown)  # type: ignore[no-untyped-call]
    if not isinstance(image, torch.Tensor) or image.shape != matrix.shape:
        raise ValueError(
            f"metric @ X must have the shape {tuple(matrix.shape)} of X, got {getattr(image, 'shape', type(image))}"
        )
    image = image.to(matrix.dtype)
    return LowRank(image, update.right) if isinstance(update, LowRank) else image


def _check_metric(metric: object, update: LowRank | torch.Tensor) -> None:
    p = update.shape[-2]
    if isinstance(metric, torch.Tensor):
        checked = check_symmetric("metric", metric)
        check_same_kind("metric", checked, "part", update)
        if checked.shape[-1] != p:
            raise ValueError(f"metric has shape {tuple(checked.shape)}, it acts on the output side and must be {p}×{p}")
        check_broadcast("metric", checked.shape[:-2], "part", update.shape[:-2])
    elif not hasattr(metric, "__matmul__"):
        raise TypeError(
            f"metric must be one of {', '.join(map(repr, METRICS))}, a matrix or an operator with @, "
            f"got {type(metric).__name__}"
        )
    elif getattr(metric, "shape", (p, p))[-2:] != (p, p):
        raise ValueError(f"metric has shape {tuple(metric.shape)}, it must be {p}×{p}")  # type: ignore[attr-defined]


def _inner(first: Any, second: Any) -> torch.Tensor:
    return first.inner(second) if isinstance(first, LowRank) else (first * second).sum(dim=(-2, -1))


def _to_sum(part: Any, rest: Any) -> tuple[Any, Any]:
    """The updates in the dtype that they are multiplied in; a right factor that they share, they share there too."""
    if not isinstance(part, LowRank):
        work = torch.promote_types(part.dtype, torch.float32)
        return part.to(work), rest.to(work)
    wide = part.to(summing_dtype(part))
    right = wide.right if rest.right is part.right else rest.right.to(wide.dtype)
    return wide, LowRank(rest.left.to(wide.dtype), right)


def _normalised(part: Any, rest: Any) -> tuple[Any, Any]:
    """Each update over a constant of its own size: angles do not change, nor do gradients, and nothing underflows."""

    def unit(matrix: torch.Tensor) -> torch.Tensor:
        return matrix / magnitude(matrix, dim=(-2, -1))

    if not isinstance(part, LowRank):
        return unit(part), unit(rest)
    rows = magnitude(part.right, dim=-1), magnitude(rest.right, dim=-1)
    right = part.right / rows[0]
    other = right if rest.right is part.right else rest.right / rows[1]
    return LowRank(unit(part.left * rows[0].mT), right), LowRank(unit(rest.left * rows[1].mT), other)


def _gram_inners(first: Any, second: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """⟨XᵀX, YᵀY⟩ = ‖XYᵀ‖² of two parts, and of each with itself: by the factors' small Gram matrices or by p×p products."""
    if not isinstance(first, LowRank):
        pairs = ((first, second), (first, first), (second, second))
        across, one, other = ((x @ y.mT).square().sum(dim=(-2, -1)) for x, y in pairs)
        return across, one, other
    # ‖L R (L' R')ᵀ‖² = tr(M K M' Kᵀ) with M = LᵀL, K = R R'ᵀ, M' = L'ᵀL'.
    left = [part.left.mT @ part.left for part in (first, second)]
    if first.right is second.right:  # as parts of one split have it
        image = [m @ (first.right @ first.right.mT) for m in left]
        return _trace(image[0], image[1]), _trace(image[0], image[0]), _trace(image[1], image[1])
    cross = first.right @ second.right.mT
    own = [m @ (x.right @ x.right.mT) for m, x in zip(left, (first, second), strict=True)]
    between = _trace(left[0] @ cross, left[1] @ cross.mT)
    return between, _trace(own[0], own[0]), _trace(own[1], own[1])


def _trace(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """tr(XY)."""
    return (x * y.mT).sum(dim=(-2, -1))


def _images(metric: object, parts: Sequence[Any], work: torch.dtype) -> list[Any]:
    """M @ each part, both over one constant of their size, which the ratio does not see."""
    images = [_apply_metric(metric, part, work) for part in parts]
    thin = [image.left if isinstance(image, LowRank) else image for image in images]
    for matrix in thin:
        check_finite("metric @ part", matrix)
    size = magnitude(*thin, dim=(-2, -1))
    return [LowRank(x.left / size, x.right) if isinstance(x, LowRank) else x / size for x in images]


def _metric_squares(parts: Sequence[Any], images: Sequence[Any], eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """⟨X, MX⟩ for both parts, zero where it is rounding (``eps``, of M): a part in the null space of M has no angle."""
    sizes = [_inner(x, x).detach() for x in parts]
    stretches = [_inner(y, y).detach() / torch.where(size > 0, size, 1) for y, size in zip(images, sizes, strict=True)]
    scale = torch.maximum(*stretches).clamp(min=0).sqrt()
    squares = []
    for x, y, size in zip(parts, images, sizes, strict=True):
        square = _inner(x, y)
        if bool((square < -(eps**0.5) * scale * size).any()):
            raise ValueError(f"metric is not positive semidefinite: ⟨X, MX⟩ is {square.min().item():.3g} for a part X")
        squares.append(torch.where(square > eps * scale * size, square, 0))
    return squares[0], squares[1]


def geodesic_separation(
    part: LowRank | torch.Tensor,
    rest: LowRank | torch.Tensor,
    metric: object = "input-gram",
) -> torch.Tensor:
    """How aligned two parts of an update are, in [0, 1]: 0 separated, 1 aligned, in a chosen metric.

    - "euclidean": ⟨A, T⟩²/(‖A‖²‖T‖²), E_geo as AlignGuard-LoRA (arXiv 2508.02079, App. C) has it. Identically zero,
      with its gradient, under a hard orthogonal projector on either side.
    - "input-gram": ⟨AᵀA, TᵀT⟩/(‖AᵀA‖‖TᵀT‖): do the same inputs drive both parts? Zero only where they share none;
      but identically zero for parts split by a hard projector on the input side.
    - "output-gram": the same of AAᵀ and TTᵀ: do both parts write to the same outputs? For parts split on the input
      side; identically zero for a hard projector on the output side.
    - a symmetric positive semidefinite M (p×p tensor, or any operator with `@`): ⟨A, MT⟩²/(⟨A, MA⟩⟨T, MT⟩). Identically
      zero if M commutes with a hard output projector that made the parts, as the curvature it was taken from does.

    Factors cost O((p+q)·r²) and one product of M with p×r; dense parts form a p×p product under "input-gram" and a
    q×q product under "output-gram". Scaling a part does not change the value. Where a part is zero, the value and
    its gradient are zero. What a split leaves of nothing is not zero but rounding, some eps of the other part, and has an
    angle like any other: whether a part is one, its norm tells.

    Args:
        part: LowRank or dense tensor (..., p, q), any floating dtype; half precision is computed in float32.
        rest: other part, of the same kind, shape, dtype and device.
        metric: one of the names above, a tensor (p, p) or (..., p, p), or an operator.

    Returns:
        Tensor of the batch shape, float32 or wider.

    Raises:
        TypeError: updates of different kinds or dtypes, or a metric that is no name, tensor or operator.
        ValueError: shapes or devices differ, NaN or infinity, an unknown name, or M that is not p×p, not symmetric
            or not positive semidefinite.

    Examples:
        >>> part, rest = fg.Projector(torch.eye(2)[:, :1]).split(torch.ones(2, 2))
        >>> float(fg.geodesic_separation(part, rest, metric="euclidean"))  # zero whatever the update
        0.0
        >>> round(float(fg.geodesic_separation(part, rest)), 4)  # the same inputs drive both
        1.0
    """
    part, rest = _check_pair(part, rest)
    if isinstance(metric, str):
        check_choice("metric", metric, METRICS)
    else:
        _check_metric(metric, part)
    work = torch.promote_types(part.dtype, torch.float32)
    a, t = _normalised(*_to_sum(part, rest))
    if isinstance(metric, str) and metric != "euclidean":
        numerator, *squares = _gram_inners(a, t) if metric == "input-gram" else _gram_inners(a.mT, t.mT)
        power = 0.5
    else:
        if isinstance(metric, torch.Tensor):
            metric = metric.to(work)
        image_a, image_t = (a, t) if isinstance(metric, str) else _images(metric, (a, t), work)
        numerator = _inner(a, image_t) ** 2
        squares = list(_metric_squares((a, t), (image_a, image_t), torch.finfo(work).eps))
        power = 1.0
    zero = (squares[0] <= 0) | (squares[1] <= 0)
    denominator = (torch.where(zero, 1, squares[0]) * torch.where(zero, 1, squares[1])) ** power
    ratio = (torch.where(zero, 0, numerator) / denominator).to(work)
    # Cauchy and Schwarz bound the ratio by one; rounding may not. The gradient is left as it is.
    return ratio + (ratio.clamp(0, 1) - ratio).detach()
