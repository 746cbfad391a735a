"""Expert functions of published models that ``FeedForward`` does not cover."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.experts import ACTIVATIONS, ExpertFn, FeedForward, check_params
from moe_jax.experts.feed_forward import feed_forward_axes
from moe_jax.types import Array, Params

# ACT2FN of transformers, as far as MoE configs use it.
HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedExpert:
    """A gated feed-forward expert with the bounds and shifts of recent models.

    ``down(act(gate) * (up + up_shift))`` where gate <= limit and |up| <= limit.

    Args:
        activation: a name in ``moe_jax.experts.ACTIVATIONS``, or ``"swish"`` for
            ``x * sigmoid(alpha * x)``.
        alpha: slope of ``"swish"`` (1.702 in gpt-oss).
        limit: bound on gate (above) and up (both sides); inf is none.
        limit_after: whether the gate is bounded after its activation (Step 3.7) instead of before.
        up_shift: 1 in gpt-oss.
        gate_softcap: with ``up_softcap``: the gate becomes ``softcap(gate) * sigmoid(gate)``, up
            becomes ``softcap(up)`` (Inkling 2).
        up_softcap: see ``gate_softcap``.
        post_norm_eps: the output times ``1 + post_norm`` is divided by its root mean square
            (Muse Spark; parameter ``post_norm`` f32[D]).

    Example:
        >>> gpt_oss = GatedExpert(activation="swish", alpha=1.702, limit=7.0, up_shift=1.0)
        >>> one = {"gate": jnp.ones((2, 3)), "up": jnp.ones((2, 3)), "down": jnp.ones((3, 2))}
        >>> gpt_oss(one, jnp.ones((4, 2))).shape
        (4, 2)
    """

    activation: str = "silu"
    alpha: float = 1.0
    limit: float = math.inf
    limit_after: bool = False
    up_shift: float = 0.0
    gate_softcap: float | None = None
    up_softcap: float | None = None
    post_norm_eps: float | None = None

    def param_axes(self, params: Params, /) -> dict[str, str]:
        """The axes of each parameter of one expert; with a bias for all projections, or for none."""
        axes = feed_forward_axes(gated=True, use_bias=any(n.endswith("_bias") for n in params))
        return axes if self.post_norm_eps is None else {**axes, "post_norm": "D"}

    def __call__(self, params: Params, rows: Array, /) -> Array:
        """``rows [M, D] -> [M, D]`` in the dtype of ``rows``, with one expert's parameters."""
        check_params(self, params, d_model=rows.shape[-1], name="params")
        gate, up = _project(params, "gate", rows), _project(params, "up", rows)
        if self.gate_softcap is not None and self.up_softcap is not None:
            hidden = _softcap(gate, self.gate_softcap) * jax.nn.sigmoid(gate)
            hidden = hidden * _softcap(up, self.up_softcap)
        else:
            if not self.limit_after:
                gate = jnp.minimum(gate, self.limit)
            act = self._act(gate)
            if self.limit_after:
                act = jnp.minimum(act, self.limit)
            hidden = act * (jnp.clip(up, -self.limit, self.limit) + self.up_shift)
        out = _project(params, "down", hidden.astype(rows.dtype))
        if self.post_norm_eps is not None:
            scale = 1.0 + params["post_norm"].astype(jnp.float32)
            out = rms_norm(out * scale[None, :], self.post_norm_eps)
        return out.astype(rows.dtype)

    def _act(self, gate: Array) -> Array:
        if self.activation == "swish":
            return gate * jax.nn.sigmoid(self.alpha * gate)
        return ACTIVATIONS[self.activation](gate)


def rms_norm(x: Array, eps: float) -> Array:
    """f32[..., D]: x divided by its root mean square over the last axis."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)


def _softcap(x: Array, cap: float) -> Array:
    return cap * jnp.tanh(x / cap)


def _project(params: Params, name: str, rows: Array) -> Array:
    kernel = params[name].astype(rows.dtype)
    out = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)
    bias = params.get(f"{name}_bias")
    return out if bias is None else out + bias.astype(jnp.float32)[None, :]


def activation_name(name: Any, *, model_type: str) -> str:
    """The library's name of an activation that a config names.

    Raises:
        ValueError: the library has no such activation; the known ones are listed.
    """
    if name not in HF_ACTIVATIONS:
        raise ValueError(
            f"config of {model_type!r}: expected an activation among "
            f"{', '.join(sorted(HF_ACTIVATIONS))}, got {name!r}. Add it to "
            "moe_jax.experts.feed_forward.ACTIVATIONS."
        )
    return HF_ACTIVATIONS[name]


def feed_forward(activation: str, *, gated: bool = True, use_bias: bool = False) -> ExpertFn:
    """``FeedForward`` with these settings."""
    return FeedForward(activation=activation, gated=gated, use_bias=use_bias)
