"""The frame of rules in which the tokens of a batch compete for experts."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import jax.numpy as jnp

from moe_jax.routers.base import Traits
from moe_jax.routers.token_choice import TokenChoice
from moe_jax.routing.difficulty import Context
from moe_jax.types import Array, Params, Routing

MASK = "batch_mask"  # how the mask reaches `select` and `selection_scores`


class WholeBatch(TokenChoice, abc.ABC):
    """Token choice in which a token's experts depend on the other real tokens of the batch.

    ``context[MASK]`` bool[T] says to ``selection_scores`` and ``select`` which tokens are real. The
    service refuses such rules: it pads, cuts and caches requests, which would change their answers.
    """

    context_keys: ClassVar[frozenset[str] | None] = frozenset({MASK})

    @property
    def traits(self) -> Traits:
        return Traits(
            causal=False, batch_invariant=False, may_leave_token_empty=False, budget="none"
        )

    def __call__(
        self,
        params: Params,
        state: Any,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing:
        mask = jnp.ones((x.shape[0],), bool) if token_mask is None else token_mask
        return super().__call__(
            params,
            state,
            x,
            key=key,
            token_mask=token_mask,
            context={**(context or {}), MASK: mask},
        )
