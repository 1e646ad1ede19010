"""Tables for a reader: drawn on a terminal, a line a row elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout; numbers are aligned to the right.

    Where that is no terminal, a line is the title, then each column's name and value.
    No rows print nothing.
    """
    cells = [[_text(value) for value in row] for row in rows]
    if not cells:
        return
    if not sys.stdout.isatty():
        for row in cells:
            named = (f"{name} {text}".strip() for name, text in zip(columns, row, strict=True))
            print(f"{title}:", *filter(None, named))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for number, name in enumerate(columns):
        numbers = all(row[number][:1].isdigit() for row in cells)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(escape, row))
    Console().print(table)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
