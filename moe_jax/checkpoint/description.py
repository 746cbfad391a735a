"""A checkpoint in words: its routers, their budgets, and where a configuration contradicts them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from moe_jax.checkpoint.reader import OpenCheckpoint
from moe_jax.config import Config
from moe_jax.routers import Router


def describe_checkpoint(opened: OpenCheckpoint) -> dict[str, Any]:
    """Returns what a verified checkpoint holds, as plain JSON values."""
    saved, about = opened.content, opened.about
    routers = {}
    for name, router in saved.routers.items():
        fit = getattr(saved.states[name], "fit", None)
        routers[name] = {
            "summary": repr(router),
            "config": router.to_json(),
            "fingerprint": router.fingerprint(),
            "fit": None if fit is None else fit.describe(),
        }
    return {
        "path": str(opened.path),
        "format": about["format"],
        "library_version": about["library_version"],
        "checksum": about["checksum"],
        "parameters": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(saved.params)),
        "routers": routers,
        "metadata": dict(saved.metadata),
    }


def routers_by_rule(
    routers: dict[str, dict[str, Any]], *, layers: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Groups the routers of ``describe_checkpoint`` under one label for each rule.

    A group has one rule, names that differ only in the number at their end, and is fitted or
    unfitted as a whole. ``layers`` gives every router a group of its own, under its name.

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
    labelled = {}
    for (stem, *_), names in groups.items():
        label = names[0]
        if len(names) > 1:
            numbers = sorted(int(name.removeprefix(stem)) for name in names)
            label = stem + _runs(numbers)
        labelled[label] = [routers[name] for name in names]
    return labelled


def _runs(numbers: list[int]) -> str:
    """``0-2,5`` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def router_sizes(router: Router, width: int) -> dict[str, int]:
    """Returns the sizes of a router of width D, in the words of ``router_config``.

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


def superseded(config: Config, opened: OpenCheckpoint) -> dict[str, int]:
    """Returns the settings of ``router_config`` that a checkpoint contradicts, with its values.

    The service goes by the checkpoint and reports these settings as not in force.

    Raises:
        ValueError: no such router (``checkpoint_router``), or no parameters for it.
    """
    layer = opened.layer(config.serving.checkpoint_router or None)
    sizes = router_sizes(layer.router, layer.width)
    wanted = config.router_config
    return {name: value for name, value in sizes.items() if value != getattr(wanted, name)}


def set_otherwise(config: Config, sizes: dict[str, int]) -> dict[str, int]:
    """Returns the sizes that a configuration sets to another value; a default sets nothing.

    Example:
        >>> from moe_jax.config import load_config
        >>> sizes = {"input_dim": 16, "num_experts": 4, "min_experts": 1, "max_experts": 2}
        >>> set_otherwise(load_config(env={}, num_experts=6), sizes)
        {'num_experts': 4}
    """
    wanted, defaults = config.router_config, Config().router_config
    return {
        name: value
        for name, value in sizes.items()
        if getattr(wanted, name) not in (value, getattr(defaults, name))
    }
