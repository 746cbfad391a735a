"""Where answers and refusals are counted; nothing is where monitoring is off."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_jax.serving.cache import Entry
from moe_jax.serving.errors import ServingError
from moe_jax.serving.metrics import Exporter, Traffic


class Recorder:
    """Feeds the exporter and the recent traffic.

    Attributes:
        exporter: Prometheus metrics; None where monitoring is off or weights are not loaded.
        traffic: the last minutes; None likewise.
    """

    def __init__(self) -> None:
        self.exporter: Exporter | None = None
        self.traffic: Traffic | None = None

    def open(self, exporter: Exporter, traffic: Traffic) -> None:
        self.exporter, self.traffic = exporter, traffic

    def answered(self, entry: Entry, seconds: float) -> None:
        """Counts an answer, from wherever it came."""
        exporter, traffic = self.exporter, self.traffic
        if exporter is None or traffic is None:
            return
        about, load = entry.about, entry.arrays["_load"]
        histogram = entry.arrays["_histogram"]
        tokens = int(histogram.sum())
        exporter.add("moe_requests_total", label="ok")
        exporter.observe("moe_request_duration_seconds", seconds)
        exporter.add("moe_tokens_total", tokens)
        exporter.add_experts(load)
        exporter.observe_many("moe_experts_per_token", np.arange(len(histogram)), histogram)
        if about["nonfinite_tokens"]:
            exporter.add("moe_nonfinite_tokens_total", about["nonfinite_tokens"])
        if about["fallback"]:
            exporter.add("moe_fallback_total", label=about["fallback"])
        traffic.request(seconds, failed=False)
        traffic.batch(tokens=tokens, load=load, histogram=histogram)

    def refused(self, error: ServingError) -> None:
        """Counts a request that was not answered, by its code."""
        if self.exporter is not None:
            self.exporter.add("moe_errors_total", label=error.code)
            self.exporter.add("moe_requests_total", label=outcome(error))

    def failed(self, seconds: float) -> None:
        """Counts a fault of ours towards the error rate; a client's fault is none."""
        if self.traffic is not None:
            self.traffic.request(seconds, failed=True)

    def observe(self, name: str, value: float) -> None:
        if self.exporter is not None:
            self.exporter.observe(name, value)

    def circuit(self, state: str) -> None:
        if self.exporter is not None:
            self.exporter.add("moe_circuit_transitions_total", label=state)

    def relabel(self, build: dict[str, Any]) -> None:
        if self.exporter is not None:
            self.exporter.set_build(build)


def outcome(error: ServingError) -> str:
    """The label of ``moe_requests_total`` for a refusal.

    Example:
        >>> outcome(ServingError("rate_limited", "")), outcome(ServingError("internal", ""))
        ('rejected', 'error')
    """
    if error.code in ("rate_limited", "blocked"):
        return "rejected"
    if error.status == 503:
        return "unavailable"
    return "error" if error.status >= 500 else "client_error"
