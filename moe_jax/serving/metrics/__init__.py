"""Metrics: the contract, its exporter, recent traffic, memory and processor. Uses no JAX."""

from moe_jax.serving.metrics.contract import CONTRACT, MAX_EXPERT_LABELS, NAMES, Metric
from moe_jax.serving.metrics.export import Exporter
from moe_jax.serving.metrics.system import SystemSampler
from moe_jax.serving.metrics.window import WINDOW_SECONDS, Traffic, balance_score

__all__ = [
    "CONTRACT",
    "MAX_EXPERT_LABELS",
    "NAMES",
    "WINDOW_SECONDS",
    "Exporter",
    "Metric",
    "SystemSampler",
    "Traffic",
    "balance_score",
]
