"""Automatic blocks: a client that keeps doing wrong is refused for a while, then forgiven.

Violations are refused requests and malformed ones; success never counts. Whatever is remembered of a
client fades by itself, and at most ``max_clients`` are remembered at all.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable

from moe_jax.serving.errors import ServingError


@dataclasses.dataclass(slots=True)
class _Record:
    times: list[float]  # a deque would take many times the memory for so few
    codes: list[str]  # of the violations at ``times``; when blocked, of those that blocked
    blocks: int = 0
    until: float = 0.0


class ClientBlocks:
    """Counts violations of clients and blocks those with too many.

    Args:
        after: violations within ``window`` seconds that block; None is never.
        window: seconds.
        first_seconds: length of the first block; each further one is twice as long.
        longest_seconds: the longest block, and how long a blocked client must behave until its next
            block is short again.
        clock: seconds that never go back.
        max_clients: most clients remembered.

    Example:
        >>> now = 0.0
        >>> blocks = ClientBlocks(after=2, window=300, first_seconds=60, longest_seconds=3600,
        ...                 clock=lambda: now)
        >>> blocks.violation("a", "malformed"), blocks.violation("a", "malformed")
        (False, True)
        >>> now = 61.0
        >>> blocks.check("a")
    """

    def __init__(
        self,
        *,
        after: int | None,
        window: float,
        first_seconds: float,
        longest_seconds: float,
        clock: Callable[[], float],
        max_clients: int = 100_000,
    ) -> None:
        self._after = after
        self._window = window
        self._first = first_seconds
        self._longest = longest_seconds
        self._clock = clock
        self._max = max_clients
        self._lock = threading.Lock()
        self._records: collections.OrderedDict[str, _Record] = collections.OrderedDict()

    def violation(self, client: str, code: str) -> bool:
        """Counts a refusal by its error code; True if it blocked the client."""
        if self._after is None:
            return False
        now = self._clock()
        with self._lock:
            record = self._records.get(client)
            if record is None:
                record = _Record(times=[], codes=[])
                self._records[client] = record
            self._records.move_to_end(client)
            if len(self._records) > self._max:
                self._forget_one(now)
            if now < record.until:
                return False  # blocked already; a block does not grow while it lasts
            if record.blocks and now - record.until > self._longest:
                record.blocks = 0
            if not record.times:
                record.codes.clear()
            record.times.append(now)
            record.codes.append(code)
            del record.times[: -self._after], record.codes[: -self._after]
            full = len(record.times) == self._after
            if not full or now - record.times[0] > self._window:
                return False
            record.times.clear()
            length = min(self._first * 2**record.blocks, self._longest)
            record.blocks = min(record.blocks + 1, 32)
            record.until = now + length
            return True

    def check(self, client: str) -> None:
        """Raises ServingError ``blocked`` with the seconds left while the client is blocked."""
        record = self._records.get(client)
        if record is None:
            return
        left = record.until - self._clock()
        if left > 0:
            counts = collections.Counter(list(record.codes))
            refused = ", ".join(f"{count} {code}" for code, count in counts.most_common())
            advice = []
            if counts["rate_limited"]:
                advice.append("wait as long as Retry-After says after each 429")
            if len(counts) > bool(counts["rate_limited"]):
                advice.append("correct the other requests" if advice else "correct the requests")
            raise ServingError(
                "blocked",
                f"blocked for {left:.0f} more seconds, because {counts.total()} requests within "
                f"{self._window:.0f} seconds were refused: {refused}. When the block ends, "
                f"{' and '.join(advice)}.",
                retry_after=left,
            )

    def seconds_left(self, client: str) -> float:
        """Returns how long the client is blocked still; 0 if it is not."""
        record = self._records.get(client)
        return 0.0 if record is None else max(record.until - self._clock(), 0.0)

    @property
    def blocked(self) -> int:
        """How many clients are blocked now."""
        now = self._clock()
        with self._lock:
            return sum(record.until > now for record in self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def _forget_one(self, now: float) -> None:
        """Drops the longest unseen client, of the first few one that is not blocked if there is."""
        for client in [c for c, _ in zip(self._records, range(16), strict=False)]:
            if self._records[client].until <= now:
                del self._records[client]
                return
        self._records.popitem(last=False)
