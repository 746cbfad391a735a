"""Reports of an engine's state: health, metrics, the Prometheus exposition, diagnostics."""

from __future__ import annotations

import platform
import sys
import threading
from importlib import metadata as distributions
from typing import Any

import jax

import moe_jax
from moe_jax.checkpoint.layers import natural_order
from moe_jax.routers import RandomSkip
from moe_jax.serving.engine import alerts
from moe_jax.serving.engine.parts import Parts
from moe_jax.serving.engine.recorder import Recorder
from moe_jax.serving.engine.results import Results
from moe_jax.serving.engine.served import Served
from moe_jax.serving.engine.snapshot import Snapshot
from moe_jax.serving.engine.weights import Weights
from moe_jax.serving.errors import CODES
from moe_jax.serving.metrics import NAMES

# Longer work than this, or failures for longer, mean a device that only a restart may bring back.
WATCHDOG_SECONDS = 120.0

_QUIET: dict[str, Any] = {
    "requests": 0,
    "errors": 0,
    "error_rate": 0.0,
    "requests_per_second": 0.0,
    "tokens_per_second": 0.0,
    "p50_ms": 0.0,
    "p95_ms": 0.0,
    "p99_ms": 0.0,
    "batches": 0,
    "tokens": 0,
    "load_balance_score": 1.0,
    "mean_experts_per_token": 0.0,
}
_PERFORMANCE = (
    "requests",
    "error_rate",
    "requests_per_second",
    "tokens_per_second",
    "p50_ms",
    "p95_ms",
    "p99_ms",
    "load_balance_score",
)
_PACKAGES = (
    "moe_jax",
    "jax",
    "jaxlib",
    "numpy",
    "prometheus-client",
    "structlog",
    "limits",
    "cachetools",
    "xxhash",
    "blake3",
    "psutil",
    "redis",
    "starlette",
    "uvicorn",
)


def recent(parts: Parts) -> dict[str, Any]:
    """Returns the traffic of the last minutes, or zeros where monitoring is off."""
    return dict(_QUIET) if parts.recorder.traffic is None else parts.recorder.traffic.recent()


def readiness(parts: Parts, served: Served) -> tuple[bool, list[str]]:
    """Returns whether requests should be sent to this engine, and if not, why not."""
    reasons = []
    if served.current is None:
        reasons.append(served.reason)
    if parts.lifecycle.draining:
        reasons.append("draining")
    if parts.breaker.state == "open" and not parts.breaker.would_admit():
        reasons.append("circuit_open")
    if parts.bulkhead.full:
        reasons.append("overloaded")
    return not reasons, reasons


def live(parts: Parts) -> bool:
    """Returns False if the device is stuck or has failed for so long that a restart may help."""
    limit = max(WATCHDOG_SECONDS, 2 * parts.config.serving.request_timeout_seconds)
    stuck = parts.bulkhead.oldest_seconds() > limit
    return not stuck and parts.device.failing_seconds <= limit


def check_alerts(parts: Parts) -> list[dict[str, Any]]:
    """Returns the active alerts, and logs those that fire or clear."""
    firing = alerts.firing(recent(parts), parts.system.report(), parts.breaker.state)
    return parts.alerts.update(firing)


def health(parts: Parts, results: Results, served: Served) -> dict[str, Any]:
    """Returns the guide's health report.

    ``status`` is ``unhealthy`` if a restart would help or nothing can be served, ``degraded`` if
    something is wrong that may pass by itself, else ``healthy``.
    """
    results.refresh()
    parts.access.limiter.refresh()
    ready, reasons = readiness(parts, served)
    active = check_alerts(parts)
    components = _components(parts, results, served)
    wrong = any(c["status"] not in ("ok", "off", "untrained") for c in components.values())
    if not live(parts) or (served.current is None and served.load_error is not None):
        status = "unhealthy"
    elif active or wrong or not ready:
        status = "degraded"
    else:
        status = "healthy"
    now = recent(parts)
    return {
        "status": status,
        "live": live(parts),
        "ready": ready,
        "reasons": reasons,
        "uptime_seconds": parts.clock() - parts.started,
        "components": components,
        "configuration": _configuration(parts, served.current),
        "memory": parts.system.report(),
        "performance": {name: now[name] for name in _PERFORMANCE},
        "alerts": active,
    }


def _configuration(parts: Parts, snapshot: Snapshot | None) -> dict[str, Any]:
    """Returns the configuration in force.

    A checkpoint has its own rule and sizes: ``router_config`` then holds these sizes, and
    ``superseded`` the configured values that are not in force.
    """
    report = {"valid": True, "hash": parts.config.config_hash, **parts.config.to_json()}
    if snapshot is None or not snapshot.trained:
        return report
    sizes, configured = snapshot.served_as(), report["router_config"]
    superseded = {n: value for n, value in configured.items() if value != sizes.get(n)}
    return {**report, "router_config": sizes, "superseded": {"router_config": superseded}}


