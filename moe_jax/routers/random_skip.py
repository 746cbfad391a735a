"""A control: saves compute by chance, without looking at difficulty. Compare other rules with it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_choice, check_range
from moe_jax.routers.contracts import FixedK
from moe_jax.routing import budget
from moe_jax.routing.chance import fit_mixed_counts, mixed_counts, token_chance
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import first_k
from moe_jax.types import Array, pytree


@pytree
class RandomSkipState:
    """The selection bias and the mean k."""

    expert_bias: Array  # f32[E], added for selection only
    mean_k: Array  # f32[]
    fit: budget.Fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSkip(FixedK):
    """Fixed k with experts dropped by chance, to the same mean as a rule under test.

    ``drop="lowest"`` is the static mix: a random share of the tokens uses one expert fewer, and loses
    its lowest-ranked one. ``drop="random"`` loses randomly picked ones instead. Chance is a hash of
    the token's own logits, so a token's answer is the same in any batch and needs no key.

    Args:
        num_experts: E.
        k: the trained k.
        mean_k: experts per token on average, between 1 and k; ``fit`` sets it too.
        drop: ``"lowest"`` or ``"random"``.
        gate: the map to logits.
        scoring: logits to scores and weights.

    Example:
        >>> import jax
        >>> router = RandomSkip(num_experts=8, k=2, mean_k=1.5, drop="random")
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> x = jax.random.normal(jax.random.key(1), (1000, 16))
        >>> abs(float(router(params, state, x).num_experts_per_token.mean()) - 1.5) < 0.1
        True
    """

    num_experts: int
    k: int
    mean_k: float
    drop: str = "lowest"
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    # A token keeps its best expert.
    min_k: ClassVar[int] = 1  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("drop", self.drop, ("lowest", "random"))
        drops = f"A control drops some of the k={self.k} experts, never all."
        check_range("mean_k", self.mean_k, least=1, most=self.k, fix=drops)

    def init_state(self) -> RandomSkipState:
        return RandomSkipState(
            expert_bias=jnp.zeros((self.num_experts,), jnp.float32),
            mean_k=jnp.asarray(self.mean_k, jnp.float32),
            fit=budget.unfitted(self.k),
        )

    @property
    def keeps_prefix(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True if the lowest-ranked experts are dropped."""
        return self.drop == "lowest"

    def select(self, params, state: RandomSkipState, slots, x, context):
        chance = token_chance(slots.logits, 1 + self.k)
        counts = mixed_counts(chance[:, 0], state.mean_k)
        if self.drop == "lowest":
            keep = first_k(counts, self.k)
        else:  # the first `counts` slots of a random order
            rank = jnp.argsort(jnp.argsort(chance[:, 1:], axis=-1), axis=-1)
            keep = rank < counts[:, None]
        return keep, self.weights(slots, keep)

    def calibrate(self, params, state: RandomSkipState, slots, x, context, *, real, target_mean_k):
        chance = np.asarray(token_chance(slots.logits, 1))[real, 0]
        return dataclasses.replace(state, mean_k=fit_mixed_counts(chance, target_mean_k))
