"""Comparisons behind the evidence page: rivals, sweeps and their statistics. Not in the wheel."""
