"""Top-2 with a second expert by chance: the more it weighs, the likelier it is used."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax.checks import check_number
from moe_jax.routers.token_choice import TokenChoice
from moe_jax.routing.chance import token_chance
from moe_jax.routing.difficulty import Context
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import first_k
from moe_jax.types import Array, Params, Routing, pytree


@pytree
class RandomSecondState:
    """The selection bias, which balancing adjusts."""

    expert_bias: Array  # f32[E], added for selection only


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

    context_keys: ClassVar[frozenset[str] | None] = frozenset({"draw"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold)
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold: expected 0 < threshold <= 1, got {self.threshold}. GShard has 0.5."
            )

    @property
    def min_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Always 1: the best expert is always used."""
        return 1

    @property
    def max_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Always 2: the best expert and the one that chance may skip."""
        return 2

    def init_state(self) -> RandomSecondState:
        return RandomSecondState(expert_bias=jnp.zeros((self.num_experts,), jnp.float32))

    def __call__(
        self,
        params: Params,
        state: RandomSecondState,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing:
        if key is not None:
            key, draw_key = jax.random.split(key)
            draw = jax.random.uniform(draw_key, (x.shape[0],), jnp.float32)
            context = {"draw": draw, **(context or {})}
        return super().__call__(params, state, x, key=key, token_mask=token_mask, context=context)

    def select(self, params, state, slots, x, context):
        chance = context["draw"] if "draw" in context else token_chance(slots.logits, 1)[:, 0]
        best, second = slots.slot_probs[:, 0], slots.slot_probs[:, 1]
        share = second / jnp.maximum(best + second, 1e-30)
        keep = first_k(1 + (share > self.threshold * chance).astype(jnp.int32), 2)
        return keep, self.weights(slots, keep)
