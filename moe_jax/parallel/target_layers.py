"""The programs that are compiled for absent accelerators: expert layers of published shapes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.checks import check_count
from moe_jax.experts import IMPLEMENTATIONS, FeedForward, choose, run_experts
from moe_jax.experts.grouped_kernels import tpu_tiles
from moe_jax.experts.grouped_product import ProductSpec
from moe_jax.layer import LayerOptions, init_moe_layer
from moe_jax.parallel.memory_cost import memory_cost
from moe_jax.parallel.planning import exchange_cost
from moe_jax.parallel.sharded_layer import sharded_moe_layer
from moe_jax.parallel.sharding import (
    parallel_of,
    param_specs,
    shardings,
    token_spec,
)
from moe_jax.parallel.targets import (
    Target,
    TargetProgram,
    bfloat16_shapes,
    compile_program,
    target_mesh,
)
from moe_jax.routers import TopK
from moe_jax.routing.dispatch import expert_capacity
from moe_jax.types import Assignments, DispatchPlan

_FFN = FeedForward(activation="silu", gated=True)
_CAPACITY_FACTOR = 1.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of a layer of gated experts in bfloat16, and the tokens that one device computes.

    Raises:
        TypeError, ValueError: a size that is no integer of at least 1, or more experts a token than
            there are.
    """

    d_model: int
    d_ff: int
    num_experts: int
    k: int
    tokens: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_count(field.name, getattr(self, field.name), fix="Pass the sizes of a layer.")
        if self.k > self.num_experts:
            raise ValueError(
                f"k: expected at most num_experts={self.num_experts}, got {self.k}. A token uses an "
                "expert once."
            )

    @property
    def rows(self) -> int:
        """T * k, the rows that experts compute."""
        return self.tokens * self.k

    @property
    def flops(self) -> float:
        """Operations of the forward pass on the rows in use; the backward pass takes twice as many."""
        return float(self.rows * _FFN.flops_per_row(self.d_model, self.d_ff))


# DeepSeek-V3 has 256 experts, which no single device of these holds with their gradients: its row is
# the share of one of eight devices, 32 experts and the rows that reach them.
LAYERS = {
    "mixtral": LayerShape(d_model=4096, d_ff=14336, num_experts=8, k=2, tokens=8192),
    "olmoe": LayerShape(d_model=2048, d_ff=1024, num_experts=64, k=8, tokens=16384),
    "deepseek_v3": LayerShape(d_model=7168, d_ff=2048, num_experts=32, k=1, tokens=65536),
    "small": LayerShape(d_model=128, d_ff=256, num_experts=8, k=2, tokens=1024),
}


def plan_shapes(shape: LayerShape, implementation: str | None = None) -> DispatchPlan:
    """The shapes of a dropless plan; of one with capacity factor 1.25 for ``"capacity"``."""
    struct = jax.ShapeDtypeStruct
    experts, n = shape.num_experts, shape.rows
    capacity = None
    if implementation == "capacity":
        capacity = expert_capacity(shape.tokens, experts, shape.k, _CAPACITY_FACTOR)
    index, each = struct((n,), jnp.int32), struct((experts,), jnp.int32)
    weights, used = struct((n,), jnp.float32), struct((n,), bool)
    return DispatchPlan(
        assignments=Assignments(
            token_indices=index,  # pyright: ignore[reportArgumentType]
            expert_indices=index,  # pyright: ignore[reportArgumentType]
            weights=weights,  # pyright: ignore[reportArgumentType]
            valid=used,  # pyright: ignore[reportArgumentType]
            num_tokens=shape.tokens,
            num_experts=experts,
            slots_per_token=shape.k,
        ),
        order=index,  # pyright: ignore[reportArgumentType]
        position=index,  # pyright: ignore[reportArgumentType]
        kept=used,  # pyright: ignore[reportArgumentType]
        group_sizes=each,  # pyright: ignore[reportArgumentType]
        demand=each,  # pyright: ignore[reportArgumentType]
        capacity=capacity,
        max_rows=None,
    )


def refusal(
    platform: str, shape: LayerShape, implementation: str, *, expert_fn: FeedForward = _FFN
) -> str | None:
    """Why an implementation is not for such a layer on a platform, or None if it is.

    Example:
        >>> refusal("cuda", LAYERS["small"], "dense")
        'costs E times the work; it is the oracle'
        >>> refusal("cuda", LAYERS["small"], "grouped")
    """
    plan = plan_shapes(shape, implementation)
    return IMPLEMENTATIONS[implementation].refuse(expert_fn, plan, platform)


def memory_excess(target: Target, shape: LayerShape, *, gradient: bool) -> int | None:
    """Bytes of arguments and results of ``experts_program`` if one device cannot hold them, else None.

    Temporaries are known after compilation only, so a program may exceed a device all the same.
    """
    experts = 3 * shape.num_experts * shape.d_model * shape.d_ff * 2
    rows = shape.tokens * shape.d_model * 2
    needed = 2 * experts + 3 * rows if gradient else experts + 2 * rows
    return needed if needed > target.memory_bytes else None


def tile_padding(shape: LayerShape) -> float:
    """The most that tiles of rows in which two experts meet add to the work on a TPU, as a share of it.

    Each expert but the last may share its last tile with the next, and both compute it.

    Example:
        >>> round(tile_padding(LAYERS["olmoe"]), 4)
        0.0615
    """
    matrix = (shape.num_experts, shape.d_model, shape.d_ff)
    left = jax.ShapeDtypeStruct((shape.rows, shape.d_model), jnp.bfloat16)
    right = jax.ShapeDtypeStruct(matrix, jnp.bfloat16)
    spec = ProductSpec("rows", jnp.dtype("bfloat16"))
    tall = tpu_tiles(spec, shape.rows, left, right, shape.num_experts)[0]
    return (shape.num_experts - 1) * tall / shape.rows


