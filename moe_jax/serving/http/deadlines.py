"""Deadlines of many calls, kept by one thread."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable


class Deadlines:
    """Calls functions at their time, unless they are cancelled before.

    The functions must return soon. The thread starts with the first deadline and ends with ``close``.

    Example:
        >>> deadlines, passed = Deadlines(), threading.Event()
        >>> number = deadlines.start(0.0, passed.set)
        >>> passed.wait(10)
        True
        >>> deadlines.close()
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._times: list[tuple[float, int]] = []
        self._functions: dict[int, Callable[[], object]] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self, seconds: float, function: Callable[[], object]) -> int:
        """Starts a deadline.

        Args:
            seconds: time until ``function`` is called.
            function: called without arguments.

        Returns:
            The number by which ``cancel`` finds it.
        """
        with self._changed:
            number = next(self._numbers)
            self._functions[number] = function
            heapq.heappush(self._times, (time.monotonic() + seconds, number))
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="moe-deadlines", daemon=True)
                self._thread.start()
            if self._times[0][1] == number:  # no later than any other
                self._changed.notify()
        return number

    def cancel(self, number: int) -> None:
        """Cancels a deadline. Does nothing if it has passed."""
        with self._changed:
            self._functions.pop(number, None)
            # Cancelled times stay in the heap until they pass, unless most of them are such.
            if len(self._times) > 64 and len(self._times) > 2 * len(self._functions):
                self._times = [entry for entry in self._times if entry[1] in self._functions]
                heapq.heapify(self._times)

    def close(self) -> None:
        """Ends the thread. No function is called any more."""
        with self._changed:
            self._closed = True
            self._functions.clear()
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (
                    not self._times or self._times[0][0] > time.monotonic()
                ):
                    left = self._times[0][0] - time.monotonic() if self._times else None
                    self._changed.wait(left)
                if self._closed:
                    return
                _, number = heapq.heappop(self._times)
                function = self._functions.pop(number, None)
            if function is not None:
                function()
