"""Similarity re-routing: a lower-ranked expert gives way to the most similar one that is loaded."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from moe_jax.checks import check_array, check_count, check_instance, check_number, check_range
from moe_jax.routers.batch_aware import BatchAware, first_ranks, loaded_by
from moe_jax.routers.token_choice import Slots
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.similarity import substitutes
from moe_jax.types import Array, pytree


@pytree
class RerouteState:
    """The selection bias, and the similarity that ``with_similarity`` stores."""

    expert_bias: Array  # f32[E], added for selection only
    similarity: Array  # f32[E, E]; the identity re-routes nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reroute(BatchAware):
    """SERE (arXiv:2602.07616): secondary experts are replaced by similar primary ones.

    The primary experts of a batch are the ``keep_k`` best of each token. Another of a token's k best
    experts that is not primary is replaced by the most similar primary one, which takes over its
    weight, unless their similarity is below ``min_similarity``: then the expert is loaded after all.

    The similarity is calibrated with ``with_similarity`` and saved with the state.

    Args:
        num_experts: E.
        k: experts of a token, the trained k.
        keep_k: best experts of each token that are primary, at least 1.
        min_similarity: in [-1, 1]; experts without so similar a primary one stay.
        max_tokens: larger batches are routed by plain top-k.
        gate: the map to logits.
        scoring: logits to scores and weights.

    Example:
        >>> import jax
        >>> from moe_jax.routers import expert_similarity
        >>> router = Reroute(num_experts=4, k=2)
        >>> outputs = jax.random.normal(jax.random.key(0), (4, 100, 8))
        >>> state = with_similarity(router.init_state(), expert_similarity(outputs))
        >>> state.similarity.shape
        (4, 4)
    """

    num_experts: int
    k: int
    keep_k: int = 1
    min_similarity: float = 0.1
    max_tokens: int = 64
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("keep_k", self.keep_k, fix="A token always keeps its best expert.")
        check_range("keep_k", self.keep_k, most=self.k, fix="Primary experts are among the k best.")
        check_number("min_similarity", self.min_similarity)

    def init_state(self) -> RerouteState:
        return RerouteState(
            expert_bias=jnp.zeros((self.num_experts,), jnp.float32),
            similarity=jnp.eye(self.num_experts, dtype=jnp.float32),
        )

    def choose(self, slots, real):
        return first_ranks(real.shape, self.k) & real

    def select(self, params, state: RerouteState, slots, x, context):
        plain = super().select(params, state, slots, x, context)
        return self.in_a_small_batch(lambda: self._rerouted(state, slots, *plain), plain)

    def _rerouted(
        self, state: RerouteState, slots: Slots, keep: Array, weights: Array
    ) -> tuple[Array, Array]:
        """bool[T, E] and f32[T, E]: the slots in use after re-routing, and their weights."""
        primary = loaded_by(slots, keep & first_ranks(keep.shape, self.keep_k))
        target = substitutes(state.similarity, primary, least=self.min_similarity)
        # By rank: the slot that a token's expert moves to, found through its place in the ranking.
        place = jnp.argsort(slots.indices, axis=-1)
        moved = jnp.take_along_axis(place, target[slots.indices], axis=-1)
        rows = jnp.arange(keep.shape[0], dtype=jnp.int32)[:, None]
        nothing = jnp.zeros_like(weights)
        merged = nothing.at[rows, moved].add(jnp.where(keep, weights, 0.0))
        used = jnp.zeros_like(keep).at[rows, moved].max(keep)
        return used, merged


def with_similarity(state: RerouteState, similarity: Array) -> RerouteState:
    """Returns the state with a calibrated similarity f32[E, E] of its experts.

    Raises:
        TypeError: the state of another rule, or no array of floats.
        ValueError: a similarity of another number of experts.
    """
    check_instance("state", state, RerouteState, fix="Pass Reroute(...).init_state().")
    experts = state.expert_bias.shape[0]
    check_array(
        "similarity",
        similarity,
        "E E",
        sizes={"E": experts},
        fix="Pass expert_similarity(outputs).",
    )
    return dataclasses.replace(state, similarity=jnp.asarray(similarity, jnp.float32))
