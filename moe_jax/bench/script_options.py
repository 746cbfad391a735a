"""Options of the scripts in ``benchmarks/``, checked before the minutes that a measurement takes.

For ``argparse``, which prints the message of an ``ArgumentTypeError`` on one line and exits with 2.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer

from moe_jax.bench.options import writable

_N = TypeVar("_N", int, float)


def at_least(least: _N) -> Callable[[str], _N]:
    """Returns the ``type=`` of an option that takes a finite number from ``least`` up.

    It takes whole numbers if ``least`` is one.

    Example:
        >>> at_least(1)("12"), at_least(0.0)("0.5")
        (12, 0.5)
        >>> at_least(1)("0")
        Traceback (most recent call last):
        argparse.ArgumentTypeError: expected a whole number of at least 1, got '0'.
    """
    kind = type(least)

    def parse(text: str) -> _N:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or value < least:
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(
                f"expected a {noun} of at least {least}, got {text!r}."
            )
        return value

    return parse


def some_of(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Returns the ``type=`` of an option that takes some of these words, separated by commas.

    Example:
        >>> some_of(("olmoe", "mixtral"))("mixtral,olmoe")
        ['mixtral', 'olmoe']
    """

    def parse(text: str) -> list[str]:
        words = text.split(",")
        if not set(words) <= set(allowed):
            raise argparse.ArgumentTypeError(f"expected some of {','.join(allowed)}, got {text!r}.")
        return words

    return parse


def file_to_write(text: str) -> Path:
    """The ``type=`` of an option that takes a file which can be written. Makes its folder."""
    try:
        file = writable(Path(text))
        assert file is not None
        file.parent.mkdir(parents=True, exist_ok=True)
    except (typer.BadParameter, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return file


def read_rows(file: Path, bench: str, fields: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """Returns the rows of a file that a script wrote before.

    Args:
        file: JSON as ``write_results`` writes it.
        bench: what it must be of.
        fields: for each field that a row must have, the values that it may have.

    Raises:
        ValueError: no such file, of another bench, or with other rows.
    """
    advice = f"Name a file that this script wrote with {bench} rows, or a new one."
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: expected a JSON file, got {type(error).__name__}: {error}. {advice}"
        ) from error
    found = content.get("bench") if isinstance(content, dict) else None
    if found != bench:
        raise ValueError(f"{file}: expected rows of bench {bench!r}, got {found!r}. {advice}")
    rows: Any = content.get("rows")
    good = isinstance(rows, list) and all(
        isinstance(row, dict) and all(row.get(name) in values for name, values in fields.items())
        for row in rows
    )
    if not good:
        raise ValueError(
            f"{file}: expected rows with {', '.join(fields)} of this table, got others. {advice}"
        )
    return rows
