"""Compares a new measurement with a baseline, as ratios to a floor.

Times of two days cannot be compared: machines differ and their speed drifts. What is compared is
each case's *ratio* to the floor that was timed in turns with it, in the same run, on either day.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RUNNERS: Mapping[str, tuple[str, str]] = {
    "route": ("moe_jax.bench.routing_cost", "bench_route"),
    "layer": ("moe_jax.bench.layer_cost", "bench_layer"),
    "decode": ("moe_jax.bench.decode_cost", "bench_decode"),
}
"""The measurements that state a ratio and its spread for every row: module and function.

Imported when they are asked for.
"""

# What names a row; the rest of it was measured.
_NAMES = (
    "rule",
    "implementation",
    "tokens",
    "d_model",
    "d_ff",
    "experts",
    "k",
    "mean_k",
    "dtype",
    "load",
    "pass",
)


class BaselineError(ValueError):
    """A file that is not a baseline; the message says what to do about it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One row of the baseline and of the new measurement.

    Args:
        name: what the row measures.
        before: ratio to the floor in the baseline.
        now: the same, measured now. NaN where the row is gone.
        low: least change that the middle halves of both allow.
        high: most.
    """

    name: str
    before: float
    now: float
    low: float
    high: float

    @property
    def change(self) -> float:
        """Now over before; above 1 is slower."""
        return self.now / self.before

    def slower(self, tolerance: float) -> bool:
        """Returns whether even the least change is above 1 + tolerance."""
        return self.low > 1.0 + tolerance

    def verdict(self, tolerance: float) -> str:
        """Returns ``"yes"`` if slower, ``"no"`` if not, ``"not shown"`` if the interval spans the bar.

        Example:
            >>> Change(name="TopK", before=1.0, now=1.1, low=1.0, high=1.2).verdict(0.1)
            'not shown'
        """
        if self.slower(tolerance):
            return "yes"
        return "no" if self.high <= 1.0 + tolerance else "not shown"


def read_baseline(file: Path) -> dict[str, Any]:
    """The content of a file that ``moe-jax bench ... --json FILE`` wrote.

    Raises:
        BaselineError: not such a file, or of a measurement that states no spread.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaselineError(
            f"{file}: expected a JSON file, got {type(error).__name__}: {error}. "
            "Write one with: moe-jax bench route --json FILE."
        ) from error
    words = ("bench", "machine", "settings", "rows")
    if not isinstance(content, dict) or not all(word in content for word in words):
        raise BaselineError(
            f"{file}: expected a baseline with {', '.join(words)}, got something else. "
            "Write one with: moe-jax bench route --json FILE."
        )
    if content["bench"] not in RUNNERS:
        raise BaselineError(
            f"{file}: expected a baseline of bench {', '.join(RUNNERS)}, got one of "
            f"{content['bench']!r}, whose rows state no spread. Take one of these."
        )
    content["rows"] = rows = _whole_rows(content)
    good = isinstance(rows, list) and rows
    if not good or not all(_is_measured(row) for row in rows):
        raise BaselineError(
            f"{file}: expected rows with a positive ratio and its spread, got others. "
            "Take the baseline again with this version."
        )
    return content


def _whole_rows(content: dict[str, Any]) -> Any:
    """The rows with what ``details`` adds to each, less those of peers that did not run."""
    rows, details = content["rows"], content.get("details")
    if not isinstance(rows, list) or not isinstance(details, list) or len(rows) != len(details):
        return rows
    if not all(isinstance(part, dict) for part in (*rows, *details)):
        return rows
    whole = [{**row, **detail} for row, detail in zip(rows, details, strict=True)]
    return [row for row in whole if "not_run" not in row]


def _is_measured(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("spread"), list):
        return False
    figures = [row.get("ratio"), *row["spread"]]
    return len(figures) == 3 and all(isinstance(f, int | float) and f > 0 for f in figures)


def measure_again(
    baseline: Mapping[str, Any],
    *,
    rounds: int | None = None,
    progress: Callable[[str], None] = lambda label: None,
) -> list[dict[str, Any]]:
    """The baseline's measurement with its own settings, on this machine, now."""
    settings = dict(baseline["settings"])
    if rounds is not None:
        settings["rounds"] = rounds
    module, function = RUNNERS[baseline["bench"]]
    runner = getattr(importlib.import_module(module), function)
    try:
        return runner(**settings, progress=progress)
    except TypeError as error:
        raise BaselineError(
            f"settings: expected those of bench {baseline['bench']}, got {settings} ({error}). "
            "Take the baseline again with this version."
        ) from error


def compare(
    before: list[dict[str, Any]], now: list[dict[str, Any]]
) -> tuple[list[Change], list[str]]:
    """Every row that both have, and the names of those that the new measurement lacks.

    References such as ``balanced`` are no cases: they run nothing of this library.

    A change's interval runs from the lower quartile now over the upper one before to the upper one
    now over the lower one before: where it lies wholly above 1, the middle halves do not overlap.

    Example:
        >>> row = {"rule": "TopK", "ratio": 1.0, "spread": [0.9, 1.1]}
        >>> [change], lost = compare([row], [{**row, "ratio": 2.0, "spread": [1.8, 2.2]}])
        >>> change.change, round(change.low, 2), round(change.high, 2), lost
        (2.0, 1.64, 2.44, [])
    """
    from moe_jax.bench.workload import REFERENCES  # imports JAX

    current = {name_of(row): row for row in now if "not_run" not in row}
    changes, lost = [], []
    for old in before:
        if old.get("implementation") in REFERENCES:
            continue
        name = name_of(old)
        if name not in current:
            lost.append(name)
            continue
        new = current[name]
        changes.append(
            Change(
                name=name,
                before=old["ratio"],
                now=new["ratio"],
                low=new["spread"][0] / old["spread"][1],
                high=new["spread"][1] / old["spread"][0],
            )
        )
    return changes, lost


def name_of(row: Mapping[str, Any]) -> str:
    """Returns the name of a row: what it measures, without the measured values."""
    parts = []
    for word in _NAMES:
        value = row.get(word)
        if value is None:
            continue
        parts.append(str(value) if isinstance(value, str) else f"{word}={value:g}")
    return " ".join(parts)
