"""Fixed-size buffers of C rows an expert, filled by integer index tables and gathers."""

from __future__ import annotations

import jax.numpy as jnp

from moe_jax.experts.feed_forward import ExpertFn
from moe_jax.experts.implementation import Implementation, all_experts
from moe_jax.routing.dispatch import combine
from moe_jax.types import Array, DispatchPlan, Params


def buffer_rows(plan: DispatchPlan, capacity: int) -> Array:
    """i32[E, C]: which assignment sits in which buffer row; N where the row is empty."""
    n, e = plan.order.shape[0], plan.assignments.num_experts
    slot = jnp.arange(capacity, dtype=jnp.int32)[None, :]
    row = plan.group_offsets[:, None] + slot
    filled = slot < plan.group_sizes[:, None]
    # Indices past the end of an expert's rows are clamped for the gather and then marked as empty.
    table = plan.order[jnp.minimum(row, n - 1).reshape(-1)].reshape(e, capacity)
    return jnp.where(filled, table, n)


def run(expert_fn: ExpertFn, params: Params, x: Array, plan: DispatchPlan, weights: Array) -> Array:
    """Computes f32[T, D_out] in buffers of C rows an expert; see ``Implementation.run``."""
    a, c = plan.assignments, plan.max_group
    n = a.token_indices.shape[0]
    table = buffer_rows(plan, c)
    tokens = a.token_indices[jnp.minimum(table, n - 1)]
    # Empty rows hold zeros, not some token's values: a NaN there would reach the gradients of an
    # expert that the token never chose.
    rows = jnp.where((table < n)[:, :, None], x[tokens], jnp.zeros((), x.dtype))
    outputs = all_experts(expert_fn, params, rows)
    flat = outputs.reshape(a.num_experts * c, -1)
    # Assignments that are not kept read row 0, which `combine` ignores.
    row = jnp.where(plan.kept, a.expert_indices * c + plan.position, 0)
    return combine(plan, flat[row], weights)


def slots_executed(plan: DispatchPlan) -> Array:
    """f32[]: every buffer row, used or not."""
    return jnp.asarray(plan.assignments.num_experts * plan.max_group, jnp.float32)


def refuse(expert_fn: ExpertFn, plan: DispatchPlan, platform: str) -> str | None:
    """Refuses plans without a capacity, whose buffers would hold T rows for every expert."""
    if plan.capacity is None:
        return "has no capacity to size its buffers by: dropless buffers would hold T rows each"
    return None


CAPACITY = Implementation(
    name="capacity",
    run=run,
    slots_executed=slots_executed,
    refuse=refuse,
    summary="E buffers of C rows, one batched product (drops over capacity)",
)
