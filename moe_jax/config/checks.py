"""What a setting may be, and what a bad one is told."""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import json
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from moe_jax.routing.difficulty import ESTIMATORS

# The guide's word -> the library's estimator. A word that is missing here passes through as it is.
# "gradient_norm" is the one word that both know and mean differently; see build_router.
ESTIMATOR_WORDS = MappingProxyType(
    {
        "gradient_norm": "activation_norm",
        "perplexity_proxy": "surprisal",
        "threshold": "large_activation_share",
    }
)


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names every problem, one a line."""


class ConfigFileError(ConfigError):
    """There is no file of configuration to read where one was named."""


def setting(default: Any, fix: str, *, low: float = -math.inf, high: float = math.inf,
             choices: tuple[str, ...] = (), text: bool = False,
             secret: bool = False) -> Any:  # fmt: skip
    """A field with its range; ``fix`` is the sentence that tells an operator what to do.

    ``text`` is free text. A ``secret`` is free text too that is in no repr, no JSON and no hash.
    """
    metadata = {
        "fix": fix, "low": low, "high": high, "choices": choices,
        "text": text or secret, "secret": secret,
    }  # fmt: skip
    return dataclasses.field(
        default=default, metadata=metadata, repr=not secret, compare=not secret
    )


EXPERT_COUNTS = ("min_experts", "max_experts", "num_experts")


def check_fields(section: Any, prefix: str) -> None:
    for field in dataclasses.fields(section):
        if field.metadata:
            value = checked(field, getattr(section, field.name), prefix + field.name)
            object.__setattr__(section, field.name, value)


def checked(field: dataclasses.Field[Any], value: Any, origin: str) -> Any:
    """The value, an int widened where a float is meant. Raises ConfigError."""
    kind = type(field.default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right = type(value) is kind
    if right and kind is str:
        right = _is_text(str(value)) if field.metadata["text"] else value in choices_of(field)
    elif right and kind is not bool:
        right = field.metadata["low"] <= value <= field.metadata["high"]
    if not right:
        told = "something else" if field.metadata["secret"] else value
        raise ConfigError(bad_value(origin, told, field))
    return value


def _is_text(value: str) -> bool:
    return len(value) <= 4096 and value.isprintable()


def split_words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def serving_problems(
    buckets: str, proxies: str, buckets_from: str = "serving.buckets",
    proxies_from: str = "serving.trusted_proxies",
) -> list[str]:  # fmt: skip
    """What is wrong with the settings that are lists."""
    problems = []
    words = split_words(buckets)
    if len(words) > 32 or not all(
        w.isascii() and w.isdigit() and 0 < int(w) <= 2**24 for w in words
    ):
        problems.append(
            f"{buckets_from}: expected up to 32 whole numbers from 1 to {2**24}, got "
            f"{shown(buckets)}. Give token counts separated by commas, such as 64,512,1024."
        )
    for word in split_words(proxies):
        try:
            ipaddress.ip_network(word, strict=False)
        except ValueError:
            problems.append(
                f"{proxies_from}: expected addresses or networks, got {shown(word)}. "
                "Give them as 10.0.0.0/8 or 192.0.2.7, separated by commas."
            )
    return problems


def choices_of(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    if field.name != "complexity_estimator":
        return field.metadata["choices"]
    # Looked up late, so that an estimator of the user's own can be named in a file.
    return tuple(sorted({*ESTIMATOR_WORDS, *ESTIMATORS}))


def _allowed(field: dataclasses.Field[Any]) -> str:
    if isinstance(field.default, bool):
        return "true or false"
    if field.metadata["text"]:
        return "a line of text"
    if isinstance(field.default, str):
        return "one of " + ", ".join(choices_of(field))
    low, high = field.metadata["low"], field.metadata["high"]
    kind = "a whole number" if isinstance(field.default, int) else "a number"
    return f"{kind} of at least {low}" if math.isinf(high) else f"{kind} from {low} to {high}"


def bad_value(origin: str, value: Any, field: dataclasses.Field[Any]) -> str:
    fix = field.metadata["fix"]
    near = difflib.get_close_matches(str(value), choices_of(field), n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{origin}: expected {_allowed(field)}, got {shown(value)}. {hint}{fix}"


def experts_problem(counts: Any, origins: Mapping[str, str]) -> str:
    values = counts if isinstance(counts, Mapping) else dataclasses.asdict(counts)
    got = ", ".join(
        f"{name}={values[name]}" + (f" ({origins.get(name, 'default')})" if origins else "")
        for name in EXPERT_COUNTS
    )
    return (
        f"router_config: expected min_experts <= max_experts <= num_experts, got {got}. "
        "Lower the first or raise the last."
    )


def unknown_name(
    origin: str, name: str, known: Iterable[str], otherwise: str, prefix: str = ""
) -> str:
    """``prefix`` is what all names begin with: it makes none of them more alike."""
    by_case = {word.lower().removeprefix(prefix.lower()): word for word in known}
    near = difflib.get_close_matches(name.lower().removeprefix(prefix.lower()), by_case, n=1)
    hint = (
        f"Did you mean {by_case[near[0]]}?"
        if near
        else f"{otherwise} Known: {', '.join(by_case.values())}."
    )
    return f"{origin}: expected a known name, got {name!r}. {hint}"


def shown(value: Any) -> str:
    """A value as JSON where it is JSON, cut short: an error is no place for a megabyte."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
