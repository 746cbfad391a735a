"""SparseMixer: experts are chosen one after another, each by a softmax of its own.

Liu et al. 2024, arXiv:2409.12136, as in Phi-3.5-MoE.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.types import Array


def sparse_mix(
    logits: Array, *, k: int, eps: float, gumbel: Array | None = None, coins: Array | None = None
) -> tuple[Array, Array]:
    """(indices i32[T, k], weights f32[T, k]) of SparseMixer-v2.

    Args:
        logits: f32[T, E]; an expert at -inf is never chosen.
        k: experts per token.
        eps: experts further than ``2 * eps`` from the best, relatively, cannot be chosen.
        gumbel: f32[k, T, E] samples the expert of every slot; None takes the best.
        coins: f32[k, T] in [0, 1), with ``gumbel``: a sampled expert that is not the best keeps its
            full weight where the coin is over 0.75, and a third of it elsewhere. Gradients are
            those of the full weight; on average that is Heun's third-order estimate.
    """
    experts = jnp.arange(logits.shape[1], dtype=jnp.int32)
    clean = jnp.where(jnp.isnan(logits), -jnp.inf, jax.lax.stop_gradient(logits))
    # Not -inf by the distance below, which is NaN between infinities and would count as near.
    left = clean > -jnp.inf
    indices, weights = [], []
    for slot in range(k):
        best = jnp.where(left, clean, -jnp.inf).max(axis=-1, keepdims=True)
        # The distance is relative to |logit|, though at least to the best logit, as published.
        near = left & ~((best - clean) / jnp.maximum(jnp.abs(clean), best) > 2 * eps)
        open_ = jnp.where(near, clean, -jnp.inf)
        top = open_.argmax(axis=-1).astype(jnp.int32)
        chosen = top if gumbel is None else (open_ + gumbel[slot]).argmax(-1).astype(jnp.int32)
        probs = jax.nn.softmax(jnp.where(near, logits, -jnp.inf), axis=-1)
        weight = jnp.take_along_axis(probs, chosen[:, None], axis=-1)[:, 0]
        if coins is not None:
            whole = (chosen == top) | (coins[slot] > 0.75)
            factor = 0.3333 + 0.6667 * whole.astype(jnp.float32)
            weight = weight + jax.lax.stop_gradient(weight * (factor - 1.0))
        indices.append(chosen)
        weights.append(weight)
        left = left & (experts[None, :] != chosen[:, None])
    return jnp.stack(indices, axis=-1), jnp.stack(weights, axis=-1)
