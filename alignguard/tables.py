"""Tables as plain text, which reads alike on a terminal, in a file and in a log."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDEST = 10_000  # columns of the console: no line is ever wrapped or cut off


def text_table(columns: Mapping[str, str], rows: Iterable[Sequence[str]], header: bool = True) -> str:
    """Rows in aligned columns, without borders and colours.

    Args:
        columns: title of each column, and whether its cells stand ``"left"`` or ``"right"``.
        rows: cells of each row, as many as there are columns.
        header: show the titles.

    Returns:
        A line for each row, and one for the titles before them.
    """
    table = Table(box=None, show_header=header, header_style="", pad_edge=False, padding=(0, 2, 0, 0))
    for title, side in columns.items():
        table.add_column(Text(title), justify="right" if side == "right" else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    page = io.StringIO()
    Console(file=page, width=WIDEST, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())
