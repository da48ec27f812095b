"""Build hook: every tutorial as a notebook beside its page, made of the page's own text and code."""

import json
import re

from mkdocs.structure.files import File

FOLDER = "tutorials/"
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGE_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]*\)")
PRINT = re.compile(r"^print\((.*|(?:\n .*)+\n)\)$", re.MULTILINE)  # on one line, or closed on a line of its own
SHOW = "from IPython.display import HTML, display\n\n"


def _cell(number, kind, text):
    cell = {
        "cell_type": kind,
        "id": f"cell-{number}",
        "metadata": {},
        "source": text.strip("\n").splitlines(keepends=True),
    }
    return cell | ({"outputs": [], "execution_count": None} if kind == "code" else {})


def notebook(markdown):
    """The notebook (nbformat 4) of a tutorial's markdown, as JSON text."""
    parts = [("markdown", "Needs `pip install fishergeo`, run in a checkout of the repository.")]
    last = 0
    for block in BLOCK.finditer(markdown):
        parts.append(("markdown", PAGE_LINK.sub(r"\1", markdown[last : block.start()])))
        options, code = block.groups()
        if 'html="1"' in options:  # a page prints its figures as HTML, a notebook displays them
            code = SHOW + PRINT.sub(r"display(HTML(\1))", code)
        parts.append(("code", code))
        last = block.end()
    parts.append(("markdown", PAGE_LINK.sub(r"\1", markdown[last:])))
    cells = [_cell(i, kind, text) for i, (kind, text) in enumerate(p for p in parts if p[1].strip())]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return json.dumps(
        {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}, indent=1
    )


def on_files(files, config):
    """Add a notebook for every tutorial."""
    for file in [f for f in files.documentation_pages() if f.src_uri.startswith(FOLDER)]:
        name = file.src_uri.removesuffix(".md") + ".ipynb"
        files.append(File.generated(config, name, content=notebook(file.content_string)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Link a tutorial's notebook below its text."""
    if not page.file.src_uri.startswith(FOLDER):
        return markdown
    name = page.file.src_uri.removeprefix(FOLDER).removesuffix(".md")
    return f"{markdown}\n\n[Download this page as a notebook]({name}.ipynb){{ download }}\n"
