"""The documentation names every public thing, and its code runs; what docstrings say is test_docstrings' matter."""

import contextlib
import doctest
import functools
import io
import itertools
import json
import os
import re
import runpy
import types
from pathlib import Path

import pytest
import torch

import alignguard
import fishergeo

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"<figure>\s*<svg[^>]*>\s*<title[^>]*>([^<]{40,})</title>")
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("package", [fishergeo, alignguard], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(package):
    reference = (DOCS / "reference" / f"{package.__name__}.md").read_text(encoding="utf-8")
    named = set(re.findall(rf"(?:^::: |- `){package.__name__}\.(\w+)(?=`|$)", reference, re.MULTILINE))
    assert set(package.__all__) <= named, f"not in the reference: {sorted(set(package.__all__) - named)}"


@pytest.mark.parametrize("page", sorted((DOCS / "reference").glob("*.md")), ids=lambda page: page.stem)
def test_every_section_of_the_reference_opens_with_words_and_a_table_and_every_entry_points_on(page):
    for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        names = re.findall(r"^::: (\S+)$", section, re.MULTILINE)
        if names:
            opening, entries = section[: section.index("::: ")], section[section.index("::: ") :]
            listed = re.findall(r"^\| \[`\w+`\]\[([\w.]+)\] \| \S", opening, re.MULTILINE)
            assert listed == names, f"the table of {section.splitlines()[0]} names what follows it"
            assert len(opening[: opening.index("| name")].split()) > 12, "a paragraph comes first"
            lacking = [n for n in names if f"::: {n}\n\nSee also: [" not in entries]
            assert not lacking, f"without a See also: {lacking}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_code_of_a_page_is_run_and_shown_as_it_should(page):
    for options, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        assert 'exec="on"' in options, "every python block is executed when the site is built"
        assert "sep=" not in code, "the site's print joins by blanks whatever sep says; join the words yourself"
        if 'source="' in options:
            assert max(map(len, code.splitlines())) <= 120, "a reader would have to scroll sideways"
            assert "result=" in options or "print(" not in code, "the page would print this as prose"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_code_of_a_page_runs(page, monkeypatch):
    """Executed here, or looked at in a site that was built, where a block that fails has failed the build."""
    monkeypatch.chdir(ROOT)
    if site := os.environ.get("FISHERGEO_SITE"):
        html = (Path(site) / page.relative_to(DOCS)).with_suffix(".html").read_text(encoding="utf-8")
        boxes = re.findall(r"<pre><span></span><code>(.*?)</code></pre>", html, re.DOTALL)
        assert all(box.strip() for box in boxes), "the page shows an empty box"
        figures = FIGURE.findall(html)
    else:
        figures = figures_of(page)
    assert page.parent.name != "tutorials" or len(figures) >= 2, (
        "a tutorial shows at least two figures, each with alt text that says what is seen"
    )


def figures_of(page):
    """Execute a page's blocks as the site does; what its figures say in words."""
    space, figures = {"__name__": "__docs__"}, []
    for options, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        said = io.StringIO()
        space["print"] = functools.partial(print, file=said)  # as the site does it: what redirects stdout misses it
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, str(page), "exec"), space)
        assert said.getvalue().strip() or 'result="text"' not in options, "the page would show an empty box"
        figures += FIGURE.findall(said.getvalue())
    return figures


