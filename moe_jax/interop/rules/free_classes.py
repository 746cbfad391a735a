"""The contract of rules that choose among experts and classes that cost nothing."""

from __future__ import annotations

import abc
import dataclasses

import jax.numpy as jnp

from moe_jax.interop.rules.common import PublishedRule
from moe_jax.routers.arguments import check_ungrouped
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, Params, Routing


class FreeClasses(PublishedRule, abc.ABC):
    """Top-k over E experts and Z classes without one, which fill no slot of the routing.

    Logits, scores and probabilities have E + Z columns until ``build``. The routing is over the E
    experts: its logits and probabilities are theirs alone, the latter divided by their sum.
    """

    keeps_prefix = False
    scoring: Scoring

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ungrouped(self.scoring, "Classes without an expert are in no group.")

    def init(self, key: Array, d_model: int) -> Params:
        return self.gate.init(key, d_model=d_model, num_experts=self.num_classes)

    def select(self, params, state, slots, x, context):
        return slots.indices < self.num_experts, self.weights(slots, slots.available)

    def build(self, slots, keep, weights) -> Routing:
        probs = slots.probs[:, : self.num_experts]
        probs = probs / jnp.maximum(probs.sum(axis=-1, keepdims=True), 1e-30)
        logits = slots.logits[:, : self.num_experts]
        slots = dataclasses.replace(slots, logits=logits, probs=probs)
        routing = super().build(slots, keep, weights)
        # Kept slots come first, and no token keeps more than E of its k choices.
        return dataclasses.replace(
            routing,
            expert_indices=routing.expert_indices[:, : self.max_k],
            combine_weights=routing.combine_weights[:, : self.max_k],
        )
