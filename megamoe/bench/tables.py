"""Markdown tables, printed as figures come in: the head first, then row by row."""

from __future__ import annotations

from collections.abc import Sequence


def table_head(columns: Sequence[str], numbers: bool = False) -> str:
    """Return the first two lines of a table; ``numbers`` aligns all columns but the first to the right."""
    rules = ["---"] + ["---:" if numbers else "---"] * (len(columns) - 1)
    return f"{table_row(columns)}\n{table_row(rules)}"


def table_row(cells: Sequence[str]) -> str:
    """Return one line of a table."""
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
