"""The contract that the rules of single models share."""

from __future__ import annotations

import abc

from moe_jax.checks import check_k
from moe_jax.routers.token_choice import Slots, TokenChoice
from moe_jax.types import Array


class PublishedRule(TokenChoice, abc.ABC):
    """A token chooses k classes: as many experts, unless some classes are no experts."""

    k: int

    def __post_init__(self) -> None:
        check_k(num_experts=self.num_experts + self.num_free, min_k=0, max_k=self.k)
        super().__post_init__()
        self.gate.check(num_experts=self.num_experts, k=self.k - self.num_free)

    @property
    def num_free(self) -> int:
        """How many of the classes to choose from are no experts; choosing them fills no slot."""
        return 0

    @property
    def num_classes(self) -> int:
        return self.num_experts + self.num_free

    @property
    def max_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """k, and at most the number of experts."""
        return min(self.k, self.num_experts)

    @property
    def min_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """k without the choices that may be no experts."""
        return max(0, self.k - self.num_free)

    @property
    def num_choices(self) -> int:
        return self.k

    def select(self, params, state, slots, x, context):
        return slots.available, self.weights(slots, slots.available)

    def weights(self, slots: Slots, keep: Array, *, min_k: int | None = None) -> Array:
        # min_k=2: where a published rule renormalises the weight of a token's only expert, that is
        # the rule, so it does not warn.
        return super().weights(slots, keep, min_k=max(self.k, 2) if min_k is None else min_k)
