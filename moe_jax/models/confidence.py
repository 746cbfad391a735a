"""Confidence in a change of quality: paired intervals, and what they show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EQUAL_QUALITY = 0.002  # largest relative rise in bits per byte that counts as equal
MAX_DRIFT = 0.03  # largest relative change of the mean k on other text


def paired_bootstrap(
    nats_after: np.ndarray,
    nats_before: np.ndarray,
    num_bytes: np.ndarray,
    *,
    resamples: int = 4000,
    seed: int = 0,
) -> dict[str, float]:
    """Returns a change in bits per byte with its 95 % interval, by resampling whole files.

    Both models are measured on the same bytes. Each draw of files (with replacement) is used for
    both, so the interval contains only the uncertainty of their difference. Files are drawn rather
    than bytes because bytes of one file are alike: an interval over bytes would be too narrow.

    Args:
        nats_after: f64[files], summed over each file.
        nats_before: f64[files], the same of the reference model.
        num_bytes: f64[files].

    Returns:
        ``delta``, ``low``, ``high`` in bits per byte, and ``relative``, ``relative_low``,
        ``relative_high`` as shares of the bits before.

    Example:
        >>> before, size = np.full(50, 200.0), np.full(50, 100.0)
        >>> round(paired_bootstrap(before * 1.01, before, size)["relative_high"], 6)
        0.01
    """
    used = num_bytes > 0
    after, before, size = (v[used] for v in (nats_after, nats_before, num_bytes))
    files = len(size)
    draw = np.random.default_rng(seed)
    # How often each resample draws each file: one matrix product then sums all resamples.
    weights = draw.multinomial(files, np.full(files, 1.0 / files), size=resamples).astype(float)

    def quantiles(below: np.ndarray) -> tuple[float, float, float]:
        change = after - before
        low, high = np.quantile((weights @ change) / (weights @ below), (0.025, 0.975))
        return float(change.sum() / below.sum()), float(low), float(high)

    delta = quantiles(size * np.log(2))
    relative = quantiles(before)
    return dict(
        zip(
            ("delta", "low", "high", "relative", "relative_low", "relative_high"),
            (*delta, *relative),
            strict=True,
        )
    )


def avoided_share(
    change: np.ndarray,
    control_change: np.ndarray,
    *,
    resamples: int = 4000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Returns the share of a control's loss that a rule avoids, with its 95 % interval.

    The share is ``1 - sum(change) / sum(control_change)``. Each resample draws seeds and files (with
    replacement) and uses the same draw for the rule and the control. With one seed only files vary.
    Three seeds show the spread between seeds only roughly.

    Args:
        change: f64[files] or f64[seeds, files], the rise in nats of the rule over the trained model.
        control_change: the same of the control; its sum must be positive.
        resamples: number of draws.
        seed: of the draws.

    Returns:
        The share, and the ends of its interval. An end is infinite if more than 2.5 % of the
        resamples have a control without a loss.

    Example:
        >>> change = np.linspace(1.0, 2.0, 40)
        >>> [round(value, 6) for value in avoided_share(change, 2 * change)]
        [0.5, 0.5, 0.5]
    """
    rule, control = np.atleast_2d(change), np.atleast_2d(control_change)
    sums = resampled_sums([rule, control], resamples=resamples, seed=seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Where a resampled control costs nothing, no share of it can be avoided.
        shares = np.where(sums[1] > 0, 1.0 - sums[0] / sums[1], -np.inf)
    low, high = np.quantile(shares, (0.025, 0.975), method="nearest")
    return float(1.0 - rule.sum() / control.sum()), float(low), float(high)


def resampled_sums(
    values: Sequence[np.ndarray], *, resamples: int = 4000, seed: int = 0
) -> list[np.ndarray]:
    """Returns sums f64[resamples] of arrays f64[seeds, files], over the same draws for all."""
    seeds, files = values[0].shape
    draw = np.random.default_rng(seed)
    # How often each resample draws each file and each seed.
    of_files = draw.multinomial(files, np.full(files, 1.0 / files), size=resamples).astype(float)
    of_seeds = draw.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=resamples).astype(float)
    return [np.einsum("rs,rs->r", of_seeds, of_files @ value.T) for value in values]


def verdict(relative_low: float, relative_high: float) -> str:
    """Returns a word for the 95 % interval of the relative change in bits per byte.

    ``"equal"`` if all of it is at most 0.2 %, ``"worse"`` if all of it is above, else ``"not shown"``.
    """
    if relative_high <= EQUAL_QUALITY:
        return "equal"
    return "worse" if relative_low > EQUAL_QUALITY else "not shown"
