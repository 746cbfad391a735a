"""Combine weights on the input of experts instead of their output (Llama 4)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from moe_jax.routing.dispatch import kept_weights
from moe_jax.types import Array, DispatchPlan


def weighted_rows(
    x: Array, plan: DispatchPlan, weights: Array
) -> tuple[Array, DispatchPlan, Array]:
    """Returns x, plan and weights with one token per slot.

    Each row is scaled by its slot's weight, so each kept weight is 1.
    """
    a = plan.assignments
    slots = a.slots_per_token
    if not slots:
        raise ValueError(
            "weight_on_input: expected token choice, got expert choice. Weigh the outputs instead."
        )
    scaled = x.astype(jnp.float32)[:, None, :] * weights.reshape(-1, slots)[:, :, None]
    n = a.num_tokens * slots
    single = dataclasses.replace(
        a,
        token_indices=jnp.arange(n, dtype=jnp.int32),
        weights=a.valid.astype(jnp.float32),
        num_tokens=n,
        slots_per_token=1,
    )
    plan = dataclasses.replace(plan, assignments=single)
    return scaled.astype(x.dtype).reshape(n, -1), plan, kept_weights(plan)
