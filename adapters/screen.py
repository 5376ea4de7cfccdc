"""What commands show: a table for people, one JSON document for programmes.

On a terminal tables are drawn by rich (which honours NO_COLOR); into a pipe go plain columns, never cut.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any


def say(text: str) -> None:
    """One line on stdout."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """One line of progress on stderr, so that stdout stays the answer alone."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def show_json(value: Any) -> None:
    """One JSON document on stdout."""
    say(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str = "nothing yet") -> None:
    """A table with a heading; `empty` in its place when there are no rows.

    A cell is one line: what ends a line in it, or moves the cursor, is shown escaped. JSON has it as it is.
    """
    shown = [[_one_line(cell) for cell in row] for row in rows]
    if not rows:
        say(empty)
    elif sys.stdout.isatty():
        _draw(columns, shown)
    else:
        lines = [list(columns), *shown]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        for line in lines:
            say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def when(at: datetime) -> str:
    """A time in the reader's own zone, with the zone."""
    aware = at if at.tzinfo else at.replace(tzinfo=UTC)
    return aware.astimezone().isoformat(sep=" ", timespec="seconds")


def size(num_bytes: int) -> str:
    """Bytes as a person reads them."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def _one_line(cell: str) -> str:
    # Notes and reasons are strangers' text: with a line break in it, one could forge another version's row.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cell)


def _draw(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    # Imported here: a pipe needs no rich.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(table)
