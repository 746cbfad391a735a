"""Dynamic skipping: the second expert is left out where the first one weighs much more."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_share
from moe_jax.routers.token_choice import TokenChoice
from moe_jax.routing import budget
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, pytree


@pytree
class SkipSecondState:
    """The selection bias and the ratio below which the second expert is skipped."""

    expert_bias: Array  # f32[E], added for selection only
    beta: Array  # f32[]
    fit: budget.Fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipSecond(TokenChoice):
    """Top-2 whose second expert is skipped if ``p2 < beta * p1``.

    The dynamic skipping of NAEE (Lu et al. 2024, arXiv:2402.14800), for models trained with two experts
    per token. The authors set ``beta`` of each layer to the median of ``p2 / p1`` on calibration data,
    which skips half of the second experts: ``fit`` with ``target_mean_k=1.5``. Another target is
    another quantile. Weights are renormalised after the skipping, as in their code.

    For a model with more experts per token ``MinP`` compares each of them with the first.

    Args:
        num_experts: E.
        beta: initial ratio, in [0, 1].
        gate: the map to logits.
        scoring: logits to scores and weights.

    Example:
        >>> import jax
        >>> router = SkipSecond(num_experts=8)
        >>> params = router.init(jax.random.key(0), 16)
        >>> x = jax.random.normal(jax.random.key(1), (1000, 16))
        >>> state = router.fit(params, router.init_state(), x, target_mean_k=1.5)
        >>> int(router(params, state, x).num_experts_per_token.sum())
        1500
    """

    num_experts: int
    beta: float = 0.5
    gate: Gate = Gate()
    scoring: Scoring = Scoring(norm="sum")

    # Always the best expert, and the second one unless it is skipped.
    min_k: ClassVar[int] = 1  # pyright: ignore[reportIncompatibleVariableOverride]
    max_k: ClassVar[int] = 2  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("beta", self.beta, fix="fit sets it.")

    def init_state(self) -> SkipSecondState:
        return SkipSecondState(
            expert_bias=jnp.zeros((self.num_experts,), jnp.float32),
            beta=jnp.asarray(self.beta, jnp.float32),
            fit=budget.unfitted(2),
        )

    def select(self, params, state: SkipSecondState, slots, x, context):
        first, second = slots.slot_probs[:, :1], slots.slot_probs[:, 1:]
        keep = jnp.concatenate([jnp.ones_like(first, bool), ~(second < state.beta * first)], axis=1)
        return keep, self.weights(slots, keep)

    def calibrate(self, params, state: SkipSecondState, slots, x, context, *, real, target_mean_k):
        probs = np.asarray(slots.slot_probs, np.float64)[real]
        ratios = probs[:, 1] / np.maximum(probs[:, 0], 1e-30)
        # At 1.5 this is numpy's median, as in the authors' code.
        beta = np.quantile(ratios, 2.0 - target_mean_k)
        return dataclasses.replace(state, beta=jnp.asarray(beta, jnp.float32))
