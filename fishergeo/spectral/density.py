"""The whole spectrum of an operator from a few products: stochastic Lanczos quadrature.

Ubaru, Chen and Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature". A Lanczos run of m steps
from a random vector z is a Gauss quadrature of the measure Σ_j (u_jᵀz)² δ(λ − λ_j): exact for polynomials of degree
2m − 1 for that z. The mean over probes estimates the density of eigenvalues.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fishergeo._checks import check_finite, check_integer, check_number, check_tensor
from fishergeo._linalg import binary_exponent, directions
from fishergeo.operators import DENSE_LIMIT, BlackBox, SymmetricOperator, black_box
from fishergeo.spectral.traces import Estimate


@dataclass(frozen=True)
class SpectralDensity:
    """An estimate of the density of eigenvalues: one Lanczos quadrature a probe (Ubaru, Chen and Saad 2017).

    Attributes:
        nodes: (probes, steps), Ritz values, float64.
        weights: (probes, steps), not negative, float64; each row sums to one.
        size: size of the operator, so that the density counts ``size`` eigenvalues.
        passes: block products that it took, each one pass over the data of a streamed operator.

    Examples:
        >>> density = fg.spectral_density(torch.diag(torch.tensor([1.0, 1.0, 9.0, 9.0], dtype=torch.float64)), probes=4, steps=2)
        >>> round(float(density.moment(0)), 4)  # how many eigenvalues there are
        4.0
    """

    nodes: Tensor
    weights: Tensor
    size: int
    passes: int

    def integrate(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Tr f(A), with its standard error over probes.

        Args:
            function: f, applied elementwise to a tensor of eigenvalues, (probes, steps). Its values at nodes of weight
                zero, past the end of an exhausted chain, are ignored, NaN and infinity too.

        Returns:
            Estimate with scalar tensors.
        """
        terms = self.weights * function(self.nodes)
        samples = self.size * torch.where(self.weights > 0, terms, 0.0).sum(1)
        error = samples.std() / len(samples) ** 0.5 if len(samples) > 1 else samples.new_full((), torch.nan)
        return Estimate(samples.mean(), error, self.passes * len(samples))

    def count(self, low: float, high: float) -> Estimate:
        """How many eigenvalues lie in [low, high]."""
        return self.integrate(lambda x: ((x >= low) & (x <= high)).to(x.dtype))

    def moment(self, power: int) -> Estimate:
        """tr(Aᵖ) for p = ``power``, without bias for powers below twice the steps."""
        return self.integrate(lambda x: x**power)

    def density(self, grid: Tensor, width: float | None = None) -> Tensor:
        """The density smoothed by a Gaussian, integrating to one.

        Args:
            grid: (g,), where to evaluate.
            width: standard deviation of the Gaussian; a fiftieth of the range of the nodes if left out.

        Returns:
            (g,), per unit of eigenvalue.

        Raises:
            TypeError: if the grid is not a floating tensor, or the width no number.
            ValueError: unless width > 0.
        """
        check_tensor("grid", grid, min_dim=1)
        if width is None:
            width = max(float(self.nodes.max() - self.nodes.min()) / 50, torch.finfo(self.nodes.dtype).tiny)
        elif check_number("width", width, low=0.0) == 0:
            raise ValueError("width must be positive")
        scaled = (grid.to(self.nodes)[:, None] - self.nodes.flatten()[None]) / width
        kernel = (-0.5 * scaled.square()).exp() / (width * (2 * torch.pi) ** 0.5)
        return kernel @ self.weights.flatten() / len(self.nodes)


