"""Top-2 with a second expert by chance: the more it weighs, the likelier it is used."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from moe_jax.checks import check_range
from moe_jax.routers.token_choice import TokenChoice
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import first_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSecond(TokenChoice):
    """The second expert is used with probability ``min(1, w2 / threshold)``, ``w2 = p2 / (p1 + p2)``.

    ``threshold=0.5`` is GShard's random routing (arXiv:2006.16668), ``threshold=0.2`` that of ST-MoE
    (arXiv:2202.08906). Chance comes from the call's key, or without one from a hash of the token's
    logits, which does not depend on the batch.

    Args:
        num_experts: E.
        threshold: ``w2`` from which the second expert is always used, in (0, 1].
        gate: the map to logits.
        scoring: logits to scores and weights.

    Example:
        >>> router = RandomSecond(num_experts=8)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> x = jax.random.normal(jax.random.key(1), (1000, 16))
        >>> 1.0 < float(router(params, state, x).num_experts_per_token.mean()) < 2.0
        True
    """

    num_experts: int
    threshold: float = 0.5
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    # Always the best expert, and a second one that chance may skip.
    min_k: ClassVar[int] = 1  # pyright: ignore[reportIncompatibleVariableOverride]
    max_k: ClassVar[int] = 2  # pyright: ignore[reportIncompatibleVariableOverride]
    num_draws: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("threshold", self.threshold, above=0, most=1, fix="GShard has 0.5.")

    def select(self, params, state, slots, x, context):
        best, second = slots.slot_probs[:, 0], slots.slot_probs[:, 1]
        share = second / jnp.maximum(best + second, 1e-30)
        keep = first_k(1 + (share > self.threshold * slots.draws[:, 0]).astype(jnp.int32), 2)
        return keep, self.weights(slots, keep)
