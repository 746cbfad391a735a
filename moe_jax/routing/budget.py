"""A compute budget as a calibrated value: difficulty to k, thresholds to a target mean k.

Everything a fit learns is arrays of under 4 KB, so it rides in router state through jit, orbax and
the service without ever retracing. Fitting runs on the host, once, on calibration data.
"""

from __future__ import annotations

import hashlib
from importlib import metadata

import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_finite, check_number
from moe_jax.types import Array, pytree

NUM_KNOTS = 257  # quantile knots of the raw-score map: 1 KB, resolution 0.4 %


@pytree
class Fit:
    """Provenance of a calibration: what was fitted on what, and what it reached. Arrays only.

    ``token_count`` 0 means never fitted. The two fingerprints are the first 128 bits of SHA-256.
    """

    data_fingerprint: Array  # u32[4]: of the calibration tokens
    router_fingerprint: Array  # u32[4]: of the router's configuration and parameters
    library_version: Array  # i32[3]
    token_count: Array  # i32[]
    target_mean_k: Array  # f32[]
    achieved_mean_k: Array  # f32[]
    histogram: Array  # f32[K + 1]: share of calibration tokens that use 0..K experts

    def describe(self) -> dict[str, object]:
        """Host-side summary for people, logs and JSON."""

        def words(value: Array) -> str:
            return "".join(f"{int(w):08x}" for w in np.asarray(value))

        return {
            "fitted": int(self.token_count) > 0,
            "data_fingerprint": words(self.data_fingerprint),
            "router_fingerprint": words(self.router_fingerprint),
            "library_version": ".".join(str(int(v)) for v in np.asarray(self.library_version)),
            "token_count": int(self.token_count),
            "target_mean_k": float(self.target_mean_k),
            "achieved_mean_k": float(self.achieved_mean_k),
            "histogram": [round(float(h), 6) for h in np.asarray(self.histogram)],
        }


def unfitted(max_k: int) -> Fit:
    """The provenance of a state that nobody calibrated yet."""
    return Fit(
        data_fingerprint=jnp.zeros((4,), jnp.uint32),
        router_fingerprint=jnp.zeros((4,), jnp.uint32),
        library_version=jnp.zeros((3,), jnp.int32),
        token_count=jnp.zeros((), jnp.int32),
        target_mean_k=jnp.zeros((), jnp.float32),
        achieved_mean_k=jnp.zeros((), jnp.float32),
        histogram=jnp.zeros((max_k + 1,), jnp.float32),
    )


