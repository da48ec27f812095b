"""Self-contained HTML pages of a demo run and of drift reports."""

from alignguard.pages.demo_page import write_report
from alignguard.pages.drift_page import compare_text, render_drift, side_by_side, write_drift
from alignguard.pages.figures import DIM, INK, LINE, PALETTE, SHADES, draw_figure, draw_svg
from alignguard.pages.plots import finite

__all__ = [
    "DIM",
    "INK",
    "LINE",
    "PALETTE",
    "SHADES",
    "compare_text",
    "draw_figure",
    "draw_svg",
    "finite",
    "render_drift",
    "side_by_side",
    "write_drift",
    "write_report",
]
