"""The loop of ``tiered``: which rows an expert has, the bulk, the pieces, and where results go."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from moe_jax.experts.feed_forward import ExpertFn
from moe_jax.experts.implementation import mask_rows, one_expert, to_bits
from moe_jax.types import Array, DispatchPlan, Params

# Cost of reading one expert's weights, in units of one row's computation: a piece copies the weights
# of its expert, and the batched product streams the weights of all.
_COPY_ROWS = 64
_STREAM_ROWS = 12

_C = TypeVar("_C")


class TierSizes(NamedTuple):
    """The static sizes that one run chooses among, each ascending."""

    bulk: tuple[int, ...]  # C; 0 runs no bulk
    pieces: tuple[int, ...]  # B; longer runs of rows are cut at the largest
    in_place: bool = True  # whether 16-bit floats are moved as their bits, which have no derivative


class Layout(NamedTuple):
    """How the rows of a plan are split, decided at run time."""

    tier: Array  # i32[]: index into the bulk sizes
    base: Array  # i32[]: C, rows of each expert in the bulk
    beyond: Array  # i32[E]: rows of each expert that go to the pieces
    pieces_end: Array  # i32[E]: pieces of all experts up to and including this one


def piece_rows(sizes: tuple[int, ...], rows: Array) -> Array:
    """Rows that the pieces of experts with ``rows`` rows compute, padding included."""
    # Whole pieces of the largest size, and one piece of the smallest size that holds the rest.
    rest = rows % sizes[-1]
    last = jnp.asarray((0, *sizes), jnp.int32)[_fitting(sizes, rest) + (rest > 0).astype(jnp.int32)]
    return rows - rest + last


def _fitting(sizes: tuple[int, ...], rows: Array) -> Array:
    """Index of the smallest size that holds ``rows`` (the largest size if none does)."""
    # A sum of a few comparisons. `searchsorted` would be a loop inside the loop over pieces.
    smaller = jnp.zeros(rows.shape, jnp.int32)
    for size in sizes[:-1]:
        smaller += (rows > size).astype(jnp.int32)
    return smaller


def layout_of(plan: DispatchPlan, sizes: TierSizes) -> Layout:
    """Chooses the bulk size that costs least for this load, in rows of arithmetic."""
    pieces, bulk = sizes.pieces, jnp.asarray(sizes.bulk, jnp.int32)
    beyond = jnp.maximum(plan.group_sizes[None, :] - bulk[:, None], 0)  # [tiers, E]
    # A larger bulk computes more padding; a smaller one sends more rows to pieces, each of which
    # copies its expert's weights.
    count = -(-beyond // pieces[-1])
    streamed = jnp.asarray([c + _STREAM_ROWS * (c > 0) for c in sizes.bulk], jnp.int32)
    cost = plan.assignments.num_experts * streamed
    cost += (piece_rows(pieces, beyond) + _COPY_ROWS * count).sum(axis=1, dtype=jnp.int32)
    tier = jnp.argmin(cost).astype(jnp.int32)  # ties go to the smaller bulk
    return Layout(tier, bulk[tier], beyond[tier], jnp.cumsum(count[tier], dtype=jnp.int32))


# --- rows ---------------------------------------------------------------------------------------
# A "sorted row" is an index into plan.order: kept assignments, grouped by expert, without gaps.


class Rows(NamedTuple):
    """Some rows of the plan, with the assignment and token of each."""

    live: Array  # bool[...]: False for padding
    assignments: Array  # i32[...]
    tokens: Array  # i32[...]


def rows_at(plan: DispatchPlan, row: Array, live: Array) -> Rows:
    """Looks up the sorted rows ``row`` i32[...]; ``live`` bool[...] is False for padding."""
    # Rows past the end are padding: clamped to be read in bounds, and not live.
    n = plan.order[jnp.minimum(row, plan.order.shape[0] - 1)]
    return Rows(live, n, plan.assignments.token_indices[n])


def bulk_rows(plan: DispatchPlan, size: int) -> Rows:
    """The rows of the bulk, [E, C]."""
    slot = jnp.arange(size, dtype=jnp.int32)[None, :]
    return rows_at(plan, plan.group_offsets[:, None] + slot, slot < plan.group_sizes[:, None])


def sort_bulk(plan: DispatchPlan, flat: Array, size: int, length: int) -> Array:
    """Sorted rows [length, D] from rows of the bulk [E*C, D]; zeros for rows beyond the bulk."""
    row = jnp.arange(length, dtype=jnp.int32)
    n = plan.order[jnp.minimum(row, plan.order.shape[0] - 1)]
    position = plan.position[n]
    inside = (row < plan.group_sizes.sum(dtype=jnp.int32)) & (position < size)
    source = jnp.where(inside, plan.assignments.expert_indices[n] * size + position, 0)
    return mask_rows(inside, flat[source])


def sum_bulk(plan: DispatchPlan, flat: Array, size: int, weights: Array | None) -> Array:
    """f32[T, D] from rows of the bulk [E*C, D]: the weighted sum over a token's rows in the bulk."""
    inside = plan.kept & (plan.position < size)
    row = plan.assignments.expert_indices * size + plan.position
    return _sum_over_slots(plan, flat, inside, row, weights)