@torch.no_grad()
def spectral_density(
    op: BlackBox, probes: int = 16, steps: int = 64, *, size: int | None = None, seed: int = 0
) -> SpectralDensity:
    """Stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017) with full reorthogonalisation, all probes at once.

    ``steps`` products with a block of ``probes`` columns; memory is size·probes·steps numbers.

    Args:
        op: an operator, a symmetric tensor, a SciPy LinearOperator, or a function of a (size, c) block; indefinite ones
            too.
        probes: random vectors.
        steps: Lanczos steps, cut to the size.
        size: size of a function's blocks.
        seed: seed of the vectors, which are the same on every device.

    Returns:
        SpectralDensity, in float64 on the CPU.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for arguments out of range.
        FloatingPointError: if a product holds NaN or infinity.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 1.0, 9.0, 9.0], dtype=torch.float64))
        >>> density = fg.spectral_density(A, probes=4, steps=2)
        >>> [round(v, 4) for v in sorted(set(density.nodes.flatten().round(decimals=6).tolist()))]
        [1.0, 9.0]
    """
    matmul, n, kind, device = black_box(op, size)
    steps = min(check_integer("steps", steps, low=1), n)
    check_integer("probes", probes, low=1)
    dtype = torch.promote_types(kind, torch.float32)
    start = directions(n, probes, seed, "density").to(device, dtype)
    q = start / torch.linalg.vector_norm(start, dim=0)
    basis = torch.zeros(probes, n, steps, dtype=dtype, device=device)
    alphas, betas = torch.zeros(steps, probes, dtype=torch.float64), torch.zeros(steps, probes, dtype=torch.float64)
    scale = torch.zeros(probes, dtype=torch.float64)
    exponent = 0
    for j in range(steps):
        basis[:, :, j] = q.T
        image = matmul(q.to(kind)).to(dtype)
        if not bool(torch.isfinite(image).all()):
            raise FloatingPointError("the operator's product holds NaN or infinity")
        if j == 0:
            # The squares of a small operator's products would be zero, and all chains end.
            exponent = binary_exponent(float(image.abs().max()), dtype)
        image = image * math.ldexp(1.0, -exponent)
        alphas[j] = (q * image).sum(0).cpu().double()
        rest = image.T[:, :, None]
        for _ in range(2):
            known = basis[:, :, : j + 1]
            rest = rest - known @ (known.mT @ rest)
        scale = torch.maximum(scale, torch.linalg.vector_norm(image, dim=0).cpu().double())
        norms = torch.linalg.vector_norm(rest[:, :, 0], dim=1)
        betas[j] = norms.cpu().double()
        # An exhausted probe has an invariant subspace: its chain ends, by a coupling of zero.
        ended = betas[j] <= 16 * torch.finfo(dtype).eps * n**0.5 * scale
        betas[j] = torch.where(ended, 0.0, betas[j])
        divisor = torch.where(ended.to(device), 1.0, norms)
        q = torch.where(ended.to(device), 0.0, rest[:, :, 0].T / divisor)
    tridiagonal = torch.diag_embed(alphas.T)
    if steps > 1:
        coupling = torch.diag_embed(betas[:-1].T, offset=1)
        tridiagonal = tridiagonal + coupling + coupling.mT
    nodes, rotation = torch.linalg.eigh(tridiagonal)
    return SpectralDensity(nodes * math.ldexp(1.0, exponent), rotation[:, 0, :].square(), n, steps)


def effective_dimension(
    spectrum: SymmetricOperator | LinearOperator | SpectralDensity | Tensor, damping: float
) -> float:
    """Σ λ/(λ + damping): how many directions the damping leaves free.

    The effective number of parameters of MacKay (1992), the degrees of freedom of ridge regression.

    Args:
        spectrum: an operator, of SciPy's too, whose eigenvalues are computed; an estimated density; or all eigenvalues,
            (size,), any floating dtype, of which zeros may be left out. Rounding below zero counts as zero, and so does
            what an estimated density has there.
        damping: positive, in the unit of the eigenvalues.

    Returns:
        From 0 to the number of eigenvalues.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: unless damping > 0, or for values that are not finite, negative beyond rounding or not one sequence, or a
            SciPy operator that is too large to be made dense: estimate its :func:`spectral_density`.

    Examples:
        >>> fg.effective_dimension(torch.tensor([1.0, 1.0, 0.0]), damping=1.0)  # Σ λ/(λ + 1)
        1.0
    """
    if check_number("damping", damping, low=0.0) == 0:
        raise ValueError("damping must be positive")
    share: Callable[[Tensor], Tensor] = lambda x: x.clamp_min(0) / (x.clamp_min(0) + damping)  # noqa: E731
    if isinstance(spectrum, SpectralDensity):
        return float(spectrum.integrate(share))
    if isinstance(spectrum, LinearOperator):
        values = _dense_eigenvalues(spectrum)
    else:
        values = spectrum.eigenvalues() if isinstance(spectrum, SymmetricOperator) else spectrum
    check_finite("spectrum", check_tensor("spectrum", values))
    if values.ndim != 1:
        raise ValueError(
            f"spectrum must be one sequence of eigenvalues, got shape {tuple(values.shape)}; hand a matrix over as "
            "DenseOperator(matrix)"
        )
    if bool((values < -len(values) * torch.finfo(values.dtype).eps ** 0.75 * values.abs().max()).any()):
        raise ValueError(
            f"spectrum is not that of a positive semi-definite operator: its least eigenvalue is {float(values.min()):.3g}"
        )
    return float(share(values.double()).sum())


def _dense_eigenvalues(op: LinearOperator) -> Tensor:
    product, size, dtype, device = black_box(op)
    if size > DENSE_LIMIT:
        raise ValueError(
            f"an operator of size {size} is not made dense; hand its spectral_density to effective_dimension instead"
        )
    dense = product(torch.eye(size, dtype=dtype, device=device))
    product, *_ = black_box(dense)  # refuses what is not symmetric
    return torch.linalg.eigvalsh(product(torch.eye(size, dtype=dtype, device=device)))
