"""The documentation names every public thing, and its code runs."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import alignguard
import fishergeo

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("package", [fishergeo, alignguard], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference_and_has_a_docstring(package):
    reference = (DOCS / "reference" / f"{package.__name__}.md").read_text(encoding="utf-8")
    named = set(re.findall(rf"(?:^::: |- `){package.__name__}\.(\w+)(?=`|$)", reference, re.MULTILINE))
    assert set(package.__all__) <= named, f"not in the reference: {sorted(set(package.__all__) - named)}"
    bare = [name for name in package.__all__ if not (getattr(package, name).__doc__ or "").strip()]
    assert not bare, f"no docstring: {bare}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_code_of_a_page_runs(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    space = {"__name__": "__docs__"}
    for options, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        assert 'exec="on"' in options, "every python block is executed when the site is built"
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, str(page), "exec"), space)


def test_no_page_loads_anything_from_another_host():
    texts = {page: page.read_text(encoding="utf-8") for page in [*DOCS.rglob("*.md"), *DOCS.rglob("*.css")]}
    outside = [
        page.name
        for page, text in texts.items()
        if re.search(r"""(src=["']|url\(["']?|@import\s+["'])(https?:)?//""", text)
    ]
    assert not outside
