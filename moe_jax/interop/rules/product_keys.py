"""Very many tiny experts, looked up by two short lists of keys: Doge."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp

from moe_jax.interop.rules.common import PublishedRule
from moe_jax.routers.arguments import check_params
from moe_jax.routers.base import NoState, Traits
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductKeys(PublishedRule):
    """Top-k over E = n * n experts whose logits are sums of two of 2n numbers (Doge).

    The idea is that of product keys (Lample et al. 2019, arXiv:1907.05242). Expert ``i * n + j`` has
    logit ``a_i + b_j``; the weights are a softmax over the chosen. As in transformers, whose code
    reads the 2n numbers of all T tokens as if they lay [2, T, n] in memory, a token's ``a`` and ``b``
    come from the rows of *other* tokens of the batch. Checkpoints were trained that way, so the rule
    is neither causal nor batch-invariant.

    Args:
        num_experts: E, a square.
        k: experts per token.
        gate: the map to 2n numbers; ``disabled_experts`` are indices of experts, below E.

    Example:
        >>> router = ProductKeys(num_experts=16, k=3)
        >>> import jax
        >>> params = router.init(jax.random.key(0), 8)
        >>> params["kernel"].shape, router(params, NoState(), jnp.ones((5, 8))).expert_indices.shape
        ((8, 8), (5, 3))
    """

    num_experts: int
    k: int
    gate: Gate = Gate()
    scoring: ClassVar[Scoring] = Scoring(score="identity", post="softmax")  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_keys**2 != self.num_experts:
            raise ValueError(
                f"num_experts: expected a square, got {self.num_experts}. Experts are pairs of keys; "
                f"the nearest is {self.num_keys**2}."
            )

    @property
    def num_keys(self) -> int:
        """n."""
        return math.isqrt(self.num_experts)

    @property
    def traits(self) -> Traits:
        return Traits(
            causal=False, batch_invariant=False, may_leave_token_empty=False, budget="exact"
        )

    def init(self, key: Array, d_model: int) -> Params:
        return self._gate_of_keys.init(key, d_model=d_model, num_experts=2 * self.num_keys)

    def init_state(self) -> NoState:
        return NoState()

    def logits(self, params, x, *, key=None, token_mask=None, context=None) -> Array:
        check_params(params, kernel=(None, 2 * self.num_keys))
        keys = self._gate_of_keys(params, x, key=key, token_mask=token_mask)
        first, second = keys.reshape(2, x.shape[0], self.num_keys)
        logits = (first[:, :, None] + second[:, None, :]).reshape(x.shape[0], self.num_experts)
        # As from a gate over experts: -inf would give NaN in the gradients of some losses.
        return jnp.maximum(self.gate.exclude(logits), jnp.finfo(jnp.float32).min)

    @property
    def _gate_of_keys(self) -> Gate:
        """The gate without its disabled experts, which are no indices of keys."""
        return dataclasses.replace(self.gate, disabled_experts=())
