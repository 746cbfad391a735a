"""Requests to an engine and its results: plain values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.routers import Router
from moe_jax.serving.engine.snapshot import Snapshot
from moe_jax.serving.resilience import Call


@dataclasses.dataclass(frozen=True)
class Client:
    """A client. ``id`` is a hash of its API key, else its address; ``local`` for calls in process."""

    id: str


LOCAL = Client("local")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """One request, as the caller wrote it. ``RouterEngine.infer`` describes the fields.

    Attributes:
        model: ``router``, ``moe``, a layer such as ``layer_3``, or ``layers``.
        hidden_states: [B, S, D], for ``layers`` [L, B, S, D], not yet checked.
        token_mask: bool[B, S], not yet checked, or None.
        return_router_logits: whether the answer holds the router's logits.
        client: who asks.
        request_id: for logs and the answer; None draws one.
        timeout_seconds: deadline, counted from now; None is the configured one.
        use_cache: whether a cached answer will do.
        call: releases whoever waits for the calling thread, or None.
    """

    model: str
    hidden_states: Any
    token_mask: Any = None
    return_router_logits: bool = False
    client: Client = LOCAL
    request_id: str | None = None
    timeout_seconds: float | None = None
    use_cache: bool = True
    call: Call | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A checked query, bound to the weights that answer it.

    Attributes:
        snapshot: what to run.
        model: ``router``, ``moe`` or a layer; the snapshot has it.
        x: hidden states [B, S, D], contiguous, of the dtype that was sent.
        token_mask: bool[B, S], contiguous; None where every token counts.
        logits: whether the router's logits are wanted.
        client: who asks.
        owner: id of the only client that may see the result, or "" for all.
        deadline: when the caller stops waiting, on ``time.perf_counter``.
        may_run_inline: whether the work may be done on the caller's thread, which then cannot
            leave at its deadline.
        call: releases whoever waits for the calling thread, or None.
    """

    snapshot: Snapshot
    model: str
    x: np.ndarray
    token_mask: np.ndarray | None
    logits: bool
    client: Client
    owner: str
    deadline: float
    may_run_inline: bool = False
    call: Call | None = None

    @property
    def router(self) -> Router:
        """The rule that answers."""
        return self.snapshot.router_of(self.model)

    @property
    def version(self) -> str:
        """The version of the weights that answer."""
        return self.snapshot.versions[self.model]

    @property
    def shape(self) -> tuple[int, int]:
        """B and S."""
        return self.x.shape[0], self.x.shape[1]


@dataclasses.dataclass(frozen=True)
class Result:
    """An answer.

    Attributes:
        arrays: read-only numpy arrays by output name, ``[B, S, ...]``.
        info: request_id, processing_time_ms, router_health, cached, fallback_used, degraded,
            sanitized, nonfinite_tokens, digest, model_version.
    """

    arrays: Mapping[str, np.ndarray]
    info: Mapping[str, Any]


def read_only(arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns arrays [T, ...] as read-only views [B, S, ...]."""
    out = {}
    for name, array in arrays.items():
        shaped = array.reshape(*shape, *array.shape[1:])
        shaped.flags.writeable = False
        out[name] = shaped
    return out


def guide_result(result: Result, info: dict[str, Any], *, logits: bool) -> dict[str, Any]:
    """Returns the dictionary that the production guide promises for ``route``."""
    arrays = result.arrays
    out: dict[str, Any] = {
        "expert_indices": arrays["expert_indices"],
        "expert_weights": arrays["expert_weights"],
        "num_experts_per_token": arrays["num_experts_per_token"],
        "complexity_scores": arrays["complexity_scores"],
        "routing_info": {
            **info,
            "expert_utilization": list(info["expert_utilization"]),
            "complexity_stats": dict(info["complexity_stats"]),
        },
        "production_info": dict(result.info),
    }
    if logits:
        out["router_logits"] = arrays["router_logits"]
    return out


def routing_info(arrays: Mapping[str, np.ndarray], *, min_k: int, max_k: int) -> dict[str, Any]:
    """Returns the guide's ``routing_info``, computed from the arrays of an entry.

    ``flop_reduction`` is the share of expert calls saved against ``flop_baseline``, every token at
    ``max_k``. Means and standard deviations are over real tokens.
    """
    counts, scores, load = (
        arrays[name] for name in ("num_experts_per_token", "complexity_scores", "_load")
    )
    tokens = int(arrays["_histogram"].sum())
    # Where a rule may leave a real token empty, an empty one cannot be told from a masked one.
    scored = scores if min_k == 0 or tokens == counts.size else scores[counts > 0]
    used = int(np.add.reduce(load))
    most = tokens * max_k
    return {
        "avg_experts_per_token": used / max(tokens, 1),
        "total_expert_calls": used,
        "flop_reduction": 1.0 - used / most if most else 0.0,
        "flop_baseline": f"top_max={max_k}",
        "expert_utilization": [u / max(used, 1) for u in load.tolist()],
        "complexity_stats": _spread(scored.reshape(-1) if scored.size else np.zeros(1, np.float32)),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    """Returns mean, standard deviation, minimum and maximum of f32[N]."""
    # The reductions themselves: numpy's methods go through Python, which takes three times as long.
    mean = np.add.reduce(values) / np.float32(len(values))
    deviation = values - mean
    return {
        "mean": float(mean),
        "std": math.sqrt(float(np.add.reduce(deviation * deviation)) / len(values)),
        "min": float(np.minimum.reduce(values)),
        "max": float(np.maximum.reduce(values)),
    }


def expert_counts(indices: np.ndarray, num_experts: int) -> np.ndarray:
    """Returns int64[E]: how often each expert occurs in indices i32[..., K]; -1 is no expert."""
    return np.bincount(indices.reshape(-1) + 1, minlength=num_experts + 1)[1:]
