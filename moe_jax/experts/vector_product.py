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

from moe_jax.experts.implementation import from_bits, is_narrow, to_bits
from moe_jax.types import Array

# Blocks of a matrix that one fused sum reads, each a stream of its own. The processor fetches a few
# streams ahead, and fewer write larger partial sums. XLA for CPU fuses the bits of narrow floats only
# if it computes them at most 15 times, and otherwise writes the bits of all experts into an array.
_MOST_BLOCKS = 8


def vector_product(kernels: Array, expert: Array, row: Array) -> Array:
    """``row f32[M] @ kernels[expert]`` as f32[N], ``kernels`` [E, M, N], read in place.

    The matrix is seen as [S, M / S, N]. The sum over S is written out, S slices of the stack of
    matrices, each used once and so fused into the one loop that adds them up. What is left, 1/S of
    the matrix, is summed by a product with ones: XLA would merge a plain sum with the first.
    """
    _, rows, width = kernels.shape
    dtype = kernels.dtype
    if is_narrow(dtype):
        # XLA for CPU slices only their bits in place, see ``to_bits``. The barrier keeps the bits in
        # the loop over experts. In front of the loop they would be a copy of all experts.
        kernels, expert = jax.lax.optimization_barrier((kernels, expert))
    s = max(d for d in range(1, _MOST_BLOCKS + 1) if rows % d == 0)
    stack = to_bits(kernels).reshape(-1, s, rows // s, width)
    factors = row.reshape(s, rows // s).astype(jnp.float32)
    zero = jnp.zeros_like(expert)

    # Each term slices the stack itself, so XLA fuses slice and product and copies nothing.
    def term(i: int) -> Array:
        at = (expert, jnp.full_like(expert, i), zero, zero)
        part = jax.lax.dynamic_slice(stack, at, (1, 1, rows // s, width))[0, 0]
        # Every number of 8 bits is also one of 16, so it need not be rounded to the dtype of the row.
        part = _from_eight_bits(part) if dtype == jnp.float8_e4m3fn else from_bits(part, dtype)
        part = part if dtype.itemsize == 1 else part.astype(row.dtype)
        return part.astype(jnp.float32) * factors[i, :, None]

    partial = functools.reduce(jnp.add, [term(i) for i in range(s)])
    return jnp.ones((rows // s,), jnp.float32) @ partial


def _from_eight_bits(bits: Array) -> Array:
    """f32 from the bits uint8 of float8_e4m3fn, in fewer instructions than XLA's own conversion.

    Sign, exponent and mantissa are moved to their places in float16, whose exponents are 8 larger.
    """
    magnitude = bits.astype(jnp.uint16) & 0x7F
    half = ((bits.astype(jnp.uint16) & 0x80) << 8) | (magnitude << 7)
    number = jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 256.0
    return jnp.where(magnitude == 0x7F, jnp.nan, number)
