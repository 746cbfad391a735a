"""Experts by token id: DeepSeek-V4."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.checks import check_array, check_k
from moe_jax.routers.base import Router, Traits
from moe_jax.routing.difficulty import Context
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import build_routing
from moe_jax.types import Array, Params, Routing, pytree


@pytree
class TableState:
    table: Array  # i32[V, K]: the experts of each token id


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTable(Router):
    """A token's experts are looked up by its id; only their weights depend on x (DeepSeek-V4).

    ``context["token_ids"]`` int[T] is required. The table is in the state.

    Args:
        num_experts: E.
        k: experts per token.
        vocab_size: V.
        gate: the map to logits.
        scoring: logits to scores and weights.

    Example:
        >>> router = TokenTable(num_experts=4, k=1, vocab_size=3)
        >>> state = TableState(table=jnp.array([[2], [0], [3]]))
        >>> params = router.init(jax.random.key(0), 8)
        >>> ids = {"token_ids": jnp.array([1, 2])}
        >>> router(params, state, jnp.ones((2, 8)), context=ids).expert_indices.tolist()
        [[0], [3]]
    """

    num_experts: int
    k: int
    vocab_size: int
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        check_k(num_experts=self.num_experts, min_k=self.k, max_k=self.k)

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

    def init_state(self) -> TableState:
        """Round robin: id v uses experts v, v + 1, ... modulo E."""
        ids = jnp.arange(self.vocab_size, dtype=jnp.int32)[:, None]
        slots = jnp.arange(self.k, dtype=jnp.int32)[None, :]
        return TableState(table=(ids + slots) % self.num_experts)

    def __call__(
        self,
        params: Params,
        state: TableState,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing:
        if context is None or "token_ids" not in context:
            raise ValueError(
                "context: expected 'token_ids' int[T], since this layer's experts are looked up by "
                'token id, got none. Pass context={"token_ids": ids}.'
            )
        ids = context["token_ids"].reshape(-1)
        check_array(
            "token_ids", ids, "T", kind="int", sizes={"T": x.shape[0]}, fix="Pass one id a token."
        )
        logits = self.gate(params, x, key=key, token_mask=token_mask)
        scores = self.scoring.scores(logits)
        indices = state.table[ids].astype(jnp.int32)
        slot_scores = jnp.take_along_axis(scores, indices, axis=-1)
        best = jnp.argsort(-jax.lax.stop_gradient(slot_scores), axis=-1, stable=True)
        indices = jnp.take_along_axis(indices, best, axis=-1)
        slot_scores = jnp.take_along_axis(slot_scores, best, axis=-1)
        keep = jnp.ones(indices.shape, bool)
        return build_routing(
            logits=logits, probs=self.scoring.probs(logits, scores), indices=indices,
            weights=self.scoring.weights(slot_scores, keep, min_k=self.k),
            keep=keep, token_mask=token_mask,
        )  # fmt: skip
