"""Confidence in a change of quality: paired intervals, and what they show."""

from __future__ import annotations

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


def verdict(relative_low: float, relative_high: float) -> str:
    """Returns a word for the 95 % interval of the relative change in bits per byte.

    ``"equal"`` if all of it is at most 0.2 %, ``"worse"`` if all of it is above, else ``"not shown"``.
    """
    if relative_high <= EQUAL_QUALITY:
        return "equal"
    return "worse" if relative_low > EQUAL_QUALITY else "not shown"
