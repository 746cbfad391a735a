"""The second level: results in Redis, for replicas and restarts. Losing it costs hits, nothing else."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from moe_jax.serving.cache.entry import Entry, from_bytes, to_bytes

_TIMEOUT = 0.25
_RETRY_AFTER = 2.0
_MAX_BYTES = 16 * 2**20
_PREFIX = "moe:result:"


class SharedCache:
    """Entries in Redis under their digests.

    Args:
        url: ``redis://host:port/db``.
        ttl_seconds: how long an entry is kept.
        clock: of the pauses between attempts at a lost Redis.
        notify: called as ``notify(event, **facts)`` when Redis is lost and when it is back.
    """

    def __init__(
        self,
        url: str,
        *,
        ttl_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        notify: Callable[..., None] = lambda event, **facts: None,
    ) -> None:
        self._redis = redis.Redis.from_url(
            url,
            socket_timeout=_TIMEOUT,
            socket_connect_timeout=_TIMEOUT,
            # The client's own retries take seconds; a request does better without the cache.
            retry=Retry(NoBackoff(), 0),
        )
        self._ttl = max(int(ttl_seconds * 1000), 1)
        self._clock = clock
        self._notify = notify
        self._lost_until = 0.0
        self.ok = True

    def secret(self) -> bytes | None:
        """32 bytes that all replicas share, so that their digests agree; None where Redis is lost."""
        own = secrets.token_bytes(32)
        found = self._guarded(
            lambda: (self._redis.set("moe:secret", own, nx=True), self._redis.get("moe:secret"))[1]
        )
        return found if isinstance(found, bytes) and len(found) == 32 else None

    def get(self, digest: str) -> Entry | None:
        """The entry, or None: absent, damaged, or Redis is lost."""
        data = self._guarded(lambda: self._redis.get(_PREFIX + digest))
        if not isinstance(data, bytes):
            return None
        try:
            return from_bytes(data)
        except ValueError:
            self._notify("redis_entry_damaged", digest=digest)
            return None

    def put(self, digest: str, entry: Entry) -> None:
        """Keeps an entry, unless it is very large."""
        if entry.nbytes <= _MAX_BYTES:
            data = to_bytes(entry)
            self._guarded(lambda: self._redis.set(_PREFIX + digest, data, px=self._ttl))

    def close(self) -> None:
        self._redis.close()

    def _guarded(self, call: Callable[[], object]) -> object:
        if self._clock() < self._lost_until:
            return None
        try:
            value = call()
        except (redis.RedisError, OSError) as error:
            self._lost_until = self._clock() + _RETRY_AFTER
            if self.ok:
                self.ok = False
                self._notify("redis_lost", used_for="cache", error=type(error).__name__)
            return None
        if not self.ok:
            self.ok = True
            self._notify("redis_back", used_for="cache")
        return value
