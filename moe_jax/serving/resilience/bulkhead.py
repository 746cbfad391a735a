"""A few workers and a short queue: how much work may be under way, and how long anyone waits.

A timeout cannot cancel device work. So the work belongs to a worker, which stays taken until it ends;
the caller waits no longer than its deadline. Work that still queues then is never begun.

Handing work to another thread and back costs about a tenth of a millisecond. A caller who does not
need to leave at its deadline may do the work itself in a worker's place, as long as what ran lately
says that the deadline is far.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import Any

from moe_jax.serving.errors import ServingError

# A caller works itself where its deadline is at least this far, and this many times as far as the
# longest of the last works took.
_FAR_SECONDS = 1.0
_FAR_TIMES = 100.0
_REMEMBERED = 32


class Job:
    """One piece of work in the bulkhead."""

    __slots__ = ("_done", "_error", "_function", "_value", "abandoned", "started", "submitted")

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._done = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.abandoned = False

    @property
    def queue_seconds(self) -> float:
        """How long it waited for a worker."""
        return (self.started or time.perf_counter()) - self.submitted

    def run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error
        finally:
            self._function = _nothing  # what it closed over is not kept alive by a late reader
            self._done.set()

    def wait(self, timeout: float | None) -> bool:
        return self._done.wait(timeout)

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


class _Own:
    """A worker's place that the caller itself fills."""

    __slots__ = ("started",)

    def __init__(self, started: float) -> None:
        self.started = started


def _nothing() -> None:
    return None


class Bulkhead:
    """Runs functions on at most ``workers`` threads, with at most ``queue`` more waiting.

    Args:
        workers: how much is under way at once.
        queue: how much may wait.

    Example:
        >>> bulkhead = Bulkhead(workers=1, queue=1)
        >>> bulkhead.run(lambda: 6 * 7, timeout=5.0)[0]
        42
        >>> bulkhead.close(timeout=5.0)
        True
    """

    def __init__(self, *, workers: int, queue: int) -> None:
        self._workers = workers
        self._queue_size = queue
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: set[Job | _Own] = set()
        self._threads: list[threading.Thread] = []
        self._inline = 0  # of those running, on their caller's thread
        self._took: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._closed = False

    @property
    def pending(self) -> int:
        """Jobs that wait for a worker."""
        return len(self._waiting)

    @property
    def inflight(self) -> int:
        """Jobs that a worker holds, whether anybody still waits for them or not."""
        return len(self._running)

    @property
    def full(self) -> bool:
        return len(self._waiting) >= max(self._queue_size, 1) and self.inflight >= self._workers

    def oldest_seconds(self) -> float:
        """How long the oldest running job has been running; 0 when none is."""
        now = time.perf_counter()
        with self._changed:
            return max((now - (job.started or now) for job in self._running), default=0.0)

    def run(
        self,
        function: Callable[[], Any],
        *,
        timeout: float,
        on_abandon: Callable[[], None] = lambda: None,
        here: bool = False,
    ) -> tuple[Any, float]:
        """The function's value, and the seconds it queued.

        Args:
            function: the work.
            timeout: seconds that the caller waits, queueing included.
            on_abandon: called if the deadline passes while the work is under way.
            here: whether the caller may do the work itself if a worker is free and the deadline is
                far off what works took lately. Such work is waited for even if it hangs.

        Raises:
            ServingError: ``queue_full``, ``draining`` or ``deadline_exceeded``.
            Exception: whatever the function raises.
        """
        if here:
            own = self._begin_here(timeout)
            if own is not None:
                try:
                    return function(), 0.0
                finally:
                    self._end_here(own)
        job = self._submit(function)
        if job.wait(timeout):
            return job.result(), job.queue_seconds
        with self._changed:
            if job.started is None:
                self._waiting.remove(job)
                raise _too_late(timeout, "it still waited for its turn")
            if job._done.is_set():
                return job.result(), job.queue_seconds
            job.abandoned = True
        on_abandon()
        raise _too_late(timeout, "the device was still at work on it")

    def _begin_here(self, timeout: float) -> _Own | None:
        with self._changed:
            now = time.perf_counter()
            # One that takes far longer than usual may hang, and so might this one.
            under_way = [now - (job.started or now) for job in self._running]
            longest = max([*self._took, *under_way]) if self._took else timeout
            far = timeout >= max(_FAR_SECONDS, _FAR_TIMES * longest)
            if not far or self._closed or self._waiting or len(self._running) >= self._workers:
                return None
            own = _Own(now)
            self._running.add(own)
            self._inline += 1
        return own

    def _end_here(self, own: _Own) -> None:
        with self._changed:
            self._inline -= 1
            self._ended(own)

    def _ended(self, job: Job | _Own) -> None:
        self._running.discard(job)
        self._took.append(time.perf_counter() - (job.started or 0.0))
        if self._waiting or self._closed:
            self._changed.notify_all()

    def _submit(self, function: Callable[[], Any]) -> Job:
        job = Job(function)
        with self._changed:
            if self._closed:
                raise ServingError(
                    "draining", "shutting down. Ask another instance.", retry_after=1
                )
            idle = self._workers - len(self._running)
            if len(self._waiting) >= self._queue_size + max(idle, 0):
                raise ServingError(
                    "queue_full",
                    f"expected at most {self._queue_size} requests in the queue (max_queue), got "
                    "one more. Try again as Retry-After says, or add instances.",
                    retry_after=1.0,
                )
            self._waiting.append(job)
            if len(self._threads) < self._workers and len(self._waiting) > idle_threads(self):
                thread = threading.Thread(
                    target=self._work, name=f"moe-worker-{len(self._threads)}", daemon=True
                )
                self._threads.append(thread)
                thread.start()
            self._changed.notify()
        return job

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting or len(self._running) >= self._workers:
                    if self._closed and not self._waiting:
                        return
                    self._changed.wait()
                job = self._waiting.popleft()
                job.started = time.perf_counter()
                self._running.add(job)
            job.run()
            with self._changed:
                self._ended(job)

    def close(self, timeout: float) -> bool:
        """Takes no more work, waits for what is under way; whether all of it ended in time."""
        end = time.perf_counter() + timeout
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._waiting or self._running:
                left = end - time.perf_counter()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True


def idle_threads(bulkhead: Bulkhead) -> int:
    """Threads that are started and have nothing to do."""
    return len(bulkhead._threads) - (len(bulkhead._running) - bulkhead._inline)


def _too_late(timeout: float, why: str) -> ServingError:
    return ServingError(
        "deadline_exceeded",
        f"expected an answer within {timeout:g} s, got none: {why}. Allow more time, or send less.",
    )
