"""Mixture-of-Depths: a block takes the tokens that need it, the others pass by."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.checks import check_at_least_0, check_flag, check_number
from moe_jax.routers.arguments import check_classes
from moe_jax.routers.base import Router, Traits
from moe_jax.routing.difficulty import Context
from moe_jax.routing.dispatch import expert_capacity
from moe_jax.routing.gate import Gate
from moe_jax.routing.losses import Axes, mean_over_tokens
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import build_routing, choose_tokens, top_slots
from moe_jax.types import Array, ExpertChoice, Params, Routing, pytree


@pytree
class MixtureOfDepthsState:
    """An empty state: the rule learns nothing without gradients."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOfDepths(Router):
    """A block takes ``capacity * T`` tokens (Raposo et al. 2024, arXiv:2404.02258).

    With one expert, the block itself, this is Mixture-of-Depths; put the layer into a residual branch,
    so that the other tokens skip it. With more experts each takes that share (MoDE). The weight is the
    router's output for the token, as it is: the block's output is multiplied by it.

    A block's choice looks at the whole batch: ``causal=False`` is for training. ``causal=True`` serves
    the same parameters: a token goes through iff its logit is above 0. ``regularization`` trains the
    logits for that, as the paper does: binary cross-entropy between the sigmoid of the logit and
    whether the token was taken. The mean of the causal form is what that classifier reaches; watch
    ``stats.mean_experts_per_token``.

    Args:
        num_experts: E.
        capacity: share of the tokens that each expert takes; 0.125 in the paper.
        causal: each token by itself.
        predictor: coefficient of the cross-entropy.
        gate: the map to logits.

    Example:
        >>> router = MixtureOfDepths(capacity=0.25)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> x = jax.random.normal(jax.random.key(1), (40, 16))
        >>> int(router(params, state, x).num_experts_per_token.sum())
        10
        >>> dataclasses.replace(router, causal=True)(params, state, x).expert_indices.shape
        (40, 1)
    """

    num_experts: int = 1
    capacity: float = 0.125
    causal: bool = False
    predictor: float = 1e-2
    gate: Gate = Gate()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("capacity", self.capacity)
        check_at_least_0("predictor", self.predictor)
        check_flag("causal", self.causal)
        if not 0 < self.capacity <= 1:
            raise ValueError(
                f"capacity: expected 0 < capacity <= 1, got {self.capacity}. It is the share of the "
                "tokens that an expert takes; 0.125 is usual."
            )

    @property
    def mean_k(self) -> float:
        """Experts per token on average, of the form that is not causal."""
        return self.capacity * self.num_experts

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
            causal=self.causal,
            batch_invariant=self.causal,
            may_leave_token_empty=True,
            budget="none" if self.causal else "exact",
        )

    def init_state(self) -> MixtureOfDepthsState:
        return MixtureOfDepthsState()

    def __call__(
        self,
        params: Params,
        state: MixtureOfDepthsState,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing | ExpertChoice:
        logits = self.gate(params, x, key=key, token_mask=token_mask)
        check_classes(logits, self.num_experts)
        probs, scores = Scoring().probs(logits, Scoring().scores(logits)), self.gate.exclude(logits)
        if not self.causal:
            capacity = expert_capacity(x.shape[0], self.num_experts, self.mean_k, 1.0)
            return choose_tokens(
                logits=logits, probs=probs, scores=scores, capacity=capacity, token_mask=token_mask
            )
        indices, best = top_slots(scores, self.num_experts)
        weights = jnp.take_along_axis(logits, indices, axis=1)
        return build_routing(
            logits=logits,
            probs=probs,
            indices=indices,
            weights=weights,
            keep=best > 0,
            token_mask=token_mask,
        )

    def regularization(
        self,
        params: Params,
        state: MixtureOfDepthsState,
        routing: Routing | ExpertChoice,
        *,
        axis_name: Axes = None,
    ) -> Array:
        """f32[]: the predictor's cross-entropy times ``predictor``; 0 for the causal form."""
        if self.causal or not self.predictor:
            return jnp.zeros((), jnp.float32)
        z = routing.router_logits
        taken = routing.expert_mask
        # log(1 + exp(-z)) where taken, log(1 + exp(z)) elsewhere; a disabled expert has no say.
        on = jnp.isfinite(self.gate.exclude(z))
        loss = jnp.where(on, jax.nn.softplus(jnp.where(taken, -z, z)), 0.0).mean(axis=1)
        return self.predictor * mean_over_tokens(loss, routing, axis_name)
