"""Min-p: a token uses every expert that is at least some share as probable as its best."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_k, check_number
from moe_jax.routers.base import Router, Traits, finish_fit, real_tokens, score_slots
from moe_jax.routing import budget
from moe_jax.routing.difficulty import Context
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import build_routing, clip_counts, min_p_keep
from moe_jax.types import Array, Params, Routing, pytree


@pytree
class MinPState:
    expert_bias: Array  # f32[E], added for selection only
    ratio: Array  # f32[]
    fit: budget.Fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinP(Router):
    """Experts with ``p_e >= ratio * p_max``, between ``min_k`` and ``max_k`` of them.

    Known from sampling; asked for as a routing rule in llama.cpp issue 4470. With ``max_k=2`` and a
    fitted ratio it is the dynamic skipping of NAEE (drop the second expert if w2 < ratio * w1).

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
    max_k: int = None  # pyright: ignore[reportAssignmentType]  # None becomes E below
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        if self.max_k is None:
            object.__setattr__(self, "max_k", self.num_experts)
        check_k(num_experts=self.num_experts, min_k=self.min_k, max_k=self.max_k)
        self.scoring.check(num_experts=self.num_experts, max_k=self.max_k)
        check_number("ratio", self.ratio)
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio: expected 0 <= ratio <= 1, got {self.ratio}. Try 0.5.")
        if self.min_k < 1:
            raise ValueError(
                "min_k: expected at least 1, got 0. Min-p always uses the best expert."
            )

    @property
    def traits(self) -> Traits:
        return Traits(
            causal=True, batch_invariant=True, may_leave_token_empty=False, budget="expected"
        )

    def init_state(self) -> MinPState:
        return MinPState(
            expert_bias=jnp.zeros((self.num_experts,), jnp.float32),
            ratio=jnp.asarray(self.ratio, jnp.float32),
            fit=budget.unfitted(self.max_k),
        )

    def __call__(
        self,
        params: Params,
        state: MinPState,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing:
        slots = score_slots(
            self.gate, self.scoring, params, x,
            max_k=self.max_k, expert_bias=state.expert_bias, key=key, token_mask=token_mask,
        )  # fmt: skip
        keep = clip_counts(min_p_keep(slots.slot_probs, state.ratio), min_k=self.min_k)
        return build_routing(
            logits=slots.logits,
            probs=slots.probs,
            indices=slots.indices,
            weights=self.scoring.weights(slots.scores, keep, min_k=self.min_k),
            keep=keep,
            token_mask=token_mask,
        )

    def fit(
        self,
        params: Params,
        state: MinPState,
        x: Array,
        *,
        target_mean_k: float,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> MinPState:
        budget.check_target(target_mean_k, min_k=self.min_k, max_k=self.max_k)
        mask = real_tokens(token_mask, x)
        slots = score_slots(
            self.gate, self.scoring, params, x,
            max_k=self.max_k, expert_bias=state.expert_bias, key=None, token_mask=token_mask,
        )  # fmt: skip
        probs = np.asarray(slots.slot_probs)[mask]
        # A prefix ends at the first slot below the ratio, so a slot counts with the least before it.
        shares = np.minimum.accumulate(probs / probs[:, :1], axis=1)[:, self.min_k :]
        cut = budget.fit_cut(-shares, (target_mean_k - self.min_k) * len(shares))
        state = dataclasses.replace(state, ratio=jnp.asarray(-cut, jnp.float32))
        return finish_fit(
            self, params, state, x,
            target_mean_k=target_mean_k, token_mask=token_mask, context=context,
        )  # fmt: skip
