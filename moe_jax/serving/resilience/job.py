"""One piece of work in the bulkhead, and the means to leave it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import GeneratorType
from typing import Any


class Call:
    """Lets the side that waits for a call leave it at its deadline, while its thread is still at work.

    Example:
        >>> call, events = Call(), []
        >>> call.on_leave(lambda: events.append("left"))
        >>> call.leave()
        >>> call.left, events
        (True, ['left'])
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], object]] = []
        self.left = False

    def on_leave(self, listener: Callable[[], object]) -> None:
        """Calls ``listener`` when the caller leaves, or now if it has left."""
        with self._lock:
            if not self.left:
                self._listeners.append(listener)
                return
        listener()

    def leave(self) -> None:
        """Leaves the call. What it holds is released when its work ends."""
        with self._lock:
            self.left = True
            listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener()


class Job:
    """One piece of work in the bulkhead.

    Attributes:
        client: whose turn in the queue it uses.
        cost: cost of its next piece.
        submitted: when it was submitted, on ``time.perf_counter``.
        started: when it last began to run; None while it waits.
        queue_seconds: how long it waited, between pieces included.
        begun: whether its first piece has begun.
        abandoned: whether nobody waits for it any more.
        own_thread: whether its caller's thread runs it, and not a worker.
        turn: set when its turn comes; None unless its caller's thread has to wait for that.
        done: whether it has a value or an error.
    """

    __slots__ = (
        "_done",
        "_error",
        "_function",
        "_pieces",
        "_value",
        "abandoned",
        "begun",
        "client",
        "cost",
        "done",
        "own_thread",
        "queue_seconds",
        "started",
        "submitted",
        "turn",
        "work_seconds",
    )

    def __init__(
        self, function: Callable[[], Any], client: str, cost: int, *, own_thread: bool
    ) -> None:
        self._function = function
        self._pieces: GeneratorType[int, None, Any] | None = None
        # Events cost a microsecond each, so none is created that nobody waits for.
        self._done = None if own_thread else threading.Event()
        self.done = False
        self._value: Any = None
        self._error: BaseException | None = None
        self.client = client
        self.cost = cost
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.queue_seconds = 0.0
        self.work_seconds = 0.0
        self.begun = False
        self.abandoned = False
        self.own_thread = own_thread
        self.turn: threading.Event | None = None

    def step(self) -> bool:
        """Runs the next piece; returns whether it was the last one. Raises nothing."""
        start = time.perf_counter()
        try:
            if self._pieces is None:
                value = self._function()
                if not isinstance(value, GeneratorType):
                    self._finish(value, None)
                    return True
                self._pieces = value
            self.cost = next(self._pieces)
            return False
        except StopIteration as end:
            self._finish(end.value, None)
        except BaseException as error:
            self._finish(None, error)
        finally:
            self.work_seconds += time.perf_counter() - start
        return True

    def stop(self, error: BaseException) -> None:
        """Ends the job before its next piece; its result is this error."""
        if self._pieces is not None:
            self._pieces.close()
        self._finish(None, error)
        if self.turn is not None:
            self.turn.set()

    def _finish(self, value: Any, error: BaseException | None) -> None:
        self._value, self._error = value, error
        # Whoever reads the result late must not keep alive what the work refers to.
        self._function, self._pieces = _nothing, None
        self.done = True
        if self._done is not None:
            self._done.set()

    def wait(self, timeout: float | None) -> bool:
        """Waits until a worker has done the job, or ``timeout`` seconds; returns whether it is done."""
        assert self._done is not None
        return self._done.wait(timeout)

    def result(self) -> Any:
        """Returns its value or raises its error."""
        if self._error is not None:
            raise self._error
        return self._value


def _nothing() -> None:
    return None
