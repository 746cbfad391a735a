"""Controllers: what is learned without gradients. Pure functions from a value to its next value.

Each needs one [E] vector of counts (or one number) from the batch, so under data parallelism one
``psum`` of the statistics gives every device the same update. No controller runs by itself: a
router's ``update`` calls them, and only training or a calibration loop calls ``update``. So the
answer to one input never depends on earlier inputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

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
