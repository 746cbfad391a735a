"""Small formulas that several files of the maths share, each written where it cannot go wrong."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax.numpy as jnp

from moe_jax.types import Array

_SHORTEST = 1e-12  # vectors shorter than this are divided by it, as torch's normalize does


def exact(value: Any) -> Fraction:
    """Returns a Python or NumPy number as the decimal that a person wrote.

    ``1.1`` is a little more than 11/10 in binary, so ``ceil(1.1 * 10)`` can be 12. The shortest decimal
    that reads back as the same float is what was meant.

    Example:
        >>> exact(1.1) * 10
        Fraction(11, 1)
    """
    return Fraction(str(value))


def divide(x: Array, y: Array) -> Array:
    """``x / y`` for y > 0, whose gradient exists for the smallest y too.

    The derivative of a quotient holds ``1 / y ** 2``, which overflows below 1e-19 in float32. A common
    factor that is a power of two changes no bit of the quotient.
    """
    factor = jnp.where(y < 2.0**-20, jnp.float32(2.0**64), jnp.float32(1.0))
    return (x * factor) / (y * factor)


def entropy(p: Array) -> Array:
    """Entropy in nats over the last axis of probabilities p; 0 log 0 is 0."""
    return -(p * jnp.log(jnp.where(p > 0, p, 1.0))).sum(axis=-1)


def entropy_of_log(log_p: Array) -> Array:
    """Entropy in nats over the last axis of log-probabilities, such as of ``log_softmax``."""
    return -(jnp.exp(log_p) * log_p).sum(axis=-1)


def safe_sqrt(squares: Array) -> Array:
    """The square root, with gradient 0 instead of infinity at 0."""
    return jnp.sqrt(jnp.maximum(squares, _SHORTEST**2))


def unit_vectors(vectors: Array, *, axis: int) -> Array:
    """``vectors`` divided by their Euclidean length along ``axis``; 0 stays 0, with finite gradients.

    Example:
        >>> unit_vectors(jnp.array([[3.0, 4.0], [0.0, 0.0]]), axis=1).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    return vectors / safe_sqrt(jnp.square(vectors).sum(axis=axis, keepdims=True))
