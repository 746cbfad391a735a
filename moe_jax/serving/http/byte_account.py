"""The account of bytes that all requests and unread answers hold together, over HTTP and gRPC."""

from __future__ import annotations

import threading
from types import TracebackType

from moe_jax.serving.errors import ServingError


class ByteAccount:
    """Bounds the bytes of bodies, messages and answers in memory. Safe to use from any thread.

    Bytes are taken before they are read and given back when nothing holds them any more, so that
    memory is bounded however many clients send, or do not read.

    Args:
        limit: most bytes at once.

    Attributes:
        held: bytes that are taken now.

    Example:
        >>> account = ByteAccount(10)
        >>> with account.lease() as lease:
        ...     lease.take(4)
        ...     account.held
        4
        >>> account.held
        0
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._changed = threading.Condition()
        self._waiting = 0

    def lease(self) -> Lease:
        """Returns a lease without any bytes."""
        return Lease(self)

    def check_room(self, count: int) -> None:
        """Raises ServingError ``queue_full`` if ``count`` more bytes would be refused now."""
        if self.held + count > self.limit:
            raise _full()

    def take(self, count: int, wait_seconds: float = 0.0) -> None:
        """Takes ``count`` bytes.

        Args:
            count: number of bytes.
            wait_seconds: how long to wait for room.

        Raises:
            ServingError: ``queue_full`` if there is no room.
        """
        with self._changed:
            if self.held + count > self.limit:
                self._wait(count, wait_seconds)
            self.held += count

    def give(self, count: int) -> None:
        """Gives ``count`` bytes back."""
        with self._changed:
            self.held -= count
            if self._waiting:
                self._changed.notify_all()

    def _wait(self, count: int, seconds: float) -> None:
        self._waiting += 1
        try:
            if seconds <= 0 or not self._changed.wait_for(
                lambda: self.held + count <= self.limit, seconds
            ):
                raise _full()
        finally:
            self._waiting -= 1


class Lease:
    """The bytes that one request holds; a context manager that gives them back."""

    __slots__ = ("_account", "_lock", "held")

    def __init__(self, account: ByteAccount) -> None:
        self._account = account
        self._lock = threading.Lock()
        self.held = 0

    def take(self, count: int, wait_seconds: float = 0.0) -> None:
        """Takes more bytes; see ``ByteAccount.take``."""
        self._account.take(count, wait_seconds)
        with self._lock:
            self.held += count

    def check_room(self, count: int) -> None:
        """See ``ByteAccount.check_room``."""
        self._account.check_room(count)

    def keep(self, count: int) -> None:
        """Gives back all but ``count`` bytes."""
        with self._lock:
            surplus, self.held = self.held - count, count
        self._account.give(surplus)

    def release(self) -> None:
        """Gives everything back. Safe to call twice, and from another thread."""
        self.keep(0)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Turns:
    """Lets each client do one thing at a time.

    Example:
        >>> turns = Turns()
        >>> turns.begin("a", 0.0), turns.begin("a", 0.0), turns.begin("b", 0.0)
        (True, False, True)
        >>> turns.end("a")
        >>> turns.begin("a", 0.0)
        True
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy: set[str] = set()

    def begin(self, client: str, wait_seconds: float) -> bool:
        """Returns whether it is the client's turn, after waiting for it."""
        with self._changed:
            if not self._changed.wait_for(lambda: client not in self._busy, wait_seconds):
                return False
            self._busy.add(client)
            return True

    def end(self, client: str) -> None:
        """Ends the client's turn."""
        with self._changed:
            self._busy.discard(client)
            self._changed.notify_all()


def _full() -> ServingError:
    return ServingError(
        "queue_full",
        "requests and answers hold as much memory as they may. Try again soon.",
        retry_after=1.0,
    )
