"""The exchange of rows between devices: buffers, counts and messages, there and back.

For ``expert_parallel``, inside ``shard_map``. P devices share the experts, L on each; the buffer for
one device has S rows.
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
from moe_jax.experts.feed_forward import ExpertFn
from moe_jax.experts.implementation import mask_rows, vary_like
from moe_jax.routing.dispatch import plan_dispatch
from moe_jax.types import Array, Assignments, DispatchPlan

EXCHANGES = ("all_to_all", "ragged")

# Platforms whose compiler does not implement `jax.lax.ragged_all_to_all`.
_WITHOUT_RAGGED = ("cpu",)

# Row counts travel as digits in the dtype of the buffer: 0 to 255 is exact even in bfloat16.
_BASE, COUNT_DIGITS = 256, 3

# TPUs store the last two axes of an array in tiles of 8 x 128.
_TILE_ROWS, _TILE_COLUMNS = 8, 128


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
            ``jax.lax.ragged_all_to_all``, after the counts in a small message of their own. Where the
            platform has no such collective, ``"all_to_all"`` runs; see ``explain_exchange``.
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


def explain_exchange(parallel: ExpertParallel, platform: str | None) -> tuple[str, str]:
    """Returns the exchange that runs on a platform, a name in ``EXCHANGES``, and the reason.

    Args:
        parallel: what was asked for.
        platform: a name in ``moe_jax.experts.PLATFORMS``, or None if lowering decides.

    Example:
        >>> explain_exchange(ExpertParallel(exchange="ragged"), "cpu")
        ('all_to_all', "XLA has no ragged all-to-all for cpu, so exchange='ragged' does not run")
        >>> explain_exchange(ExpertParallel(exchange="ragged"), "tpu")
        ('ragged', 'as asked for')
    """
    if parallel.exchange == "ragged" and platform in _WITHOUT_RAGGED:
        reason = f"XLA has no ragged all-to-all for {platform}, so exchange='ragged' does not run"
        return "all_to_all", reason
    return parallel.exchange, "as asked for"


class ExchangeSpec(NamedTuple):
    """Static arguments of one exchange."""

    expert_fn: ExpertFn
    parallel: ExpertParallel
    implementation: str | tuple[str, ...] | None
    platform: str | None
    devices: int
    sizes: tuple[int, ...]  # S to choose from, ascending
    bounded: bool  # whether the largest S holds any load, so that one round suffices
    bound: int  # the S that holds any load


def send_sizes(
    *,
    tokens: int,
    slots: int,
    rows: int,
    local: int,
    devices: int,
    capacity: int | None,
    shares: tuple[float, ...],
) -> tuple[tuple[int, ...], bool]:
    """Returns the static buffer sizes S to choose from, ascending; and whether the largest holds any
    load.

    Args:
        tokens: T of one device.
        slots: K, the most experts of one token.
        rows: the most assignments that the plan of one device can keep.
        local: L, experts of each device.
        devices: P, the devices that share the experts.
        capacity: C of one expert, or None.
        shares: ``ExpertParallel.send_shares``.

    Example:
        >>> send_sizes(tokens=1024, slots=2, rows=2048, local=2, devices=8, capacity=160, shares=(1,))
        ((320,), True)
        >>> send_sizes(tokens=1024, slots=2, rows=2048, local=2, devices=8, capacity=None, shares=(1,))
        ((304,), False)
    """
    # A token goes to one device with at most as many rows as that device has experts.
    bound = min(rows, tokens * min(slots, local))
    if capacity is not None:
        # The plan has already dropped what exceeds capacity, so this buffer always suffices.
        return (min(bound, capacity * local),), True
    # Chance alone spreads a load of n rows by about sqrt(n): three times that is rarely exceeded.
    loads = [share * rows / devices for share in shares]
    sizes = [math.ceil((load + 3.0 * math.sqrt(load)) / 8) * 8 for load in loads]  # multiples of 8
    ascending = tuple(sorted({min(size, bound) for size in sizes}))
    return ascending, ascending[-1] == bound


class CountsPlace(NamedTuple):
    """What the counts add to a buffer [S, width]. One of both is 0."""

    rows: int  # in front of the buffer
    columns: int  # beside it


def counts_place(*, size: int, width: int, local: int) -> CountsPlace:
    """Returns where the counts of L experts travel with a buffer of S rows.

    They are rows in front, unless those begin a new tile of 8 rows on a TPU and one tile of columns has
    fewer numbers. So S = 32 rows do not become 40.

    Args:
        size: S.
        width: of a row, D or 2 D.
        local: L, experts of each device.

    Example:
        >>> counts_place(size=32, width=7168, local=1), counts_place(size=512, width=7168, local=4)
        (CountsPlace(rows=0, columns=128), CountsPlace(rows=1, columns=0))
    """
    digits = COUNT_DIGITS * local
    rows = -(-digits // width)
    new_tile = -(-(size + rows) // _TILE_ROWS) > -(-size // _TILE_ROWS)
    whole = width % _TILE_COLUMNS == 0 and digits <= _TILE_COLUMNS
    if new_tile and whole and size * _TILE_COLUMNS < rows * width:
        return CountsPlace(0, _TILE_COLUMNS)
    return CountsPlace(rows, 0)


# --- where rows go --------------------------------------------------------------------------


class SendLayout(NamedTuple):
    """Where the sorted rows of a plan go.

    The plan sorts rows by expert, and experts are laid out device after device, so the rows for one
    device are one run of the sorted rows: a start and a length say all.
    """

    ends: Array  # i32[P, L]: among the rows for one device, the end of each expert's rows
    sizes: Array  # i32[P, L]: rows for each expert
    first: Array  # i32[P]: first sorted row for each device
    held: Array  # i32[P]: rows for each device


def send_layout(plan: DispatchPlan, devices: int) -> SendLayout:
    """Returns where the sorted rows of a plan go; experts past E are padding and get no rows."""
    experts = plan.assignments.num_experts
    local = -(-experts // devices)
    sizes = jnp.pad(plan.group_sizes, (0, devices * local - experts)).reshape(devices, local)
    held = sizes.sum(axis=1)
    return SendLayout(jnp.cumsum(sizes, axis=1), sizes, jnp.cumsum(held) - held, held)


class SentRows(NamedTuple):
    """The rows of the buffers, [P, S]."""

    live: Array  # bool[P, S]: False for rows that carry nothing
    assignments: Array  # i32[P, S]
    tokens: Array  # i32[P, S]


def sent_rows(plan: DispatchPlan, layout: SendLayout, start: Array, size: int) -> SentRows:
    """Returns the ``size`` rows for each device from ``start`` on, ``start`` counted by device."""
    slot = start + jnp.arange(size, dtype=jnp.int32)
    row = layout.first[:, None] + slot[None, :]
    # Past a device's rows come those for the next device, or the end: read in bounds, and not live.
    n = plan.order[jnp.minimum(row, plan.order.shape[0] - 1)]
    return SentRows(slot[None, :] < layout.held[:, None], n, plan.assignments.token_indices[n])


def _window(values: Array, start: Array, size: int) -> Array:
    return jnp.clip(values, start, start + size)


def counts_sent(layout: SendLayout, start: Array, size: int) -> Array:
    """i32[P, L]: rows for each expert among the ``size`` rows from ``start`` on."""
    # What an expert has in the window is the difference of its clipped end and its clipped begin.
    return _window(layout.ends, start, size) - _window(layout.ends - layout.sizes, start, size)


def _write_counts(counts: Array, numbers: int, dtype: Any) -> Array:
    """Counts [P, L] as digits [P, numbers], zeros behind them."""
    # Three digits of base 256 hold every count below 2**24, in a dtype that cannot hold the count
    # itself.
    digits = [counts // _BASE**i % _BASE for i in range(COUNT_DIGITS)]
    flat = jnp.stack(digits, axis=-1).reshape(counts.shape[0], -1).astype(dtype)
    return jnp.pad(flat, ((0, 0), (0, numbers - flat.shape[1])))


def _read_counts(flat: Array, local: int) -> Array:
    """i32[P, L]: the counts that ``_write_counts`` wrote."""
    digits = flat[:, : local * COUNT_DIGITS].astype(jnp.int32)
    scale = jnp.asarray([_BASE**i for i in range(COUNT_DIGITS)], jnp.int32)
    return (digits.reshape(-1, local, COUNT_DIGITS) * scale[None, None, :]).sum(axis=-1)


def _join_counts(rows: Array, counts: Array) -> Array:
    """The rows [P, S, W] of a buffer with their counts [P, L], see ``counts_place``."""
    devices, size, width = rows.shape
    place = counts_place(size=size, width=width, local=counts.shape[1])
    if place.columns:
        first = _write_counts(counts, place.columns, rows.dtype)[:, None]
        return jnp.concatenate([rows, jnp.pad(first, ((0, 0), (0, size - 1), (0, 0)))], axis=2)
    # In front of the rows, at a place that does not depend on how many there are.
    head = _write_counts(counts, place.rows * width, rows.dtype)
    return jnp.concatenate([head.reshape(devices, place.rows, width), rows], axis=1)


def _split_counts(both: Array, *, size: int, width: int, local: int) -> tuple[Array, Array]:
    """The counts i32[P, L] and rows [P, S, W] that ``_join_counts`` joined."""
    place = counts_place(size=size, width=width, local=local)
    if place.columns:
        return _read_counts(both[:, 0, width:], local), both[:, :, :width]
    head = both[:, : place.rows].reshape(both.shape[0], -1)
    return _read_counts(head, local), both[:, place.rows :]


def plan_received(counts: Array, size: int) -> DispatchPlan:
    """Returns the plan for the rows that arrived: row r of [P * S] is a token with one expert, or
    empty.
    """
    devices, local = counts.shape
    ends = jnp.cumsum(counts, axis=1)
    # Rows of one buffer are sorted by expert, so the expert of a row is the number of ends before it.
    slot = jnp.arange(size, dtype=jnp.int32)
    expert = (ends[:, None, :] <= slot[None, :, None]).sum(axis=-1, dtype=jnp.int32).reshape(-1)
    # The number of ends is L for a row behind all of them, which marks it as empty.
    valid, rows = expert < local, devices * size
    arrived = Assignments(
        token_indices=jnp.arange(rows, dtype=jnp.int32),
        expert_indices=expert,
        weights=valid.astype(jnp.float32),
        valid=valid,
        num_tokens=rows,
        num_experts=local,
        slots_per_token=1,
    )
    return plan_dispatch(arrived)


def rows_by_assignment(
    plan: DispatchPlan, layout: SendLayout, start: Array, rows: Array, before: Array | None
) -> Array:
    """Picks each assignment's row [N, W] from the returned buffers [P, S, W].

    An assignment whose row was not in this round keeps what ``before`` [N, W] holds for it; None holds
    zeros.
    """
    devices, size, _ = rows.shape
    a = plan.assignments
    local = -(-a.num_experts // devices)
    expert = jnp.minimum(a.expert_indices, a.num_experts - 1)
    device = expert // local
    # An assignment's sorted row, counted from the first row for its device and this round's window.
    slot = plan.group_offsets[expert] + plan.position - layout.first[device] - start
    arrived = plan.kept & (slot >= 0) & (slot < size)
    row = jnp.where(arrived, device * size + slot, 0)
    picked = rows.reshape(devices * size, -1)[row]
    if before is None:
        return mask_rows(arrived, picked)
    return jnp.where(arrived[:, None], picked, before)


# --- messages -------------------------------------------------------------------------------


def _swap(parallel: ExpertParallel, buffer: Array) -> Array:
    """Block p of the buffer goes to device p of the expert axes; block q of the result is from q."""
    if not parallel.two_level:
        return jax.lax.all_to_all(buffer, parallel.expert_axes, 0, 0, tiled=True)
    hosts, inside = parallel.expert_axes
    # First all blocks for one host go to its one device with our place inside a host, then between
    # hosts: two all-to-alls of few partners instead of one between all devices.
    shape = (jax.lax.axis_size(hosts), jax.lax.axis_size(inside), *buffer.shape[1:])
    grid = jax.lax.all_to_all(buffer.reshape(shape), inside, 1, 1, tiled=True)
    return jax.lax.all_to_all(grid, hosts, 0, 0, tiled=True).reshape(buffer.shape)


def _pad_slots(rows: Array, size: int) -> Array:
    return jnp.pad(rows, ((0, 0), (0, size - rows.shape[1]), (0, 0)))


class RowCounts(NamedTuple):
    """Rows in use in each buffer. Only the ragged exchange sends by these counts."""

    sent: Array  # i32[P]: from this device to each
    arrived: Array  # i32[P]: from each device to this one


def _swap_ragged(spec: ExchangeSpec, rows: Array, counts: RowCounts) -> Array:
    """``_swap`` of buffers [P, S, W] of which only the rows in use are sent."""
    devices, size, width = rows.shape
    axis = spec.parallel.expert_axes[0]
    starts = jnp.arange(devices, dtype=jnp.int32) * size
    # In every receiver's buffer this device's rows begin at the block with its index.
    offsets = jnp.full((devices,), size, jnp.int32) * jax.lax.axis_index(axis)
    flat = rows.reshape(devices * size, width)
    received = jax.lax.ragged_all_to_all(
        flat,
        vary_like(jnp.zeros_like(flat), flat),
        vary_like(starts, flat),
        counts.sent,
        vary_like(offsets, flat),
        counts.arrived,
        axis_name=axis,
    )
    return received.reshape(rows.shape)


def send(
    spec: ExchangeSpec,
    tier: Array,
    build: Callable[[int], Array],
    counts: Array | None,
    agreed: RowCounts | None = None,
) -> Any:
    """Builds and sends a buffer of the chosen size.

    Args:
        spec: static arguments.
        tier: i32[], index of the size in ``spec.sizes``.
        build: size S -> buffer [P, S, W].
        counts: i32[P, L], row counts to send along; None if both sides know them already.
        agreed: the counts that both sides know, for the ragged exchange without ``counts``.

    Returns:
        i32[P, L], the counts that arrived (None without ``counts``), and rows [P, largest S, W].
    """
    if spec.parallel.exchange == "ragged":
        arrived = None
        if counts is not None:
            # The counts go first, because the ragged exchange needs the number of rows that arrive.
            arrived = _swap(spec.parallel, counts)
            agreed = RowCounts(counts.sum(axis=1), arrived.sum(axis=1))
        assert agreed is not None
        return arrived, _swap_ragged(spec, build(spec.sizes[-1]), agreed)

    def exchange(size: int) -> tuple[Array | None, Array]:
        rows = build(size)
        if counts is None:
            return None, _pad_slots(_swap(spec.parallel, rows), spec.sizes[-1])
        both = _swap(spec.parallel, _join_counts(rows, counts))
        arrived, rows = _split_counts(both, size=size, width=rows.shape[2], local=counts.shape[1])
        return arrived, _pad_slots(rows, spec.sizes[-1])

    if len(spec.sizes) == 1:
        return exchange(spec.sizes[0])
    # Every device takes the same branch (see ``choose_size``), so the messages in it match.
    return jax.lax.switch(tier, [functools.partial(exchange, size) for size in spec.sizes])


def send_back(spec: ExchangeSpec, tier: Array, rows: Array, counts: RowCounts) -> Array:
    """Sends rows [P, largest S, W] back where they came from; ``counts`` are those of the way there."""
    # On the way back, what arrived is sent and what was sent arrives.
    back = RowCounts(counts.arrived, counts.sent)
    return send(spec, tier, lambda size: rows[:, :size], None, back)[1]


def choose_size(spec: ExchangeSpec, layout: SendLayout) -> tuple[Array, Array]:
    """Returns i32[] the index of the size and i32[] the number of rounds, the same on all devices."""
    if len(spec.sizes) == 1 and spec.bounded:
        return jnp.int32(0), jnp.int32(1)
    # One number over all devices: a device with a small load must still answer the full ones.
    most = jax.lax.pmax(layout.held.max(), spec.parallel.axes)
    tier = jnp.int32(0)
    for size in spec.sizes[:-1]:
        tier += (most > size).astype(jnp.int32)
    return tier, jnp.maximum(-(-most // spec.sizes[-1]), 1)


def run_rounds(
    spec: ExchangeSpec, rounds: Array, step: Callable[[Array, Any], Any], zeros: Any
) -> Any:
    """Runs ``step(start, carry)`` for every round; carry is None if a single round suffices."""
    # One round needs no loop: its messages stand in the program itself.
    if spec.bounded:
        return step(jnp.int32(0), None)
    size = spec.sizes[-1]
    return jax.lax.fori_loop(0, rounds, lambda i, carry: step(i * size, carry), zeros)
