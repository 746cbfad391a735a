"""Computes dropless experts in blocks whose static sizes are chosen at run time, by the load.

Two ways of running sorted rows are combined, and both choose among a few static sizes by
``lax.switch``:

* *Pieces*: a loop with a dynamic trip count over pieces of at most B rows of one expert. A piece
  runs in the smallest of a few sizes that holds it. Needs one expert's weights at a time.
* *Bulk*: the first C rows of every expert in one batched product, as in ``capacity``, where C is
  the cheapest of a few sizes for the current loads. Rows of an expert beyond C go to the pieces.

On a CPU with hundreds of rows per expert, the pieces alone are as fast as one large product, because
the hidden activations of a piece stay in the cache. They also fit any load. Accelerators need the
bulk to be fast. Nothing is dropped, no buffer is sized for the worst case, and fewer experts per
token cost less time.

The gradient is written by hand: differentiating through ``lax.switch`` would keep the residuals of
every branch, and a loop with a dynamic trip count has no reverse derivative. The backward pass runs
the hidden layers of the experts again instead of storing them. A hand-written
gradient does not support forward mode (``jax.jvp``): choose the implementation ``capacity``,
``dense`` or ``ragged`` for it.

Both passes add the output of a piece to its tokens immediately. A buffer of T * K rows would be
written, read and summed whatever k is: with it, a smaller dynamic k saved operations but much less
time. Only a forward pass that a gradient follows keeps its rows, for the gradient of the combine
weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.export
import jax.numpy as jnp

from moe_jax.experts.base import (
    Implementation,
    all_experts,
    from_bits,
    mask_rows,
    one_expert,
    output_shape,
    to_bits,
    vary_like,
)
from moe_jax.experts.feed_forward import ExpertFn
from moe_jax.types import Array, DispatchPlan, Params

# Sizes of the bulk, as shares of the mean load (rows / E). The steps are finest around 1, because
# they decide the padding of a balanced load.
_BULK_SHARES = {"cpu": (0.0,), "": (0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0625, 1.125, 1.25)}

# Sizes of the pieces. If the mean load is at most the largest piece, one piece holds most experts, so
# the steps are fine around the mean. Above it, only the last piece of an expert is padded, by half a
# step on average: with steps of a quarter, 13 % of the rows at a mean k of 1.3 were padding.
_MOST_PIECE_ROWS = 512
_PIECE_SHARES_OF_LARGEST = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
_PIECE_SHARES_OF_MEAN = (0.25, 0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25)

_SYMBOLIC_PIECES = (32, 64, 128, 256, 512)  # where the number of rows is symbolic (``jax.export``)

# What touching one expert's weights costs, in rows of arithmetic: a piece copies the weights of its
# expert, and the batched product streams the weights of all.
_COPY_ROWS = 64
_STREAM_ROWS = 12

_C = TypeVar("_C")


class TierSizes(NamedTuple):
    """The static sizes that one run chooses among, each ascending."""

    bulk: tuple[int, ...]  # C; 0 runs no bulk
    pieces: tuple[int, ...]  # B; longer runs of rows are cut at the largest


class _Layout(NamedTuple):
    """How the rows of a plan are split, decided at run time."""

    tier: Array  # i32[]: index into the bulk sizes
    base: Array  # i32[]: C, rows of each expert in the bulk
    beyond: Array  # i32[E]: rows of each expert that go to the pieces
    pieces_end: Array  # i32[E]: pieces of all experts up to and including this one


def bulk_sizes(plan: DispatchPlan, platform: str = "cpu") -> tuple[int, ...]:
    """Returns the static sizes C to choose from, ascending, at most ``plan.max_group``."""
    if jax.export.is_symbolic_dim(plan.num_rows):
        return (0,)  # no mean load to take a share of
    mean = plan.num_rows / plan.assignments.num_experts
    shares = _BULK_SHARES.get(platform, _BULK_SHARES[""])
    return tuple(sorted({min(plan.max_group, _round_up(s * mean, 16)) for s in shares}))


def piece_sizes(plan: DispatchPlan) -> tuple[int, ...]:
    """Returns the static sizes B of the pieces, ascending. Longer runs are cut at the largest."""
    if jax.export.is_symbolic_dim(plan.num_rows):
        return _SYMBOLIC_PIECES
    mean = plan.num_rows / plan.assignments.num_experts
    if mean > _MOST_PIECE_ROWS:
        sizes = [_round_up(_MOST_PIECE_ROWS * share, 8) for share in _PIECE_SHARES_OF_LARGEST]
    else:
        sizes = [max(32, _round_up(mean * share, 16)) for share in _PIECE_SHARES_OF_MEAN]
    return tuple(sorted({min(size, plan.max_group) for size in sizes}))


def _round_up(value: float, step: int) -> int:
    return math.ceil(value / step) * step


def _piece_rows(sizes: tuple[int, ...], rows: Array) -> Array:
    """Rows that the pieces of experts with ``rows`` rows compute, padding included."""
    # Whole pieces of the largest size, and one piece of the smallest size that holds the rest.
    rest = rows % sizes[-1]
    last = jnp.asarray((0, *sizes), jnp.int32)[_fitting(sizes, rest) + (rest > 0).astype(jnp.int32)]
    return rows - rest + last


def _fitting(sizes: tuple[int, ...], rows: Array) -> Array:
    """Index of the smallest size that holds ``rows`` (the largest size if none does)."""
    smaller = jnp.zeros(rows.shape, jnp.int32)
    for size in sizes[:-1]:
        smaller += (rows > size).astype(jnp.int32)
    return smaller


def sizes_for(plan: DispatchPlan, platform: str = "cpu") -> TierSizes:
    """Returns the sizes that ``run`` chooses among for plans of these static bounds."""
    return TierSizes(bulk_sizes(plan, platform), piece_sizes(plan))


def _layout(plan: DispatchPlan, sizes: TierSizes) -> _Layout:
    """Chooses the bulk size that costs least for this load, in rows of arithmetic."""
    pieces, bulk = sizes.pieces, jnp.asarray(sizes.bulk, jnp.int32)
    beyond = jnp.maximum(plan.group_sizes[None, :] - bulk[:, None], 0)  # [tiers, E]
    # A larger bulk computes more padding; a smaller one sends more rows to pieces, each of which
    # copies its expert's weights.
    count = -(-beyond // pieces[-1])
    streamed = jnp.asarray([c + _STREAM_ROWS * (c > 0) for c in sizes.bulk], jnp.int32)
    cost = plan.assignments.num_experts * streamed
    cost += (_piece_rows(pieces, beyond) + _COPY_ROWS * count).sum(axis=1)
    tier = jnp.argmin(cost).astype(jnp.int32)  # ties go to the smaller bulk
    return _Layout(tier, bulk[tier], beyond[tier], jnp.cumsum(count[tier]))


# --- rows ---------------------------------------------------------------------------------------
# A "sorted row" is an index into plan.order: kept assignments, grouped by expert, without gaps.


class _Rows(NamedTuple):
    """Some rows of the plan, with the assignment and token of each."""

    live: Array  # bool[...]: False for padding
    assignments: Array  # i32[...]
    tokens: Array  # i32[...]


def _rows(plan: DispatchPlan, row: Array, live: Array) -> _Rows:
    # Rows past the end are padding: clamped to be read in bounds, and not live.
    n = plan.order[jnp.minimum(row, plan.order.shape[0] - 1)]
    return _Rows(live, n, plan.assignments.token_indices[n])


def _bulk_rows(plan: DispatchPlan, size: int) -> _Rows:
    """The rows of the bulk, [E, C]."""
    slot = jnp.arange(size, dtype=jnp.int32)[None, :]
    return _rows(plan, plan.group_offsets[:, None] + slot, slot < plan.group_sizes[:, None])


def _sort_bulk(plan: DispatchPlan, flat: Array, size: int, length: int) -> Array:
    """Sorted rows [length, D] from rows of the bulk [E*C, D]; zeros for rows beyond the bulk."""
    row = jnp.arange(length, dtype=jnp.int32)
    n = plan.order[jnp.minimum(row, plan.order.shape[0] - 1)]
    position = plan.position[n]
    inside = (row < plan.group_sizes.sum()) & (position < size)
    source = jnp.where(inside, plan.assignments.expert_indices[n] * size + position, 0)
    return mask_rows(inside, flat[source])


def _sum_bulk(plan: DispatchPlan, flat: Array, size: int, weights: Array | None) -> Array:
    """f32[T, D] from rows of the bulk [E*C, D]: the weighted sum over a token's rows in the bulk."""
    inside = plan.kept & (plan.position < size)
    row = plan.assignments.expert_indices * size + plan.position
    return _sum_over_slots(plan, flat, inside, row, weights)


