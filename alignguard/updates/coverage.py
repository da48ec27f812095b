"""What of a model is guarded, matrix by matrix, and what trains outside the guard."""

from __future__ import annotations

from dataclasses import dataclass

from alignguard.tables import text_table
from alignguard.updates.matrices import plain_name
from alignguard.updates.weight_updates import WeightUpdates


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


def coverage_table(lines: list[Covered]) -> str:
    """The lines as aligned text.

    Args:
        lines: what :meth:`alignguard.Guard.coverage` gives.

    Returns:
        A head, a line for each matrix or parameter, and a line of counts.
    """
    rows = []
    for line in lines:
        shape = "" if line.shape is None else "{}×{}".format(*line.shape)
        rank = "" if not line.guarded else "dense" if line.rank is None else str(line.rank)
        rows.append((line.name, shape, rank, line.how if line.guarded else f"NOT GUARDED: {line.how}"))
    shown = text_table({"matrix": "left", "shape": "right", "rank": "right", "ΔW": "left"}, rows)
    guarded = sum(line.guarded for line in lines)
    return f"{shown}\n{guarded} matrices guarded, {len(lines) - guarded} trained parameters not"