def _components(parts: Parts, results: Results, served: Served) -> dict[str, dict[str, Any]]:
    components: dict[str, dict[str, Any]] = {}
    snapshot = served.current
    if snapshot is None:
        status = "failed" if served.load_error else "warming"
        components["router"] = {"status": status, "error": served.load_error}
    else:
        fit = getattr(snapshot.weights.state, "fit", None)
        components["router"] = {
            "status": "ok" if snapshot.trained else "untrained",
            "trained": snapshot.trained,
            "source": snapshot.weights.source,
            **snapshot.ids(),
            "rule": type(snapshot.router).__name__,
            "layer": snapshot.weights.name,
            "chosen_by": snapshot.weights.chosen_by,
            "control": isinstance(snapshot.router, RandomSkip),
            "layers": list(snapshot.weights.names),
            "models": sorted(snapshot.names, key=natural_order),
            "served_layers": {
                name: _layer(layer, snapshot.versions[name])
                for name, layer in snapshot.weights.layers.items()
            },
            **snapshot.served_as(),
            "calibration": None if fit is None else fit.describe(),
        }
    components["device"] = {
        "status": "ok" if parts.device.failing_seconds == 0 else "failing",
        "backend": jax.default_backend(),
        "devices": len(jax.devices()),
        "inflight": parts.bulkhead.inflight,
        "pending": parts.bulkhead.pending,
        "oldest_seconds": parts.bulkhead.oldest_seconds(),
    }
    state = parts.breaker.state
    components["circuit_breaker"] = {"status": "ok" if state == "closed" else state, "state": state}
    if results.cache is None:
        components["cache"] = {"status": "off"}
    else:
        shared = results.cache.shared
        lost = shared is not None and not shared.ok
        components["cache"] = {
            "status": "redis_lost" if lost else "ok",
            "standing_aside": results.cache.gain.aside,
            "entries": len(results.cache),
        }
    if parts.level.requests_per_minute is None:
        limiter_status = "off"
    else:
        limiter_status = "redis_lost" if parts.access.limiter.redis_ok is False else "ok"
    components["rate_limiter"] = {
        "status": limiter_status,
        "requests_per_minute": parts.level.requests_per_minute,
        "tokens_per_minute": parts.level.tokens_per_minute,
        "shared": bool(parts.access.limiter.redis_ok),
        "blocked_clients": parts.access.blocks.blocked,
    }
    if parts.log_failure:
        monitoring = "losing_log_lines"
    else:
        monitoring = "off" if parts.recorder.traffic is None else "ok"
    components["monitoring"] = {
        "status": monitoring,
        "log_error": parts.log_failure or None,
        "log_lines_dropped": parts.log_lines_dropped,
    }
    components["security"] = {"status": "ok", "level": parts.level.name}
    return components


def _layer(weights: Weights, version: str) -> dict[str, Any]:
    """Describes one of several served layers."""
    fit = getattr(weights.state, "fit", None)
    return {
        "version": version,
        "rule": type(weights.router).__name__,
        "num_experts": weights.router.num_experts,
        "min_k": weights.router.min_k,
        "max_k": weights.router.max_k,
        "target_mean_k": _target(weights),
        "calibrated": fit is not None,
    }


def metrics_report(parts: Parts, results: Results) -> dict[str, Any]:
    """Returns the guide's metrics as plain JSON values; ``router_stats`` counts since the start."""
    report = {} if results.cache is None else results.cache.report()
    traffic = parts.recorder.traffic
    out: dict[str, Any] = {
        "monitoring": traffic is not None,
        "router_stats": {} if traffic is None else traffic.router_stats(),
        "cache_hit_ratio": report.get("hit_ratio", 0.0),
        "cache_hit_ratio_recent": report.get("hit_ratio_recent", 0.0),
        "cache": report or None,
        "prefetch": None
        if results.prefetcher is None
        else {**results.prefetcher.counts, "off": results.prefetcher.off},
        "circuit_state": parts.breaker.state,
        "pending_requests": parts.bulkhead.pending,
        "inflight_requests": parts.bulkhead.inflight,
        "compilations": parts.compilations,
        "blocked_clients": parts.access.blocks.blocked,
        "system": parts.system.report(),
        "alerts": check_alerts(parts),
    }
    if traffic is not None:
        now = traffic.recent()
        totals = traffic.totals()
        out["requests"] = {name: totals[name] for name in ("answered", "failed")}
        out["recent"] = now
        out["latency_ms"] = {"p50": now["p50_ms"], "p95": now["p95_ms"], "p99": now["p99_ms"]}
        out["throughput"] = {
            "requests_per_second": now["requests_per_second"],
            "tokens_per_second": now["tokens_per_second"],
        }
        out["errors_by_code"] = errors_by_code(parts)
    return out


