"""The layer over the devices of a mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.checks import (
    check_hidden_states,
    check_key,
    describe_array,
    describe_value,
    flat_token_mask,
)
from moe_jax.experts import ExpertFn
from moe_jax.experts.exchange import ExpertParallel
from moe_jax.layer import LayerAux, LayerOptions, check_layer, moe_layer, with_auto_axes
from moe_jax.parallel.sharding import AnyMesh, parallel_of, param_specs
from moe_jax.routers import Router
from moe_jax.routers.contracts import ExpertsChoose
from moe_jax.routing.difficulty import Context
from moe_jax.types import Array, Params


def sharded_moe_layer(
    router: Router,
    expert_fn: ExpertFn,
    params: dict[str, Params],
    state: Any,
    x: Array,
    *,
    mesh: Mesh | None = None,
    parallel: ExpertParallel | None = None,
    key: Array | None = None,
    token_mask: Array | None = None,
    context: Context | None = None,
    options: LayerOptions = LayerOptions(),
) -> tuple[Array, LayerAux]:
    """Computes ``moe_layer`` over the devices of a mesh; the result is that of one device.

    Tokens are split over the data and expert axes, each device routes its share, and rows travel to
    their experts and back: see ``moe_jax.experts.expert_parallel``. With ``capacity_factor``, each
    device drops among its share of the tokens alone. On one device,
    ``moe_layer(..., options=LayerOptions(groups=n))``, with n the number of devices that split tokens,
    drops the same assignments.

    Call it with global arrays. The returned routing covers all
    tokens, so losses over it are global. ``router.update`` with the returned statistics gives the
    same state on every device.

    Args:
        router, expert_fn, params, state, x, token_mask, context: as in ``moe_layer``, as global
            arrays. The leading axis of ``params["experts"]`` is E, rounded up to a multiple of the
            number of devices that split experts; see ``pad_experts``. Any number
            of tokens works: they are padded to a multiple of the devices that split them.
        mesh: None takes the mesh of ``jax.set_mesh``.
        parallel: None takes ``parallel_of(mesh)``.
        key: randomness of the gate's noise. Each device folds its index in, so the noise differs
            from that of one device.
        options: as in ``moe_layer``; ``max_rows`` is the row budget of each device.

    Raises:
        ValueError: no mesh is set, the experts do not fit it, or the rule looks at the whole batch.

    Example:
        >>> import moe_jax
        >>> from moe_jax.parallel.sharding import make_mesh
        >>> mesh = make_mesh(devices=jax.devices()[:1])
        >>> router, expert_fn = moe_jax.TopK(num_experts=4, k=2), moe_jax.FeedForward()
        >>> params = moe_jax.init_moe_layer(router, expert_fn, jax.random.key(0), d_model=8, d_ff=16)
        >>> layer = jax.jit(functools.partial(sharded_moe_layer, router, expert_fn, mesh=mesh))
        >>> y, aux = layer(params, router.init_state(), jnp.ones((2, 3, 8)))
        >>> y.shape
        (2, 3, 8)
    """
    check_layer(router, expert_fn, params, options, parallel)
    check_hidden_states(x)
    check_key(key)
    if mesh is not None and not isinstance(mesh, AnyMesh):
        raise TypeError(
            f"mesh: expected a jax.sharding.Mesh, got {describe_value(mesh)}. Pass make_mesh(...)."
        )
    where: AnyMesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if where.empty:
        raise ValueError("mesh: expected a mesh, got none. Pass mesh=, or call jax.set_mesh first.")
    # With Explicit axes the function calls itself once more, with the same axes as Auto.
    if AxisType.Explicit in where.axis_types:
        layer = functools.partial(
            sharded_moe_layer, router, expert_fn, parallel=parallel, options=options
        )
        abstract = where.abstract_mesh if isinstance(where, Mesh) else where
        return with_auto_axes(
            layer,
            abstract,
            router,
            params,
            state,
            x,
            key=key,
            token_mask=token_mask,
            context=context,
        )
    if isinstance(router, ExpertsChoose) and not router.traits.causal:
        raise ValueError(
            "router: expected a rule that routes each token by itself, got "
            f"{type(router).__name__}, whose "
            "experts look at the whole batch. Run it with moe_layer, or use ExpertThreshold."
        )
    parallel = parallel_of(where) if parallel is None else parallel
    absent = [a for a in parallel.axes if a not in where.shape]
    if absent:
        raise ValueError(
            f"parallel: expected axes of the mesh, {', '.join(where.axis_names)}, got "
            f"{', '.join(absent)}. Leave parallel out to take those that the mesh has."
        )
    _check_experts(params["experts"], router.num_experts, where, parallel)
    tokens = parallel.token_axes
    shards = math.prod(where.shape[a] for a in tokens)

    lead = x.shape[:-1]
    total = math.prod(lead)
    # Padding tokens use no expert and count in no statistic, so any number of tokens will do.
    more = -total % shards
    flat = x.reshape(total, x.shape[-1])
    mask = flat_token_mask(token_mask, lead)
    for name, value in (context or {}).items():
        for leaf in jax.tree.leaves(value):
            if not leaf.ndim or leaf.shape[0] != total:
                raise ValueError(
                    f"context[{name!r}]: expected a leading axis of T={total} tokens, got "
                    f"{describe_array(leaf)}. Flatten it as x is flattened for routing."
                )
    if more:
        mask = jnp.ones((total,), bool) if mask is None else mask
        flat, mask = jnp.pad(flat, ((0, more), (0, 0))), jnp.pad(mask, (0, more))
        context = jax.tree.map(lambda c: jnp.pad(c, [(0, more), *[(0, 0)] * (c.ndim - 1)]), context)

    static = _ShardedLayer(router, expert_fn, mesh, where, parallel, options)
    y, aux = _run_sharded(static, params, state, flat, key, mask, context)
    if more:
        y = y[:total]
        aux = LayerAux(routing=jax.tree.map(lambda r: r[:total], aux.routing), stats=aux.stats)
    return y.reshape(*lead, -1), aux


class _ShardedLayer(NamedTuple):
    """Static arguments of ``_run_sharded``."""

    router: Router
    expert_fn: ExpertFn
    mesh: Mesh | None  # None takes that of ``jax.set_mesh``
    axes: AnyMesh  # the mesh in use
    parallel: ExpertParallel
    options: LayerOptions


# Always jitted: otherwise JAX compiles each operation of a `shard_map` by itself, which takes 40 s for
# this layer.
@functools.partial(jax.jit, static_argnums=0)
def _run_sharded(
    static: _ShardedLayer, params: Any, state: Any, x: Array, key: Any, mask: Any, context: Any
) -> tuple[Array, LayerAux]:
    tokens = static.parallel.token_axes

    def local(params, state, x, key, mask, context):
        if key is not None and tokens:
            # By token axes only: devices along the model axis hold the same tokens and must draw
            # the same noise.
            key = jax.random.fold_in(key, jax.lax.axis_index(tokens))
        return moe_layer(
            static.router,
            static.expert_fn,
            params,
            state,
            x,
            key=key,
            token_mask=mask,
            context=context,
            options=static.options,
            parallel=static.parallel,
        )

    # Routing and output have one part per token shard. The statistics are already summed over the
    # shards, so they are the same on every device.
    rows = P(tokens or None)
    run = jax.shard_map(
        local,
        mesh=static.mesh,
        in_specs=(param_specs(params, static.axes), P(), rows, P(), rows, rows),
        out_specs=(rows, LayerAux(routing=rows, stats=P())),  # pyright: ignore[reportArgumentType]
    )
    return run(params, state, x, key, mask, context)


def layer_over(mesh: Mesh | None) -> Callable[..., tuple[Array, LayerAux]]:
    """Returns ``moe_layer`` if ``mesh`` is None, else ``sharded_moe_layer`` over the mesh."""
    return moe_layer if mesh is None else functools.partial(sharded_moe_layer, mesh=mesh)


def _check_experts(params: Params, experts: int, mesh: AnyMesh, parallel: ExpertParallel) -> None:
    devices = math.prod(mesh.shape[a] for a in parallel.expert_axes)
    wanted = -(-experts // devices) * devices
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(params)}
    if sizes != {wanted}:
        raise ValueError(
            f"expert params: expected {wanted} experts, E={experts} rounded up to a multiple of "
            f"{devices} devices, got {sorted(sizes)}. Pass pad_experts(params['experts'], {devices})."
        )
