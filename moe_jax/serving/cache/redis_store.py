"""The second level of the cache: results in Redis, for replicas and restarts.

If Redis is lost, requests lose cache hits and nothing else.
"""

from __future__ import annotations

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
        clock: monotonic clock in seconds, for the pauses between attempts at a lost Redis.
        notify: called as ``notify(event, **facts)`` when Redis is lost and when it is back.
        on_back: called when a lost Redis answers again; it may have lost what it held.

    Attributes:
        ok: whether Redis answered the last time it was asked.
    """

    def __init__(
        self,
        url: str,
        *,
        ttl_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        notify: Callable[..., None] = lambda event, **facts: None,
        on_back: Callable[[], None] = lambda: None,
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
        self._on_back = on_back
        self._lost_until = 0.0
        self.ok = True

    def secret(self, proposal: bytes) -> bytes | None:
        """Returns the 32 bytes that all replicas share, so that their digests agree.

        The first proposal wins. None if Redis is lost.
        """

        def exchange() -> object:
            self._redis.set("moe:secret", proposal, nx=True)
            return self._redis.get("moe:secret")

        secret = self._guarded(exchange)
        return secret if isinstance(secret, bytes) and len(secret) == 32 else None

    def refresh(self) -> None:
        """Asks a lost Redis whether it is back, at most every two seconds.

        Without requests nothing else would notice, and health would report it as lost for ever.
        """
        if not self.ok:
            self._guarded(self._redis.ping)

    def get(self, digest: str) -> Entry | None:
        """Returns the entry, or None if it is absent or damaged, or Redis is lost."""
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
        """Closes the connections."""
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
            self._on_back()
        return value
