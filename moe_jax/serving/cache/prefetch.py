"""Prefetching: the result that followed this request last time is brought from Redis to memory.

No result is computed before its input is known. A fetch counts as useful if one of the next requests
hits it, else as wasted. If under one half is useful, prefetching switches itself off.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")

_OUTSTANDING = 64
_DECIDE_AFTER = 50
_BACKLOG = 64


class Successors:
    """A bounded table of which digest followed which, for each client.

    Args:
        max_clients, max_digests: bounds; the least recently used is forgotten first.

    Example:
        >>> table = Successors()
        >>> [table.next_after("client", digest) for digest in "abcab"]
        [None, None, None, 'b', 'c']
    """

    def __init__(self, *, max_clients: int = 1024, max_digests: int = 8192) -> None:
        self._last: collections.OrderedDict[str, str] = collections.OrderedDict()
        self._next: collections.OrderedDict[tuple[str, str], str] = collections.OrderedDict()
        self._max = max_clients, max_digests
        self._lock = threading.Lock()

    def next_after(self, client: str, digest: str) -> str | None:
        """Notes a client's request for ``digest``; returns the digest that followed it last time."""
        with self._lock:
            before = self._last.pop(client, None)
            self._last[client] = digest
            if before is not None:
                self._next.pop((client, before), None)
                self._next[client, before] = digest
            if len(self._last) > self._max[0]:
                self._last.popitem(last=False)
            if len(self._next) > self._max[1]:
                self._next.popitem(last=False)
            return self._next.get((client, digest))

    def __len__(self) -> int:
        return len(self._next)


class Prefetcher:
    """Runs fetches on a thread and counts what becomes of them.

    Args:
        fetch: ``digest -> bool``: brings an entry to memory; False if it is nowhere.
        present: ``digest -> bool``: whether the entry is in memory.

    Attributes:
        counts: number of fetches by outcome: useful, wasted, failed.
        off: whether it has switched itself off.
    """

    def __init__(self, fetch: Callable[[str], bool], present: Callable[[str], bool]) -> None:
        self._fetch = fetch
        self._present = present
        self._successors = Successors()
        self._lock = threading.Lock()
        self._outstanding: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._todo: queue.Queue[str | None] = queue.Queue(maxsize=_BACKLOG)
        self.counts: collections.Counter[str] = collections.Counter()
        self.off = False
        self._thread = threading.Thread(target=self._work, name="moe-prefetch", daemon=True)
        self._thread.start()

    def asked(self, client: str, digest: str) -> None:
        """Notes a client's request, and fetches the result that usually follows it."""
        if self.off:
            return
        following = self._successors.next_after(client, digest)
        if following is not None and not self._present(following):
            with contextlib.suppress(queue.Full):  # a prefetch that is late is of no use
                self._todo.put_nowait(following)

    def note_hit(self, digest: str) -> None:
        """Notes that a request hit this digest in memory."""
        with self._lock:
            if digest in self._outstanding:
                del self._outstanding[digest]
                self.counts["useful"] += 1

    def _work(self) -> None:
        while (digest := self._todo.get()) is not None:
            try:
                if not self.off and not self._present(digest):
                    self._account(digest, self._fetch(digest))
            finally:
                self._todo.task_done()

    def _account(self, digest: str, brought: bool) -> None:
        with self._lock:
            if not brought:
                self.counts["failed"] += 1
                return
            self._outstanding[digest] = None
            if len(self._outstanding) > _OUTSTANDING:
                self._outstanding.popitem(last=False)
                self.counts["wasted"] += 1
            self._decide()

    def settle(self) -> None:
        """Waits until all fetches so far are done."""
        self._todo.join()

    def _decide(self) -> None:
        useful, total = self.counts["useful"], sum(self.counts.values())
        if total >= _DECIDE_AFTER and useful < 0.5 * total:
            self.off = True

    def close(self) -> None:
        """Ends the thread after the fetch under way."""
        self.off = True
        try:
            self._todo.put_nowait(None)
        except queue.Full:
            self._todo.get_nowait()
            self._todo.put_nowait(None)


class HotInputs(Generic[T]):
    """Keeps the inputs of the most requested results, to compute them anew after a reload.

    Args:
        max_inputs, max_bytes: most that is kept.
    """

    def __init__(self, *, max_inputs: int = 16, max_bytes: int = 64 * 2**20) -> None:
        self._max = max_inputs, max_bytes
        self._lock = threading.Lock()
        self._hits: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._kept: dict[str, tuple[np.ndarray, T]] = {}

    def hit(self, digest: str, x: np.ndarray, options: T) -> None:
        """Counts a hit. From the second hit on, keeps the input if it is among the most requested."""
        with self._lock:
            hits = self._hits.pop(digest, 0) + 1
            self._hits[digest] = hits
            if len(self._hits) > 16 * self._max[0]:
                gone, _ = self._hits.popitem(last=False)
                self._kept.pop(gone, None)
            if hits < 2 or digest in self._kept or x.nbytes > self._max[1] // 4:
                return
            if len(self._kept) >= self._max[0]:
                coldest = min(self._kept, key=lambda d: self._hits.get(d, 0))
                if self._hits.get(coldest, 0) >= hits:
                    return
                del self._kept[coldest]
            if x.nbytes + sum(k.nbytes for k, _ in self._kept.values()) <= self._max[1]:
                self._kept[digest] = (x.copy(), options)

    def hottest(self) -> list[tuple[np.ndarray, T]]:
        """Returns the inputs with their options, the most requested first."""
        with self._lock:
            order = sorted(self._kept, key=lambda d: -self._hits.get(d, 0))
            return [self._kept[d] for d in order]
