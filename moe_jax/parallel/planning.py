"""Plans an expert-parallel layer on the host: bytes sent, break-even width, placement of hot experts.

Host-side arithmetic, no arrays on devices. The figures of ``exchange_cost`` are those of the compiled
program, byte for byte (``tests/parallel`` holds them to its HLO); ``docs/scaling.md`` carries them
on to sizes that no test can run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from moe_jax.experts import FeedForward
from moe_jax.experts.exchange import ExpertParallel, counts_place, send_sizes
from moe_jax.routing.dispatch import expert_capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeCost:
    """One layer, one device, one step. Bytes are those of the all-to-alls' results on the device."""

    buffer_rows: int  # S: rows in the buffer for one device
    forward_bytes: int
    backward_bytes: int
    devices: int  # P
    tokens: int  # T of one device

    @property
    def leaving(self) -> float:
        """Share of the bytes that leaves the device: a buffer in P is for itself."""
        return (self.devices - 1) / self.devices

    @property
    def forward_bytes_per_token(self) -> float:
        """Bytes that leave the device forward, for one of its tokens."""
        return self.forward_bytes * self.leaving / self.tokens


def exchange_cost(
    *,
    tokens: int,
    num_experts: int,
    k: int,
    d_model: int,
    devices: int,
    itemsize: int = 2,
    capacity_factor: float | None = None,
    send_shares: Sequence[float] | None = None,
    size: int = -1,
) -> ExchangeCost:
    """Returns what the two all-to-alls of the forward pass, and the two of the backward pass, carry.

    Args:
        tokens: T of one device.
        num_experts: E.
        k: K, most experts per token.
        d_model: D.
        devices: P, that share the experts.
        itemsize: bytes of one number of x.
        capacity_factor: None is dropless.
        send_shares: as in ``ExpertParallel``; its default if None.
        size: which of the dropless sizes the load chooses; the last one by default.

    Example:
        >>> cost = exchange_cost(tokens=4096, num_experts=256, k=8, d_model=7168, devices=64,
        ...                      capacity_factor=1.0)
        >>> cost.buffer_rows, round(cost.forward_bytes_per_token / 1024)
        (512, 221)
    """
    local = -(-num_experts // devices)
    capacity = None
    if capacity_factor is not None:
        capacity = expert_capacity(tokens, num_experts, k, capacity_factor)
    rows = tokens * k if capacity is None else min(tokens * k, capacity * num_experts)
    shares = ExpertParallel().send_shares if send_shares is None else tuple(send_shares)
    sizes, bounded = send_sizes(
        tokens=tokens,
        slots=k,
        rows=rows,
        local=local,
        devices=devices,
        capacity=capacity,
        shares=shares,
    )
    buffer = sizes[size]

    def buffer_numbers(width: int) -> int:
        """Numbers of a buffer for one device, with its counts."""
        place = counts_place(size=buffer, width=width, local=local)
        return (buffer + place.rows) * (width + place.columns)

    without = buffer * d_model
    # There and back, with the counts on the way there.
    forward = devices * itemsize * (buffer_numbers(d_model) + without)
    if len(sizes) == 1 and bounded:  # what arrived was kept: gradients alone travel
        backward = devices * itemsize * 2 * without
    else:  # rows beside their gradients, with the counts once more
        backward = devices * itemsize * (buffer_numbers(2 * d_model) + without)
    return ExchangeCost(
        buffer_rows=buffer,
        forward_bytes=forward,
        backward_bytes=backward,
        devices=devices,
        tokens=tokens,
    )


def break_even_width(
    *,
    flops_per_second: float,
    bytes_per_second: float,
    itemsize: int = 2,
    expert: FeedForward = FeedForward(gated=True),
    padding: float = 1.0,
) -> float:
    """Returns the expert width F at which the all-to-alls take as long as the experts, forward.

    A row costs ``2 * D * itemsize`` bytes there and back and ``2 * m * D * F`` operations in m
    matrices: D, T, K and E cancel, and what is left is a property of the machine. Narrower experts
    wait for the network.

    Args:
        flops_per_second: that one device reaches (not its peak).
        bytes_per_second: that one device sends while all send.
        itemsize: bytes of one number of x.
        expert: gated ones have three matrices.
        padding: buffer rows per row in use.

    Example:
        >>> round(break_even_width(flops_per_second=5e14, bytes_per_second=5e10))
        6667
    """
    matrices = expert.flops_per_row(1, 1) / 2
    return itemsize * padding * flops_per_second / (matrices * bytes_per_second)


# --- where experts go -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Which experts are on which device, with copies of the hot ones.

    Imbalance is the load of the fullest device over the mean: the time that all wait for it.
    """

    experts: np.ndarray  # i32[devices, slots]: the expert in every slot
    copies: np.ndarray  # i32[E]
    load: np.ndarray  # f64[devices]: expected, with an expert's load split evenly over its copies
    imbalance_before: float  # experts in order, no copies
    imbalance_after: float


def plan_placement(load: Sequence[float] | np.ndarray, devices: int, replicas: int) -> Placement:
    """Places experts on devices, with ``replicas`` further copies of the hottest.

    Greedy, as DeepSeek's EPLB (github.com/deepseek-ai/EPLB): a copy goes to the expert whose copies
    are loaded most, again and again; then the copies, heaviest first, go each to the least loaded
    device that has room and, if possible, has no copy of that expert yet. A plan only: the layer
    itself keeps experts in order, without copies.

    Args:
        load: [E] tokens per expert, e.g. ``stats.tokens_per_expert`` summed over many batches.
        devices: P.
        replicas: copies beyond the first of each expert; ``E + replicas`` must be a multiple of P.

    Raises:
        ValueError: loads below 0 or none, or copies that do not fill the devices evenly.

    Example:
        >>> plan = plan_placement([8.0, 1.0, 1.0, 2.0, 2.0, 2.0], devices=2, replicas=2)
        >>> plan.copies.tolist(), plan.imbalance_before, plan.imbalance_after
        ([3, 1, 1, 1, 1, 1], 1.25, 1.0416666666666667)
    """
    load = np.asarray(load, np.float64)
    experts = load.size
    if load.ndim != 1 or not experts or not (load >= 0).all() or not load.sum() > 0:
        raise ValueError(
            f"load: expected tokens of each expert, [E], at least 0 and some above, got shape "
            f"{load.shape}. Sum stats.tokens_per_expert over batches."
        )
    total = experts + replicas
    if replicas < 0 or devices < 1 or total % devices:
        raise ValueError(
            f"replicas: expected E + replicas to be a multiple of devices={devices}, got "
            f"{experts} + {replicas}. The next that fits is {-experts % devices} or more by {devices}."
        )
    slots = total // devices
    copies = np.ones(experts, np.int64)
    for _ in range(replicas):
        copies[np.argmax(load / copies)] += 1
    each = load / copies
    queue = sorted(np.repeat(np.arange(experts), copies), key=lambda e: -each[e])
    held: list[list[int]] = [[] for _ in range(devices)]
    sums = np.zeros(devices)
    for expert in queue:
        free = [d for d in range(devices) if len(held[d]) < slots]
        # Two copies of an expert on one device do not spread its load, so this comes first.
        best = min(free, key=lambda d: (expert in held[d], sums[d], d))
        held[best].append(int(expert))
        sums[best] += each[expert]
    # Without a plan, experts are on devices in order, which is what the layer does.
    width = math.ceil(experts / devices)
    before = np.pad(load, (0, width * devices - experts)).reshape(devices, width).sum(axis=1)
    return Placement(
        experts=np.asarray(held, np.int32),
        copies=copies.astype(np.int32),
        load=sums,
        imbalance_before=float(before.max() / before.mean()),
        imbalance_after=float(sums.max() / sums.mean()),
    )
