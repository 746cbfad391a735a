"""What an engine says of itself: health, metrics, metadata, the hand-over bundle."""

from __future__ import annotations

import platform
import sys
import threading
from importlib import metadata as distributions
from typing import TYPE_CHECKING, Any

import jax

import moe_jax
from moe_jax.serving.engine import alerts
from moe_jax.serving.engine.snapshot import Snapshot
from moe_jax.serving.errors import CODES
from moe_jax.serving.metrics import NAMES

if TYPE_CHECKING:
    from moe_jax.serving.engine.core import RouterEngine

_QUIET = {
    "requests": 0, "errors": 0, "error_rate": 0.0, "requests_per_second": 0.0,
    "tokens_per_second": 0.0, "p50_ms": 0.0, "p95_ms": 0.0, "p99_ms": 0.0, "batches": 0,
    "tokens": 0, "load_balance_score": 1.0, "mean_experts_per_token": 0.0,
}  # fmt: skip


def recent(engine: RouterEngine) -> dict[str, Any]:
    """Traffic of the last minutes; all quiet where monitoring is off."""
    return dict(_QUIET) if engine.recorder.traffic is None else engine.recorder.traffic.recent()


def check_alerts(engine: RouterEngine) -> list[dict[str, Any]]:
    found = alerts.firing(recent(engine), engine.system.report(), engine.breaker.state)
    return engine.alerts.update(found)


def health(engine: RouterEngine) -> dict[str, Any]:
    """``status`` is unhealthy where restarting would help or nothing can be served, degraded where
    something is wrong that passes, else healthy."""
    ready, reasons = engine.readiness()
    active = check_alerts(engine)
    snapshot = engine._snapshot
    components = _components(engine, snapshot)
    wrong = any(c["status"] not in ("ok", "off", "untrained") for c in components.values())
    if not engine.live() or "params_missing" in reasons:
        status = "unhealthy"
    elif active or wrong or not ready:
        status = "degraded"
    else:
        status = "healthy"
    now = recent(engine)
    return {
        "status": status,
        "live": engine.live(),
        "ready": ready,
        "reasons": reasons,
        "uptime_seconds": engine.clock() - engine.started,
        "components": components,
        "configuration": {"valid": True, "hash": engine._config_hash, **engine.config.to_json()},
        "memory": engine.system.report(),
        "performance": {
            name: now[name]
            for name in (
                "requests", "error_rate", "requests_per_second", "tokens_per_second", "p50_ms",
                "p95_ms", "p99_ms", "load_balance_score",
            )
        },
        "alerts": active,
    }  # fmt: skip


def _components(engine: RouterEngine, snapshot: Snapshot | None) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if snapshot is None:
        status = "failed" if engine.load_error else "warming"
        found["router"] = {"status": status, "error": engine.load_error}
    else:
        fit = getattr(snapshot.weights.state, "fit", None)
        found["router"] = {
            "status": "ok" if snapshot.trained else "untrained",
            "trained": snapshot.trained,
            "source": snapshot.weights.source,
            "version": snapshot.version,
            "rule": type(snapshot.router).__name__,
            "models": sorted(snapshot.models),
            **snapshot.served_as(),
            "calibration": None if fit is None else fit.describe(),
        }
    found["device"] = {
        "status": "ok" if engine.device.failing_seconds == 0 else "failing",
        "backend": jax.default_backend(),
        "devices": len(jax.devices()),
        "inflight": engine.bulkhead.inflight,
        "pending": engine.bulkhead.pending,
        "oldest_seconds": engine.bulkhead.oldest_seconds(),
    }
    state = engine.breaker.state
    found["circuit_breaker"] = {"status": "ok" if state == "closed" else state, "state": state}
    if engine.cache is None:
        found["cache"] = {"status": "off"}
    else:
        shared = engine.cache.shared
        lost = shared is not None and not shared.ok
        found["cache"] = {
            "status": "redis_lost" if lost else "ok",
            "standing_aside": engine.cache.gain.aside,
            "entries": len(engine.cache),
        }
    limited = engine.level.requests_per_minute is not None
    found["rate_limiter"] = {
        "status": "off" if not limited else "ok" if engine.gate.limiter.redis_ok is not False else
        "redis_lost",
        "requests_per_minute": engine.level.requests_per_minute,
        "tokens_per_minute": engine.level.tokens_per_minute,
        "shared": bool(engine.gate.limiter.redis_ok),
        "blocked_clients": engine.gate.blocks.blocked,
    }  # fmt: skip
    found["monitoring"] = {"status": "off" if engine.recorder.traffic is None else "ok"}
    found["security"] = {"status": "ok", "level": engine.level.name}
    return found


