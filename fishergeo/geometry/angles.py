"""Principal angles between subspaces, and the distances made of them."""

from typing import Any, NamedTuple

import torch

from fishergeo._checks import check_basis, check_broadcast, check_choice, check_same_kind, refuse_second_order

DISTANCES = ("geodesic", "chordal", "projection", "fubini-study", "asimov")


class _AngleParts(NamedTuple):
    """What an SVD says about two subspaces: angles, and the vectors in which they are attained."""

    angles: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    residual: torch.Tensor


def _angle_parts(x: torch.Tensor, y: torch.Tensor) -> _AngleParts:
    """Angles ascending (..., l), vectors u (..., k, l) and v (..., l, l), residual (I − xxᵀ)y; for k ≥ l."""
    u, cosines, vh = torch.linalg.svd(x.mT @ y, full_matrices=False)
    residual = y - x @ (x.mT @ y)
    # Once more: what rounding left of x in the residual is as large as a tiny angle.
    residual = residual - x @ (x.mT @ residual)
    sines = torch.linalg.svdvals(residual).flip(-1)
    return _AngleParts(torch.atan2(sines, cosines), u, vh.mT, residual)


def _unit_columns(matrix: torch.Tensor) -> torch.Tensor:
    lengths = matrix.norm(dim=-2, keepdim=True)
    return matrix / torch.where(lengths > 0, lengths, 1)


class _PrincipalAngles(torch.autograd.Function):
    """Angles with their gradient along the Grassmannian: ∂θ_i/∂x = −r̂_i u_iᵀ, with r_i = y v_i − x u_i cos θ_i.

    It stays finite where that of arccos or of an SVD does not: for equal angles any rotated (u_i, v_i) will do in a
    symmetric function of the angles, and at θ_i = 0, rounding included, the subgradient zero is taken.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        parts = _angle_parts(x, y)
        ctx.save_for_backward(x, y, parts.u, parts.v, parts.residual, parts.angles)
        return parts.angles

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        refuse_second_order("principal_angles")
        x, y, u, v, residual, angles = ctx.saved_tensors
        # The direction of a residual that is rounding is noise: such an angle counts as zero.
        grad = torch.where(angles <= 4 * torch.finfo(angles.dtype).eps * x.shape[-2] ** 0.5, 0, grad)
        away_from_x = _unit_columns(residual @ v)
        target = x @ u
        away_from_y = _unit_columns(target - y @ (y.mT @ target))
        scale = -grad.unsqueeze(-2)
        return (scale * away_from_x) @ u.mT, (scale * away_from_y) @ v.mT


def angles_between(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`principal_angles` without checks, for bases known to be orthonormal, as the points of a manifold are."""
    work = torch.promote_types(x.dtype, torch.float32)
    first, second = (x, y) if x.shape[-1] >= y.shape[-1] else (y, x)
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    pair = (z.to(work).expand(*batch, *z.shape[-2:]) for z in (first, second))
    return _PrincipalAngles.apply(*pair)  # type: ignore[no-untyped-call]


