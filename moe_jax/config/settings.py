"""The settings: sections, and how a tree of them is built from flat values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from moe_jax.config.kinds import (
    BUCKETS,
    EXPERT_COUNTS,
    HOST,
    KEY,
    KEYS,
    LINE,
    NETWORKS,
    REDIS_URL,
    ConfigError,
    check_fields,
    checked,
    experts_problem,
    setting,
    shown,
    split_words,
    unknown_name,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """Settings of the router.

    Args:
        input_dim: D, width of the hidden states.
        num_experts: E.
        min_experts: fewest experts a token uses.
        max_experts: most experts a token uses, at most ``num_experts``.
        complexity_estimator: how a token's difficulty is computed; the guide's word or any
            registered estimator.
        routing_strategy: ``top_k`` (difficulty decides how many) or ``threshold`` (each expert
            has its own calibrated threshold).
        load_balancing: whether ``update`` evens out the experts' load while training.
        noise_factor: standard deviation of the noise on router logits. Acts in training only,
            where a PRNG key is given.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    input_dim: int = setting(768, "Give the width of the hidden states.", low=1, high=2**20)
    num_experts: int = setting(8, "Give the number of experts.", low=1, high=2**16)
    min_experts: int = setting(1, "A token uses at least this many experts.", low=1, high=2**16)
    max_experts: int = setting(4, "A token uses at most this many experts.", low=1, high=2**16)
    complexity_estimator: str = setting(
        "gradient_norm",
        "Choose one of these, or register your own with moe_jax.routing.difficulty.register_estimator.",
    )
    routing_strategy: str = setting("top_k", "Choose one of these.", choices=("top_k", "threshold"))
    load_balancing: bool = setting(True, "Switch balancing on or off.")
    noise_factor: float = setting(0.1, "0.1 to 0.2 is usual, 0 is no noise.", low=0, high=1)

    def __post_init__(self) -> None:
        check_fields(self, "router_config.")
        if not self.min_experts <= self.max_experts <= self.num_experts:
            raise ConfigError(experts_problem(self, {}))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PerformanceConfig:
    """Settings of time and memory.

    Args:
        enable_caching: whether results are cached.
        enable_monitoring: whether metrics are kept.
        cache_size: most results in the cache.
        cache_ttl_seconds: how long a result may be served from the cache.
        parallel_threshold: batches of more rows than this are split.
    """

    enable_caching: bool = setting(True, "Switch the result cache on or off.")
    enable_monitoring: bool = setting(True, "Switch metrics on or off.")
    cache_size: int = setting(
        10_000, "To have no cache set enable_caching to false.", low=1, high=2**31
    )
    cache_ttl_seconds: float = setting(
        3600.0, "To have no cache set enable_caching to false.", low=0.001, high=10 * 365 * 86400.0
    )
    parallel_threshold: int = setting(
        1000, "Raise it to split only larger batches.", low=1, high=2**40
    )

    def __post_init__(self) -> None:
        check_fields(self, "performance.")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SecurityConfig:
    """Limits of a request.

    Args:
        enable_validation: whether the values of a request are checked. (Its shape, dtype and size
            always are.)
        max_tensor_size: most elements of one request's tensor.
        max_batch_size: most sequences in one request.
        security_level: ``minimal``, ``standard`` or ``strict``.
    """

    enable_validation: bool = setting(True, "Switch the checks of values on or off.")
    max_tensor_size: int = setting(1_000_000_000, "Count elements, not bytes.", low=1, high=2**48)
    max_batch_size: int = setting(1024, "Count sequences, not tokens.", low=1, high=2**31)
    security_level: str = setting(
        "standard", "Choose one of these.", choices=("minimal", "standard", "strict")
    )

    def __post_init__(self) -> None:
        check_fields(self, "security.")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServingConfig:
    """Settings of the service.

    The last three settings are secrets: they come from the environment or from arguments, never
    from a file.

    Args:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        request_timeout_seconds: deadline of a request that states none.
        max_inflight: requests on the device at once.
        max_queue: requests that may wait for it; more are refused.
        drain_seconds: how long readiness says no before the server stops.
        nonfinite: what NaN and inf in a request do; ``level`` is what the security level says.
        max_magnitude: largest absolute value that is not suspicious.
        rate_limit_requests: requests a client may make in a minute; 0 is what the level says.
        rate_limit_tokens: tokens a client may send in a minute; 0 is what the level says.
        replicas: number of replicas; used to warn when rate limits are not shared.
        cache_max_bytes: most bytes of results in the cache.
        prefetch: whether results are fetched ahead and hot keys re-warmed after a reload.
        trusted_proxies: networks whose X-Forwarded-For is believed, e.g. ``10.0.0.0/8,::1``.
        checkpoint: folder of the weights; empty serves seeded, untrained ones.
        checkpoint_router: a router of the checkpoint to serve alone, e.g. ``layer_0``, or a rule of it
            to serve in all layers, e.g. ``min_p-20``; empty is the checkpoint's default router, and
            beside it all layers of its rule.
        reload_folder: folder below which ``POST /admin/reload`` may name a checkpoint; empty is the
            folder of releases that ``checkpoint`` lies in, else its parent.
        seed: of untrained weights.
        serve_moe: whether the model ``moe`` is served; ``auto`` is whenever there are experts: those
            of the checkpoint, or seeded ones without a checkpoint.
        expert_hidden_dim: F of untrained experts; 0 is twice ``input_dim``.
        buckets: token counts that are compiled at start, e.g. ``64,512``; empty is powers of two.
        fallback_static_top_k: whether a failing device is covered by a plain top-k, flagged.
        slow_call_seconds: device work that takes longer counts as slow for the circuit breaker.
        api_keys: secret; keys of clients, separated by commas.
        admin_key: secret; the bearer token of admin requests and, under strict, of metrics.
        redis_url: secret, as it may hold a password; shares limits and cached results.
    """

    host: str = setting(
        "127.0.0.1",
        "Give an address without brackets, such as 192.0.2.7 or ::1; 0.0.0.0 is all of them.",
        text=HOST,
    )
    port: int = setting(8000, "Give a port; 0 takes a free one.", low=0, high=65535)
    request_timeout_seconds: float = setting(
        30.0, "Give the deadline in seconds.", low=0.001, high=3600.0
    )
    max_inflight: int = setting(4, "Requests on the device at once.", low=1, high=1024)
    max_queue: int = setting(128, "Requests that may wait.", low=0, high=2**20)
    drain_seconds: float = setting(5.0, "Seconds between not ready and stop.", low=0, high=3600)
    nonfinite: str = setting(
        "level", "Choose one of these.", choices=("level", "off", "sanitize", "mask", "reject")
    )
    max_magnitude: float = setting(1e6, "Hidden states are rarely above 1e4.", low=1e-6, high=3e38)
    rate_limit_requests: int = setting(
        0, "Requests a minute; 0 is what the security level says.", low=0, high=2**31
    )
    rate_limit_tokens: int = setting(
        0, "Tokens a minute; 0 is what the security level says.", low=0, high=2**48
    )
    replicas: int = setting(1, "How many instances run.", low=1, high=100_000)
    cache_max_bytes: int = setting(
        256 * 2**20, "To have no cache set enable_caching to false.", low=1, high=2**48
    )
    prefetch: bool = setting(False, "Switch prefetching on or off.")
    trusted_proxies: str = setting(
        "", "Give 10.0.0.0/8 or 192.0.2.7,::1, or leave it empty.", text=NETWORKS
    )
    checkpoint: str = setting("", "Give a checkpoint folder, or leave it empty.", text=LINE)
    checkpoint_router: str = setting("", "See moe-jax inspect for the names.", text=LINE)
    reload_folder: str = setting("", "Give a folder, or leave it empty.", text=LINE)
    seed: int = setting(0, "Any whole number.", low=0, high=2**31 - 1)
    serve_moe: str = setting("auto", "Choose one of these.", choices=("auto", "on", "off"))
    expert_hidden_dim: int = setting(
        0, "Width of untrained experts; 0 is twice input_dim.", low=0, high=2**20
    )
    buckets: str = setting(
        "", "Give token counts such as 64,512,1024, or leave it empty.", text=BUCKETS
    )
    fallback_static_top_k: bool = setting(False, "Switch the degraded fallback on or off.")
    slow_call_seconds: float = setting(5.0, "Seconds of device work.", low=0.001, high=3600)
    api_keys: str = setting(
        "", "Leave it empty for a service without keys.", text=KEYS, secret=True
    )
    admin_key: str = setting(
        "", "Give a long random text, or leave it empty.", text=KEY, secret=True
    )
    redis_url: str = setting(
        "", "Give one of these, or leave it empty.", text=REDIS_URL, secret=True
    )

    def __post_init__(self) -> None:
        check_fields(self, "serving.")

    @property
    def bucket_sizes(self) -> tuple[int, ...]:
        """``buckets`` as ascending numbers of tokens; () where none are given."""
        return tuple(sorted({int(word) for word in split_words(self.buckets)}))

    @property
    def proxy_list(self) -> tuple[str, ...]:
        """``trusted_proxies`` one by one."""
        return tuple(split_words(self.trusted_proxies))

    @property
    def api_key_list(self) -> tuple[str, ...]:
        """``api_keys`` one by one."""
        return tuple(split_words(self.api_keys))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole configuration: hashable, equal by value, and JSON by ``to_json``.

    Args:
        router_config: settings of the router.
        performance: settings of time and memory.
        security: limits of a request.
        serving: settings of the service.
        environment: where this runs: in every log line, and untrained weights are logged as an error
            in production, as a warning elsewhere.
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
    serving: ServingConfig = dataclasses.field(default_factory=ServingConfig)
    environment: str = setting(
        "development", "Choose one of these.", choices=("development", "staging", "production")
    )
    log_level: str = setting(
        "INFO",
        "Choose one of these.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )

    def __post_init__(self) -> None:
        for name, section in _SECTIONS.items():
            if not isinstance(getattr(self, name), section):
                raise ConfigError(
                    f"{name}: expected a {section.__name__}, got {getattr(self, name)!r}. "
                    f"Build one, or use Config.from_json."
                )
        check_fields(self, "")

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values, in the words of the guide's production.json.

        Without its secrets.
        """
        return {
            name: {k: v for k, v in section.items() if k not in SECRETS}
            if isinstance(section, dict)
            else section
            for name, section in dataclasses.asdict(self).items()
        }

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
            f"got {shown(data)}. See configs/production.json."
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
                f"got {shown(value)}. See configs/production.json."
            )
        else:
            for name, item in value.items():
                origin = f"{key}.{name}{where}"
                if name in SECRETS:
                    problems.append(
                        f"{origin}: expected no secret in a file, got one. Set "
                        f"MOE_{name.upper()} in the environment instead."
                    )
                elif name in _NAMES[key]:
                    given[name] = (item, origin)
                else:
                    problems.append(unknown_name(origin, name, _NAMES[key], "Remove it."))
    return given


def build_config(
    given: Mapping[str, tuple[Any, str]], problems: list[str], *, complete: bool = True
) -> Config:
    """Checks every value under the name that its author gave it, then builds the tree.

    Args:
        given: settings by name, each a value and its origin.
        problems: what is wrong already, one sentence each.
        complete: whether ``given`` holds all that was meant; without, a missing value is not
            compared with others.

    Raises:
        ConfigError: every problem, one per line.
    """
    values: dict[str, Any] = {}
    for name, (value, origin) in given.items():
        try:
            values[name] = checked(SETTINGS[name][1], value, origin)
        except ConfigError as error:
            problems.append(str(error))
    # Values that are bad by themselves contradict nothing; the others are still compared.
    if complete and all(name in values or name not in given for name in EXPERT_COUNTS):
        counts = {name: values.get(name, SETTINGS[name][1].default) for name in EXPERT_COUNTS}
        low, high, most = counts.values()
        if not low <= high <= most:
            problems.append(experts_problem(counts, {n: o for n, (_, o) in given.items()}))
    if problems:
        raise ConfigError("\n".join(problems))
    parts: dict[str, Any] = {name: value for name, value in values.items() if name in _TOP_LEVEL}
    for section, kind in _SECTIONS.items():
        parts[section] = kind(**{n: v for n, v in values.items() if n in _NAMES[section]})
    return Config(**parts)


_SECTIONS: dict[str, type[Any]] = {
    "router_config": RouterConfig,
    "performance": PerformanceConfig,
    "security": SecurityConfig,
    "serving": ServingConfig,
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
SECRETS = frozenset(name for name, (_, field) in SETTINGS.items() if field.metadata["secret"])
