"""The documentation names every public thing, and its code runs; what docstrings say is test_docstrings' matter."""

import contextlib
import doctest
import io
import json
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
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("package", [fishergeo, alignguard], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(package):
    reference = (DOCS / "reference" / f"{package.__name__}.md").read_text(encoding="utf-8")
    named = set(re.findall(rf"(?:^::: |- `){package.__name__}\.(\w+)(?=`|$)", reference, re.MULTILINE))
    assert set(package.__all__) <= named, f"not in the reference: {sorted(set(package.__all__) - named)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_code_of_a_page_runs(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    space = {"__name__": "__docs__"}
    for options, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        assert 'exec="on"' in options, "every python block is executed when the site is built"
        assert "sep=" not in code, "the site's print joins by blanks whatever sep says; join the words yourself"
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(code, str(page), "exec"), space)
        assert said.getvalue() or 'result="text"' not in options, "the page would show an empty box"


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


def test_no_page_loads_anything_from_another_host():
    texts = {page: page.read_text(encoding="utf-8") for page in [*DOCS.rglob("*.md"), *DOCS.rglob("*.css")]}
    outside = [
        page.name
        for page, text in texts.items()
        if re.search(r"""(src=["']|url\(["']?|@import\s+["'])(https?:)?//""", text)
    ]
    assert not outside
