"""Memory and processor use of this process, sampled every few seconds, never for a request."""

from __future__ import annotations

import collections
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

SAMPLE_SECONDS = 5.0
_MEMORY_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


class SystemSampler:
    """Keeps the last minutes of resident memory and processor use.

    Args:
        read: ``() -> (rss_bytes, cpu_percent)``; None reads those of this process.

    Example:
        >>> sampler = SystemSampler(read=lambda: (100, 50.0))
        >>> sampler.sample()
        >>> sampler.report()["rss_bytes"], sampler.report()["cpu_percent"]
        (100, 50.0)
    """

    def __init__(self, read: Callable[[], tuple[int, float]] | None = None) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent(None)  # the first call only sets the start of the measurement
        self._read = self._read_process if read is None else read
        self._history: collections.deque[tuple[int, float]] = collections.deque(maxlen=120)
        self._ready = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.limit_bytes = memory_limit()

    def _read_process(self) -> tuple[int, float]:
        return self._process.memory_info().rss, self._process.cpu_percent(None)

    def sample(self) -> None:
        """Takes one sample now."""
        self._history.append(self._read())

    def mark_ready(self) -> None:
        """Drops the samples taken so far: memory grows while weights load and compile, so it is no
        median to compare with."""
        self._history.clear()
        self._ready = True
        self.sample()

    def start(self, also: Callable[[], object]) -> None:
        """Samples every few seconds from a thread, and calls ``also`` after each sample."""

        def work() -> None:
            while not self._stop.wait(SAMPLE_SECONDS):
                self.sample()
                also()

        self._thread = threading.Thread(target=work, name="moe-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the sampling thread."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)

    def spike_ratio(self) -> float:
        """Returns resident memory over its median of the last ten minutes; 1 before ``mark_ready``."""
        if not self._ready:
            return 1.0
        rss = [r for r, _ in self._history]
        return rss[-1] / max(statistics.median(rss), 1) if rss else 1.0

    def report(self) -> dict[str, Any]:
        """Returns the last sample, in bytes and percent of one core."""
        if not self._history:
            self.sample()
        rss, cpu = self._history[-1]
        return {
            "rss_bytes": rss,
            "limit_bytes": self.limit_bytes,
            "used_ratio": rss / self.limit_bytes if self.limit_bytes else None,
            "spike_ratio": self.spike_ratio(),
            "cpu_percent": cpu,
        }


def memory_limit() -> int:
    """Returns the bytes that this process may use: the container's limit, or the machine's memory."""
    total = int(psutil.virtual_memory().total)
    for file in _MEMORY_LIMITS:
        try:
            limit = int(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return min(limit, total)
    return total