def fingerprint(*parts: object) -> np.ndarray:
    """u32[4]: the first 128 bits of SHA-256 over strings and arrays (values, shape, dtype)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            array = np.ascontiguousarray(np.asarray(part))
            # The bytes alone would be equal for other shapes and dtypes.
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array.tobytes())
        # A separator, so that the parts ("ab", "c") and ("a", "bc") differ.
        digest.update(b"\0")
    return np.frombuffer(digest.digest()[:16], ">u4").astype(np.uint32)


def record_fit(
    *,
    data: np.ndarray,
    router_parts: tuple[object, ...],
    target_mean_k: float,
    counts: np.ndarray,
    max_k: int,
) -> Fit:
    """Provenance from what a fit saw (``data``) and reached (``counts`` i32[T], experts a token)."""
    histogram = np.bincount(counts, minlength=max_k + 1)[: max_k + 1] / counts.size
    return Fit(
        data_fingerprint=jnp.asarray(fingerprint(data)),
        router_fingerprint=jnp.asarray(fingerprint(*router_parts)),
        library_version=jnp.asarray(_version(), jnp.int32),
        token_count=jnp.asarray(counts.size, jnp.int32),
        target_mean_k=jnp.asarray(target_mean_k, jnp.float32),
        achieved_mean_k=jnp.asarray(counts.mean(), jnp.float32),
        histogram=jnp.asarray(histogram, jnp.float32),
    )


def _version() -> list[int]:
    try:
        text = metadata.version("moe_jax")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return [0, 0, 0]
    return [int("".join(c for c in part if c.isdigit()) or 0) for part in text.split(".")[:3]]


# --- difficulty to k ------------------------------------------------------------------------


def uniform_knots() -> Array:
    """f32[NUM_KNOTS] 0..1: the raw-score map of a state without calibration (the identity)."""
    return jnp.linspace(0.0, 1.0, NUM_KNOTS, dtype=jnp.float32)


def fit_knots(raw: np.ndarray) -> Array:
    """f32[NUM_KNOTS] quantiles of raw scores: the map that makes calibrated difficulty uniform.

    Raises:
        ValueError: scores that are not finite, or all equal (nothing to tell tokens apart by).
    """
    if not np.isfinite(raw).all():
        bad = int((~np.isfinite(raw)).sum())
        raise ValueError(
            f"difficulty: expected finite raw scores, got {bad} of {raw.size} that are not. "
            "Look for NaN or inf in the calibration data or in the estimator."
        )
    if raw.min() == raw.max():
        raise ValueError(
            f"difficulty: expected raw scores that differ, got {raw.size} times {raw.min():g}. "
            "Use more varied calibration data or another estimator."
        )
    return jnp.asarray(np.quantile(raw, np.linspace(0, 1, NUM_KNOTS)), jnp.float32)


def calibrated_difficulty(raw: Array, knots: Array) -> Array:
    """f32[T] in [0, 1]: where raw f32[T] falls among the calibration quantiles f32[NUM_KNOTS].

    A raw score at or below the lowest knot gives 0, at or above the highest 1; NaN gives 0.
    """
    level = jnp.linspace(0.0, 1.0, knots.shape[0], dtype=jnp.float32)
    return jnp.where(jnp.isnan(raw), 0.0, jnp.interp(raw, knots, level))


def rounding_thresholds(min_k: int, max_k: int) -> Array:
    """f32[max_k - min_k]: thresholds that equal ``round(min_k + (max_k - min_k) * difficulty)``."""
    steps = max_k - min_k
    return (jnp.arange(steps, dtype=jnp.float32) + 0.5) / max(steps, 1)


def difficulty_to_k(difficulty: Array, thresholds: Array, *, min_k: int) -> Array:
    """i32[T]: ``min_k`` plus the number of thresholds that the difficulty exceeds.

    Thresholds lie in (0, 1), so difficulty 0 gives min_k and difficulty 1 gives max_k.

    Example:
        >>> difficulty_to_k(jnp.array([0.0, 0.6, 1.0]), jnp.array([0.25, 0.75]), min_k=1).tolist()
        [1, 2, 3]
    """
    # Comparisons with all thresholds at once. There are fewer than K, and a search would be a loop.
    above = difficulty[:, None] > thresholds[None, :]
    return min_k + above.sum(axis=1, dtype=jnp.int32)


def raw_to_k(raw: Array, knots: Array, thresholds: Array, *, min_k: int) -> Array:
    """i32[T]: ``difficulty_to_k`` of ``calibrated_difficulty``, by one comparison a threshold.

    Carries the few thresholds over to the scale of the raw scores instead of looking every token's
    score up among the knots. ``>=`` because a score equal to a run of tied knots has the calibrated
    difficulty of the run's upper end.
    """
    knots = jnp.asarray(knots)  # a state of numpy arrays cannot be indexed by traced numbers
    # A threshold that equals the difficulty of a run is not exceeded by it: just above, the cut is too.
    above = jnp.nextafter(thresholds, jnp.ones_like(thresholds))
    # Knots are evenly spaced in difficulty, so the place of a threshold among them is a product. A
    # search, as in jnp.interp, is a loop that takes longer than the rest of the routing. With 2^n + 1
    # knots the product and its fraction are exact, so both give the same bits.
    last = knots.shape[0] - 1
    position = jnp.clip(above, 0.0, 1.0) * last
    left = jnp.clip(position.astype(jnp.int32), 0, last - 1)
    part = position - left.astype(jnp.float32)
    cuts = knots[left] + part * (knots[left + 1] - knots[left])
    return min_k + (raw[:, None] >= cuts[None, :]).sum(axis=1, dtype=jnp.int32)


def fit_thresholds(
    difficulty: np.ndarray, *, min_k: int, max_k: int, target_mean_k: float
) -> np.ndarray:
    """Thresholds under which tokens of these difficulties use ``target_mean_k`` experts on average.

    The thresholds keep the spacing of plain rounding, ``b_j = (j - 1/2) / (max_k - min_k)``, bent
    by one exponent in (0, 1] that bisection finds: ``b_j ** gamma`` for targets below the middle,
    and the mirror image ``1 - (1 - b_j) ** gamma`` above it. So every k from min_k to max_k stays in
    use at any target strictly between the two.

    Args:
        difficulty: f32[T] in [0, 1].
        target_mean_k: strictly between min_k and max_k.

    Returns:
        f32[max_k - min_k], increasing, inside (0, 1).

    Raises:
        ValueError: the target is out of reach.

    Example:
        >>> difficulty = np.linspace(0, 1, 101)
        >>> fit_thresholds(difficulty, min_k=1, max_k=3, target_mean_k=2.0).round(3).tolist()
        [0.25, 0.75]
    """
    check_target(target_mean_k, min_k=min_k, max_k=max_k)
    difficulty = np.asarray(difficulty)
    if difficulty.ndim != 1 or not difficulty.size or difficulty.dtype.kind not in "fiu":
        raise ValueError(
            "difficulty: expected numbers of at least one token, f32[T], got "
            f"{difficulty.dtype}{list(difficulty.shape)}. Pass one calibrated difficulty a token."
        )
    if not (np.isfinite(difficulty).all() and (abs(difficulty - 0.5) <= 0.5).all()):
        raise ValueError(
            f"difficulty: expected finite numbers in [0, 1], got {difficulty.min():g} to "
            f"{difficulty.max():g}. Map raw scores by calibrated_difficulty first."
        )
    # float64 on the host, because the exponent below is searched to the last bit.
    base = np.asarray(rounding_thresholds(min_k, max_k), np.float64)
    # float32, as in use: a float64 score could lie on the other side of a threshold.
    scores = np.sort(np.asarray(difficulty, np.float32))

    def thresholds(knob: float) -> np.ndarray:
        gamma = np.exp(-abs(knob))
        bent = base**gamma if knob < 0 else 1.0 - (1.0 - base) ** gamma
        # Strictly inside (0, 1) in float32, so that difficulty 0 and 1 keep their meaning after any
        # bend.
        return np.clip(bent, np.finfo(np.float32).tiny, 1 - 2**-24).astype(np.float32)

    def mean_k(knob: float) -> float:
        below = np.searchsorted(scores, thresholds(knob), side="right")
        return min_k + float((scores.size - below).sum()) / scores.size

    # An exponent of exp(-12) puts every threshold within 1e-4 of an end of (0, 1).
    fitted = thresholds(bisect(mean_k, target_mean_k, low=-12.0, high=12.0))
    return _split_ties(fitted, scores, target_mean_k - min_k)


def _split_ties(thresholds: np.ndarray, scores: np.ndarray, target: float) -> np.ndarray:
    """Makes up for a step in the mean that a run of equal scores caused.

    Many equal scores pass a threshold all at once, and no exponent then meets the target. Some other
    threshold, where scores differ, can take the rest: each is tried, and the closest wins. Ordered
    thresholds in (0, 1) stay so.
    """

    def mean(candidate: np.ndarray) -> float:
        below = np.searchsorted(scores, candidate, side="right")
        return float((scores.size - below).sum()) / scores.size

    best, rest = thresholds, target - mean(thresholds)
    # Less than one token off: no threshold can come closer.
    if abs(rest) * scores.size < 1:
        return thresholds
    for j in range(thresholds.size):
        below = int(np.searchsorted(scores, thresholds[j], side="right"))
        # Tokens at or below a threshold do not exceed it: fewer of them raise the mean.
        place = below - round(rest * scores.size)
        if not 0 < place < scores.size:
            continue
        moved = thresholds.copy()
        moved[j] = scores[place - 1]  # exceeded by what comes after it
        inside = 0 < moved[j] < 1 and bool((np.diff(moved) > 0).all())
        if inside and abs(target - mean(moved)) < abs(target - mean(best)):
            best = moved
    return best


def check_target(target_mean_k: float, *, min_k: float, max_k: float) -> None:
    """Raises ValueError unless the target lies strictly between min_k and max_k.

    Raises TypeError unless it is a Python or NumPy number.
    """
    check_number("target_mean_k", target_mean_k)
    if not min_k < target_mean_k < max_k:
        raise ValueError(
            f"target_mean_k: expected a number strictly between min_k={min_k} and max_k={max_k}, "
            f"got {target_mean_k}. Widen the range of k or move the target."
        )


def mean_k_after(target_saving: float, *, min_k: float, trained_k: float) -> float:
    """The mean k that saves this share of the expert calls at ``trained_k``.

    Raises:
        ValueError: nothing saved, or so much that tokens would use fewer than ``min_k`` experts.

    Example:
        >>> mean_k_after(0.25, min_k=1, trained_k=4)
        3.0
    """
    check_number("target_saving", target_saving)
    check_finite("min_k", min_k)
    check_finite("trained_k", trained_k)
    if not 0 < min_k <= trained_k:
        raise ValueError(
            f"min_k: expected 0 < min_k <= trained_k={trained_k:g}, got {min_k:g}. Saving starts "
            "from the trained k."
        )
    most = 1.0 - min_k / trained_k
    if not 0.0 < target_saving < most:
        raise ValueError(
            f"target_saving: expected above 0 and below {most:g} (1 - {min_k:g}/{trained_k:g}, "
            f"min_k over the trained k), got {target_saving:g}. It is the share of expert calls to "
            "save: 0.1 saves a tenth."
        )
    return trained_k * (1.0 - target_saving)


def bisect(mean_k, target: float, *, low: float, high: float, steps: int = 60) -> float:
    """The knob setting at which a monotone ``mean_k(knob)`` comes closest to ``target``.

    ``mean_k`` may rise or fall, and may be a staircase, in which case the nearer side of the step
    that crosses the target is returned.
    """
    # Only the direction decides which half is kept, so one loop serves rising and falling functions.
    rising = mean_k(high) > mean_k(low)
    for _ in range(steps):
        middle = 0.5 * (low + high)
        if (mean_k(middle) < target) == rising:
            low = middle
        else:
            high = middle
    # On a staircase the two ends stay on different steps.
    return min((low, high), key=lambda knob: abs(mean_k(knob) - target))


def fit_cut(values: np.ndarray, keep: float) -> float:
    """The number that about ``keep`` of ``values`` lie at or below: halfway to the next value.

    What calibrates a rule that uses a slot while some quantity stays at or below a cut.
    """
    ordered = np.sort(np.asarray(values, np.float64).reshape(-1))
    # Halfway between two values, so that rounding to float32 moves neither to the other side.
    rank = int(np.clip(round(keep), 1, ordered.size - 1))
    return float(0.5 * (ordered[rank - 1] + ordered[rank]))


def fit_min_p(probs: np.ndarray, min_k: int, target_mean_k: float) -> Array:
    """Returns the ratio f32[] at which tokens with slot probabilities f32[T, K] hit the target."""
    # A token keeps a prefix of its slots, up to the first slot below the ratio. So the share that
    # decides about a slot is the smallest share up to it.
    shares = np.minimum.accumulate(probs / probs[:, :1], axis=1)[:, min_k:]
    cut = fit_cut(-shares, (target_mean_k - min_k) * len(shares))
    return jnp.asarray(-cut, jnp.float32)


def fit_top_p(probs: np.ndarray, min_k: int, target_mean_k: float) -> Array:
    """Returns the p f32[] at which tokens with slot probabilities f32[T, K] hit the target."""
    # A slot is used while the sum of what comes before it is at most p; see ``top_p_keep``. Summed by
    # JAX, in the order of the rule's own sum, so that no value lies on the other side of p.
    before = np.asarray(jnp.cumsum(probs, axis=-1) - probs)[:, min_k:]
    return jnp.asarray(fit_cut(before, (target_mean_k - min_k) * len(before)), jnp.float32)


def fit_expert_cutoffs(
    scores: np.ndarray, *, min_k: int, max_k: int, target_mean_k: float
) -> np.ndarray:
    """Returns f32[E]: the same quantile of each expert's scores f32[T, E], at which the mean k of the
    tokens above their experts' cutoffs hits the target.
    """

    def cutoffs(rate: float) -> np.ndarray:
        return np.quantile(scores, 1.0 - rate, axis=0).astype(np.float32)

    def mean_k(rate: float) -> float:
        counts = (scores > cutoffs(rate)[None, :]).sum(axis=1)
        return float(np.clip(counts, min_k, max_k).mean())

    # min_k and max_k clip the counts, so the rate that reaches the target is not target / E.
    return cutoffs(bisect(mean_k, target_mean_k, low=0.0, high=1.0, steps=30))


def per_expert_quantiles(scores: Array, token_mask: Array, rate: float) -> Array:
    """f32[E]: the value that a share ``rate`` of the real tokens' scores [T, E] lies above.

    The (1 - rate) population quantile of Expert Threshold routing (arXiv:2603.11535). Padding
    counts in nothing: it sorts to the end and the quantile's position is taken among real tokens.
    """
    # The number of real tokens is traced, so `jnp.quantile` of a masked batch is not available.
    ordered = jnp.sort(jnp.where(token_mask[:, None], scores, jnp.inf), axis=0)
    count = token_mask.sum().astype(jnp.float32)
    place = jnp.clip((1.0 - rate) * (count - 1.0), 0.0, scores.shape[0] - 1.0)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.maximum(count.astype(jnp.int32) - 1, 0))
    part = place - low.astype(jnp.float32)
    value = ordered[low] * (1.0 - part) + ordered[high] * part
    return jnp.where(count > 0, value, 0.0)
