"""What the rules of this package share."""

from __future__ import annotations

import jax.numpy as jnp

from moe_jax.types import Array, pytree


@pytree
class NoState:
    """A rule that learns nothing without gradients."""


def compact(keep: Array, *slots: Array) -> tuple[Array, ...]:
    """Moves the kept slots to the front, in their order: (keep, slots...), each [T, K]."""
    place = jnp.argsort(~keep, axis=-1, stable=True)
    return tuple(jnp.take_along_axis(a, place, axis=-1) for a in (keep, *slots))
