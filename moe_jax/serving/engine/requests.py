"""What goes into the engine and what comes out of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Client:
    """Who asks: ``id`` is a hash of the API key, else the peer's address; ``local`` in process."""

    id: str


LOCAL = Client("local")


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
    """Arrays [T, ...] as read-only [B, S, ...]."""
    out = {}
    for name, array in arrays.items():
        shaped = array.reshape(*shape, *array.shape[1:])
        shaped.flags.writeable = False
        out[name] = shaped
    return out


def guide_result(result: Result, info: dict[str, Any], *, logits: bool) -> dict[str, Any]:
    """The production guide's dictionary of ``route``, see PROMISES "Result of route"."""
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
    """The guide's ``routing_info``, from the arrays of an entry.

    ``flop_reduction`` is the share of expert calls saved against ``flop_baseline``, every token at
    ``max_k``. Means and standard deviations are over real tokens.
    """
    counts, scores, load = (
        arrays[name] for name in ("num_experts_per_token", "complexity_scores", "_load")
    )
    tokens = int(arrays["_histogram"].sum())
    # Where a rule may leave a real token empty, an empty one cannot be told from a masked one.
    seen = scores if min_k == 0 or tokens == counts.size else scores[counts > 0]
    used = int(np.add.reduce(load))
    most = tokens * max_k
    return {
        "avg_experts_per_token": used / max(tokens, 1),
        "total_expert_calls": used,
        "flop_reduction": 1.0 - used / most if most else 0.0,
        "flop_baseline": f"top_max={max_k}",
        "expert_utilization": [u / max(used, 1) for u in load.tolist()],
        "complexity_stats": _spread(seen.reshape(-1) if seen.size else np.zeros(1, np.float32)),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation, least and largest of f32[N].

    By numpy's reductions themselves: its methods go through Python, which takes three times as long.
    """
    mean = np.add.reduce(values) / np.float32(len(values))
    away = values - mean
    return {
        "mean": float(mean),
        "std": math.sqrt(float(np.add.reduce(away * away)) / len(values)),
        "min": float(np.minimum.reduce(values)),
        "max": float(np.maximum.reduce(values)),
    }


def expert_counts(indices: np.ndarray, num_experts: int) -> np.ndarray:
    """int64[E]: how often each expert is used in indices i32[..., K], -1 being none."""
    return np.bincount(indices.reshape(-1) + 1, minlength=num_experts + 1)[1:]
