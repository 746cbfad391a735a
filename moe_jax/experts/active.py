"""For a handful of tokens: only the weights of experts in use are read, one row after another.

With fewer rows than experts the time goes into reading weights. So every kept row is a piece of its
own in the loop of ``tiered``: the trip count is the number of kept rows, experts without rows are
never touched, and a product with a single row is a matrix-vector product, which streams the
weights once where a product with a few rows first repacks them (more than twice as slow on CPU).
Rows of the same expert follow each other, so its weights are still in the cache.

The gradient is that of ``tiered``. It is right, but meant for tests: training batches are larger.
"""

from __future__ import annotations

import functools

import jax

from moe_jax.experts.base import Implementation
from moe_jax.experts.feed_forward import ExpertFn
from moe_jax.experts.tiered import Sizes, run_sizes, slots_executed_with
from moe_jax.types import Array, DispatchPlan, Params

_ONE_ROW = Sizes(bulk=(0,), pieces=(1,))


@functools.partial(jax.jit, static_argnums=0)
def run(expert_fn: ExpertFn, params: Params, x: Array, plan: DispatchPlan, weights: Array) -> Array:
    return run_sizes(expert_fn, _ONE_ROW, params, x, weights, plan)


def slots_executed(plan: DispatchPlan) -> Array:
    return slots_executed_with(plan, _ONE_ROW)


def refuse(expert_fn: ExpertFn, plan: DispatchPlan, backend: str) -> str | None:
    rows, experts = plan.num_rows, plan.assignments.num_experts
    if rows > experts:
        return f"is for fewer rows than experts, and here up to {rows} rows meet {experts} experts"
    return None


ACTIVE = Implementation(
    name="active",
    run=run,
    slots_executed=slots_executed,
    refuse=refuse,
    summary="one row at a time, reading only the experts in use (decoding)",
)
