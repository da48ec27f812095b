"""Frontiers by brute force, and the figures that show them."""

import itertools
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.frontier import Point, dominating, dots, frontier, frontier_plot, hull, kept_at, standalone

clouds = st.lists(st.builds(Point, st.integers(0, 9).map(float), st.integers(0, 9).map(float)), min_size=1, max_size=12)


def beats(a, b):
    return a.task >= b.task and a.kept >= b.kept and (a.task, a.kept) != (b.task, b.kept)


@given(clouds)
def test_the_frontier_is_what_no_point_beats(points):
    front = frontier(points)
    expected = sorted({(p.task, p.kept) for p in points if not any(beats(q, p) for q in points)})
    assert [(p.task, p.kept) for p in front] == expected


@given(clouds)
def test_the_hull_lies_above_every_frontier_point_and_bends_down(points):
    corners = hull(points)
    slopes = [(b.kept - a.kept) / (b.task - a.task) for a, b in itertools.pairwise(corners)]
    assert slopes == sorted(slopes, reverse=True) and len(set(slopes)) == len(slopes)
    assert {(p.task, p.kept) for p in corners} <= {(p.task, p.kept) for p in frontier(points)}
    for p in frontier(points):
        for a, b in itertools.pairwise(corners):
            if a.task <= p.task <= b.task:
                assert p.kept <= a.kept + (b.kept - a.kept) * (p.task - a.task) / (b.task - a.task) + 1e-9


@given(clouds, st.integers(0, 10))
def test_what_is_kept_at_a_task_score_is_a_run_that_was_made(points, task):
    best = kept_at(points, task)
    reached = [p for p in points if p.task >= task]
    assert (best is None) == (not reached)
    if best:
        assert best in points and best.kept == max(p.kept for p in reached)


def test_dominating_is_the_share_of_their_frontier():
    theirs = [Point(1, 3), Point(2, 2), Point(3, 1), Point(1, 1)]
    assert dominating([Point(2, 2)], theirs) == pytest.approx(1 / 3)
    assert dominating([Point(3, 3)], theirs) == 1 and dominating([], theirs) == 0
    with pytest.raises(ValueError, match="no points"):
        dominating(theirs, [])
    with pytest.raises(ValueError, match="finite"):
        Point(float("nan"), 1.0)


def test_figures_stand_alone_and_say_their_numbers():
    methods = {"guard": [Point(50, 90), Point(52, 80)], "l2 & co": [Point(51, 60)], "none": []}
    svg = standalone(frontier_plot(methods, base=Point(30, 95)))
    tree = ElementTree.fromstring(svg)
    assert "prefers-color-scheme" in svg and "(50.0, 90.0)" in tree[0].text + svg
    values = {"plain": {"task": [50.0, 52.0]}, "guard": {"task": []}}
    svg = standalone(dots(values, {"task": "task, %"}, {"task": 40.0}))
    ElementTree.fromstring(svg)
    assert "plain: task, % 51.0" in svg and "guard: no run finished" in svg
    with pytest.raises(ValueError, match="nothing to draw"):
        dots({}, {"task": "x"})
    with pytest.raises(ValueError, match="nothing to draw"):
        frontier_plot({"a": []})
