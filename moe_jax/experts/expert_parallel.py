"""Runs experts that are spread over the devices of a mesh axis: rows travel to them and back.

For use inside ``jax.shard_map`` with ``check_vma=True``; ``moe_jax.parallel.sharding`` sets that up.
Every device holds some tokens and some experts, plans for its own tokens (so what is dropped is
decided per source device), and then:

1. sorts its kept rows by expert, which puts the rows for one device next to each other, and writes
   them into a buffer of static size S for each device;
2. *all-to-all*: the buffers go to the devices that hold the experts. The count of rows for which
   expert travels in the same buffer, in front of the rows or beside them, so it costs no third message;
3. treats each row that arrived as a token with one expert, plans again, and runs its experts by
   any implementation of this package;
4. *all-to-all*: the results go back, and every token sums its own.

The gradient is written by hand, so that its two all-to-alls move rows by gathers too, and nothing is
sent twice without need.

S follows from the plan's capacity when it has one: one size, two all-to-alls in the program. Without
capacity nothing is dropped: S is the smallest of a few sizes that holds the fullest buffer of any
device (a scalar maximum over devices decides, so that all agree), and loads beyond the largest size
go in further rounds. Fewer experts per token therefore send less.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.experts import run_experts
from moe_jax.experts.derivatives import call
from moe_jax.experts.exchange import (
    ExchangeSpec,
    ExpertParallel,
    RowCounts,
    SentRows,
    choose_size,
    counts_sent,
    explain_exchange,
    plan_received,
    rows_by_assignment,
    run_rounds,
    send,
    send_back,
    send_layout,
    send_sizes,
    sent_rows,
)
from moe_jax.experts.feed_forward import ExpertFn, FeedForward
from moe_jax.experts.implementation import (
    ExpertsOutput,
    learned_params,
    mask_rows,
    num_experts_of,
    output_shape,
    vary_like,
    vary_over,
    with_learned,
)
from moe_jax.experts.platforms import platform_of
from moe_jax.experts.tier_loop import wide
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
    platform: str | None = None,
) -> ExpertsOutput:
    """``run_experts`` where the experts are spread over devices. Inside ``shard_map`` only.

    Args:
        expert_fn: one expert (static).
        params: this device's experts, leading axis ``ceil(E / P)``; experts past E are padding.
        x: float[T, D], this device's tokens.
        plan: for this device's tokens over all E experts.
        weights: f32[N], from ``kept_weights``.
        parallel: the axes (static).
        implementation: what runs this device's experts, see ``moe_jax.experts``.
        platform: what is compiled for; None takes it from the mesh.

    Returns:
        y f32[T, D_out], and the rows that this device's experts computed, padding included.

    Raises:
        ValueError: the experts do not fit the axes, or a user's own experts with a model axis.
    """
    devices, local = parallel.devices, num_experts_of(params)
    experts = plan.assignments.num_experts
    if local != -(-experts // devices):
        raise ValueError(
            f"expert params: expected {-(-experts // devices)} experts on each of {devices} devices "
            f"for E={experts}, got {local}. Pad them with moe_jax.parallel.sharding.pad_experts."
        )
    if parallel.model_axis is not None:
        if not isinstance(expert_fn, FeedForward):
            raise ValueError(
                f"model axis: expected FeedForward, whose halves can be summed, got {expert_fn!r}. "
                "Leave the model axis out of the mesh for experts of your own."
            )
        params = bias_once(params, parallel.model_axis)
    # One type for all of them. The transpose of this cast is the sum over devices that gradients
    # need.
    params, x, weights, plan = vary_over((params, x, weights, plan), parallel.axes)
    # Axes of size 1 are common in tests and on small meshes: nothing has to travel there.
    if devices == 1:
        ran = run_experts(
            expert_fn,
            params,
            x,
            plan,
            weights,
            implementation=implementation,
            platform=platform,
        )
        y, executed = ran.y, vary_like(ran.slots_executed, x)
    else:
        where = platform_of((x, params, plan), platform=platform)
        exchange, _ = explain_exchange(parallel, where.name)
        parallel = dataclasses.replace(parallel, exchange=exchange)
        sizes, bounded = send_sizes(
            tokens=plan.assignments.num_tokens,
            slots=plan.assignments.slots_per_token or local,
            rows=plan.num_rows,
            local=local,
            devices=devices,
            capacity=plan.capacity,
            shares=parallel.send_shares,
        )
        bound = plan.assignments.num_tokens * min(plan.assignments.slots_per_token or local, local)
        bound = sizes[-1] if bounded else min(plan.num_rows, bound)
        spec = ExchangeSpec(
            expert_fn=expert_fn,
            parallel=parallel,
            implementation=implementation,
            platform=platform,
            devices=devices,
            sizes=sizes,
            bounded=bounded,
            bound=bound,
        )
        y, executed = call(_Exchanged(spec), params, x, weights, plan)
    if parallel.model_axis is not None:
        # Each device of the model axis has a slice of F, and the down projection is a sum over F.
        y = jax.lax.psum(y, parallel.model_axis)
        # The slices run the same rows, so their mean is the number of rows, not their sum.
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


def _experts(
    spec: ExchangeSpec, params: Params, plan: DispatchPlan, rows: Array
) -> tuple[Array, Array]:
    """This device's experts on the rows [M, D] that arrived: outputs in the dtype of the rows, and
    f32[], the rows computed."""
    ran = run_experts(
        spec.expert_fn,
        params,
        rows,
        plan,
        # Weights are 1 here: the combine weights multiply the outputs at the token's own device.
        kept_weights(plan),
        implementation=spec.implementation,
        platform=spec.platform,
    )
    return ran.y.astype(rows.dtype), ran.slots_executed


class _Kept(NamedTuple):
    """What arrived, kept so that the backward pass need not send it again; after one round only."""

    rows: Array  # [P * S, D]
    counts: Array  # i32[P, L]


def _forward(
    spec: ExchangeSpec, params: Params, x: Array, plan: DispatchPlan
) -> tuple[Array, Array, _Kept | None]:
    """Outputs [N, D_out] by assignment, rows computed, and what arrived."""
    layout = send_layout(plan, spec.devices)
    tier, rounds = choose_size(spec, layout)
    size = spec.sizes[-1]

    def step(start: Array, carry: Any) -> Any:
        def build(size: int) -> Array:
            sent = sent_rows(plan, layout, start, size)
            return mask_rows(sent.live, x[sent.tokens])

        ours = counts_sent(layout, start, size)
        counts, rows = send(spec, tier, build, ours)
        rows = rows.reshape(spec.devices * size, -1)
        outputs, executed = _experts(spec, params, plan_received(counts, size), rows)
        agreed = RowCounts(ours.sum(axis=1), counts.sum(axis=1))
        back = send_back(spec, tier, outputs.reshape(spec.devices, size, -1), agreed)
        executed = vary_like(executed, x)
        # A single round keeps what arrived for the backward pass. Several would each overwrite it.
        if carry is None:
            return (
                rows_by_assignment(plan, layout, start, back, None),
                executed,
                _Kept(rows, counts),
            )
        before, total = carry
        return rows_by_assignment(plan, layout, start, back, before), total + executed

    out = output_shape(spec.expert_fn, params, x)
    zeros = (jnp.zeros((plan.order.shape[0], out.shape[1]), x.dtype), jnp.zeros((), jnp.float32))
    ran: Any = run_rounds(spec, rounds, step, vary_over(zeros, spec.parallel.axes))
    # With several sizes the largest buffer would be kept whatever the load, so nothing is.
    return ran[0], ran[1], ran[2] if spec.bounded and len(spec.sizes) == 1 else None


@dataclasses.dataclass(frozen=True)
class _Exchanged:
    """Outputs and rows computed of experts on all devices, as a ``DifferentiableFunction``."""

    spec: ExchangeSpec

    batched_in_a_loop = False

    def run(
        self, params: Params, x: Array, weights: Array, plan: DispatchPlan, *, in_place: bool
    ) -> tuple[Array, Array]:
        del in_place  # the experts are functions with derivatives themselves
        outputs, executed, _ = _forward(self.spec, params, x, plan)
        return combine(plan, outputs, weights), executed

    def forward(
        self, params: Params, x: Array, weights: Array, plan: DispatchPlan, *, in_place: bool
    ) -> tuple[Any, Any]:
        del in_place
        outputs, executed, kept = _forward(self.spec, params, x, plan)
        # The outputs are kept for the gradient of the combine weights.
        return (combine(plan, outputs, weights), executed), (outputs, kept)

    def backward(
        self, arguments: tuple[Any, ...], residuals: Any, cotangents: Any, *, in_place: bool
    ) -> tuple[Any, ...]:
        del in_place
        return _backward(self.spec, arguments, residuals, cotangents[0])

    def reference(self, params: Params, x: Array, weights: Array, plan: DispatchPlan) -> Any:
        # One buffer that holds any load takes one round, so there is no loop of unknown length.
        bound = self.spec._replace(sizes=(self.spec.bound,), bounded=True)
        outputs, executed, kept = _forward(bound, params, x, plan)
        # Residuals must have the structure that `forward` gives them, since `backward` reads both.
        same = self.spec.bounded and len(self.spec.sizes) == 1
        return (combine(plan, outputs, weights), executed), (outputs, kept if same else None)


def _backward(
    spec: ExchangeSpec, arguments: tuple[Any, ...], residuals: Any, dy: Array
) -> tuple[Any, ...]:
    """Returns the gradients of (params, x, weights), and None for the plan."""
    params, x, weights, plan = arguments
    outputs, kept = residuals
    a = plan.assignments
    layout = send_layout(plan, spec.devices)
    tier, rounds = choose_size(spec, layout)
    size, width = spec.sizes[-1], x.shape[1]
    learned = learned_params(spec.expert_fn, params)

    def step(start: Array, carry: Any) -> Any:
        def gradients(sent: SentRows) -> Array:
            scaled = dy[sent.tokens] * weights[sent.assignments][..., None]
            return mask_rows(sent.live, scaled).astype(x.dtype)

        def build(size: int) -> Array:
            sent = sent_rows(plan, layout, start, size)
            if kept is not None:
                return gradients(sent)
            # What arrived was not kept: a buffer that holds any load would be large. The rows
            # travel once more, beside their gradients, in the same message.
            return jnp.concatenate([mask_rows(sent.live, x[sent.tokens]), gradients(sent)], axis=2)

        ours = counts_sent(layout, start, size)
        if kept is None:
            counts, both = send(spec, tier, build, ours)
            both = both.reshape(spec.devices * size, -1)
            rows, drows = both[:, :width], both[:, width:]
        else:
            rows, counts = kept
            agreed = RowCounts(ours.sum(axis=1), counts.sum(axis=1))
            drows = send(spec, tier, build, None, agreed)[1].reshape(spec.devices * size, -1)
        arrived = plan_received(counts, size)

        def run(learned: Params, rows: Array) -> Array:
            return _experts(spec, with_learned(params, learned), arrived, rows)[0]

        _, pull = jax.vjp(run, learned, rows)
        dparams, dback = pull(drows)
        agreed = RowCounts(ours.sum(axis=1), counts.sum(axis=1))
        back = send_back(spec, tier, dback.reshape(spec.devices, size, -1), agreed)
        if carry is None:
            return dparams, rows_by_assignment(plan, layout, start, back, None)
        total, dx = carry
        added = jax.tree.map(lambda t, d: t + d.astype(t.dtype), total, dparams)
        return added, rows_by_assignment(plan, layout, start, back, dx)

    sums = jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p.dtype)), learned)
    zeros = (sums, jnp.zeros((plan.order.shape[0], width), x.dtype))
    dparams, drows = run_rounds(spec, rounds, step, vary_over(zeros, spec.parallel.axes))
    dparams = jax.tree.map(lambda d, p: d.astype(p.dtype), dparams, learned)
    # The gradient rows carry the combine weights already.
    ones = vary_like(jnp.ones(weights.shape, jnp.float32), x)
    dx = combine(plan, drows, ones).astype(x.dtype)
    # d y[t] / d weights[n] is the output of assignment n, which the forward pass kept.
    products = (outputs.astype(jnp.float32) * dy[a.token_indices]).sum(axis=1)
    return dparams, dx, jnp.where(plan.kept, products, 0.0), None
