"""Kernels of experts in 8 bits, with one scale for each expert and output channel.

A scale for each output channel can multiply the product instead of the kernel, so experts read 8-bit
numbers, and their output equals that of the dequantised kernels up to rounding. The kernels are made
from trained ones and stay as they are: neither they nor their scales have a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from moe_jax.checks import check_choice, describe_array, describe_value
from moe_jax.experts.feed_forward import (
    QUANTIZED_DTYPES,
    ExpertFn,
    constant_names,
    feed_forward_axes,
)
from moe_jax.types import Array, Params


def quantize_experts(params: Params, dtype: str = "int8") -> Params:
    """Returns parameters of ``FeedForward(quantized=dtype)`` from those of a ``FeedForward``.

    The scale of an output channel is its largest absolute weight over the largest number of the dtype
    (127 or 448), as in LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339). Weights over their scale
    are rounded to the nearest number, ties to even: an int8 weight is off by at most half its scale. A
    channel of zeros has scale 1 and stays exactly zero. Biases stay as they are.

    Args:
        params: kernels ``up``, ``down`` and, if gated, ``gate``: float[E, D, F] and float[E, F, D]; or
            without E, those of a shared expert. Traced arrays are taken too, without a check of values.
        dtype: ``"int8"`` or ``"float8_e4m3fn"``.

    Returns:
        The same names, kernels in ``dtype``, and beside each its scale: ``up_scale`` and ``gate_scale``
        f32[E, F], ``down_scale`` f32[E, D].

    Raises:
        TypeError: ``params`` is not a dict of float arrays.
        ValueError: an unknown dtype, parameters that are not those of a ``FeedForward``, or a kernel
            with NaN or infinity.

    Example:
        >>> from moe_jax import FeedForward
        >>> params = FeedForward().init(jax.random.key(0), num_experts=4, d_model=8, d_ff=16)
        >>> small = quantize_experts(params, "int8")
        >>> {name: f"{p.dtype}{list(p.shape)}" for name, p in small.items() if name != "down"}
        {'down_scale': 'float32[4, 8]', 'up': 'int8[4, 8, 16]', 'up_scale': 'float32[4, 16]'}
        >>> near = small["up"].astype(jnp.float32) * small["up_scale"][:, None, :]
        >>> bool(jnp.allclose(near, params["up"], atol=0.51 * small["up_scale"].max()))
        True
        >>> one = jax.tree.map(lambda p: p[0], small)
        >>> FeedForward(quantized="int8")(one, jnp.ones((3, 8))).shape
        (3, 8)
    """
    check_choice("dtype", dtype, QUANTIZED_DTYPES)
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params: expected a dict of arrays, got {describe_value(params)}. Pass the experts' "
            'parameters, layer_params["experts"].'
        )
    axes = feed_forward_axes(gated="gate" in params, use_bias=True)
    wrong = sorted(str(n) for n in params if n not in axes)
    missing = sorted(n for n in axes if n not in params and not n.endswith("_bias"))
    if wrong or missing:
        raise ValueError(
            f"params: expected those of a FeedForward, not quantised yet, got {sorted(params)}; "
            f"missing: {missing}; not known: {wrong}. Pass the experts' parameters, "
            'layer_params["experts"].'
        )
    small = {}
    for name, p in params.items():
        if name.endswith("_bias"):
            small[name] = p
        else:
            small[name], small[f"{name}_scale"] = _quantize(name, p, jnp.dtype(dtype))
    return dict(sorted(small.items()))


def _quantize(name: str, kernel: Any, dtype: Any) -> tuple[Array, Array]:
    """(numbers [..., K, N], scales f32[..., N]) of a kernel."""
    if not hasattr(kernel, "dtype") or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise TypeError(
            f"params: expected {name} to be an array of floats, got {describe_array(kernel)}. "
            "Quantise the trained kernels."
        )
    if not isinstance(kernel, jax.core.Tracer) and not bool(jnp.isfinite(kernel).all()):
        raise ValueError(
            f"params: expected finite numbers in {name}, got NaN or infinity. A scale cannot hold "
            "them: look for the step of training that made them."
        )
    wide = jnp.asarray(kernel, jnp.float32)
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)
    scale = jnp.abs(wide).max(axis=-2) / largest
    # Also where the channel is so small that its scale would not be a normal number.
    scale = jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1.0)
    numbers = wide / scale[..., None, :]
    numbers = jnp.clip(jnp.round(numbers) if integer else numbers, -largest, largest)
    return numbers.astype(dtype), scale


def without_gradient(expert_fn: ExpertFn, params: Params) -> Params:
    """``params``; a derivative with respect to quantised kernels or their scales raises TypeError."""
    names = constant_names(expert_fn)
    if not names:
        return params
    return {**params, **_constant({n: p for n, p in params.items() if n in names})}


@jax.custom_jvp
def _constant(params: Params) -> Params:
    return params


@_constant.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    del tangents
    raise TypeError(
        "expert params: expected no derivative with respect to quantised kernels and their scales, "
        f"which are constants, got one for {', '.join(primals[0])}. Differentiate x and the other "
        "parameters only, or train float kernels and quantise them afterwards."
    )
