"""Which experts compute alike, and which one can stand in for another."""

from __future__ import annotations

import jax.numpy as jnp

from moe_jax.checks import check_array
from moe_jax.types import Array


def expert_similarity(outputs: Array) -> Array:
    """f32[E, E]: mean cosine between the outputs of two experts on the same tokens.

    Args:
        outputs: float[E, T, D], every expert's output on T calibration tokens.

    Raises:
        TypeError, ValueError: not an array of three axes.

    Example:
        >>> round(float(expert_similarity(jnp.ones((2, 3, 4)))[0, 1]), 5)
        1.0
    """
    check_array("outputs", outputs, "E T D", fix="Run every expert on the same tokens.")
    wide = outputs.astype(jnp.float32)
    size = jnp.sqrt(jnp.square(wide).sum(axis=-1, keepdims=True))
    unit = wide / jnp.maximum(size, 1e-20)
    return jnp.einsum("atd,btd->ab", unit, unit) / outputs.shape[1]


def substitutes(similarity: Array, primary: Array, *, least: float) -> Array:
    """i32[E]: for each expert the most similar primary one.

    An expert that is primary itself, or that is similar to no primary one, stands for itself.

    Args:
        similarity: f32[E, E].
        primary: bool[E].
        least: similarity below which an expert is not replaced.

    Example:
        >>> similarity = jnp.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> substitutes(similarity, jnp.array([True, False, False]), least=0.5).tolist()
        [0, 0, 2]
    """
    close = jnp.where(primary[None, :], similarity, -jnp.inf)
    stays = primary | (close.max(axis=-1) < least)
    indices = jnp.arange(similarity.shape[0], dtype=jnp.int32)
    return jnp.where(stays, indices, jnp.argmax(close, axis=-1).astype(jnp.int32))
