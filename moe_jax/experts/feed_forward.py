"""The usual expert: a two-layer feed-forward network, plain or gated, for one expert's rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from moe_jax.checks import NamedArguments, check_choice, check_flag, describe_array, describe_value
from moe_jax.types import Array, Params

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


QUANTIZED_DTYPES = ("int8", "float8_e4m3fn")


class ExpertFn(Protocol):
    """A pure function of one expert's parameters and its rows: ``[M, D] -> [M, D_out]``.

    It is vmapped over the leading expert axis of every parameter, so it must treat rows one by one
    (no statistics across rows) and may not depend on how many rows there are.

    An expert that has a method ``param_axes(params) -> {name: axes}``, such as ``FeedForward``, has
    its parameters checked by ``check_params`` before anything runs.
    """

    def __call__(self, params: Params, rows: Array, /) -> Array: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForward(NamedArguments):
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` when gated (SwiGLU, GEGLU).

    Products are accumulated in float32 and the hidden activations return to the dtype of the
    rows, so bfloat16 rows and float32 parameters mix.

    Args:
        activation: a name in ``ACTIVATIONS``.
        gated: whether a gate multiplies the hidden activations (Shazeer 2020, arXiv:2002.05202).
        use_bias: whether each projection has a bias.
        quantized: None, or the dtype in ``QUANTIZED_DTYPES`` that ``quantize_experts`` gave the
            kernels. Each kernel then has a scale f32 for each output channel beside it
            (``up_scale`` [E, F]), which multiplies the product. Neither has a gradient.

    Example:
        >>> expert_fn = FeedForward(activation="silu", gated=True)
        >>> params = expert_fn.init(jax.random.key(0), num_experts=4, d_model=8, d_ff=16)
        >>> jax.tree.map(jnp.shape, params)
        {'down': (4, 16, 8), 'gate': (4, 8, 16), 'up': (4, 8, 16)}
        >>> one = jax.tree.map(lambda p: p[0], params)
        >>> expert_fn(one, jnp.ones((3, 8))).shape
        (3, 8)
    """

    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = False
    quantized: str | None = None

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_flag("gated", self.gated)
        check_flag("use_bias", self.use_bias)
        check_choice("quantized", self.quantized, (None, *QUANTIZED_DTYPES))

    def param_axes(self, params: Params, /) -> dict[str, str]:
        """The axes of each parameter of one expert, by name: what ``check_params`` expects."""
        del params  # the flags alone decide
        return feed_forward_axes(
            gated=self.gated, use_bias=self.use_bias, quantized=self.quantized is not None
        )

    def init(self, key: Array, *, num_experts: int, d_model: int, d_ff: int) -> Params:
        """Parameters of all experts, float32, with a leading expert axis.

        Kernels are ``[E, D, F]`` (gate, up) and ``[E, F, D]`` (down), normal with variance 1/fan-in;
        biases (``gate_bias``, ``up_bias``, ``down_bias``) are zero.

        Raises:
            ValueError: the kernels are quantised.
        """
        if self.quantized is not None:
            raise ValueError(
                f"quantized: expected None for new parameters, got {self.quantized!r}. Quantised "
                "kernels are made from trained ones: initialise and train without it, and pass what "
                "quantize_experts returns: to nnx.MoE as params=, to linen.MoE by expert_init=."
            )
        names = ("gate", "up", "down") if self.gated else ("up", "down")
        params = {}
        for name, k in zip(names, jax.random.split(key, len(names)), strict=True):
            fan_in, fan_out = (d_ff, d_model) if name == "down" else (d_model, d_ff)
            shape = (num_experts, fan_in, fan_out)
            params[name] = jax.random.normal(k, shape, jnp.float32) / fan_in**0.5
            if self.use_bias:
                params[f"{name}_bias"] = jnp.zeros((num_experts, fan_out), jnp.float32)
        return params

    def __call__(self, params: Params, rows: Array, /) -> Array:
        """``rows [M, D] -> [M, D]`` in the dtype of ``rows``, with one expert's parameters."""
        check_params(self, params, d_model=rows.shape[-1], name="params")
        act = ACTIVATIONS[self.activation]
        hidden = _project(params, "up", rows)
        if self.gated:
            hidden = act(_project(params, "gate", rows)) * hidden
        else:
            hidden = act(hidden)
        return _project(params, "down", hidden.astype(rows.dtype)).astype(rows.dtype)

    def flops_per_row(self, d_model: int, d_ff: int) -> int:
        """Multiply-adds counted as two operations; biases and activations left out."""
        return 2 * d_model * d_ff * (3 if self.gated else 2)


def _project(params: Params, name: str, rows: Array) -> Array:
    kernel = params[name].astype(rows.dtype)
    out = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)
    scale = params.get(f"{name}_scale")
    if scale is not None:
        out = out * scale.astype(jnp.float32)[None, :]
    bias = params.get(f"{name}_bias")
    return out if bias is None else out + bias.astype(jnp.float32)[None, :]


