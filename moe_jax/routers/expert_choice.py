"""Expert choice: experts take tokens, so load is balanced and the budget exact by construction."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.checks import check_instance, check_number
from moe_jax.routers.arguments import check_classes
from moe_jax.routers.base import Router, Traits
from moe_jax.routing.difficulty import Context
from moe_jax.routing.dispatch import expert_capacity
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import choose_tokens
from moe_jax.types import Array, ExpertChoice, Params, pytree


@pytree
class ExpertChoiceState:
    """An empty state: the rule learns nothing without gradients."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoiceRouter(Router):
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
        check_number("mean_k", self.mean_k)
        if not 0 < self.mean_k <= self.num_experts:
            raise ValueError(
                f"mean_k: expected 0 < mean_k <= num_experts={self.num_experts}, "
                f"got {self.mean_k}. It is the mean number of experts per token."
            )
        if self.scoring.num_groups != 1 or self.scoring.renormalizes:
            raise ValueError(
                "scoring: expected no groups and no renormalisation, got "
                f"{self.scoring}. Each expert weighs its tokens alone, so a token's weights "
                "have no common sum."
            )

    @property
    def max_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """E: every expert may take a token."""
        return self.num_experts

    @property
    def min_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """0: a token may be taken by no expert."""
        return 0

    @property
    def traits(self) -> Traits:
        return Traits(
            causal=False, batch_invariant=False, may_leave_token_empty=True, budget="exact"
        )

    def init_state(self) -> ExpertChoiceState:
        return ExpertChoiceState()

    def __call__(
        self,
        params: Params,
        state: ExpertChoiceState,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> ExpertChoice:
        logits = self.gate(params, x, key=key, token_mask=token_mask)
        check_classes(logits, self.num_experts)
        scores = self.scoring.scores(logits)
        weights = jax.nn.sigmoid(scores) if self.scoring.post == "sigmoid" else scores
        return choose_tokens(
            logits=logits,
            probs=self.scoring.probs(logits, scores),
            scores=self.gate.exclude(weights * jnp.float32(self.scoring.scale)),
            capacity=expert_capacity(x.shape[0], self.num_experts, self.mean_k, 1.0),
            token_mask=token_mask,
        )