def metrics_report(engine: RouterEngine) -> dict[str, Any]:
    """Plain JSON values. ``router_stats`` counts answered requests since the start."""
    report = {} if engine.cache is None else engine.cache.report()
    traffic = engine.recorder.traffic
    out: dict[str, Any] = {
        "monitoring": traffic is not None,
        "router_stats": {} if traffic is None else traffic.router_stats(),
        "cache_hit_ratio": report.get("hit_ratio", 0.0),
        "cache_hit_ratio_recent": report.get("hit_ratio_recent", 0.0),
        "cache": report or None,
        "prefetch": None
        if engine._prefetcher is None
        else {**engine._prefetcher.counts, "off": engine._prefetcher.off},
        "circuit_state": engine.breaker.state,
        "pending_requests": engine.bulkhead.pending,
        "inflight_requests": engine.bulkhead.inflight,
        "compilations": engine.compilations,
        "blocked_clients": engine.gate.blocks.blocked,
        "system": engine.system.report(),
        "alerts": check_alerts(engine),
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
        out["errors_by_code"] = errors_by_code(engine)
    return out


def errors_by_code(engine: RouterEngine) -> dict[str, int]:
    exporter = engine.recorder.exporter
    if exporter is None:
        return {}
    counts = {code: int(exporter.value("moe_errors_total", code)) for code in CODES}
    return {code: count for code, count in counts.items() if count}


def exposition(engine: RouterEngine) -> bytes:
    exporter = engine.recorder.exporter
    if exporter is None:
        return b"# Monitoring is off (MOE_ENABLE_MONITORING=false) or the engine is warming.\n"
    engine.recorder.mirror()
    exporter.set("moe_pending_requests", engine.bulkhead.pending)
    exporter.set("moe_inflight_requests", engine.bulkhead.inflight)
    exporter.set("moe_blocked_clients", engine.gate.blocks.blocked)
    for state in ("closed", "open", "half_open"):
        exporter.set("moe_circuit_state", float(engine.breaker.state == state), state)
    now = recent(engine)
    exporter.set("moe_load_balance_score", now["load_balance_score"])
    exporter.set("moe_budget_drift_ratio", budget_drift(engine, now))
    exporter.mirror("moe_compilations_total", engine.compilations)
    if engine.cache is not None:
        exporter.set("moe_cache_bytes", engine.cache.nbytes)
        exporter.mirror("moe_cache_seconds_saved_total", engine.cache.gain.saved)
        for result, count in dict(engine.cache.results).items():
            exporter.mirror("moe_cache_requests_total", count, result)
    if engine._prefetcher is not None:
        for result, count in dict(engine._prefetcher.counts).items():
            exporter.mirror("moe_prefetch_total", count, result)
    return exporter.text()


def budget_drift(engine: RouterEngine, now: dict[str, Any]) -> float:
    """Mean k of recent traffic over the calibrated one (else the middle of min and max); 1 if quiet."""
    snapshot = engine._snapshot
    if snapshot is None or not now["tokens"]:
        return 1.0
    fit = getattr(snapshot.weights.state, "fit", None)
    target = float(fit.target_mean_k) if fit is not None else 0.0
    router = snapshot.router
    return now["mean_experts_per_token"] / (target or (router.min_k + router.max_k) / 2)


def metadata(snapshot: Snapshot, model: str) -> dict[str, Any]:
    """A model in the words of the Open Inference Protocol; -1 is any size."""
    router, width = snapshot.router, snapshot.width
    if model == "moe":
        outputs = [("output", "FP32", [-1, -1, width])]
    else:
        outputs = [
            ("expert_indices", "INT32", [-1, -1, router.max_k]),
            ("expert_weights", "FP32", [-1, -1, router.max_k]),
            ("num_experts_per_token", "INT32", [-1, -1]),
            ("complexity_scores", "FP32", [-1, -1]),
            ("router_logits", "FP32", [-1, -1, router.num_experts]),
        ]
    return {
        "name": model,
        "versions": [snapshot.version],
        "platform": "jax",
        "inputs": [{"name": "hidden_states", "datatype": "FP32", "shape": [-1, -1, width]}],
        "outputs": [{"name": n, "datatype": d, "shape": s} for n, d, s in outputs],
    }


def diagnostics(engine: RouterEngine) -> dict[str, Any]:
    snapshot = engine._snapshot
    names = (
        "moe_jax", "jax", "jaxlib", "numpy", "prometheus-client", "structlog", "limits",
        "cachetools", "xxhash", "blake3", "psutil", "redis", "starlette", "uvicorn",
    )  # fmt: skip
    versions = {}
    for name in names:
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
        "level": {f: getattr(engine.level, f) for f in engine.level.__dataclass_fields__},
        "secrets_set": {
            "api_keys": bool(engine.gate.keys),
            "admin_key": bool(engine.config.serving.admin_key),
            "redis_url": bool(engine.config.serving.redis_url),
        },
        "metrics_contract": list(NAMES),
        "health": health(engine),
        "metrics": metrics_report(engine),
    }
