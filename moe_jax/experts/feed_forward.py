"""The usual expert: a two-layer feed-forward network, plain or gated, for one expert's rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from moe_jax.checks import check_choice
from moe_jax.types import Array, Params

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


class ExpertFn(Protocol):
    """What an expert is to this library: a pure function of one expert's parameters and its rows.

    It is vmapped over the leading expert axis of every parameter, so it must treat rows one by one
    (no statistics across rows) and may not depend on how many rows there are.
    """

    def __call__(self, params: Params, rows: Array, /) -> Array: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForward:
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` when gated (SwiGLU, GEGLU).

    Products are accumulated in float32 and the hidden activations return to the dtype of the
    rows, so bfloat16 rows and float32 parameters mix.

    Args:
        activation: a name in ``ACTIVATIONS``.
        gated: whether a gate multiplies the hidden activations (Shazeer 2020, arXiv:2002.05202).
        use_bias: whether each projection has a bias.

    Example:
        >>> ffn = FeedForward(activation="silu", gated=True)
        >>> params = ffn.init(jax.random.key(0), num_experts=4, d_model=8, d_ff=16)
        >>> jax.tree.map(jnp.shape, params)
        {'down': (4, 16, 8), 'gate': (4, 8, 16), 'up': (4, 8, 16)}
        >>> one = jax.tree.map(lambda p: p[0], params)
        >>> ffn(one, jnp.ones((3, 8))).shape
        (3, 8)
    """

    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = False

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, tuple(ACTIVATIONS))

    def init(self, key: Array, *, num_experts: int, d_model: int, d_ff: int) -> Params:
        """Parameters of all experts, float32, with a leading expert axis.

        Kernels are ``[E, D, F]`` (gate, up) and ``[E, F, D]`` (down), normal with variance 1/fan-in;
        biases (``gate_bias``, ``up_bias``, ``down_bias``) are zero.
        """
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
    bias = params.get(f"{name}_bias")
    return out if bias is None else out + bias.astype(jnp.float32)[None, :]
