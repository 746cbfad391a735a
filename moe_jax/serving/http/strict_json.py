"""JSON as a careful server reads it: every key once, no NaN, no surprise in depth or in size."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from moe_jax.serving.errors import ServingError

# An empty list costs 56 bytes of memory and 3 bytes of text: brackets are what makes JSON a bomb.
_MOST_BRACKETS = 1 << 20

MOST_NESTED = 100
"""Deepest nesting of a request; Triton has the same limit (its qa/L0_http/http_test.py)."""


def malformed(message: str) -> ServingError:
    """A request that does not follow the protocol: 400."""
    return ServingError("malformed", message)


def parse_object(text: bytes | bytearray | memoryview, what: str) -> dict[str, Any]:
    """The JSON object that ``text`` is.

    Stricter than ``json.loads``: UTF-8 without a byte order mark, every key once, no ``NaN`` and no
    ``Infinity``, no lone surrogates, bounded nesting.

    Args:
        text: the bytes.
        what: what they are, for the message of an error.

    Raises:
        ServingError: ``malformed``, or ``too_large`` where the text holds too many lists.

    Example:
        >>> parse_object(b'{"id": "a"}', "the body")
        {'id': 'a'}
        >>> parse_object(b'{"id": NaN}', "the body")
        Traceback (most recent call last):
        moe_jax.serving.errors.ServingError: the body: expected JSON, got NaN, which JSON has not.
    """
    raw = bytes(text)
    brackets = raw.count(b"[") + raw.count(b"{")
    if brackets > _MOST_BRACKETS:
        raise ServingError(
            "too_large",
            f"{what}: expected at most {_MOST_BRACKETS} lists and objects, got more. "
            "Send the tensor flat, or as binary data.",
        )
    try:
        decoded = raw.decode("utf-8")
        value = _DECODER.decode(decoded)
        if "\\u" in decoded:
            _refuse_surrogates(value)
        if brackets > MOST_NESTED and _nested_too_deep(value):
            raise RecursionError
    except ServingError as error:
        raise malformed(f"{what}: {error.message}") from None
    except UnicodeDecodeError:
        raise malformed(f"{what}: expected UTF-8, got other bytes.") from None
    except json.JSONDecodeError as error:
        raise malformed(
            f"{what}: expected JSON, got {error.msg} at character {error.pos}."
        ) from None
    except RecursionError:
        raise malformed(
            f"{what}: expected JSON nested at most {MOST_NESTED} deep, got one nested deeper."
        ) from None
    except ValueError:  # an integer of thousands of digits
        raise malformed(f"{what}: expected numbers of a usual size, got a huge one.") from None
    if not isinstance(value, dict):
        raise malformed(f"{what}: expected a JSON object, got {kind(value)}.")
    return value


def kind(value: Any) -> str:
    """What a JSON value is, in JSON's words: never the value itself, which may be huge."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")


def shown(text: Any) -> str:
    """A client's word, quoted and cut short."""
    quoted = json.dumps(text)
    return quoted if len(quoted) <= 60 else quoted[:57] + '..."'


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(items)
    if len(mapping) != len(items):
        seen: set[str] = set()
        twice = next(n for n, _ in items if n in seen or seen.add(n))
        raise malformed(f"expected every key once, got {shown(twice)} more than once.")
    return mapping


def _constant(name: str) -> NoReturn:
    raise malformed(f"expected JSON, got {name}, which JSON has not.")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)


def _nested_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_NESTED):
        deeper = []
        for holder in level:
            items = holder.values() if type(holder) is dict else holder
            kinds = set(map(type, items))  # most holders are rows of numbers, and end here
            if list in kinds or dict in kinds:
                deeper += [item for item in items if type(item) in (list, dict)]
        if not deeper:
            return False
        level = deeper
    return True


def _refuse_surrogates(value: Any) -> None:
    """A lone surrogate is no character: it could never be sent back."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_surrogates(name)
            _refuse_surrogates(item)
    elif isinstance(value, list):
        if value and type(value[0]) not in (int, float):
            for item in value:
                _refuse_surrogates(item)
    elif isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise malformed("expected characters, got a lone surrogate.") from None