def sum_over_slots(plan: DispatchPlan, rows: Array, weights: Array | None) -> Array:
    """f32[T, D] from sorted rows [length, D]: the weighted sum over a token's assignments."""
    a = plan.assignments
    sorted_row = plan.group_offsets[jnp.minimum(a.expert_indices, a.num_experts - 1)]
    return _sum_over_slots(plan, rows, plan.kept, sorted_row + plan.position, weights)


def _sum_over_slots(
    plan: DispatchPlan, rows: Array, counted: Array, row: Array, weights: Array | None
) -> Array:
    """f32[T, D]: the sum over the assignments ``counted`` bool[N], each with its row i32[N]."""
    a, row = plan.assignments, jnp.where(counted, row, 0)

    def fetch(counted: Array, row: Array, weights: Array | None) -> Array:
        fetched = mask_rows(counted, rows[row]).astype(jnp.float32)
        return fetched if weights is None else fetched * weights[:, None]

    if not a.slots_per_token:
        empty = jnp.zeros((a.num_tokens, rows.shape[1]), jnp.float32)
        return empty.at[a.token_indices].add(fetch(counted, row, weights))
    # The sum goes slot by slot. XLA for CPU fuses it into one loop without a [T * K, D] buffer, which
    # takes a tenth of the time of a single gather of all slots.
    by_slot = (-1, a.slots_per_token)
    counted, row = counted.reshape(by_slot), row.reshape(by_slot)
    each = None if weights is None else weights.reshape(by_slot)
    terms = [
        fetch(counted[:, j], row[:, j], None if each is None else each[:, j])
        for j in range(a.slots_per_token)
    ]
    return functools.reduce(jnp.add, terms)


