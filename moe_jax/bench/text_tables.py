"""Tables that stay readable in 80 columns, as in a pipe or a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def shown(value: Any) -> str:
    """Formats a value for a cell: four digits of a float, "yes" or nothing for a bool.

    Example:
        >>> shown(1.23456), shown(True), shown(None), shown(8)
        ('1.235', 'yes', '', '8')
    """
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def split_columns(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Splits columns into those that differ between rows, and the shared ones in words.

    The first column always stays.

    Example:
        >>> rows = [{"rule": "TopK", "k": 2, "ms": 3.0}, {"rule": "TopP", "k": 2, "ms": 4.0}]
        >>> split_columns(rows, ["rule", "k", "ms"])
        (['rule', 'ms'], ['k 2'])
    """
    values = {c: {shown(row.get(c)) for row in rows} for c in columns}
    same = [c for c in columns[1:] if len(rows) > 1 and len(values[c]) == 1]
    shared = [f"{c.replace('_', ' ')} {one}" for c in same if (one := next(iter(values[c])))]
    return [c for c in columns if c not in same], shared


def print_rows(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Prints rows below a title with what they share. No header and no figure is ever cut."""
    apart, shared = split_columns(rows, columns)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in apart:
        figures = all(not isinstance(row.get(column), str) for row in rows)
        table.add_column(_header(column), justify="right" if figures else "left")
    for row in rows:
        table.add_row(*[shown(row.get(c)) for c in apart])
    console.print(
        ": ".join([title, *([", ".join(shared)] if shared else [])]),
        highlight=False,
        soft_wrap=True,
    )
    print_whole(console, table)


def print_whole(console: Console, table: Table) -> None:
    """Prints a table on lines as long as it needs, wider than the console or not.

    A pipe or a log states no width, and on the 80 columns that are taken for it rich cuts words.
    """
    needed = console.measure(table, options=console.options.update(width=1000)).maximum
    if needed > console.width:
        console = Console(width=needed)
    console.print(table)


def _header(column: str) -> str:
    """On two lines if it has several words: figures are shorter than their names."""
    first, _, others = column.partition("_")
    return f"{first}\n{others.replace('_', ' ')}" if others else first


def print_not_run(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints a line for each row that was not measured, with its reason."""
    for row in rows:
        if "not_run" in row:
            console.print(
                f"{row['implementation']} E={row['experts']} {row['dtype']} {row['pass']}: "
                f"not run, {row['not_run']}"
            )
