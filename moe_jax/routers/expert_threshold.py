"""Expert Threshold: an expert takes every token that scores above the expert's own cutoff."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_range
from moe_jax.routers.token_choice import TokenChoice
from moe_jax.routing import budget
from moe_jax.routing.balancing import ema_quantile
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import clip_counts
from moe_jax.types import Array, RoutingStats, pytree


@pytree
class ExpertThresholdState:
    """The cutoff of each expert."""

    cutoffs: Array  # f32[E], on the scale of the scores
    fit: budget.Fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertThreshold(TokenChoice):
    """Expert e is used iff ``score[t, e] > cutoffs[e]``; the weight is the score.

    Expert Threshold routing (arXiv:2603.11535): each cutoff follows the (1 - target_k / E)
    population quantile of the expert's scores, so load is balanced and the mean is held without a
    loss, causally and independently of the batch. ``update`` moves the cutoffs by an exponential
    moving average of the batch's quantiles; ``fit`` sets them from calibration data.

    Slots are ordered by the margin ``score - cutoff``; the best ``max_k`` are used at most, and a
    token above no cutoff uses its ``min_k`` best (0 leaves it empty, as the paper does).

    Args:
        num_experts: E.
        target_k: mean experts per token that the cutoffs aim at.
        min_k: fewest experts a token uses; 0 allows none.
        max_k: most experts a token uses; None is E.
        decay: of the moving average.
        gate: the map to logits.
        scoring: logits to scores and weights; sigmoid scores by default.

    Example:
        >>> router = ExpertThreshold(num_experts=8, target_k=2.0, max_k=4)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> router(params, state, jnp.ones((5, 16))).expert_indices.shape
        (5, 4)
    """

    num_experts: int
    target_k: float
    min_k: int = 1
    max_k: int = None  # pyright: ignore[reportAssignmentType]  # None becomes E
    decay: float = 0.99
    gate: Gate = Gate()
    scoring: Scoring = Scoring(score="sigmoid")

    def __post_init__(self) -> None:
        # Before the checks of all rules, which would name the reach of the groups instead.
        if self.scoring.num_groups != 1 or self.scoring.select_by != "score":
            raise ValueError(
                "scoring: expected ungrouped selection by score, got "
                f"num_groups={self.scoring.num_groups}, select_by={self.scoring.select_by!r}. "
                "Cutoffs take the place of groups and biases. For a grouped router use DynamicK, TopP "
                "or MinP, which keep the groups."
            )
        super().__post_init__()
        mean = "It is the mean number of experts per token."
        check_range("target_k", self.target_k, above=0, most=self.num_experts, fix=mean)
        check_range("decay", self.decay, least=0, below=1, fix="0.99 is usual.")

    def init_state(self) -> ExpertThresholdState:
        # 0.5 is the sigmoid score of logit 0; for a softmax the even share plays that part.
        start = 1.0 / self.num_experts if self.scoring.score == "softmax" else 0.5
        return ExpertThresholdState(
            cutoffs=jnp.full((self.num_experts,), start, jnp.float32),
            fit=budget.unfitted(self.max_k),
        )

    def selection_scores(self, params, state: ExpertThresholdState, logits, scores, context, **_):
        return scores - jax.lax.stop_gradient(state.cutoffs)[None, :]

    def select(self, params, state: ExpertThresholdState, slots, x, context):
        keep = clip_counts(slots.selection > 0, min_k=self.min_k)
        return keep, self.weights(slots, keep)

    def observe(self, state: ExpertThresholdState, routing) -> Array:
        scores = jax.lax.stop_gradient(self.scoring.scores(routing.router_logits))
        rate = self.target_k / self.num_experts
        return budget.per_expert_quantiles(scores, routing.token_mask, rate)

    def update(self, state: ExpertThresholdState, stats: RoutingStats) -> ExpertThresholdState:
        cutoffs = ema_quantile(state.cutoffs, stats.observed, decay=self.decay)
        return dataclasses.replace(state, cutoffs=cutoffs)

    def calibrate(
        self, params, state: ExpertThresholdState, slots, x, context, *, real, target_mean_k
    ):
        scores = np.asarray(self.scoring.scores(slots.logits))[real]
        cutoffs = budget.fit_expert_cutoffs(
            scores, min_k=self.min_k, max_k=self.max_k, target_mean_k=target_mean_k
        )
        return dataclasses.replace(state, cutoffs=jnp.asarray(cutoffs))
