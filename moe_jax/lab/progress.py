"""Progress bars of long jobs, on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar(console: Console | None = None) -> Progress:
    """Returns a bar with the task, its share done, the time spent and the time left."""
    return Progress(
        TextColumn("[bold]{task.description:<9}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console or Console(stderr=True),
    )


@contextlib.contextmanager
def track(
    progress: Progress | bool,
    description: str,
    total: int,
    done: int = 0,
    *,
    console: Console | None = None,
) -> Iterator[Callable[[str], None]]:
    """Puts a task on a bar and yields a function to call after each of its ``total`` steps.

    The function takes a note to show beside the bar, or "" for none.
    """
    if progress is False:
        yield lambda note: None
        return
    bar = progress_bar(console) if progress is True else progress
    task = bar.add_task(description, total=total, completed=done, note="")

    def advance(note: str) -> None:
        if note:
            bar.update(task, note=note)
        bar.advance(task)

    with bar if progress is True else contextlib.nullcontext():
        yield advance
