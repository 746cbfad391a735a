"""From scores to a ``Routing``: which slots a token fills, and what they weigh.

Every token-choice rule is the same three steps, and a rule file reads as these three calls:

1. ``top_slots(selection_scores, K)``: the K best experts of each token, best first;
2. a count rule (``first_k``, ``top_p_keep`` ...): which of these slots are really used;
3. ``build_routing``: sentinel, weights, padding.

What a score or a weight is, is said by ``scoring.Scoring``.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from moe_jax.types import Array, ExpertChoice, Routing

# On a CPU the search for the K best of E experts is written out up to this E x K. It takes about half
# of the time of ``lax.top_k`` at E x K = 128, too, but adds a second to the compile time there.
_MOST_COMPARISONS = 32


def top_slots(selection_scores: Array, max_k: int) -> tuple[Array, Array]:
    """The ``max_k`` best experts of each token: (indices i32[T, K], their scores f32[T, K]).

    Best first; ties go to the lowest expert index. NaN scores sort first in ``lax.top_k``, so they
    are treated as the lowest finite score instead: a poisoned logit must not win, except against
    -inf, which marks experts that may not be chosen at all.
    """
    lowest = jnp.finfo(selection_scores.dtype).min
    clean = jnp.where(jnp.isnan(selection_scores), lowest, selection_scores)
    # Choosing is discrete. The gradient reaches the router through the weights, which are gathered
    # from scores.
    clean = jax.lax.stop_gradient(clean)

    def library(scores: Array) -> tuple[Array, Array]:
        values, indices = jax.lax.top_k(scores, max_k)
        return indices.astype(jnp.int32), values

    experts = clean.shape[1]
    few = experts > 1 and 1 <= max_k <= experts and experts * max_k <= _MOST_COMPARISONS
    if not few or clean.dtype != jnp.float32:
        return library(clean)
    written_out = functools.partial(_top_slots_written_out, max_k=max_k)
    return jax.lax.platform_dependent(clean, cpu=written_out, default=library)


def _top_slots_written_out(scores: Array, *, max_k: int) -> tuple[Array, Array]:
    """Returns what ``lax.top_k`` returns, bit for bit, for scores f32[T, E] of few experts; for CPUs.

    XLA for CPU sorts the tokens' scores one token at a time, on one core. Here each expert in turn is
    inserted among the best ones before it, by vector instructions that serve many tokens at once.
    """

    # Integers in the order of ``lax.top_k``, which puts -0.0 below 0.0. The map is its own inverse.
    def reorder(bits: Array) -> Array:
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    keys = reorder(jax.lax.bitcast_convert_type(scores, jnp.int32))
    best: list[tuple[Array, Array]] = []  # (key, expert) of each slot so far, i32[T] each
    for expert in range(scores.shape[1]):
        new = keys[:, expert]
        moving = new, jnp.full_like(new, expert)
        for slot, kept in enumerate(best):
            # True from the first slot that the new expert takes: those that follow move back by one.
            # A tie leaves the earlier expert in its slot.
            above = new > kept[0]
            best[slot] = _choose(above, moving, kept)
            moving = _choose(above, kept, moving)
        if len(best) < max_k:
            best.append(moving)
    values = reorder(jnp.stack([key for key, _ in best], axis=1))
    indices = jnp.stack([expert for _, expert in best], axis=1)
    return indices, jax.lax.bitcast_convert_type(values, jnp.float32)


def _choose(
    condition: Array, yes: tuple[Array, Array], no: tuple[Array, Array]
) -> tuple[Array, Array]:
    return jnp.where(condition, yes[0], no[0]), jnp.where(condition, yes[1], no[1])


def first_k(counts: Array, max_k: int) -> Array:
    """bool[T, K]: the first ``counts`` i32[T] slots of each token."""
    return jnp.arange(max_k, dtype=jnp.int32)[None, :] < counts[:, None]


def top_p_keep(sorted_probs: Array, p: Array) -> Array:
    """bool[T, K]: the shortest prefix whose sum *exceeds* p (strict, as in arXiv:2403.07652).

    ``sorted_probs`` f32[T, K] descending. A slot is kept while what came before it is <= p.
    """
    # The sum of what came before, so that the first slot is kept at any p.
    before = jnp.cumsum(sorted_probs, axis=-1) - sorted_probs
    return before <= p


def min_p_keep(sorted_probs: Array, ratio: Array) -> Array:
    """bool[T, K]: the prefix of slots with at least ``ratio`` times the first slot's probability.

    A prefix even where a selection bias has put a smaller probability before a larger one.
    """
    enough = (sorted_probs >= ratio * sorted_probs[:, :1]).astype(jnp.int32)
    # One slot that fails ends the prefix. `cummin` takes no booleans.
    return jax.lax.cummin(enough, axis=1).astype(bool)


def clip_counts(keep: Array, *, min_k: int) -> Array:
    """``keep`` bool[T, K] with at least the first ``min_k`` slots set."""
    if not min_k:
        return keep
    return keep | first_k(jnp.full((keep.shape[0],), min_k, jnp.int32), keep.shape[1])


def group_limit(
    selection_scores: Array, *, groups: int, top_groups: int, reduce: str, fill: float
) -> Array:
    """f32[T, E] with the scores outside each token's best groups replaced by ``fill``.

    Groups are ``groups`` equal blocks of neighbouring experts. A group is worth the sum of its two
    best scores (DeepSeek-V3, arXiv:2412.19437 section 2.1.2) or its best one (DeepSeek-V2). Experts
    at -inf (disabled ones) are worth nothing to their group; a group of such experts alone is chosen
    last.
    """
    tokens, experts = selection_scores.shape
    blocks = selection_scores.reshape(tokens, groups, experts // groups)
    if reduce == "max":
        worth = blocks.max(axis=-1)
    else:
        two = jax.lax.top_k(blocks, min(2, experts // groups))[0]
        # -inf in the sum would make a group with one enabled expert as bad as one without any.
        worth = two[..., 0] + jnp.where(two[..., 1:] == -jnp.inf, 0.0, two[..., 1:]).sum(axis=-1)
    _, best = jax.lax.top_k(worth, top_groups)
    inside = (best[:, :, None] == jnp.arange(groups)[None, None, :]).any(axis=1)
    return jnp.where(inside[:, :, None], blocks, fill).reshape(tokens, experts)


def compact(keep: Array, *slots: Array) -> tuple[Array, ...]:
    """Moves kept slots to the front, in their order: (keep, slots...), each [T, K]."""
    # False sorts before True, and a stable sort leaves kept slots in order of preference.
    place = jnp.argsort(~keep, axis=-1, stable=True)
    return tuple(jnp.take_along_axis(a, place, axis=-1) for a in (keep, *slots))


def build_routing(
    *,
    logits: Array,
    probs: Array,
    indices: Array,
    weights: Array,
    keep: Array,
    token_mask: Array | None,
) -> Routing:
    """Puts the sentinel into unused slots and zeroes their weight; padding tokens use nothing.

    Args:
        logits: f32[T, E].
        probs: f32[T, E], rows summing to 1.
        indices: i32[T, K], best first.
        weights: f32[T, K].
        keep: bool[T, K], a prefix of the slots, so that slot 0 is a token's first expert.
        token_mask: bool[T] or None for all real.
    """
    tokens, experts = logits.shape
    if token_mask is None:
        token_mask = jnp.ones((tokens,), bool)
    # Values of unused slots are replaced, not multiplied by 0: padding may hold NaN.
    used = keep & token_mask[:, None]
    return Routing(
        expert_indices=jnp.where(used, indices, experts),
        combine_weights=jnp.where(used, weights, 0.0),
        router_logits=logits,
        router_probs=probs,
        token_mask=token_mask,
        num_experts=experts,
    )


def choose_tokens(
    *, logits: Array, probs: Array, scores: Array, capacity: int, token_mask: Array | None
) -> ExpertChoice:
    """Every expert takes its ``capacity`` best tokens by score f32[T, E]; padding is never taken.

    Zhou et al. 2022, arXiv:2202.09368. The whole batch decides, so the rule is neither causal nor
    batch-invariant.
    """
    tokens, _ = logits.shape
    if token_mask is None:
        token_mask = jnp.ones((tokens,), bool)
    masked = jnp.where(token_mask[:, None] & ~jnp.isnan(scores), scores, -jnp.inf)
    # An expert with fewer real tokens than rows takes padding at -inf, which is emptied below.
    value, taken = jax.lax.top_k(jax.lax.stop_gradient(masked).T, capacity)
    real = value > -jnp.inf
    # Gathered from the scores with their gradient; `value` has none.
    weights = jnp.take_along_axis(scores.T, taken, axis=-1)
    return ExpertChoice(
        token_indices=jnp.where(real, taken, tokens).astype(jnp.int32),
        combine_weights=jnp.where(real, weights, 0.0),
        router_logits=logits,
        router_probs=probs,
        token_mask=token_mask,
        num_tokens=tokens,
    )


def sequence_ranks(scores: Array) -> Array:
    """i32[S, L, K]: place of each score among its sequence's, best first; ties by position."""
    flat = scores.reshape(scores.shape[0], -1)
    order = jnp.argsort(-flat, axis=1, stable=True)
    # Sorting a permutation inverts it: from the score at each rank to the rank of each score.
    return jnp.argsort(order, axis=1).astype(jnp.int32).reshape(scores.shape)


