"""BASE: one expert a token, every expert as many tokens, at the greatest sum of scores."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax.checks import check_count, check_range
from moe_jax.routers.arguments import check_ungrouped
from moe_jax.routers.base import NoState
from moe_jax.routers.contracts import FixedK, WholeBatch
from moe_jax.routing.balancing import auction
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalancedAssignment(FixedK, WholeBatch):  # pyright: ignore[reportIncompatibleVariableOverride]
    """The linear assignment of BASE layers (Lewis et al. 2021, arXiv:2103.16716).

    No expert takes more than ``ceil(T / E)`` tokens, and the sum of the logits of what is assigned is
    within ``precision * (largest - smallest logit)`` per token of the greatest possible: Bertsekas'
    auction, in which tokens bid for the places of experts. The weight is the sigmoid of the logit. No
    load-balancing loss is needed beside it.

    For training. Assign a token by ``TopK(k=1)`` with the same scoring where it is served, as the
    authors do.

    Args:
        num_experts: E.
        precision: of the auction; smaller is nearer the optimum and slower.
        max_rounds: tokens without a place after so many rounds take their best expert, full or not.
        gate: the map to logits.
        scoring: scores and weights; ungrouped.

    Example:
        >>> router = BalancedAssignment(num_experts=4)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> x = jax.random.normal(jax.random.key(1), (40, 16)) + 0.5
        >>> router(params, state, x).expert_mask.sum(axis=0).tolist()
        [10, 10, 10, 10]
    """

    num_experts: int
    precision: float = 0.01
    max_rounds: int = 2000
    gate: Gate = Gate()
    scoring: Scoring = Scoring(score="sigmoid")

    k: ClassVar[int] = 1  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ungrouped(self.scoring, "Balance is over all experts.")
        check_count("max_rounds", self.max_rounds, fix="2000 is usual.")
        share = "It is a share of the range of the logits; 0.01 is usual."
        check_range("precision", self.precision, above=0, below=1, fix=share)

    def init_state(self) -> NoState:
        return NoState()

    def selection_scores(self, params, state, logits, scores, context, *, token_mask=None) -> Array:
        values = self.gate.exclude(jax.lax.stop_gradient(logits))
        real = jnp.ones(logits.shape[:1], bool) if token_mask is None else token_mask
        expert = auction(values, real, precision=self.precision, max_rounds=self.max_rounds)
        # The assigned expert comes first; a token without one, such as a NaN, takes its best.
        experts = jnp.arange(self.num_experts, dtype=jnp.int32)
        return jnp.where(expert[:, None] == experts[None, :], jnp.inf, values)
