"""The engine: admission, cache, resilience and metrics around one snapshot."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.config import Config
from moe_jax.serving import admission
from moe_jax.serving.engine.requests import LOCAL, Client, Result, guide_result, read_only
from moe_jax.serving.engine.snapshot import Snapshot, build_snapshot, load_weights
from moe_jax.serving.errors import ServingError

ROUTER_OUTPUTS = (
    "expert_indices", "expert_weights", "num_experts_per_token", "complexity_scores",
)  # fmt: skip


class RouterEngine:
    """The guide's production router: routes, watches itself, and protects itself.

    Built by ``RouterFactory``. Safe to use from many threads.

    Args:
        config: the configuration.
        clock: seconds that never go back; tests pass their own.
    """

    def __init__(self, config: Config, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.clock = clock
        self.started = clock()
        serving, security = config.serving, config.security
        self.level = admission.level_for(
            security.security_level,
            nonfinite=serving.nonfinite,
            requests_per_minute=serving.rate_limit_requests,
            tokens_per_minute=serving.rate_limit_tokens,
        )
        self._draining = False
        self._closed = False
        self._snapshot: Snapshot | None = None
        snapshot = build_snapshot(config, load_weights(config))
        for buckets in snapshot.models.values():
            buckets.warm()
        self._snapshot = snapshot
        self._limits = admission.Limits(
            width=snapshot.width,
            max_batch_size=security.max_batch_size,
            max_tensor_size=security.max_tensor_size,
            max_tokens=self.level.tokens_per_minute,
        )

    # --- admission

    def admit(self, client: Client, *, tokens: int = 0, requests: int = 1) -> None:
        """Counts a request or its tokens against the client's limits; raises ServingError."""

    def violation(self, client: Client, kind: str) -> None:
        """Counts a malformed request towards an automatic block."""

    # --- answering

    @property
    def snapshot(self) -> Snapshot:
        if self._snapshot is None:
            raise ServingError("warming", "not ready yet: compiling. Try again.", retry_after=1.0)
        return self._snapshot

    def infer(
        self,
        model: str,
        hidden_states: Any,
        *,
        token_mask: Any = None,
        return_router_logits: bool = False,
        client: Client = LOCAL,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
        use_cache: bool = True,
    ) -> Result:
        """Answers for hidden states [B, S, D]."""
        start = time.perf_counter()
        snapshot = self.snapshot
        if model not in snapshot.models:
            raise ServingError(
                "not_found", f"model: expected one of {', '.join(snapshot.models)}, got {model!r}."
            )
        admission.check_array(hidden_states, self._limits)
        batch, sequence, width = (int(s) for s in hidden_states.shape)
        x = np.ascontiguousarray(hidden_states, np.float32).reshape(-1, width)
        mask = None
        if token_mask is not None:
            mask = admission.check_mask(token_mask, hidden_states.shape).reshape(-1)
        checked = admission.check_values(
            x, mask, nonfinite=self.level.nonfinite, magnitude=self.level.magnitude,
            max_magnitude=self.config.serving.max_magnitude,
        )  # fmt: skip
        found = snapshot.models[model].run(checked.x, checked.token_mask)
        wanted = ROUTER_OUTPUTS if model == "router" else ("output",)
        if return_router_logits and model == "router":
            wanted = (*wanted, "router_logits")
        arrays = read_only({name: found[name] for name in wanted}, (batch, sequence))
        info = {
            "request_id": request_id or secrets.token_hex(8),
            "processing_time_ms": 1e3 * (time.perf_counter() - start),
            "router_health": "healthy",
            "cached": False,
            "fallback_used": False,
            "degraded": False,
            "sanitized": checked.sanitized,
            "nonfinite_tokens": checked.nonfinite_tokens,
            "digest": "",
            "model_version": snapshot.version,
        }
        return Result(arrays, info)

    def lookup(self, model: str, digest: str, *, client: Client = LOCAL) -> Result | None:
        """The cached answer with this digest, or None."""
        return None

    def route(
        self, hidden_states: Any, return_router_logits: bool = False, **options: Any
    ) -> dict[str, Any]:
        """The guide's ``route``: decisions for hidden states [B, S, D] as a dictionary."""
        result = self.infer(
            "router", hidden_states, return_router_logits=return_router_logits, **options
        )
        router = self.snapshot.router
        return guide_result(
            result, min_k=router.min_k, max_k=router.max_k, num_experts=router.num_experts,
            logits=return_router_logits,
        )  # fmt: skip

    # --- state

    def readiness(self) -> tuple[bool, list[str]]:
        """Whether requests should be sent here, and why not."""
        reasons = []
        if self._snapshot is None:
            reasons.append("warming")
        if self._draining:
            reasons.append("draining")
        return not reasons, reasons

    def live(self) -> bool:
        return not self._closed

    def describe(self, model: str) -> dict[str, Any]:
        """Metadata of a model in the words of the Open Inference Protocol."""
        snapshot = self.snapshot
        if model not in snapshot.models:
            raise ServingError(
                "not_found", f"model: expected one of {', '.join(snapshot.models)}, got {model!r}."
            )
        router = snapshot.router
        hidden = {"name": "hidden_states", "datatype": "FP32", "shape": [-1, -1, snapshot.width]}
        if model == "moe":
            outputs = [{"name": "output", "datatype": "FP32", "shape": [-1, -1, snapshot.width]}]
        else:
            outputs = [
                {"name": "expert_indices", "datatype": "INT32", "shape": [-1, -1, router.max_k]},
                {"name": "expert_weights", "datatype": "FP32", "shape": [-1, -1, router.max_k]},
                {"name": "num_experts_per_token", "datatype": "INT32", "shape": [-1, -1]},
                {"name": "complexity_scores", "datatype": "FP32", "shape": [-1, -1]},
                {
                    "name": "router_logits",
                    "datatype": "FP32",
                    "shape": [-1, -1, router.num_experts],
                },
            ]
        return {
            "name": model,
            "versions": [snapshot.version],
            "platform": "jax",
            "inputs": [hidden],
            "outputs": outputs,
        }

    def health_check(self) -> dict[str, Any]:
        ready, reasons = self.readiness()
        return {
            "status": "healthy" if ready else "degraded",
            "uptime_seconds": self.clock() - self.started,
            "components": {},
            "reasons": reasons,
            "configuration": self.config.to_json(),
            "memory": {},
            "performance": {},
        }

    def get_metrics(self) -> dict[str, Any]:
        return {"router_stats": {}, "cache_hit_ratio": 0.0}

    def diagnostics(self) -> dict[str, Any]:
        return {"health": self.health_check(), "metrics": self.get_metrics()}

    def metrics_text(self) -> bytes:
        return b""

    def begin_drain(self) -> None:
        """Readiness says no from now on; requests are still answered."""
        self._draining = True

    def shutdown(self, timeout_seconds: float | None = None) -> None:
        """Answers what is in flight, then refuses everything. Safe to call twice."""
        self._draining = True
        self._closed = True

    def __enter__(self) -> RouterEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