def ranks_so_far(scores: Array) -> Array:
    """i32[S, L, K]: place of each score among those of its token and the tokens before it."""
    length, slots = scores.shape[1:]
    position = jnp.arange(length, dtype=jnp.int32)

    def of_token(t: Array) -> Array:
        own = scores[:, t]  # f32[S, K], best first
        earlier = (position < t)[None, :, None, None]
        # At a tie the earlier token keeps its place.
        ahead = (scores[:, :, :, None] >= own[:, None, None, :]) & earlier
        return ahead.sum(axis=(1, 2), dtype=jnp.int32) + jnp.arange(slots, dtype=jnp.int32)[None, :]

    # One token at a time: all pairs of slots at once would take [S, L, L, K, K] numbers.
    return jnp.moveaxis(jax.lax.map(of_token, position), 0, 1)


def served_before(
    indices: Array, asked: Array, *, num_experts: int, length: int, order_by: Array | None = None
) -> Array:
    """i32[T, K]: how many choices an expert serves before this one, within one sequence.

    First choices are served before second ones, and tokens in their order.

    Args:
        indices: i32[T, K], the experts that each token chooses, best first.
        asked: bool[T, K]: False for choices that take no place.
        num_experts: E.
        length: tokens of a sequence, a divisor of T; each sequence is counted by itself.
        order_by: f32[T], smallest first: the order of tokens instead of their position.

    Example:
        >>> both = jnp.array([[0, 1], [1, 0]])
        >>> served_before(both, both >= 0, num_experts=2, length=2).tolist()
        [[0, 1], [0, 1]]
    """
    tokens, k = indices.shape
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    hits = (indices[:, :, None] == experts[None, None, :]) & asked[:, :, None]
    hits = hits.astype(jnp.int32)
    order = None if order_by is None else jnp.argsort(order_by, stable=True)
    if order is not None:
        hits = hits[order]
    hits = hits.reshape(tokens // length, length, k, num_experts)
    before = jnp.cumsum(hits, axis=1) - hits
    # Every first choice of the sequence, later tokens' too, comes before any second choice.
    earlier_slots = jnp.cumsum(hits.sum(axis=1), axis=1) - hits.sum(axis=1)
    before = (before + earlier_slots[:, None]).reshape(tokens, k, num_experts)
    if order is not None:
        before = before[jnp.argsort(order)]
    return jnp.take_along_axis(before, indices[:, :, None], axis=-1)[:, :, 0]
