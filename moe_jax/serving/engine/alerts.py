"""The guide's five alerts, inside the process: they fire on recent traffic and clear by themselves.

``monitoring/alerts.yml`` has the same five as rules for Prometheus.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.serving.metrics import WINDOW_SECONDS

ERROR_RATE = 0.05
P95_MS = 500.0
BALANCE = 0.5
MEMORY_SPIKE = 1.5
MEMORY_USED = 0.9
# With fewer requests or batches, rates and percentiles mean nothing.
MIN_REQUESTS = 20
MIN_BATCHES = 10

NAMES = ("high_error_rate", "high_latency", "poor_load_balance", "memory_spike", "circuit_open")


def firing(
    recent: Mapping[str, Any], memory: Mapping[str, Any], circuit_state: str
) -> dict[str, str]:
    """Returns the active alerts: name to observation.

    Args:
        recent: result of ``metrics.Traffic.recent``.
        memory: result of ``metrics.SystemSampler.report``.
        circuit_state: state of the circuit breaker.

    Example:
        >>> quiet = {"requests": 0, "batches": 0}
        >>> firing(quiet, {"spike_ratio": 1.0, "used_ratio": 0.2}, "open")
        {'circuit_open': 'the circuit breaker is open'}
    """
    active = {}
    window = f" in the last {WINDOW_SECONDS / 60:.0f} minutes"
    if recent["requests"] >= MIN_REQUESTS:
        if recent["error_rate"] > ERROR_RATE:
            active["high_error_rate"] = (
                f"error rate {recent['error_rate']:.1%}{window}, over {ERROR_RATE:.0%}"
            )
        if recent["p95_ms"] > P95_MS:
            active["high_latency"] = f"p95 {recent['p95_ms']:.0f} ms{window}, over {P95_MS:.0f} ms"
    if recent["batches"] >= MIN_BATCHES and recent["load_balance_score"] < BALANCE:
        active["poor_load_balance"] = (
            f"load balance score {recent['load_balance_score']:.2f}{window}, under {BALANCE}"
        )
    used = memory.get("used_ratio") or 0.0
    if memory["spike_ratio"] > MEMORY_SPIKE or used > MEMORY_USED:
        active["memory_spike"] = (
            f"memory at {memory['spike_ratio']:.2f} times its median and {used:.0%} of the limit"
        )
    if circuit_state != "closed":
        active["circuit_open"] = f"the circuit breaker is {circuit_state.replace('_', ' ')}"
    return active


class Alerts:
    """Remembers which alerts are active since when, and notifies when one fires or clears.

    Args:
        clock: monotonic clock in seconds.
        notify: called as ``notify(event, alert=name, ...)``.
    """

    def __init__(self, clock: Callable[[], float], notify: Callable[..., None]) -> None:
        self._clock = clock
        self._notify = notify
        self._lock = threading.Lock()
        self._since: dict[str, float] = {}

    def update(self, firing: Mapping[str, str]) -> list[dict[str, Any]]:
        """Takes the result of ``firing``; returns the active alerts as plain values."""
        now = self._clock()
        with self._lock:
            fired = [name for name in firing if name not in self._since]
            cleared = [name for name in self._since if name not in firing]
            for name in fired:
                self._since[name] = now
            for name in cleared:
                del self._since[name]
            active = [
                {"alert": name, "seen": firing[name], "for_seconds": now - since}
                for name, since in self._since.items()
            ]
        for name in fired:
            self._notify("alert_fired", alert=name, seen=firing[name])
        for name in cleared:
            self._notify("alert_cleared", alert=name)
        return active
