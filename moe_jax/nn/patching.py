"""Gives an NNX model dynamic routing rules in place, or fits the rules it has to a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.checks import check_number
from moe_jax.nn.capture import check_has_layers, watching
from moe_jax.routers import DynamicK, TopK
from moe_jax.routing.difficulty import Estimator
from moe_jax.routing.numerics import exact


def patch_model_with_dynamic_routing(
    model: nnx.Module,
    min_experts_ratio: float = 0.125,
    max_experts_ratio: float = 0.5,
    *,
    calibration: Any = None,
    target_mean_k: float | None = None,
    difficulty: str | Estimator = "router_entropy",
    elastic: bool = False,
    call: Callable[[Any, Any], Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Gives every fixed-k ``MoE`` layer of an NNX model a ``DynamicK`` rule, in place.

    Parameters stay where they are; gate, scoring and selection bias are carried over. A token uses
    between ``min_experts_ratio * E`` and ``max_experts_ratio * E`` experts (at least one), and never
    more than the trained k unless ``elastic``.

    Args:
        model: an NNX model with ``moe_jax.nn.nnx.MoE`` layers under ``TopK`` rules.
        min_experts_ratio: fewest experts as a share of E.
        max_experts_ratio: most experts as a share of E.
        calibration: input of ``model``, run once (without jit) to capture the inputs of each layer, on
            which its budget is then fitted. None leaves the rules uncalibrated: raw scores are taken
            as difficulty.
        target_mean_k: experts per token to fit to; the middle of min and max by default.
        difficulty: estimator, see ``moe_jax.routing.difficulty``.
        elastic: allow more experts than the layer was trained with.
        call: ``(model, calibration) -> anything``, how the model is run; None is
            ``model(calibration)``.

    Returns:
        For each layer path: trained_k, min_k, max_k, and, where calibrated, the fit's description.

    Raises:
        ValueError: ratios out of order, a layer without a ``TopK`` rule or that the calibration data
            does not reach, a target without data or out of reach, or no MoE layer at all. The
            model is then unchanged.

    Example:
        >>> import moe_jax
        >>> from moe_jax.nn.nnx import MoE
        >>> layer = MoE(moe_jax.TopK(num_experts=8, k=4), d_model=8, d_ff=16, rngs=nnx.Rngs(0))
        >>> patch_model_with_dynamic_routing(layer)
        {'model': {'trained_k': 4, 'min_k': 1, 'max_k': 4, 'fit': None}}
    """
    check_number("min_experts_ratio", min_experts_ratio)
    check_number("max_experts_ratio", max_experts_ratio)
    if target_mean_k is not None:
        check_number("target_mean_k", target_mean_k)
    if not 0 < min_experts_ratio <= max_experts_ratio <= 1:
        raise ValueError(
            "min_experts_ratio, max_experts_ratio: expected 0 < min <= max <= 1, got "
            f"{min_experts_ratio}, {max_experts_ratio}. They are shares of the number of experts."
        )
    if calibration is None and target_mean_k is not None:
        raise ValueError(
            f"calibration: expected data to fit target_mean_k={target_mean_k:g} on, got None. Pass an "
            "input of the model, or leave target_mean_k out."
        )
    layers = check_has_layers(model)
    inputs = {} if calibration is None else _inputs(model, calibration, call)
    rules: dict[str, DynamicK] = {}
    for path, layer in layers.items():
        trained = layer.spec.router
        if not isinstance(trained, TopK):
            raise ValueError(
                f"{path}: expected a layer with a fixed k (TopK), got {type(trained).__name__}. "
                "Patch the model as it was trained, and only once."
            )
        most = max(1, math.floor(exact(max_experts_ratio) * trained.num_experts))
        most = most if elastic else min(most, trained.k)
        least = min(most, max(1, math.ceil(exact(min_experts_ratio) * trained.num_experts)))
        rules[path] = DynamicK(
            num_experts=trained.num_experts,
            min_k=least,
            max_k=most,
            difficulty=difficulty,
            gate=trained.gate,
            scoring=trained.scoring,
            balance_rate=trained.balance_rate,
        )
    states: dict[str, Any] = {}
    for path, layer in layers.items():
        rule = rules[path]
        bias = layer.router_state.get_value().expert_bias
        state = dataclasses.replace(rule.init_state(), expert_bias=bias)
        if calibration is not None and path not in inputs:
            raise _not_reached(path)
        if path in inputs and rule.min_k < rule.max_k:
            target = (rule.min_k + rule.max_k) / 2 if target_mean_k is None else target_mean_k
            params = layer.params()["router"]
            try:
                state = rule.fit(params, state, inputs[path], target_mean_k=target)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        states[path] = state
    report: dict[str, dict[str, Any]] = {}
    for path, layer in layers.items():  # nothing is written before everything is known to fit
        rule, trained = rules[path], layer.spec.router
        assert isinstance(trained, TopK)
        layer.spec = dataclasses.replace(layer.spec, router=rule)
        layer.router_state.set_value(states[path])
        fit = states[path].fit.describe()
        report[path] = {
            "trained_k": trained.k,
            "min_k": rule.min_k,
            "max_k": rule.max_k,
            "fit": fit if fit["fitted"] else None,
        }
    return report


