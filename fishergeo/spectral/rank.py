"""How many eigenvalues stand above noise: Marchenko-Pastur edge, Gavish-Donoho threshold, random sign flips.

All look at F = 1/n Σ x_i x_iᵀ of n samples in R^p. Pure noise of variance σ² spreads its eigenvalues over
σ²(1 ± √γ)², γ = p/n, so what lies within says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import scipy.integrate
import scipy.optimize
import torch
from torch import Tensor

from fishergeo._checks import (
    check_descending,
    check_finite,
    check_integer,
    check_not_negative,
    check_number,
    check_tensor,
)
from fishergeo._linalg import binary_exponent


def marchenko_pastur_edge(samples: int, size: int, variance: float = 1.0) -> float:
    """σ²(1 + √(p/n))², the largest eigenvalue that noise has in the limit (Marchenko and Pastur 1967).

    Args:
        samples: n.
        size: p.
        variance: σ² of an entry.

    Returns:
        The edge, in the units of the variance.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for arguments out of range.

    Examples:
        >>> fg.marchenko_pastur_edge(samples=100, size=100)
        4.0
    """
    check_integer("samples", samples, low=1)
    check_integer("size", size, low=1)
    return check_number("variance", variance, low=0.0) * (1 + math.sqrt(size / samples)) ** 2


@lru_cache(maxsize=256)
def marchenko_pastur_median(ratio: float) -> float:
    """The median of the Marchenko-Pastur law of ratio γ in (0, 1] and unit variance, by its integral."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    centre, radius = (low + high) / 2, (high - low) / 2

    def mass(x: float) -> float:
        # λ = centre − radius·cos φ takes the square roots away at both ends.
        angle = math.acos(max(-1.0, min(1.0, (centre - x) / radius)))
        density = lambda phi: (radius * math.sin(phi)) ** 2 / max(centre - radius * math.cos(phi), 1e-300)  # noqa: E731
        return scipy.integrate.quad(density, 0.0, angle)[0] / (2 * math.pi * ratio)

    return float(scipy.optimize.brentq(lambda x: mass(x) - 0.5, low, high, xtol=1e-12))


def gavish_donoho_factor(ratio: float, known_noise: bool = False) -> float:
    """The optimal hard threshold for singular values (Gavish and Donoho 2014, arXiv 1305.5870).

    For known noise of standard deviation σ in an m×n matrix, m ≤ n, β = m/n: τ = λ(β)·√n·σ, with
    λ(β) = √(2(β+1) + 8β/((β+1) + √(β²+14β+1))). For unknown noise: τ = ω(β)·median singular value, with
    ω(β) = λ(β)/√μ_β, μ_β the median of the Marchenko-Pastur law. λ(1) = 4/√3; ω(1) ≈ 2.858.

    Args:
        ratio: β in (0, 1].
        known_noise: return λ(β) rather than ω(β).

    Returns:
        The factor.

    Raises:
        TypeError: if ratio is no number.
        ValueError: unless 0 < ratio ≤ 1.

    Examples:
        >>> round(fg.gavish_donoho_factor(1.0), 3)  # of square matrices
        2.858
    """
    beta = check_number("ratio", ratio, low=0.0, high=1.0)
    if beta == 0:
        raise ValueError("ratio must be positive")
    factor = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta * beta + 14 * beta + 1)))
    return factor if known_noise else factor / math.sqrt(marchenko_pastur_median(beta))


def _spectrum(values: Tensor, samples: int, size: int) -> tuple[Tensor, Tensor]:
    """Checked values, and the min(p, n) of them that noise can make positive."""
    check_integer("samples", samples, low=1)
    check_integer("size", size, low=1)
    check_finite("values", check_tensor("values", values, min_dim=1))
    if values.ndim != 1 or bool((values[1:] > values[:-1]).any()):
        raise ValueError(f"values must be one descending sequence, got shape {tuple(values.shape)}")
    most = min(samples, size)
    checked = values.double().clamp_min(0)
    if len(checked) > size:
        raise ValueError(f"values holds {len(checked)} eigenvalues of an operator of size {size}")
    return checked, checked[:most]


def _median(values: Tensor, samples: int, size: int) -> float:
    if len(values) < min(samples, size):
        raise ValueError(
            f"the noise is estimated from the median of all {min(samples, size)} eigenvalues, but values holds "
            f"{len(values)}; pass variance="
        )
    return float(values.quantile(0.5))


