"""Capacity by position: Switch and NLLB."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from moe_jax.checks import check_count
from moe_jax.interop.rules.common import PublishedRule
from moe_jax.routers.base import NoState, Traits
from moe_jax.routers.token_choice import Slots
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import served_before
from moe_jax.types import Array, Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapacityTopK(PublishedRule):
    """Top-k in which an expert serves only the first ``capacity`` tokens that ask for it.

    The Switch Transformer of transformers (capacity counted per sequence) and NLLB-MoE's top-2
    (counted over the batch). All first choices are served before any second choice. A choice over
    capacity becomes an unused slot. So a token's routing depends on the tokens before it, and second
    choices even on later ones: compare ``LayerOptions.capacity_factor``, which drops in the plan.

    Args:
        num_experts: E.
        k: experts per token.
        capacity: most tokens an expert serves, in each sequence; None for no bound.
        capacity_fraction: if given, the capacity is this share of all T tokens, rounded up.
        sequence_length: T is a multiple of it, and every sequence is counted by itself; None
            counts the whole batch as one.
        prioritize: serve tokens by descending best probability instead of by position.
        norm_after: whether weights are normalised over what was kept, or before dropping.
        gate: the map to logits.
        scoring: logits to scores and weights.

    Example:
        >>> router = CapacityTopK(num_experts=2, k=1, capacity=1)
        >>> params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
        >>> x = jnp.array([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> router(params, router.init_state(), x).expert_indices[:, 0].tolist()
        [0, 2, 1]
    """

    num_experts: int
    k: int = 1
    capacity: int | None = None
    capacity_fraction: float | None = None
    sequence_length: int | None = None
    prioritize: bool = False
    norm_after: bool = True
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    keeps_prefix = False
    # An expert may be full for every choice of a token.
    min_k: ClassVar[int] = 0  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.capacity is not None:
            check_count("capacity", self.capacity, fix="Pass None for no bound.")
        if self.prioritize and self.sequence_length is not None:
            raise ValueError(
                "prioritize: expected sequence_length=None, since tokens are ranked over the whole "
                f"batch, got {self.sequence_length}."
            )

    @property
    def traits(self) -> Traits:
        causal = self.k == 1 and not self.prioritize and self.capacity_fraction is None
        return Traits(
            causal=causal, batch_invariant=False, may_leave_token_empty=True, budget="none"
        )

    def init_state(self) -> NoState:
        return NoState()

    def select(self, params, state, slots, x, context):
        """All slots; ``build`` drops, as it knows the padding, which takes no capacity."""
        return slots.available, slots.scores

    def build(self, slots: Slots, keep: Array, weights: Array) -> Routing:
        asked = keep & slots.token_mask[:, None]
        kept = asked & (self._position(slots, asked) < self._bound(keep.shape[0]))
        weights = self.weights(slots, kept if self.norm_after else asked)
        return super().build(slots, kept, weights)

    def _bound(self, tokens: int) -> int:
        if self.capacity_fraction is not None:
            return math.ceil(self.capacity_fraction * tokens)
        return tokens if self.capacity is None else self.capacity

    def _position(self, slots: Slots, asked: Array) -> Array:
        """i32[T, K]: how many were served before, by the same expert in the same sequence."""
        tokens = asked.shape[0]
        length = tokens if self.sequence_length is None else self.sequence_length
        if tokens % length:
            raise ValueError(
                f"x: expected a multiple of sequence_length={length} tokens, got {tokens}. "
                "Pass whole sequences, flattened."
            )
        first = -self.scoring.scores(slots.logits).max(axis=-1) if self.prioritize else None
        return served_before(
            slots.indices, asked, num_experts=self.num_experts, length=length, order_by=first
        )
