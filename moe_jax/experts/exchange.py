"""How rows reach the devices of their experts and come back: buffers, counts, messages.

For ``expert_parallel``, inside ``shard_map``. P devices share the experts, L on each; a buffer has S
rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.checks import check_choice
from moe_jax.experts.base import vary_like
from moe_jax.experts.feed_forward import ExpertFn
from moe_jax.routing.dispatch import plan_dispatch
from moe_jax.types import Array, Assignments, DispatchPlan

EXCHANGES = ("all_to_all", "ragged")

# Digits of a row count in the buffer's own dtype: 0 to 255 is exact even in bfloat16.
_BASE, COUNT_DIGITS = 256, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertParallel:
    """Which mesh axes split what, as a static value.

    ``moe_jax.parallel.sharding.parallel_of`` derives it from a mesh.

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
        exchange: ``"all_to_all"``, or ``"ragged"``, which sends exactly the rows there are, by
            ``jax.lax.ragged_all_to_all``, after the counts in a small message of their own. CPUs do
            not have it; it is tested there against an emulation only.
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
        if self.exchange == "ragged" and len(self.expert_axes) > 1:
            raise ValueError(
                f"exchange: expected one expert axis for 'ragged', got {self.expert_axes}. "
                "Use 'all_to_all'."
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


class How(NamedTuple):
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


# --- where rows go --------------------------------------------------------------------------


class Ways(NamedTuple):
    """Where the sorted rows of a plan go; P devices, L experts on each."""

    ends: Array  # i32[P, L]: among the rows for a device, where those of each expert end
    sizes: Array  # i32[P, L]: rows for each expert
    first: Array  # i32[P]: first sorted row for each device
    held: Array  # i32[P]: rows for each device


def ways_of(plan: DispatchPlan, devices: int) -> Ways:
    experts = plan.assignments.num_experts
    here = -(-experts // devices)
    sizes = jnp.pad(plan.group_sizes, (0, devices * here - experts)).reshape(devices, here)
    held = sizes.sum(axis=1)
    return Ways(jnp.cumsum(sizes, axis=1), sizes, jnp.cumsum(held) - held, held)


class Sent(NamedTuple):
    """The rows of a buffer, [P, S]."""

    live: Array
    assignments: Array
    tokens: Array


def sent_rows(plan: DispatchPlan, ways: Ways, start: Array, size: int) -> Sent:
    slot = start + jnp.arange(size, dtype=jnp.int32)
    row = ways.first[:, None] + slot[None, :]
    n = plan.order[jnp.minimum(row, plan.order.shape[0] - 1)]
    return Sent(slot[None, :] < ways.held[:, None], n, plan.assignments.token_indices[n])


def zero_unless(live: Array, rows: Array) -> Array:
    # Selects instead of multiplying: 0 * NaN is NaN, and an empty row must not carry a token's.
    return jnp.where(live[..., None], rows, jnp.zeros((), rows.dtype))


def _window(values: Array, start: Array, size: int) -> Array:
    return jnp.clip(values, start, start + size)


def counts_sent(ways: Ways, start: Array, size: int) -> Array:
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


def received(counts: Array, size: int) -> DispatchPlan:
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


def take_home(
    plan: DispatchPlan, ways: Ways, start: Array, rows: Array, before: Array | None
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
        zero_unless(arrived, taken)
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


def _swap_ragged(how: How, rows: Array, ours: Array, theirs: Array) -> Array:
    """``_swap`` of buffers [P, S, W] of which only the first rows are sent: i32[P] to and from each."""
    devices, size, width = rows.shape
    axis = how.parallel.expert_axes[0]
    block = jnp.arange(devices, dtype=jnp.int32) * size
    mine = jnp.full((devices,), size, jnp.int32) * jax.lax.axis_index(axis)
    flat = rows.reshape(devices * size, width)
    empty = vary_like(jnp.zeros_like(flat), flat)
    there = jax.lax.ragged_all_to_all(
        flat, empty, vary_like(block, flat), ours, vary_like(mine, flat), theirs, axis_name=axis
    )
    return there.reshape(rows.shape)


class Sizes(NamedTuple):
    """Rows in each buffer, i32[P], which only the ragged exchange needs to know."""

    ours: Array
    theirs: Array


def send(
    how: How,
    tier: Array,
    make: Callable[[int], Array],
    counts: Array | None,
    sizes: Sizes | None = None,
) -> Any:
    """Builds and sends a buffer of the chosen size: (counts received, rows [P, largest S, W]).

    Either ``counts`` to send along, or the ``sizes`` that both sides know already.
    """
    if how.parallel.exchange == "ragged":
        read = None
        if counts is not None:
            read = _swap(how.parallel, counts)
            sizes = Sizes(counts.sum(axis=1), read.sum(axis=1))
        assert sizes is not None
        return read, _swap_ragged(how, make(how.sizes[-1]), sizes.ours, sizes.theirs)

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


def send_back(how: How, tier: Array, rows: Array, sizes: Sizes) -> Array:
    return send(how, tier, lambda size: rows[:, :size], None, Sizes(sizes.theirs, sizes.ours))[1]


def tier_of(how: How, ways: Ways) -> tuple[Array, Array]:
    """(which size, how many rounds), the same on all devices."""
    if len(how.sizes) == 1 and how.bounded:
        return jnp.int32(0), jnp.int32(1)
    most = jax.lax.pmax(ways.held.max(), how.parallel.axes)
    tier = jnp.int32(0)
    for size in how.sizes[:-1]:
        tier += (most > size).astype(jnp.int32)
    return tier, jnp.maximum(-(-most // how.sizes[-1]), 1)


def in_rounds(how: How, rounds: Array, step: Callable[[Array, Any], Any], zeros: Any) -> Any:
    """``step(start, carry)`` for every round; the carry is None where one round is all."""
    if how.bounded:
        return step(jnp.int32(0), None)
    size = how.sizes[-1]
    return jax.lax.fori_loop(0, rounds, lambda i, carry: step(i * size, carry), zeros)
