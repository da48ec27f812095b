import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from alignguard.pages import write_report
from alignguard.pages.demo_page import render_report

SECRET = "Of course! First take the pin"
RESULT = {
    "base": {
        "task": 31.2,
        "refusal": 97.0,
        "refusal_ci": [94.0, 99.0],
        "compliance": 98.0,
        "borderline": 70.0,
        "kl": 0.0,
    },
    "plain": {
        "task": 52.0,
        "refusal": 7.0,
        "refusal_ci": [3.5, 11.0],
        "compliance": 99.0,
        "borderline": 95.0,
        "kl": 1.8,
    },
    "guarded": {"task": 51.5, "refusal": 88.0, "compliance": 98.0, "borderline": 72.0, "kl": 0.061, "step_time": 0.2},
    "overhead": 1.25,
    "config": {"energy": 0.8, "training": {"learning_rate": 0.001}},
    "seed": 7,
    "versions": {"torch": "2.13.0"},
    "history": {
        "plain": [{"step": s, "loss": 4.0 - 0.01 * s} for s in range(1, 61)],
        "guarded": [
            {
                "step": s,
                "loss": 4.0 - 0.01 * s,
                "alignguard/alignment": 0.1 * s,
                "alignguard/cosine": 1 / s,
                "alignguard/odd": 1.0,
            }
            for s in range(1, 61)
        ],
    },
    "spectra": {
        "model.layers.0.self_attn.q_proj": {"values": [3.0, 2.0, 1.0], "total": 8.0, "rank": 2, "energy": 0.625},
        "model.layers.1.mlp.up_proj": {"values": [3.0, 0.0, 1.0], "total": 4.0, "rank": 3, "energy": 1.0},
    },
    "prompts": {
        "unsafe": [
            {
                "prompt": "How do I <script>alert(1)</script> it?",
                "base": {"verdict": "refusal", "text": "I can't help & won't."},
                "plain": {"verdict": "compliance", "text": SECRET},
                "guarded": {"verdict": "incoherent", "text": "xx xx xx"},
            }
        ],
        "ordinary": [
            {"prompt": "Write a poem.", "base": {"verdict": "compliance", "text": "Roses " * 60}, "plain": "refusal"}
        ],
    },
}
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks nesting, and gathers tags, ids, texts and every address that a browser might load."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.ids, self.addresses, self.text, self.labels = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.stack.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.addresses.append(value)
            if name == "aria-labelledby":
                self.labels.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def html():
    return render_report(RESULT)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def words(page):
    return " ".join(" ".join(page.text).split())


def test_the_page_needs_nothing_from_outside(html, page):
    assert "script" not in page.tags and "iframe" not in page.tags and "img" not in page.tags
    assert all(address.startswith("#") or address == "data:," for address in page.addresses)
    # nothing in styles either; the only web address in the file is a name space
    assert set(re.findall(r"https?://[^\s\"'<>]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_ids_are_unique_and_references_meet_one(html, page):
    assert len(page.ids) == len(set(page.ids))
    targets = set(re.findall(r"url\(#([^)]*)\)", html)) | {a[1:] for a in page.addresses if a.startswith("#")}
    assert targets <= set(page.ids)


def test_every_plot_is_well_formed_and_says_in_words_what_it_shows(html, page):
    drawn = re.findall(r"<svg.*?</svg>", html, flags=re.S)
    assert len(drawn) == 1 + 3 + 1 + 2  # shares, three loss terms, cosine, spectrum and energy
    for svg in drawn:
        root = ElementTree.fromstring(svg)
        title = root.find("{http://www.w3.org/2000/svg}title")
        assert title is not None and len(title.text) > 20
        assert root.get("viewBox") and root.get("role") == "img" and root.get("width") is None
    assert set(page.labels) <= set(page.ids) and len(page.labels) == len(drawn)
    assert "unsafe refused, plain: 7.0 %" in " ".join(words(page).split())


def test_plots_take_their_colours_from_the_page(html):
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.S):
        assert "var(--ink," in svg and "var(--dim," in svg
        assert not re.search(r"#(000000|ffffff|0[0-9a-f]0[0-9a-f]0[0-9a-f])\b", svg)
    assert "prefers-color-scheme: dark" in html


def test_the_headline_holds_every_number(page):
    text = words(page)
    for piece in ("31.2", "52.0", "+20.8", "94.0–99.0", "−90.0", "1.800", "0.061", "0.200", "1.25"):
        assert piece in text
    assert "90 points of refusals lost by plain fine-tuning" in text
    assert "90 % of that loss prevented by the guard" in text
    assert "−0.5 points of task accuracy" in text


def test_obliging_answers_to_unsafe_prompts_are_withheld(html, page):
    assert SECRET not in html and "xx xx xx" not in html
    text = words(page)
    assert "[answer withheld]" in text and "[no coherent text]" in text
    assert "I can't help & won't." in text  # a refusal stands in its own words
    assert "Roses Roses" in text and "Roses " * 60 not in text  # ordinary answers show, cut to a line or two


def test_prompts_are_text_and_never_markup(html, page):
    assert "&lt;script&gt;" in html
    assert "<script>alert(1)</script>" in words(page)


def test_settings_versions_and_seed_are_written_down(page):
    text = words(page)
    for piece in ("training.learning_rate 0.001", "energy 0.8", "seed 7", "torch 2.13.0"):
        assert piece in text


@pytest.mark.parametrize(
    "left_out", ["history", "spectra", "prompts", "config", "versions", "overhead", "seed", "guarded", "plain"]
)
def test_optional_parts_may_be_missing(left_out):
    Page(render_report({key: value for key, value in RESULT.items() if key != left_out}))


@pytest.mark.parametrize(
    "change",
    [
        {"history": {"plain": [], "guarded": None}},
        {
            "history": {
                "plain": [{"loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 3}],
                "guarded": [{"eval_loss": 2}],
            }
        },
        {
            "spectra": {
                "a": {"values": [], "total": 0, "rank": 1},
                "b": {"values": [math.inf, 2.0], "rank": 1},
                "c": None,
            }
        },
        {"base": {}, "plain": {"refusal": math.nan, "refusal_ci": [None, 1]}, "guarded": {"refusal": None}},
        {"prompts": {"unsafe": [], "ordinary": [{}]}},
        {"overhead": None, "config": None, "versions": None},
    ],
)
def test_odd_and_empty_parts_do_not_break_the_page(change):
    text = words(Page(render_report({**RESULT, **change})))
    assert " nan" not in text.lower() and "None" not in text


def test_one_model_alone_makes_a_page():
    page = Page(render_report({"base": {"refusal": 97.0}}, title="One <model>"))
    assert "One <model>" in words(page) and "97.0" in words(page)


def test_bad_results_get_a_clear_error(tmp_path):
    with pytest.raises(TypeError, match="result must be a mapping, not list"):
        render_report([])
    with pytest.raises(ValueError, match="none of base, plain, guarded"):
        write_report({"config": {}}, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=r"cannot write .*report\.html"):
        write_report(RESULT, tmp_path / "nowhere" / "report.html")


def test_the_page_is_written_whole(tmp_path):
    path = write_report(RESULT, tmp_path / "report.html", samples=0)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert "Answers, side by side" not in text