def principal_angles(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Principal angles between the spans of two orthonormal bases.

    θ_i = atan2(sin θ_i, cos θ_i) with the cosines from the SVD of UᵀV and the sines from that of (I − UUᵀ)V (Björck
    and Golub 1973; Knyazev and Argentati 2002): exact to rounding at tiny angles, where arccos loses half the digits,
    and at right angles, where arcsin does. Once differentiable, with zero as the subgradient of an angle that is zero
    to rounding.

    Args:
        u: orthonormal columns, (..., p, k).
        v: orthonormal columns, (..., p, l), the same dtype and device; batches broadcast.

    Returns:
        Tensor (..., min(k, l)) of angles in radians, in [0, π/2], ascending; float32 or wider.

    Raises:
        TypeError: a basis is not a floating tensor, or the dtypes differ.
        ValueError: a basis is not orthonormal, the spaces or devices differ, or batches do not broadcast.

    Examples:
        >>> u, v = torch.eye(3)[:, :2], torch.eye(3)[:, 1:]
        >>> [round(a, 4) for a in fg.principal_angles(u, v).tolist()]
        [0.0, 1.5708]
    """
    return angles_between(*_check_pair(u, v))


def _check_pair(u: object, v: object) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = check_basis("u", u), check_basis("v", v)
    check_same_kind("u", first, "v", second)
    if first.shape[-2] != second.shape[-2]:
        raise ValueError(f"u spans a subspace of R^{first.shape[-2]} but v one of R^{second.shape[-2]}")
    check_broadcast("u", first.shape[:-2], "v", second.shape[:-2])
    return first, second


def _length(angles: torch.Tensor) -> torch.Tensor:
    """Euclidean norm over the angles, with gradient zero at zero."""
    return torch.linalg.vector_norm(angles, dim=-1)


def distance_from_angles(angles: torch.Tensor, kind: str) -> torch.Tensor:
    """One of `DISTANCES` from principal angles (..., k) as a tensor of the batch shape; nothing is checked."""
    if kind == "geodesic":
        return _length(angles)
    if kind == "chordal":
        return _length(2 * torch.sin(angles / 2))
    if kind == "projection":
        return _length(torch.sin(angles))
    if angles.shape[-1] == 0:
        return angles.sum(-1)
    if kind == "asimov":
        return angles.amax(-1)
    # arccos Π cos θ loses tiny angles; sin² = 1 − Π cos² = −expm1(2 Σ log cos) does not.
    sines, cosines = torch.sin(angles), torch.cos(angles)
    small = sines < cosines
    logs = torch.where(
        small,
        torch.log1p(-(torch.where(small, sines, 0) ** 2)) / 2,
        torch.log(torch.where(small, 1, cosines.clamp(min=torch.finfo(angles.dtype).tiny))),
    ).sum(-1)
    squared_sine = -torch.expm1(2 * logs)
    positive = squared_sine > 0
    sine = torch.where(positive, torch.where(positive, squared_sine, 1).sqrt(), 0)
    return torch.atan2(sine, logs.exp())


def subspace_distance(u: torch.Tensor, v: torch.Tensor, kind: str = "geodesic") -> torch.Tensor:
    """Distance between two subspaces of equal dimension, from their principal angles θ.

    Named as in Edelman, Arias and Smith (1998, sec. 4.3) and Ye and Lim (2016, table 2):

    - "geodesic": ‖θ‖, the arc length, at most √k·π/2.
    - "chordal": ‖2 sin(θ/2)‖, the least ‖UQ − V‖ over orthogonal Q (chordal F-norm, or Procrustes distance).
    - "projection": ‖sin θ‖ = ‖UUᵀ − VVᵀ‖/√2 (projection F-norm).
    - "fubini-study": arccos Π cos θ_i.
    - "asimov": the largest angle.

    Each is a metric on the Grassmannian and depends on the spans alone. Once differentiable; gradient zero at zero.

    Args:
        u: orthonormal columns, (..., p, k).
        v: orthonormal columns, (..., p, k), the same dtype and device; batches broadcast.
        kind: one of the names above.

    Returns:
        Tensor of the batch shape; float32 or wider. Angles count in radians.

    Raises:
        TypeError: a basis is not a floating tensor, or the dtypes differ.
        ValueError: as `principal_angles`, or the dimensions k differ, or an unknown kind.

    Examples:
        >>> u, v = torch.eye(2)[:, :1], torch.eye(2)[:, 1:]
        >>> round(float(fg.subspace_distance(u, v)), 4)
        1.5708
    """
    check_choice("kind", kind, DISTANCES)
    first, second = _check_pair(u, v)
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"u has {first.shape[-1]} columns and v {second.shape[-1]}: these distances are between subspaces of equal "
            "dimension; principal_angles compares others"
        )
    return distance_from_angles(angles_between(first, second), kind)


def subspace_overlap(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """By definition the mean squared cosine of the principal angles, ‖UᵀV‖²/min(k, l): 1 if nested, 0 if orthogonal.

    Two random subspaces of R^p overlap by max(k, l)/p on average, the level to compare with. This is where collision
    is a real question: between bases estimated at different times, from different seeds or data, or between alignment
    and task gradients.

    Args:
        u: orthonormal columns, (..., p, k), k at least 1.
        v: orthonormal columns, (..., p, l), l at least 1, the same dtype and device; batches broadcast.

    Returns:
        Tensor of the batch shape; float32 or wider.

    Raises:
        TypeError: a basis is not a floating tensor, or the dtypes differ.
        ValueError: as `principal_angles`, or a basis without columns.

    Examples:
        >>> float(fg.subspace_overlap(torch.eye(3)[:, :2], torch.eye(3)[:, 1:]))
        0.5
    """
    first, second = _check_pair(u, v)
    smaller = min(first.shape[-1], second.shape[-1])
    if smaller == 0:
        raise ValueError("u or v has no columns: the overlap with nothing is not defined")
    work = torch.promote_types(first.dtype, torch.float32)
    return (first.to(work).mT @ second.to(work)).square().sum(dim=(-2, -1)) / smaller
