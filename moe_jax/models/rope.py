"""Rotary position embeddings and the ways in which published models stretch them."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from moe_jax.models.decoder_config import RopeConfig
from moe_jax.types import Array

KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def inverse_frequencies(rope: RopeConfig) -> np.ndarray:
    """f32[dim / 2]: radians a position, of each pair of dimensions.

    Formulas of transformers' ``modeling_rope_utils``. "dynamic" and "longrope" give those of
    short sequences.

    Example:
        >>> inverse_frequencies(RopeConfig(dim=4, theta=100.0)).tolist()
        [1.0, 0.10000000149011612]
    """
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    plain = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "longrope":
        return (plain / np.asarray(rope.short_factors, np.float32)).astype(np.float32)
    if rope.kind == "yarn":
        return _yarn(rope, plain)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    return plain


def _yarn(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Kept where a wavelength is short, divided where it is long, a ramp between (arXiv:2309.00071)."""

    def dimension(rotations: float) -> float:
        """The dimension whose frequency turns ``rotations`` times in ``original_length``."""
        turns = rope.original_length / (rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # as transformers does, so that the ramp has a width
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - low) / (high - low)
    kept = 1 - np.clip(ramp, 0, 1)
    stretched = plain / np.float32(rope.factor)
    return (stretched * (1 - kept) + plain * kept).astype(np.float32)


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    wavelengths = 2 * math.pi / plain
    longest = rope.original_length / rope.low_freq_factor
    shortest = rope.original_length / rope.high_freq_factor
    out = np.where(wavelengths > longest, plain / rope.factor, plain)
    span = rope.high_freq_factor - rope.low_freq_factor
    smooth = (rope.original_length / wavelengths - rope.low_freq_factor) / span
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    medium = (wavelengths >= shortest) & (wavelengths <= longest)
    return np.where(medium, between, out).astype(np.float32)


def angles(rope: RopeConfig, positions: Array) -> tuple[Array, Array]:
    """(cosine, sine), each f32[B, S, dim / 2], of positions i32[B, S]."""
    frequencies = jnp.asarray(inverse_frequencies(rope))
    if rope.kind == "dynamic":
        # The base grows with the sequence, once it is longer than the model was made for. Up to then
        # the growth is 1 and the frequencies are the plain ones.
        length = jnp.maximum(positions.max() + 1, rope.max_length).astype(jnp.float32)
        growth = rope.factor * length / rope.max_length - (rope.factor - 1)
        exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / rope.dim
        stretch = growth ** np.float32(rope.dim / (rope.dim - 2))
        frequencies = 1.0 / (rope.theta * stretch) ** jnp.asarray(exponents, jnp.float32)
    scale = np.float32(rope.attention_factor)
    if rope.kind == "longrope":
        # One sequence beyond the length of pretraining changes the factors of the whole batch, as in
        # transformers.
        stretched = positions.max() >= rope.original_length
        longer = dataclasses.replace(rope, short_factors=rope.long_factors)
        frequencies = jnp.where(stretched, inverse_frequencies(longer), frequencies)
        scale = jnp.where(stretched, np.float32(rope.long_attention_factor), scale)
    radians = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return jnp.cos(radians) * scale, jnp.sin(radians) * scale


def rotate(x: Array, cosine: Array, sine: Array, *, interleaved: bool) -> Array:
    """x float[B, S, heads, head_dim] with its first ``2 * cosine.shape[-1]`` dimensions rotated.

    Rotated in float32, returned in the dtype of x. Interleaved pairs stay interleaved.
    """
    dim = 2 * cosine.shape[-1]
    part = x[..., :dim].astype(jnp.float32)
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    if interleaved:
        first, second = part[..., 0::2], part[..., 1::2]
    else:
        first, second = part[..., : dim // 2], part[..., dim // 2 :]
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    if interleaved:
        out = jnp.stack(turned, axis=-1).reshape(part.shape)
    else:
        out = jnp.concatenate(turned, axis=-1)
    out = out.astype(x.dtype)
    return out if dim == x.shape[-1] else jnp.concatenate([out, x[..., dim:]], axis=-1)
