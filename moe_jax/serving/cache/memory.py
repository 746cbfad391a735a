"""Results by digest, bounded in number, bytes and time; equal requests at one time compute once."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import Any

from cachetools import TTLCache

from moe_jax.serving.cache.entry import Entry
from moe_jax.serving.cache.gain import Gain
from moe_jax.serving.cache.redis_store import SharedCache
from moe_jax.serving.errors import ServingError

_REMEMBERED = 4096  # dropped digests, remembered for the reasons of misses
_WINDOW = 1000  # lookups of the recent hit ratio


class _Flight:
    """A computation that others wait for."""

    __slots__ = ("done", "entry")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.entry: Entry | None = None


class _Evicting(TTLCache):
    """Calls ``dropped`` with each key that it evicts."""

    def __init__(self, *args: Any, dropped: Callable[[str], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dropped = dropped

    def popitem(self) -> Any:
        key, value = super().popitem()
        self._dropped(key)
        return key, value


class ResultCache:
    """An LRU cache with time to live, bounded in bytes, with a single flight for each digest.

    Args:
        max_entries: most results.
        max_bytes: most bytes of results.
        ttl_seconds: how long a result may be served.
        clock: monotonic clock in seconds.
        shared: the second level, or None.
        on_hit: called as ``on_hit(digest)`` for each hit in memory.

    Attributes:
        shared: the second level, or None.
        gain: time saved and spent.
        results: number of lookups by result.
        reasons: number of misses by reason.

    Example:
        >>> cache = ResultCache(max_entries=2, max_bytes=10_000, ttl_seconds=60.0)
        >>> entry = Entry(arrays={}, about={}, seconds=1.0, version="v")
        >>> cache.fetch("a", lambda: entry, wait_seconds=1.0)[1]
        'miss'
        >>> cache.fetch("a", lambda: entry, wait_seconds=1.0)[1]
        'hit'
    """

    def __init__(
        self,
        *,
        max_entries: int,
        max_bytes: int,
        ttl_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        shared: SharedCache | None = None,
        on_hit: Callable[[str], None] = lambda digest: None,
    ) -> None:
        self._lock = threading.Lock()
        self._gone: collections.OrderedDict[str, str] = collections.OrderedDict()
        self._entries: Any = _Evicting(
            max_bytes,
            ttl_seconds,
            timer=clock,
            getsizeof=lambda entry: entry.nbytes,
            dropped=lambda key: self._note(key, "evicted"),
        )
        self._max_entries = max_entries
        self._flights: dict[str, _Flight] = {}
        self._recent: collections.deque[bool] = collections.deque(maxlen=_WINDOW)
        self.shared = shared
        self.gain = Gain()
        self._on_hit = on_hit
        self.results: collections.Counter[str] = collections.Counter()
        self.reasons: collections.Counter[str] = collections.Counter()

    # --- requests

    def takes_part(self) -> bool:
        """Returns whether the next request should be looked up; counts it if not."""
        with self._lock:
            if self.gain.takes_part():
                return True
            self.results["stand_aside"] += 1
            return False

    def bypass(self) -> None:
        """Counts a request that asked not to use the cache."""
        with self._lock:
            self.results["bypass"] += 1

    def fetch(
        self,
        digest: str,
        compute: Callable[[], Entry],
        *,
        wait_seconds: float,
        hashing_seconds: float = 0.0,
    ) -> tuple[Entry, str]:
        """Returns the entry, from memory, Redis, a computation under way, or ``compute``.

        Args:
            digest: digest of the request.
            compute: computes the entry; if it raises, nothing is kept.
            wait_seconds: how long to wait for a computation of an equal request.
            hashing_seconds: how long computing the digest took, for the gain.

        Returns:
            The entry and ``hit``, ``coalesced`` or ``miss``.

        Raises:
            ServingError: ``deadline_exceeded`` while waiting for an equal request.
        """
        start = time.perf_counter()
        others = flight = None
        with self._lock:
            entry = self._look(digest)
            if entry is not None:
                self._count("hit", saved=entry.seconds, since=start, hashing=hashing_seconds)
            # Equal requests at the same time are computed once: the first leads, the others wait.
            elif (others := self._flights.get(digest)) is None:
                flight = self._flights[digest] = _Flight()
        if entry is not None:
            self._on_hit(digest)
            return entry, "hit"
        if flight is None:
            assert others is not None
            return self._join(others, compute, wait_seconds)
        try:
            return self._lead(flight, digest, compute, start, hashing_seconds)
        finally:
            # Also after an error, or those who wait would wait until their deadline.
            with self._lock:
                self._flights.pop(digest, None)
            flight.done.set()

    def _lead(
        self,
        flight: _Flight,
        digest: str,
        compute: Callable[[], Entry],
        start: float,
        hashing: float,
    ) -> tuple[Entry, str]:
        # Only the leader asks Redis, and without the lock: a slow Redis must not stop hits in memory.
        if self.shared is not None:
            entry = self.shared.get(digest)
            if entry is not None:
                flight.entry = entry
                with self._lock:
                    self._keep(digest, entry)
                    self._count("hit", saved=entry.seconds, since=start, hashing=hashing)
                return entry, "hit"
        asked = time.perf_counter() - start
        entry = compute()
        # Set before the bookkeeping, and even if the entry is not cacheable: whoever waits asked for
        # the same bytes and gets the same answer.
        flight.entry = entry
        begun = time.perf_counter()
        with self._lock:
            self.reasons[self._gone.pop(digest, "cold")] += 1
            if entry.cacheable:
                self._keep(digest, entry)
            kept = time.perf_counter() - begun
            self._count("miss", saved=0.0, since=None, hashing=hashing + asked + kept)
        if entry.cacheable and self.shared is not None:
            self.shared.put(digest, entry)
        return entry, "miss"

    def _join(
        self, flight: _Flight, compute: Callable[[], Entry], wait_seconds: float
    ) -> tuple[Entry, str]:
        if not flight.done.wait(wait_seconds):
            raise ServingError(
                "deadline_exceeded",
                f"expected an answer within {wait_seconds:g} s, got none: an equal request is still "
                "at work. Allow more time.",
            )
        if flight.entry is not None:
            with self._lock:
                self.results["coalesced"] += 1
                self._recent.append(True)
            return flight.entry, "coalesced"
        return compute(), "miss"  # the other computation failed; this one may succeed

    def peek(self, digest: str) -> Entry | None:
        """Returns the entry if it is in memory, or None; counts nothing."""
        with self._lock:
            return self._entries.get(digest)

    def find(self, digest: str) -> Entry | None:
        """Returns the entry for a client that sent only the digest; counts a hit or a miss."""
        start = time.perf_counter()
        with self._lock:
            entry = self._look(digest)
            if entry is not None:
                self._count("hit", saved=entry.seconds, since=start, hashing=0.0)
        if entry is None and self.shared is not None:
            entry = self.shared.get(digest)
            if entry is not None:
                with self._lock:
                    self._keep(digest, entry)
                    self._count("hit", saved=entry.seconds, since=start, hashing=0.0)
        if entry is None:
            with self._lock:
                self.reasons["digest_unknown"] += 1
                self._count("miss", saved=0.0, since=start, hashing=0.0)
        return entry

    # --- upkeep

    def put(self, digest: str, entry: Entry) -> None:
        """Keeps an entry that was computed or fetched ahead of a request."""
        with self._lock:
            self._keep(digest, entry)

    def clear(self) -> None:
        """Drops everything, as after a reload."""
        with self._lock:
            for digest in list(self._entries):
                self._note(digest, "reloaded")
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return int(self._entries.currsize)

    def report(self) -> dict[str, Any]:
        """Returns hit ratios, reasons of misses, and the gain."""
        with self._lock:
            self._drop_expired()
            results, reasons = dict(self.results), dict(self.reasons)
            recent = list(self._recent)
            hits = results.get("hit", 0) + results.get("coalesced", 0)
            looked = hits + results.get("miss", 0)
            return {
                "entries": len(self._entries),
                "bytes": self.nbytes,
                "hit_ratio": hits / looked if looked else 0.0,
                "hit_ratio_recent": sum(recent) / len(recent) if recent else 0.0,
                "results": results,
                "miss_reasons": reasons,
                "seconds_saved": self.gain.saved,
                "seconds_spent": self.gain.spent,
                "standing_aside": self.gain.aside,
                "redis": None if self.shared is None else self.shared.ok,
            }

    # --- under the lock

    def _look(self, digest: str) -> Entry | None:
        self._drop_expired()
        return self._entries.get(digest)

    def _drop_expired(self) -> None:
        for key, _ in self._entries.expire():
            self._note(key, "expired")

    def _keep(self, digest: str, entry: Entry) -> None:
        # Such an entry would evict all others and then itself.
        if entry.nbytes > self._entries.maxsize:
            self.reasons["too_large_to_keep"] += 1
            return
        self._entries[digest] = entry
        # The dictionary bounds bytes by itself. Many tiny entries need a bound on their number too.
        while len(self._entries) > self._max_entries:
            self._entries.popitem()

    def _note(self, digest: str, reason: str) -> None:
        # Remembers why an entry left, so that a later miss can say so; bounded, the oldest go first.
        self._gone[digest] = reason
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)

    def _count(self, result: str, *, saved: float, since: float | None, hashing: float) -> None:
        spent = hashing + (0.0 if since is None else time.perf_counter() - since)
        self.results[result] += 1
        self._recent.append(result == "hit")
        self.gain.lookup(saved=saved, spent=spent)