@pytest.mark.parametrize(
    "page", [ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_what_belongs_to_a_list_item_is_indented_and_nothing_else_is_made_one(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lost = re.findall(r"^\n {1,3}[^ \n].*", text, re.MULTILINE)
    assert not lost, f"Python-Markdown ends the list here; indent by four: {lost[0].strip()[:60]!r}"
    numbers = [int(found) for found in re.findall(r"^ *(\d+)\. ", text, re.MULTILINE)]
    strays = [n for before, n in itertools.pairwise([0, *numbers]) if n not in (1, before + 1)]
    assert not strays, f"a line that begins with '{strays[0]}. ' is made an item of a list; wrap it elsewhere"


def test_tutorials_have_a_length_that_one_reads_and_exercises():
    for page in (DOCS / "tutorials").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert 700 <= len(BLOCK.sub("", text).split()) <= 1500, f"{page.name}: words of its own"
        assert text.count('??? question "') >= 2, f"{page.name}: exercises whose answers are folded"


def public(package):
    """Names of a package with what they name."""
    return {name: getattr(package, name) for name in package.__all__}


@pytest.mark.parametrize("package", [fishergeo, alignguard], ids=lambda package: package.__name__)
def test_every_public_callable_has_an_example(package):
    lacking = [name for name, thing in public(package).items() if callable(thing) and ">>> " not in thing.__doc__]
    assert not lacking, f"no example in the docstring of {lacking}"


@pytest.mark.parametrize("package", [fishergeo, alignguard], ids=lambda package: package.__name__)
def test_the_examples_say_what_happens(package):
    runner, told = doctest.DocTestRunner(verbose=False), io.StringIO()
    names = {"torch": torch, "fg": fishergeo, "alignguard": alignguard}
    for name, thing in public(package).items():
        for found in doctest.DocTestFinder(recurse=False).find(thing, name, module=False, globs=dict(names)):
            runner.run(found, out=told.write)
    assert runner.summarize(verbose=False).failed == 0, told.getvalue()


def test_a_tutorials_notebook_holds_its_code():
    notebook = runpy.run_path(str(DOCS / "assets" / "notebooks.py"))["notebook"]
    for page in sorted((DOCS / "tutorials").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        made = json.loads(notebook(text))
        code = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
        assert len(code) == len(BLOCK.findall(text)) and made["nbformat"] == 4
        assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])
        for cell, (options, source) in zip(code, BLOCK.findall(text), strict=True):
            assert isinstance(compile(cell, str(page), "exec"), types.CodeType)
            assert ("display(HTML(" in cell) if "html=" in options else (cell == source.strip("\n"))


GLOSSARY = runpy.run_path(str(DOCS / "assets" / "glossary.py"))


def test_the_first_use_of_a_word_leads_to_its_entry_and_nothing_else_does():
    words = GLOSSARY["entries"](
        '**KL divergence.** How far. More.\n{ #kl data-words="KL|KL divergence" }\n\n'
        '**Drift.** It is \\(x\\).\n{ #drift data-words="drift" }\n'
    )
    html = (
        "<h2>Drift and KL</h2><p><code>KL</code> <a href='x'>KL</a> \n"
        'Drift-like <span class="arithmatex">\\(KL\\)</span> in KL\ndivergence; KL. Drift, drift</p><pre>drift</pre>'
    )
    assert GLOSSARY["linked"](html, words, "../g.html") == (
        "<h2>Drift and KL</h2><p><code>KL</code> <a href='x'>KL</a> \n"
        'Drift-like <span class="arithmatex">\\(KL\\)</span> in <a class="term" href="../g.html#kl" title="How far.">KL\n'
        'divergence</a>; KL. <a class="term" href="../g.html#drift">Drift</a>, drift</p><pre>drift</pre>'
    )


def test_the_glossary_is_read_whole_and_its_words_are_its_own():
    found = GLOSSARY["entries"]((DOCS / "glossary.md").read_text(encoding="utf-8"))
    assert {"fisher", "kfac", "sketch", "drift", "refusal", "over-refusal"} <= set(found)
    with pytest.raises(ValueError, match="an entry is"):
        GLOSSARY["entries"]("**Word.** Without an anchor.\n")
    with pytest.raises(ValueError, match="claim \\['kl'\\]"):
        GLOSSARY["entries"]('**A.** a.\n{ #a data-words="kl" }\n\n**B.** b.\n{ #b data-words="kl" }\n')


def test_no_page_loads_anything_from_another_host():
    texts = {page: page.read_text(encoding="utf-8") for page in [*DOCS.rglob("*.md"), *DOCS.rglob("*.css")]}
    outside = [
        page.name
        for page, text in texts.items()
        if re.search(r"""(src=["']|url\(["']?|@import\s+["'])(https?:)?//""", text)
    ]
    assert not outside
