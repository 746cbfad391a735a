"""Timing in turns with a floor: several rounds, medians of ratios.

Machines are shared and their speed drifts, so no time is compared with one taken minutes earlier.
Every round runs the floor, a case, the floor, the next case, and so on; a case's ratio in that round
is its time over the mean of the floors right before and right after it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

Thunk = Callable[[], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one case and its ratios to the floor, round by round."""

    seconds: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median ratio to the floor."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """The middle half of the ratios."""
        if len(self.ratios) < 2:
            return self.ratio, self.ratio
        # "inclusive" stays within what was measured; the default extrapolates, even below zero.
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    @property
    def median_seconds(self) -> float:
        """The median of ``seconds``."""
        return statistics.median(self.seconds)


def run_once(thunk: Thunk) -> float:
    """Returns the seconds until the arrays of the thunk are ready."""
    start = time.perf_counter()
    jax.block_until_ready(thunk())
    return time.perf_counter() - start


def interleave(
    floor: Thunk,
    cases: Mapping[str, Thunk],
    *,
    rounds: int = 10,
    most_seconds: float | None = None,
    after_round: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Timing], tuple[float, ...]]:
    """Times every case in turns with the floor. Compiles and warms up first.

    Args:
        floor: what the cases are compared with.
        cases: thunks by name. Their order rotates from round to round.
        rounds: 10 or more for figures that are reported.
        most_seconds: no further round is begun after this long, once three are done; None is no
            bound. ``len(timing.ratios)`` says how many there were.
        after_round: called with the number of rounds done, to show progress.

    Returns:
        A ``Timing`` a case, and the floor's own seconds.
    """
    for thunk in (floor, *cases.values()):
        run_once(thunk)
        run_once(thunk)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    ratios: dict[str, list[float]] = {name: [] for name in cases}
    floors: list[float] = []
    names = list(cases)
    start = time.perf_counter()
    for i in range(rounds):
        if most_seconds is not None and i >= 3 and time.perf_counter() - start > most_seconds:
            break
        turn = names[i % len(names) :] + names[: i % len(names)]
        before = run_once(floor)
        floors.append(before)
        for name in turn:
            elapsed = run_once(cases[name])
            after = run_once(floor)
            floors.append(after)
            seconds[name].append(elapsed)
            ratios[name].append(elapsed / (0.5 * (before + after)))
            before = after
        after_round(i + 1)
    timings = {n: Timing(seconds=tuple(seconds[n]), ratios=tuple(ratios[n])) for n in names}
    return timings, tuple(floors)


def compile_for(function: Callable[..., Any], *args: Any) -> tuple[Thunk, int | None]:
    """The compiled call on these arguments, and its peak temporary memory in bytes.

    The memory is what XLA states; None where it states none.
    """
    compiled = jax.jit(function).lower(*args).compile()
    analysis = compiled.memory_analysis()
    size = None if analysis is None else int(analysis.temp_size_in_bytes)
    return functools.partial(compiled, *args), size


def machine() -> dict[str, Any]:
    """Returns a description of this machine, without host names."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "devices": [d.device_kind for d in jax.devices()],
        "date": time.strftime("%Y-%m-%d"),
    }


def write_results(
    path: Path,
    *,
    bench: str,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    promised: tuple[str, ...] = (),
) -> None:
    """Writes ``{bench, machine, settings, rows}`` as JSON, making the folder if need be.

    With ``promised`` the rows hold exactly those keys, and what else there is goes to ``details``,
    a list of the same length.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"bench": bench, "machine": machine(), "settings": settings}
    if promised:
        content["rows"] = [{key: row[key] for key in promised} for row in rows]
        content["details"] = [{k: v for k, v in r.items() if k not in promised} for r in rows]
    else:
        content["rows"] = rows
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
