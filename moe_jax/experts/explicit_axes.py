"""Calls on arrays whose split over a mesh is part of their type (meshes with Explicit axes)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.core
from jax.sharding import AbstractMesh, AxisType, NamedSharding


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """Returns the mesh with Explicit axes that the type of any array of a tree names, or None.

    ``jax.make_mesh`` makes such axes by default. Arrays on meshes with Auto axes, on no mesh, or inside
    ``shard_map`` have no split in their type. Replicated arrays count too: JAX rejects an
    operation on one of them and an array without a mesh.
    """
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(jax.typeof(leaf), "sharding", None)
        if sharding is None or sharding.mesh.empty:
            continue
        if AxisType.Explicit in sharding.mesh.axis_types:
            return sharding.mesh
    return None


def call_with_auto_axes(
    function: Callable[..., Any], mesh: AbstractMesh, out_sharding: Any, *arguments: Any
) -> Any:
    """Returns ``function(*arguments)``, inside which the Explicit axes of ``mesh`` are Auto.

    Args:
        function: of arrays, or of trees of them.
        mesh: of the arrays, see ``explicit_mesh``.
        out_sharding: a tree of ``PartitionSpec``, a prefix of the results.
        *arguments: of the function.
    """
    explicit = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )
    call = jax.sharding.auto_axes(function, axes=explicit, out_sharding=out_sharding)
    with _mesh_context(mesh, arguments):
        return call(*arguments)  # pyright: ignore[reportCallIssue]


def _mesh_context(mesh: AbstractMesh, tree: Any) -> Any:
    """Returns a context manager that sets the mesh, or does nothing if the caller has set one.

    ``auto_axes`` needs a mesh in the context.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    # Outside of jit, a mesh with devices is needed. Take it from an array that is not a tracer.
    for leaf in jax.tree.leaves(tree):
        traced = isinstance(leaf, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]
        sharding = None if traced else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == mesh.axis_names:
            return jax.set_mesh(sharding.mesh)  # pyright: ignore[reportArgumentType]
    return jax.sharding.use_abstract_mesh(mesh)
