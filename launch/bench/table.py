"""Rows as a table of text."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table.

    Args:
        rows: what to show.
        columns: heading and, per column, how a value is formatted: `key` to `format specification`.
    """
    cells = [[_format(row[key], spec) for key, spec in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _format(value: Any, spec: str) -> str:
    if spec == "MB":
        return f"{value / 1e6:.1f}"
    return "-" if value is None else format(value, spec)
