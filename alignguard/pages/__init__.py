"""Self-contained HTML pages of a demo run and of drift reports."""

from alignguard.pages.demo_page import write_report
from alignguard.pages.drift_page import compare_text, render_drift, write_drift
from alignguard.pages.plots import DIM, INK, PALETTE, draw_svg, finite

__all__ = ["DIM", "INK", "PALETTE", "compare_text", "draw_svg", "finite", "render_drift", "write_drift", "write_report"]
