"""SeqTopK: the budget is that of a sequence, so hard tokens take experts from easy ones."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from moe_jax.checks import check_count, check_flag
from moe_jax.routers.base import Traits
from moe_jax.routers.contracts import WholeBatch
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import clip_counts, ranks_so_far, sequence_ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeqTopK(WholeBatch):
    """The ``T * k`` best of a sequence's T x E scores (Wen et al. 2025, arXiv:2511.06494).

    ``online=False`` is the rule of the paper's training: exactly k experts a token on average, and not
    causal. ``online=True`` is the form for decoding: token t uses those of its experts that are among
    the ``t * k`` best scores of tokens 1 to t. It is causal. Tokens come in any order with the same
    chance, as far as it knows, so its mean is k in expectation; scores that rise along a sequence give
    more. The paper's cache of earlier scores is the rest of the call here: pass the whole sequence, as
    in training and prefill. A call with one token at a time knows no budget to share and is plain
    top-k.

    Args:
        num_experts: E.
        k: experts per token on average.
        max_k: most experts of one token; None is E.
        min_k: fewest; 0, as in the paper, may leave a token without. Above 0 the mean is above k.
        sequence_length: number of consecutive tokens of a sequence. Must divide T. None takes the call
            as one sequence.
        online: causal.
        gate: the map to logits.
        scoring: logits to scores and weights; selection by score.

    Example:
        >>> router = SeqTopK(num_experts=8, k=2, online=False)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> x = jax.random.normal(jax.random.key(1), (100, 16))
        >>> counts = router(params, state, x).num_experts_per_token
        >>> int(counts.sum()), bool(counts.min() < 2), bool(counts.max() > 2)
        (200, True, True)
    """

    num_experts: int
    k: int
    max_k: int = None  # pyright: ignore[reportAssignmentType]  # None becomes E
    min_k: int = 0
    sequence_length: int | None = None
    online: bool = True
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("k", self.k, fix="It is the mean number of experts per token.")
        check_flag("online", self.online)
        if not self.min_k <= self.k <= self.max_k:
            raise ValueError(
                f"k: expected min_k={self.min_k} <= k <= max_k={self.max_k}, got {self.k}. It is the "
                "mean number of experts per token."
            )
        if self.sequence_length is not None:
            check_count("sequence_length", self.sequence_length, fix="None is the whole call.")

    @property
    def traits(self) -> Traits:
        exact = not self.online and self.min_k == 0
        return Traits(
            causal=self.online,
            batch_invariant=False,
            may_leave_token_empty=self.min_k == 0,
            budget="exact" if exact else "none",
        )

    def select(self, params, state, slots, x, context):
        tokens = x.shape[0]
        length = tokens if self.sequence_length is None else self.sequence_length
        if tokens % length:
            raise ValueError(
                f"sequence_length: expected a divisor of T={tokens}, got {length}. Pass the padded "
                "length of one sequence."
            )
        usable = slots.available & slots.token_mask[:, None]
        scores = jnp.where(usable, slots.selection, -jnp.inf).reshape(-1, length, self.max_k)
        real = slots.token_mask.reshape(-1, length)
        budget = real.cumsum(axis=1)  # i32[S, L]: tokens so far, each of which brings k experts
        if self.online:
            rank = ranks_so_far(scores)
        else:
            rank = sequence_ranks(scores)
            budget = jnp.broadcast_to(budget[:, -1:], budget.shape)
        # A score is kept if fewer scores than the budget allows come before it.
        keep = (rank < self.k * budget[:, :, None]).reshape(tokens, self.max_k) & usable
        keep = clip_counts(keep, min_k=self.min_k)
        return keep, self.weights(slots, keep)
