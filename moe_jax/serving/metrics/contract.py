"""The metrics that the service exports, in one list.

Base units, ``_total`` on counters, no client ids in labels. The exporter is built from this list, and
tests hold the documentation, the alerts, the dashboard and the scaling rules to its names.
"""

from __future__ import annotations

import dataclasses

SECONDS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)
EXPERTS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)

# Experts beyond this many share one label, "other", so that a router of thousands stays scrapable.
MAX_EXPERT_LABELS = 64


@dataclasses.dataclass(frozen=True)
class Metric:
    """One exported metric.

    Attributes:
        name: exported name.
        kind: ``counter``, ``gauge`` or ``histogram``.
        help: one line.
        labels: label names.
        values: all values of the label, if they are a closed list.
        buckets: upper bounds of a histogram.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


OUTCOMES = ("ok", "client_error", "rejected", "unavailable", "error")
CACHE_RESULTS = ("hit", "coalesced", "miss", "bypass", "stand_aside")
PREFETCH_RESULTS = ("useful", "wasted", "failed")
CIRCUIT_STATES = ("closed", "open", "half_open")
FALLBACKS = ("cache", "host", "static_top_k")

CONTRACT: tuple[Metric, ...] = (
    Metric(
        "moe_requests_total",
        "counter",
        "Requests by outcome: ok, client_error (4xx), rejected (limits and blocks), unavailable "
        "(503), error (500 and 504).",
        ("outcome",),
        OUTCOMES,
    ),
    Metric(
        "moe_request_duration_seconds",
        "histogram",
        "From the request's arrival in the engine to its answer.",
        buckets=SECONDS,
    ),
    Metric(
        "moe_queue_duration_seconds",
        "histogram",
        "Waiting for a place on the device.",
        buckets=SECONDS,
    ),
    Metric(
        "moe_route_duration_seconds",
        "histogram",
        "Work on the device, transfers included.",
        buckets=SECONDS,
    ),
    Metric("moe_pending_requests", "gauge", "Requests that wait for a place on the device."),
    Metric("moe_inflight_requests", "gauge", "Requests on the device."),
    Metric("moe_tokens_total", "counter", "Tokens of answered requests."),
    Metric(
        "moe_expert_assignments_total",
        "counter",
        "How often each expert was used; experts from 64 on are counted as other.",
        ("expert",),
    ),
    Metric(
        "moe_experts_per_token",
        "histogram",
        "Experts used by a token.",
        buckets=EXPERTS,
    ),
    Metric(
        "moe_dropped_assignments_total",
        "counter",
        "Assignments that expert capacity dropped; this service runs dropless, so 0.",
    ),
    Metric(
        "moe_load_balance_score",
        "gauge",
        "1 / (1 + CV^2) of the experts' load in the last 5 minutes: 1 balanced, 1/E worst.",
    ),
    Metric(
        "moe_budget_drift_ratio",
        "gauge",
        "Mean experts per token in the last 5 minutes over the mean that was calibrated.",
    ),
    Metric(
        "moe_layer_tokens_total",
        "counter",
        "Tokens by the layer that routed them; a request for all layers counts in each.",
        ("layer",),
    ),
    Metric(
        "moe_layer_assignments_total",
        "counter",
        "Experts that a layer's tokens used.",
        ("layer",),
    ),
    Metric(
        "moe_layer_budget_drift_ratio",
        "gauge",
        "moe_budget_drift_ratio of each served layer.",
        ("layer",),
    ),
    Metric(
        "moe_cache_requests_total",
        "counter",
        "Looks into the cache, by result.",
        ("result",),
        CACHE_RESULTS,
    ),
    Metric("moe_cache_bytes", "gauge", "Bytes of cached results."),
    Metric(
        "moe_cache_seconds_saved_total",
        "counter",
        "Time that hits saved, before what misses cost.",
    ),
    Metric(
        "moe_prefetch_total",
        "counter",
        "Results fetched ahead, by what became of them.",
        ("result",),
        PREFETCH_RESULTS,
    ),
    Metric("moe_nonfinite_tokens_total", "counter", "Tokens that came with NaN or inf."),
    Metric(
        "moe_circuit_state",
        "gauge",
        "1 for the state that the circuit breaker is in, else 0.",
        ("state",),
        CIRCUIT_STATES,
    ),
    Metric(
        "moe_circuit_transitions_total",
        "counter",
        "Moves of the circuit breaker.",
        ("to",),
        CIRCUIT_STATES,
    ),
    Metric("moe_fallback_total", "counter", "Answers that a fallback gave.", ("kind",), FALLBACKS),
    Metric("moe_compilations_total", "counter", "XLA compilations since this engine was built."),
    Metric("moe_blocked_clients", "gauge", "Clients that are blocked now."),
    Metric("moe_errors_total", "counter", "Requests refused or failed, by code.", ("code",)),
    Metric(
        "moe_log_lines_dropped_total",
        "counter",
        "Log lines that could not be written: disk full, reader gone or not reading.",
    ),
    Metric(
        "moe_build_info",
        "gauge",
        "Always 1; the labels say what runs. params is the weights' version, or untrained-VERSION.",
        ("version", "jax", "backend", "params"),
    ),
)

NAMES = tuple(metric.name for metric in CONTRACT)
