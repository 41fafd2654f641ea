"""Rows as CSV, as Markdown, and in the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table


def csv_text(rows: Iterable[dict[str, Any]], empty: Sequence[str] = ()) -> str:
    """Rows with the same names as CSV with a header line.

    Args:
        empty: the names if there are no rows.
    """
    made, out = list(rows), io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(made[0]) if made else empty, lineterminator="\n")
    writer.writeheader()
    writer.writerows(made)
    return out.getvalue()


def markdown_table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with the columns `names`."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def tight_table(title: str, caption: str) -> Table:
    """A table for terminals of 80 columns, its columns still to be added."""
    return Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
