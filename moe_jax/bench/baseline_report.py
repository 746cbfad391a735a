"""A baseline's measurement taken again, and what became slower."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_jax.bench.baseline import Change, compare, measure_again, read_baseline
from moe_jax.bench.measure import machine, write_results
from moe_jax.bench.text_tables import print_not_run, print_whole
from moe_jax.checkpoint.archive import baseline_of


def measure_against(
    file: Path,
    *,
    tolerance: float,
    rounds: int | None,
    json: Path | None,
    progress_bar: Callable[[], AbstractContextManager[Callable[[str], None]]],
    out: Console,
    notes: Console,
) -> bool:
    """Measures what a baseline measured and prints the comparison.

    Args:
        file: of ``--json``, or an export that holds one.
        tolerance: slowdown that is tolerated; 0.1 is 10 %.
        rounds: None takes the baseline's own.
        json: where the new rows are written, or None.
        progress_bar: opens a bar and yields a function that labels it.
        out: for the comparison.
        notes: for what is said beside it.

    Returns:
        Whether a case is slower by more than the tolerance, or gone.
    """
    content = read_baseline(baseline_of(file))
    with progress_bar() as progress:
        rows = measure_again(content, rounds=rounds, progress=progress)
    changes, lost = compare(content["rows"], rows)
    print_whole(out, _table(content["bench"], changes, tolerance))
    print_not_run(notes, rows)
    if json is not None:
        write_results(json, bench=content["bench"], settings=content["settings"], rows=rows)
        notes.print(f"rows written to {json}", markup=False, soft_wrap=True)
    current = {word: machine()[word] for word in ("cpu", "cores", "backend", "jax")}
    recorded = {word: content["machine"].get(word) for word in current}
    if current != recorded:
        notes.print(
            f"the baseline is of another machine: {recorded}, here {current}", soft_wrap=True
        )
    for name in lost:
        notes.print(f"[red]gone[/red] {name}: the baseline has it, this version does not")
    slower = [change.name for change in changes if change.slower(tolerance)]
    if slower or lost:
        notes.print(
            f"[red]slower[/red] in {len(slower)} of {len(changes)} cases by more than "
            f"{tolerance:.0%}, with middle halves that do not overlap"
        )
        return True
    open_cases = sum(change.verdict(tolerance) == "not shown" for change in changes)
    out.print(f"none of {len(changes)} cases is shown to be slower by more than {tolerance:.0%}")
    if open_cases:
        out.print(
            f"{open_cases} of them are not shown to be as fast either: their intervals span "
            f"+{tolerance:.0%}. More --rounds narrow them."
        )
    return False


def _table(bench: str, changes: list[Change], tolerance: float) -> Table:
    # What all cases share stands once, above them.
    named = [change.name.split() for change in changes]
    shared = [w for w in named[0][1:] if all(w in words for words in named)] if named else []
    table = Table(
        "case",
        "ratio then",
        "ratio now",
        "now / then",
        "interval",
        f"slower than +{tolerance:.0%}",
        title=f"bench {bench} {' '.join(shared)}",
    )
    for change, words in zip(changes, named, strict=True):
        table.add_row(
            " ".join(w for w in words if w not in shared),
            f"{change.before:.3f}",
            f"{change.now:.3f}",
            f"{change.change:.3f}",
            f"{change.low:.2f}-{change.high:.2f}",
            change.verdict(tolerance),
        )
    return table
