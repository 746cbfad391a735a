"""Rate limits: requests and tokens of a client per minute, in memory or shared over Redis.

The sliding window counter of the package ``limits`` counts. In memory a lock guards it: without the
lock, two requests that race for the last place could both be refused. If Redis is lost, the limiter
logs it once, counts in memory, and tries Redis again every few seconds.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import Any

import redis
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from redis.backoff import NoBackoff
from redis.retry import Retry

from moe_jax.serving.errors import ServingError

MAX_CLIENTS = 100_000
_REDIS_TIMEOUT = 0.25
_RETRY_REDIS_AFTER = 2.0


class RateLimiter:
    """Admits a bounded number of requests and tokens per minute from each client.

    Args:
        requests_per_minute, tokens_per_minute: the limits; None is no limit.
        redis_url: shares the counts between replicas; "" keeps them in this process.
        max_clients: most clients remembered in memory; the client unseen for longest is forgotten
            first.
        clock: monotonic clock in seconds, for the pauses between attempts at a lost Redis.
        notify: called as ``notify(event, **facts)`` when Redis is lost and when it is back.

    Example:
        >>> limiter = RateLimiter(requests_per_minute=2, tokens_per_minute=None)
        >>> for _ in range(2):
        ...     limiter.take("a")
        >>> try:
        ...     limiter.take("a")
        ... except ServingError as error:
        ...     print(error.code, error.retry_after > 0)
        rate_limited True
    """

    def __init__(
        self,
        *,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        redis_url: str = "",
        max_clients: int = MAX_CLIENTS,
        clock: Callable[[], float] = time.monotonic,
        notify: Callable[..., None] = lambda event, **facts: None,
    ) -> None:
        self._items = {
            kind: RateLimitItemPerMinute(amount, namespace=f"moe-{kind}")
            for kind, amount in (("requests", requests_per_minute), ("tokens", tokens_per_minute))
            if amount is not None
        }
        self._lock = threading.Lock()
        self._clock = clock
        self._notify = notify
        self._max_clients = max_clients
        self._seen: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._memory = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._shared: SlidingWindowCounterRateLimiter | None = None
        self._lost_until = 0.0
        self.redis_ok: bool | None = None
        if redis_url and self._items:
            pool = redis.ConnectionPool.from_url(
                redis_url,
                socket_timeout=_REDIS_TIMEOUT,
                socket_connect_timeout=_REDIS_TIMEOUT,
                # The client's own retries take seconds; a request is better counted in memory.
                retry=Retry(NoBackoff(), 0),
            )
            storage = RedisStorage(redis_url, connection_pool=pool, key_prefix="moe")
            self._shared = SlidingWindowCounterRateLimiter(storage)
            self.redis_ok = True

    @property
    def clients(self) -> int:
        """Number of clients remembered in memory."""
        return len(self._seen)

    def take(self, client: str, *, requests: int = 1, tokens: int = 0) -> None:
        """Counts a request's cost.

        Raises:
            ServingError: ``rate_limited`` with the seconds until the window moves on; ``too_large``
                if the cost is above the limit of a whole minute, so that waiting would not help.
                Such a cost is not counted.
        """
        costs = [
            (kind, self._items[kind], cost)
            for kind, cost in (("requests", requests), ("tokens", tokens))
            if cost and kind in self._items
        ]
        for kind, item, cost in costs:
            if cost > item.amount:
                raise ServingError(
                    "too_large",
                    f"expected at most {item.amount} {kind}, the limit of one client in a minute, "
                    f"got {cost} in one request. Send smaller requests.",
                )
        for kind, item, cost in costs:
            if not self._hit(item, client, cost):
                raise ServingError(
                    "rate_limited",
                    f"expected at most {item.amount} {kind} a minute from one client, got more. "
                    "Wait as Retry-After says, or ask the operator for a higher limit.",
                    retry_after=self._wait(item, client, cost),
                )

    def refresh(self) -> None:
        """Asks a lost Redis whether it is back, at most every two seconds.

        Without requests nothing else would notice, and health would report it as lost for ever.
        """
        if self._shared is None or self.redis_ok or self._clock() < self._lost_until:
            return
        if self._shared.storage.check():
            self.redis_ok = True
            self._notify("redis_back", used_for="limits")
        else:
            self._lost_until = self._clock() + _RETRY_REDIS_AFTER

    def _hit(self, item: Any, client: str, cost: int) -> bool:
        shared = self._shared
        if shared is not None and self._clock() >= self._lost_until:
            try:
                admitted = shared.hit(item, client, cost=cost)
            except Exception as error:  # whatever a lost or sick Redis raises
                self._lost_until = self._clock() + _RETRY_REDIS_AFTER
                if self.redis_ok:
                    self.redis_ok = False
                    self._notify("redis_lost", used_for="limits", error=type(error).__name__)
            else:
                if not self.redis_ok:
                    self.redis_ok = True
                    self._notify("redis_back", used_for="limits")
                return admitted
        with self._lock:
            self._remember(client)
            return self._memory.hit(item, client, cost=cost)

    def _remember(self, client: str) -> None:
        self._seen[client] = None
        self._seen.move_to_end(client)
        if len(self._seen) > self._max_clients:
            oldest, _ = self._seen.popitem(last=False)
            for item in self._items.values():
                self._memory.clear(item, oldest)

    def _wait(self, item: Any, client: str, cost: int) -> float:
        """Returns the seconds until enough of the window has passed."""
        limiter = self._memory
        if self._shared is not None and self.redis_ok:
            limiter = self._shared
        try:
            previous, left, current, _ = limiter.storage.get_sliding_window(  # type: ignore[union-attr]
                item.key_for(client), item.get_expiry()
            )
        except Exception:  # Redis went between the two calls
            return 1.0
        window = float(item.get_expiry())
        room = item.amount - cost - current
        if previous and room >= 0:
            return max(1.0, min(window, left - room * window / previous))
        # The current window must become the previous one and fade.
        turn = window - time.time() % window
        fade = window * (1.0 - max(0, item.amount - cost) / max(current, 1))
        return max(1.0, min(2 * window, turn + max(fade, 0.0)))
