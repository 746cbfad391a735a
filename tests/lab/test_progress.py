"""Progress is a bar on a terminal and a line per tenth in a log."""

from __future__ import annotations

import io

from rich.console import Console

from moe_jax.lab import progress


def test_a_log_gets_a_line_per_tenth_with_time_left():
    log, now = io.StringIO(), iter(range(0, 1000, 2))
    advance = progress._lines(Console(file=log), "train", 50, 0, clock=lambda: next(now))
    for _ in range(50):
        advance("3.10 bits/byte")
    lines = log.getvalue().splitlines()
    assert lines[0] == "train: 50 steps"
    assert len(lines) == 11
    assert lines[1] == "train: 10%, 0:02 spent, 0:18 left, 3.10 bits/byte"
    assert lines[-1].startswith("train: 100%")
    assert "0:00 left" in lines[-1]


def test_a_resumed_job_counts_from_where_it_resumes():
    log, now = io.StringIO(), iter([0.0, 100.0, 200.0])
    advance = progress._lines(Console(file=log), "train", 10, 8, clock=lambda: next(now))
    advance("")
    advance("")
    assert log.getvalue().splitlines()[:2] == [
        "train: 2 steps",
        "train: 90%, 1:40 spent, 1:40 left",
    ]


def test_a_terminal_gets_a_bar_and_no_lines():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    with progress.track(True, "train", 4, console=console) as advance:
        for _ in range(4):
            advance("note")
    assert "━" in shown.getvalue()
    assert "train: " not in shown.getvalue()


def test_nothing_is_printed_if_progress_is_off():
    with progress.track(False, "train", 4) as advance:
        advance("note")
