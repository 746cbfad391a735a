"""Reproducible chance: numbers drawn from a token's own logits, without a key."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routing import budget
from moe_jax.types import Array


def token_chance(logits: Array, numbers: int) -> Array:
    """f32[T, numbers] in [0, 1): hashes of each token's logits f32[T, E] (murmur3's finaliser).

    Equal logits draw equal numbers, so a token's draw does not depend on its batch.

    Example:
        >>> token_chance(jnp.ones((2, 4)), 3).shape
        (2, 3)
    """
    # Rounded first: the last bits of a product depend on the batch's shape. A sum over experts does
    # not depend on their order, which keeps rules equivariant under a relabelling of experts.
    steps = jnp.clip(jnp.round(logits * 256.0), -1e9, 1e9).astype(jnp.int32)
    words = jax.lax.bitcast_convert_type(steps, jnp.uint32)
    mixed = _finalise(words).sum(axis=-1, dtype=jnp.uint32)
    # Multiples of the golden ratio give each of the numbers a lane of its own.
    lanes = jnp.arange(1, numbers + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    hashed = _finalise(mixed[:, None] ^ lanes[None, :])
    # 24 bits are what float32 holds exactly: more could round up to 1.
    return (hashed >> 8).astype(jnp.float32) / jnp.float32(1 << 24)


def mixed_counts(chance: Array, mean_k: Array) -> Array:
    """i32[T]: ``floor(mean_k)`` or one more, by chance f32[T], so that the mean is ``mean_k`` f32[]."""
    low = jnp.floor(mean_k)
    return low.astype(jnp.int32) + (chance < mean_k - low).astype(jnp.int32)


def fit_mixed_counts(chance: np.ndarray, target_mean_k: float) -> Array:
    """Returns the ``mean_k`` f32[] for which ``mixed_counts`` of these tokens has the target's mean.

    Equal tokens draw equal chances, so the share below a number is not quite that number.
    """
    low = math.floor(target_mean_k)
    share = target_mean_k - low
    if share:
        share = min(max(budget.fit_cut(chance, share * chance.size), 0.0), 1.0 - 2**-20)
    return jnp.asarray(low + share, jnp.float32)


def _finalise(h: Array) -> Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
