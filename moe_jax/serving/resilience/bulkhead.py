"""Bounded work: how much is under way, how much waits, for how long, and whose turn it is.

A timeout cannot cancel device work. So a place stays taken until the work ends; the caller waits no
longer than its deadline. Work that still queues then is never begun.

Large work may come in pieces: a function that returns a generator yields the cost of its next piece
before each further one. Between two pieces it goes back to the queue if others wait, so a small
request waits for pieces of the large ones, not for whole ones.

Handing work to another thread and back costs about a tenth of a millisecond. A caller that can be
left behind by whoever waits for it (``Call``), or that accepts to wait past its deadline, runs the
work on its own thread instead, in a worker's place.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import Any

from moe_jax.serving.errors import ServingError
from moe_jax.serving.resilience.fair_queue import FairQueue
from moe_jax.serving.resilience.job import Call, Job

# A caller without a `Call` works itself only if its deadline is at least this far, and this many times
# as far as the longest of the last works took: it could not leave work that hangs.
_FAR_SECONDS = 1.0
_FAR_TIMES = 100.0
_REMEMBERED = 32


class Bulkhead:
    """Runs at most ``workers`` functions at once, with at most ``queue`` more waiting.

    Clients take turns in the queue, by the cost of their work (``FairQueue``). A client that comes to
    a full queue takes the place of the last work of the client with most work in it.

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
        self._waiting: FairQueue[Job] = FairQueue()
        self._ready: collections.deque[Job] = collections.deque()  # have a place, need a thread
        self._running: set[Job] = set()
        self._handed = 0  # of those running, on a worker's thread
        self._threads: list[threading.Thread] = []
        self._took: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._closed = False

    @property
    def pending(self) -> int:
        """Work that waits for a place."""
        return len(self._waiting)

    @property
    def inflight(self) -> int:
        """Work that holds a place, whether anybody still waits for it or not."""
        return len(self._running)

    @property
    def full(self) -> bool:
        """Whether new work would be refused or take another's place."""
        return len(self._waiting) >= max(self._queue_size, 1) and self.inflight >= self._workers

    def oldest_seconds(self) -> float:
        """Returns for how long the oldest work has been running; 0 without running work."""
        now = time.perf_counter()
        with self._changed:
            return max((now - (job.started or now) for job in self._running), default=0.0)

    def run(
        self,
        function: Callable[[], Any],
        *,
        timeout: float,
        client: str = "",
        cost: int = 1,
        on_abandon: Callable[[], None] = lambda: None,
        may_run_inline: bool = False,
        call: Call | None = None,
    ) -> tuple[Any, float]:
        """Runs a function as soon as it is its turn.

        Args:
            function: the work. If it returns a generator, that yields the cost of each further piece
                before it, and returns the value.
            timeout: seconds that the caller waits, queueing included.
            client: whose turn it uses.
            cost: cost of the work, or of its first piece, such as tokens.
            on_abandon: called if the deadline passes while the work is under way.
            may_run_inline: whether the caller accepts to wait past its deadline should the work hang.
                It then runs the work itself if a place is free and recent work took far less.
            call: if given, the caller runs the work itself, and ``call.leave`` releases whoever waits
                for it.

        Returns:
            The function's value, and the seconds that it queued.

        Raises:
            ServingError: ``queue_full``, ``draining`` or ``deadline_exceeded``.
            Exception: whatever the function raises.
        """
        # The caller has a thread that nobody waits on directly, so the work runs on it: a request then
        # crosses no second thread, and its deadline is kept by whoever waits for the call.
        if call is not None:
            job = Job(function, client, cost, own_thread=True)
            self._submit(job)
            call.on_leave(lambda: self._leave(job, timeout, on_abandon))
            return self._run_inline(job, timeout)
        if may_run_inline:
            job = Job(function, client, cost, own_thread=True)
            if self._begin_inline(job, timeout):
                return self._run_inline(job, timeout)
        job = Job(function, client, cost, own_thread=False)
        self._submit(job)
        if job.wait(timeout):
            return job.result(), job.queue_seconds
        self._leave(job, timeout, on_abandon)
        if job.done:  # it ended between the wait and `_leave`
            return job.result(), job.queue_seconds
        raise _too_late(timeout, _AT_WORK)

    # --- on the caller's thread

    def _begin_inline(self, job: Job, timeout: float) -> bool:
        with self._changed:
            now = time.perf_counter()
            # Work that takes far longer than usual may hang, and so might this.
            under_way = [now - (other.started or now) for other in self._running]
            longest = max([*self._took, *under_way]) if self._took else timeout
            # Nobody can interrupt the caller's own thread, so it runs only work that usually ends long
            # before the deadline.
            far = timeout >= max(_FAR_SECONDS, _FAR_TIMES * longest)
            if not far or self._closed or self._waiting or len(self._running) >= self._workers:
                return False
            self._start(job)
        return True

    def _run_inline(self, job: Job, timeout: float) -> tuple[Any, float]:
        """Runs a job on this thread whenever it is its turn."""
        while True:
            if job.turn is not None:
                left = job.submitted + timeout - time.perf_counter()
                if not job.turn.wait(max(left, 0.0)):
                    self._withdraw(job, timeout)
            if job.done:  # stopped while it waited
                return job.result(), job.queue_seconds
            if job.step():
                self._end(job)
                if job.abandoned:
                    raise _too_late(timeout, _AT_WORK)
                return job.result(), job.queue_seconds
            self._give_way(job)

    # --- the queue, under the lock

    def _submit(self, job: Job) -> None:
        with self._changed:
            if self._closed:
                raise ServingError(
                    "draining", "shutting down. Ask another instance.", retry_after=1
                )
            if len(self._running) >= self._workers and len(self._waiting) >= self._queue_size:
                self._make_room(job)
            if job.own_thread:
                if not self._waiting and len(self._running) < self._workers:
                    self._start(job)
                    return
                job.turn = threading.Event()
            self._waiting.push(job.client, job.cost, job)
            self._dispatch()

    def _make_room(self, job: Job) -> None:
        """Refuses the job, or takes the place of another client that has more in the queue."""
        error = ServingError(
            "queue_full",
            f"expected at most {self._queue_size} requests in the queue (max_queue), got one more. "
            "Try again as Retry-After says, or add instances.",
            retry_after=1.0,
        )
        # The queue is shared fairly: the client with most work in it loses its newest, which has
        # waited least, but only if it keeps more than the newcomer has then. Begun work stays.
        last = self._waiting.longest_last()
        if (
            last is None
            or last.begun
            or self._waiting.waiting(last.client) <= self._waiting.waiting(job.client) + 1
        ):
            raise error
        self._waiting.remove(last.client, last)
        last.stop(error)

    def _dispatch(self) -> None:
        """Gives free places to those whose turn it is."""
        while self._waiting and len(self._running) < self._workers:
            job = self._waiting.pop()
            self._start(job)
            if job.own_thread:
                assert job.turn is not None
                job.turn.set()
                continue
            # `_handed` counts work that threads hold or are about to take. A thread is started only if
            # it exceeds the threads, so an idle service has none.
            self._handed += 1
            self._ready.append(job)
            if self._handed > len(self._threads):
                name = f"moe-worker-{len(self._threads)}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify()

    def _start(self, job: Job) -> None:
        job.started = time.perf_counter()
        # Work in pieces queues several times: what it already worked is no waiting.
        job.queue_seconds = job.started - job.submitted - job.work_seconds
        job.begun = True
        self._running.add(job)

    def _stop_running(self, job: Job) -> None:
        self._running.discard(job)
        job.started = None
        if not job.own_thread:
            self._handed -= 1

    def _give_way(self, job: Job) -> bool:
        """Puts a job between two pieces back into the queue if others wait there; returns whether its
        thread must wait for the next turn or has nothing more to do for it."""
        # Read without the lock, since this runs between all pieces: a newcomer that is missed here is
        # seen after the next piece.
        if not self._waiting and not job.abandoned:
            return False
        with self._changed:
            if job.abandoned:
                job.stop(_too_late(0.0, _AT_WORK))
                self._finish_running(job)
                return True
            if not self._waiting:
                return False
            self._stop_running(job)
            if job.own_thread:
                job.turn = threading.Event()
            self._waiting.push(job.client, job.cost, job, first=True)
            self._dispatch()
        return True

    def _end(self, job: Job) -> None:
        with self._changed:
            self._finish_running(job)

    def _finish_running(self, job: Job) -> None:
        self._stop_running(job)
        self._took.append(job.work_seconds)
        self._dispatch()
        if self._closed:
            self._changed.notify_all()

    def _withdraw(self, job: Job, timeout: float) -> bool:
        """Stops a job whose deadline passed while it waited; returns whether it did wait."""
        with self._changed:
            if job.done or job.started is not None:
                return False
            self._waiting.remove(job.client, job)
            job.stop(_too_late(timeout, "it still waited for its turn"))
            if self._closed:
                self._changed.notify_all()
        return True

    def _leave(self, job: Job, timeout: float, on_abandon: Callable[[], None]) -> None:
        """Stops a job that waits, or abandons one that is under way; nothing if it is done."""
        if self._withdraw(job, timeout):
            return
        with self._changed:
            if job.done:
                return
            job.abandoned = True
        on_abandon()

    # --- on the workers' threads

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._ready:
                    if self._closed and not self._waiting and not self._running:
                        return
                    self._changed.wait()
                job = self._ready.popleft()
            while True:
                if job.step():
                    self._end(job)
                    break
                if self._give_way(job):
                    break
            del job  # an idle worker must not keep its last result alive

    def close(self, timeout: float) -> bool:
        """Takes no more work and waits for what is under way; returns whether all of it ended."""
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


_AT_WORK = "the device was still at work on it"


def _too_late(timeout: float, why: str) -> ServingError:
    return ServingError(
        "deadline_exceeded",
        f"expected an answer within {timeout:g} s, got none: {why}. Allow more time, or send less.",
    )
