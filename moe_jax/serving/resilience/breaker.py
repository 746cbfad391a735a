"""A circuit breaker with the semantics of resilience4j, and exactly one probe when half open."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable

from moe_jax.serving.errors import ServingError

STATES = ("closed", "open", "half_open")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BreakerPolicy:
    """When the breaker opens, and for how long.

    Attributes:
        window: number of last calls that count.
        minimum: fewest calls in the window for which rates are computed.
        failure_rate: share of failed calls at which it opens.
        slow_rate: share of slow calls at which it opens.
        slow_seconds: seconds above which a call is slow.
        open_seconds: seconds that it stays open before a probe; doubles with each failed probe.
        max_open_seconds: upper bound of ``open_seconds``.
    """

    window: int = 100
    minimum: int = 20
    failure_rate: float = 0.5
    slow_rate: float = 0.8
    slow_seconds: float = 5.0
    open_seconds: float = 10.0
    max_open_seconds: float = 60.0


class Ticket:
    """Permission for one call. The first of ``success``, ``failure`` and ``cancel`` counts."""

    __slots__ = ("_breaker", "_done", "_generation", "probe")

    def __init__(self, breaker: CircuitBreaker, generation: int, probe: bool) -> None:
        self._breaker = breaker
        self._generation = generation
        self._done = False
        self.probe = probe

    def success(self, seconds: float) -> None:
        """Reports that the call succeeded after ``seconds``."""
        self._breaker._report(self, failed=False, seconds=seconds)

    def failure(self, seconds: float = 0.0) -> None:
        """Reports that the call failed, or that nobody waits for it any more."""
        self._breaker._report(self, failed=True, seconds=seconds)

    def cancel(self) -> None:
        """Reports that the call was not made, or says nothing about the device."""
        self._breaker._report(self, failed=None, seconds=0.0)


class CircuitBreaker:
    """Keeps calls away from something that fails.

    Args:
        policy: when it opens.
        clock: monotonic clock in seconds.
        on_transition: called as ``on_transition(new_state)`` without the lock.

    Example:
        >>> breaker = CircuitBreaker(BreakerPolicy(minimum=2), clock=lambda: 0.0)
        >>> for _ in range(2):
        ...     breaker.acquire().failure()
        >>> breaker.state
        'open'
    """

    def __init__(
        self,
        policy: BreakerPolicy,
        *,
        clock: Callable[[], float],
        on_transition: Callable[[str], None] = lambda state: None,
    ) -> None:
        self.policy = policy
        self._clock = clock
        self._on_transition = on_transition
        self._lock = threading.Lock()
        self._calls: collections.deque[tuple[bool, bool]] = collections.deque()
        self._bad = [0, 0]  # numbers of failed and of slow calls in the window
        self._state = "closed"
        # Calls that began before the last transition do not count: they met another device state.
        self._generation = 0
        self._open_for = policy.open_seconds
        self._until = 0.0
        self._probing = False

    @property
    def state(self) -> str:
        """``closed``, ``open`` or ``half_open``. It is open until a call is admitted as a probe."""
        return self._state

    @property
    def retry_after(self) -> float:
        """Seconds until a probe is possible; 0 when closed."""
        with self._lock:
            if self._state == "closed":
                return 0.0
            return max(self._until - self._clock(), 0.1)

    def would_admit(self) -> bool:
        """Returns whether ``acquire`` would return a ticket now. Changes nothing."""
        with self._lock:
            return self._would_admit()

    def _would_admit(self) -> bool:
        if self._state == "closed":
            return True
        if self._state == "open":
            return self._clock() >= self._until
        return not self._probing

    def acquire(self) -> Ticket:
        """Returns a ticket for one call.

        Raises:
            ServingError: ``circuit_open``, with the seconds until a probe is due.
        """
        moved = None
        with self._lock:
            if not self._would_admit():
                left = max(self._until - self._clock(), 0.1)
                raise ServingError(
                    "circuit_open",
                    "the device failed too often and gets no calls now. Try again as Retry-After says.",
                    retry_after=left,
                )
            if self._state == "open":
                moved = self._move("half_open")
            probe = self._state == "half_open"
            self._probing = probe
            ticket = Ticket(self, self._generation, probe)
        # Outside the lock, because the callback logs and counts and may be slow.
        if moved:
            self._on_transition(moved)
        return ticket

    def _report(self, ticket: Ticket, *, failed: bool | None, seconds: float) -> None:
        moved = None
        with self._lock:
            # A call that was abandoned has reported already. What it reports at its end comes too
            # late.
            if ticket._done:
                return
            ticket._done = True
            if ticket._generation != self._generation:
                return
            # A probe that tells nothing, such as one whose client gave up, makes room for the next.
            if ticket.probe:
                self._probing = False
            if failed is None:
                return
            slow = seconds > self.policy.slow_seconds
            if ticket.probe:
                # One probe decides. After a bad one the breaker stays open for twice as long, so a
                # device that is down gets ever fewer calls.
                if failed or slow:
                    self._open_for = min(2 * self._open_for, self.policy.max_open_seconds)
                    moved = self._open()
                else:
                    self._open_for = self.policy.open_seconds
                    moved = self._move("closed")
            else:
                self._note(failed, slow)
                # Below the minimum a single failure would already be a high rate.
                if len(self._calls) >= self.policy.minimum and self._too_bad():
                    moved = self._open()
        if moved:
            self._on_transition(moved)

    def _note(self, failed: bool, slow: bool) -> None:
        # Counts are kept beside the window, so that a call costs the same whatever the window's size.
        self._calls.append((failed, slow))
        self._bad[0] += failed
        self._bad[1] += slow
        if len(self._calls) > self.policy.window:
            failed, slow = self._calls.popleft()
            self._bad[0] -= failed
            self._bad[1] -= slow

    def _too_bad(self) -> bool:
        count = len(self._calls)
        failures, slow = self._bad
        return failures >= self.policy.failure_rate * count or slow >= self.policy.slow_rate * count

    def _open(self) -> str:
        self._until = self._clock() + self._open_for
        return self._move("open")

    def _move(self, state: str) -> str:
        self._state = state
        self._generation += 1
        self._probing = False
        self._calls.clear()
        self._bad = [0, 0]
        return state
