"""Rows of text as columns that fit the terminal; where they cannot, one below the other."""

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]
# What is left for the last column must hold a word or two, or rows are stacked.
NARROWEST = 16


def table(rows: Rows, header: Sequence[str] = ()) -> str:
    """Return rows with their columns aligned; the last column is not padded, and wrapped where it must be.

    Args:
        rows: All of the same length.
        header: What stands above each column; the first is empty where rows are called by their first cell.
    """
    if not rows:
        return ""
    width = terminal_width()
    every = [list(header), *rows] if header else list(rows)
    widths = [max(len(row[column]) for row in every) for column in range(len(every[0]))]
    indent = sum(widths[:-1]) + 2 * (len(widths) - 1)
    if width is None or indent + widths[-1] <= width:
        return "\n".join(_row(row, widths) for row in every)
    if header or width - indent < NARROWEST:
        return "\n".join(_stacked(row, header, width) for row in rows)
    lines = []
    for row in every:
        first, *more = textwrap.wrap(row[-1], width - indent) or [""]
        lines += [_row([*row[:-1], first], widths), *(f"{' ' * indent}{line}" for line in more)]
    return "\n".join(lines)


def wrapped(text: str) -> str:
    """Return a paragraph that fits the terminal."""
    width = terminal_width()
    return text if width is None else textwrap.fill(text, max(width, NARROWEST))


def terminal_width() -> int | None:
    """Return how many columns there are; None where nobody said, as in a pipe."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal():
        return shutil.get_terminal_size().columns
    return None


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _stacked(row: Sequence[str], header: Sequence[str], width: int) -> str:
    """Return a row as its first cell and, indented below it, all others, each with its column's name."""
    named = zip(row[1:], header[1:] or [""] * len(row), strict=False)
    rest = ", ".join(f"{name} {cell}".strip() for cell, name in named if cell)
    room = max(width, NARROWEST)
    below = textwrap.fill(rest, room, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(part for part in (textwrap.fill(row[0], room), below) if part)
