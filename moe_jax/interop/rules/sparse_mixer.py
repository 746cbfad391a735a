"""One expert at a time: Phi-3.5-MoE."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.difficulty import Context
from moe_jax.interop.rules.common import NoState
from moe_jax.logits import Gate
from moe_jax.routers.base import Router, Traits
from moe_jax.scoring import Scoring
from moe_jax.selection import build_routing, top_slots
from moe_jax.types import Array, Params, Routing, check_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseMixer(Router):
    """SparseMixer-v2 at evaluation, the rule of Phi-3.5-MoE (Liu et al. 2024, arXiv:2409.12136).

    The best expert is taken, then the best of the rest; each has a softmax of its own over the
    logits within a relative distance of ``2 * eps`` from the best. So a token's weights need not
    add up to 1. The training rule (sampled experts, Heun's gradient estimate) is not part of this:
    gradients are those of the evaluation rule, and a key is refused.

    Args:
        num_experts: E.
        k: experts per token (2 in the published models).
        eps: ``router_jitter_noise`` of the config.
        gate: the map to logits.

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

    def __post_init__(self) -> None:
        check_k(num_experts=self.num_experts, min_k=self.k, max_k=self.k)

    @property
    def max_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.k

    @property
    def min_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.k

    @property
    def traits(self) -> Traits:
        return Traits(
            causal=True, batch_invariant=True, may_leave_token_empty=False, budget="exact"
        )

    def init_state(self) -> NoState:
        return NoState()

    def __call__(
        self,
        params: Params,
        state: NoState,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing:
        if key is not None:
            raise ValueError(
                "key: expected None, since SparseMixer is the evaluation rule only, got a key. "
                "To train, use TopK on the same parameters."
            )
        logits = self.gate(params, x, token_mask=token_mask)
        indices, _ = top_slots(logits, self.k)
        experts = jnp.arange(self.num_experts, dtype=jnp.int32)
        left = jnp.ones(logits.shape, bool)
        weights = []
        for slot in range(self.k):
            chosen = indices[:, slot : slot + 1]
            best = jnp.take_along_axis(logits, chosen, axis=-1)
            # The distance is relative to |logit|, though at least to the best logit, as published.
            size = jnp.maximum(jnp.abs(logits), best)
            near = jax.lax.stop_gradient(~((best - logits) / size > 2 * self.eps))
            probs = jax.nn.softmax(jnp.where(left & near, logits, -jnp.inf), axis=-1)
            weights.append(jnp.take_along_axis(probs, chosen, axis=-1))
            left = left & (experts[None, :] != chosen)
        return build_routing(
            logits=logits, probs=jax.nn.softmax(logits, axis=-1), indices=indices,
            weights=jnp.concatenate(weights, axis=-1),
            keep=jnp.ones(indices.shape, bool), token_mask=token_mask,
        )  # fmt: skip
