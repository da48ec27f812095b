"""The scaling law of forgetting, L = L0 + A·D^β/N^α + E, fitted with intervals, and what the data do not pin down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

PARAMETERS = ("A", "alpha", "beta", "E")

_HIGH = 4.0  # exponents are looked for in [0, _HIGH]

_STARTS = [(a, b) for a in (0.1, 0.5, 1.5) for b in (0.1, 0.5, 1.5)]


@dataclass(frozen=True)
class ScalingFit:
    """L − L0 = A·D^β/N^α + E, fitted; the form is that of Bethune et al. 2025 (arXiv 2502.06042) without injected data.

    Attributes:
        values: ``A``, ``alpha``, ``beta`` and ``E``, E in the unit of the losses.
        intervals: of each parameter, (low, high), by residual bootstrap.
        unidentified: parameter -> why the data do not pin it down; such a parameter's value means nothing by itself.
        residual: root mean squared residual, with the degrees of freedom taken off.
        r2: share of the variance of L − L0 that the law explains; NaN where there is none to explain.
        n: observations.
    """

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    unidentified: dict[str, str]
    residual: float
    r2: float
    n: int

    def predict(self, size: float, amount: float) -> float:
        """L − L0 at N = ``size`` and D = ``amount``; outside the fitted range it is an extrapolation."""
        v = self.values
        return v["A"] * amount ** v["beta"] / size ** v["alpha"] + v["E"]

    def table(self) -> str:
        """Parameters with intervals and warnings, as a Markdown table."""
        lines = ["| parameter | value | 95 % interval | |", "|---|---:|---|---|"]
        for name in PARAMETERS:
            low, high = self.intervals[name]
            lines.append(
                f"| {name} | {self.values[name]:.4g} | {low:.4g} to {high:.4g} | {self.unidentified.get(name, '')} |"
            )
        lines.append(f"\nResidual {self.residual:.3g}, R² {self.r2:.3f}, {self.n} observations.")
        return "\n".join(lines) + "\n"


def _numbers(name: str, values: Sequence[float], positive: bool) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all() or (positive and (array <= 0).any()):
        raise ValueError(f"{name} must be a sequence of finite {'positive ' if positive else ''}numbers")
    return array


def _linear(alpha: float, beta: float, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> tuple[float, float, np.ndarray]:
    """The best A ≥ 0 and E at given exponents, and the residuals."""
    x = d**beta / n**alpha
    centred = x - x.mean()
    spread = float(centred @ centred)
    a = max(float(centred @ y) / spread, 0.0) if spread > 1e-24 * max(float(x @ x), 1e-300) else 0.0
    e = float((y - a * x).mean())
    return a, e, y - a * x - e


def _fit(
    n: np.ndarray, d: np.ndarray, y: np.ndarray, starts: Sequence[tuple[float, float]]
) -> tuple[np.ndarray, float]:
    """Least squares over the exponents, A and E solved for inside (variable projection, Golub and Pereyra 1973)."""
    scale = float(np.abs(y - y.mean()).max()) or 1.0
    best: tuple[np.ndarray, float] | None = None
    for start in starts:
        found = least_squares(
            lambda p: _linear(p[0], p[1], n, d, y)[2] / scale,
            start,
            bounds=([0.0, 0.0], [_HIGH, _HIGH]),
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-12,
        )
        if best is None or found.cost < best[1]:
            best = (found.x, float(found.cost))
    assert best is not None
    alpha, beta = best[0]
    a, e, _ = _linear(alpha, beta, n, d, y)
    return np.array([a, alpha, beta, e]), best[1] * 2 * scale**2


def fit_scaling_law(
    sizes: Sequence[float],
    amounts: Sequence[float],
    losses: Sequence[float],
    start_losses: Sequence[float] | float = 0.0,
    *,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> ScalingFit:
    """Fit how forgetting grows with fine-tuning and shrinks with model size: L = L0 + A·D^β/N^α + E.

    The form is that of Bethune et al. 2025 (arXiv 2502.06042) without injected data; the exponents are searched, A and E
    solved for inside (variable projection, Golub and Pereyra 1973).

    L0 is the loss of each model before fine-tuning and is measured, not fitted: an L0 that is one constant cannot be
    told from E. Exponents are looked for in [0, 4] and A in [0, ∞).

    Args:
        sizes: N, parameters of the model of each observation.
        amounts: D, how much it was fine-tuned on, tokens or steps.
        losses: L, its loss on what it knew before.
        start_losses: L0 of each observation, or one for all.
        resamples: bootstrap resamples of the residuals.
        confidence: of the intervals.
        seed: of the bootstrap.

    Returns:
        the fit; ``unidentified`` names parameters that the data leave open: one model size cannot give α nor one
        amount β, three values of a factor are the least that tells an exponent from an offset, and an interval that is
        wide or leans on a bound is said to be so.

    Raises:
        ValueError: sequences of unequal length, fewer than five observations, sizes or amounts that are not positive.
    """
    n, d = _numbers("sizes", sizes, True), _numbers("amounts", amounts, True)
    after = _numbers("losses", losses, False)
    before = (
        np.broadcast_to(np.asarray(start_losses, dtype=np.float64), after.shape) if np.ndim(start_losses) == 0 else None
    )
    before = _numbers("start_losses", start_losses, False) if before is None else before  # type: ignore[arg-type]
    if not len(n) == len(d) == len(after) == len(before):
        raise ValueError(
            f"sizes, amounts, losses and start_losses must be of one length, found {len(n)}, {len(d)}, {len(after)}, {len(before)}"
        )
    if len(n) < 5:
        raise ValueError(f"the law has four parameters; at least five observations are needed, found {len(n)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, found {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, found {resamples}")
    y = after - before
    # In units of the middle of the data A is the size of the effect there, which keeps the fit well scaled.
    unit_n, unit_d = math.exp(np.log(n).mean()), math.exp(np.log(d).mean())
    scaled_n, scaled_d = n / unit_n, d / unit_d
    theta, squares = _fit(scaled_n, scaled_d, y, _STARTS)
    fitted = theta[0] * scaled_d ** theta[2] / scaled_n ** theta[1] + theta[3]
    freedom = max(len(y) - 4, 1)
    residuals = (y - fitted) * math.sqrt(len(y) / freedom)
    residuals = residuals - residuals.mean()
    generator = np.random.default_rng(seed)
    draws = []
    near = [(float(np.clip(theta[1], 1e-3, _HIGH - 1e-3)), float(np.clip(theta[2], 1e-3, _HIGH - 1e-3)))]
    for _ in range(resamples):
        noisy = fitted + generator.choice(residuals, len(y))
        draws.append(_natural(_fit(scaled_n, scaled_d, noisy, near)[0], unit_n, unit_d))
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(np.array(draws), [tail, 100 - tail], axis=0)
    values = dict(zip(PARAMETERS, map(float, _natural(theta, unit_n, unit_d)), strict=True))
    intervals = {p: (float(a), float(b)) for p, a, b in zip(PARAMETERS, low, high, strict=True)}
    variance = float(((y - y.mean()) ** 2).sum())
    return ScalingFit(
        values,
        intervals,
        _unidentified(n, d, theta, intervals, scaled_n, scaled_d, float(np.ptp(y))),
        math.sqrt(max(squares, 0.0) / freedom),
        1 - squares / variance if variance > 0 else math.nan,
        len(y),
    )


def _natural(theta: np.ndarray, unit_n: float, unit_d: float) -> np.ndarray:
    a, alpha, beta, e = theta
    return np.array([a * unit_n**alpha / unit_d**beta, alpha, beta, e])


def _unidentified(
    n: np.ndarray,
    d: np.ndarray,
    theta: np.ndarray,
    intervals: dict[str, tuple[float, float]],
    sn: Any,
    sd: Any,
    spread: float,
) -> dict[str, str]:
    found: dict[str, str] = {}
    a, alpha, beta, _ = theta
    levels = {"alpha": ("model sizes", len(np.unique(n))), "beta": ("amounts", len(np.unique(d)))}
    for name, (what, count) in levels.items():
        if count == 1:
            found[name] = f"all observations share one value of the {what}"
    if max(count for _, count in levels.values()) < 3:
        found["E"] = "no factor has three values, so an exponent and the offset cannot be told apart"
    elif intervals["E"][1] - intervals["E"][0] > spread:
        found["E"] = "the interval is wider than the losses differ among themselves"
    if a == 0:
        return found | {p: "no effect of size or amount is seen (A = 0)" for p in ("alpha", "beta")}
    term = a * sd**beta / sn**alpha
    jacobian = np.stack([term, -term * np.log(sn), term * np.log(sd), np.ones_like(term)], axis=1)
    norms = np.linalg.norm(jacobian, axis=0)
    moving = norms > 1e-9 * norms.max()
    _, singular, right = np.linalg.svd(jacobian[:, moving] / norms[moving], full_matrices=False)
    names = [p for p, m in zip(PARAMETERS, moving, strict=True) if m]
    for value, vector in zip(singular, right, strict=True):
        if value < 1e-4 * singular[0]:
            mixed = [p for p, weight in zip(names, vector, strict=True) if abs(weight) > 0.2]
            for p in mixed:
                found.setdefault(p, f"only a combination of {', '.join(mixed)} is determined")
    for p in ("alpha", "beta"):
        low, high = intervals[p]
        if low <= 1e-6 and high > 1e-6 and p not in found:
            found[p] = "the interval reaches zero: no effect cannot be ruled out"
        elif high >= _HIGH - 1e-6:
            found.setdefault(p, f"the interval reaches the bound {_HIGH:g}")
        elif high - low > 1.0:
            found.setdefault(p, "the interval is wider than 1")
    if any(p in found for p in ("alpha", "beta")):
        found.setdefault("A", "it depends on an exponent that is not determined")
    return found
