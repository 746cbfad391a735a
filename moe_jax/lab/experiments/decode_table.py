"""Rules that look at a decoding step's whole batch: what they load, and what it costs in quality.

A decoding step is one position of ``batch`` sequences. Text is read with the true bytes before each
position, so a rule's effect on quality is that of its routing alone. Times are in
``moe-jax bench decode --batch-rules``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.lab.calibration import BATCH, attend, embed_batch, mix
from moe_jax.lab.data import TextBlocks
from moe_jax.lab.experiments.declaration import Experiment
from moe_jax.lab.language_model import layer_params, nats, unembed
from moe_jax.lab.model_files import Model
from moe_jax.routers import (
    Reroute,
    Router,
    expert_similarity,
    router_from_json,
    with_similarity,
)
from moe_jax.routers.batch_aware import BatchAware
from moe_jax.routers.twin import starting_state
from moe_jax.types import Array, Params, Routing

SIMILARITY_TOKENS = 2048


def check_decode(experiment: Experiment) -> None:
    """Raises ValueError unless every rule of ``batch_rules`` can be measured in every recipe."""
    for label, fields in experiment.batch_rules.items():
        rule = router_from_json(dict(fields))
        if not isinstance(rule, BatchAware):
            raise ValueError(
                f"batch_rules: {label}: expected a rule that looks at its batch, got {rule!r}. Name "
                "Piggyback, SharedBudget or Reroute as its kind."
            )
        for recipe in experiment.recipes.values():
            if rule.num_experts != recipe.config.num_experts:
                raise ValueError(
                    f"batch_rules: {label}: expected num_experts={recipe.config.num_experts} as in "
                    f"recipe {recipe.name}, got {rule!r}. Change one of the two."
                )


def decode_rows(
    experiment: Experiment,
    model: Model,
    *,
    calibration: TextBlocks,
    held_out: TextBlocks,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Returns a row for each batch size and rule.

    A row has ``rule``, ``batch``, ``mean_k``, ``distinct_experts`` (a step and layer),
    ``distinct_saving`` (against the trained rule), ``bits_per_byte`` and ``relative`` (its change).
    """
    config = model.config
    rows = []
    for batch in experiment.batch_sizes:
        base = measure_steps(model, held_out, [config.router()] * config.num_moe_layers, batch)
        rows.append({"rule": "as trained", "batch": batch, **base, **_saving(base, base)})
        for label, fields in experiment.batch_rules.items():
            note(f"{label}, batch {batch}")
            rule = _with_scoring(router_from_json(dict(fields)), model)
            routers = [rule] * config.num_moe_layers
            states = fitted_states(model, routers, calibration)
            measured = measure_steps(model, held_out, routers, batch, states=states)
            rows.append({"rule": label, "batch": batch, **measured, **_saving(measured, base)})
    return rows


def _with_scoring(rule: Any, model: Model) -> Router:
    # Above `max_tokens` these rules are plain top-k, so the largest batch must not exceed it.
    return dataclasses.replace(rule, scoring=model.config.scoring, max_tokens=BATCH)


def _saving(measured: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    return {
        "distinct_saving": 1.0 - measured["distinct_experts"] / base["distinct_experts"],
        "relative": measured["bits_per_byte"] / base["bits_per_byte"] - 1.0,
    }


@functools.partial(jax.jit, static_argnames=("router", "batch"))
def route_steps(
    router: Router, params: Params, state: Any, x: Array, mask: Array, batch: int
) -> tuple[Routing, Array]:
    """Routes x f32[B, S, D] step by step: ``batch`` sequences at one position are routed together.

    Returns:
        The routing of all B * S tokens, and f32[B // batch * S]: distinct experts of each step.
    """
    sequences, length = mask.shape
    groups = sequences // batch

    def steps(array: Array) -> Array:  # [B, S, ...] -> [steps, batch, ...]
        grouped = array.reshape(groups, batch, length, *array.shape[2:])
        return jnp.moveaxis(grouped, 2, 1).reshape(groups * length, batch, *array.shape[2:])

    def tokens(array: Array) -> Array:  # [steps, batch, ...] -> [B * S, ...]
        split = array.reshape(groups, length, batch, *array.shape[2:])
        return jnp.moveaxis(split, 2, 1).reshape(sequences * length, *array.shape[2:])

    each = jax.vmap(lambda x, mask: router(params, state, x, token_mask=mask))(
        steps(x), steps(mask)
    )
    loaded = jax.vmap(lambda one: one.expert_mask.any(axis=0))(each)
    return jax.tree.map(tokens, each), loaded.sum(axis=-1).astype(jnp.float32)


def measure_steps(
    model: Model,
    blocks: TextBlocks,
    routers: list[Router],
    batch: int,
    *,
    states: list[Any] | None = None,
) -> dict[str, float]:
    """Returns ``bits_per_byte``, ``mean_k`` and ``distinct_experts`` of a model decoding in batches."""
    config, params = model.config, model.params
    if states is None:
        states = [starting_state(r, s) for r, s in zip(routers, model.states, strict=True)]
    size = max(BATCH, batch)
    padded = blocks.pad_to(size)
    total, used, distinct = 0.0, 0.0, []
    for i in range(0, len(padded), size):
        mask = jnp.asarray(padded.mask[i : i + size])
        h = embed_batch(params, jnp.asarray(padded.inputs[i : i + size]))
        for index, (router, state) in enumerate(zip(routers, states, strict=True)):
            layer = layer_params(params, index)
            h, x = attend(config, layer, h)
            routing, loaded = route_steps(router, layer["moe"]["router"], state, x, mask, batch)
            h, seen = mix(config, layer, routing, h, x)
            used += float(seen.slots_used)
            # Steps of padding alone load nothing and are no steps.
            distinct.append(np.asarray(loaded)[np.asarray(loaded) > 0])
        losses = nats(unembed(params, h), jnp.asarray(padded.targets[i : i + size]))
        total += float(jnp.where(mask, losses, 0.0).sum())
    count = blocks.num_tokens
    return {
        "bits_per_byte": total / count / float(np.log(2)),
        "mean_k": used / count / config.num_moe_layers,
        "distinct_experts": float(np.concatenate(distinct).mean()),
    }


def fitted_states(model: Model, routers: list[Router], calibration: TextBlocks) -> list[Any]:
    """Returns the states of rules; those of ``Reroute`` with the similarity of their experts.

    The similarity is that of expert outputs on what the trained model sends to each layer.
    """
    config = model.config
    blocks = calibration.take(max(1, SIMILARITY_TOKENS // config.length))
    h = embed_batch(model.params, jnp.asarray(blocks.inputs))
    mask = jnp.asarray(blocks.mask)
    states = []
    for index, router in enumerate(routers):
        state = starting_state(router, model.states[index])
        layer = layer_params(model.params, index)
        h, x = attend(config, layer, h)
        if isinstance(router, Reroute):
            real = x[mask]
            outputs = jax.vmap(config.experts, in_axes=(0, None))(layer["moe"]["experts"], real)
            state = with_similarity(state, expert_similarity(outputs))
        trained = model.routers[index]
        # The trained rule routes each token by itself, so all blocks can be one step.
        routing, _ = route_steps(
            trained, layer["moe"]["router"], model.states[index], x, mask, len(blocks)
        )
        h, _ = mix(config, layer, routing, h, x)
        states.append(state)
    return states
