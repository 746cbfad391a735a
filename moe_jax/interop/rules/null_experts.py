"""Null experts, which cost nothing and return nothing: AdaMoE."""

from __future__ import annotations

import dataclasses

from moe_jax.interop.rules.free_classes import FreeClasses
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring


@dataclasses.dataclass(frozen=True, kw_only=True)
class NullExperts(FreeClasses):
    """Top-k over E experts and Z null ones (AdaMoE, arXiv:2406.13233).

    A choice of a null expert fills no slot, so a token uses between ``k - Z`` and ``k`` experts, and
    ``k * E / (E + Z)`` on average where all classes are equally popular. Weights are renormalised among
    the experts used. A token whose choices are all null gets nothing from the layer.

    Args:
        num_experts: E.
        num_null_experts: Z.
        k: choices per token, null ones included.
        gate: the map to E + Z logits.
        scoring: logits to scores and weights.

    Example:
        >>> import jax
        >>> router = NullExperts(num_experts=4, num_null_experts=4, k=4)
        >>> params = router.init(jax.random.key(0), 16)
        >>> x = jax.random.normal(jax.random.key(1), (1000, 16))
        >>> mean = router(params, router.init_state(), x).num_experts_per_token.mean()
        >>> 1.5 < float(mean) < 2.5
        True
    """

    num_experts: int
    num_null_experts: int
    k: int
    gate: Gate = Gate()
    scoring: Scoring = Scoring(norm="sum")

    @property
    def num_free(self) -> int:
        return self.num_null_experts

    def select(self, params, state, slots, x, context):
        keep = slots.indices < self.num_experts
        return keep, self.weights(slots, keep)
