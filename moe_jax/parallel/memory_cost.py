"""What a device holds during one expert-parallel layer: buffers and their lifetimes, on paper.

Host-side arithmetic for a layer with a capacity, gated experts, the ``grouped`` implementation and one
all-to-all each way on a TPU, as libtpu 0.0.52 lays it out. ``docs/scaling.md`` compares both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moe_jax.experts.exchange import counts_place
from moe_jax.parallel.planning import exchange_cost

# The steps of a layer in the order in which they run, as far as buffers are concerned.
_FORWARD = (
    "gather rows",
    "add counts",
    "send",
    "remove counts",
    "sort by expert",
    "mask rows",
    "project",
    "activate",
    "project down",
    "unsort",
    "send back",
    "pick outputs",
)
_BACKWARD = (
    "gradient of the weights",
    "gather gradients",
    "send gradients",
    "sort gradients",
    "gradient of down",
    "back through down",
    "back through the activation",
    "gradients of gate and up",
    "back through gate",
    "back through up",
    "send gradients back",
    "pick gradients",
)
_STEPS = (*_FORWARD, *_BACKWARD)

# Of the 128 MiB of on-chip memory of a TPU v5e: an array of this size still stays there over several
# steps, as far as was seen.
_ON_CHIP_BYTES = 96 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """An array in a device's memory, from the step that writes it to the last that reads it."""

    name: str
    num_bytes: int
    first: str
    last: str

    def held_in(self, step: str) -> bool:
        """Whether the buffer takes memory in a step."""
        return _STEPS.index(self.first) <= _STEPS.index(step) <= _STEPS.index(self.last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryCost:
    """Bytes of one device for one layer."""

    argument_bytes: int  # experts, router and tokens of the device
    output_bytes: int  # y, and with a gradient those of all arguments
    temp_bytes: int  # the most that buffers take at once
    step: str  # when they do

    @property
    def held_bytes(self) -> int:
        """Arguments, results and temporaries."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes


def memory_cost(
    *,
    tokens: int,
    num_experts: int,
    k: int,
    d_model: int,
    d_ff: int,
    devices: int,
    capacity_factor: float,
    gradient: bool,
    data: int = 1,
    itemsize: int = 2,
) -> MemoryCost:
    """Returns what a device holds during a layer of gated experts that P devices share.

    Buffers of at least a row of D or F per assignment count; routing does not, whose [T, E] arrays
    are small beside them. Of buffers that fit into on-chip memory only the gradient of y is taken to
    be there, so a small layer holds less. Memory that the allocator loses between buffers does not
    count, and no buffer lies in the memory of a result.

    Args:
        tokens: T of one device.
        num_experts: E, a multiple of ``devices``.
        k: K, experts per token.
        d_model: D.
        d_ff: F.
        devices: P, that share the experts.
        capacity_factor: of each device's plan.
        gradient: whether the gradient of parameters and tokens is computed too.
        data: devices along the data axis, each with the same experts. They sum their gradients.
        itemsize: bytes of one number of tokens and experts; the router is float32.

    Example:
        >>> cost = memory_cost(tokens=1024, num_experts=256, k=8, d_model=7168, d_ff=2048,
        ...                    devices=256, capacity_factor=1.0, gradient=True)
        >>> cost.argument_bytes, cost.temp_bytes, cost.step
        (110100480, 570425344, 'gradient of the weights')
    """
    local = -(-num_experts // devices)
    experts = 3 * local * d_model * d_ff * itemsize
    rows = tokens * d_model * itemsize
    arguments = experts + d_model * num_experts * 4 + rows
    buffers = tuple(
        _buffers(
            tokens=tokens,
            k=k,
            d_model=d_model,
            d_ff=d_ff,
            devices=devices,
            local=local,
            size=exchange_cost(
                tokens=tokens,
                num_experts=num_experts,
                k=k,
                d_model=d_model,
                devices=devices,
                itemsize=itemsize,
                capacity_factor=capacity_factor,
            ).buffer_rows,
            gradient=gradient,
            data=data,
            itemsize=itemsize,
        )
    )
    held = {
        step: sum(b.num_bytes for b in buffers if b.held_in(step))
        for step in (_STEPS if gradient else _FORWARD)
    }
    most = max(held, key=lambda step: held[step])
    return MemoryCost(
        argument_bytes=arguments,
        output_bytes=rows + (arguments if gradient else 0),
        temp_bytes=held[most],
        step=most,
    )


def _buffers(
    *,
    tokens: int,
    k: int,
    d_model: int,
    d_ff: int,
    devices: int,
    local: int,
    size: int,
    gradient: bool,
    data: int,
    itemsize: int,
) -> Iterator[Buffer]:
    """The buffers of one layer. S rows go to each of P devices, so P * S rows arrive."""
    counts = counts_place(size=size, width=d_model, local=local)

    def eights(n: int) -> int:
        # TPUs store arrays in tiles of 8 rows, those of [P, S, D] in each of the P.
        return -(-n // 8) * 8

    # [P, S, D], and the same rows in order of experts.
    wide = devices * eights(size) * d_model * itemsize
    framed = devices * eights(size + counts.rows) * (d_model + counts.columns) * itemsize
    hidden = eights(devices * size) * d_ff * itemsize
    each = eights(tokens * k) * d_model * itemsize  # [T * K, D]

    def one(name: str, num_bytes: int, first: str, last: str) -> Buffer:
        return Buffer(name=name, num_bytes=num_bytes, first=first, last=last)

    # With a gradient these are kept: the rows in order of experts, and all that has the width F. The
    # backward pass computes them again, and the compiler sees that both are the same.
    rows_end = "gradients of gate and up" if gradient else "project"
    # An elementwise result takes the place of an operand that ends with it, so operands that do end
    # one step earlier here: gate for hidden, gate and up for their gradients.
    gate_end, up_end = ("back through down",) * 2 if gradient else ("project", "activate")
    hidden_end = "gradient of down" if gradient else "project down"
    yield one("rows", wide, "gather rows", "add counts")
    yield one("rows with counts", framed, "add counts", "send")
    yield one("arrived with counts", framed, "send", "remove counts")
    yield one("arrived", wide, "remove counts", "sort by expert")
    yield one("sorted", wide, "sort by expert", "mask rows")
    yield one("expert rows", wide, "mask rows", rows_end)
    yield one("gate", hidden, "project", gate_end)
    yield one("up", hidden, "project", up_end)
    yield one("hidden", hidden, "activate", hidden_end)
    yield one("expert outputs", wide, "project down", "unsort")
    yield one("unsorted outputs", wide, "unsort", "send back")
    yield one("returned outputs", wide, "send back", "pick outputs")
    yield one("outputs", each, "pick outputs", "gradient of the weights")
    if not gradient:
        return
    # The gradient of y is gathered in float32 twice: for the combine weights, where it meets the
    # outputs, and for the rows that are sent, which take its place.
    weights, gather = "gradient of the weights", "gather gradients"
    if 4 * tokens * d_model > _ON_CHIP_BYTES:
        yield one("dy", 4 * tokens * d_model, weights, gather)
    yield one("dy of outputs", 4 * each // itemsize, weights, weights)
    yield one("dy of rows", 4 * wide // itemsize, gather, gather)
    yield one("sent gradients", wide, "send gradients", "send gradients")
    yield one("arrived gradients", wide, "send gradients", "sort gradients")
    yield one("gradient rows", wide, "sort gradients", "back through down")
    yield one("gradient of hidden", hidden, "back through down", "back through the activation")
    yield one("gradient of gate", hidden, "back through the activation", "back through gate")
    yield one("gradient of up", hidden, "back through the activation", "back through up")
    yield one("gradient by gate", wide, "back through gate", "send gradients back")
    yield one("gradient by up", wide, "back through up", "send gradients back")
    if data > 1:
        # A device's own gradient of a stack of matrices [L, D, F]; the sum over the data axis is the
        # result. Those of gate and up follow one after the other, when fewer other buffers are left.
        stack = local * d_model * d_ff * itemsize
        yield one("own gradient of down", stack, "gradient of down", "gradient of down")
    yield one("returned gradients", wide, "send gradients back", "pick gradients")
    yield one("gradients", each, "pick gradients", "pick gradients")
