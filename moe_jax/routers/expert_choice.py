"""Expert choice: experts take tokens, so load is balanced and the budget exact by construction."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.checks import check_instance, check_range
from moe_jax.routers.contracts import ExpertsChoose
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.types import ExpertChoice


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoiceRouter(ExpertsChoose):
    """Each expert takes its ``mean_k * T / E`` best tokens (Zhou et al. 2022, arXiv:2202.09368).

    A token is taken by anything from 0 to E experts. The whole batch decides, so the rule is neither
    causal nor batch-invariant: right for encoders and training, wrong for serving or decoding.

    Args:
        num_experts: E.
        mean_k: experts per token on average (the paper's capacity factor c).
        gate: the map to logits.
        scoring: logits to scores; ungrouped, unpost-processed.

    Example:
        >>> router = ExpertChoiceRouter(num_experts=4, mean_k=2.0)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> router(params, state, jnp.ones((6, 16))).token_indices.shape
        (4, 3)
    """

    num_experts: int
    mean_k: float = 2.0
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_instance("scoring", self.scoring, Scoring, fix="Write Scoring(score='sigmoid').")
        mean = "It is the mean number of experts per token."
        check_range("mean_k", self.mean_k, above=0, most=self.num_experts, fix=mean)
        if self.scoring.num_groups != 1 or self.scoring.renormalizes:
            raise ValueError(
                "scoring: expected no groups and no renormalisation, got "
                f"{self.scoring}. Each expert weighs its tokens alone, so a token's weights "
                "have no common sum."
            )

    def __call__(
        self, params, state, x, *, key=None, token_mask=None, context=None
    ) -> ExpertChoice:
        logits = self.logits(params, x, key=key, token_mask=token_mask)
        scores = self.scoring.scores(logits)
        probs = self.scoring.probs(logits, scores)
        weights = jax.nn.sigmoid(scores) if self.scoring.post == "sigmoid" else scores
        return self.take(logits, probs, weights * jnp.float32(self.scoring.scale), token_mask)