def experts_program(
    target: Target,
    name: str,
    shape: LayerShape,
    *,
    implementation: str | None = None,
    gradient: bool = False,
) -> TargetProgram:
    """Compiles the experts of one layer, from sorted assignments to the sum of each token's experts.

    Args:
        target: what is compiled for.
        name: of the shape, for the report.
        shape: sizes.
        implementation: what runs the experts; None is the library's choice, found as in any program:
            from nothing but the target of the compilation.
        gradient: whether to compile the gradient of parameters, tokens and combine weights too.
    """
    plan = plan_shapes(shape, implementation)
    weights = jax.ShapeDtypeStruct((shape.rows,), jnp.float32)
    params = jax.eval_shape(
        lambda key: _FFN.init(
            key, num_experts=shape.num_experts, d_model=shape.d_model, d_ff=shape.d_ff
        ),
        jax.random.key(0),
    )
    x = jax.ShapeDtypeStruct((shape.tokens, shape.d_model), jnp.bfloat16)

    def forward(params: Any, x: Any, weights: Any, plan: Any) -> Any:
        return run_experts(_FFN, params, x, plan, weights, implementation=implementation).y

    def both(params: Any, x: Any, weights: Any, plan: Any) -> Any:
        y, pull = jax.vjp(lambda p, x, w: forward(p, x, w, plan), params, x, weights)
        return y, pull(y)

    chosen = choose(plan, implementation, platform=target.platform).name
    return compile_program(
        target,
        both if gradient else forward,
        (bfloat16_shapes(params), x, weights, plan),
        what=name,
        gradient=gradient,
        implementation=chosen if implementation else f"default ({chosen})",
        useful_flops=shape.flops * (3 if gradient else 1),
        expansion=(shape.rows, shape.num_experts, (shape.d_model, shape.d_ff)),
    )


def parallel_program(
    target: Target,
    name: str,
    shape: LayerShape,
    *,
    data: int = 1,
    capacity_factor: float | None = 1.0,
    gradient: bool = False,
    implementation: str | None = None,
    exchange: str = "all_to_all",
) -> TargetProgram:
    """Compiles a whole layer over all devices of a target.

    Args:
        target: what is compiled for.
        name: of the shape, for the report.
        shape: sizes; ``num_experts`` of the whole layer, ``tokens`` of one device.
        data: devices along the data axis; the rest share the experts.
        capacity_factor: None is dropless.
        gradient: whether to compile the gradient of parameters and tokens too.
        implementation: what runs each device's experts.
        exchange: as in ``ExpertParallel``.
    """
    devices = len(target.devices)
    mesh = target_mesh(target, data=data, expert=devices // data)
    router = TopK(num_experts=shape.num_experts, k=shape.k)
    params = jax.eval_shape(
        lambda key: init_moe_layer(router, _FFN, key, d_model=shape.d_model, d_ff=shape.d_ff),
        jax.random.key(0),
    )
    params = {"router": params["router"], "experts": bfloat16_shapes(params["experts"])}
    x = jax.ShapeDtypeStruct((shape.tokens * devices, shape.d_model), jnp.bfloat16)
    specs, rows = param_specs(params, mesh), token_spec(mesh)
    options = LayerOptions(capacity_factor=capacity_factor, implementation=implementation)
    parallel = parallel_of(mesh, exchange=exchange)

    def forward(params: Any, x: Any) -> Any:
        state = router.init_state()
        layer = functools.partial(sharded_moe_layer, mesh=mesh, options=options, parallel=parallel)
        return layer(router, _FFN, params, state, x)[0]

    def both(params: Any, x: Any) -> Any:
        y, pull = jax.vjp(forward, params, x)
        return y, pull(y)

    inputs = shardings((specs, rows), mesh)
    chosen = implementation or choose(plan_shapes(shape), platform=target.platform).name
    useful, expansion, model = None, None, None
    if capacity_factor is not None:
        # The rows of the buffers: a capacity is a whole number of rows, so they may exceed T * k.
        cost = exchange_cost(
            tokens=shape.tokens,
            num_experts=shape.num_experts,
            k=shape.k,
            d_model=shape.d_model,
            devices=devices // data,
            capacity_factor=capacity_factor,
        )
        count = cost.buffer_rows * cost.devices
        useful = float(count * _FFN.flops_per_row(shape.d_model, shape.d_ff))
        local = shape.num_experts // cost.devices
        # One expert on a device has no axis of experts.
        expansion = (count, local, (shape.d_model, shape.d_ff)) if local > 1 else None
        # The model follows the buffers of this program on a TPU v5e and was compared with no other.
        v5e = target.name.startswith("v5e")
        if v5e and (chosen, exchange) == ("grouped", "all_to_all") and cost.devices > 1:
            model = memory_cost(
                tokens=shape.tokens,
                num_experts=shape.num_experts,
                k=shape.k,
                d_model=shape.d_model,
                d_ff=shape.d_ff,
                devices=cost.devices,
                capacity_factor=capacity_factor,
                gradient=gradient,
                data=data,
            )
    y = shardings(rows, mesh)
    dropping = "dropless" if capacity_factor is None else f"capacity {capacity_factor:g}"
    program = compile_program(
        target,
        both if gradient else forward,
        (params, x),
        what=f"{name} over {data} x {devices // data} devices, {dropping}",
        gradient=gradient,
        implementation=implementation or f"default ({chosen})",
        useful_flops=useful and useful * (3 if gradient else 1),
        expansion=expansion,
        in_shardings=inputs,
        out_shardings=(y, inputs) if gradient else y,
    )
    return dataclasses.replace(program, model=model)
