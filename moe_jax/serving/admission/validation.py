"""Shape, dtype, size and values of a request, in this order: nothing is copied before it is bounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.serving.errors import ServingError

DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request's tensor may be.

    Attributes:
        width: D that the last axis must have.
        max_batch_size: most sequences.
        max_tensor_size: most elements.
        max_tokens: most tokens a client may ever send at once (its rate limit), or None.
    """

    width: int
    max_batch_size: int
    max_tensor_size: int
    max_tokens: int | None = None


def check_shape(shape: Sequence[int], dtype: str, limits: Limits) -> int:
    """Checks what a request says of its tensor [B, S, D], before a byte of it is touched.

    Plain Python integers throughout: products of hostile sizes do not wrap around.

    Returns:
        B * S, its tokens.

    Raises:
        ServingError: ``malformed`` for rank, sizes or dtype; ``too_large`` for what is well formed
            but above a limit.

    Example:
        >>> check_shape((2, 3, 8), "float32", Limits(width=8, max_batch_size=4, max_tensor_size=99))
        6
    """
    if dtype not in DTYPES:
        raise _refused(
            "malformed", f"expected dtype {', '.join(DTYPES)}", shape, dtype, "Convert it first."
        )
    if len(shape) != 3:
        raise _refused(
            "malformed",
            f"expected 3 axes [batch, sequence, {limits.width}]",
            shape,
            dtype,
            "Reshape it; one sequence is [1, sequence, width].",
        )
    batch, sequence, width = (int(s) for s in shape)
    tokens = batch * sequence
    elements = tokens * width
    if batch < 1 or sequence < 1:
        raise _refused(
            "malformed", "expected at least one token", shape, dtype, "Send one or more."
        )
    if width != limits.width:
        raise _refused(
            "malformed",
            f"expected last axis {limits.width} (input_dim)",
            shape,
            dtype,
            "Send hidden states of the model that this router was made for.",
        )
    if batch > limits.max_batch_size:
        raise _refused(
            "too_large",
            f"expected at most {limits.max_batch_size} sequences (max_batch_size)",
            shape,
            dtype,
            "Send them in several requests.",
        )
    if elements > limits.max_tensor_size:
        raise _refused(
            "too_large",
            f"expected at most {limits.max_tensor_size} elements (max_tensor_size)",
            shape,
            f"{elements} elements of {dtype}",
            "Send it in several requests.",
        )
    if limits.max_tokens is not None and tokens > limits.max_tokens:
        raise _refused(
            "too_large",
            f"expected at most {limits.max_tokens} tokens, what a client may send in a minute",
            shape,
            f"{tokens} tokens of {dtype}",
            "Send it in several requests.",
        )
    return tokens


def _refused(code: str, expected: str, shape: Sequence[int], got: str, advice: str) -> ServingError:
    return ServingError(
        code, f"hidden_states: {expected}, got {got}{[int(s) for s in shape][:8]}. {advice}"
    )


def check_array(hidden_states: Any, limits: Limits) -> int:
    """``check_shape`` of an array; refuses what is none, objects above all."""
    # A jax.Array says its shape and dtype without a copy, as does whatever follows the protocol.
    if not (hasattr(hidden_states, "shape") and hasattr(hidden_states, "dtype")):
        raise ServingError(
            "malformed",
            f"hidden_states: expected an array [batch, sequence, {limits.width}], got a "
            f"{type(hidden_states).__name__}. Pass numpy.asarray(..., numpy.float32).",
        )
    return check_shape(hidden_states.shape, _dtype_name(hidden_states.dtype), limits)


def check_layers(hidden_states: Any, layers: int, limits: Limits) -> None:
    """``check_array`` of [L, B, S, D], the hidden states of all layers: together within the limits."""
    shape = getattr(hidden_states, "shape", None)
    if shape is None or len(shape) != 4 or shape[0] != layers:
        got = f"a {type(hidden_states).__name__}" if shape is None else f"shape {list(shape)[:8]}"
        raise ServingError(
            "malformed",
            f"hidden_states: expected [{layers}, batch, sequence, {limits.width}], those that reach "
            f"each layer, got {got}. Send every layer's, or ask for one layer by its name.",
        )
    most = limits.max_tokens
    each = dataclasses.replace(
        limits,
        max_tensor_size=limits.max_tensor_size // layers,
        max_tokens=None if most is None else most // layers,
    )
    check_array(hidden_states[0], each)