def feed_forward_axes(*, gated: bool, use_bias: bool, quantized: bool = False) -> dict[str, str]:
    """The parameters of one feed-forward expert by name, with a letter for each axis.

    Example:
        >>> feed_forward_axes(gated=False, use_bias=True)
        {'up': 'D F', 'up_bias': 'F', 'down': 'F D', 'down_bias': 'D'}
    """
    axes = {}
    for name in ("gate", "up", "down") if gated else ("up", "down"):
        axes[name] = "F D" if name == "down" else "D F"
        if quantized:
            axes[f"{name}_scale"] = axes[name][-1]
        if use_bias:
            axes[f"{name}_bias"] = axes[name][-1]
    return axes


def constant_names(expert_fn: Any) -> frozenset[str]:
    """The parameters of an expert that have no gradient: quantised kernels and their scales.

    Example:
        >>> sorted(constant_names(FeedForward(use_bias=True, quantized="int8")))
        ['down', 'down_scale', 'up', 'up_scale']
        >>> constant_names(FeedForward())
        frozenset()
    """
    if getattr(expert_fn, "quantized", None) is None:
        return frozenset()
    return frozenset(n for n in expert_fn.param_axes({}) if not n.endswith("_bias"))


def check_expert_fn(expert_fn: Any) -> None:
    """Raises TypeError unless ``expert_fn`` is a function or another callable value, not a class."""
    if isinstance(expert_fn, type) or not callable(expert_fn):
        raise TypeError(
            "expert_fn: expected a function (params, rows [M, D]) -> [M, D_out], got "
            f"{describe_value(expert_fn)}. Pass FeedForward() or a function of your own."
        )


def check_params(
    expert_fn: ExpertFn,
    params: Params,
    *,
    d_model: int,
    num_experts: int | None = None,
    name: str = "expert params",
) -> None:
    """Raises unless ``params`` are those that ``expert_fn`` reads: same names, ranks and widths.

    Static, so it costs nothing in a compiled program. A parameter that the expert would ignore is as
    wrong as a missing one: a gate that is dropped without a word changes every output. Experts
    without a method ``param_axes`` (functions of a user's own) are not checked.

    Args:
        expert_fn: one expert.
        params: its parameters.
        d_model: D, the width of its rows.
        num_experts: E, where the parameters have a leading expert axis.
        name: what the message calls the parameters.

    Raises:
        TypeError: ``params`` is not a mapping, holds something that is not an array, or a quantised
            kernel or its scale has another dtype.
        ValueError: a parameter is missing, unknown or of another shape; all are named.

    Example:
        >>> expert_fn = FeedForward(gated=True)
        >>> params = expert_fn.init(jax.random.key(0), num_experts=4, d_model=8, d_ff=16)
        >>> check_params(expert_fn, params, d_model=8, num_experts=4)
    """
    param_axes = getattr(expert_fn, "param_axes", None)
    if param_axes is None:
        return
    if not isinstance(params, Mapping):
        raise TypeError(
            f"{name}: expected a dict of arrays for {expert_fn}, got {describe_value(params)}. Pass "
            "what its init returned."
        )
    axes: dict[str, str] = param_axes(params)
    if set(params) != set(axes):
        missing = ", ".join(sorted(set(axes) - set(params)))
        unknown = ", ".join(sorted(str(n) for n in set(params) - set(axes)))
        raise ValueError(
            f"{name}: expected {', '.join(axes)} for {expert_fn}, got {', '.join(map(str, params))}"
            f"{f'; missing: {missing}' if missing else ''}"
            f"{f'; not used: {unknown}' if unknown else ''}. Make its flags and the parameters agree."
        )
    sizes = {"D": d_model}
    for key in axes:
        if not hasattr(params[key], "shape"):
            raise TypeError(
                f"{name}: expected {key} to be an array, got {describe_value(params[key])}. Unbox or "
                "convert it first."
            )
    # The parameters themselves say what F is; all must say the same.
    lead = () if num_experts is None else (num_experts,)
    inner = params["up"].shape
    sizes["F"] = inner[-1] if inner else 0
    for key, letters in axes.items():
        wanted = (*lead, *(sizes[a] for a in letters.split()))
        if params[key].shape != wanted or 0 in wanted:
            shown = [f"E={n}" for n in lead] + [f"{a}={sizes[a]}" for a in letters.split()]
            raise ValueError(
                f"{name}: expected {key} [{', '.join(shown)}], got {describe_array(params[key])}. D "
                "is the width of x, F that of up."
            )
        if key in constant_names(expert_fn):
            quantized = getattr(expert_fn, "quantized", None)
            dtype = "float32" if key.endswith("_scale") else quantized
            if params[key].dtype != dtype:
                raise TypeError(
                    f"{name}: expected {key} in {dtype} for {expert_fn}, got "
                    f"{describe_array(params[key])}. Pass what quantize_experts returned."
                )
