"""How many dimensions of an estimated subspace are real: perturbation bounds, resampling, agreement across seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch

from fishergeo._checks import (
    check_finite,
    check_generator,
    check_integer,
    check_number,
    check_tensor,
)
from fishergeo.operators import SymmetricOperator


@dataclass(frozen=True)
class Agreement:
    """Overlap of leading eigenspaces over resamplings, for every dimension j from 1 to m.

    The idea of stability under resampling is that of Ben-Hur et al. (2002), who asked it of clusters. Tensors are float32
    or wider.

    Attributes:
        mean: mean overlap of the top-j spaces (‖U_jᵀV_j‖²/j, see `subspace_overlap`), shape (m,).
        low: lower end of the percentile interval, (m,).
        high: upper end, (m,).
        chance: what random j-dimensional subspaces of R^p overlap by on average, j/p, (m,).

    Examples:
        >>> g = torch.Generator().manual_seed(0)
        >>> samples = torch.randn(100, 6, generator=g) * torch.tensor([9.0, 5.0, 0.1, 0.1, 0.1, 0.1])
        >>> agreement = fg.split_half_agreement(samples, 3, g)
        >>> [round(v, 2) for v in agreement.mean.tolist()]
        [0.96, 1.0, 0.69]
        >>> agreement.dimensions(0.9)
        2
    """

    mean: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    chance: torch.Tensor

    def dimensions(self, threshold: float = 0.5) -> int:
        """Largest j whose lower end reaches the threshold and exceeds chance; 0 if there is none.

        Args:
            threshold: overlap in [0, 1] to ask for.

        Raises:
            TypeError: not a number.
            ValueError: outside [0, 1].
        """
        threshold = check_number("threshold", threshold, low=0, high=1)
        real = ((self.low >= threshold) & (self.low > self.chance)).nonzero()
        return int(real.max()) + 1 if len(real) else 0


class Confidence(NamedTuple):
    """Directions and how sure the examples are of each; `SoftProjector(*confidence)` protects them so far.

    Attributes:
        basis: orthonormal columns, leading direction first, (p, m), float32 or wider.
        weights: weights, in [0, 1], (m,), the same dtype.

    Examples:
        >>> fg.SoftProjector(*fg.Confidence(torch.eye(3)[:, :2], torch.tensor([1.0, 0.5]))).rank
        2
    """

    basis: torch.Tensor
    weights: torch.Tensor


class _Samples(NamedTuple):
    """Samples in coordinates of their own span.

    Attributes:
        reduced: (n, d, c) float64, d the numerical rank, over a constant of their own size.
        frame: orthonormal basis of the span, (p, d), float32 or wider.
        floor: an eigenvalue of Σ x xᵀ up to which there is nothing but rounding.
    """

    reduced: torch.Tensor
    frame: torch.Tensor
    floor: float


def _checked(samples: object, m: object, generator: object, draws: object) -> _Samples:
    """The samples, once everything that concerns their resampling is known to be in order."""
    checked = check_tensor("samples", samples, min_dim=2)
    if checked.ndim not in (2, 3):
        raise ValueError(f"samples must have shape (n, p) or (n, p, c), got {tuple(checked.shape)}")
    check_finite("samples", checked)
    check_generator("generator", generator)
    check_integer("draws", draws, low=2)
    columns = checked.detach().to(torch.promote_types(checked.dtype, torch.float32))
    columns = columns if columns.ndim == 3 else columns.unsqueeze(-1)
    n, p, c = columns.shape
    if n < 4:
        raise ValueError(f"samples holds {n} examples, at least 4 are needed to resample")
    m = check_integer("m", m, low=1, high=min(p, n * c))
    flat = columns.permute(1, 0, 2).reshape(p, n * c)
    flat = flat / flat.abs().max().clamp_min(torch.finfo(flat.dtype).tiny)  # squares of any scale stay in range
    frame, r = torch.linalg.qr(flat)
    gram = r.double() @ r.double().mT
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh(gram))
    # Rounding of the entries adds about ε·(longest row + longest column) to a singular value (random signs), and the
    # factorisation its own; the directions that are left without more than that would be those of noise.
    entries = torch.finfo(checked.dtype).eps * float(flat.norm(dim=0).max() + flat.norm(dim=1).max())
    whole, size = float(values[0].clamp_min(0)), max(flat.shape)
    computed = 4 * torch.finfo(flat.dtype).eps * size**0.5 * whole**0.5
    floor = max((entries + computed) ** 2, 4 * torch.finfo(torch.float64).eps * size**0.5 * whole)
    rank = int((values > floor).sum())
    if m > rank:
        raise ValueError(
            f"m is {m}, but samples have only {rank} directions above rounding, the others are without data; ask for at "
            f"most {rank}"
            if rank
            else "samples are all zero, so there is no direction to tell from another"
        )
    turn = vectors[:, :rank]
    return _Samples((turn.mT @ r.double()).reshape(rank, n, c).permute(1, 0, 2), frame @ turn.to(frame), floor)


def _resampled(samples: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """How often each example is drawn in a bootstrap resample, (n,)."""
    n = len(samples)
    return torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).to(samples)


def _leading(samples: torch.Tensor, weights: torch.Tensor, m: int, floor: float) -> torch.Tensor:
    """Top-m eigenvectors of Σ w_i x_i x_iᵀ; zeros in place of those that the weighted samples say nothing of."""
    flat = (samples * weights.sqrt()[:, None, None]).permute(1, 0, 2).flatten(1)
    values, vectors = torch.linalg.eigh(flat @ flat.mT)
    return (vectors * (values > floor)).flip(-1)[:, :m]


def _overlaps(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """‖U_jᵀV_j‖²/j for j = 1 to m."""
    squares = (u.mT @ v).square().cumsum(0).cumsum(1).diagonal()
    return squares / torch.arange(1, len(squares) + 1, dtype=u.dtype, device=u.device)


def _summary(overlaps: list[torch.Tensor], p: int, level: float) -> Agreement:
    table = torch.stack(overlaps)
    tail = (1 - level) / 2
    low, high = torch.quantile(table, torch.tensor([tail, 1 - tail], dtype=table.dtype, device=table.device), dim=0)
    chance = torch.arange(1, table.shape[1] + 1, dtype=table.dtype, device=table.device) / p
    return Agreement(table.mean(0), low, high, chance)


def split_half_agreement(
    samples: torch.Tensor, m: int, generator: torch.Generator, draws: int = 50, level: float = 0.95
) -> Agreement:
    """Overlap of the top-m eigenspaces that two random halves of the examples give for F = 1/N Σ x_i x_iᵀ.

    Stability under splitting as Ben-Hur et al. (2002) ask it of clusters, here of subspaces.

    The halves share no example, so agreement beyond chance is a property of the distribution. Each half has N/2
    examples: the agreement of the full estimate with another one of its size is higher. A draw costs O(d³) with
    d = min(p, n·c).

    Args:
        samples: (n, p), or (n, p, c) for c columns an example, as G_i·Ω has; any floating dtype.
        m: dimensions to report, from 1 to the rank of the samples.
        generator: source of the splits, on the CPU.
        draws: number of random splits, at least 2.
        level: coverage of the percentile interval over splits, in (0, 1).

    Returns:
        Agreement with tensors (m,).

    Raises:
        TypeError: arguments of the wrong type.
        ValueError: fewer than 4 examples, NaN, more directions than the samples' rank, or arguments out of range.

    Examples:
        >>> g = torch.Generator().manual_seed(0)
        >>> noise = torch.randn(40, 20, generator=g)
        >>> fg.split_half_agreement(noise, 5, g).dimensions(0.9)  # noise has no directions
        0
    """
    reduced, frame, floor = _checked(samples, m, generator, draws)
    level = check_number("level", level, low=1e-6, high=1 - 1e-6)
    n, overlaps = len(reduced), []
    for _ in range(draws):
        order = torch.randperm(n, generator=generator).to(reduced.device)
        halves = (reduced[order[: n // 2]], reduced[order[n // 2 :]])
        u, v = (_leading(half, half.new_ones(len(half)), m, floor) for half in halves)
        overlaps.append(_overlaps(u, v).to(frame.dtype))
    return _summary(overlaps, samples.shape[1], level)


def bootstrap_agreement(
    samples: torch.Tensor, m: int, generator: torch.Generator, draws: int = 50, level: float = 0.95
) -> Agreement:
    """Overlap of the top-m eigenspace of F = 1/N Σ x_i x_iᵀ with those of bootstrap resamples of the examples.

    Resamples contain the estimate's own examples, so the overlap flatters: with fewer examples than dimensions it
    stays high for pure noise. `split_half_agreement` is the test of whether a direction is real; this one says how
    much the estimate would move (Efron 1979, percentile interval). A draw costs O(d³) with d = min(p, n·c).

    Args:
        samples: (n, p), or (n, p, c) for c columns an example; any floating dtype.
        m: dimensions to report, from 1 to the rank of the samples.
        generator: source of the resamples, on the CPU.
        draws: number of resamples, at least 2.
        level: coverage of the percentile interval over resamples, in (0, 1).

    Returns:
        Agreement with tensors (m,).

    Raises:
        TypeError: arguments of the wrong type.
        ValueError: fewer than 4 examples, NaN, more directions than the samples' rank, or arguments out of range.

    Examples:
        >>> g = torch.Generator().manual_seed(0)
        >>> samples = torch.randn(50, 5, generator=g) * torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0])
        >>> float(fg.bootstrap_agreement(samples, 2, g).mean[0]) > 0.9
        True
    """
    reduced, frame, floor = _checked(samples, m, generator, draws)
    level = check_number("level", level, low=1e-6, high=1 - 1e-6)
    whole = _leading(reduced, reduced.new_ones(len(reduced)), m, floor)
    resamples = (_leading(reduced, _resampled(reduced, generator), m, floor) for _ in range(draws))
    return _summary([_overlaps(whole, found).to(frame.dtype) for found in resamples], samples.shape[1], level)


def bootstrap_confidence(samples: torch.Tensor, m: int, generator: torch.Generator, draws: int = 50) -> Confidence:
    """Leading eigenvectors of F = 1/N Σ x_i x_iᵀ, each with the share of it that bootstrap resamples find again.

    With V_b the top-m eigenvectors of resample b, all within the d-dimensional span of the examples (d their numerical
    rank: what lies beyond it is without data and never a direction), direction u_j has
    the weight (E_b ‖V_bᵀu_j‖² − m/d)/(1 − m/d), clipped to [0, 1]: 1 where every resample's space contains it, 0 where
    it does no better than a random space of that span; this project's own weight, on the bootstrap of Efron (1979). Turning within the leading space costs nothing. Where m = d,
    nothing is left out and every weight is 1. What `bootstrap_agreement` says of flattery holds here too: choose m
    by `split_half_agreement`.

    Args:
        samples: (n, p), or (n, p, c) for c columns an example, as G_i·Ω has; any floating dtype.
        m: directions, from 1 to d, the rank of the samples.
        generator: source of the resamples, on the CPU.
        draws: number of resamples, at least 2.

    Returns:
        Confidence(basis, weights), float32 or wider, for SoftProjector(*confidence).

    Raises:
        TypeError: arguments of the wrong type.
        ValueError: fewer than 4 examples, NaN, more directions than the samples' rank, or arguments out of range.

    Examples:
        >>> g = torch.Generator().manual_seed(0)
        >>> samples = torch.randn(50, 5, generator=g) * torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0])
        >>> basis, weights = fg.bootstrap_confidence(samples, 2, g)
        >>> basis.shape, bool(weights[0] > weights[1])
        (torch.Size([5, 2]), True)
    """
    reduced, frame, floor = _checked(samples, m, generator, draws)
    whole = _leading(reduced, reduced.new_ones(len(reduced)), m, floor)
    resamples = (_leading(reduced, _resampled(reduced, generator), m, floor) for _ in range(draws))
    found = torch.stack([(resample.mT @ whole).square().sum(0) for resample in resamples]).mean(0)
    chance = m / reduced.shape[1]
    weights = ((found - chance) / (1 - chance)).clamp(0, 1) if chance < 1 else torch.ones_like(found)
    return Confidence(frame @ whole.to(frame), weights.to(frame))


def shard_agreement(shards: Sequence[SymmetricOperator], m: int, level: float = 0.95) -> Agreement:
    """Overlap of the top-m eigenspaces of operators that were estimated from disjoint parts of the data.

    What :func:`split_half_agreement` asks (after Ben-Hur et al. 2002), of estimates in place of examples.

    For two halves this is the split-half agreement of that one split: mean, low and high coincide. More parts give a
    pair of disjoint estimates each and so an interval, for estimates of that size. The parts come from one pass over
    the data: see :func:`fishergeo.sketch_shards`.

    Args:
        shards: at least two operators of one size, say of one layer.
        m: dimensions to report; each operator must know as many eigenpairs, and one of them have as many above rounding.
        level: coverage of the percentile interval over pairs, in (0, 1).

    Returns:
        Agreement with tensors (m,), float64.

    Raises:
        TypeError: arguments of the wrong type.
        ValueError: fewer than two operators, different sizes or sides, more dimensions than there are with data, or arguments out
            of range.

    Examples:
        >>> half = fg.DenseOperator(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        >>> [round(v, 4) for v in fg.shard_agreement([half, half], 2).mean.tolist()]
        [1.0, 1.0]
    """
    operators = list(shards)
    if len(operators) < 2:
        raise ValueError(f"shards holds {len(operators)} operators, at least 2 are needed to compare")
    for i, operator in enumerate(operators):
        if not isinstance(operator, SymmetricOperator):
            raise TypeError(f"shards[{i}] must be a SymmetricOperator, got {type(operator).__name__}")
        if operator.shape != operators[0].shape:
            raise ValueError(f"shards[{i}] has shape {operator.shape}, shards[0] {operators[0].shape}")
        if operator.side != operators[0].side:
            raise ValueError(f"shards[{i}] is of side {operator.side!r}, shards[0] of {operators[0].side!r}")
    size = operators[0].shape[0]
    m = check_integer("m", m, low=1, high=size)
    level = check_number("level", level, low=1e-6, high=1 - 1e-6)
    bases = []
    for operator in operators:
        values, vectors = (part.double().to(operators[0].device) for part in operator.eigh(m))
        eps = torch.finfo(torch.promote_types(operator.dtype, torch.float32)).eps
        bases.append(vectors * (values > 4 * eps * size**0.5 * values[0].clamp_min(0)))
    rank = max(int(basis.any(0).sum()) for basis in bases)
    if m > rank:
        raise ValueError(
            f"m is {m}, but shards have only {rank} directions above rounding, the others are without data; ask for no more"
        )
    return _summary([_overlaps(u, v) for u, v in combinations(bases, 2)], size, level)
