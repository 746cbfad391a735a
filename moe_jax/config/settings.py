"""The settings: sections, ranges, checks, and what a bad value is told."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from moe_jax.difficulty import ESTIMATORS

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


def _setting(default: Any, fix: str, *, low: float = -math.inf, high: float = math.inf,
             choices: tuple[str, ...] = ()) -> Any:  # fmt: skip
    """A field with its range; ``fix`` is the sentence that tells an operator what to do."""
    metadata = {"fix": fix, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """What the router is.

    Args:
        input_dim: D, width of the hidden states.
        num_experts: E.
        min_experts: fewest experts a token uses.
        max_experts: most experts a token uses, at most ``num_experts``.
        complexity_estimator: how difficulty is told; the guide's word or any registered estimator.
        routing_strategy: ``top_k`` (difficulty decides how many) or ``threshold`` (each expert
            has its own calibrated threshold).
        load_balancing: whether ``update`` evens out the experts' load while training.
        noise_factor: standard deviation of the noise on router logits. Acts in training only,
            where a PRNG key is given.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    input_dim: int = _setting(768, "Give the width of the hidden states.", low=1, high=2**20)
    num_experts: int = _setting(8, "Give the number of experts.", low=1, high=2**16)
    min_experts: int = _setting(1, "A token uses at least this many experts.", low=1)
    max_experts: int = _setting(4, "A token uses at most this many experts.", low=1)
    complexity_estimator: str = _setting(
        "gradient_norm",
        "Choose one of these, or register your own with moe_jax.difficulty.register_estimator.",
    )
    routing_strategy: str = _setting(
        "top_k", "Choose one of these.", choices=("top_k", "threshold")
    )
    load_balancing: bool = _setting(True, "Switch balancing on or off.")
    noise_factor: float = _setting(0.1, "0.1 to 0.2 is usual, 0 is no noise.", low=0, high=1)

    def __post_init__(self) -> None:
        _check_fields(self, "router_config.")
        if not self.min_experts <= self.max_experts <= self.num_experts:
            raise ConfigError(_experts_problem(self, {}))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PerformanceConfig:
    """How the service spends time and memory.

    Args:
        enable_caching: whether results are cached.
        enable_monitoring: whether metrics are kept.
        cache_size: most results in the cache.
        cache_ttl_seconds: how long a result may be served from the cache.
        parallel_threshold: batches of more rows than this are split.
    """

    enable_caching: bool = _setting(True, "Switch the result cache on or off.")
    enable_monitoring: bool = _setting(True, "Switch metrics on or off.")
    cache_size: int = _setting(
        10_000, "To have no cache set enable_caching to false.", low=1, high=2**31
    )
    cache_ttl_seconds: float = _setting(
        3600.0, "To have no cache set enable_caching to false.", low=0.001, high=10 * 365 * 86400.0
    )
    parallel_threshold: int = _setting(
        1000, "Raise it to split only larger batches.", low=1, high=2**40
    )

    def __post_init__(self) -> None:
        _check_fields(self, "performance.")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SecurityConfig:
    """What a request may be.

    Args:
        enable_validation: whether the values of a request are checked. (Its shape, dtype and size
            always are.)
        max_tensor_size: most elements of one request's tensor.
        max_batch_size: most sequences in one request.
        security_level: ``minimal``, ``standard`` or ``strict``.
    """

    enable_validation: bool = _setting(True, "Switch the checks of values on or off.")
    max_tensor_size: int = _setting(1_000_000_000, "Count elements, not bytes.", low=1, high=2**48)
    max_batch_size: int = _setting(1024, "Count sequences, not tokens.", low=1, high=2**31)
    security_level: str = _setting(
        "standard", "Choose one of these.", choices=("minimal", "standard", "strict")
    )

    def __post_init__(self) -> None:
        _check_fields(self, "security.")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole configuration: hashable, equal by value, and JSON by ``to_json``.

    Args:
        router_config: what the router is.
        performance: how the service spends time and memory.
        security: what a request may be.
        environment: where this runs.
        log_level: least severe message that is logged.

    Raises:
        ConfigError: a value of the wrong type or out of range.

    Example:
        >>> config = Config(router_config=RouterConfig(num_experts=16))
        >>> config.router_config.max_experts, config.security.security_level
        (4, 'standard')
        >>> Config.from_json(config.to_json()) == config
        True
    """

    router_config: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    performance: PerformanceConfig = dataclasses.field(default_factory=PerformanceConfig)
    security: SecurityConfig = dataclasses.field(default_factory=SecurityConfig)
    environment: str = _setting(
        "development", "Choose one of these.", choices=("development", "staging", "production")
    )
    log_level: str = _setting(
        "INFO", "Choose one of these.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, section in _SECTIONS.items():
            if not isinstance(getattr(self, name), section):
                raise ConfigError(
                    f"{name}: expected a {section.__name__}, got {getattr(self, name)!r}. "
                    f"Build one, or use Config.from_json."
                )
        _check_fields(self, "")

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values, in the words of the guide's production.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        """The inverse of ``to_json``. Keys that are missing take their default.

        Raises:
            ConfigError: an unknown key, or a value of the wrong type or out of range.

        Example:
            >>> Config.from_json({"router_config": {"max_experts": 3}}).router_config.max_experts
            3
        """
        problems: list[str] = []
        given = from_nested(data, "", problems)
        return build_config(given, problems)

    @property
    def config_hash(self) -> str:
        """32 hex digits that tell configurations apart; equal for equal ones, in every process."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def from_nested(data: Any, where: str, problems: list[str]) -> dict[str, tuple[Any, str]]:
    """The guide's sections as one flat mapping from a setting to its value and its origin."""
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"configuration{where}: expected a JSON object with {', '.join(_TOP_LEVEL)}, "
            f"got {_shown(data)}. See configs/production.json."
        )
    given: dict[str, tuple[Any, str]] = {}
    for key, value in data.items():
        if key not in _TOP_LEVEL:
            sections = [s for s, fields in _NAMES.items() if s and key in fields]
            if sections:
                problems.append(
                    f"{key}{where}: expected inside {sections[0]!r}, got it at the top level. "
                    f"Move it into {sections[0]!r}."
                )
            else:
                problems.append(unknown_name(f"{key}{where}", key, _TOP_LEVEL, "Remove it."))
        elif key not in _SECTIONS:
            given[key] = (value, f"{key}{where}")
        elif not isinstance(value, Mapping):
            problems.append(
                f"{key}{where}: expected a JSON object with {', '.join(_NAMES[key])}, "
                f"got {_shown(value)}. See configs/production.json."
            )
        else:
            for name, item in value.items():
                origin = f"{key}.{name}{where}"
                if name in _NAMES[key]:
                    given[name] = (item, origin)
                else:
                    problems.append(unknown_name(origin, name, _NAMES[key], "Remove it."))
    return given


