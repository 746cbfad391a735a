"""Controllers: what is learned without gradients. Pure functions from a value to its next value.

Each needs one [E] vector of counts (or one number) from the batch, so under data parallelism one
``psum`` of the statistics gives every device the same update. No controller runs by itself: a
router's ``update`` calls them, and only training or a calibration loop calls ``update``. So the
answer to one input never depends on earlier inputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.types import Array


def loss_free_bias(
    expert_bias: Array, tokens_per_expert: Array, *, rate: float, disabled: tuple[int, ...] = ()
) -> Array:
    """f32[E]: ``b += rate * sign(mean(load) - load)``; overloaded experts become less attractive.

    Auxiliary-loss-free balancing, arXiv:2408.15664; DeepSeek-V3 uses rate 1e-3. Experts in
    ``disabled`` count for nothing in the mean and keep their bias.

    Example:
        >>> loss_free_bias(jnp.zeros(2), jnp.array([3.0, 1.0]), rate=0.001).tolist()
        [-0.0010000000474974513, 0.0010000000474974513]
    """
    on = jnp.ones(expert_bias.shape, jnp.float32)
    if disabled:
        on = on.at[jnp.array(disabled)].set(0.0)
    # Disabled experts have no load. In the mean they would make every other expert look overloaded.
    mean = (tokens_per_expert * on).sum() / on.sum()
    return expert_bias + rate * on * jnp.sign(mean - tokens_per_expert)


def pi_controller(
    *,
    anchor: Array,
    integral: Array,
    measured: Array,
    target: float,
    kp: float,
    ki: float,
    low: float,
    high: float,
) -> tuple[Array, Array]:
    """One step of a proportional-integral controller: (value, next integral), both f32[].

    ``e = target - measured``; ``value = clip(anchor + kp * e + ki * sum(e), low, high)``, as DTop-p
    does on p (arXiv:2512.13996). The integral stands still while the value is at a bound and the
    error pushes further out, so it does not wind up.
    """
    error = target - measured
    grown = integral + error
    value = anchor + kp * error + ki * grown
    # Without this, errors that no value could correct would add up, and have to be undone first.
    held = ((value >= high) & (error > 0)) | ((value <= low) & (error < 0))
    integral = jnp.where(held, integral, grown)
    return jnp.clip(anchor + kp * error + ki * integral, low, high), integral


def balancing_bias(scores: Array, expert_bias: Array, token_mask: Array, *, k: int) -> Array:
    """f32[E]: the selection bias that would even out the load of this batch, up to a constant.

    One round of quantile balancing (Su, kexue.fm 11626; Megatron-LM's form for a fixed k). Token t
    would take expert e from a score of ``alpha_t`` on, the (k + 1)-th largest of its biased scores; so
    the bias that leaves expert e with ``T k / E`` tokens is minus the ``T k / E + 1``-th largest of
    ``scores[:, e] - alpha``. Rounds settle within a few on one batch.

    Args:
        scores: f32[T, E], before the bias.
        expert_bias: f32[E], the one in use.
        token_mask: bool[T], False for padding, which counts in nothing.
        k: below E.

    Example:
        >>> scores = jnp.array([[3.0, 1.0], [2.0, 1.0], [9.0, 0.0], [4.0, 3.0]])
        >>> balancing_bias(scores, jnp.zeros(2), jnp.ones(4, bool), k=1).tolist()
        [-1.0, -0.0]
    """
    # What an expert has to beat: the best score that this token does not use.
    alpha = jax.lax.top_k(scores + expert_bias[None, :], k + 1)[0][:, k:]
    margins = jnp.where(token_mask[:, None], scores - alpha, -jnp.inf)
    # Padding has margin -inf, so it sorts behind every real token.
    ordered = -jnp.sort(-margins, axis=0)  # best first
    count = token_mask.sum(dtype=jnp.int32)
    place = jnp.clip(count * k // scores.shape[1], 0, jnp.maximum(count - 1, 0))
    return jnp.where(count > 0, -ordered[place], 0.0)


def quantile_bias(expert_bias: Array, batch_bias: Array, *, rate: float) -> Array:
    """f32[E]: the share ``rate`` of the way to the batch's ``balancing_bias``, with mean 0.

    At rate 1, Megatron-LM's default, earlier batches are forgotten.

    Example:
        >>> quantile_bias(jnp.zeros(2), jnp.array([3.0, 1.0]), rate=0.5).tolist()
        [0.5, -0.5]
    """
    moved = (1.0 - rate) * expert_bias + rate * batch_bias
    # Selection compares biases with each other only. A common offset would drift without limit.
    return moved - moved.mean()


# Edges of the histogram of margins, on both sides of 0: at balance the quantile is near 0, so bins are
# narrow there, and each is some 20 % wider than its inner neighbour.
_INNERMOST, _OUTERMOST = 1e-6, 1e3
HISTOGRAM_BINS = 256


def _histogram_edges() -> np.ndarray:
    side = np.geomspace(_INNERMOST, _OUTERMOST, HISTOGRAM_BINS // 2)
    return np.concatenate([-side[::-1], [0.0], side]).astype(np.float32)


def margin_histogram(scores: Array, expert_bias: Array, token_mask: Array, *, k: int) -> Array:
    """f32[E, B + 2]: for each expert the share of tokens by how far they are from using it.

    The margin of a token is its biased score less the (k + 1)-th best of its biased scores. Shares of
    parts of a batch, averaged with the parts' token counts as weights, are exactly those of the batch:
    unlike quantiles, which are no average of the parts' quantiles.

    Args:
        scores: f32[T, E], before the bias.
        expert_bias: f32[E], the one in use.
        token_mask: bool[T], False for padding, which counts in nothing.
        k: below E.
    """
    biased = scores + expert_bias[None, :]
    margins = biased - jax.lax.top_k(biased, k + 1)[0][:, k:]
    margins = jnp.where(jnp.isnan(margins), -jnp.inf, margins)
    edges = jnp.asarray(_histogram_edges())
    # Bin i holds margins in (edges[i - 1], edges[i]]. A token's first expert that is not used has
    # margin 0 and is below all those that are.
    place = jnp.searchsorted(edges, margins, side="left")
    experts = jnp.broadcast_to(jnp.arange(scores.shape[1], dtype=jnp.int32)[None, :], place.shape)
    real = jnp.broadcast_to(token_mask[:, None], place.shape).astype(jnp.float32)
    counts = jnp.zeros((scores.shape[1], edges.shape[0] + 1), jnp.float32)
    counts = counts.at[experts, place].add(real)
    return counts / jnp.maximum(token_mask.sum(dtype=jnp.float32), 1.0)


def histogram_bias(expert_bias: Array, shares: Array, *, k: int, rate: float) -> Array:
    """f32[E]: ``quantile_bias`` from the whole batch's ``margin_histogram``, with mean 0.

    The k / E quantile from above is interpolated within its bin. A bin is a fifth of its distance from
    0 wide, so a step misses the batch's bias by that share of the way at most, and the next step by
    that share of the rest.

    Args:
        expert_bias: f32[E].
        shares: f32[E, B + 2].
        k: experts per token.
        rate: share of the way, in (0, 1].
    """
    experts = expert_bias.shape[0]
    edges = jnp.asarray(_histogram_edges())
    # The outermost bins have no far edge; their quantile is taken at the near one.
    low = jnp.concatenate([edges[:1], edges])
    high = jnp.concatenate([edges, edges[-1:]])
    above = jnp.cumsum(shares[:, ::-1], axis=1)[:, ::-1]  # share in a bin or above it
    wanted = k / experts
    # A little less than wanted counts as reached, since sums of shares are rounded.
    place = (above >= wanted - 1e-6).sum(axis=1, dtype=jnp.int32) - 1
    place = jnp.clip(place, 0, shares.shape[1] - 1)[:, None]
    inside = jnp.take_along_axis(shares, place, axis=1)[:, 0]
    beyond = jnp.take_along_axis(above, place, axis=1)[:, 0] - inside
    part = jnp.clip((wanted - beyond) / jnp.maximum(inside, 1e-12), 0.0, 1.0)
    top, bottom = high[place[:, 0]], low[place[:, 0]]
    quantile = top - part * (top - bottom)
    moved = expert_bias - rate * quantile
    return moved - moved.mean()


def multiplicative_controller(
    value: Array, *, measured: Array, target: float, step: float, low: float, high: float
) -> Array:
    """f32[]: ``value * step`` where more was measured than wanted, else ``value / step``, in bounds.

    ReMoE's rule for the coefficient of its L1 loss (arXiv:2412.14711): sparsity below
    the target is a mean k above it. There is no dead zone, so a value that has arrived goes on
    swinging by one step.

    Example:
        >>> [float(multiplicative_controller(
        ...     jnp.float32(1.0), measured=jnp.float32(m), target=2.0, step=2.0, low=0.0, high=9.0))
        ...  for m in (3.0, 2.0)]
        [2.0, 0.5]
    """
    moved = jnp.where(measured > target, value * step, value / step)
    return jnp.clip(moved, low, high)


def ema_quantile(cutoffs: Array, batch_quantiles: Array, *, decay: float) -> Array:
    """f32[E]: ``c <- decay * c + (1 - decay) * quantile``, Expert Threshold (arXiv:2603.11535)."""
    return decay * cutoffs + (1.0 - decay) * batch_quantiles


def sinkhorn_offsets(
    logits: Array, token_mask: Array, *, tolerance: float, max_iterations: int
) -> Array:
    """f32[E]: what to add to each expert's logits so that all experts get the same mass of the batch.

    Sinkhorn's iteration in logarithms: with ``p = softmax(logits + offsets)`` over experts, the sums
    of p over tokens are equal. Experts at -inf (disabled ones) get 0 and no mass; padding and NaN
    tokens count in nothing.

    Args:
        logits: f32[T, E].
        token_mask: bool[T].
        tolerance: the iteration ends once no offset moves by more.
        max_iterations: and after so many rounds at the latest.

    Example:
        >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.6, 0.4]]))
        >>> offsets = sinkhorn_offsets(logits, jnp.ones(2, bool), tolerance=1e-6, max_iterations=99)
        >>> jax.nn.softmax(logits + offsets[None, :], axis=1).sum(axis=0).round(4).tolist()
        [1.0, 1.0]
    """
    real = token_mask & ~jnp.isnan(logits).any(axis=1)
    z = jnp.where(real[:, None], logits, -jnp.inf)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        offsets, _, i = carry
        rows = jax.nn.logsumexp(z + offsets[None, :], axis=1)
        rows = jnp.where(real, rows, 0.0)
        columns = jax.nn.logsumexp(z - rows[:, None], axis=0)
        some = columns > -jnp.inf
        new = jnp.where(some, -columns, 0.0)
        # Only differences between experts matter, so their mean is taken out.
        mean = new.sum() / jnp.maximum(some.sum(dtype=jnp.float32), 1.0)
        new = jnp.where(some, new - mean, 0.0)
        return new, jnp.abs(new - offsets).max(), i + 1

    def going(carry: tuple[Array, Array, Array]) -> Array:
        return (carry[1] > tolerance) & (carry[2] < max_iterations)

    # A loop inside `shard_map` must start with values that vary over the same axes as those that it
    # returns. `z > inf` is always False; it only ties the start to the axes of z.
    start = (z > jnp.inf).any(axis=0).astype(jnp.float32)
    first = (start, start.max() + jnp.inf, jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(going, step, first)[0]


def auction(values: Array, token_mask: Array, *, precision: float, max_rounds: int) -> Array:
    """i32[T]: the expert of each token in a balanced assignment of nearly the greatest total value.

    Bertsekas' auction, all tokens without a place bidding at once. An expert has ``ceil(T / E)``
    places and its price is the lowest bid that holds one; a token bids what makes its best expert as
    dear as its second best, plus the precision.

    Args:
        values: f32[T, E]; -inf where a token may not go.
        token_mask: bool[T]; padding and NaN tokens get E, which is no expert.
        precision: as a share of the range of finite values. Each token's value is within it of what an
            optimal assignment would pay, on average.
        max_rounds: tokens without a place after so many rounds get E.

    Example:
        >>> auction(jnp.array([[5.0, 4.0], [5.0, 1.0]]), jnp.ones(2, bool), precision=0.01,
        ...         max_rounds=100).tolist()
        [1, 0]
    """
    tokens, experts = values.shape
    real = token_mask & ~jnp.isnan(values).any(axis=1)
    finite = real[:, None] & jnp.isfinite(values)
    top = jnp.where(finite, values, -jnp.inf).max()
    span = jnp.where(finite.any(), top - jnp.where(finite, values, jnp.inf).min(), 0.0)
    step = jnp.maximum(precision * span, 1e-6)
    # Disabled experts have no places.
    enabled = jnp.maximum(finite.any(axis=0).sum(dtype=jnp.int32), 1)
    places = -(-real.sum(dtype=jnp.int32) // enabled)
    ids = jnp.arange(experts, dtype=jnp.int32)

    def held_bids(owner: Array, bid: Array) -> Array:
        return jnp.where(owner[:, None] == ids[None, :], bid[:, None], -jnp.inf)

    def one_round(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        owner, bid, i = carry
        ordered = -jnp.sort(-held_bids(owner, bid), axis=0)
        price = jnp.maximum(ordered[jnp.clip(places - 1, 0, tokens - 1)], 0.0)
        net = jnp.where(finite, values - price[None, :], -jnp.inf)
        best = jnp.argmax(net, axis=1).astype(jnp.int32)
        most = net.max(axis=1)
        second = jnp.where(ids[None, :] == best[:, None], -jnp.inf, net).max(axis=1)
        second = jnp.where(second > -jnp.inf, second, most - span)  # one expert is all there is
        bids = real & (owner == experts)
        owner = jnp.where(bids, best, owner)
        bid = jnp.where(bids, price[best] + most - second + step, bid)
        # Every expert keeps its highest bids; the others are free again.
        order = jnp.argsort(-held_bids(owner, bid), axis=0, stable=True)
        rank = jnp.argsort(order, axis=0)
        mine = jnp.take_along_axis(rank, jnp.minimum(owner, experts - 1)[:, None], axis=1)[:, 0]
        return jnp.where(mine < places, owner, experts), bid, i + 1

    def going(carry: tuple[Array, Array, Array]) -> Array:
        return (real & (carry[0] == experts)).any() & (carry[2] < max_rounds)

    # `real & ~real` is always False; it ties the start of the loop to the axes of the values, as in
    # `sinkhorn_offsets`.
    none = real & ~real
    start = (
        experts + none.astype(jnp.int32),
        none.astype(jnp.float32),
        jnp.zeros((), jnp.int32),
    )
    return jax.lax.while_loop(going, one_round, start)[0]
