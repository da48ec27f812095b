"""What a method keeps at a given task score: the points no other point beats, and their hull."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from alignguard.pages import DIM, INK, PALETTE, draw_svg, finite


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


# The page's variables, for a file that is looked at without the page.
_LIGHT = "--ink:#1c2126;--dim:#5d6670;--line:#dfe0dc;--base:#848c96;--plain:#d8692f;--guarded:#17877a"

_DARK = "--ink:#e7e9ea;--dim:#9ba5ae;--line:#333a41;--base:#8d97a2;--plain:#f08a52;--guarded:#3fbfae"


def standalone(svg: str) -> str:
    """An SVG of this package with the colours that a page would give it, light or dark as the reader's system is."""
    start = svg.index(">") + 1
    style = f"<style>svg{{{_LIGHT}}}@media(prefers-color-scheme:dark){{svg{{{_DARK}}}}}</style>"
    return svg[:start] + style + svg[start:]


def dots(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    titles: Mapping[str, str],
    marks: Mapping[str, float] | None = None,
    name: str = "dots",
) -> str:
    """A panel for each measure and a line for each setting, one dot a seed and a bar at the mean.

    Args:
        values: setting -> measure -> its values.
        titles: measure -> title, one panel each, in this order.
        marks: measure -> where a dashed line stands (the model before fine-tuning).
        name: prefix of the SVG's ids.

    Raises:
        ValueError: no setting or no measure.
    """
    if not values or not titles:
        raise ValueError("there is nothing to draw: give at least one setting and one measure")
    settings = list(values)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
        for axes, (measure, title) in zip(panels, titles.items(), strict=True):
            axes.set_title(title)
            for place, setting in enumerate(settings):
                shown = [v for v in values[setting].get(measure, []) if finite(v)]
                colour = PALETTE[place % len(PALETTE)]
                axes.plot(shown, [place] * len(shown), "o", color=colour, markersize=4.5, alpha=0.75)
                if shown:
                    mean = sum(shown) / len(shown)
                    axes.plot((mean, mean), (place - 0.28, place + 0.28), color=colour, linewidth=2)
            if marks and finite(marks.get(measure)):
                axes.axvline(marks[measure], color=DIM, linewidth=0.9, linestyle=(0, (3, 3)))
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0, labelcolor=INK)
        panels[0].set_yticks(range(len(settings)), settings)
        panels[0].set_ylim(len(settings) - 0.4, -0.6)

    words = []
    for setting in settings:
        told = [
            f"{title} {sum(v) / len(v):.1f}"
            for measure, title in titles.items()
            if (v := [x for x in values[setting].get(measure, []) if finite(x)])
        ]
        words.append(f"{setting}: {', '.join(told) or 'no run finished'}")
    return draw_svg(draw, name, "; ".join(words), 2.2 + 2.3 * len(titles), 0.9 + 0.26 * len(settings))


def frontier_plot(
    methods: Mapping[str, Sequence[Point]],
    task: str = "task accuracy, %",
    kept: str = "unsafe prompts refused, %",
    base: Point | None = None,
    name: str = "frontier",
) -> str:
    """Task against kept alignment: a dot for each run, a line along each method's hull.

    Args:
        methods: method -> its points; the first seven that have any get a colour of their own, the others are grey.
        task: title of the horizontal axis.
        kept: title of the vertical one.
        base: the model before fine-tuning, drawn as a cross.
        name: prefix of the SVG's ids.

    Raises:
        ValueError: no points at all.
    """
    if not any(methods.values()):
        raise ValueError("there is nothing to draw: no method has a point")

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        drawn = [(method, points) for method, points in methods.items() if points]
        own = PALETTE[:-1]
        for place, (method, points) in reversed(list(enumerate(drawn))):  # those with a colour lie on top
            grey = place >= len(own)
            colour, size = (DIM, 2.5) if grey else (own[place], 4.5)
            axes.plot([p.task for p in points], [p.kept for p in points], "o", color=colour, markersize=size, alpha=0.4)
            best = hull(points)
            axes.plot(
                [p.task for p in best],
                [p.kept for p in best],
                "-o",
                color=colour,
                markersize=size,
                linewidth=0.6 if grey else 1.7,
                label=method if not grey else "others" if place == len(own) else None,
            )
        if base is not None:
            axes.plot(base.task, base.kept, "x", color=INK, markersize=7, label="before fine-tuning")
        axes.set_xlabel(task)
        axes.set_ylabel(kept)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(
            handles[::-1], names[::-1], loc="outside upper left", ncols=4, handlelength=1.2, columnspacing=1.2
        )

    words = [
        f"{method}: " + ", ".join(f"({p.task:.1f}, {p.kept:.1f})" for p in frontier(points))
        for method, points in methods.items()
        if points
    ]
    return draw_svg(draw, name, f"{kept} against {task}. Best of {'; '.join(words)}", 6.4, 4.2)
