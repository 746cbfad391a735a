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
the hidden layers of the experts again instead of storing them. ``derivatives.call`` uses this gradient
and adds derivatives of any order in both modes; that module states what each costs.

Both passes add the output of a piece to its tokens immediately. A buffer of T * K rows costs
the same memory traffic at every k. With such a buffer, a smaller dynamic k saved operations but much
less time. Only a forward pass that a gradient follows keeps its rows, for the gradient of the combine
weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp

from moe_jax.experts.derivatives import call
from moe_jax.experts.feed_forward import ExpertFn
from moe_jax.experts.implementation import (
    Implementation,
    all_experts,
    from_bits,
    learned_params,
    mask_rows,
    output_shape,
    to_bits,
    vary_like,
    with_learned,
)
from moe_jax.experts.tier_loop import (
    Rows,
    TierSizes,
    add_expert,
    add_rows,
    bulk_rows,
    layout_of,
    pad_rows,
    piece_rows,
    put_rows,
    run_layout,
    scan_pieces,
    sort_bulk,
    sum_bulk,
    sum_expert,
    sum_over_slots,
    wide,
    zero_sums,
)
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


def bulk_sizes(plan: DispatchPlan, platform: str = "cpu") -> tuple[int, ...]:
    """Returns the static sizes C to choose from, ascending, at most ``plan.max_group``."""
    if jax.export.is_symbolic_dim(plan.num_rows):
        return (0,)  # the mean load is symbolic, so there is no bulk
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
    # An expert never has more than `max_group` rows, so larger sizes would only be compiled.
    return tuple(sorted({min(size, plan.max_group) for size in sizes}))


def _round_up(value: float, step: int) -> int:
    return math.ceil(value / step) * step


def sizes_for(plan: DispatchPlan, platform: str = "cpu") -> TierSizes:
    """Returns the sizes that ``run`` chooses among for plans of these static bounds."""
    return TierSizes(bulk_sizes(plan, platform), piece_sizes(plan))


# --- forward and backward -----------------------------------------------------------------------


class _Collect(NamedTuple):
    """How the experts' outputs are collected into one array."""

    start: Callable[[], Array]  # returns the array before any output is added
    bulk: Callable[[int, Array], Array]  # (C, outputs [E*C, D_out]) -> the array after the bulk
    put: Callable[[Array, Array, Array, Rows, Array], Array]  # as in ``run_layout``


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
        rows = bulk_rows(plan, size)
        outputs = all_experts(expert_fn, params, mask_rows(rows.live, x[rows.tokens]))
        return collect.bulk(size, outputs.reshape(-1, outputs.shape[-1]))

    def gather(rows: Rows) -> tuple[Array]:
        return (mask_rows(rows.live, x[rows.tokens]),)

    def piece(size: int, one: Params, block: Array) -> Array:
        return pad_rows(expert_fn(one, block[:size]), most)

    return run_layout(sizes, plan, params, bulk, gather, piece, collect.put)


def _outputs(
    expert_fn: ExpertFn, sizes: TierSizes, params: Params, x: Array, plan: DispatchPlan
) -> Array:
    """Returns the expert output of each kept assignment, [num_rows + B, D_out] in sorted order."""
    out, length = output_shape(expert_fn, params, x), plan.num_rows + sizes.pieces[-1]
    store = to_bits if sizes.in_place else lambda rows: rows

    def start() -> Array:
        return vary_like(store(jnp.zeros((length, out.shape[1]), out.dtype)), (params, x, plan))

    collect = _Collect(
        start=start,
        bulk=lambda size, flat: store(sort_bulk(plan, flat, size, length)),
        put=lambda total, expert, row, rows, outputs: put_rows(total, row, rows.live, outputs),
    )
    return from_bits(_collected(expert_fn, sizes, params, x, plan, collect), out.dtype)


@dataclasses.dataclass(frozen=True)
class _Tiered:
    """The weighted sum over every token's kept assignments, as a ``DifferentiableFunction``."""

    expert_fn: ExpertFn
    sizes: TierSizes

    batched_in_a_loop = False

    def run(
        self, params: Params, x: Array, weights: Array, plan: DispatchPlan, *, in_place: bool
    ) -> Array:
        def start() -> Array:
            out = output_shape(self.expert_fn, params, x)
            zeros = jnp.zeros((x.shape[0], out.shape[1]), jnp.float32)
            return vary_like(zeros, (params, x, weights, plan))

        def put(total: Array, expert: Array, row: Array, rows: Rows, outputs: Array) -> Array:
            # Padding rows carry the weight of some assignment: `add_rows` drops them.
            weighted = outputs.astype(jnp.float32) * weights[rows.assignments][:, None]
            return add_rows(total, rows, weighted)

        collect = _Collect(start, lambda size, flat: sum_bulk(plan, flat, size, weights), put)
        sizes = self.sizes._replace(in_place=in_place)
        return _collected(self.expert_fn, sizes, params, x, plan, collect)

    def forward(
        self, params: Params, x: Array, weights: Array, plan: DispatchPlan, *, in_place: bool
    ) -> tuple[Array, Array]:
        # The outputs are kept for the gradient of the combine weights. Without them the backward pass
        # would run the whole forward pass again instead of the hidden layers alone.
        sizes = self.sizes._replace(in_place=in_place)
        outputs = _outputs(self.expert_fn, sizes, params, x, plan)
        return sum_over_slots(plan, outputs, weights), outputs

    def backward(
        self, arguments: tuple[Any, ...], residuals: Array, cotangents: Array, *, in_place: bool
    ) -> tuple[Any, ...]:
        sizes = self.sizes._replace(in_place=in_place)
        return _backward(self.expert_fn, sizes, arguments, residuals, cotangents)

    def reference(
        self, params: Params, x: Array, weights: Array, plan: DispatchPlan
    ) -> tuple[Array, Array]:
        # Room for one more piece, so that the last one may be written whole.
        length = plan.num_rows + self.sizes.pieces[-1]
        outputs = scan_pieces(self.expert_fn, self.sizes.pieces[-1], params, x, plan, length)
        return sum_over_slots(plan, outputs, weights), outputs


