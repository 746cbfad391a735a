"""Progress of long jobs, on standard error: a bar on a terminal, a line per 10 % elsewhere."""

from __future__ import annotations

import contextlib
import time
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
    """Returns a bar with the task, its share done, the time spent and the time left.

    On a console that is no terminal (a log file, a pipe) the bar is disabled, and ``track`` prints
    lines instead.
    """
    console = console or Console(stderr=True)
    return Progress(
        TextColumn("[bold]{task.description:<9}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
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

    The function takes a note to show beside the bar, or "" for none. Where the bar is disabled, a
    line is printed whenever another tenth of the steps is done.
    """
    if progress is False:
        yield lambda note: None
        return
    bar = progress_bar(console) if progress is True else progress
    if bar.disable:
        yield _lines(bar.console, description, total, done)
        return
    task = bar.add_task(description, total=total, completed=done, note="")

    def advance(note: str) -> None:
        if note:
            bar.update(task, note=note)
        bar.advance(task)

    with bar if progress is True else contextlib.nullcontext():
        yield advance


def _lines(
    console: Console,
    description: str,
    total: int,
    done: int,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[str], None]:
    """Returns a function that prints a line per tenth of the steps, with time spent and left."""
    first, started, last_note = done, clock(), ""
    steps = total - done
    noun = "step" if steps == 1 else "steps"
    console.print(f"{description}: {steps} {noun}", highlight=False, soft_wrap=True)

    def advance(note: str) -> None:
        nonlocal done, last_note
        done, last_note = done + 1, note or last_note
        if 10 * done // total == 10 * (done - 1) // total:
            return
        spent = clock() - started
        left = spent / (done - first) * (total - done)
        line = f"{description}: {done / total:.0%}, {_minutes(spent)} spent, {_minutes(left)} left"
        console.print(
            f"{line}, {last_note}" if last_note else line,
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    return advance


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
