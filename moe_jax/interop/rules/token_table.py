"""Experts by token id: DeepSeek-V4."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.checks import check_array
from moe_jax.interop.rules.common import PublishedRule
from moe_jax.routers.arguments import check_classes
from moe_jax.routers.token_choice import Slots, gather_slots
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, pytree


@pytree
class TableState:
    """Which experts each token id uses."""

    table: Array  # i32[V, K]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTable(PublishedRule):
    """A token's experts are looked up by its id; only their weights depend on x (DeepSeek-V4).

    ``context["token_ids"]`` int[T] is required. The table is in the state. A disabled expert leaves
    its slot empty, for the table names no other.

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

    @property
    def min_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return max(0, self.k - len(set(self.gate.disabled_experts)))

    def init_state(self) -> TableState:
        """Round robin: id v uses experts v, v + 1, ... modulo E."""
        ids = jnp.arange(self.vocab_size, dtype=jnp.int32)[:, None]
        slots = jnp.arange(self.k, dtype=jnp.int32)[None, :]
        return TableState(table=(ids + slots) % self.num_experts)

    def score(self, params, state, x, *, key=None, token_mask=None, context=None) -> Slots:
        """The experts of the table, by descending score."""
        if context is None or "token_ids" not in context:
            raise ValueError(
                "context: expected 'token_ids' int[T], since this layer's experts are looked up by "
                'token id, got none. Pass context={"token_ids": ids}.'
            )
        ids = context["token_ids"].reshape(-1)
        check_array(
            "token_ids", ids, "T", kind="int", sizes={"T": x.shape[0]}, fix="Pass one id a token."
        )
        check_array(
            "table",
            state.table,
            "V K",
            kind="int",
            sizes={"V": self.vocab_size, "K": self.k},
            fix="Use a state of this rule, with its vocab_size and k.",
        )
        logits = self.logits(params, x, key=key, token_mask=token_mask, context=context)
        check_classes(logits, self.num_experts)
        scores = self.scoring.scores(logits)
        probs = self.probs(logits, scores)
        indices = jnp.asarray(state.table)[ids].astype(jnp.int32)
        selection = jnp.take_along_axis(self.gate.exclude(scores), indices, axis=-1)
        best = jnp.argsort(-jax.lax.stop_gradient(selection), axis=-1, stable=True)
        indices = jnp.take_along_axis(indices, best, axis=-1)
        selection = jnp.take_along_axis(selection, best, axis=-1)
        return gather_slots(
            indices, selection, logits=logits, probs=probs, scores=scores, token_mask=token_mask
        )