_FLOAT32 = np.dtype(np.float32)


def _dtype_name(dtype: Any) -> str:
    return "float32" if dtype is _FLOAT32 else str(dtype)  # numpy makes up the name each time


def check_mask(token_mask: Any, shape: Sequence[int]) -> np.ndarray:
    """bool[B, S], contiguous. Raises ServingError where the mask does not fit the hidden states."""
    mask = token_mask if isinstance(token_mask, np.ndarray) else np.asarray(token_mask)
    if mask.dtype != np.bool_ or mask.shape != tuple(shape[:2]):
        raise ServingError(
            "malformed",
            f"token_mask: expected bool{list(shape[:2])}, got {mask.dtype}{list(mask.shape)}. "
            "Pass one flag a token, True for real tokens.",
        )
    return np.ascontiguousarray(mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """What the check of values made of a request.

    Attributes:
        x: the values to use, float32[T, D].
        token_mask: bool[T], or None where every token counts.
        nonfinite_tokens: tokens that held NaN or inf.
        large_tokens: tokens with a value above the magnitude bound.
        sanitized: whether x or the mask differ from what was sent.
    """

    x: np.ndarray
    token_mask: np.ndarray | None
    nonfinite_tokens: int = 0
    large_tokens: int = 0
    sanitized: bool = False


def check_values(
    x: np.ndarray,
    token_mask: np.ndarray | None,
    *,
    nonfinite: str,
    magnitude: str,
    max_magnitude: float,
) -> Checked:
    """Applies the policy for NaN, inf and huge values to x float32[T, D].

    Tokens that the mask leaves out may hold anything: they are set to zero wherever they would
    matter. One pass where all is well: a token's sum of squares is finite and below the square of the
    bound only if its every value is.

    Args:
        nonfinite: ``off`` flags; ``sanitize`` sets bad values to zero and keeps the token; ``mask``
            drops the token; ``reject`` refuses the request.
        magnitude: ``off``, ``count`` or ``reject``.
        max_magnitude: the bound on absolute values.

    Raises:
        ServingError: ``invalid_values`` where the policy is to reject.

    Example:
        >>> x = np.array([[1.0, np.nan], [1.0, 2.0]], np.float32)
        >>> checked = check_values(x, None, nonfinite="mask", magnitude="off", max_magnitude=1e6)
        >>> checked.token_mask.tolist(), checked.nonfinite_tokens
        ([False, True], 1)
    """
    # By rows: a product of all at once wakes the threads of BLAS, which then stand in XLA's way.
    with np.errstate(all="ignore"):
        small = np.vecdot(x, x) < max_magnitude * max_magnitude  # False for NaN
    if small.all():
        return Checked(x=x, token_mask=token_mask)
    with np.errstate(all="ignore"):
        finite = np.asarray(np.isfinite(x).all(axis=1))
        large = (np.abs(x) > np.float32(max_magnitude)).any(axis=1) & finite
    if token_mask is not None:
        hidden = ~token_mask
        if (hidden & ~finite).any():  # padding that holds NaN is padding all the same
            x = np.where(token_mask[:, None], x, np.float32(0))
        finite = finite | hidden
        large = large & token_mask
    bad, big = int((~finite).sum()), int(large.sum())
    if bad and nonfinite == "reject":
        raise ServingError(
            "invalid_values",
            f"hidden_states: expected finite values, got NaN or inf in {bad} of {len(x)} tokens. "
            "Remove them, or mask those tokens.",
        )
    if big and magnitude == "reject":
        raise ServingError(
            "invalid_values",
            f"hidden_states: expected values up to {max_magnitude:g}, got larger ones in {big} of "
            f"{len(x)} tokens. Normalise the hidden states, or raise max_magnitude.",
        )
    if magnitude == "off":
        big = 0
    if not bad or nonfinite == "off":
        return Checked(x=x, token_mask=token_mask, nonfinite_tokens=bad, large_tokens=big)
    if nonfinite == "sanitize":
        x = np.where(np.isfinite(x), x, np.float32(0))
    else:
        x = np.where(finite[:, None], x, np.float32(0))
        token_mask = finite if token_mask is None else finite & token_mask
    return Checked(
        x=x, token_mask=token_mask, nonfinite_tokens=bad, large_tokens=big, sanitized=True
    )
