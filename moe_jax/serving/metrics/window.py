"""Traffic of the last five minutes and since the start, in bounded memory."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

WINDOW_SECONDS = 300.0
_SLOT_SECONDS = 5.0
_MAX_SAMPLES = 8192


class _Slot:
    __slots__ = ("at", "errors", "histogram", "load", "requests")

    def __init__(self, at: float, num_experts: int, max_k: int) -> None:
        self.at = at
        self.requests = 0
        self.errors = 0
        self.load = np.zeros(num_experts, np.int64)
        self.histogram = np.zeros(max_k + 1, np.int64)

    @property
    def answered(self) -> int:
        return self.requests - self.errors

    @property
    def tokens(self) -> int:
        return int(self.histogram.sum())

    def absorb(self, other: _Slot) -> None:
        for name in ("requests", "errors", "load", "histogram"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Traffic:
    """Counts of requests, errors, latencies, tokens and experts.

    Args:
        num_experts: E.
        max_k: K.
        clock: monotonic clock in seconds.

    Example:
        >>> traffic = Traffic(num_experts=2, max_k=2, clock=lambda: 0.0)
        >>> traffic.answered(0.25, load=np.array([3, 1]), histogram=np.array([0, 2, 1]))
        >>> traffic.router_stats()["most_used_expert"], traffic.recent()["p50_ms"]
        (0, 250.0)
    """

    def __init__(self, *, num_experts: int, max_k: int, clock: Callable[[], float]) -> None:
        self._shape = (num_experts, max_k)
        self.clock = clock
        self._lock = threading.Lock()
        self._left = _Slot(0.0, num_experts, max_k)  # sum of the slots that have left the window
        self._slots: collections.deque[_Slot] = collections.deque()
        self._latencies: collections.deque[tuple[float, float]] = collections.deque(
            maxlen=_MAX_SAMPLES
        )
        self._started = clock()

    def _slot(self, now: float) -> _Slot:
        slots = self._slots
        if not slots or now - slots[-1].at >= _SLOT_SECONDS:
            slots.append(_Slot(now, *self._shape))
            while now - slots[0].at > WINDOW_SECONDS:
                self._left.absorb(slots.popleft())
        return slots[-1]

    def answered(self, seconds: float, *, load: np.ndarray, histogram: np.ndarray) -> None:
        """Counts an answer: int[E] uses of experts, int[K + 1] tokens by their number of experts."""
        # Sums are left for later: even small operations of numpy take microseconds right after the
        # device's work, whose threads still hold the caches.
        with self._lock:
            now = self.clock()
            self._latencies.append((now, seconds))
            slot = self._slot(now)
            slot.requests += 1
            slot.load[: len(load)] += load
            slot.histogram[: len(histogram)] += histogram

    def failed(self, seconds: float) -> None:
        """Counts a server-side failure."""
        with self._lock:
            now = self.clock()
            self._latencies.append((now, seconds))
            slot = self._slot(now)
            slot.requests += 1
            slot.errors += 1

    def recent(self) -> dict[str, Any]:
        """Returns rates and percentiles of the last five minutes."""
        with self._lock:
            now = self.clock()
            summed = self._recent(now)
            seconds = [s for at, s in self._latencies if now - at <= WINDOW_SECONDS]
        span = min(max(now - self._started, 1.0), WINDOW_SECONDS)
        p50, p95, p99 = (
            (float(v) * 1e3 for v in np.percentile(seconds, [50, 95, 99]))
            if seconds
            else (0.0, 0.0, 0.0)
        )
        used, tokens = int(summed.load.sum()), summed.tokens
        return {
            "window_seconds": WINDOW_SECONDS,
            "requests": summed.requests,
            "errors": summed.errors,
            "error_rate": summed.errors / max(summed.requests, 1),
            "requests_per_second": summed.requests / span,
            "tokens_per_second": tokens / span,
            "p50_ms": p50,
            "p95_ms": p95,
            "p99_ms": p99,
            "batches": summed.answered,
            "tokens": tokens,
            "load_balance_score": balance_score(summed.load),
            "mean_experts_per_token": used / max(tokens, 1),
        }

    def _recent(self, now: float) -> _Slot:
        summed = _Slot(now, *self._shape)
        for slot in self._slots:
            if now - slot.at <= WINDOW_SECONDS:
                summed.absorb(slot)
        return summed

    def _total(self) -> _Slot:
        summed = _Slot(0.0, *self._shape)
        with self._lock:
            for slot in (self._left, *self._slots):
                summed.absorb(slot)
        return summed

    def router_stats(self) -> dict[str, Any]:
        """Returns the guide's statistics of experts since the start.

        ``avg_usage_per_expert`` are shares of all assignments and sum to 1 once there are any;
        ``usage_variance`` is their variance.
        """
        total = self._total()
        load, histogram, tokens = total.load, total.histogram, total.tokens
        used = int(load.sum())
        shares = load / max(used, 1)
        return {
            "total_batches": total.answered,
            "total_tokens": tokens,
            "avg_usage_per_expert": [float(s) for s in shares],
            "usage_variance": float(shares.var()),
            "most_used_expert": int(load.argmax()),
            "least_used_expert": int(load.argmin()),
            "load_balance_score": balance_score(load),
            "avg_experts_per_token": used / max(tokens, 1),
            "experts_per_token_histogram": [int(h) for h in histogram],
        }

    def totals(self) -> dict[str, Any]:
        """Returns the counts since the start."""
        total = self._total()
        return {
            "answered": total.answered,
            "failed": total.errors,
            "tokens": total.tokens,
            "load": total.load,
            "histogram": total.histogram,
        }


def balance_score(load: np.ndarray) -> float:
    """Returns ``1 / (1 + CV^2)``, the effective share of experts; 1 without any count.

    Example:
        >>> balance_score(np.array([4, 4, 0, 0]))
        0.5
    """
    total = float(load.sum())
    squares = float(np.square(load, dtype=np.float64).sum()) * len(load)
    return total * total / squares if total else 1.0
