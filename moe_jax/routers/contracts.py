"""What several rules share beyond ``TokenChoice``: a fixed k, a whole batch, experts that choose."""

from __future__ import annotations

import abc
from typing import ClassVar

from moe_jax.checks import check_k
from moe_jax.routers.arguments import check_classes
from moe_jax.routers.base import NoState, Router, Traits
from moe_jax.routers.token_choice import TokenChoice
from moe_jax.routing.dispatch import expert_capacity
from moe_jax.routing.selection import choose_tokens
from moe_jax.types import Array, ExpertChoice


class FixedK(TokenChoice, abc.ABC):
    """Rules with a field ``k``, the number of experts that the model was trained with.

    A token uses its ``k`` best experts, unless the rule has another ``min_k`` and ``select``.
    """

    k: int

    def __post_init__(self) -> None:
        # Before the checks of the contract, which would name max_k, a field that the rule lacks.
        check_k(num_experts=self.num_experts, min_k=self.k, max_k=self.k)
        super().__post_init__()
        self.check_within_reach(self.k)

    @property
    def max_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """K: most experts that a token uses."""
        return self.k

    @property
    def min_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Fewest experts that a token uses."""
        return self.k

    def select(self, params, state, slots, x, context):
        return slots.available, self.weights(slots, slots.available)


class WholeBatch(TokenChoice, abc.ABC):
    """Rules in which the real tokens of a batch compete for experts.

    ``slots.token_mask`` says which tokens are real. The service refuses such rules: it pads, cuts and
    caches requests, which would change their answers.
    """

    @property
    def traits(self) -> Traits:
        return Traits(
            causal=False,
            batch_invariant=False,
            may_leave_token_empty=self.min_k == 0,
            budget="exact" if self.min_k == self.max_k else "none",
        )


class ExpertsChoose(Router, abc.ABC):
    """Rules in which every expert takes its ``mean_k * T / E`` best tokens."""

    mean_k: float
    min_k: ClassVar[int] = 0  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def max_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """E: every expert may take a token."""
        return self.num_experts

    @property
    def traits(self) -> Traits:
        return Traits(
            causal=False, batch_invariant=False, may_leave_token_empty=True, budget="exact"
        )

    def init_state(self) -> NoState:
        return NoState()

    def logits(self, params, x: Array, *, key=None, token_mask=None) -> Array:
        """f32[T, E]: the gate's logits."""
        logits = self.gate(params, x, key=key, token_mask=token_mask)
        check_classes(logits, self.num_experts)
        return logits

    def take(self, logits: Array, probs: Array, scores: Array, token_mask) -> ExpertChoice:
        """Every expert takes its best tokens by ``scores`` f32[T, E]; disabled ones take none."""
        tokens = logits.shape[0]
        return choose_tokens(
            logits=logits,
            probs=probs,
            scores=self.gate.exclude(scores),
            capacity=expert_capacity(tokens, self.num_experts, self.mean_k, 1.0),
            token_mask=token_mask,
        )
