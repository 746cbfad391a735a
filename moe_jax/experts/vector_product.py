"""The product of one row and one matrix on a CPU, at nearly the time of reading the matrix.

XLA for CPU hands a product to a library, which wants its operand as an array: a slice of a stack of
matrices is copied first, and reading, writing and reading again takes two to three times as long as
reading. A matrix that is no slice is multiplied without a copy, but in 1.6 times the time of reading
(2048 x 2048, float32). The sums here are compiled together with the slices they read.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from moe_jax.experts.implementation import is_narrow, one_expert
from moe_jax.types import Array

# Rows of a matrix that one fused sum reads, each a stream of its own. With 32 of them the sum took 1.0
# to 1.4 times as long, with 4 of them 1.2 times: the processor fetches so many streams ahead, and
# fewer write larger partial sums.
_MOST_SLICES = 16


def vector_product(kernels: Array, expert: Array, row: Array) -> Array:
    """``row f32[M] @ kernels[expert]`` as f32[N], ``kernels`` [E, M, N], read in place.

    The matrix is seen as [M / S, S, N]. The sum over S is written out, S slices of the stack of
    matrices, each used once and so fused into the one loop that adds them up. What is left, 1/S of
    the matrix, is summed by a product with ones: XLA would merge a plain sum with the first.
    """
    _, rows, width = kernels.shape
    if is_narrow(kernels.dtype):  # cannot be read in place, see ``one_expert``
        kernels, expert = one_expert(kernels, expert)[None], jnp.zeros_like(expert)
    s = max(d for d in range(1, _MOST_SLICES + 1) if rows % d == 0)
    stack = kernels.reshape(-1, rows // s, s, width)
    factors = row.reshape(rows // s, s)
    zero = jnp.zeros_like(expert)

    # Each term slices the stack itself, so XLA fuses slice and product and copies nothing.
    def term(i: int) -> Array:
        at = (expert, zero, jnp.full_like(expert, i), zero)
        part = jax.lax.dynamic_slice(stack, at, (1, rows // s, 1, width))[0, :, 0]
        # Every number of 8 bits is also one of 16, so it need not be rounded to the dtype of the row.
        part = part if part.dtype.itemsize == 1 else part.astype(row.dtype)
        return part.astype(jnp.float32) * factors[:, i, None].astype(jnp.float32)

    partial = functools.reduce(jnp.add, [term(i) for i in range(s)])
    return jnp.ones((rows // s,), jnp.float32) @ partial
