"""Every expert on every token: E times the work, and the answer that all others must equal."""

from __future__ import annotations

import jax.numpy as jnp

from moe_jax.experts.feed_forward import ExpertFn
from moe_jax.experts.implementation import Implementation, all_experts
from moe_jax.types import Array, DispatchPlan, Params


def run(expert_fn: ExpertFn, params: Params, x: Array, plan: DispatchPlan, weights: Array) -> Array:
    """Computes f32[T, D_out], every expert on every token; see ``Implementation.run``."""
    a = plan.assignments
    shape = (a.num_experts, a.num_tokens)
    # Padding has the expert index E, which "drop" leaves out of both tables.
    used = jnp.zeros(shape, bool).at[a.expert_indices, a.token_indices].max(plan.kept, mode="drop")
    gate = jnp.zeros(shape, jnp.float32)
    gate = gate.at[a.expert_indices, a.token_indices].add(
        jnp.where(plan.kept, weights, 0.0), mode="drop"
    )
    # Rows of other experts are zeroed before and ignored after, so that not even the oracle lets a
    # NaN cross from one token or expert to another (0 * inf is NaN), nor its gradient.
    rows = jnp.where(used[:, :, None], x[None], jnp.zeros((), x.dtype))
    outputs = all_experts(expert_fn, params, rows).astype(jnp.float32)
    return jnp.where(used[:, :, None], outputs * gate[:, :, None], 0.0).sum(axis=0)


def slots_executed(plan: DispatchPlan) -> Array:
    """f32[]: E * T rows."""
    a = plan.assignments
    return jnp.asarray(a.num_experts * a.num_tokens, jnp.float32)


DENSE = Implementation(
    name="dense",
    run=run,
    slots_executed=slots_executed,
    refuse=lambda expert_fn, plan, platform: "costs E times the work; it is the oracle",
    summary="every expert on every token (oracle)",
)
