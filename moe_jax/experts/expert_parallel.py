"""Experts spread over the devices of a mesh axis: rows travel to their experts and back.

For use inside ``jax.shard_map`` with ``check_vma=True``, which ``moe_jax.sharding`` does for you.
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

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.dispatch import combine, kept_weights, plan_dispatch
from moe_jax.experts import IMPLEMENTATIONS, choose, run_experts
from moe_jax.experts.base import num_experts_of, vary_like, vary_over
from moe_jax.experts.feed_forward import ExpertFn, FeedForward
from moe_jax.types import Array, Assignments, DispatchPlan, Params, check_choice

EXCHANGES = ("all_to_all", "ragged")

# Digits of a row count in the buffer's own dtype: 0 to 255 is exact even in bfloat16.
_BASE, COUNT_DIGITS = 256, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertParallel:
    """Which mesh axes split what. A static value; ``moe_jax.sharding.parallel_of`` makes one of a mesh.

    Args:
        token_axes: the axes that split the tokens, those of the experts among them.
        expert_axes: the axes that split the experts: one, or two (hosts, devices of a host);
            none keeps all experts on every device.
        model_axis: the axis that splits the width F of each expert, if any. Tokens are equal along
            it. For ``FeedForward`` only.
        two_level: with two expert axes, exchange within hosts first and between hosts then: two
            smaller all-to-alls in place of one, and the same rows in the end.
        send_shares: sizes of the buffer without capacity, as shares of a balanced load at K experts
            per token. One entry is one size; loads beyond the last go in further rounds.
        exchange: ``"all_to_all"``, or ``"ragged"``, which sends exactly the rows there are, for
            backends that have ``jax.lax.ragged_all_to_all`` (not CPU).
    """

    token_axes: tuple[str, ...] = ("data", "expert")
    expert_axes: tuple[str, ...] = ("expert",)
    model_axis: str | None = None
    two_level: bool = False
    send_shares: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5)
    exchange: str = "all_to_all"

    def __post_init__(self) -> None:
        check_choice("exchange", self.exchange, EXCHANGES)
        missing = [a for a in self.expert_axes if a not in self.token_axes]
        if missing or len(self.expert_axes) > 2:
            raise ValueError(
                f"expert_axes: expected at most two, all among token_axes={self.token_axes}, got "
                f"{self.expert_axes}. Tokens are split over the axes of the experts too."
            )
        if self.two_level and (len(self.expert_axes) != 2 or self.exchange == "ragged"):
            raise ValueError(
                f"two_level: expected two expert axes and exchange='all_to_all', got "
                f"{self.expert_axes}, {self.exchange!r}. Name (hosts, devices of a host)."
            )
        if not self.send_shares or list(self.send_shares) != sorted(self.send_shares):
            raise ValueError(
                f"send_shares: expected ascending positive shares, got {self.send_shares}. "
                "(1.5,) is one size, half as much again as a balanced load needs."
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes in use."""
        return (*self.token_axes, *([self.model_axis] if self.model_axis else []))

    @property
    def devices(self) -> int:
        """Devices that share the experts; inside ``shard_map`` only."""
        return math.prod(jax.lax.axis_size(a) for a in self.expert_axes)


class _How(NamedTuple):
    """Everything static of a run."""

    expert_fn: ExpertFn
    parallel: ExpertParallel
    implementation: str | tuple[str, ...] | None
    devices: int
    sizes: tuple[int, ...]  # S to choose from, ascending
    bounded: bool  # whether the largest S holds any load, so that one round is enough


def send_sizes(
    *,
    tokens: int,
    slots: int,
    rows: int,
    here: int,
    devices: int,
    capacity: int | None,
    shares: tuple[float, ...],
) -> tuple[tuple[int, ...], bool]:
    """The static buffer sizes S to choose from, ascending, and whether the largest holds any load.

    Args:
        tokens: T of one device.
        slots: K, most experts of one token.
        rows: most assignments that one device's plan can keep.
        here: L, experts of each device.
        devices: P, that share the experts.
        capacity: C of one expert, or None.
        shares: ``ExpertParallel.send_shares``.

    Example:
        >>> send_sizes(tokens=1024, slots=2, rows=2048, here=2, devices=8, capacity=160, shares=(1,))
        ((320,), True)
        >>> send_sizes(tokens=1024, slots=2, rows=2048, here=2, devices=8, capacity=None, shares=(1,))
        ((304,), False)
    """
    bound = min(rows, tokens * min(slots, here))
    if capacity is not None:
        return (min(bound, capacity * here),), True
    # Chance alone spreads a load of n rows by about sqrt(n).
    loads = [share * rows / devices for share in shares]
    sizes = [math.ceil((load + 3.0 * math.sqrt(load)) / 8) * 8 for load in loads]
    ascending = tuple(sorted({min(size, bound) for size in sizes}))
    return ascending, ascending[-1] == bound