def build_config(given: Mapping[str, tuple[Any, str]], problems: list[str]) -> Config:
    """Checks every value under the name that its author knows it by, then builds the tree."""
    values: dict[str, Any] = {}
    for name, (value, origin) in given.items():
        try:
            values[name] = _checked(SETTINGS[name][1], value, origin)
        except ConfigError as error:
            problems.append(str(error))
    if not problems:
        counts = {name: values.get(name, SETTINGS[name][1].default) for name in _EXPERT_COUNTS}
        low, high, most = counts.values()
        if not low <= high <= most:
            problems.append(_experts_problem(counts, {n: o for n, (_, o) in given.items()}))
    if problems:
        raise ConfigError("\n".join(problems))
    parts: dict[str, Any] = {name: value for name, value in values.items() if name in _TOP_LEVEL}
    for section, kind in _SECTIONS.items():
        parts[section] = kind(**{n: v for n, v in values.items() if n in _NAMES[section]})
    return Config(**parts)


# --- checks ---------------------------------------------------------------------------------


_EXPERT_COUNTS = ("min_experts", "max_experts", "num_experts")


def _check_fields(section: Any, prefix: str) -> None:
    for field in dataclasses.fields(section):
        if field.metadata:
            value = _checked(field, getattr(section, field.name), prefix + field.name)
            object.__setattr__(section, field.name, value)


def _checked(field: dataclasses.Field[Any], value: Any, origin: str) -> Any:
    """The value, an int widened where a float is meant. Raises ConfigError."""
    kind = type(field.default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right = type(value) is kind
    if right and kind is str:
        right = value in choices_of(field)
    elif right and kind is not bool:
        right = field.metadata["low"] <= value <= field.metadata["high"]
    if not right:
        raise ConfigError(bad_value(origin, value, field))
    return value


def choices_of(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    if field.name != "complexity_estimator":
        return field.metadata["choices"]
    # Looked up late, so that an estimator of the user's own can be named in a file.
    return tuple(sorted({*ESTIMATOR_WORDS, *ESTIMATORS}))


def _allowed(field: dataclasses.Field[Any]) -> str:
    if isinstance(field.default, bool):
        return "true or false"
    if isinstance(field.default, str):
        return "one of " + ", ".join(choices_of(field))
    low, high = field.metadata["low"], field.metadata["high"]
    kind = "a whole number" if isinstance(field.default, int) else "a number"
    return f"{kind} of at least {low}" if math.isinf(high) else f"{kind} from {low} to {high}"


def bad_value(origin: str, value: Any, field: dataclasses.Field[Any]) -> str:
    fix = field.metadata["fix"]
    near = difflib.get_close_matches(str(value), choices_of(field), n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{origin}: expected {_allowed(field)}, got {_shown(value)}. {hint}{fix}"


def _experts_problem(counts: Any, origins: Mapping[str, str]) -> str:
    values = counts if isinstance(counts, Mapping) else dataclasses.asdict(counts)
    got = ", ".join(
        f"{name}={values[name]}" + (f" ({origins.get(name, 'default')})" if origins else "")
        for name in _EXPERT_COUNTS
    )
    return (
        f"router_config: expected min_experts <= max_experts <= num_experts, got {got}. "
        "Lower the first or raise the last."
    )


def unknown_name(origin: str, name: str, known: Iterable[str], otherwise: str) -> str:
    by_case = {word.lower(): word for word in known}
    near = difflib.get_close_matches(name.lower(), by_case, n=1)
    hint = (
        f"Did you mean {by_case[near[0]]}?"
        if near
        else f"{otherwise} Known: {', '.join(by_case.values())}."
    )
    return f"{origin}: expected a known name, got {name!r}. {hint}"


def _shown(value: Any) -> str:
    """A value as JSON where it is JSON, cut short: an error is no place for a megabyte."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_SECTIONS: dict[str, type[Any]] = {
    "router_config": RouterConfig,
    "performance": PerformanceConfig,
    "security": SecurityConfig,
}
_TOP_LEVEL = tuple(field.name for field in dataclasses.fields(Config))
_NAMES: dict[str, tuple[str, ...]] = {
    section: tuple(field.name for field in dataclasses.fields(kind))
    for section, kind in _SECTIONS.items()
}
# Every setting by its own name: names are unique over the sections, so arguments and variables
# need no section.
SETTINGS: dict[str, tuple[str, dataclasses.Field[Any]]] = {
    field.name: (section, field)
    for section, kind in [*_SECTIONS.items(), ("", Config)]
    for field in dataclasses.fields(kind)
    if field.metadata
}