def sum_over_slots(plan: DispatchPlan, rows: Array, weights: Array | None) -> Array:
    """f32[T, D] from sorted rows [length, D]: the weighted sum over a token's assignments."""
    a = plan.assignments
    # Padding has the expert index E. It is clamped to be read in bounds, and `kept` leaves it out.
    sorted_row = plan.group_offsets[jnp.minimum(a.expert_indices, a.num_experts - 1)]
    return _sum_over_slots(plan, rows, plan.kept, sorted_row + plan.position, weights)


def _sum_over_slots(
    plan: DispatchPlan, rows: Array, counted: Array, row: Array, weights: Array | None
) -> Array:
    """f32[T, D]: the sum over the assignments ``counted`` bool[N], each with its row i32[N]."""
    a, row = plan.assignments, jnp.where(counted, row, 0)

    def fetch(counted: Array, row: Array, weights: Array | None) -> Array:
        # Rows that are not counted may hold NaN: they are replaced before the weight multiplies
        # them.
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


def run_layout(
    sizes: TierSizes,
    plan: DispatchPlan,
    params: Params,
    bulk: Callable[[int], _C],
    gather: Callable[[Rows], tuple[Array, ...]],
    piece: Callable[..., _C],
    put: Callable[[_C, Array, Array, Rows, _C], _C],
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
    layout, pieces = layout_of(plan, sizes), sizes.pieces
    most = pieces[-1]
    # With a single size there is nothing to choose, and the CPU compiles no switch.
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
        one = one_expert(params, expert, in_place=sizes.in_place)
        rows = rows_at(plan, row + slot, slot < held)
        # Only the expert runs inside the branches: code outside is compiled once, not per size.
        branches = [functools.partial(piece, size) for size in pieces]
        result = jax.lax.switch(_fitting(pieces, held), branches, one, *gather(rows))
        return put(carry, expert, row, rows, result)

    # The trip count is known at run time only, so the loop has no reverse derivative of its own.
    return jax.lax.fori_loop(jnp.int32(0), layout.pieces_end[-1], step, carry)


def pad_rows(rows: Array, length: int) -> Array:
    """Appends zero rows to [N, D] up to [length, D]."""
    return jnp.pad(rows, ((0, length - rows.shape[0]), (0, 0)))


def put_rows(total: Array, row: Array, live: Array, rows: Array) -> Array:
    """Writes the live rows at ``row`` and leaves the rows after them, which belong to other experts.

    ``total`` may hold ``to_bits``. Bits avoid a conversion: XLA for CPU converts a whole 16-bit float
    carry to a wider type at every piece.
    """
    old = jax.lax.dynamic_slice_in_dim(total, row, rows.shape[0])
    new = jnp.where(live[:, None], to_bits(rows) if total.dtype != rows.dtype else rows, old)
    return jax.lax.dynamic_update_slice_in_dim(total, new, row, 0)


def add_rows(total: Array, rows: Rows, values: Array) -> Array:
    """Adds ``values`` [B, D] to the tokens of the live rows, in f32[T, D]."""
    tokens = jnp.where(rows.live, rows.tokens, total.shape[0])  # an index past the end is dropped
    return total.at[tokens].add(values, mode="drop")


def add_expert(total: Params, expert: Array, update: Params) -> Params:
    """Adds the gradient of one expert to its slice of the gradients of all experts."""

    def add(whole: Array, part: Array) -> Array:
        # XLA updates one slice of a loop's carry in place, so a piece costs one expert's gradient.
        old = jax.lax.dynamic_index_in_dim(whole, expert, axis=0, keepdims=False)
        new = old + part.astype(whole.dtype)
        return jax.lax.dynamic_update_index_in_dim(whole, new, expert, axis=0)

    return jax.tree.map(add, total, update)


class ExpertSums(NamedTuple):
    """Gradients of experts whose pieces follow each other, and so are summed one expert at a time."""

    stack: Params  # of all experts, in ``to_bits`` of their own dtype: written and never read
    one: Params  # the sum of the expert whose pieces run, in ``wide``


def zero_sums(learned: Params) -> ExpertSums:
    """Sums of no pieces."""
    stack = jax.tree.map(lambda p: to_bits(jnp.zeros(p.shape, p.dtype)), learned)
    return ExpertSums(stack, jax.tree.map(lambda p: jnp.zeros(p.shape[1:], wide(p.dtype)), learned))


def sum_expert(total: ExpertSums, expert: Array, first: Array, update: Params) -> ExpertSums:
    """Adds the gradient of a piece; ``first`` bool[] says that it is the first one of its expert.

    To add to the stack would read and write all of it in float32, even for bfloat16, which is then
    converted. The sum of one expert is small enough for the cache.
    """

    def add(old: Array, part: Array) -> Array:
        return jnp.where(first, jnp.zeros((), old.dtype), old) + part.astype(old.dtype)

    def write(whole: Array, part: Array, update: Array) -> Array:
        bits = to_bits(part.astype(update.dtype))
        return jax.lax.dynamic_update_index_in_dim(whole, bits, expert, axis=0)

    one = jax.tree.map(add, total.one, update)
    return ExpertSums(jax.tree.map(write, total.stack, one, update), one)


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which gradients of parameters of ``dtype`` are summed over pieces."""
    # An expert's gradient is a sum over many pieces, whose rounding in bfloat16 would add up.
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def scan_pieces(
    expert_fn: ExpertFn, size: int, params: Params, x: Array, plan: DispatchPlan, length: int
) -> Array:
    """[length, D_out], every kept assignment's expert output in sorted order, differentiable by JAX.

    The pieces have one size, and the number of steps is the static maximum for these bounds, so JAX
    differentiates the loop in both modes. The backward pass recomputes each step from its index.
    """
    a, sizes = plan.assignments, plan.group_sizes
    steps = min(plan.num_rows // size + a.num_experts, a.num_experts * -(-plan.max_group // size))
    pieces = -(-sizes // size)
    ends = jnp.cumsum(pieces, dtype=jnp.int32)
    slot = jnp.arange(size, dtype=jnp.int32)

    @jax.checkpoint
    def step(params: Params, x: Array, index: Array) -> Array:
        # Steps past the last piece compute a piece of padding, since the number of steps is static.
        expert = jnp.minimum((ends <= index).sum(dtype=jnp.int32), a.num_experts - 1)
        start = (index - ends[expert] + pieces[expert]) * size
        live = (start + slot < sizes[expert]) & (index < ends[-1])
        rows = rows_at(plan, plan.group_offsets[expert] + start + slot, live)
        one = one_expert(params, expert, in_place=False)
        return expert_fn(one, mask_rows(live, x[rows.tokens]))

    blocks = jax.lax.map(lambda i: step(params, x, i), jnp.arange(steps, dtype=jnp.int32))
    row = jnp.arange(length, dtype=jnp.int32)
    n = plan.order[jnp.minimum(row, plan.order.shape[0] - 1)]
    inside = row < sizes.sum(dtype=jnp.int32)
    expert, position = jnp.where(inside, a.expert_indices[n], 0), plan.position[n]
    piece = ends[expert] - pieces[expert] + position // size
    at = jnp.where(inside, piece * size + position % size, 0)
    return mask_rows(inside, blocks.reshape(steps * size, -1)[at])
