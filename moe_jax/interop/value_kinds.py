"""What a value of a published ``config.json`` may be: in words, and as a test."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class ValueKind:
    """What values of a setting are.

    Attributes:
        words: for messages, after "expected".
        holds: whether a value is of the kind.
    """

    words: str
    holds: Callable[[Any], bool]


def is_whole(value: Any, *, least: int) -> bool:
    """Returns whether a value is a whole number of at least ``least``; ``True`` is not."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and bool(value >= least)


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number; ``True`` is not."""
    return (
        isinstance(value, (int, float, np.number))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def list_of(words: str, holds: Callable[[Any], bool]) -> ValueKind:
    """Returns the kind of lists whose entries are all of another kind.

    Example:
        >>> list_of("names", NAME.holds).holds(["a", 1])
        False
    """
    return ValueKind(
        f"a list of {words}", lambda v: isinstance(v, (list, tuple)) and all(map(holds, v))
    )


COUNT = ValueKind("a whole number of at least 1", lambda v: is_whole(v, least=1))
COUNT_OR_ZERO = ValueKind("a whole number of at least 0", lambda v: is_whole(v, least=0))
NUMBER = ValueKind("a finite number", is_number)
NOT_NEGATIVE = ValueKind("a number of at least 0", lambda v: is_number(v) and v >= 0)
POSITIVE = ValueKind("a number above 0", lambda v: is_number(v) and v > 0)
FLAG = ValueKind("true or false", lambda v: isinstance(v, bool))
NAME = ValueKind("a name", lambda v: isinstance(v, str) and bool(v))
OBJECT = ValueKind("an object", lambda v: isinstance(v, Mapping))


def in_words(value: Any) -> str:
    """A config value for messages, as JSON spells it, with text marked as text.

    Example:
        >>> in_words("false"), in_words(False), in_words(2)
        ("the text 'false'", 'false', '2')
    """
    if isinstance(value, str):
        return f"the text {value!r}"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def check_value(kind: ValueKind | None, value: Any, *, model_type: str, key: str) -> None:
    """Raises ValueError if a value is not of the kind; None is any kind."""
    if kind is not None and not kind.holds(value):
        raise ValueError(
            f"config of {model_type!r}, {key}: expected {kind.words}, got {in_words(value)}. Correct "
            "config.json."
        )
