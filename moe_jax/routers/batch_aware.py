"""The frame of rules that look at the whole batch of a decoding step, to load fewer experts."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar, TypeVar

import jax
import jax.numpy as jnp

from moe_jax.checks import check_count, holds
from moe_jax.routers.contracts import FixedK, WholeBatch
from moe_jax.routers.token_choice import Slots
from moe_jax.routing.selection import build_routing, compact
from moe_jax.types import Array, Routing

Tree = TypeVar("Tree")


class BatchAware(FixedK, WholeBatch, abc.ABC):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Fixed k, but a decoding step's tokens agree on which experts to load.

    A decoding step costs the weights of the distinct experts of its batch. So a token may give up a
    lower-ranked expert that no other token needs. Its best expert always stays. Batches of more than
    ``max_tokens`` tokens, such as prefill, are routed by plain top-k.

    A rule gives ``choose``. All E experts of a token are ranked, and the ``k`` best of those that it
    chooses are used.
    """

    max_tokens: int

    keeps_prefix: ClassVar[bool] = False
    # The best expert of a token always stays.
    min_k: ClassVar[int] = 1  # pyright: ignore

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = "It is the largest batch of a decoding step."
        check_count("max_tokens", self.max_tokens, fix=largest)

    @property
    def num_choices(self) -> int:
        return self.num_experts

    @abc.abstractmethod
    def choose(self, slots: Slots, real: Array) -> Array:
        """bool[T, E]: the slots that a token may use, best first; the ``k`` first of them are used.

        Args:
            slots: all experts of each token, best first.
            real: bool[T, E], False for padding and for experts that are disabled.
        """

    def select(self, params, state, slots, x, context):
        real = slots.available & slots.token_mask[:, None]
        keep = self.in_a_small_batch(lambda: self.choose(slots, real), real)
        # A prefix of length k in each token's own order.
        keep = keep & (jnp.cumsum(keep, axis=-1) <= self.k)
        return keep, self.weights(slots, keep)

    def in_a_small_batch(self, small: Callable[[], Tree], large: Tree) -> Tree:
        """Returns ``small()`` for a batch of at most ``max_tokens`` tokens, and ``large`` for others.

        Args:
            small: returns arrays [T, ...] like those of ``large``.
            large: arrays [T, ...].
        """
        tokens = jax.tree.leaves(large)[0].shape[0]
        fits = holds(lambda: tokens <= self.max_tokens)
        if fits is False:
            return large
        chosen = small()
        if fits is None:  # a symbolic batch (``jax.export``): its size is known at run time only
            few = jnp.asarray(tokens) <= self.max_tokens
            chosen = jax.tree.map(lambda a, b: jnp.where(few, a, b), chosen, large)
        return chosen

    def build(self, slots: Slots, keep: Array, weights: Array) -> Routing:
        keep, indices, weights = compact(keep, slots.indices, weights)
        return build_routing(
            logits=slots.logits,
            probs=slots.probs,
            indices=indices[:, : self.k],
            weights=weights[:, : self.k],
            keep=keep[:, : self.k],
            token_mask=slots.token_mask,
        )


def loaded_by(slots: Slots, keep: Array) -> Array:
    """bool[E]: the experts that some token keeps, from bool[T, E] in slot order."""
    experts = slots.indices.shape[1]
    return jnp.zeros((experts,), bool).at[slots.indices].max(keep)


def first_ranks(shape: tuple[int, ...], count: int) -> Array:
    """bool[T, E]: the first ``count`` slots of each token."""
    return jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None, :] < count, shape)
