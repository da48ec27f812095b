"""Every tutorial's notebook runs from top to bottom in a kernel of its own. Minutes, so not in CI: ``pytest -m slow``."""

import os
import runpy
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_notebook_runs_from_top_to_bottom(page, monkeypatch):
    for name, value in {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    made = runpy.run_path(str(ROOT / "docs" / "assets" / "notebooks.py"))["notebook"](page.read_text(encoding="utf-8"))
    notebook = nbformat.reads(made, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(
        notebook, timeout=1500, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code" and "display(HTML(" in cell.source:
            shown = [output["data"].get("text/html", "") for output in cell.outputs if "data" in output]
            assert any("<svg" in html or "<table" in html for html in shown), f"no figure from {cell.source[:80]!r}"
