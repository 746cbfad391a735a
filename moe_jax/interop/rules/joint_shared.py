"""Routed and shared experts that share one budget of weight: Inkling."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.checks import check_k
from moe_jax.interop.rules.free_classes import BiasState
from moe_jax.routers.base import Router, Traits
from moe_jax.routing.difficulty import Context
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import build_routing, top_slots
from moe_jax.types import Array, Params, Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointShared(Router):
    """Top-k of sigmoid scores, weighed together with shared experts that every token uses (Inkling).

    The router has E + S logits. The k best of the E by ``sigmoid(z) + bias`` are chosen, all S shared
    experts join them, and the k + S sigmoids are divided by their sum (in log space), then scaled. So
    a shared expert takes weight away from the routed ones: it is a sink.

    The routing is over the E experts; ``shared_weights`` has what the S weigh.

    Args:
        num_experts: E.
        num_shared: S.
        k: routed experts per token.
        scale: factor on all weights, beside the parameter ``global_scale`` f32[1].
        gate: the map to E + S logits.

    Example:
        >>> router = JointShared(num_experts=4, num_shared=2, k=2)
        >>> params, state = router.init(jax.random.key(0), 8), router.init_state()
        >>> x = jnp.ones((3, 8))
        >>> routing = router(params, state, x)
        >>> both = routing.combine_weights.sum(-1) + router.shared_weights(params, x, routing).sum(-1)
        >>> bool(jnp.allclose(both, 1.0))
        True
    """

    num_experts: int
    num_shared: int
    k: int
    scale: float = 1.0
    gate: Gate = Gate()

    def __post_init__(self) -> None:
        check_k(num_experts=self.num_experts, min_k=self.k, max_k=self.k)
        if self.num_shared < 1:
            raise ValueError(
                f"num_shared: expected at least 1, got {self.num_shared}. Without shared experts use "
                "TopK with sigmoid scores."
            )

    @property
    def max_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.k

    @property
    def min_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.k

    @property
    def traits(self) -> Traits:
        return Traits(
            causal=True, batch_invariant=True, may_leave_token_empty=False, budget="exact"
        )

    def init(self, key: Array, d_model: int) -> Params:
        classes = self.num_experts + self.num_shared
        params = self.gate.init(key, d_model=d_model, num_experts=classes)
        return params | {"global_scale": jnp.ones((1,), jnp.float32)}

    def init_state(self) -> BiasState:
        return BiasState(expert_bias=jnp.zeros((self.num_experts,), jnp.float32))

    def __call__(
        self,
        params: Params,
        state: BiasState,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing:
        logits = self.gate(params, x, key=key, token_mask=token_mask)
        scores = jax.nn.sigmoid(logits[:, : self.num_experts])
        indices, _ = top_slots(scores + state.expert_bias[None, :], self.k)
        return build_routing(
            logits=logits[:, : self.num_experts],
            probs=Scoring(score="sigmoid").probs(logits[:, : self.num_experts], scores),
            indices=indices,
            weights=self._joint(params, logits, indices)[:, : self.k],
            keep=jnp.ones(indices.shape, bool),
            token_mask=token_mask,
        )

    def shared_weights(self, params: Params, x: Array, routing: Routing) -> Array:
        """f32[T, S]: what the shared experts weigh for x [T, D], given its routing; 0 for padding."""
        logits = self.gate(params, x, token_mask=routing.token_mask)
        indices = jnp.minimum(routing.expert_indices, self.num_experts - 1)
        weights = self._joint(params, logits, indices)[:, self.k :]
        return jnp.where(routing.token_mask[:, None], weights, 0.0)

    def _joint(self, params: Params, logits: Array, indices: Array) -> Array:
        """f32[T, k + S]."""
        chosen = jnp.take_along_axis(logits, indices, axis=-1)
        together = jnp.concatenate([chosen, logits[:, self.num_experts :]], axis=-1)
        weights = jax.nn.softmax(jax.nn.log_sigmoid(together), axis=-1)
        return weights * self.scale * params["global_scale"].astype(jnp.float32)[None, :]
