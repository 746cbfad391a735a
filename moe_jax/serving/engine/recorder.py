"""Where answers and refusals are counted; nothing is where monitoring is off."""

from __future__ import annotations

from typing import Any

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
        about, histogram = entry.about, entry.arrays["_histogram"]
        exporter.observe("moe_request_duration_seconds", seconds)
        if about["nonfinite_tokens"]:
            exporter.add("moe_nonfinite_tokens_total", about["nonfinite_tokens"])
        if about["fallback"]:
            exporter.add("moe_fallback_total", label=about["fallback"])
        traffic.answered(seconds, load=entry.arrays["_load"], histogram=histogram)

    def mirror(self) -> None:
        """Brings the exporter up to what the traffic counted: per scrape, not per request."""
        exporter, traffic = self.exporter, self.traffic
        if exporter is None or traffic is None:
            return
        totals = traffic.totals()
        exporter.mirror("moe_requests_total", totals["answered"], "ok")
        exporter.mirror("moe_tokens_total", totals["tokens"])
        exporter.mirror_experts(totals["load"])
        exporter.mirror_histogram("moe_experts_per_token", totals["histogram"])

    def refused(self, error: ServingError) -> None:
        """Counts a request that was not answered, by its code."""
        if self.exporter is not None:
            self.exporter.add("moe_errors_total", label=error.code)
            self.exporter.add("moe_requests_total", label=outcome(error))

    def failed(self, seconds: float) -> None:
        """Counts a fault of ours towards the error rate; a client's fault is none."""
        if self.traffic is not None:
            self.traffic.failed(seconds)

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
