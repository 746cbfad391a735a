"""One expert at a time: Phi-3.5-MoE."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.interop.rules.common import NoState, PublishedRule
from moe_jax.routers.token_choice import Slots
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseMixer(PublishedRule):
    """SparseMixer-v2, the rule of Phi-3.5-MoE (Liu et al. 2024, arXiv:2409.12136).

    The best expert is taken, then the best of the rest; each has a softmax of its own over the
    logits within a relative distance of ``2 * eps`` from the best. So a token's weights need not
    add up to 1. With a key, the training rule applies: every slot's expert is sampled from its
    softmax, and weights have Heun's third-order gradient estimate, see ``sparse_mix``.

    Args:
        num_experts: E.
        k: experts per token (2 in the published models).
        eps: ``router_jitter_noise`` of the config.
        gate: the map to logits.
        scoring: unused; every token-choice rule has one.

    Example:
        >>> router = SparseMixer(num_experts=8)
        >>> params = router.init(jax.random.key(0), 16)
        >>> router(params, NoState(), jnp.ones((5, 16))).expert_indices.shape
        (5, 2)
    """

    num_experts: int
    k: int = 2
    eps: float = 0.01
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def init_state(self) -> NoState:
        return NoState()

    def score(self, params, state, x, *, key=None, token_mask=None, context=None) -> Slots:
        """The slots in the order in which they are drawn; ``scores`` are their weights."""
        logits = self.logits(params, x, key=key, token_mask=token_mask)
        gumbel = coins = None
        if key is not None:
            noise, coin = jax.random.split(jax.random.fold_in(key, 1))
            gumbel = jax.random.gumbel(noise, (self.k, *logits.shape))
            coins = jax.random.uniform(coin, (self.k, logits.shape[0]))
        selection = self.gate.exclude(logits)
        indices, weights = sparse_mix(selection, k=self.k, eps=self.eps, gumbel=gumbel, coins=coins)
        probs = jax.nn.softmax(logits, axis=-1)
        best = jnp.take_along_axis(selection, indices, axis=-1)
        return Slots(
            logits=logits,
            probs=probs,
            indices=indices,
            selection=best,
            scores=weights,
            slot_probs=jnp.take_along_axis(probs, indices, axis=-1),
            available=best != -jnp.inf,
        )

    def select(self, params, state, slots, x, context):
        return slots.available, slots.scores


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
