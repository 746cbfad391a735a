"""Routed and shared experts that share one budget of weight: Inkling."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax.checks import check_count
from moe_jax.interop.rules.common import PublishedRule
from moe_jax.routers.arguments import check_params
from moe_jax.routers.base import BiasState
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, Params, Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointShared(PublishedRule):
    """Top-k of sigmoid scores, weighed together with shared experts that every token uses (Inkling).

    The router has E + S logits. The k best of the E by ``sigmoid(z) + bias`` are chosen, all S shared
    experts join them, and the k + S sigmoids are divided by their sum (in log space), then scaled. So
    a shared expert takes weight away from the routed ones: it is a sink.

    The routing is over the E experts; ``shared_weights`` returns the weights of the S.

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
    scoring: ClassVar[Scoring] = Scoring(score="sigmoid")  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        without = "Without shared experts use TopK with sigmoid scores."
        check_count("num_shared", self.num_shared, fix=without)

    @property
    def num_classes(self) -> int:
        return self.num_experts + self.num_shared

    def init(self, key: Array, d_model: int) -> Params:
        params = self.gate.init(key, d_model=d_model, num_experts=self.num_classes)
        return params | {"global_scale": jnp.ones((1,), jnp.float32)}

    def init_state(self) -> BiasState:
        return BiasState(expert_bias=jnp.zeros((self.num_experts,), jnp.float32))

    # Logits, scores and selection have E + S columns until ``build``: the shared experts' logits are
    # needed for the weights, and at -inf none of them is selected.

    def selection_scores(self, params, state: BiasState, logits, scores, context, **_) -> Array:
        routed = scores[:, : self.num_experts] + state.expert_bias[None, :]
        return jnp.pad(routed, ((0, 0), (0, self.num_shared)), constant_values=-jnp.inf)

    def probs(self, logits: Array, scores: Array) -> Array:
        return self.scoring.probs(logits[:, : self.num_experts], scores[:, : self.num_experts])

    def select(self, params, state, slots, x, context):
        return slots.available, self._joint(params, slots.logits, slots.indices)[:, : self.k]

    def build(self, slots, keep, weights) -> Routing:
        slots = dataclasses.replace(slots, logits=slots.logits[:, : self.num_experts])
        return super().build(slots, keep, weights)

    def shared_weights(self, params: Params, x: Array, routing: Routing) -> Array:
        """f32[T, S]: weights of the shared experts for x [T, D], given its routing; 0 for padding."""
        logits = self.gate(params, x, token_mask=routing.token_mask)
        indices = jnp.minimum(routing.expert_indices, self.num_experts - 1)
        weights = self._joint(params, logits, indices)[:, self.k :]
        return jnp.where(routing.token_mask[:, None], weights, 0.0)

    def _joint(self, params: Params, logits: Array, indices: Array) -> Array:
        """f32[T, k + S]: one softmax of log-sigmoids, which is sigmoids over their sum."""
        check_params(params, kernel=(None, self.num_classes), global_scale=(1,))
        chosen = jnp.take_along_axis(logits, indices, axis=-1)
        together = jnp.concatenate([chosen, logits[:, self.num_experts :]], axis=-1)
        weights = jax.nn.softmax(jax.nn.log_sigmoid(together), axis=-1)
        return weights * self.scale * params["global_scale"].astype(jnp.float32)[None, :]
