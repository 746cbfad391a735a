"""Counts of answers and refusals, for the exporter and the recent traffic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_jax.serving.cache import Entry
from moe_jax.serving.errors import ServingError
from moe_jax.serving.metrics import Exporter, Traffic


class Recorder:
    """Feeds the exporter and the recent traffic; counts nothing if monitoring is off.

    Attributes:
        exporter: Prometheus metrics; None if monitoring is off or weights are not loaded.
        traffic: the last minutes; None likewise.
        layers: the last minutes of each served layer; ``traffic`` itself if there is one.
    """

    def __init__(self) -> None:
        self.exporter: Exporter | None = None
        self.traffic: Traffic | None = None
        self.layers: dict[str, Traffic] = {}

    def open(self, exporter: Exporter, traffic: Traffic) -> None:
        """Starts counting."""
        self.exporter, self.traffic = exporter, traffic

    def answered(self, entry: Entry, seconds: float) -> None:
        """Counts an answer, from the device or from the cache."""
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

    def track(self, layers: Mapping[str, int]) -> None:
        """Counts these layers from now on: the number of experts by name."""
        traffic = self.traffic
        if traffic is None:
            return
        if len(layers) == 1:
            self.layers = dict.fromkeys(layers, traffic)
            return
        kept = {n: layer for n, layer in self.layers.items() if layer is not traffic}
        added = {
            name: Traffic(num_experts=experts, max_k=experts, clock=traffic.clock)
            for name, experts in layers.items()
            if name not in kept
        }
        self.layers = kept | added

    def routed(self, layer: str, entry: Entry, seconds: float) -> None:
        """Counts what one of several layers answered."""
        traffic = self.layers.get(layer)
        if traffic is not None and traffic is not self.traffic:  # `answered` has counted the latter
            load, histogram = entry.arrays["_load"], entry.arrays["_histogram"]
            traffic.answered(seconds, load=load, histogram=histogram)

    def mirror(self) -> None:
        """Copies the counts of the traffic to the exporter, once a scrape instead of each request."""
        exporter, traffic = self.exporter, self.traffic
        if exporter is None or traffic is None:
            return
        totals = traffic.totals()
        exporter.mirror("moe_requests_total", totals["answered"], "ok")
        exporter.mirror("moe_tokens_total", totals["tokens"])
        exporter.mirror_experts(totals["load"])
        exporter.mirror_histogram("moe_experts_per_token", totals["histogram"])
        for layer, part in self.layers.items():
            totals = part.totals()
            exporter.mirror("moe_layer_tokens_total", totals["tokens"], layer)
            exporter.mirror("moe_layer_assignments_total", int(totals["load"].sum()), layer)

    def refused(self, error: ServingError) -> None:
        """Counts a refused or failed request by its code."""
        if self.exporter is not None:
            self.exporter.add("moe_errors_total", label=error.code)
            self.exporter.add("moe_requests_total", label=outcome(error))

    def failed(self, seconds: float) -> None:
        """Counts a server-side failure. Client errors do not raise the error rate."""
        if self.traffic is not None:
            self.traffic.failed(seconds)

    def observe(self, name: str, value: float) -> None:
        """Adds a value to a histogram."""
        if self.exporter is not None:
            self.exporter.observe(name, value)

    def circuit(self, state: str) -> None:
        """Counts a transition of the circuit breaker."""
        if self.exporter is not None:
            self.exporter.add("moe_circuit_transitions_total", label=state)

    def relabel(self, build: dict[str, Any]) -> None:
        """Replaces the labels of ``moe_build_info`` after a reload."""
        if self.exporter is not None:
            self.exporter.set_build(build)


def outcome(error: ServingError) -> str:
    """Returns the label of ``moe_requests_total`` for a refusal.

    Example:
        >>> outcome(ServingError("rate_limited", "")), outcome(ServingError("internal", ""))
        ('rejected', 'error')
    """
    if error.code in ("rate_limited", "blocked"):
        return "rejected"
    if error.status == 503:
        return "unavailable"
    return "error" if error.status >= 500 else "client_error"
