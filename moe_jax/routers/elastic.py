"""Elastic k: trained with a drawn number of experts, served at any budget by the same rule."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_choice, check_flag, check_share
from moe_jax.routers.arguments import check_uses_an_expert
from moe_jax.routers.contracts import FixedK
from moe_jax.routing import budget
from moe_jax.routing.chance import fit_mixed_counts, mixed_counts
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import clip_counts, first_k, min_p_keep
from moe_jax.types import Array, pytree

DRAWS = ("k", "min_p")


@pytree
class ElasticState:
    """The balancing bias, the share of drawing tokens and the budget of the others."""

    expert_bias: Array  # f32[E], added for selection only
    share: Array  # f32[]: share of the tokens whose budget is drawn; 0 where the model is served
    level: Array  # f32[]: budget of the other tokens: a mean k, or a min-p ratio
    fit: budget.Fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elastic(FixedK):
    """Fixed k for some tokens and a drawn budget for the others, so that any budget works later.

    In training, ``state.share`` of the tokens draw their budget: with ``draw="k"`` a number of experts,
    uniform between ``min_k`` and ``k``; with ``draw="min_p"`` a ratio, uniform in [0, 1), below which
    experts are left out as ``MinP`` does. Each layer draws for itself, which EMoE (arXiv:2509.21892)
    and M-MoE (arXiv:2509.26520) report to be best. ``fit`` ends the drawing and sets one budget for all
    tokens: the served rule is the trained rule.

    Draws are hashes of the token's logits, so they need no key and do not depend on the batch. If
    ``__call__`` receives a key, they come from the key instead.

    Args:
        num_experts: E.
        k: experts of a token that draws nothing, and the most that one can draw.
        min_k: fewest experts of a token, at least 1.
        draw: ``"k"`` or ``"min_p"``.
        share: initial share of the tokens that draw, see ``with_share``.
        rescale: whether the weights of the experts used are scaled up to the sum of all ``k``
            weights, so that the output keeps its size when experts are left out.
        balance_rate: step of the loss-free bias that ``update`` moves; 0 is off.
        gate: the map to logits.
        scoring: logits to scores and weights.

    Example:
        >>> router = Elastic(num_experts=8, k=4, share=1.0)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> x = jax.random.normal(jax.random.key(1), (1000, 16))
        >>> abs(float(router(params, state, x).num_experts_per_token.mean()) - 2.5) < 0.2
        True
        >>> state = router.fit(params, state, x, target_mean_k=3.0)
        >>> abs(float(router(params, state, x).num_experts_per_token.mean()) - 3.0) < 0.01
        True
    """

    num_experts: int
    k: int
    min_k: int = 1  # pyright: ignore[reportIncompatibleMethodOverride]
    draw: str = "k"
    share: float = 0.0
    rescale: bool = False
    balance_rate: float = 0.0
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    num_draws: ClassVar[int] = 3  # whether the token draws, what it draws, its share of the level

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("draw", self.draw, DRAWS)
        check_flag("rescale", self.rescale)
        check_share("share", self.share, fix="1 draws for all.")
        check_uses_an_expert(self.min_k, "A token always uses its best expert.")

    def init_state(self) -> ElasticState:
        return ElasticState(
            expert_bias=jnp.zeros((self.num_experts,), jnp.float32),
            share=jnp.asarray(self.share, jnp.float32),
            level=jnp.asarray(self.k if self.draw == "k" else 0.0, jnp.float32),
            fit=budget.unfitted(self.k),
        )

    def select(self, params, state: ElasticState, slots, x, context):
        draws = slots.draws[:, 0] < state.share
        if self.draw == "k":
            above = jnp.floor(slots.draws[:, 1] * (self.k - self.min_k + 1)).astype(jnp.int32)
            level = mixed_counts(slots.draws[:, 2], state.level)
            keep = first_k(jnp.where(draws, self.min_k + above, level), self.k)
        else:
            ratio = jnp.where(draws, slots.draws[:, 1], state.level)
            keep = min_p_keep(slots.slot_probs, ratio[:, None])
        keep = clip_counts(keep, min_k=self.min_k)
        weights = self.weights(slots, keep)
        if self.rescale:
            kept = jnp.where(keep & slots.available, weights, 0.0).sum(axis=-1, keepdims=True)
            whole = self.weights(slots, jnp.ones_like(keep))
            whole = jnp.where(slots.available, whole, 0.0).sum(axis=-1, keepdims=True)
            # Scores that may be 0 or negative (identity) have no size to keep.
            usable = kept > 1e-9
            weights = weights * jnp.where(usable, whole / jnp.where(usable, kept, 1.0), 1.0)
        return keep, weights

    def calibrate(self, params, state: ElasticState, slots, x, context, *, real, target_mean_k):
        if self.draw == "k":
            level = fit_mixed_counts(np.asarray(slots.draws)[real, 2], target_mean_k)
        else:
            level = budget.fit_min_p(np.asarray(slots.slot_probs)[real], self.min_k, target_mean_k)
        return dataclasses.replace(state, share=jnp.zeros((), jnp.float32), level=level)


def with_share(states: Any, share: float | Array) -> Any:
    """Returns a tree of router states in which ``share`` of the tokens draw their budget.

    Args:
        states: any pytree, such as a model's collection of router states. States of other rules
            stay as they are.
        share: f32[] in [0, 1], may be traced: ``Schedule.share_at`` gives it. 0 is for serving.

    Raises:
        TypeError, ValueError: a Python value that is no share.

    Example:
        >>> state = Elastic(num_experts=4, k=2).init_state()
        >>> float(with_share({"layer_0": state}, 0.5)["layer_0"].share)
        0.5
    """

    if not hasattr(share, "dtype"):
        check_share("share", share, fix="1 draws for all.")

    def put(state: Any) -> Any:
        if not isinstance(state, ElasticState):
            return state
        value = jnp.asarray(share, jnp.float32)
        return dataclasses.replace(state, share=jnp.broadcast_to(value, state.share.shape))

    return jax.tree.map(put, states, is_leaf=lambda node: isinstance(node, ElasticState))
