"""Meshes, the placement of arrays on them, and the layer over many devices.

A mesh has up to four axes, all of type ``Auto``:

=============== ======================================================================
data            splits tokens
expert_hosts    splits tokens and experts between hosts, where experts span several
expert          splits tokens and experts
model           splits the width F of every expert
=============== ======================================================================

Parameters have logical axes ("expert", "mlp", ...), and rules map these to the axes of a mesh. The
router's parameters and state are on every device. An axis of size 1 changes nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.checks import (
    check_count,
    check_hidden_states,
    check_key,
    describe_array,
    describe_value,
    flat_token_mask,
)
from moe_jax.experts import ExpertFn
from moe_jax.experts.exchange import ExpertParallel
from moe_jax.layer import LayerAux, LayerOptions, check_layer, moe_layer, with_auto_axes
from moe_jax.routers import ExpertChoiceRouter, MixtureOfDepths, Router
from moe_jax.routing.difficulty import Context
from moe_jax.types import Array, Params

P = PartitionSpec
AnyMesh = Mesh | AbstractMesh
Rules = Mapping[str, tuple[str, ...]]

AXES = ("data", "expert_hosts", "expert", "model")

# Logical axis -> axes of the mesh. Axes that a mesh does not have are left out.
RULES: Rules = {
    "tokens": ("data", "expert_hosts", "expert"),
    "expert": ("expert_hosts", "expert"),
    "mlp": ("model",),
    "embed": (),
}

# Logical axes of each array of a layer. Arrays of custom experts get "expert" for the leading axis
# and no name for the rest.
_NAMES: dict[str, tuple[str | None, ...]] = {
    "router/kernel": ("embed", None),
    "router/bias": (None,),
    "experts/gate": ("expert", "embed", "mlp"),
    "experts/up": ("expert", "embed", "mlp"),
    "experts/down": ("expert", "mlp", "embed"),
    "experts/gate_bias": ("expert", "mlp"),
    "experts/up_bias": ("expert", "mlp"),
    "experts/down_bias": ("expert", "embed"),
    "shared/gate": ("embed", "mlp"),
    "shared/up": ("embed", "mlp"),
    "shared/down": ("mlp", "embed"),
    "shared/gate_bias": ("mlp",),
    "shared/up_bias": ("mlp",),
    "shared/down_bias": ("embed",),
    "shared_gate": ("embed", None),
}


# --- meshes ---------------------------------------------------------------------------------


def make_mesh(
    *,
    data: int = 1,
    expert: int = 1,
    model: int = 1,
    expert_hosts: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Returns a mesh of ``data * expert_hosts * expert * model`` devices.

    Devices are ordered process by process, so the first axes cross hosts and the last ones stay
    inside a host. Set ``data`` (or ``expert_hosts``) to the number of hosts or a multiple of it. On
    TPUs, ``jax.experimental.mesh_utils`` lays out the axes, slices outermost.

    Args:
        data, expert, model: sizes of the axes.
        expert_hosts: number of hosts that share one set of experts, for the two-level all-to-all.
        devices: the devices in order; None takes all of them.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.

    Example:
        >>> make_mesh(data=1, expert=1, devices=jax.devices()[:1]).axis_names
        ('data', 'expert_hosts', 'expert', 'model')
    """
    sizes = {"data": data, "expert_hosts": expert_hosts, "expert": expert, "model": model}
    for name, size in sizes.items():
        check_count(name, size, fix="1 does not split by this axis.")
    devices = jax.devices() if devices is None else list(devices)
    shape = (data, expert_hosts, expert, model)
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh: expected data * expert_hosts * expert * model = {len(devices)} devices, got "
            f"{' * '.join(map(str, shape))} = {math.prod(shape)}. Pass devices= to use fewer."
        )
    return Mesh(_laid_out(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _laid_out(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if devices[0].platform == "tpu":
        from jax.experimental import mesh_utils

        if slices == 1:
            # Without the flag, JAX splits along whole axes of the torus only and rejects data=4,
            # expert=64 on 16 x 16 chips.
            return mesh_utils.create_device_mesh(
                shape, devices=devices, allow_split_physical_axes=True
            )
        # The network between slices is slow, so slices split the first axes, as far as they divide.
        across = [1] * len(shape)
        for i, size in enumerate(shape):
            across[i] = math.gcd(size, slices // math.prod(across))
        if math.prod(across) == slices:
            inside = tuple(s // a for s, a in zip(shape, across, strict=True))
            return mesh_utils.create_hybrid_device_mesh(
                inside, tuple(across), devices=devices, allow_split_physical_axes=True
            )
    ordered = sorted(devices, key=lambda d: d.process_index)  # stable: order within a process stays
    return np.asarray(ordered, dtype=object).reshape(shape)


def mesh_axes(logical: str, mesh: AnyMesh, rules: Rules = RULES) -> tuple[str, ...]:
    """Returns the mesh axes that split a logical axis, without axes of size 1."""
    # Axes of size 1 split nothing. Without them a program on one device has no collectives at all.
    return tuple(a for a in rules.get(logical, ()) if mesh.shape.get(a, 1) > 1)


def parallel_of(mesh: AnyMesh, rules: Rules = RULES, **options: Any) -> ExpertParallel:
    """Returns the ``ExpertParallel`` of a mesh, for ``moe_layer(parallel=...)``.

    Args:
        mesh: from ``make_mesh``, or any with these axis names.
        rules: logical axes to axes of the mesh.
        **options: ``two_level``, ``send_shares``, ``exchange`` of ``ExpertParallel``.

    Raises:
        ValueError: the mesh has no axis that the rules name, or "mlp" has more than one axis.

    Example:
        >>> mesh = jax.sharding.AbstractMesh((2, 4), ("data", "expert"))
        >>> parallel_of(mesh).expert_axes
        ('expert',)
    """
    # A mesh with axes of other names would silently replicate all computation.
    if mesh.size > 1 and not any(mesh_axes(name, mesh, rules) for name in rules):
        raise ValueError(
            f"mesh: expected an axis that the rules name, such as {', '.join(AXES)}, got "
            f"{', '.join(map(str, mesh.axis_names))}. Use make_mesh, or pass rules= or parallel=."
        )
    width = mesh_axes("mlp", mesh, rules)
    if len(width) > 1:
        raise ValueError(f"rules: expected one axis for 'mlp', got {width}. Merge them.")
    return ExpertParallel(
        token_axes=mesh_axes("tokens", mesh, rules),
        expert_axes=mesh_axes("expert", mesh, rules),
        model_axis=width[0] if width else None,
        **options,
    )


# --- which array goes where -----------------------------------------------------------------


def logical_axes(path: str, ndim: int) -> tuple[str | None, ...]:
    """Names of the axes of the parameter at ``path``, e.g. ``"experts/up"``; None is unnamed.

    Example:
        >>> logical_axes("experts/up", 3)
        ('expert', 'embed', 'mlp')
    """
    names = _NAMES.get(path)
    if names is not None and len(names) == ndim:
        return names
    lead = ("expert",) if path.startswith("experts/") and ndim else ()
    return (*lead, *[None] * (ndim - len(lead)))


def param_specs(tree: Any, mesh: AnyMesh, rules: Rules = RULES) -> Any:
    """Returns a ``PartitionSpec`` for every array of a tree, by its path in the tree.

    Arrays under ``experts``, ``shared`` or ``router`` belong to a layer. The layer may be anywhere: in
    a model, among stacked layers (with extra leading axes), in the moments of an optimiser. Every
    other array is replicated on all devices.

    Example:
        >>> mesh = jax.sharding.AbstractMesh((2, 4), ("data", "expert"))
        >>> specs = param_specs({"moe": {"experts": {"up": jnp.zeros((8, 4, 4))}}}, mesh)
        >>> tuple(specs["moe"]["experts"]["up"])
        ('expert', None, None)
    """

    def spec(keys: Any, leaf: Any) -> PartitionSpec:
        parts = jax.tree_util.keystr(keys, simple=True, separator="/").split("/")
        # NNX variables and Linen boxes add an entry, `value` or `raw_value`, to the path of the array.
        parts = [part for part in parts if part not in ("value", "raw_value")]
        starts = [i for i, part in enumerate(parts) if part in ("experts", "shared", "router")]
        ndim = len(leaf.shape)
        if not starts or not ndim:
            return P()
        # The last of these names is the layer's: a model may have a module called "experts" above
        # it.
        path = "/".join(parts[starts[-1] :])
        names = _NAMES.get(path, ())
        # Extra leading axes belong to stacked layers.
        lead = max(ndim - len(names), 0) if names else 0
        named = (*[None] * lead, *logical_axes(path, ndim - lead))
        axes = [mesh_axes(name, mesh, rules) if name else () for name in named]
        return P(*[a[0] if len(a) == 1 else a or None for a in axes])

    return jax.tree_util.tree_map_with_path(spec, tree)


def token_spec(mesh: AnyMesh, rules: Rules = RULES) -> PartitionSpec:
    """Returns the spec of activations [tokens or batch, ...]: token axes split the leading axis."""
    return P(mesh_axes("tokens", mesh, rules) or None)


def shardings(specs: Any, mesh: Mesh) -> Any:
    """Returns a ``NamedSharding`` for every ``PartitionSpec`` of a tree."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )


def shard(tree: Any, mesh: Mesh, specs: Any = None) -> Any:
    """Puts a tree on the devices of a mesh, by ``specs``; None takes ``param_specs``.

    ``specs`` may be a prefix of the tree: one spec then holds for all arrays below it. With several
    processes, every process passes the same whole arrays and keeps its part.
    """
    specs = param_specs(tree, mesh) if specs is None else specs
    return jax.tree.map(
        lambda s, part: jax.tree.map(lambda x: _place(x, NamedSharding(mesh, s)), part),
        specs,
        tree,
        is_leaf=lambda s: isinstance(s, PartitionSpec),
    )


def _place(x: Any, sharding: NamedSharding) -> Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # Devices of other processes are out of reach of `device_put`: each process fills its own part.
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def pad_experts(params: Params, devices: int) -> Params:
    """Adds experts of zeros until their number is a multiple of ``devices``. No token uses them.

    Call it once, after ``init`` or ``restore``. Before you save, ``unpad_experts`` undoes it.

    Example:
        >>> pad_experts({"up": jnp.ones((6, 2, 2))}, 4)["up"].shape
        (8, 2, 2)
    """

    check_count("devices", devices, fix="Pass the number of devices that share the experts.")

    def pad(p: Array) -> Array:
        more = -p.shape[0] % devices
        return jnp.pad(p, [(0, more), *[(0, 0)] * (p.ndim - 1)]) if more else p

    return jax.tree.map(pad, params)


def unpad_experts(params: Params, num_experts: int) -> Params:
    """Returns the first ``num_experts`` experts: the inverse of ``pad_experts``."""
    return jax.tree.map(lambda p: p[:num_experts], params)


def jit_sharded(
    fn: Callable[..., Any],
    mesh: Mesh,
    *,
    in_specs: Any,
    out_specs: Any,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
) -> Any:
    """Returns ``jax.jit(fn)`` with shardings on a mesh for arguments and results.

    Args:
        fn: a function of global arrays; the compiler partitions it.
        mesh: where it runs.
        in_specs: for every argument that is not static, a ``PartitionSpec`` or a tree of them
            (a prefix is enough), or None to keep its sharding. Arguments placed otherwise are moved.
        out_specs: the same for the results.
        donate_argnums: arguments whose memory the results may take.
        static_argnums: arguments that are Python values.

    Example:
        >>> mesh = make_mesh(devices=jax.devices()[:1])
        >>> double = jit_sharded(lambda x: 2 * x, mesh, in_specs=(P("data"),), out_specs=P("data"))
        >>> tuple(double(jnp.ones(4)).sharding.spec)
        ('data',)
    """
    return jax.jit(
        fn,
        in_shardings=shardings(in_specs, mesh),
        out_shardings=shardings(out_specs, mesh),
        donate_argnums=donate_argnums,
        static_argnums=static_argnums,
    )


# --- the layer ------------------------------------------------------------------------------


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
    if isinstance(router, ExpertChoiceRouter | MixtureOfDepths) and not router.traits.causal:
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