def errors_by_code(parts: Parts) -> dict[str, int]:
    """Returns how many requests failed or were refused, for each code that occurred."""
    exporter = parts.recorder.exporter
    if exporter is None:
        return {}
    counts = {code: int(exporter.value("moe_errors_total", code)) for code in CODES}
    return {code: count for code, count in counts.items() if count}


def exposition(parts: Parts, results: Results, served: Served) -> bytes:
    """Returns the metrics in Prometheus' text format."""
    exporter = parts.recorder.exporter
    if exporter is None:
        return b"# Monitoring is off (MOE_ENABLE_MONITORING=false) or the engine is warming.\n"
    parts.recorder.mirror()
    exporter.set("moe_pending_requests", parts.bulkhead.pending)
    exporter.set("moe_inflight_requests", parts.bulkhead.inflight)
    exporter.set("moe_blocked_clients", parts.access.blocks.blocked)
    for state in ("closed", "open", "half_open"):
        exporter.set("moe_circuit_state", float(parts.breaker.state == state), state)
    now = recent(parts)
    exporter.set("moe_load_balance_score", now["load_balance_score"])
    exporter.set("moe_budget_drift_ratio", budget_drift(served.current, parts.recorder))
    if served.current is not None:
        for layer, traffic in parts.recorder.layers.items():
            weights = served.current.layers.get(layer)
            if weights is not None:
                drift = _drift([(traffic.recent(), _target(weights))])
                exporter.set("moe_layer_budget_drift_ratio", drift, layer)
    exporter.mirror("moe_compilations_total", parts.compilations)
    exporter.mirror("moe_log_lines_dropped_total", parts.log_lines_dropped)
    if results.cache is not None:
        exporter.set("moe_cache_bytes", results.cache.nbytes)
        exporter.mirror("moe_cache_seconds_saved_total", results.cache.gain.saved)
        for result, count in dict(results.cache.results).items():
            exporter.mirror("moe_cache_requests_total", count, result)
    if results.prefetcher is not None:
        for result, count in dict(results.prefetcher.counts).items():
            exporter.mirror("moe_prefetch_total", count, result)
    return exporter.text()


def budget_drift(snapshot: Snapshot | None, recorder: Recorder) -> float:
    """Returns the mean number of experts per token of recent traffic over the intended mean.

    The intended mean is that of the layers that the traffic asked for, weighted by their tokens. The
    ratio is 1 without traffic.
    """
    if snapshot is None or recorder.traffic is None:
        return 1.0
    layers = snapshot.layers
    recent = {name: traffic.recent() for name, traffic in recorder.layers.items()}
    return _drift([(recent[n], _target(layer)) for n, layer in layers.items() if n in recent])


def _target(weights: Weights) -> float:
    """Returns the calibrated mean k, or the middle of ``min_k`` and ``max_k`` without a calibration."""
    fit = getattr(weights.state, "fit", None)
    target = float(fit.target_mean_k) if fit is not None else 0.0
    return target or (weights.router.min_k + weights.router.max_k) / 2


def _drift(layers: list[tuple[dict[str, Any], float]]) -> float:
    """Returns the used over the intended number of experts, from recent traffic and mean by layer."""
    used = sum(now["tokens"] * now["mean_experts_per_token"] for now, _ in layers)
    intended = sum(now["tokens"] * target for now, target in layers)
    return used / intended if intended else 1.0


def diagnostics(parts: Parts, results: Results, served: Served) -> dict[str, Any]:
    """Returns the state of an engine for support: plain JSON values, no secrets, no tensors."""
    snapshot = served.current
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = distributions.version(name)
        except distributions.PackageNotFoundError:
            versions[name] = None
    return {
        "library": {"version": moe_jax.__version__, "packages": versions},
        "machine": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "argv0": sys.argv[0].rsplit("/", 1)[-1],
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "devices": [device.device_kind for device in jax.devices()],
        },
        "router": None if snapshot is None else snapshot.router.to_json(),
        "buckets": None if snapshot is None else list(snapshot.models["router"].sizes),
        "level": {f: getattr(parts.level, f) for f in parts.level.__dataclass_fields__},
        "secrets_set": {
            "api_keys": bool(parts.access.keys),
            "admin_key": bool(parts.config.serving.admin_key),
            "redis_url": bool(parts.config.serving.redis_url),
        },
        "metrics_contract": list(NAMES),
        "health": health(parts, results, served),
        "metrics": metrics_report(parts, results),
    }
