"""The platform that a program is compiled for: what is known of it while the program is traced.

The host's default backend says nothing about it. A CPU host compiles for TPUs and GPUs that are
absent, and ``jax.export`` writes one program for several platforms. So ``platform_of`` reads what the
arrays and the mesh say, and where they say nothing, ``lax.platform_dependent`` decides while the
program is lowered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PLATFORMS = ("cpu", "tpu", "cuda", "rocm")


class Platform(NamedTuple):
    """A platform, or None if it is unknown until lowering, and the reason."""

    name: str | None
    reason: str


def platform_of(tree: Any = (), *, platform: str | None = None) -> Platform:
    """Returns the platform that the running trace is compiled for.

    In this order: ``platform`` itself, the mesh of ``jax.set_mesh`` or ``jax.shard_map``, the mesh in
    the type of an array (Explicit axes). Outside of ``jit`` the devices of an array that is no tracer,
    else the default device. Inside ``jit`` an array that is no tracer is a constant of the program,
    which may be lowered for other devices than the array is on, so the platform is unknown until then.

    Args:
        tree: the arrays that the program computes with.
        platform: a name in ``PLATFORMS``, if the caller states it.

    Example:
        >>> import jax.numpy as jnp
        >>> platform_of(platform="tpu")
        Platform(name='tpu', reason='stated by platform=')
        >>> jax.jit(lambda x: x * len(platform_of(x).reason))(1).dtype
        dtype('int32')
        >>> platform_of(jnp.ones(3)).reason
        'the devices of the arguments'
    """
    if platform is not None:
        return Platform(platform, "stated by platform=")
    # The mesh comes first: it may describe devices of another platform than the arrays are on.
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return Platform(_name_of(device), "the devices of the mesh in use")
    staged = _is_staging()
    traced = staged
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.core.Tracer):  # pyright: ignore[reportAttributeAccessIssue]
            traced = True
            sharding = getattr(jax.typeof(leaf), "sharding", None)
            device = None if sharding is None else sharding.mesh.abstract_device
            if device is not None:
                return Platform(_name_of(device), "the mesh in the type of an argument")
        elif isinstance(leaf, jax.Array) and not staged:
            return Platform(_name_of(next(iter(leaf.devices()))), "the devices of the arguments")
    if traced:
        return Platform(None, "unknown while tracing: lowering decides")
    return Platform(_name_of(default_device()), "the default device")


def _is_staging() -> bool:
    """Whether operations become part of a program (``jit``, ``scan``, ``export``) instead of running.

    Within ``jit`` every operation is staged, even one of constants. ``grad`` and ``vmap`` alone run an
    operation of constants at once.
    """
    return isinstance(jnp.zeros(()), jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


def default_device() -> Any:
    """The device of ``jax.default_device``, else the first of the default backend."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return jax.devices()[0] if chosen is None else chosen


def _name_of(device: Any) -> str:
    """A name in ``PLATFORMS``. Devices of both GPU makers call their platform "gpu"."""
    name: str = device.platform
    if name != "gpu":
        return name
    kind = device.device_kind.lower()
    return "rocm" if "amd" in kind or "gfx" in kind else "cuda"
