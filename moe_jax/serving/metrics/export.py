"""The contract as Prometheus metrics of one engine, in a registry of its own."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import prometheus_client as prometheus
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from moe_jax.serving.metrics.contract import CONTRACT, MAX_EXPERT_LABELS, Metric

prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]

_KINDS: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class Exporter:
    """Holds one Prometheus metric for each entry of the contract.

    Args:
        num_experts: E, for the labels of experts.
        codes: error codes, so that each is there at 0 before it happens.
        build: labels of ``moe_build_info``.

    Example:
        >>> exporter = Exporter(num_experts=4, codes=("internal",), build={
        ...     "version": "0", "jax": "0", "backend": "cpu", "params": "untrained-0"})
        >>> exporter.add("moe_tokens_total", 7)
        >>> b"moe_tokens_total 7.0" in exporter.text()
        True
    """

    def __init__(self, *, num_experts: int, codes: Sequence[str], build: Mapping[str, str]) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Any] = {m.name: self._made(m) for m in CONTRACT}
        self._children: dict[tuple[str, str], Any] = {}
        self._mirrored: dict[tuple[str, str | None], float] = {}
        self._mirroring = threading.Lock()
        self._samples = {m.name: Samples(m.buckets) for m in CONTRACT if m.kind == "histogram"}
        ProcessCollector(registry=self.registry)
        for metric in CONTRACT:
            for value in metric.values:
                self._child(metric.name, value)
        for code in codes:
            self._child("moe_errors_total", code)
        named = min(num_experts, MAX_EXPERT_LABELS)
        self._experts = [str(e) for e in range(named)]
        if num_experts > MAX_EXPERT_LABELS:
            self._experts.append("other")
        for label in self._experts:
            self._child("moe_expert_assignments_total", label)
        self.set_build(build)

    def _made(self, metric: Metric) -> Any:
        # The client adds "_total" to a counter's name by itself.
        name = metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name
        extra = {"buckets": metric.buckets} if metric.kind == "histogram" else {}
        kind = _KINDS[metric.kind]
        return kind(name, metric.help, metric.labels, registry=self.registry, **extra)

    def _child(self, name: str, label: str | None) -> Any:
        if label is None:
            return self._metrics[name]
        child = self._children.get((name, label))
        if child is None:
            child = self._children[name, label] = self._metrics[name].labels(label)
        return child

    def set_build(self, build: Mapping[str, str]) -> None:
        """Says what runs; the labels of what ran before are dropped."""
        info = self._metrics["moe_build_info"]
        info.clear()
        info.labels(**build).set(1)

    def add(self, name: str, amount: float = 1.0, label: str | None = None) -> None:
        """Raises a counter."""
        self._child(name, label).inc(amount)

    def observe(self, name: str, value: float) -> None:
        """Adds to a histogram, as the next scrape sees it."""
        self._samples[name].add(value)

    def mirror_histogram(self, name: str, totals: np.ndarray) -> None:
        """Brings a histogram of whole numbers to int[K + 1]: how often 0, 1 ... K was seen."""
        histogram = self._metrics[name]
        bounds = np.asarray(histogram._upper_bounds)
        with self._mirroring:
            for value, count in enumerate(totals.tolist()):
                before = self._mirrored.get((name, str(value)), 0.0)
                if count > before:
                    self._mirrored[name, str(value)] = count
                    bucket = int(np.searchsorted(bounds, value, side="left"))
                    histogram._buckets[bucket].inc(count - before)
                    histogram._sum.inc(value * (count - before))

    def set(self, name: str, value: float, label: str | None = None) -> None:
        """Sets a gauge."""
        self._child(name, label).set(value)

    def mirror(self, name: str, total: float, label: str | None = None) -> None:
        """Raises a counter to a total that is kept elsewhere."""
        with self._mirroring:  # two scrapes at once must not both add the difference
            before = self._mirrored.get((name, label), 0.0)
            if total > before:
                self._mirrored[name, label] = total
                self._child(name, label).inc(total - before)

    def mirror_experts(self, totals: np.ndarray) -> None:
        """Brings the experts' counters to int[E]."""
        if len(totals) > MAX_EXPERT_LABELS:
            named = totals[:MAX_EXPERT_LABELS]
            totals = np.append(named, totals[MAX_EXPERT_LABELS:].sum())
        for label, total in zip(self._experts, totals.tolist(), strict=True):
            self.mirror("moe_expert_assignments_total", total, label)

    def value(self, name: str, label: str | None = None) -> float:
        """What a counter or gauge stands at."""
        return float(self._child(name, label)._value.get())

    def text(self) -> bytes:
        """The exposition in Prometheus' text format."""
        for name, samples in self._samples.items():
            self._bring(name, samples)
        return prometheus.generate_latest(self.registry)

    def _bring(self, name: str, samples: Samples) -> None:
        histogram = self._metrics[name]
        counts, total = samples.take()
        for bucket, count in zip(histogram._buckets, counts, strict=True):
            bucket.inc(count)
        histogram._sum.inc(total)


class Samples:
    """Observations since they were last taken, by bucket: what a request pays for a histogram.

    Args:
        bounds: upper bounds of the buckets, ascending; one more takes what is above.

    Example:
        >>> samples = Samples((1.0, 2.0))
        >>> for value in (0.5, 1.0, 1.5, 9.0):
        ...     samples.add(value)
        >>> samples.take()
        ([2, 1, 1], 12.0)
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        at = bisect.bisect_left(self._bounds, value)
        with self._lock:
            self._counts[at] += 1
            self._total += value

    def take(self) -> tuple[list[int], float]:
        """Counts of the buckets and the sum of values; both start again at 0."""
        with self._lock:
            taken = self._counts, self._total
            self._clear()
        return taken