def rank_by_noise_edge(values: Tensor, samples: int, size: int, variance: float | None = None) -> int:
    """How many eigenvalues of F = 1/n Σ x_i x_iᵀ exceed the edge of Marchenko and Pastur (1967).

    Args:
        values: eigenvalues of F, descending, (k,), any floating dtype. All min(n, p) of them if ``variance`` is left out.
        samples: n; for one-sided Fishers the number of columns that all G_i have. Those are divided by the N examples, so
            that with ``variance`` their eigenvalues are to be multiplied by N/n; the median needs no such scale.
        size: p.
        variance: variance of the noise in one entry of x; from the median eigenvalue if left out.

    Returns:
        From 0 to k.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for arguments out of range, values that do not descend, or too few for their median.

    Examples:
        >>> fg.rank_by_noise_edge(torch.tensor([50.0, 1.1, 1.0, 0.9]), samples=1000, size=4)
        1
    """
    checked, positive = _spectrum(values, samples, size)
    if variance is None:
        ratio = min(samples, size) / max(samples, size)
        # Of 1/n X Xᵀ with p > n, the law of ratio n/p holds for 1/p XᵀX: a factor p/n.
        scale = max(1.0, size / samples)
        variance = _median(positive, samples, size) / (marchenko_pastur_median(ratio) * scale)
    return int((checked > marchenko_pastur_edge(samples, size, variance) * (1 + 1e-12)).sum())


def rank_by_gavish_donoho(values: Tensor, samples: int, size: int, variance: float | None = None) -> int:
    """How many eigenvalues to keep for the least error in x: singular values above the optimal hard threshold.

    The threshold of Gavish and Donoho (2014); see :func:`gavish_donoho_factor`.

    Args:
        values: eigenvalues of F = 1/n Σ x_i x_iᵀ, descending, (k,), any floating dtype. All min(n, p) of them if ``variance`` is left out.
        samples: n; one-sided Fishers as for :func:`rank_by_noise_edge`.
        size: p.
        variance: variance of the noise in one entry of x; from the median singular value if left out.

    Returns:
        From 0 to k; never more than :func:`rank_by_noise_edge` finds with the same variance.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: as :func:`rank_by_noise_edge`.

    Examples:
        >>> fg.rank_by_gavish_donoho(torch.tensor([50.0, 1.1, 1.0, 0.9]), samples=1000, size=4)
        1
    """
    checked, positive = _spectrum(values, samples, size)
    singular = (checked * samples).sqrt()
    ratio = min(samples, size) / max(samples, size)
    if variance is None:
        # The median of the roots: of an even number it is not the root of the median.
        threshold = gavish_donoho_factor(ratio) * _median(positive.sqrt(), samples, size) * math.sqrt(samples)
    else:
        noise = math.sqrt(check_number("variance", variance, low=0.0))
        threshold = gavish_donoho_factor(ratio, known_noise=True) * math.sqrt(max(samples, size)) * noise
    return int((singular > threshold * (1 + 1e-12)).sum())


def rank_by_sign_flips(
    samples: Tensor, generator: torch.Generator, draws: int = 20, level: float = 0.95, *, dual: bool = False
) -> int:
    """How many eigenvalues exceed those of the same numbers with random signs (Hong, Sheng and Dobriban 2020).

    Random signs keep the size of every entry, heavy tails and unequal variances included, and destroy what the
    entries have in common. Directions are accepted one after the other while the j-th eigenvalue exceeds the quantile
    of the *largest* one of the flipped data, after the accepted ones are taken out (with a correction for the degrees of
    freedom that they took along).

    Args:
        samples: (n, p), or (n, p, c) for c columns an example, as G_i·Ω has, of any floating dtype; with ``dual`` their Gram matrix (n, n),
            K_ij = ⟨x_i, x_j⟩, whose cross terms are flipped. That is for p ≫ n: a flipped Gram matrix lacks the n
            that the Marchenko-Pastur edge has beside p + 2√(pn).
        generator: source of the signs, on the CPU.
        draws: random sign patterns, at least 1.
        level: coverage of the quantile, in (0, 1).
        dual: transposed samples; see ``samples``.

    Returns:
        From 0 to the rank of the samples.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for arguments out of range, NaN, or a Gram matrix that is not square.

    Examples:
        >>> g = torch.Generator().manual_seed(0)
        >>> samples = torch.randn(100, 1, generator=g) * torch.full((6,), 3.0) + torch.randn(100, 6, generator=g)
        >>> fg.rank_by_sign_flips(samples, g)
        1
    """
    check_finite("samples", check_tensor("samples", samples, min_dim=2))
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    check_integer("draws", draws, low=1)
    check_number("level", level, low=1e-6, high=1 - 1e-6)
    rest = samples.detach().double()
    rest = rest * math.ldexp(1.0, -binary_exponent(float(rest.abs().max()), rest.dtype))
    if dual:
        if rest.ndim != 2 or rest.shape[0] != rest.shape[1]:
            raise ValueError(f"the Gram matrix must be square, got shape {tuple(samples.shape)}")
        return _flipped_gram(rest, generator, draws, level)
    if rest.ndim not in (2, 3):
        raise ValueError(f"samples must have shape (n, p) or (n, p, c), got {tuple(samples.shape)}")
    rest = rest.movedim(1, -1).flatten(0, -2)
    left, singular, right = torch.linalg.svd(rest, full_matrices=False)
    n, p = rest.shape
    for j in range(len(singular)):
        null = torch.stack([_norm(rest * _signs(rest.shape, generator, rest.device)) for _ in range(draws)])
        # What is left after j directions has (n − j)(p − j) degrees of freedom, and less noise than the data.
        if not bool(singular[j] > null.quantile(level) * (n * p / ((n - j) * (p - j))) ** 0.5 * (1 + 1e-9)):
            return j
        rest = rest - singular[j] * torch.outer(left[:, j], right[j])
    return len(singular)


