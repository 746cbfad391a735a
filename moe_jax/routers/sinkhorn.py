"""Sinkhorn routing: a batch's logits are shifted until every expert is wanted alike."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.checks import check_count, check_range
from moe_jax.routers.arguments import check_ungrouped
from moe_jax.routers.base import NoState
from moe_jax.routers.contracts import FixedK, WholeBatch
from moe_jax.routing.balancing import sinkhorn_offsets
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinkhorn(FixedK, WholeBatch):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Top-k of the transport plan that gives every expert the same mass of the batch.

    S-BASE (Clark et al. 2022, arXiv:2202.01169, appendix B.2.1): Sinkhorn's iteration normalises
    ``exp(logits)`` over experts and over tokens in turn. Among a token's experts that only adds an
    offset per expert to the logits, so the rule is a selection bias that is solved for each batch
    instead of learned. Weights are made of the scores without it. Loads are near balance, not at it:
    a plan is soft and a token uses whole experts. No load-balancing loss is needed beside it.

    For training. A batch of one token knows no balance, so serve the same parameters by ``TopK``, as
    Megatron-LM does.

    Args:
        num_experts: E.
        k: experts per token.
        tolerance: the iteration ends once no offset moves by more.
        max_iterations: and after so many rounds at the latest.
        gate: the map to logits.
        scoring: scores and weights; ungrouped. Megatron-LM has sigmoid scores at k = 1.

    Example:
        >>> router = Sinkhorn(num_experts=4, k=1)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> x = jax.random.normal(jax.random.key(1), (400, 16)) + 0.5
        >>> load = router(params, state, x).expert_mask.sum(axis=0)
        >>> int(load.min()) > 85 and int(load.max()) < 115
        True
    """

    num_experts: int
    k: int
    tolerance: float = 1e-4
    max_iterations: int = 100
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ungrouped(self.scoring, "Balance is over all experts.")
        check_range("tolerance", self.tolerance, above=0, fix="1e-4 is usual.")
        check_count("max_iterations", self.max_iterations, fix="100 is usual.")

    def init_state(self) -> NoState:
        return NoState()

    def selection_scores(self, params, state, logits, scores, context, *, token_mask=None) -> Array:
        # Offsets are solved for this batch. Gradients reach the router through the weights alone.
        logits = jax.lax.stop_gradient(logits)
        real = jnp.ones(logits.shape[:1], bool) if token_mask is None else token_mask
        offsets = sinkhorn_offsets(
            self.gate.exclude(logits),
            real,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )
        return logits + offsets[None, :]
