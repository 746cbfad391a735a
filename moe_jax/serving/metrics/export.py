"""Exports the metric contract of one engine to Prometheus, in a registry of its own."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import (
    Metric as Family,
)
from prometheus_client.registry import Collector

from moe_jax.serving.metrics.contract import CONTRACT, MAX_EXPERT_LABELS

Labels = tuple[str, ...]


class Exporter(Collector):
    """Holds a value for each entry of the contract, and exports them.

    Args:
        num_experts: E, for the labels of experts.
        codes: error codes, so that each is exported as 0 before it happens.
        build: labels of ``moe_build_info``.

    Example:
        >>> exporter = Exporter(num_experts=4, codes=("internal",), build={
        ...     "version": "0", "jax": "0", "backend": "cpu", "params": "untrained-0"})
        >>> exporter.add("moe_tokens_total", 7)
        >>> b"moe_tokens_total 7.0" in exporter.text()
        True
    """

    def __init__(self, *, num_experts: int, codes: Sequence[str], build: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._histograms = {m.name: Samples(m.buckets) for m in CONTRACT if m.kind == "histogram"}
        self._values: dict[str, dict[Labels, float]] = {
            m.name: dict.fromkeys([(v,) for v in m.values] if m.labels else [()], 0.0)
            for m in CONTRACT
            if m.kind != "histogram"
        }
        self._experts = [str(e) for e in range(min(num_experts, MAX_EXPERT_LABELS))]
        if num_experts > MAX_EXPERT_LABELS:
            self._experts.append("other")
        self._values["moe_errors_total"] = dict.fromkeys([(code,) for code in codes], 0.0)
        self._values["moe_expert_assignments_total"] = dict.fromkeys(
            [(label,) for label in self._experts], 0.0
        )
        self.set_build(build)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def set_build(self, build: Mapping[str, str]) -> None:
        """Sets the labels of ``moe_build_info``; the labels before are dropped."""
        labels = next(m.labels for m in CONTRACT if m.name == "moe_build_info")
        self._values["moe_build_info"] = {tuple(build[label] for label in labels): 1.0}

    # --- values

    def add(self, name: str, amount: float = 1.0, label: str | None = None) -> None:
        """Increases a counter."""
        values, labels = self._values[name], _labels(label)
        with self._lock:
            values[labels] = values.get(labels, 0.0) + amount

    def set(self, name: str, value: float, label: str | None = None) -> None:
        """Sets a gauge."""
        self._values[name][_labels(label)] = value

    def mirror(self, name: str, total: float, label: str | None = None) -> None:
        """Raises a counter to a total that is counted elsewhere. A counter never goes back."""
        values, labels = self._values[name], _labels(label)
        with self._lock:  # of two scrapes at once, the later must not bring an older total
            values[labels] = max(values.get(labels, 0.0), total)

    def mirror_experts(self, totals: np.ndarray) -> None:
        """Raises the experts' counters to totals int[E]."""
        if len(totals) > MAX_EXPERT_LABELS:
            named = totals[:MAX_EXPERT_LABELS]
            totals = np.append(named, totals[MAX_EXPERT_LABELS:].sum())
        for label, total in zip(self._experts, totals.tolist(), strict=True):
            self.mirror("moe_expert_assignments_total", total, label)

    def observe(self, name: str, value: float) -> None:
        """Adds a value to a histogram."""
        self._histograms[name].add(value)

    def mirror_histogram(self, name: str, totals: np.ndarray) -> None:
        """Raises a histogram of whole numbers to int[K + 1]: how often 0, 1 ... K occurred."""
        self._histograms[name].mirror(totals)

    def value(self, name: str, label: str | None = None) -> float:
        """Returns the value of a counter or gauge."""
        return self._values[name].get(_labels(label), 0.0)

    # --- export

    def text(self) -> bytes:
        """Returns the exposition in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Family]:
        """Yields every metric of the contract, for the registry."""
        for metric in CONTRACT:
            if metric.kind == "histogram":
                buckets, total = self._histograms[metric.name].cumulative()
                yield HistogramMetricFamily(
                    metric.name, metric.help, buckets=buckets, sum_value=total
                )
                continue
            family: CounterMetricFamily | GaugeMetricFamily
            if metric.kind == "counter":
                # The family adds "_total" to a counter's name by itself.
                name = metric.name.removesuffix("_total")
                family = CounterMetricFamily(name, metric.help, labels=metric.labels)
            else:
                family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, value in tuple(self._values[metric.name].items()):
                family.add_metric(labels, value)
            yield family


def _labels(label: str | None) -> Labels:
    return () if label is None else (label,)


class Samples:
    """Values of one histogram, counted by bucket.

    Args:
        bounds: upper bounds of the buckets, ascending; one more bucket takes what is above.

    Example:
        >>> samples = Samples((1.0, 2.0))
        >>> for value in (0.5, 1.0, 1.5, 9.0):
        ...     samples.add(value)
        >>> samples.cumulative()
        ([('1.0', 2), ('2.0', 3), ('+Inf', 4)], 12.0)
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._names = [*map(str, self._bounds), "+Inf"]
        self._lock = threading.Lock()
        self._counts = [0] * len(self._names)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Counts one value."""
        at = bisect.bisect_left(self._bounds, value)
        with self._lock:
            self._counts[at] += 1
            self._total += value

    def mirror(self, totals: np.ndarray) -> None:
        """Takes over counts int[K + 1] of the values 0 ... K, unless they are older than its own."""
        counts, total = [0] * len(self._names), 0.0
        for value, count in enumerate(totals.tolist()):
            counts[bisect.bisect_left(self._bounds, value)] += count
            total += value * count
        with self._lock:
            if sum(counts) > sum(self._counts):
                self._counts, self._total = counts, total

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """Returns ``(bound, count of values up to it)`` for each bucket, and the sum of all values."""
        with self._lock:
            counts, total = list(self._counts), self._total
        sums: list[tuple[str, float]] = []
        count = 0
        for name, more in zip(self._names, counts, strict=True):
            count += more
            sums.append((name, count))
        return sums, total
