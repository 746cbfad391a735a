"""A quick look at a running service from outside, as after a deployment."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any  # a checkpoint and its layer have no types here: their module loads JAX

import numpy as np

from moe_jax.serving.http.client import Refused, Service, Unreachable

_METRICS = (
    "moe_requests_total",
    "moe_request_duration_seconds",
    "moe_circuit_state",
    "moe_build_info",
)


def check(
    url: str,
    *,
    key: str | None = None,
    admin_key: str | None = None,
    checkpoint: Path | None = None,
    router_name: str | None = None,
) -> list[dict[str, Any]]:
    """Runs every check: ``{"check", "ok", "detail"}`` each.

    Where nothing answers, or the service still warms up, the remaining checks are not tried.

    Args:
        url: where the service is.
        key: API key, where it asks for one.
        admin_key: for metrics under strict; None sends ``key``.
        checkpoint: what the service should be serving; its routing of a batch is worked out here and
            compared. None compares with nothing.
        router_name: which of the checkpoint's routers; None is the one that the service says it serves.

    Raises:
        ValueError: no such URL, or no such checkpoint.
    """
    service = Service(url, key=key, timeout_seconds=30.0)
    admin = Service(url, key=admin_key or key, timeout_seconds=30.0)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("live", lambda: _status(service, "/v2/health/live")),
        ("ready", lambda: _ready(service)),
        ("health", lambda: str(service.get_json("/health")["status"])),
        ("routes a batch", lambda: _routes(service)),
        ("metrics", lambda: _metrics(admin, admin_key)),
    ]
    if checkpoint is not None:
        from moe_jax.checkpoint import open_checkpoint  # loads JAX, which no other check needs

        opened = open_checkpoint(checkpoint)
        opened.router_name(router_name)  # a wrong name is wrong input, not a failed check
        served = functools.partial(_served_layer, service, opened, router_name)
        checks.append(("routes as the checkpoint", lambda: _as_expected(service, served())))
    results: list[dict[str, Any]] = []
    reached = True
    for name, run in checks:
        if not reached:
            results.append({"check": name, "ok": False, "detail": "not tried"})
            continue
        try:
            results.append({"check": name, "ok": True, "detail": run()})
        except (Refused, Unreachable, ValueError, AssertionError) as error:
            results.append({"check": name, "ok": False, "detail": str(error)})
            # The other checks would only say so again: nothing answers, or nothing is served yet.
            nothing = name == "live" and isinstance(error, Unreachable)
            reached = not (nothing or isinstance(error, _StillWarming))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            detail = (
                f"expected the answer of this service, got another ({error!r}). Correct the URL."
            )
            results.append({"check": name, "ok": False, "detail": detail})
    return results


class _StillWarming(AssertionError):
    """The service has not finished its start."""


def _status(service: Service, path: str) -> str:
    status, _, _ = service.request("GET", path)
    _hold(status == 200, f"{path}: expected status 200, got {status}")
    return "yes"


def _ready(service: Service) -> str:
    status, _, body = service.request("GET", "/ready")
    if status == 503 and _is_warming(body):
        raise _StillWarming(
            "the service is still warming: it loads and compiles. Run smoke again once it is ready; "
            "the log line engine_ready says so"
        )
    _hold(status == 200, f"expected ready, got {body[:200].decode(errors='replace')}")
    return "yes"


def _is_warming(body: bytes) -> bool:
    try:
        return json.loads(body)["reasons"] == ["warming"]
    except (ValueError, KeyError, TypeError):  # of something else, such as a proxy
        return False


def _routes(service: Service) -> str:
    width, experts = service.sizes("router")
    x = np.random.default_rng(0).standard_normal((2, 8, width), dtype=np.float32)
    started = time.perf_counter()
    arrays, facts = service.infer("router", {"hidden_states": x})
    milliseconds = 1e3 * (time.perf_counter() - started)
    counts, indices = arrays["num_experts_per_token"], arrays["expert_indices"]
    weights = arrays["expert_weights"]
    _hold(counts.shape == (2, 8), f"expected counts [2, 8], got {list(counts.shape)}")
    _hold(((indices >= 0).sum(axis=-1) == counts).all(), "indices and counts differ")
    _hold(((indices >= -1) & (indices < experts)).all(), "indices out of range")
    # Their sum is the rule's affair: not every rule renormalises.
    _hold(np.isfinite(weights).all() and (weights >= 0).all(), "weights not finite or negative")
    _hold((weights[indices < 0] == 0).all(), "weights where there is no expert")
    kind = " (degraded)" if facts.get("degraded") else ""
    # Random input has no tokens of the model's text: its mean k says nothing about the budget.
    return f"16 random tokens, {counts.mean():.2f} experts each, {milliseconds:.1f} ms{kind}"


def _served_layer(service: Service, opened: Any, name: str | None) -> Any:
    """The router of the checkpoint that is meant; None is the one that the service says it serves."""
    if name is None:
        name = service.get_json("/health")["components"]["router"].get("layer")
    return opened.layer(name)


def _as_expected(service: Service, layer: Any) -> str:
    """The service's answer against the checkpoint's own router, token by token."""
    width, _ = service.sizes("router")
    x = np.random.default_rng(1).standard_normal((2, 64, width), dtype=np.float32)
    wanted: Any = layer.route(x.reshape(-1, width))
    outputs = service.infer("router", {"hidden_states": x})[0]
    _hold(hasattr(wanted, "expert_indices"), "the checkpoint's rule lets experts choose tokens")
    experts = int(layer.router.num_experts)
    indices, weights = np.asarray(wanted.expert_indices), np.asarray(wanted.combine_weights)
    ours = _by_expert(indices, weights, experts)
    theirs = _by_expert(outputs["expert_indices"], outputs["expert_weights"], experts)
    other = ((ours > 0) != (theirs > 0)).any(axis=-1)
    _hold(not other.any(), f"{int(other.sum())} of {len(other)} tokens go to other experts")
    worst = float(np.abs(ours - theirs).max())
    _hold(worst <= 1e-5, f"weights differ by up to {worst:.2g}, expected 1e-05 at most")
    return f"{layer.name}: {len(other)} random tokens, weights within {worst:.1g}"


def _by_expert(indices: np.ndarray, weights: np.ndarray, experts: int) -> np.ndarray:
    """Weights f[T, E] from slots, whatever their order; -1 and E are no expert."""
    flat, slot_weights = (
        indices.reshape(-1, indices.shape[-1]),
        weights.reshape(-1, weights.shape[-1]),
    )
    table = np.zeros((len(flat), experts + 1), np.float64)
    slots = np.where((flat < 0) | (flat >= experts), experts, flat)
    np.add.at(table, (np.arange(len(flat))[:, None], slots), slot_weights)
    return table[:, :experts]


def _metrics(service: Service, key: str | None) -> str:
    status, _, body = service.request("GET", "/metrics")
    if status == 401 and key is None:
        _hold(False, "/metrics: needs the admin key: --admin-key KEY, or MOE_ADMIN_KEY")
    _hold(status != 401, "/metrics: the key that was sent is not the admin key of this service")
    _hold(status == 200, f"/metrics: expected status 200, got {status}")
    text = body.decode(errors="replace")
    missing = [name for name in _METRICS if name not in text]
    _hold(not missing, f"expected {', '.join(missing)}, got none")
    return f"{sum(1 for line in text.splitlines() if line and line[0] != '#')} series"


def _hold(true: Any, otherwise: str) -> None:
    if not true:
        raise AssertionError(otherwise)
