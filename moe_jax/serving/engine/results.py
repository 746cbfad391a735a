"""The cached results of one engine: memory, Redis, names of requests, prefetching, hot inputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import time
from collections.abc import Callable

import numpy as np

import moe_jax
from moe_jax.config import Config
from moe_jax.serving import admission, cache
from moe_jax.serving.engine.parts import Parts
from moe_jax.serving.engine.requests import Client, Order

_DIGEST_LENGTH = 32


def answer_settings(config: Config, level: admission.Level) -> str:
    """Returns a text that differs for two engines if their settings alone make answers differ.

    Weights and rule are not in it: the snapshot's version stands for them. Neither are host, port,
    log level, limits, keys or sizes of the cache, so that replicas that differ in them share results.

    Example:
        >>> from moe_jax.serving.admission import LEVELS
        >>> a, b = Config(), dataclasses.replace(Config(), log_level="DEBUG")
        >>> answer_settings(a, LEVELS["standard"]) == answer_settings(b, LEVELS["standard"])
        True
        >>> answer_settings(a, LEVELS["standard"]) == answer_settings(a, LEVELS["strict"])
        False
    """
    checks: dict[str, object] = {}
    if config.security.enable_validation:
        checks = {
            "nonfinite": level.nonfinite,
            "magnitude": level.magnitude,
            "max_magnitude": config.serving.max_magnitude,
        }
    # During a rolling update two releases share one Redis; they may compute differently.
    text = json.dumps({"release": moe_jax.__version__, "checks": checks}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class HotOptions:
    """What beside the hidden states is needed to compute a hot result again."""

    model: str
    token_mask: np.ndarray | None
    logits: bool
    client: Client

    @classmethod
    def of(cls, order: Order) -> HotOptions:
        """Returns the options of an order."""
        return cls(order.model, order.token_mask, order.logits, order.client)


class Results:
    """Keeps results and finds them again; does nothing where caching is off.

    Args:
        parts: configuration, clock, level and log are used.

    Attributes:
        cache: results in memory and in Redis; None where caching is off.
        prefetcher: brings results from Redis to memory ahead of time; None where it is off.
    """

    def __init__(self, parts: Parts) -> None:
        config = parts.config
        serving, performance = config.serving, config.performance
        self.cache: cache.ResultCache | None = None
        self.prefetcher: cache.Prefetcher | None = None
        self._hot: cache.HotInputs[HotOptions] | None = None
        self._settings = answer_settings(config, parts.level)
        self._keyed = parts.level.keyed_cache
        self._secret = secrets.token_bytes(32)
        self._keyer = cache.Keyer(keyed=self._keyed, secret=self._secret)
        if not performance.enable_caching:
            return
        shared = None
        if serving.redis_url:
            shared = cache.SharedCache(
                serving.redis_url,
                ttl_seconds=performance.cache_ttl_seconds,
                clock=parts.clock,
                notify=parts.notify,
                on_back=self._agree_on_secret,
            )
        self.cache = cache.ResultCache(
            max_entries=performance.cache_size,
            max_bytes=serving.cache_max_bytes,
            ttl_seconds=performance.cache_ttl_seconds,
            clock=parts.clock,
            shared=shared,
            on_hit=self._on_hit,
        )
        self._agree_on_secret()
        if not serving.prefetch:
            return
        self._hot = cache.HotInputs()
        if shared is not None:
            self.prefetcher = cache.Prefetcher(self._bring, self._in_memory)

    def _agree_on_secret(self) -> None:
        """Takes over the replicas' common secret, so that all of them give a request the same name.

        Repeated when a lost Redis is back: it was perhaps down at the start, or has lost the secret.
        """
        if self.cache is None or self.cache.shared is None:
            return
        secret = self.cache.shared.secret(self._secret)
        if secret is not None and secret != self._secret:
            self._secret = secret
            self._keyer = cache.Keyer(keyed=self._keyed, secret=secret)

    def refresh(self) -> None:
        """Asks a lost Redis whether it is back."""
        if self.cache is not None and self.cache.shared is not None:
            self.cache.shared.refresh()

    # --- prefetching

    def _on_hit(self, digest: str) -> None:
        if self.prefetcher is not None:
            self.prefetcher.note_hit(digest)

    def _in_memory(self, digest: str) -> bool:
        return self.cache is not None and self.cache.peek(digest) is not None

    def _bring(self, digest: str) -> bool:
        if self.cache is None or self.cache.shared is None:
            return False
        entry = self.cache.shared.get(digest)
        if entry is not None:
            self.cache.put(digest, entry)
        return entry is not None

    # --- requests

    def owner(self, client: Client) -> str:
        """Returns the id of the only client that may read this client's results, or "" for all."""
        return client.id if self._keyed else ""

    def digest(self, order: Order) -> str:
        """Returns the name of an order: 32 hex digits over everything that its answer depends on."""
        # The version is among them, so an entry of other weights has another digest.
        settings = (order.version, self._settings, order.model, order.logits)
        return self._keyer.digest(settings, order.x, order.token_mask, client=order.client.id)

    def fetch(
        self, order: Order, compute: Callable[[], cache.Entry], *, use_cache: bool
    ) -> tuple[cache.Entry, str, str]:
        """Returns the result of an order, from the cache or from ``compute``.

        Args:
            order: what is asked for.
            compute: makes the result.
            use_cache: whether a cached result will do.

        Returns:
            The entry; ``hit``, ``coalesced``, ``miss``, ``bypass``, ``stand_aside`` or ``off``; its
            digest, or "" where the cache was not asked.

        Raises:
            ServingError: ``deadline_exceeded`` while an equal request was computed; or whatever
                ``compute`` raises.
        """
        if self.cache is None:
            return compute(), "off", ""
        if not use_cache:
            self.cache.bypass()
            return compute(), "bypass", ""
        if not self.cache.takes_part():
            return compute(), "stand_aside", ""
        begun = time.perf_counter()
        digest = self.digest(order)
        # The time for the digest counts against the cache: large inputs may cost more to hash than
        # to route.
        hashed = time.perf_counter()
        entry, result = self.cache.fetch(
            digest,
            compute,
            wait_seconds=order.deadline - hashed,
            hashing_seconds=hashed - begun,
        )
        if self._hot is not None and result == "hit":
            self._hot.hit(digest, order.x, HotOptions.of(order))
        if self.prefetcher is not None:
            self.prefetcher.asked(order.client.id, digest)
        return entry, result, digest

    def peek(self, order: Order) -> cache.Entry | None:
        """Returns the result of an order if memory holds one of the same weights; counts nothing."""
        if self.cache is None:
            return None
        entry = self.cache.peek(self.digest(order))
        if entry is None or entry.version != order.version:
            return None
        return entry if entry.owner in ("", order.client.id) else None

    def find(self, digest: str, *, version: str, output: str, client: Client) -> cache.Entry | None:
        """Returns the result with this digest if it is of these weights, has this output and may be
        read by this client; counts a hit or a miss."""
        if self.cache is None or len(digest) != _DIGEST_LENGTH:
            return None
        entry = self.cache.find(digest)
        if (
            entry is None
            or entry.version != version
            or entry.owner not in ("", client.id)
            or output not in entry.arrays
        ):
            return None
        return entry

    # --- reloads

    def put(self, order: Order, entry: cache.Entry) -> None:
        """Keeps a result that was computed ahead of a request."""
        if self.cache is not None and entry.cacheable:
            self.cache.put(self.digest(order), entry)

    def clear(self) -> None:
        """Drops every result in memory, as after a reload."""
        if self.cache is not None:
            self.cache.clear()

    def hottest(self) -> list[tuple[np.ndarray, HotOptions]]:
        """Returns the inputs f32[B, S, D] that are asked for most with their options, hottest first."""
        return [] if self._hot is None else self._hot.hottest()

    def close(self) -> None:
        """Ends prefetching and the connection to Redis."""
        if self.prefetcher is not None:
            self.prefetcher.close()
        if self.cache is not None and self.cache.shared is not None:
            self.cache.shared.close()
