"""Top-p: a token uses experts until their probabilities add up to more than p."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_finite, check_share
from moe_jax.routers.arguments import check_uses_an_expert
from moe_jax.routers.token_choice import TokenChoice
from moe_jax.routing import budget
from moe_jax.routing.balancing import pi_controller
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import clip_counts, top_p_keep
from moe_jax.types import Array, RoutingStats, pytree


@pytree
class TopPState:
    """The selection bias, p, and the controller that steers p."""

    expert_bias: Array  # f32[E], added for selection only
    p: Array  # f32[]
    anchor: Array  # f32[]: the p that the controller steers around
    integral: Array  # f32[]: the controller's summed error
    fit: budget.Fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopP(TokenChoice):
    """The shortest prefix of the sorted probabilities whose sum exceeds p (strictly).

    Huang et al. 2024, arXiv:2403.07652: weights are the raw probabilities, not renormalised. With
    ``target_mean_k`` set, ``update`` steers p by a PI controller (DTop-p, arXiv:2512.13996); without
    it p moves only by ``fit``.

    Args:
        num_experts: E.
        p: initial p, in [0, 1]; the paper's code uses 0.4.
        min_k: fewest experts a token uses, at least 1.
        max_k: most experts a token uses; None is E.
        target_mean_k: mean experts per token that ``update`` steers to; None is no steering.
        kp: proportional gain of the controller, p per expert.
        ki: integral gain of the controller, p per expert and step.
        gate: the map to logits.
        scoring: logits to scores and weights.

    Example:
        >>> import jax
        >>> router = TopP(num_experts=8, p=0.4)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> router(params, state, jnp.ones((5, 16))).expert_indices.shape
        (5, 8)
    """

    num_experts: int
    p: float = 0.4
    min_k: int = 1
    max_k: int = None  # pyright: ignore[reportAssignmentType]  # None becomes E
    target_mean_k: float | None = None
    kp: float = 0.02
    ki: float = 0.002
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("p", self.p, fix="0.4 is usual.")
        check_finite("kp", self.kp)
        check_finite("ki", self.ki)
        check_uses_an_expert(self.min_k, "Top-p always uses one expert.")
        if self.target_mean_k is not None:
            budget.check_target(self.target_mean_k, min_k=self.min_k, max_k=self.max_k)

    def init_state(self) -> TopPState:
        p = jnp.asarray(self.p, jnp.float32)
        return TopPState(
            expert_bias=jnp.zeros((self.num_experts,), jnp.float32),
            p=p,
            anchor=jnp.copy(p),  # two arrays, so that a step may donate the state
            integral=jnp.zeros((), jnp.float32),
            fit=budget.unfitted(self.max_k),
        )

    def select(self, params, state: TopPState, slots, x, context):
        keep = clip_counts(top_p_keep(slots.slot_probs, state.p), min_k=self.min_k)
        return keep, self.weights(slots, keep)

    def update(self, state: TopPState, stats: RoutingStats) -> TopPState:
        if self.target_mean_k is None:
            return state
        p, integral = pi_controller(
            anchor=state.anchor,
            integral=state.integral,
            measured=stats.mean_experts_per_token,
            target=self.target_mean_k,
            kp=self.kp,
            ki=self.ki,
            low=0.0,
            high=1.0,
        )
        return dataclasses.replace(state, p=p, integral=integral)

    def calibrate(self, params, state: TopPState, slots, x, context, *, real, target_mean_k):
        p = budget.fit_top_p(np.asarray(slots.slot_probs)[real], self.min_k, target_mean_k)
        return dataclasses.replace(
            state, p=p, anchor=jnp.copy(p), integral=jnp.zeros((), jnp.float32)
        )