def fit_model(
    model: nnx.Module,
    calibration: Any,
    *,
    target_mean_k: float,
    call: Callable[[Any, Any], Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Fits every MoE layer of an NNX model whose rule has a budget, in place, first layer to last.

    Each layer is fitted on its inputs as they are when the layers before it already run their
    fitted rules; so the model is run once a layer, without jit.

    Args:
        model: an NNX model with ``DynamicMoE`` layers, or ``MoE`` layers under any rule that has a
            budget. Layers with a fixed k stay as they are.
        calibration: input of ``model``, real data.
        target_mean_k: experts per token on average, the same for every layer.
        call: ``(model, calibration) -> anything``, how the model is run; None is
            ``model(calibration)``.

    Returns:
        For each fitted layer's path, the description of its fit.

    Raises:
        ValueError: no layer has a budget, a layer was not reached, or the target is out of a layer's
            reach; the layer is named, and the model is then unchanged.

    Example:
        >>> import jax
        >>> from moe_jax.nn.nnx import DynamicMoE
        >>> layer = DynamicMoE(8, d_model=8, d_ff=16, max_k=4, rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (500, 8))
        >>> fits = fit_model(layer, x, target_mean_k=2.0)
        >>> round(fits["model"]["achieved_mean_k"], 2)
        2.0
    """
    check_number("target_mean_k", target_mean_k)
    if calibration is None:
        raise ValueError(
            "calibration: expected an input of the model, got None. Pass real data, a few thousand "
            "tokens of it."
        )
    layers = check_has_layers(model)
    with_budget = {path: layer for path, layer in layers.items() if layer.spec.router.calibrates()}
    if not with_budget:
        raise ValueError(
            "fit_model: expected a layer whose rule has a budget, got "
            f"{', '.join(f'{p} ({type(m.spec.router).__name__})' for p, m in layers.items())}"
            " alone. Use DynamicMoE, or patch_model_with_dynamic_routing for a trained "
            "model of fixed k."
        )
    before = {path: layer.router_state.get_value() for path, layer in with_budget.items()}
    fits: dict[str, dict[str, Any]] = {}
    try:
        order = list(_inputs(model, calibration, call))
        missed = [path for path in with_budget if path not in order]
        if missed:
            raise _not_reached(missed[0])
        for path in (p for p in order if p in with_budget):
            x = _inputs(model, calibration, call)[path]
            try:
                with_budget[path].fit_router(x, target_mean_k=target_mean_k)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            fits[path] = with_budget[path].router_state.get_value().fit.describe()
    except BaseException:
        for path, layer in with_budget.items():
            layer.router_state.set_value(before[path])
        raise
    return fits


def _not_reached(path: str) -> ValueError:
    return ValueError(
        f"{path}: expected to be run on the calibration data, got no call. Calibrate with data that "
        "reaches every layer."
    )


def _inputs(
    model: nnx.Module, calibration: Any, call: Callable[[Any, Any], Any] | None
) -> dict[str, Any]:
    """What each MoE layer saw, as [T, D], in the order of their first calls."""
    seen: dict[str, list[np.ndarray]] = {}
    with watching(model, lambda path, x, aux: seen.setdefault(path, []).append(np.asarray(x))):
        model(calibration) if call is None else call(model, calibration)  # type: ignore[operator]
    return {
        path: jnp.asarray(np.concatenate([x.reshape(-1, x.shape[-1]) for x in xs]))
        for path, xs in seen.items()
    }
