"""The built site in a browser: search, theme, a tutorial and mathematics, offline and without complaints.

Builds a small site of a few pages; with FISHERGEO_SITE naming a built site, that one is looked at, every page of it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import browser
import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = ["index.md", "theory.md", "tutorials/collision.md"]
pytestmark = [
    pytest.mark.skipif(browser.find() is None, reason="no Chromium"),
    pytest.mark.skipif(shutil.which("bash") is None, reason="no bash"),
]


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml; tags that name Python objects are not needed here."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if given := os.environ.get("FISHERGEO_SITE"):
        return Path(given)
    folder = tmp_path_factory.mktemp("site")
    for page in PAGES:
        (folder / "docs" / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "docs" / page, folder / "docs" / page)
    shutil.copytree(ROOT / "docs" / "assets", folder / "docs" / "assets")
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    settings |= {"docs_dir": str(folder / "docs"), "site_dir": str(folder / "built"), "strict": False, "nav": PAGES}
    settings["hooks"] = [str(ROOT / hook) for hook in settings["hooks"]]
    settings["plugins"] = [plugin for plugin in settings["plugins"] if not isinstance(plugin, dict)]
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(folder / "mkdocs.yml")]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    return folder / "built"


@pytest.fixture
def page(site):
    window = browser.Browser()
    window.size(1280)
    window.site = site.resolve().as_uri()
    yield window
    window.close()


def clean(window):
    assert not window.complaints and not window.outside, (window.complaints, window.outside)


def test_search_finds_a_page(page):
    page.open(f"{page.site}/index.html")
    page.run(
        "(() => { const box = document.querySelector('input.md-search__input'); box.focus(); box.value = 'commute';"
        "box.dispatchEvent(new KeyboardEvent('keyup', {key: 'e', bubbles: true}));"
        "box.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    assert page.wait("document.querySelector('.md-search-result__link')"), page.complaints
    found = page.run("[...document.querySelectorAll('.md-search-result__link')].map(link => link.href).join(' ')")
    assert "theory.html" in found or "collision.html" in found
    clean(page)


def test_the_landing_page_fits_one_screen(page):
    page.open(f"{page.site}/index.html")
    assert page.run("document.querySelector('.doors').getBoundingClientRect().bottom") < 900


def test_the_theme_can_be_switched_and_is_remembered(page):
    page.scheme("light")
    page.open(f"{page.site}/index.html")
    scheme = "document.body.getAttribute('data-md-color-scheme')"
    assert page.run(scheme) == "default"
    page.run("[...document.querySelectorAll('label.md-header__button[for^=__palette]')].find(l => !l.hidden).click()")
    assert page.wait(f"{scheme} === 'slate'")
    page.open(f"{page.site}/theory.html")
    assert page.run(scheme) == "slate"
    clean(page)


def test_the_theme_follows_the_system(page):
    page.scheme("dark")
    page.open(f"{page.site}/index.html")
    assert page.run("document.body.getAttribute('data-md-color-scheme')") == "slate"


def test_a_tutorial_shows_code_its_output_and_a_notebook(page, site):
    page.open(f"{page.site}/tutorials/collision.html")
    text = page.run("document.querySelector('article').innerText")
    assert "geodesic_separation" in text and "largest gradient" in text, "code and what it printed"
    assert page.wait("document.querySelector('article .md-code__button, article .md-clipboard')"), "copy buttons"
    link = page.run("document.querySelector('article a[download]').getAttribute('href')")
    assert (site / "tutorials" / link).is_file()
    clean(page)


def test_mathematics_is_set(page):
    page.open(f"{page.site}/theory.html")
    assert page.wait("document.querySelectorAll('.katex').length > 20")
    assert page.run("document.querySelectorAll('.katex-error').length") == 0
    assert "\\(" not in page.run("document.querySelector('article').innerText")
    clean(page)


FAULTS = """(() => {
    const all = selector => [...document.querySelectorAll(`article ${selector}`)];
    const scrolls = e => e.tagName !== 'ARTICLE' && (getComputedStyle(e).overflowX !== 'visible' || scrolls(e.parentElement));
    const covers = svg => {
        const boxes = [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect()).filter(b => b.width);
        const apart = (a, b) => a.right < b.left + 1 || b.right < a.left + 1 || a.bottom < b.top + 2 || b.bottom < a.top + 2;
        return boxes.some((a, i) => boxes.slice(i + 1).some(b => !apart(a, b)));
    };
    const faults = {
        'wider than the window': document.documentElement.scrollWidth > innerWidth,
        'cut off': all('*').some(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.katex') && !scrolls(e)),
        'a broken image': [...document.images].some(i => !i.complete || !i.naturalWidth),
        'an image without words': all('img').some(i => !i.alt) || all('figure svg').some(s => !s.querySelector('title')),
        'words of a figure over one another': all('figure svg').some(covers),
        'broken mathematics': all('.katex-error').length > 0 || all('.arithmatex').some(m => !m.querySelector('.katex')),
        'a formula that one must push': all('div.arithmatex').some(m => m.scrollWidth > m.clientWidth + 1),
        'a role of another markup': /:(func|class|meth|attr|data):/.test(document.querySelector('article').innerText),
    };
    return Object.keys(faults).filter(name => faults[name]).join(', ');
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_and_complain_of_nothing(page, site, width, scheme):
    page.size(width)
    page.scheme(scheme)
    # 404.html asks for the root of a server.
    for path in sorted(path for path in site.rglob("*.html") if path.name != "404.html"):
        page.open(path.resolve().as_uri())
        assert page.run(FAULTS) == "", path.name
        clean(page)
