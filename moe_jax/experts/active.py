"""Experts for a handful of tokens: one row after another, reading the weights of experts in use only.

With fewer rows than experts the time goes into reading weights. So every kept row is one piece in the
loop of ``tiered``: the trip count is the number of kept rows, experts without rows are never touched,
and rows of the same expert follow each other, so its weights are still in the cache.

On a CPU, ``FeedForward`` is run by ``vector_product``, which reads an expert's weights in place.

The derivatives are those of ``tiered``. They are right, but meant for tests: training batches are
larger.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from moe_jax.checks import holds
from moe_jax.experts.feed_forward import ACTIVATIONS, ExpertFn, FeedForward, check_params
from moe_jax.experts.implementation import Implementation, vary_like
from moe_jax.experts.tier_loop import TierSizes, sum_over_slots
from moe_jax.experts.tiered import run_with_sizes, slots_executed_with
from moe_jax.experts.vector_product import vector_product
from moe_jax.types import Array, DispatchPlan, Params

_ONE_ROW = TierSizes(bulk=(0,), pieces=(1,))


def _stream_row(expert_fn: FeedForward, params: Params, expert: Array, row: Array) -> Array:
    """Returns ``expert_fn`` of one row [D] with the parameters of ``expert``, without copying them."""

    def project(name: str, row: Array) -> Array:
        out = vector_product(params[name], expert, row)
        scale = params.get(f"{name}_scale")
        if scale is not None:
            out = out * scale[expert].astype(jnp.float32)
        bias = params.get(f"{name}_bias")
        return out if bias is None else out + bias[expert].astype(jnp.float32)

    act = ACTIVATIONS[expert_fn.activation]
    hidden = project("up", row)
    hidden = act(project("gate", row)) * hidden if expert_fn.gated else act(hidden)
    return project("down", hidden.astype(row.dtype)).astype(row.dtype)


def _outputs(expert_fn: FeedForward, params: Params, x: Array, plan: DispatchPlan) -> Array:
    """Every kept assignment's expert output, [num_rows + 1, D] in sorted order."""
    a = plan.assignments

    def step(i: Array, total: Array) -> Array:
        n = plan.order[i]
        output = _stream_row(expert_fn, params, a.expert_indices[n], x[a.token_indices[n]])
        return jax.lax.dynamic_update_index_in_dim(total, output, i, axis=0)

    # One row more than is used: the shape that `sum_over_slots` gets from `tiered` with pieces of
    # one row.
    total = jnp.zeros((plan.num_rows + 1, params["down"].shape[2]), x.dtype)
    total = vary_like(total, (params, x, plan))
    # The trip count is the number of kept rows of this batch, so unused slots cost nothing.
    return jax.lax.fori_loop(jnp.int32(0), plan.group_sizes.sum(dtype=jnp.int32), step, total)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _stream(expert_fn: FeedForward, params: Params, x: Array, weights: Array, plan: DispatchPlan):
    return sum_over_slots(plan, _outputs(expert_fn, params, x, plan), weights)


@_stream.defjvp
def _stream_jvp(expert_fn, primals, tangents):
    *floats, plan = primals
    # Only the tangents run through `tiered`: the values stay those of the fast path, to the last
    # bit.
    tiered = functools.partial(run_with_sizes, expert_fn, _ONE_ROW, plan=plan)
    return _stream(expert_fn, *primals), jax.jvp(tiered, tuple(floats), tangents[:-1])[1]


@functools.partial(jax.jit, static_argnums=0, static_argnames="platform")
def run(
    expert_fn: ExpertFn,
    params: Params,
    x: Array,
    plan: DispatchPlan,
    weights: Array,
    *,
    platform: str = "cpu",
) -> Array:
    """Computes f32[T, D_out], one kept row after another; see ``Implementation.run``."""
    check_params(expert_fn, params, d_model=x.shape[1], num_experts=plan.assignments.num_experts)
    # Only for `FeedForward` is it known which products to write out.
    if isinstance(expert_fn, FeedForward) and platform == "cpu":
        return _stream(expert_fn, params, x, weights, plan)
    return run_with_sizes(expert_fn, _ONE_ROW, params, x, weights, plan)


def slots_executed(plan: DispatchPlan, platform: str = "cpu") -> Array:
    """f32[]: the kept rows and no padding."""
    del platform
    return slots_executed_with(plan, _ONE_ROW)


def refuse(expert_fn: ExpertFn, plan: DispatchPlan, platform: str) -> str | None:
    """Refuses plans that may keep more rows than there are experts, and platforms with kernels."""
    if platform in ("tpu", "cuda") and isinstance(expert_fn, FeedForward):
        return f"runs one row after another, and the kernels of {platform} take all at once"
    rows, experts = plan.num_rows, plan.assignments.num_experts
    if not holds(lambda: rows <= experts):
        return (
            f"is for fewer rows than experts, and this plan has up to {rows} for {experts} experts"
        )
    return None


ACTIVE = Implementation(
    name="active",
    run=run,
    slots_executed=slots_executed,
    refuse=refuse,
    summary="one row at a time, reading only the experts in use (decoding)",
    sized_by_platform=True,
)
