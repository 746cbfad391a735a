"""What people ask of a file or a checkpoint: route it, describe it. Host-side, for the CLI."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import checkpoint as checkpoints
from moe_jax.config import Config, build_router, load_config
from moe_jax.routers import Router
from moe_jax.routing.dispatch import plan_dispatch, to_assignments
from moe_jax.routing.stats import routing_stats
from moe_jax.types import Params, Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterSource:
    """A router with its parameters and state, and whether anybody trained it."""

    router: Router
    params: Params
    state: Any
    trained: bool


PathLike = str | os.PathLike[str]


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
    bad = int((~np.isfinite(x).all(axis=-1)).sum())
    if bad:
        raise ValueError(
            f"{file}: expected finite values, got {bad} tokens with NaN or inf. Remove them first."
        )
    return x.astype(np.float32)


def check_save(file: Path) -> None:
    """Before the work: raises ValueError if arrays cannot be saved as this file."""
    if file.is_dir():
        raise ValueError(f"{file}: expected a file to write, got a folder. Name a file in it.")
    folder = file.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        got = "a folder that may not be written" if folder.is_dir() else "no such folder"
        raise ValueError(
            f"{file}: expected a file in a folder that may be written, got {got}: {folder}. "
            "Make the folder first, or choose another."
        )


def check_width(source: RouterSource, x: np.ndarray, *, file: Path, checkpoint: Path) -> None:
    """Raises ValueError if x float[..., D] of a file is not as wide as a checkpoint's router."""
    width = source.params["kernel"].shape[0]
    if x.shape[-1] != width:
        raise ValueError(
            f"{file}: expected hidden states of width {width}, as the router of {checkpoint} takes "
            f"them, got {list(x.shape)}. Use a file of that width, or another checkpoint."
        )


def untrained_router(
    x: np.ndarray, *, config_file: Path | None, target_mean_k: float | None, seed: int
) -> RouterSource:
    """The configured router with seeded weights, its budget calibrated on x itself.

    Without a target, the middle between min and max experts. Width comes from x where no
    configuration file says otherwise.
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
    return RouterSource(router=router, params=params, state=state, trained=False)


def router_from_checkpoint(path: Path, name: str | None) -> RouterSource:
    """A router of a checkpoint by name, or its only one (or first, in name order).

    Its parameters are looked for in ``params[name]``, under ``["router"]`` there if present.

    Raises:
        ValueError: no such router, or the checkpoint has no parameters for it.
    """
    found = checkpoints.open_checkpoint(path).layer(name)
    return RouterSource(router=found.router, params=found.params, state=found.state, trained=True)


def router_sizes(router: Router, width: int) -> dict[str, int]:
    """What a router of width D is, in the words of ``router_config``.

    Example:
        >>> from moe_jax.routers import TopK
        >>> router_sizes(TopK(num_experts=4, k=2), 16)
        {'input_dim': 16, 'num_experts': 4, 'min_experts': 2, 'max_experts': 2}
    """
    return {
        "input_dim": width,
        "num_experts": router.num_experts,
        "min_experts": router.min_k,
        "max_experts": router.max_k,
    }


def superseded(config: Config, opened: checkpoints.OpenCheckpoint) -> dict[str, int]:
    """The settings of ``router_config`` that a checkpoint contradicts, with the checkpoint's values.

    The service serves what the checkpoint is, and says which settings are not in force.

    Raises:
        ValueError: no such router (``checkpoint_router``), or no parameters for it.
    """
    layer = opened.layer(config.serving.checkpoint_router or None)
    sizes = router_sizes(layer.router, layer.width)
    wanted = config.router_config
    return {name: value for name, value in sizes.items() if value != getattr(wanted, name)}


def route(source: RouterSource, x: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Routes x float[..., D]: a report of plain JSON values, and the arrays [T, ...] themselves."""
    router = source.router
    flat = jnp.asarray(x.reshape(-1, x.shape[-1]))
    routing = router(source.params, source.state, flat)
    plan = plan_dispatch(to_assignments(routing))
    stats = jax.device_get(routing_stats(routing, plan))
    load = np.asarray(stats.tokens_per_expert)
    mean_k = float(stats.mean_experts_per_token)
    report = {
        "trained": source.trained,
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


def describe_checkpoint(path: PathLike | checkpoints.OpenCheckpoint) -> dict[str, Any]:
    """What a checkpoint holds, after verifying all of it: plain JSON values."""
    opened = path if isinstance(path, checkpoints.OpenCheckpoint) else None
    opened = checkpoints.open_checkpoint(path) if opened is None else opened  # type: ignore[arg-type]
    saved, about = opened.content, opened.about
    routers = {}
    for name, router in saved.routers.items():
        fit = getattr(saved.states[name], "fit", None)
        routers[name] = {
            "summary": _short(router),
            "config": router.to_json(),
            "fingerprint": router.fingerprint(),
            "fit": None if fit is None else fit.describe(),
        }
    return {
        "path": str(opened.path) if opened is path else str(path),
        "format": about["format"],
        "library_version": about["library_version"],
        "parameters": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(saved.params)),
        "routers": routers,
        "metadata": dict(saved.metadata),
    }


def routers_by_rule(
    routers: dict[str, dict[str, Any]], *, layers: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Routers of ``describe_checkpoint`` under one label a rule, or under their names (``layers``).

    Those go together whose names differ in the number at their end alone, whose rule is the same,
    and which are all fitted or all not.

    Example:
        >>> rule = {"summary": "TopK(k=2)", "fit": None}
        >>> list(routers_by_rule({f"top_p/layer_{i}": rule for i in (0, 1, 2, 5)}))
        ['top_p/layer_0-2,5']
        >>> list(routers_by_rule({"layer": rule, "layer1": rule}))
        ['layer', 'layer1']
    """
    if layers:
        return {name: [router] for name, router in routers.items()}
    groups: dict[Any, list[str]] = {}
    for name, router in routers.items():
        fitted = bool(router["fit"] and router["fit"]["fitted"])
        stem = name.rstrip("0123456789")
        groups.setdefault((stem, stem == name, router["summary"], fitted), []).append(name)
    found = {}
    for (stem, *_), names in groups.items():
        label = names[0]
        if len(names) > 1:
            numbers = sorted(int(name.removeprefix(stem)) for name in names)
            label = stem + _runs(numbers)
        found[label] = [routers[name] for name in names]
    return found


def _runs(numbers: list[int]) -> str:
    """``0-2,5`` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _short(router: Router) -> str:
    """The rule's kind and whatever differs from its defaults."""
    told = []
    for field in dataclasses.fields(router):  # type: ignore[arg-type]  # every rule is a dataclass
        value = getattr(router, field.name)
        if value != field.default:
            told.append(f"{field.name}={value!r}")
    return f"{type(router).__name__}({', '.join(told)})"