def _norm(matrix: Tensor) -> Tensor:
    """The spectral norm by the smaller Gram matrix, which is much cheaper than an SVD."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt()


def _signs(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    return (torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1).to(device, torch.float64)


def _flipped_gram(gram: Tensor, generator: torch.Generator, draws: int, level: float) -> int:
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh((gram + gram.T) / 2))
    rest = (gram + gram.T) / 2
    for j in range(len(values)):
        null = []
        for _ in range(draws):
            upper = _signs(rest.shape, generator, rest.device).triu(1)
            signs = upper + upper.T + torch.eye(len(rest), dtype=rest.dtype, device=rest.device)
            null.append(torch.linalg.eigvalsh(rest * signs)[-1])
        if not bool(values[j] > torch.stack(null).quantile(level) * len(rest) / (len(rest) - j) * (1 + 1e-9)):
            return j
        rest = rest - values[j] * torch.outer(vectors[:, j], vectors[:, j])
    return len(values)


def rank_for_energy(
    values: torch.Tensor | Sequence[float], *, energy: float = 0.8, total: float | torch.Tensor | None = None
) -> int:
    """Smallest m whose m leading values hold at least the share `energy` of the total.

    The rule of AlignGuard-LoRA (arXiv 2508.02079): the protected rank holds at least 80 % of the Fisher's trace.

    Args:
        values: leading eigenvalues, shape (k,), any floating dtype, descending, not negative.
        energy: the share, in (0, 1].
        total: the trace that they are a share of, a number or scalar tensor; their sum when left out.

    Returns:
        m from 1 to k, or 0 where there is no energy at all. k if even all known values do not reach the share: they
        are all that is known, and the caller who needs more asks the eigensolver for more.

    Raises:
        TypeError: values are not floating, or an argument is not a number.
        ValueError: values are not one descending, finite, non-negative sequence, `total` is less than their sum, or
            `energy` lies outside (0, 1].

    Examples:
        >>> fg.rank_for_energy([5.0, 3.0, 1.0, 1.0], energy=0.8)
        2
    """
    if not isinstance(values, torch.Tensor):
        try:
            values = torch.tensor(list(values), dtype=torch.float64)
        except (TypeError, ValueError):
            raise TypeError(f"values must be a tensor or a sequence of numbers, got {type(values).__name__}") from None
    eps = torch.finfo(check_descending("values", values).dtype).eps
    spectrum = values.detach().to(torch.float64)
    check_not_negative("values", spectrum)
    share = check_number("energy", energy, high=1)
    if share <= 0:
        raise ValueError(f"energy must lie in (0, 1], got {energy}")
    held = spectrum.cumsum(0)
    known = float(held[-1])
    whole = (
        known if total is None else check_number("total", float(total) if isinstance(total, torch.Tensor) else total)
    )
    # A trace that was summed in another order or in single precision may be a rounding less than the sum, which the shift
    # of a sketch's columns adds to besides.
    if whole < known * (1 - max(1e-5, min(0.1, 10 * len(values) * eps))):
        raise ValueError(f"total is {whole:.6g}, less than the sum {known:.6g} of the values it should contain")
    if known == 0:
        return 0
    reached = held >= share * max(whole, known) * (1 - 1e-12)
    return int(reached.to(torch.int64).argmax()) + 1 if bool(reached.any()) else spectrum.numel()