def run_parallel(
    expert_fn: ExpertFn,
    params: Params,
    x: Array,
    plan: DispatchPlan,
    weights: Array,
    parallel: ExpertParallel,
    *,
    implementation: str | tuple[str, ...] | None = None,
) -> tuple[Array, Array]:
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
        f32[T, D_out], and f32[]: rows that this device's experts computed, padding included.

    Raises:
        ValueError: the experts do not fit the axes, or experts of one's own with a model axis.
    """
    devices, here = parallel.devices, num_experts_of(params)
    experts = plan.assignments.num_experts
    if here != -(-experts // devices):
        raise ValueError(
            f"expert params: expected {-(-experts // devices)} experts on each of {devices} devices "
            f"for E={experts}, got {here}. Pad them with moe_jax.sharding.pad_experts."
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
        chosen = choose(plan, implementation, expert_fn=expert_fn)
        y = run_experts(expert_fn, params, x, plan, weights, implementation=chosen.name)
        executed = vary_like(chosen.slots_executed(plan), x)
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
        how = _How(expert_fn, parallel, implementation, devices, sizes, bounded)
        done: Any = _run(how, params, x, weights, plan)
        y, executed = done
    if parallel.model_axis is not None:
        y = jax.lax.psum(y, parallel.model_axis)
        executed = jax.lax.pmean(executed, parallel.model_axis)
    return y, executed


def bias_once(params: Params, model_axis: str) -> Params:
    """Parameters whose ``down_bias`` is zero on all but the first device of the model axis.

    Each device of that axis returns a part of the sum, and the bias must be in one of them only.
    """
    if "down_bias" not in params:
        return params
    first = jax.lax.axis_index(model_axis) == 0
    return {**params, "down_bias": jnp.where(first, params["down_bias"], 0.0)}


# --- where rows go --------------------------------------------------------------------------


class _Ways(NamedTuple):
    """Where the sorted rows of a plan go; P devices, L experts on each."""

    ends: Array  # i32[P, L]: among the rows for a device, where those of each expert end
    sizes: Array  # i32[P, L]: rows for each expert
    first: Array  # i32[P]: first sorted row for each device
    held: Array  # i32[P]: rows for each device


def _ways(plan: DispatchPlan, devices: int) -> _Ways:
    experts = plan.assignments.num_experts
    here = -(-experts // devices)
    sizes = jnp.pad(plan.group_sizes, (0, devices * here - experts)).reshape(devices, here)
    held = sizes.sum(axis=1)
    return _Ways(jnp.cumsum(sizes, axis=1), sizes, jnp.cumsum(held) - held, held)


class _Sent(NamedTuple):
    """The rows of a buffer, [P, S]."""

    live: Array
    assignments: Array
    tokens: Array


def _sent(plan: DispatchPlan, ways: _Ways, start: Array, size: int) -> _Sent:
    slot = start + jnp.arange(size, dtype=jnp.int32)
    row = ways.first[:, None] + slot[None, :]
    n = plan.order[jnp.minimum(row, plan.order.shape[0] - 1)]
    return _Sent(slot[None, :] < ways.held[:, None], n, plan.assignments.token_indices[n])


def _zero_unless(live: Array, rows: Array) -> Array:
    # Selects instead of multiplying: 0 * NaN is NaN, and an empty row must not carry a token's.
    return jnp.where(live[..., None], rows, jnp.zeros((), rows.dtype))


def _window(values: Array, start: Array, size: int) -> Array:
    return jnp.clip(values, start, start + size)


def _counts_sent(ways: _Ways, start: Array, size: int) -> Array:
    """i32[P, L]: rows for each expert among the ``size`` rows from ``start`` on."""
    return _window(ways.ends, start, size) - _window(ways.ends - ways.sizes, start, size)


def _write_counts(counts: Array, width: int, dtype: Any) -> Array:
    """Counts [P, L] as whole rows [P, H, width] of digits."""
    digits = [counts // _BASE**i % _BASE for i in range(COUNT_DIGITS)]
    flat = jnp.stack(digits, axis=-1).reshape(counts.shape[0], -1).astype(dtype)
    rows = -(-flat.shape[1] // width)
    flat = jnp.pad(flat, ((0, 0), (0, rows * width - flat.shape[1])))
    return flat.reshape(counts.shape[0], rows, width)


def _read_counts(rows: Array, here: int) -> Array:
    flat = rows.reshape(rows.shape[0], -1)[:, : here * COUNT_DIGITS].astype(jnp.int32)
    scale = jnp.asarray([_BASE**i for i in range(COUNT_DIGITS)], jnp.int32)
    return (flat.reshape(-1, here, COUNT_DIGITS) * scale[None, None, :]).sum(axis=-1)


def _received(counts: Array, size: int) -> DispatchPlan:
    """The plan of what arrived: row r of [P * S] is a token with one expert, or empty."""
    devices, here = counts.shape
    ends = jnp.cumsum(counts, axis=1)
    slot = jnp.arange(size, dtype=jnp.int32)
    expert = (ends[:, None, :] <= slot[None, :, None]).sum(axis=-1, dtype=jnp.int32).reshape(-1)
    valid, rows = expert < here, devices * size
    arrived = Assignments(
        token_indices=jnp.arange(rows, dtype=jnp.int32),
        expert_indices=expert,
        weights=valid.astype(jnp.float32),
        valid=valid,
        num_tokens=rows,
        num_experts=here,
        slots_per_token=1,
    )
    return plan_dispatch(arrived)


def _take_home(
    plan: DispatchPlan, ways: _Ways, start: Array, rows: Array, before: Array | None
) -> Array:
    """From returned rows [P, S, W] to assignments [N, W]; ``before`` where the row is not here."""
    devices, size, _ = rows.shape
    a = plan.assignments
    here = -(-a.num_experts // devices)
    expert = jnp.minimum(a.expert_indices, a.num_experts - 1)
    device = expert // here
    slot = plan.group_offsets[expert] + plan.position - ways.first[device] - start
    arrived = plan.kept & (slot >= 0) & (slot < size)
    home = jnp.where(arrived, device * size + slot, 0)
    taken = rows.reshape(devices * size, -1)[home]
    return (
        _zero_unless(arrived, taken)
        if before is None
        else jnp.where(arrived[:, None], taken, before)
    )


# --- messages -------------------------------------------------------------------------------


def _swap(parallel: ExpertParallel, buffer: Array) -> Array:
    """Block p of the buffer goes to device p of the expert axes; block q of the result is from q."""
    if not parallel.two_level:
        return jax.lax.all_to_all(buffer, parallel.expert_axes, 0, 0, tiled=True)
    hosts, inside = parallel.expert_axes
    shape = (jax.lax.axis_size(hosts), jax.lax.axis_size(inside), *buffer.shape[1:])
    grid = jax.lax.all_to_all(buffer.reshape(shape), inside, 1, 1, tiled=True)
    return jax.lax.all_to_all(grid, hosts, 0, 0, tiled=True).reshape(buffer.shape)


def _pad_slots(rows: Array, size: int) -> Array:
    return jnp.pad(rows, ((0, 0), (0, size - rows.shape[1]), (0, 0)))


def _send(how: _How, tier: Array, make: Callable[[int], Array], counts: Array | None) -> Any:
    """Builds and sends a buffer of the chosen size: (counts received, rows [P, largest S, W])."""

    def at(size: int) -> tuple[Array | None, Array]:
        rows, head = make(size), None
        if counts is None:
            return None, _pad_slots(_swap(how.parallel, rows), how.sizes[-1])
        head = _write_counts(counts, rows.shape[2], rows.dtype)
        there = _swap(how.parallel, jnp.concatenate([head, rows], axis=1))
        lines = head.shape[1]
        read = _read_counts(there[:, :lines], counts.shape[1])
        return read, _pad_slots(there[:, lines:], how.sizes[-1])

    if len(how.sizes) == 1:
        return at(how.sizes[0])
    return jax.lax.switch(tier, [functools.partial(at, size) for size in how.sizes])


def _return(how: _How, tier: Array, rows: Array) -> Array:
    return _send(how, tier, lambda size: rows[:, :size], None)[1]


def _tier(how: _How, ways: _Ways) -> tuple[Array, Array]:
    """(which size, how many rounds), the same on all devices."""
    if len(how.sizes) == 1 and how.bounded:
        return jnp.int32(0), jnp.int32(1)
    most = jax.lax.pmax(ways.held.max(), how.parallel.axes)
    tier = jnp.int32(0)
    for size in how.sizes[:-1]:
        tier += (most > size).astype(jnp.int32)
    return tier, jnp.maximum(-(-most // how.sizes[-1]), 1)


def _in_rounds(how: _How, rounds: Array, step: Callable[[Array, Any], Any], zeros: Any) -> Any:
    """``step(start, carry)`` for every round; the carry is None where one round is all."""
    if how.bounded:
        return step(jnp.int32(0), None)
    size = how.sizes[-1]
    return jax.lax.fori_loop(0, rounds, lambda i, carry: step(i * size, carry), zeros)


# --- forward and backward -------------------------------------------------------------------


def _experts(how: _How, params: Params, plan: DispatchPlan, rows: Array) -> Array:
    """The experts that are here on the rows [M, D] that arrived, in the rows' own dtype."""
    weights = kept_weights(plan)
    y = run_experts(how.expert_fn, params, rows, plan, weights, implementation=how.implementation)
    return y.astype(rows.dtype)


