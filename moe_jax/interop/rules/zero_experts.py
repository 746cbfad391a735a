"""Experts that return their input: LongCat-Flash."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from moe_jax.interop.rules.free_classes import FreeClasses
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroExperts(FreeClasses):
    """Top-k over E experts and Z that return their input (LongCat-Flash, arXiv:2509.01322).

    Such an identity expert fills no slot of the routing: its weight is in ``residual_weight``.

    Args:
        num_experts: E, the experts that compute.
        num_zero_experts: Z.
        k: choices per token, zero experts included.
        gate: the map to E + Z logits.
        scoring: logits to scores and weights.

    Example:
        >>> import jax
        >>> router = ZeroExperts(num_experts=4, num_zero_experts=4, k=2)
        >>> params = router.init(jax.random.key(0), 16)
        >>> routing = router(params, router.init_state(), jnp.ones((5, 16)))
        >>> routing.expert_indices.shape, params["kernel"].shape
        ((5, 2), (16, 8))
    """

    num_experts: int
    num_zero_experts: int
    k: int
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    @property
    def num_free(self) -> int:
        return self.num_zero_experts

    def build(self, slots, keep, weights) -> Routing:
        routing = super().build(slots, keep, weights)
        zero = slots.available & (slots.indices >= self.num_experts)
        residual = jnp.where(zero & routing.token_mask[:, None], weights, 0.0).sum(axis=-1)
        return dataclasses.replace(routing, residual_weight=residual)
