"""What of a model is guarded, matrix by matrix, and what trains outside the guard."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from alignguard.tables import text_table
from alignguard.updates.weight_updates import WeightUpdates
from fishergeo.capture import plain_name

NUMBER = re.compile(r"\.\d+(?=\.|$)")  # of a layer or an expert


@dataclass(frozen=True)
class Covered:
    """One line of the table.

    Attributes:
        name: the matrix's or parameter's name in the model.
        guarded: whether the guard charges it.
        how: how ΔW is read, or why it is not.
        shape: (p, q) where it is guarded.
        rank: columns of the factors of ΔW, None for a dense one.
    """

    name: str
    guarded: bool
    how: str
    shape: tuple[int, int] | None = None
    rank: int | None = None


def coverage(updates: WeightUpdates) -> list[Covered]:
    """Every trained matrix and parameter: the guarded ones first."""
    lines = [Covered(m.plain, True, m.kind, m.shape, m.rank) for m in updates.matrices.values()]
    return lines + [Covered(plain_name(name), False, why) for name, why in sorted(updates.skipped.items())]


def coverage_table(lines: list[Covered], fold: bool = False) -> str:
    """The lines as aligned text.

    Args:
        lines: what :meth:`alignguard.Guard.coverage` gives.
        fold: whether layers of a kind, whose names differ in numbers alone, share a line.

    Returns:
        A head, a line for each matrix or parameter or for each kind, and a line of counts.
    """
    shown_lines = [(line, 1) for line in lines]
    if fold:
        kinds = Counter(replace(line, name=NUMBER.sub(".*", line.name)) for line in lines)
        single = {replace(line, name=NUMBER.sub(".*", line.name)): line for line in lines}
        shown_lines = [(kind if count > 1 else single[kind], count) for kind, count in kinds.items()]
    rows = []
    for line, count in shown_lines:
        shape = "" if line.shape is None else "{}×{}".format(*line.shape)
        rank = "" if not line.guarded else "dense" if line.rank is None else str(line.rank)
        rows.append(
            (
                line.name if count == 1 else f"{line.name} ({count})",
                shape,
                rank,
                line.how if line.guarded else f"NOT GUARDED: {line.how}",
            )
        )
    shown = text_table({"matrix": "left", "shape": "right", "rank": "right", "ΔW": "left"}, rows)
    guarded = sum(line.guarded for line in lines)
    return f"{shown}\n{guarded} matrices guarded, {len(lines) - guarded} trained parameters not"
