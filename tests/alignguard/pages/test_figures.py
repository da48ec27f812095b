"""Figures for the pages of the documentation: colours, words, and words that cover one another."""

from xml.etree import ElementTree

import pytest

from alignguard.pages import DIM, INK, draw_figure


def bars(left, right):
    left.bar([0, 1], [2, 3], color=INK)
    right.plot([1, 2], color=DIM)
    right.set(title="right", xlabel="step")


def test_a_figure_has_its_words_and_takes_its_colours_from_the_page():
    drawn = draw_figure(bars, "bars", "two bars & a line", "What they are", panels=2)
    root = ElementTree.fromstring(drawn)
    svg, caption = root
    assert root.tag == "figure" and caption.text == "What they are"
    assert svg[0].text == "two bars & a line" and svg.get("aria-labelledby") == svg[0].get("id")
    assert "var(--ink, currentColor)" in drawn and INK not in drawn and DIM not in drawn
    assert ">step</text>" in drawn  # words, not outlines
    assert draw_figure(bars, "bars", "two bars & a line", "What they are", panels=2) == drawn


def overlapping(axes):
    axes.text(0.5, 0.5, "one word")
    axes.text(0.52, 0.5, "and another")


def turned(axes):
    axes.text(0.5, 0.2, "standing upright", rotation=90)
    axes.text(0.4, 0.4, "lying right across it")


def crowded(axes):
    axes.plot(range(10))
    axes.set_xticks(range(10), [f"a long label {i}" for i in range(10)])


def outside(axes):
    axes.figure.text(0.95, 0.5, "over the edge")


@pytest.mark.parametrize("draw", [overlapping, turned, crowded])
def test_words_that_cover_one_another_are_refused(draw):
    with pytest.raises(ValueError, match="cover one another"):
        draw_figure(draw, "bad", "words")


def test_words_that_are_cut_off_are_refused():
    with pytest.raises(ValueError, match="'over the edge' is cut off"):
        draw_figure(outside, "bad", "words")


def test_words_that_stand_apart_are_not():
    def apart(axes):
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.text(0.2, 0.2, "standing upright", rotation=90)
        axes.text(0.3, 0.2, "lying beside it\nin two lines")
        axes.legend(*zip(*[(axes.plot([i / 3])[0], f"line {i}") for i in range(3)], strict=True))

    assert "<svg" in draw_figure(apart, "good", "words")


def test_a_figure_without_alt_text_is_refused():
    with pytest.raises(ValueError, match="give alt"):
        draw_figure(overlapping, "bad", " ")
