"""A budget of distinct experts: the batch loads the experts with most gate mass, greedily."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from moe_jax.checks import check_count
from moe_jax.routers.batch_aware import BatchAware, first_ranks, loaded_by
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedBudget(BatchAware):
    """At most ``max_distinct`` experts a batch, chosen by gate mass, after XShare (arXiv:2602.07265).

    An expert's gate mass is the sum of its probabilities over the tokens that have it among their k
    best. The mass of a set is the sum over its experts, so taking the heaviest ones is optimal. Each
    token's best expert is loaded in any case, even if these alone exceed the budget.

    Args:
        num_experts: E.
        k: most experts of a token, usually the trained k.
        max_distinct: the budget of distinct experts.
        max_tokens: larger batches are routed by plain top-k.
        gate: the map to logits.
        scoring: logits to scores and weights.

    Example:
        >>> import jax
        >>> router = SharedBudget(num_experts=64, k=8, max_distinct=12)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> routing = router(params, state, jax.random.normal(jax.random.key(1), (4, 16)))
        >>> int(routing.expert_mask.any(axis=0).sum())
        12
    """

    num_experts: int
    k: int
    max_distinct: int = 8
    max_tokens: int = 64
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_distinct", self.max_distinct, fix="It counts experts of the whole batch.")

    def choose(self, slots, real):
        wanted = first_ranks(real.shape, self.k) & real
        # A NaN token has no say in what the others load.
        mass = jnp.where(wanted & ~jnp.isnan(slots.slot_probs), slots.slot_probs, 0.0)
        total = jnp.zeros((self.num_experts,), jnp.float32).at[slots.indices].add(mass)
        needed = loaded_by(slots, first_ranks(real.shape, 1) & real)
        # Needed experts come first; the rest by mass.
        order = jnp.where(needed, jnp.inf, total)
        rank = jnp.zeros((self.num_experts,), jnp.int32)
        rank = rank.at[jnp.argsort(-order, stable=True)].set(
            jnp.arange(self.num_experts, dtype=jnp.int32)
        )
        loaded = needed | ((rank < self.max_distinct) & (total > 0))
        return wanted & loaded[slots.indices]
