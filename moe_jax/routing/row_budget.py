"""A bound on the rows of a batch, from how many experts its tokens use."""

from __future__ import annotations

import math
import statistics

import numpy as np

from moe_jax.checks import check_at_least_0, check_count, check_range, describe_array


def row_budget(
    histogram: np.ndarray,
    *,
    num_tokens: int,
    overflow_probability: float = 1e-3,
    design_effect: float = 1.0,
) -> int:
    """Returns R for ``plan_dispatch(max_rows=R)``: the number of rows that a batch exceeds with
    probability at most ``overflow_probability``.

    A batch of T tokens with this histogram of experts per token asks for ``T * mean`` rows with
    variance ``T * var * design_effect``; R is the normal quantile above which a batch falls with
    ``overflow_probability``. What overflows is dropped by priority and counted in
    ``stats.dropped_fraction``; a token's first expert never is.

    Args:
        histogram: [K + 1], share of tokens that use 0..K experts, e.g. ``state.fit.histogram``.
        num_tokens: T of the batches to come.
        overflow_probability: share of batches that may overflow.
        design_effect: how much more the total varies than for independent tokens. Neighbouring
            tokens are alike, so text has more than 1: measure it with ``batch_design_effect``.

    Returns:
        R, between T and T * K.

    Raises:
        ValueError: a histogram that does not sum to 1, or a probability outside (0, 1).

    Example:
        >>> row_budget(np.array([0.0, 0.7, 0.3]), num_tokens=8192)
        10778
    """
    try:
        shares = np.asarray(histogram, np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"histogram: expected shares of tokens that use 0..K experts, got {histogram!r}. Use the "
            "histogram of a fitted state."
        ) from None
    valid = shares.ndim == 1 and shares.size >= 2 and (shares >= 0).all()
    if not valid or not abs(shares.sum() - 1.0) <= 1e-3:
        raise ValueError(
            "histogram: expected shares of tokens that use 0..K experts, at least 0 and summing to "
            f"1, got shape {list(shares.shape)} with sum {shares.sum():g}. Use the histogram of a "
            "fitted state."
        )
    check_count("num_tokens", num_tokens, fix="It is the number of tokens of a batch.")
    check_at_least_0("design_effect", design_effect)
    chance = "1e-3 lets one batch in a thousand drop something."
    check_range("overflow_probability", overflow_probability, above=0, below=1, fix=chance)
    k = np.arange(shares.size)
    mean = float((k * shares).sum())
    variance = float((np.square(k - mean) * shares).sum()) * design_effect
    quantile = statistics.NormalDist().inv_cdf(1.0 - overflow_probability)
    # The sum over many tokens is close to normal (central limit theorem).
    rows = num_tokens * mean + quantile * math.sqrt(num_tokens * variance)
    # Rounding of the sums above must not add a row: 100 tokens of mean 1.1 are 110.00000000000001.
    rows = math.ceil(rows * (1.0 - 1e-12))
    return int(min(max(rows, num_tokens), num_tokens * (shares.size - 1)))


def batch_design_effect(counts: np.ndarray, *, num_tokens: int) -> float:
    """How much more the rows of real batches vary than those of independent tokens; at least 1.

    Args:
        counts: i32[M], experts per token in the order of the text, M at least two batches.
        num_tokens: T, consecutive tokens in one batch.

    Raises:
        TypeError: no array of numbers.
        ValueError: another number of axes, NaN, or fewer than two whole batches.
    """
    check_count("num_tokens", num_tokens, fix="It is the number of tokens of a batch.")
    fix = "Pass routing.num_experts_per_token of calibration text."
    try:
        values = np.asarray(counts, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"counts: expected experts per token [M], got {counts!r}. {fix}") from None
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(
            f"counts: expected finite numbers [M], got {describe_array(values)}"
            f"{'' if np.isfinite(values).all() else ' with NaN or inf'}. {fix}"
        )
    batches = values[: values.size // num_tokens * num_tokens]
    if batches.size < 2 * num_tokens:
        raise ValueError(
            f"counts: expected at least two batches of {num_tokens} tokens, got {values.size} "
            "counts. Give more calibration text."
        )
    independent = batches.var() * num_tokens
    # Consecutive tokens make up a batch, as in use. Shuffled tokens would hide that neighbours are
    # alike.
    measured = batches.reshape(-1, num_tokens).sum(axis=1).var(ddof=1)
    return max(1.0, float(measured / independent)) if independent > 0 else 1.0
