"""Experts spread over the devices of a mesh axis: rows travel to their experts and back.

For use inside ``jax.shard_map`` with ``check_vma=True``; ``moe_jax.parallel.sharding`` sets that up.
Every device holds some tokens and some experts, plans for its own tokens (so what is dropped is
decided per source device), and then:

1. sorts its kept rows by expert, which puts the rows for one device next to each other, and writes
   them into a buffer of static size S for each device;
2. *all-to-all*: the buffers go to the devices that hold the experts. How many rows are for which
   expert travels in the first rows of the same buffer, so it costs no third message;
3. takes what arrived for tokens with one expert each, plans again, and runs its experts by any
   implementation of this package;
4. *all-to-all*: the results go back, and every token sums what is its own.

The gradient is written by hand, so that its two all-to-alls move rows by gathers too, and nothing is
sent that need not be.

S follows from the plan's capacity when it has one: one size, two all-to-alls in the program. Without
capacity nothing is dropped: S is the smallest of a few sizes that holds the fullest buffer of any
device (a scalar maximum over devices decides, so that all agree), and loads beyond the largest size
go in further rounds. Fewer experts per token therefore send less.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.experts import run_experts
from moe_jax.experts.base import ExpertsOutput, num_experts_of, vary_like, vary_over
from moe_jax.experts.exchange import (
    ExpertParallel,
    How,
    Sent,
    Sizes,
    counts_sent,
    in_rounds,
    received,
    send,
    send_back,
    send_sizes,
    sent_rows,
    take_home,
    tier_of,
    ways_of,
    zero_unless,
)
from moe_jax.experts.feed_forward import ExpertFn, FeedForward
from moe_jax.routing.dispatch import combine, kept_weights
from moe_jax.types import Array, DispatchPlan, Params


def run_parallel(
    expert_fn: ExpertFn,
    params: Params,
    x: Array,
    plan: DispatchPlan,
    weights: Array,
    parallel: ExpertParallel,
    *,
    implementation: str | tuple[str, ...] | None = None,
) -> ExpertsOutput:
    """``run_experts`` where the experts are spread over devices. Inside ``shard_map`` only.

    Args:
        expert_fn: one expert (static).
        params: this device's experts, leading axis ``ceil(E / P)``; experts past E are padding.
        x: float[T, D], this device's tokens.
        plan: for this device's tokens over all E experts.
        weights: f32[N], from ``kept_weights``.
        parallel: the axes (static).
        implementation: what runs the experts that are here, see ``moe_jax.experts``.

    Returns:
        y f32[T, D_out], and the rows that this device's experts computed, padding included.

    Raises:
        ValueError: the experts do not fit the axes, or experts of one's own with a model axis.
    """
    devices, here = parallel.devices, num_experts_of(params)
    experts = plan.assignments.num_experts
    if here != -(-experts // devices):
        raise ValueError(
            f"expert params: expected {-(-experts // devices)} experts on each of {devices} devices "
            f"for E={experts}, got {here}. Pad them with moe_jax.parallel.sharding.pad_experts."
        )
    if parallel.model_axis is not None:
        if not isinstance(expert_fn, FeedForward):
            raise ValueError(
                f"model axis: expected FeedForward, whose halves can be summed, got {expert_fn!r}. "
                "Leave the model axis out of the mesh for experts of your own."
            )
        params = bias_once(params, parallel.model_axis)
    params, x, weights, plan = vary_over((params, x, weights, plan), parallel.axes)
    if devices == 1:
        ran = run_experts(expert_fn, params, x, plan, weights, implementation=implementation)
        y, executed = ran.y, vary_like(ran.slots_executed, x)
    else:
        sizes, bounded = send_sizes(
            tokens=plan.assignments.num_tokens,
            slots=plan.assignments.slots_per_token or here,
            rows=plan.num_rows,
            here=here,
            devices=devices,
            capacity=plan.capacity,
            shares=parallel.send_shares,
        )
        how = How(expert_fn, parallel, implementation, devices, sizes, bounded)
        done: Any = _run(how, params, x, weights, plan)
        y, executed = done
    if parallel.model_axis is not None:
        y = jax.lax.psum(y, parallel.model_axis)
        executed = jax.lax.pmean(executed, parallel.model_axis)
    return ExpertsOutput(y=y, slots_executed=executed, implementation="expert_parallel")


def bias_once(params: Params, model_axis: str) -> Params:
    """Parameters whose ``down_bias`` is zero on all but the first device of the model axis.

    Each device of that axis returns a part of the sum, and the bias must be in one of them only.
    """
    if "down_bias" not in params:
        return params
    first = jax.lax.axis_index(model_axis) == 0
    return {**params, "down_bias": jnp.where(first, params["down_bias"], 0.0)}


# --- forward and backward -------------------------------------------------------------------


def _experts(how: How, params: Params, plan: DispatchPlan, rows: Array) -> tuple[Array, Array]:
    """This device's experts on the rows [M, D] that arrived: outputs in the dtype of the rows, and
    f32[], the rows computed."""
    ran = run_experts(
        how.expert_fn, params, rows, plan, kept_weights(plan), implementation=how.implementation
    )
    return ran.y.astype(rows.dtype), ran.slots_executed


class _Kept(NamedTuple):
    """What the backward pass need not send again; only where the rows came in one round."""

    rows: Array  # [P * S, D]
    counts: Array  # i32[P, L]


def _forward(
    how: How, params: Params, x: Array, plan: DispatchPlan
) -> tuple[Array, Array, _Kept | None]:
    """Outputs [N, D_out] by assignment, rows computed, and what arrived."""
    ways = ways_of(plan, how.devices)
    tier, rounds = tier_of(how, ways)
    size = how.sizes[-1]

    def step(start: Array, carry: Any) -> Any:
        def make(size: int) -> Array:
            sent = sent_rows(plan, ways, start, size)
            return zero_unless(sent.live, x[sent.tokens])

        sent = counts_sent(ways, start, size)
        counts, rows = send(how, tier, make, sent)
        rows = rows.reshape(how.devices * size, -1)
        here = received(counts, size)
        made, executed = _experts(how, params, here, rows)
        sizes = Sizes(sent.sum(axis=1), counts.sum(axis=1))
        back = send_back(how, tier, made.reshape(how.devices, size, -1), sizes)
        executed = vary_like(executed, x)
        if carry is None:
            return take_home(plan, ways, start, back, None), executed, _Kept(rows, counts)
        outputs, total = carry
        return take_home(plan, ways, start, back, outputs), total + executed

    one = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), params)
    out = jax.eval_shape(how.expert_fn, one, jax.ShapeDtypeStruct((1, x.shape[1]), x.dtype))
    zeros = (jnp.zeros((plan.order.shape[0], out.shape[1]), x.dtype), jnp.zeros((), jnp.float32))
    done: Any = in_rounds(how, rounds, step, vary_over(zeros, how.parallel.axes))
    return done[0], done[1], done[2] if how.bounded and len(how.sizes) == 1 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
    how: How, params: Params, x: Array, weights: Array, plan: DispatchPlan
) -> tuple[Array, Array]:
    outputs, executed, _ = _forward(how, params, x, plan)
    return combine(plan, outputs, weights), executed


def _fwd(how, params, x, weights, plan):
    outputs, executed, kept = _forward(how, params, x, plan)
    # The outputs are kept for the gradient of the combine weights.
    residuals = (params, x, weights, plan, outputs, kept)
    return (combine(plan, outputs, weights), executed), residuals


def _bwd(how, residuals, cotangents):
    params, x, weights, plan, outputs, kept = residuals
    dy, _ = cotangents
    a = plan.assignments
    ways = ways_of(plan, how.devices)
    tier, rounds = tier_of(how, ways)
    size, width = how.sizes[-1], x.shape[1]

    def step(start: Array, carry: Any) -> Any:
        def gradients(sent: Sent) -> Array:
            scaled = dy[sent.tokens] * weights[sent.assignments][..., None]
            return zero_unless(sent.live, scaled).astype(x.dtype)

        def make(size: int) -> Array:
            sent = sent_rows(plan, ways, start, size)
            if kept is not None:
                return gradients(sent)
            # What arrived was not kept: a buffer that holds any load would be large. The rows
            # travel once more, beside their gradients, in the same message.
            return jnp.concatenate(
                [zero_unless(sent.live, x[sent.tokens]), gradients(sent)], axis=2
            )

        ours = counts_sent(ways, start, size)
        if kept is None:
            counts, both = send(how, tier, make, ours)
            both = both.reshape(how.devices * size, -1)
            rows, drows = both[:, :width], both[:, width:]
        else:
            rows, counts = kept
            known = Sizes(ours.sum(axis=1), counts.sum(axis=1))
            drows = send(how, tier, make, None, known)[1].reshape(how.devices * size, -1)
        here = received(counts, size)
        _, pull = jax.vjp(lambda p, r: _experts(how, p, here, r)[0], params, rows)
        dparams, dback = pull(drows)
        sizes = Sizes(ours.sum(axis=1), counts.sum(axis=1))
        home = send_back(how, tier, dback.reshape(how.devices, size, -1), sizes)
        if carry is None:
            return dparams, take_home(plan, ways, start, home, None)
        total, dx = carry
        added = jax.tree.map(lambda t, d: t + d.astype(t.dtype), total, dparams)
        return added, take_home(plan, ways, start, home, dx)

    wide = jax.tree.map(
        lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params
    )
    zeros = (wide, jnp.zeros((plan.order.shape[0], width), x.dtype))
    dparams, drows = in_rounds(how, rounds, step, vary_over(zeros, how.parallel.axes))
    dparams = jax.tree.map(lambda d, p: d.astype(p.dtype), dparams, params)
    ones = vary_like(jnp.ones(weights.shape, jnp.float32), x)
    dx = combine(plan, drows, ones).astype(x.dtype)
    products = (outputs.astype(jnp.float32) * dy[a.token_indices]).sum(axis=1)
    return dparams, dx, jnp.where(plan.kept, products, 0.0), None


_run.defvjp(_fwd, _bwd)