# --- the loop -----------------------------------------------------------------------------------


def _run_layout(
    sizes: TierSizes,
    plan: DispatchPlan,
    params: Params,
    bulk: Callable[[int], _C],
    gather: Callable[[_Rows], tuple[Array, ...]],
    piece: Callable[..., _C],
    put: Callable[[_C, Array, Array, _Rows, _C], _C],
) -> _C:
    """Runs the bulk, then every piece.

    Args:
        sizes, plan, params: what to run.
        bulk: ``(C) -> carry``: runs the first C rows of every expert.
        gather: ``(rows) -> arrays``: fetches what the largest piece would need.
        piece: ``(B, expert_params, *arrays) -> result``: computes the first B rows, padded to the
            largest piece, so that all branches return one shape.
        put: ``(carry, expert, first_row, rows, result) -> carry``: stores a result.
    """
    layout, pieces = _layout(plan, sizes), sizes.pieces
    most = pieces[-1]
    if len(sizes.bulk) == 1:
        carry = bulk(sizes.bulk[0])
    else:
        carry = jax.lax.switch(layout.tier, [functools.partial(bulk, c) for c in sizes.bulk])
    if sizes.bulk == (plan.max_group,):
        return carry  # the bulk holds any load, so there is no loop

    slot = jnp.arange(most, dtype=jnp.int32)

    def step(index: Array, carry: _C) -> _C:
        # Pieces are numbered expert after expert: the expert is the number of ends at or before it.
        expert = (layout.pieces_end <= index).sum(dtype=jnp.int32)
        held = layout.beyond[expert]
        # The expert's first piece has the index `pieces_end - ceil(held / most)`; `done` counts the
        # rows of its earlier pieces.
        done = (index - layout.pieces_end[expert] + -(-held // most)) * most
        row = plan.group_offsets[expert] + layout.base + done
        held = held - done
        one = one_expert(params, expert)
        rows = _rows(plan, row + slot, slot < held)
        # Only the expert runs inside the branches: code outside is compiled once, not per size.
        branches = [functools.partial(piece, size) for size in pieces]
        result = jax.lax.switch(_fitting(pieces, held), branches, one, *gather(rows))
        return put(carry, expert, row, rows, result)

    # The trip count is known at run time only, so the loop has no reverse derivative of its own.
    return jax.lax.fori_loop(jnp.int32(0), layout.pieces_end[-1], step, carry)


def _pad(rows: Array, length: int) -> Array:
    return jnp.pad(rows, ((0, length - rows.shape[0]), (0, 0)))


def _put_rows(total: Array, row: Array, live: Array, rows: Array) -> Array:
    """Writes the live rows at ``row`` and leaves the rows after them, which belong to other experts.

    ``total`` holds ``to_bits``: XLA for CPU would widen all of a 16-bit float carry at every piece.
    """
    old = jax.lax.dynamic_slice_in_dim(total, row, rows.shape[0])
    new = jnp.where(live[:, None], to_bits(rows), old)
    return jax.lax.dynamic_update_slice_in_dim(total, new, row, 0)


def _add_rows(total: Array, rows: _Rows, values: Array) -> Array:
    """Adds ``values`` [B, D] to the tokens of the live rows, in f32[T, D]."""
    tokens = jnp.where(rows.live, rows.tokens, total.shape[0])  # an index past the end is dropped
    return total.at[tokens].add(values, mode="drop")


def _add_expert(total: Params, expert: Array, update: Params) -> Params:
    """Adds the gradient of one expert to its slice of the gradients of all experts."""

    def add(whole: Array, part: Array) -> Array:
        old = jax.lax.dynamic_index_in_dim(whole, expert, axis=0, keepdims=False)
        new = old + part.astype(whole.dtype)
        return jax.lax.dynamic_update_index_in_dim(whole, new, expert, axis=0)

    return jax.tree.map(add, total, update)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which gradients of parameters of ``dtype`` are summed over pieces."""
    return jnp.promote_types(dtype, jnp.float32)


# --- forward and backward -----------------------------------------------------------------------


class _Collect(NamedTuple):
    """How the experts' outputs are collected into one array."""

    start: Callable[[], Array]  # the array before any row
    bulk: Callable[[int, Array], Array]  # (C, outputs [E*C, D_out]) -> the array after the bulk
    put: Callable[[Array, Array, Array, _Rows, Array], Array]  # as in ``_run_layout``


def _collected(
    expert_fn: ExpertFn,
    sizes: TierSizes,
    params: Params,
    x: Array,
    plan: DispatchPlan,
    collect: _Collect,
) -> Array:
    """Runs every kept assignment through its expert and collects the outputs."""
    most = sizes.pieces[-1]

    def bulk(size: int) -> Array:
        if size == 0:
            return collect.start()
        rows = _bulk_rows(plan, size)
        outputs = all_experts(expert_fn, params, mask_rows(rows.live, x[rows.tokens]))
        return collect.bulk(size, outputs.reshape(-1, outputs.shape[-1]))

    def gather(rows: _Rows) -> tuple[Array]:
        return (mask_rows(rows.live, x[rows.tokens]),)

    def piece(size: int, one: Params, block: Array) -> Array:
        return _pad(expert_fn(one, block[:size]), most)

    return _run_layout(sizes, plan, params, bulk, gather, piece, collect.put)


def _outputs(
    expert_fn: ExpertFn, sizes: TierSizes, params: Params, x: Array, plan: DispatchPlan
) -> Array:
    """Every kept assignment's expert output, [num_rows + B, D_out] in sorted order."""
    out, length = output_shape(expert_fn, params, x), plan.num_rows + sizes.pieces[-1]

    def start() -> Array:
        return vary_like(to_bits(jnp.zeros((length, out.shape[1]), out.dtype)), (params, x, plan))

    collect = _Collect(
        start=start,
        bulk=lambda size, flat: to_bits(_sort_bulk(plan, flat, size, length)),
        put=lambda total, expert, row, rows, outputs: _put_rows(total, row, rows.live, outputs),
    )
    return from_bits(_collected(expert_fn, sizes, params, x, plan, collect), out.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_with_sizes(
    expert_fn: ExpertFn,
    sizes: TierSizes,
    params: Params,
    x: Array,
    weights: Array,
    plan: DispatchPlan,
) -> Array:
    """``run`` with the given sizes."""

    def start() -> Array:
        zeros = jnp.zeros((x.shape[0], output_shape(expert_fn, params, x).shape[1]), jnp.float32)
        return vary_like(zeros, (params, x, weights, plan))

    def put(total: Array, expert: Array, row: Array, rows: _Rows, outputs: Array) -> Array:
        weighted = outputs.astype(jnp.float32) * weights[rows.assignments][:, None]
        return _add_rows(total, rows, weighted)

    collect = _Collect(start, lambda size, flat: _sum_bulk(plan, flat, size, weights), put)
    return _collected(expert_fn, sizes, params, x, plan, collect)


def _fwd(expert_fn, sizes, params, x, weights, plan):
    outputs = _outputs(expert_fn, sizes, params, x, plan)
    # The outputs are kept for the gradient of the combine weights. Without them the backward pass
    # would run the whole forward pass again instead of the hidden layers alone.
    return sum_over_slots(plan, outputs, weights), (params, x, weights, plan, outputs)


def backward(expert_fn: ExpertFn, sizes: TierSizes, residuals, dy: Array):
    """Returns the gradients of (params, x, weights), and None for the plan, from what ``_fwd`` kept."""
    params, x, weights, plan, outputs = residuals
    a = plan.assignments
    most = sizes.pieces[-1]

    def gradient_rows(rows: _Rows) -> Array:
        scaled = dy[rows.tokens] * weights[rows.assignments][..., None]
        return mask_rows(rows.live, scaled).astype(outputs.dtype)

    def bulk(size: int) -> tuple[Params, Array]:
        if size == 0:
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, _wide(p.dtype)), params)
            return vary_like((zeros, jnp.zeros(x.shape, jnp.float32)), (params, x, plan, dy))
        rows = _bulk_rows(plan, size)
        blocks = mask_rows(rows.live, x[rows.tokens])
        _, pull = jax.vjp(functools.partial(all_experts, expert_fn), params, blocks)
        dparams, dblocks = pull(gradient_rows(rows))
        dparams = jax.tree.map(lambda d: d.astype(_wide(d.dtype)), dparams)
        return dparams, _sum_bulk(plan, dblocks.reshape(-1, x.shape[1]), size, None)

    def gather(rows: _Rows) -> tuple[Array, Array]:
        return mask_rows(rows.live, x[rows.tokens]), gradient_rows(rows)

    def piece(size: int, one: Params, block: Array, dblock: Array) -> tuple[Params, Array]:
        _, pull = jax.vjp(expert_fn, one, block[:size])
        dexpert, drows = pull(dblock[:size])
        return dexpert, _pad(drows, most)

    def put(total, expert, row, rows, gradients):
        dx = _add_rows(total[1], rows, gradients[1].astype(jnp.float32))
        return _add_expert(total[0], expert, gradients[0]), dx

    dparams, dx = _run_layout(sizes, plan, params, bulk, gather, piece, put)
    dparams = jax.tree.map(lambda d, p: d.astype(p.dtype), dparams, params)

    # d y[t] / d weights[n] is the output of assignment n: no expert runs again for it.
    tokens = a.token_indices[plan.order[: plan.num_rows]]
    sorted_dweights = (outputs[: plan.num_rows].astype(jnp.float32) * dy[tokens]).sum(axis=1)
    row = plan.group_offsets[jnp.minimum(a.expert_indices, a.num_experts - 1)] + plan.position
    dweights = jnp.where(plan.kept, sorted_dweights[jnp.where(plan.kept, row, 0)], 0.0)
    return dparams, dx.astype(x.dtype), dweights, None


run_with_sizes.defvjp(_fwd, backward)


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
    """Computes f32[T, D_out] in bulk and pieces; see ``Implementation.run``."""
    return run_with_sizes(expert_fn, sizes_for(plan, platform), params, x, weights, plan)


def slots_executed_with(plan: DispatchPlan, sizes: TierSizes) -> Array:
    """f32[]: the rows computed, padding included, as the loop and the switches choose them."""
    layout = _layout(plan, sizes)
    rows = plan.assignments.num_experts * layout.base
    rows += _piece_rows(sizes.pieces, layout.beyond).sum()
    return rows.astype(jnp.float32)


def slots_executed(plan: DispatchPlan, platform: str = "cpu") -> Array:
    """f32[]: rows of the chosen bulk and of all pieces, padding included."""
    return slots_executed_with(plan, sizes_for(plan, platform))


TIERED = Implementation(
    name="tiered",
    run=run,
    slots_executed=slots_executed,
    refuse=lambda expert_fn, plan, platform: None,
    summary="sorted rows in pieces of a size chosen at run time (dropless)",
    sized_by_platform=True,
)
