"""The Grassmann manifold for geoopt, and the Karcher mean of subspaces."""

import warnings
from typing import Any

import torch

from fishergeo._checks import (
    check_basis,
    check_finite,
    check_integer,
    check_number,
    check_same_kind,
    check_tensor,
    refuse_second_order,
)
from fishergeo.geometry.angles import angles_between

# geoopt compiles functions by torch.jit.script, which newer torch calls deprecated whenever it is imported.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import geoopt
    from geoopt.utils import size2shape


def _cos_and_sinc(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos √G and sin √G/√G of positive semidefinite G (..., k, k), smooth in G, zero included.

    Both stand in exp [[0, −G/a], [a·I, 0]]; a, about ‖G‖^½, balances the blocks so that large steps stay accurate.
    """
    k = gram.shape[-1]
    size = gram.detach().diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1).sqrt()[..., None, None]
    zero = torch.zeros_like(gram)
    lower = (size * torch.eye(k, dtype=gram.dtype, device=gram.device)).expand_as(gram)
    block = torch.cat((torch.cat((zero, -gram / size), -1), torch.cat((lower, zero), -1)), -2)
    exponential = torch.linalg.matrix_exp(block)
    return exponential[..., :k, :k], exponential[..., k:, :k] / size


class _Polar(torch.autograd.Function):
    """The polar factor UVᵀ of X = USVᵀ (..., n, k), with a gradient that equal singular values do not trouble.

    d(UVᵀ) = U((K − Kᵀ)/(s_i + s_j))Vᵀ + (I − UUᵀ)dX·V·S⁻¹Vᵀ with K = UᵀdX·V (Higham 2008, sec. 8.2).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        ctx.save_for_backward(u, s, vh)
        return u @ vh

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        refuse_second_order("Grassmann.projx")
        u, s, vh = ctx.saved_tensors
        along = grad @ vh.mT
        core = u.mT @ along
        turned = u @ ((core - core.mT) / (s.unsqueeze(-1) + s.unsqueeze(-2)))
        return (turned + (along - u @ core) / s.unsqueeze(-2)) @ vh


def _divided_differences(cosines: torch.Tensor, ratios: torch.Tensor) -> torch.Tensor:
    """(g_i − g_j)/(c_i − c_j) of g(c) = arccos(c)/√(1 − c²) = θ/sin θ, by the derivative where the c are close."""
    c, other = cosines.unsqueeze(-1), cosines.unsqueeze(-2)
    gap = c - other
    near = gap.abs() < torch.finfo(c.dtype).eps ** (1 / 3)
    apart = (ratios.unsqueeze(-1) - ratios.unsqueeze(-2)) / torch.where(near, 1, gap)
    angle = torch.arccos(((c + other) / 2).clamp(max=1))
    small = angle < 1e-2
    wide = torch.where(small, 1, angle)
    # g'(cos θ) = −(sin θ − θ·cos θ)/sin³θ, which cancels at zero.
    derivative = -(torch.sin(wide) - wide * torch.cos(wide)) / torch.sin(wide) ** 3
    series = -(1 / 3 + 2 / 15 * angle**2 + 2 / 63 * angle**4)
    return torch.where(near, torch.where(small, series, derivative), apart)


class _ArcFactor(torch.autograd.Function):
    """V·diag(θ/sin θ)·Uᵀ for C = U·diag(cos θ)·Vᵀ, given the residual R whose columns along V have lengths sin θ.

    A generalised matrix function of C (Noferini 2017, sec. 5): its derivative splits into a symmetric part, with the
    divided differences, and an antisymmetric one, with sums. R says only how large the angles are; as a function of C
    alone the value is the same, so it gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, c: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        u, cosines, vh = torch.linalg.svd(c, full_matrices=False)
        sines = torch.linalg.vector_norm(residual @ vh.mT, dim=-2)
        positive = sines > 0
        ratios = torch.where(positive, torch.atan2(sines, cosines) / torch.where(positive, sines, 1), 1)
        ctx.save_for_backward(u, cosines, vh, ratios)
        return (vh.mT * ratios.unsqueeze(-2)) @ u.mT

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        refuse_second_order("Grassmann.logmap")
        u, cosines, vh, ratios = ctx.saved_tensors
        core = u.mT @ grad.mT @ vh.mT
        even, odd = (core + core.mT) / 2, (core - core.mT) / 2
        sums = cosines.unsqueeze(-1) + cosines.unsqueeze(-2)
        # Two right angles at once are on the cut locus, where there is no derivative; zero stands for it.
        quotient = (ratios.unsqueeze(-1) + ratios.unsqueeze(-2)) / torch.where(sums > 0, sums, torch.inf)
        return u @ (_divided_differences(cosines, ratios) * even + quotient * odd) @ vh, None


class Grassmann(geoopt.manifolds.base.Manifold):  # type: ignore[misc]  # geoopt has no types
    r"""Subspaces of dimension k in R^n, each given by an n×k matrix with orthonormal columns that spans it.

    Bases with the same span are the same point. Tangent vectors at x are the horizontal ones, xᵀu = 0, with the
    Euclidean inner product (Edelman, Arias and Smith 1998; Bendokat, Zimmermann and Absil 2024). The last two
    dimensions of a tensor are the point, those before are a batch. It works with geoopt.optim.RiemannianAdam and
    RiemannianSGD on a geoopt.ManifoldParameter.

    In the methods x and y are points and u and v tangent vectors, at x where nothing else is said, all (..., n, k) of one
    floating dtype and device, which results keep; ``keepdim`` leaves the last two dimensions of a number in place, as 1.
    Lengths are in radians, as principal angles are.

    Examples:
        >>> manifold = fg.Grassmann()
        >>> u, v = torch.eye(3, dtype=torch.float64)[:, :1], torch.eye(3, dtype=torch.float64)[:, 1:2]
        >>> round(float(manifold.dist(u, v)), 4)  # a right angle
        1.5708
    """

    ndim = 2
    reversible = False
    name = "Grassmann"

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        ok, reason = super()._check_shape(shape, name)
        if ok and shape[-1] > shape[-2]:
            ok, reason = False, f"`{name}` should have shape[-1] <= shape[-2], got {shape[-1]} > {shape[-2]}"
        return ok, reason

    def _check_point_on_manifold(
        self, x: torch.Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        gram = x.mT @ x
        identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(gram)
        if torch.allclose(gram, identity, atol=atol, rtol=rtol):
            return True, None
        return False, f"`X^T X != I` with atol={atol}, rtol={rtol}"

    def _check_vector_on_tangent(
        self, x: torch.Tensor, u: torch.Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        vertical = x.mT @ u
        if torch.allclose(vertical, torch.zeros_like(vertical), atol=atol, rtol=rtol):
            return True, None
        return False, f"`x^T u != 0` with atol={atol}, rtol={rtol}"

    def projx(self, x: torch.Tensor) -> torch.Tensor:
        """Nearest matrix with orthonormal columns, the polar factor of x (..., n, k); the span is that of x."""
        return _Polar.apply(x)  # type: ignore[no-untyped-call]

    def proju(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Horizontal part u − x(xᵀu), (..., n, k)."""
        return u - x @ (x.mT @ u)

    def egrad2rgrad(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Riemannian gradient of a function with Euclidean gradient u: its horizontal part, (..., n, k)."""
        return self.proju(x, u)

    def inner(
        self, x: torch.Tensor, u: torch.Tensor, v: torch.Tensor | None = None, *, keepdim: bool = False
    ) -> torch.Tensor:
        """Inner product tr(uᵀv) of tangent vectors, of the batch shape, or (..., 1, 1) with `keepdim`."""
        return (u * (u if v is None else v)).sum(dim=(-2, -1), keepdim=keepdim)

    def norm(self, x: torch.Tensor, u: torch.Tensor, *, keepdim: bool = False) -> torch.Tensor:
        """Length of a tangent vector, of the batch shape; its gradient at zero is zero."""
        return torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=keepdim)

    def expmap(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """End of the geodesic from x along u, x·cos √(uᵀu) + u·sin √(uᵀu)/√(uᵀu), (..., n, k).

        Smooth at zero, gradients too.
        """
        cosine, sinc = _cos_and_sinc(u.mT @ u)
        return x @ cosine + u @ sinc

    def retr(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Polar retraction of x + u, (..., n, k), of second order."""
        return self.projx(x + u)

    def logmap(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Tangent vector at x, (..., n, k), whose geodesic reaches the span of y at time one, the shortest there is.

        After Bendokat, Zimmermann and Absil (2024, alg. 5.3), but with θ/sin θ from both sine and cosine, so that it
        is exact to rounding at zero and at right angles; there, on the cut locus, it is one of several shortest.
        Once differentiable off the cut locus, zero and equal angles included.
        """
        away = self.proju(x, self.proju(x, y))
        return away @ _ArcFactor.apply(x.mT @ y, away.detach())  # type: ignore[no-untyped-call]

    def dist(self, x: torch.Tensor, y: torch.Tensor, *, keepdim: bool = False) -> torch.Tensor:
        """Arc length ‖θ‖ over the principal angles, of the batch shape; its gradient where x and y span the same is zero."""
        return self._shape(torch.linalg.vector_norm(angles_between(x, y), dim=-1), keepdim)

    def dist2(self, x: torch.Tensor, y: torch.Tensor, *, keepdim: bool = False) -> torch.Tensor:
        """Squared arc length, of the batch shape, with gradient −2·logmap(x, y) by x."""
        return self._shape(angles_between(x, y).square().sum(-1), keepdim)

    @staticmethod
    def _shape(value: torch.Tensor, keepdim: bool) -> torch.Tensor:
        return value[..., None, None] if keepdim else value

    def geodesic(self, t: torch.Tensor | float, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Point at time t, (..., n, k), of the shortest geodesic from x (t = 0) to the span of y (t = 1), at constant speed.

        Args:
            t: number, or tensor whose shape broadcasts against the batch of x once two dimensions are added to it.
            x: start, (..., n, k).
            y: end, (..., n, k).
        """
        time = t[..., None, None] if isinstance(t, torch.Tensor) else t
        return self.expmap(x, time * self.logmap(x, y))

    def transp_follow_expmap(self, x: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Parallel transport of v along the geodesic from x in direction u (Edelman, Arias, Smith 1998, eq. 2.68), (..., n, k).

        With G = uᵀu it is v − x·(sin √G/√G)·uᵀv − u·((1 − cos √G)/G)·uᵀv, smooth at u = 0.
        """
        gram, along = u.mT @ u, u.mT @ v
        half = _cos_and_sinc(gram / 4)[1]
        return v - x @ (_cos_and_sinc(gram)[1] @ along) - u @ (half @ (half @ along)) / 2

    def transp(self, x: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Parallel transport of v from x to y along the shortest geodesic: a tangent vector at the basis y, (..., n, k)."""
        u = self.logmap(x, y)
        return self.transp_follow_expmap(x, u, v) @ (self.expmap(x, u).mT @ y)

    def expmap_transp(self, x: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`expmap` and `transp_follow_expmap` at once, (..., n, k) each."""
        return self.expmap(x, u), self.transp_follow_expmap(x, u, v)

    def transp_follow_retr(self, x: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Vector transport to retr(x, u): the horizontal part of v there, (..., n, k)."""
        return self.proju(self.retr(x, u), v)

    def retr_transp(self, x: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`retr` and `transp_follow_retr` at once, (..., n, k) each."""
        y = self.retr(x, u)
        return y, self.proju(y, v)

    def random(
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> geoopt.ManifoldTensor:
        """Uniformly random subspace: the span of a Gaussian matrix (..., n, k).

        Args:
            size: shape (..., n, k), as integers or one tuple.
            dtype: torch dtype.
            device: torch device.
            generator: torch.Generator on that device, or None for the global one.
        """
        shape = size2shape(*size)
        self._assert_check_shape(shape, "x")
        gaussian = torch.randn(shape, dtype=dtype, device=device, generator=generator)
        return geoopt.ManifoldTensor(torch.linalg.qr(gaussian).Q, manifold=self)

    def origin(
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> geoopt.ManifoldTensor:
        """Span of the first k unit vectors, (..., n, k); `seed` is not used.

        Args:
            size: shape (..., n, k), as integers or one tuple.
            dtype: torch dtype.
            device: torch device.
            seed: accepted for geoopt's sake.
        """
        shape = size2shape(*size)
        self._assert_check_shape(shape, "x")
        first = torch.eye(shape[-2], shape[-1], dtype=dtype, device=device).expand(shape).clone()
        return geoopt.ManifoldTensor(first, manifold=self)


def karcher_mean(
    points: torch.Tensor, weights: torch.Tensor | None = None, tol: float = 1e-10, max_iter: int = 100
) -> torch.Tensor:
    """Subspace with the least weighted sum of squared geodesic distances to the given ones.

    Fixed point of x ← exp_x(Σ w_i log_x(y_i)) (Karcher 1977), started at the extrinsic mean, the leading eigenvectors
    of Σ w_i y_i y_iᵀ. Unique where the points lie within a ball of radius π/4; elsewhere this is a local minimum.

    Args:
        points: orthonormal bases, (n, p, k).
        weights: (n,), not negative, not all zero; equal when left out. They are normalised.
        tol: the mean tangent step's norm to stop at; never below the dtype's own rounding.
        max_iter: most steps.

    Returns:
        Orthonormal basis (p, k) of the mean, of the points' dtype; no gradient.

    Raises:
        TypeError: points or weights are not floating tensors, or an option has the wrong type.
        ValueError: bases that are not orthonormal, weights of the wrong shape or sign, or options out of range.
        RuntimeError: not converged after `max_iter` steps; the points are too far apart, or `tol` too small.

    Examples:
        >>> angle = torch.tensor(0.3, dtype=torch.float64)
        >>> u = torch.stack([angle.cos(), angle.sin()])[:, None]
        >>> mean = fg.karcher_mean(torch.stack([u, u * torch.tensor([[1.0], [-1.0]])]))
        >>> [round(abs(v), 4) for v in mean.flatten().tolist()]
        [1.0, 0.0]
    """
    points = check_basis("points", points)
    if points.ndim != 3:
        raise ValueError(f"points must have shape (n, p, k), got {tuple(points.shape)}")
    check_number("tol", tol, low=0)
    check_integer("max_iter", max_iter, low=1)
    work = torch.promote_types(points.dtype, torch.float32)
    y = points.detach().to(work)
    if weights is None:
        share = y.new_full((len(y),), 1 / len(y))
    else:
        check_finite("weights", check_tensor("weights", weights, min_dim=1))
        check_same_kind("weights", weights, "points", points)
        if weights.shape != (len(y),) or bool((weights < 0).any()) or float(weights.max()) == 0:
            raise ValueError(f"weights must be {len(y)} numbers, not negative and not all zero, got {weights.tolist()}")
        share = weights.detach().to(work)
        share = share / share.max()  # their sum may overflow
        share = share / share.sum()
    if y.shape[-1] == 0:
        return points[0].detach()
    manifold = Grassmann()
    stacked = (share.sqrt()[:, None, None] * y).permute(1, 0, 2).flatten(1)
    x = torch.linalg.svd(stacked, full_matrices=False)[0][:, : y.shape[-1]]
    stop = max(tol, 100 * torch.finfo(work).eps)
    length = float("inf")
    for _ in range(max_iter):
        step = (share[:, None, None] * manifold.logmap(x.expand_as(y), y)).sum(0)
        length = float(step.norm())
        if length <= stop:
            return x.to(points.dtype)
        x = manifold.projx(manifold.expmap(x, step))
    raise RuntimeError(
        f"the Karcher mean did not converge: after {max_iter} steps the mean tangent vector has norm {length:.3g}, "
        f"above {stop:.3g}; the points may be too far apart for a unique mean"
    )
