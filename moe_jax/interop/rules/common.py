"""What the rules of this package share."""

from __future__ import annotations

from moe_jax.types import pytree


@pytree
class NoState:
    """A rule that learns nothing without gradients."""
