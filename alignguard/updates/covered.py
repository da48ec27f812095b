"""What of a model is guarded, matrix by matrix, and what trains outside the guard."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from alignguard.tables import text_table
from alignguard.updates.weight_updates import BEYOND_TEXT, WeightUpdates
from fishergeo.capture import plain_name

NUMBER = re.compile(r"\.\d+(?=\.|$)")  # of a layer or an expert


@dataclass(frozen=True)
class Covered:
    """One line of the table.

    Attributes:
        name: the matrix's or parameter's name in the model.
        guarded: whether ΔW of it is read, and charged by every term.
        how: how ΔW is read, or why it is not.
        shape: (p, q) where it is guarded.
        rank: columns of the factors of ΔW, None for a dense one.
        by_kl: whether KL charges it all the same where no other term does: it is charged through every weight that alignment
            examples pass.
    """

    name: str
    guarded: bool
    how: str
    shape: tuple[int, int] | None = None
    rank: int | None = None
    by_kl: bool = False


def coverage(updates: WeightUpdates, kl: bool = False) -> list[Covered]:
    """Every trained matrix and parameter: the guarded ones first; ``kl`` says whether KL is charged."""
    lines = [Covered(m.plain, True, m.kind, m.shape, m.rank) for m in updates.matrices.values()]
    return lines + [
        Covered(plain_name(name), False, why, by_kl=kl and why != BEYOND_TEXT)
        for name, why in sorted(updates.skipped.items())
    ]


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
                line.how if line.guarded else f"{'BY KL ALONE' if line.by_kl else 'NOT GUARDED'}: {line.how}",
            )
        )
    shown = text_table({"matrix": "left", "shape": "right", "rank": "right", "ΔW": "left"}, rows)
    guarded, read = sum(line.guarded for line in lines), sum(line.by_kl for line in lines)
    through = f"{read} trained parameters by KL alone, " if read else ""
    return f"{shown}\n{guarded} matrices guarded, {through}{len(lines) - guarded - read} trained parameters not"