class _Kept(NamedTuple):
    """What the backward pass need not send again; only where the rows came in one round."""

    rows: Array  # [P * S, D]
    counts: Array  # i32[P, L]


def _forward(
    how: _How, params: Params, x: Array, plan: DispatchPlan
) -> tuple[Array, Array, _Kept | None]:
    """Outputs [N, D_out] by assignment, rows computed, and what arrived."""
    ways = _ways(plan, how.devices)
    tier, rounds = _tier(how, ways)
    size = how.sizes[-1]

    def step(start: Array, carry: Any) -> Any:
        def make(size: int) -> Array:
            sent = _sent(plan, ways, start, size)
            return _zero_unless(sent.live, x[sent.tokens])

        counts, rows = _send(how, tier, make, _counts_sent(ways, start, size))
        rows = rows.reshape(how.devices * size, -1)
        here = _received(counts, size)
        made = _experts(how, params, here, rows)
        back = _return(how, tier, made.reshape(how.devices, size, -1))
        chosen = IMPLEMENTATIONS[choose(here, how.implementation, expert_fn=how.expert_fn).name]
        executed = vary_like(chosen.slots_executed(here), x)
        if carry is None:
            return _take_home(plan, ways, start, back, None), executed, _Kept(rows, counts)
        outputs, total = carry
        return _take_home(plan, ways, start, back, outputs), total + executed

    one = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), params)
    out = jax.eval_shape(how.expert_fn, one, jax.ShapeDtypeStruct((1, x.shape[1]), x.dtype))
    zeros = (jnp.zeros((plan.order.shape[0], out.shape[1]), x.dtype), jnp.zeros((), jnp.float32))
    done: Any = _in_rounds(how, rounds, step, vary_over(zeros, how.parallel.axes))
    return done[0], done[1], done[2] if how.bounded and len(how.sizes) == 1 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
    how: _How, params: Params, x: Array, weights: Array, plan: DispatchPlan
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
    ways = _ways(plan, how.devices)
    tier, rounds = _tier(how, ways)
    size, width = how.sizes[-1], x.shape[1]

    def step(start: Array, carry: Any) -> Any:
        def gradients(sent: _Sent) -> Array:
            scaled = dy[sent.tokens] * weights[sent.assignments][..., None]
            return _zero_unless(sent.live, scaled).astype(x.dtype)

        def make(size: int) -> Array:
            sent = _sent(plan, ways, start, size)
            if kept is not None:
                return gradients(sent)
            # What arrived was not kept: a buffer that holds any load would be large. The rows
            # travel once more, beside their gradients, in the same message.
            return jnp.concatenate(
                [_zero_unless(sent.live, x[sent.tokens]), gradients(sent)], axis=2
            )

        if kept is None:
            counts, both = _send(how, tier, make, _counts_sent(ways, start, size))
            both = both.reshape(how.devices * size, -1)
            rows, drows = both[:, :width], both[:, width:]
        else:
            rows, counts = kept
            drows = _send(how, tier, make, None)[1].reshape(how.devices * size, -1)
        here = _received(counts, size)
        _, pull = jax.vjp(lambda p, r: _experts(how, p, here, r), params, rows)
        dparams, dback = pull(drows)
        home = _return(how, tier, dback.reshape(how.devices, size, -1))
        if carry is None:
            return dparams, _take_home(plan, ways, start, home, None)
        total, dx = carry
        added = jax.tree.map(lambda t, d: t + d.astype(t.dtype), total, dparams)
        return added, _take_home(plan, ways, start, home, dx)

    wide = jax.tree.map(
        lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params
    )
    zeros = (wide, jnp.zeros((plan.order.shape[0], width), x.dtype))
    dparams, drows = _in_rounds(how, rounds, step, vary_over(zeros, how.parallel.axes))
    dparams = jax.tree.map(lambda d, p: d.astype(p.dtype), dparams, params)
    ones = vary_like(jnp.ones(weights.shape, jnp.float32), x)
    dx = combine(plan, drows, ones).astype(x.dtype)
    products = (outputs.astype(jnp.float32) * dy[a.token_indices]).sum(axis=1)
    return dparams, dx, jnp.where(plan.kept, products, 0.0), None


_run.defvjp(_fwd, _bwd)
