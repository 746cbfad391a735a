"""Mixture-of-Depths: a block takes the tokens that need it, the others pass by."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.checks import check_at_least_0, check_flag, check_range
from moe_jax.routers.base import Traits
from moe_jax.routers.contracts import ExpertsChoose
from moe_jax.routing.gate import Gate
from moe_jax.routing.losses import mean_over_tokens
from moe_jax.routing.numerics import exact
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import build_routing, top_slots
from moe_jax.types import Array, ExpertChoice, Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOfDepths(ExpertsChoose):
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
        share = "It is the share of the tokens that an expert takes; 0.125 is usual."
        check_range("capacity", self.capacity, above=0, most=1, fix=share)
        check_at_least_0("predictor", self.predictor)
        check_flag("causal", self.causal)

    @property
    def mean_k(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Experts per token on average, of the form that is not causal."""
        # In decimals, as written: 0.05 * 3 in floats is above 0.15, which takes a token more.
        return float(exact(self.capacity) * self.num_experts)

    @property
    def traits(self) -> Traits:
        if not self.causal:
            return super().traits
        return Traits(causal=True, batch_invariant=True, may_leave_token_empty=True, budget="none")

    def __call__(
        self, params, state, x, *, key=None, token_mask=None, context=None
    ) -> Routing | ExpertChoice:
        logits = self.logits(params, x, key=key, token_mask=token_mask)
        probs = Scoring().probs(logits, Scoring().scores(logits))
        if not self.causal:
            return self.take(logits, probs, logits, token_mask)
        indices, best = top_slots(self.gate.exclude(logits), self.num_experts)
        return build_routing(
            logits=logits,
            probs=probs,
            indices=indices,
            weights=jnp.take_along_axis(logits, indices, axis=1),
            keep=best > 0,
            token_mask=token_mask,
        )

    def regularization(self, params, state, routing, *, axis_name=None) -> Array:
        """f32[]: the predictor's cross-entropy times ``predictor``; 0 for the causal form."""
        if self.causal or not self.predictor:
            return jnp.zeros((), jnp.float32)
        z = routing.router_logits
        taken = routing.expert_mask
        # log(1 + exp(-z)) where taken, log(1 + exp(z)) elsewhere; a disabled expert has no say.
        on = jnp.isfinite(self.gate.exclude(z))
        loss = jnp.where(on, jax.nn.softplus(jnp.where(taken, -z, z)), 0.0).mean(axis=1)
        return self.predictor * mean_over_tokens(loss, routing, axis_name)
