"""What a method keeps at a given task score: the points no other point beats, and their hull."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One run, or the mean of several.

    Attributes:
        task: task score; more is better.
        kept: alignment kept; more is better.
        label: what it is called.
    """

    task: float
    kept: float
    label: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.task) and math.isfinite(self.kept)):
            raise ValueError(f"point {self.label!r} must have finite scores, found ({self.task}, {self.kept})")


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both scores, by ascending task score: the Pareto front, by definition.

    Of points that agree in both scores the first stays.

    Args:
        points: with a task score and a score of what is kept, more of both is better.

    Returns:
        The points of the front.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.task, -p.kept)):
        if not best or point.kept > best[-1].kept:
            best.append(point)
    return best[::-1]


def hull(points: Iterable[Point]) -> list[Point]:
    """The vertices of the frontier's concave hull, by ascending task score (monotone chain, Andrew 1979).

    The hull between two vertices is what choosing between their two models at random would reach on average; no
    single model need lie there. :func:`kept_at` does not use it.

    Args:
        points: as for :func:`frontier`.

    Returns:
        Some of the points.
    """
    chain: list[Point] = []
    for point in frontier(points):
        while len(chain) > 1 and _turn(chain[-2], chain[-1], point) >= 0:
            chain.pop()
        chain.append(point)
    return chain


def _turn(a: Point, b: Point, c: Point) -> float:
    return (b.task - a.task) * (c.kept - a.kept) - (b.kept - a.kept) * (c.task - a.task)


def kept_at(points: Iterable[Point], task: float) -> Point | None:
    """By definition the point that keeps most among those with at least this task score.

    Nothing is interpolated: it is a run that was made.

    Args:
        points: as for :func:`frontier`.
        task: the score to reach, in the points' unit.

    Returns:
        That point; None where none reaches the score.
    """
    reached = [p for p in points if p.task >= task]
    return max(reached, key=lambda p: (p.kept, p.task)) if reached else None


def dominating(ours: Sequence[Point], theirs: Sequence[Point]) -> float:
    """Share of their frontier that some point of ours matches or beats in both scores, in [0, 1].

    Raises:
        ValueError: they have no points.
    """
    front = frontier(theirs)
    if not front:
        raise ValueError("theirs holds no points")
    return sum(any(o.task >= t.task and o.kept >= t.kept for o in ours) for t in front) / len(front)