def run_with_sizes(
    expert_fn: ExpertFn,
    sizes: TierSizes,
    params: Params,
    x: Array,
    weights: Array,
    plan: DispatchPlan,
) -> Array:
    """``run`` with the given sizes."""
    return call(_Tiered(expert_fn, sizes), params, x, weights, plan)


def _backward(
    expert_fn: ExpertFn, sizes: TierSizes, arguments: tuple[Any, ...], outputs: Array, dy: Array
) -> tuple[Any, ...]:
    """Returns the gradients of (params, x, weights), and None for the plan."""
    params, x, weights, plan = arguments
    a, learned = plan.assignments, learned_params(expert_fn, params)
    most = sizes.pieces[-1]
    # Without a bulk, an expert's gradient is the sum over its pieces.
    one_by_one = sizes.bulk == (0,)

    # The gradient of y reaches each row times its combine weight.
    def gradient_rows(rows: Rows) -> Array:
        scaled = dy[rows.tokens] * weights[rows.assignments][..., None]
        return mask_rows(rows.live, scaled).astype(outputs.dtype)

    def bulk(size: int) -> tuple[Any, Array]:
        if size == 0:
            zeros = zero_sums(learned) if one_by_one else _wide_zeros(learned)
            return vary_like((zeros, jnp.zeros(x.shape, jnp.float32)), (params, x, plan, dy))
        rows = bulk_rows(plan, size)
        blocks = mask_rows(rows.live, x[rows.tokens])

        def run(learned: Params, blocks: Array) -> Array:
            return all_experts(expert_fn, with_learned(params, learned), blocks)

        _, pull = jax.vjp(run, learned, blocks)
        dparams, dblocks = pull(gradient_rows(rows))
        # The pieces add to the same sums, so the bulk's gradients take their dtype.
        dparams = jax.tree.map(lambda d: d.astype(wide(d.dtype)), dparams)
        return dparams, sum_bulk(plan, dblocks.reshape(-1, x.shape[1]), size, None)

    def gather(rows: Rows) -> tuple[Array, Array]:
        return mask_rows(rows.live, x[rows.tokens]), gradient_rows(rows)

    def piece(size: int, one: Params, block: Array, dblock: Array) -> tuple[Params, Array]:
        # The hidden layer runs here again: only outputs were kept, not activations.
        def run(learned: Params, block: Array) -> Array:
            return expert_fn(with_learned(one, learned), block)

        _, pull = jax.vjp(run, learned_params(expert_fn, one), block[:size])
        dexpert, drows = pull(dblock[:size])
        return dexpert, pad_rows(drows, most)

    def put(total, expert, row, rows, gradients):
        (sums, dx), (dexpert, drows) = total, gradients
        dx = add_rows(dx, rows, drows.astype(jnp.float32))
        if one_by_one:
            return sum_expert(sums, expert, row == plan.group_offsets[expert], dexpert), dx
        return add_expert(sums, expert, dexpert), dx

    sums, dx = run_layout(sizes, plan, params, bulk, gather, piece, put)
    if one_by_one:
        dparams = jax.tree.map(lambda d, p: from_bits(d, p.dtype), sums.stack, learned)
    else:
        dparams = jax.tree.map(lambda d, p: d.astype(p.dtype), sums, learned)

    # d y[t] / d weights[n] is the output of assignment n: no expert runs again for it.
    tokens = a.token_indices[plan.order[: plan.num_rows]]
    sorted_dweights = (outputs[: plan.num_rows].astype(jnp.float32) * dy[tokens]).sum(axis=1)
    row = plan.group_offsets[jnp.minimum(a.expert_indices, a.num_experts - 1)] + plan.position
    dweights = jnp.where(plan.kept, sorted_dweights[jnp.where(plan.kept, row, 0)], 0.0)
    return dparams, dx.astype(x.dtype), dweights, None


def _wide_zeros(learned: Params) -> Params:
    return jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p.dtype)), learned)


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
    layout = layout_of(plan, sizes)
    rows = plan.assignments.num_experts * layout.base
    rows += piece_rows(sizes.pieces, layout.beyond).sum(dtype=jnp.int32)
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
