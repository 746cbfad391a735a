"""Files of hidden states, routed by a checkpoint or by an untrained router; for ``moe-jax route``."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoint import StoredLayer
from moe_jax.config import build_router, load_config
from moe_jax.routers import Router
from moe_jax.routing.dispatch import plan_dispatch, to_assignments
from moe_jax.routing.stats import routing_stats
from moe_jax.types import Params, Routing


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UntrainedRouter:
    """A router with seeded parameters and a state that was calibrated on the file it routes."""

    router: Router
    params: Params
    state: Any


def load_hidden_states(file: Path) -> np.ndarray:
    """float[..., D] from a .npy file. Never unpickles.

    Raises:
        ValueError: not a .npy file of finite floats with at least two axes.
    """
    try:
        x = np.load(file, allow_pickle=False)
    except OSError as error:
        got = {FileNotFoundError: "nothing there", IsADirectoryError: "a folder"}
        raise ValueError(
            f"{file}: expected a .npy file of floats, got {got.get(type(error), error.strerror)}. "
            "Write it with numpy.save(file, array), or correct the path."
        ) from None
    except (ValueError, EOFError):
        raise ValueError(
            f"{file}: expected a .npy file of floats, got something else. "
            "Write it with numpy.save(file, array)."
        ) from None
    if not isinstance(x, np.ndarray):
        raise ValueError(f"{file}: expected one array, got an archive. Save it with numpy.save.")
    if x.ndim < 2 or x.size == 0 or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"{file}: expected floats [..., width] with at least two axes and one token, got "
            f"{x.dtype}{list(x.shape)}. Save hidden states such as [batch, sequence, width]."
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, and is refused
        x = x.astype(np.float32)
    bad = int((~np.isfinite(x).all(axis=-1)).sum())
    if bad:
        raise ValueError(
            f"{file}: expected values that are finite in float32, got {bad} tokens with NaN or inf. "
            "Remove them first."
        )
    return x


def check_save(file: Path) -> None:
    """Raises ValueError, before the work, if arrays cannot be saved as this file."""
    if file.is_dir():
        raise ValueError(f"{file}: expected a file to write, got a folder. Name a file in it.")
    folder = file.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        got = "a folder that may not be written" if folder.is_dir() else "no such folder"
        raise ValueError(
            f"{file}: expected a file in a folder that may be written, got {got}: {folder}. "
            "Make the folder first, or choose another."
        )


def check_width(layer: StoredLayer, x: np.ndarray, *, file: Path, checkpoint: Path) -> None:
    """Raises ValueError if x float[..., D] of a file is not as wide as a checkpoint's router."""
    if x.shape[-1] != layer.width:
        raise ValueError(
            f"{file}: expected hidden states of width {layer.width}, as the router of {checkpoint} "
            f"takes them, got {list(x.shape)}. Use a file of that width, or another checkpoint."
        )


def untrained_router(
    x: np.ndarray, *, config_file: Path | None, target_mean_k: float | None, seed: int
) -> UntrainedRouter:
    """Returns the configured router with seeded weights, its budget calibrated on x float[..., D].

    Without a target the budget is the middle between min and max experts. Without a configuration
    file the width is that of x.
    """
    width = None if config_file is not None else x.shape[-1]
    config = load_config(config_file, input_dim=width)
    if config.router_config.input_dim != x.shape[-1]:
        raise ValueError(
            f"x: expected width input_dim={config.router_config.input_dim} as in {config_file}, got "
            f"{x.shape[-1]}. Use a file of that width or change input_dim."
        )
    router = build_router(config)
    params = router.init(jax.random.key(seed), x.shape[-1])
    state = router.init_state()
    if router.min_k < router.max_k:
        middle = (router.min_k + router.max_k) / 2
        flat = jnp.asarray(x.reshape(-1, x.shape[-1]))
        target = middle if target_mean_k is None else target_mean_k
        state = router.fit(params, state, flat, target_mean_k=target)
    return UntrainedRouter(router=router, params=params, state=state)


def route_report(
    layer: StoredLayer | UntrainedRouter, x: np.ndarray
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Routes x float[..., D]; returns a report of plain JSON values, and arrays over its T tokens."""
    router = layer.router
    flat = jnp.asarray(x.reshape(-1, x.shape[-1]))
    routing = router(layer.params, layer.state, flat)
    plan = plan_dispatch(to_assignments(routing))
    stats = jax.device_get(routing_stats(routing, plan))
    load = np.asarray(stats.tokens_per_expert)
    mean_k = float(stats.mean_experts_per_token)
    report = {
        "trained": isinstance(layer, StoredLayer),
        "layer": layer.name if isinstance(layer, StoredLayer) else None,
        "router": router.to_json(),
        "min_k": router.min_k,
        "num_experts": router.num_experts,
        "tokens": int(stats.token_count),
        "mean_experts_per_token": mean_k,
        "experts_per_token_histogram": [float(h) for h in stats.experts_per_token_histogram],
        "expert_utilization": [float(u) for u in load / max(load.sum(), 1.0)],
        "load_balance_score": float(stats.load_balance_score),
        "flop_reduction": 1.0 - mean_k / router.max_k,
        "flop_baseline": f"top_max={router.max_k}",
    }
    arrays = {"num_experts_per_token": np.asarray(routing.num_experts_per_token)}
    if isinstance(routing, Routing):
        arrays["expert_indices"] = np.asarray(routing.expert_indices)
        arrays["expert_weights"] = np.asarray(routing.combine_weights)
    arrays["router_logits"] = np.asarray(routing.router_logits)
    return report, arrays
