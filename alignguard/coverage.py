"""What a guard covers, matrix by matrix, and what trains outside it: shown before training starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignguard.updates import plain_name

if TYPE_CHECKING:
    from alignguard.updates import WeightUpdates


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
        lines: :meth:`alignguard.Guard.coverage`.

    Returns:
        A head, a line for each matrix or parameter, and a line of counts.
    """
    cells = [("matrix", "shape", "rank", "ΔW")]
    for line in lines:
        shape = "" if line.shape is None else "{}×{}".format(*line.shape)
        rank = "" if not line.guarded else "dense" if line.rank is None else str(line.rank)
        cells.append((line.name, shape, rank, line.how if line.guarded else f"NOT GUARDED: {line.how}"))
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    shown = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in cells]
    guarded = sum(line.guarded for line in lines)
    return "\n".join([*shown, f"{guarded} matrices guarded, {len(lines) - guarded} trained parameters not"])
