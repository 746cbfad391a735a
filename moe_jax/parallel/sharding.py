"""Meshes and the placement of arrays on them.

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

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.checks import check_count
from moe_jax.experts.exchange import ExpertParallel
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
    "experts/gate_scale": ("expert", "mlp"),
    "experts/up_scale": ("expert", "mlp"),
    "experts/down_scale": ("expert", "embed"),
    "experts/gate_bias": ("expert", "mlp"),
    "experts/up_bias": ("expert", "mlp"),
    "experts/down_bias": ("expert", "embed"),
    "shared/gate": ("embed", "mlp"),
    "shared/up": ("embed", "mlp"),
    "shared/down": ("mlp", "embed"),
    "shared/gate_scale": ("mlp",),
    "shared/up_scale": ("mlp",),
    "shared/down_scale": ("embed",),
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
