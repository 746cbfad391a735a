"""One expert at a time: Phi-3.5-MoE."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.interop.rules.common import PublishedRule
from moe_jax.routers.arguments import check_classes
from moe_jax.routers.base import NoState
from moe_jax.routers.token_choice import Slots, gather_slots
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.sparse_mix import sparse_mix


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
        check_classes(logits, self.num_experts)
        gumbel = coins = None
        if key is not None:
            noise, coin = jax.random.split(jax.random.fold_in(key, 1))
            gumbel = jax.random.gumbel(noise, (self.k, *logits.shape))
            coins = jax.random.uniform(coin, (self.k, logits.shape[0]))
        selection = self.gate.exclude(logits)
        indices, weights = sparse_mix(selection, k=self.k, eps=self.eps, gumbel=gumbel, coins=coins)
        probs = jax.nn.softmax(logits, axis=-1)
        best = jnp.take_along_axis(selection, indices, axis=-1)
        slots = gather_slots(
            indices, best, logits=logits, probs=probs, scores=probs, token_mask=token_mask
        )
        return dataclasses.replace(slots, scores=weights)

    def select(self, params, state, slots, x, context):
        return slots.available, slots.scores
