"""Very many tiny experts, found by two short lists of keys: Doge."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from moe_jax.checks import check_k
from moe_jax.interop.rules.common import NoState
from moe_jax.routers.base import Router, Traits
from moe_jax.routing.difficulty import Context
from moe_jax.routing.gate import Gate
from moe_jax.routing.selection import build_routing, top_slots
from moe_jax.types import Array, Params, Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductKeys(Router):
    """Top-k over E = n * n experts whose logits are sums of two of 2n numbers (Doge; the idea is that
    of product keys, Lample et al. 2019, arXiv:1907.05242).

    Expert ``i * n + j`` has logit ``a_i + b_j``; the weights are a softmax over the chosen. As in
    transformers, whose code reads the 2n numbers of all T tokens as if they lay [2, T, n] in memory,
    a token's ``a`` and ``b`` come from the rows of *other* tokens of the batch. Checkpoints run that
    way, so it is kept: the rule is neither causal nor batch-invariant.

    Args:
        num_experts: E, a square.
        k: experts per token.
        gate: the map to 2n numbers.

    Example:
        >>> router = ProductKeys(num_experts=16, k=3)
        >>> params = router.init(jax.random.key(0), 8)
        >>> params["kernel"].shape, router(params, NoState(), jnp.ones((5, 8))).expert_indices.shape
        ((8, 8), (5, 3))
    """

    num_experts: int
    k: int
    gate: Gate = Gate()

    def __post_init__(self) -> None:
        check_k(num_experts=self.num_experts, min_k=self.k, max_k=self.k)
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
    def max_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.k

    @property
    def min_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.k

    @property
    def traits(self) -> Traits:
        return Traits(
            causal=False, batch_invariant=False, may_leave_token_empty=False, budget="exact"
        )

    def init(self, key: Array, d_model: int) -> Params:
        return self.gate.init(key, d_model=d_model, num_experts=2 * self.num_keys)

    def init_state(self) -> NoState:
        return NoState()

    def __call__(
        self,
        params: Params,
        state: NoState,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing:
        tokens = x.shape[0]
        keys = self.gate(params, x, key=key, token_mask=token_mask)
        first, second = keys.reshape(2, tokens, self.num_keys)
        logits = (first[:, :, None] + second[:, None, :]).reshape(tokens, self.num_experts)
        indices, _ = top_slots(logits, self.k)
        return build_routing(
            logits=logits,
            probs=jax.nn.softmax(logits, axis=-1),
            indices=indices,
            weights=jax.nn.softmax(jnp.take_along_axis(logits, indices, axis=-1), axis=-1),
            keep=jnp.ones(indices.shape, bool),
            token_mask=token_mask,
        )
