"""A trained NNX model made dynamic in place."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.difficulty import Estimator
from moe_jax.nn.recording import moe_layers, watching
from moe_jax.routers import DynamicK, TopK


def patch_model_with_dynamic_routing(
    model: nnx.Module,
    min_experts_ratio: float = 0.125,
    max_experts_ratio: float = 0.5,
    *,
    calibration: Any = None,
    target_mean_k: float | None = None,
    difficulty: str | Estimator = "router_entropy",
    elastic: bool = False,
) -> dict[str, dict[str, Any]]:
    """Gives every fixed-k ``MoE`` layer of an NNX model a ``DynamicK`` rule, in place.

    Parameters stay where they are; gate, scoring and selection bias are carried over. A token uses
    between ``min_experts_ratio * E`` and ``max_experts_ratio * E`` experts (at least one), and never
    more than the trained k unless ``elastic``.

    Args:
        model: an NNX model with ``moe_jax.nn.nnx.MoE`` layers under ``TopK`` rules.
        min_experts_ratio: fewest experts as a share of E.
        max_experts_ratio: most experts as a share of E.
        calibration: input of ``model``, run once (without jit) to see each layer's own inputs, on
            which its budget is then fitted. None leaves the rules uncalibrated: raw scores are taken
            as difficulty.
        target_mean_k: experts per token to fit to; the middle of min and max by default.
        difficulty: estimator, see ``moe_jax.difficulty``.
        elastic: allow more experts than the layer was trained with.

    Returns:
        For each layer path: trained_k, min_k, max_k, and, where calibrated, the fit's description.

    Raises:
        ValueError: ratios out of order, a layer without a ``TopK`` rule, or no MoE layer at all.
            The model is then unchanged.

    Example:
        >>> import moe_jax
        >>> from moe_jax.nn.nnx import MoE
        >>> layer = MoE(moe_jax.TopK(num_experts=8, k=4), d_model=8, d_ff=16, rngs=nnx.Rngs(0))
        >>> patch_model_with_dynamic_routing(layer)
        {'model': {'trained_k': 4, 'min_k': 1, 'max_k': 4, 'fit': None}}
    """
    if not 0 < min_experts_ratio <= max_experts_ratio <= 1:
        raise ValueError(
            "min_experts_ratio, max_experts_ratio: expected 0 < min <= max <= 1, got "
            f"{min_experts_ratio}, {max_experts_ratio}. They are shares of the number of experts."
        )
    inputs: dict[str, list[np.ndarray]] = {}
    with watching(model, lambda path, x, aux: inputs.setdefault(path, []).append(np.asarray(x))):
        if calibration is not None:
            model(calibration)  # type: ignore[operator]  # any NNX model is called
    layers = moe_layers(model)
    rules: dict[str, DynamicK] = {}
    for path, layer in layers.items():
        trained = layer.spec.router
        if not isinstance(trained, TopK):
            raise ValueError(
                f"{path}: expected a layer with a fixed k (TopK), got {type(trained).__name__}. "
                "Patch the model as it was trained, and only once."
            )
        most = max(1, math.floor(max_experts_ratio * trained.num_experts))
        most = most if elastic else min(most, trained.k)
        least = min(most, max(1, math.ceil(min_experts_ratio * trained.num_experts)))
        rules[path] = DynamicK(
            num_experts=trained.num_experts, min_k=least, max_k=most, difficulty=difficulty,
            gate=trained.gate, scoring=trained.scoring, balance_rate=trained.balance_rate,
        )  # fmt: skip
    states: dict[str, Any] = {}
    for path, layer in layers.items():
        rule = rules[path]
        bias = layer.router_state.get_value().expert_bias
        state = dataclasses.replace(rule.init_state(), expert_bias=bias)
        if path in inputs and rule.min_k < rule.max_k:
            rows = [x.reshape(-1, x.shape[-1]) for x in inputs[path]]
            target = (rule.min_k + rule.max_k) / 2 if target_mean_k is None else target_mean_k
            params = layer.params()["router"]
            x = jnp.asarray(np.concatenate(rows))
            state = rule.fit(params, state, x, target_mean_k=target)
        states[path] = state
    told: dict[str, dict[str, Any]] = {}
    for path, layer in layers.items():  # nothing is written before everything is known to fit
        rule, trained = rules[path], layer.spec.router
        assert isinstance(trained, TopK)
        layer.spec = dataclasses.replace(layer.spec, router=rule)
        layer.router_state.set_value(states[path])
        fit = states[path].fit.describe()
        told[path] = {
            "trained_k": trained.k,
            "min_k": rule.min_k,
            "max_k": rule.max_k,
            "fit": fit if fit["fitted"] else None,
        }
    return told
