"""Min-p: a token uses every expert that is at least some share as probable as its best."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_share
from moe_jax.routers.arguments import check_uses_an_expert
from moe_jax.routers.token_choice import TokenChoice
from moe_jax.routing import budget
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import clip_counts, min_p_keep
from moe_jax.types import Array, pytree


@pytree
class MinPState:
    """The selection bias and the calibrated ratio."""

    expert_bias: Array  # f32[E], added for selection only
    ratio: Array  # f32[]
    fit: budget.Fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinP(TokenChoice):
    """Experts with ``p_e >= ratio * p_max``, between ``min_k`` and ``max_k`` of them.

    Min-p is a sampling method; llama.cpp issue 4470 requests it as a routing rule. With ``max_k=2``
    its choices are those of NAEE's dynamic skipping, which is ``SkipSecond``.

    Args:
        num_experts: E.
        ratio: initial ratio, in [0, 1].
        min_k: fewest experts a token uses, at least 1.
        max_k: most experts a token uses; None is E.
        gate: the map to logits.
        scoring: logits to scores and weights.

    Example:
        >>> import jax
        >>> router = MinP(num_experts=8, ratio=0.5, max_k=4)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> router(params, state, jnp.ones((5, 16))).expert_indices.shape
        (5, 4)
    """

    num_experts: int
    ratio: float = 0.5
    min_k: int = 1
    max_k: int = None  # pyright: ignore[reportAssignmentType]  # None becomes E
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("ratio", self.ratio, fix="Try 0.5.")
        check_uses_an_expert(self.min_k, "Min-p always uses the best expert.")

    def init_state(self) -> MinPState:
        return MinPState(
            expert_bias=jnp.zeros((self.num_experts,), jnp.float32),
            ratio=jnp.asarray(self.ratio, jnp.float32),
            fit=budget.unfitted(self.max_k),
        )

    def select(self, params, state: MinPState, slots, x, context):
        keep = clip_counts(min_p_keep(slots.slot_probs, state.ratio), min_k=self.min_k)
        return keep, self.weights(slots, keep)

    def calibrate(self, params, state: MinPState, slots, x, context, *, real, target_mean_k):
        ratio = budget.fit_min_p(np.asarray(slots.slot_probs)[real], self.min_k, target_mean_k)
        return dataclasses.replace(state, ratio=ratio)
