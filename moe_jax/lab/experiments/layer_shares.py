"""How the layers of a model share one budget: a mean k for each layer, from measured changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.interop.budget_shares import shared_budget
from moe_jax.lab.calibration import (
    Rule,
    attend,
    embedded_batches,
    fit_layers,
    mix,
    real_rows,
    route,
)
from moe_jax.lab.data import TextBlocks
from moe_jax.lab.language_model import layer_params
from moe_jax.lab.model_files import Model
from moe_jax.routers import Router
from moe_jax.routers.twin import fit_twin
from moe_jax.types import Array

STEPS = 6  # budgets at which a layer's change is measured, from the trained k downwards


def change_curves(model: Model, rule: Rule, blocks: TextBlocks) -> dict[int, list[float]]:
    """Returns by layer the squared relative change of what its experts add, at falling budgets.

    Each layer is fitted on all blocks, and its change measured on the first batch of them, with the
    inputs that reach it in the trained model.

    Args:
        model: the trained model.
        rule: the rule that saves.
        blocks: calibration text.

    Returns:
        For each layer STEPS numbers: 0 at the trained k, then not falling.
    """
    config = model.config
    hs, masks = embedded_batches(model, blocks)
    grid = np.linspace(config.k, 1.0, STEPS + 1)[1:-1]
    curves: dict[int, list[float]] = {}
    for index in range(config.num_moe_layers):
        layer = layer_params(model.params, index)
        params, trained = layer["moe"]["router"], model.states[index]
        pairs = [attend(config, layer, h) for h in hs]
        h, x = pairs[0]

        def added(router: Router, state: Any, where: Any = (layer, params, h, x)) -> Array:
            layer, params, h, x = where
            routing = route(router, params, state, x, masks[0])
            return jnp.where(masks[0][..., None], mix(config, layer, routing, h, x)[0] - h, 0.0)

        full = added(config.router(), trained)
        rows, size = real_rows(pairs, masks), float(jnp.square(full).sum())
        changes = [0.0]
        for budget in grid:
            router = rule.build(config, float(budget))
            state = fit_twin(router, params, trained, rows, target_mean_k=float(budget))
            changes.append(float(jnp.square(added(router, state) - full).sum()) / size)
        # By chance a smaller budget may change less; sharing needs curves that do not fall.
        curves[index] = np.maximum.accumulate(changes).tolist()
        hs = [
            mix(config, layer, route(config.router(), params, trained, x, mask), h, x)[0]
            for (h, x), mask in zip(pairs, masks, strict=True)
        ]
    return curves


def shared_rule(
    model: Model,
    rule: Rule,
    curves: Mapping[int, Sequence[float]],
    blocks: TextBlocks,
    target_mean_k: float,
) -> tuple[tuple[Router, ...], tuple[Any, ...]]:
    """Returns the rules and states of a model whose layers share a budget by their curves.

    A layer that saves nothing keeps its trained rule.

    Args:
        model: the trained model.
        rule: the rule that saves.
        curves: of ``change_curves``.
        blocks: calibration text.
        target_mean_k: mean over layers.
    """
    config = model.config
    shares = shared_budget(curves, k=float(config.k), target_mean_k=target_mean_k)
    budgets = [shares[layer] for layer in sorted(shares)]
    routers = tuple(
        config.router() if budget >= config.k else rule.build(config, budget) for budget in budgets
    )
    return routers, fit_layers(model, routers, blocks, budgets)
