"""A router network whose state goes from layer to layer: Zaya."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.checks import check_array
from moe_jax.interop.expert_functions import rms_norm
from moe_jax.interop.rules.free_classes import FreeClasses
from moe_jax.routers.arguments import check_params
from moe_jax.routers.base import BiasState
from moe_jax.routing.difficulty import Context
from moe_jax.routing.gate import Gate, zero_padding
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthRouter(FreeClasses):
    """Zaya's router: a small network whose hidden state is carried from layer to layer.

    ``h = x @ down + scale * (h of the MoE layer before)``; RMS norm and two GELU layers lead to E + 1
    logits, the last of which means "no expert". ``context["router_states"]`` float[T, H] is the
    hidden state of the layer before. It is required where the parameters have ``depth_scale``; the
    first layer has none, and takes no states. ``hidden`` returns this layer's state for the next.

    Args:
        num_experts: E.
        k: choices per token.
        hidden_size: H.
        norm_eps: eps of the norm.
        gate: its ``disabled_experts`` count; the map to logits is the network's.
        scoring: logits to scores and weights.

    Example:
        >>> router = DepthRouter(num_experts=4, k=1, hidden_size=6)
        >>> params = router.init(jax.random.key(0), 16)
        >>> before = {"router_states": jnp.zeros((5, 6))}
        >>> routing = router(params, router.init_state(), jnp.ones((5, 16)), context=before)
        >>> routing.router_logits.shape
        (5, 4)
    """

    num_experts: int
    k: int
    hidden_size: int
    norm_eps: float = 1e-5
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    @property
    def num_free(self) -> int:
        return 1

    def init(self, key: Array, d_model: int) -> Params:
        h, keys = self.hidden_size, jax.random.split(key, 4)
        shapes = {
            "down": (d_model, h),
            "fc1": (h, h),
            "fc2": (h, h),
            "kernel": (h, self.num_classes),
        }
        params = {
            name: jax.random.normal(k, shape, jnp.float32) / shape[0] ** 0.5
            for (name, shape), k in zip(shapes.items(), keys, strict=True)
        }
        zeros = {f"{name}_bias": jnp.zeros((h,), jnp.float32) for name in ("down", "fc1", "fc2")}
        ones = {name: jnp.ones((h,), jnp.float32) for name in ("norm", "depth_scale")}
        return {**params, **zeros, **ones}

    def init_state(self) -> BiasState:
        """No bias, but -1 on "no expert", as published."""
        return BiasState(expert_bias=jnp.zeros((self.num_classes,)).at[-1].set(-1.0))

    def hidden(self, params: Params, x: Array, context: Context | None = None) -> Array:
        """f32[T, H]: the state that the next MoE layer takes as ``context["router_states"]``.

        Raises:
            ValueError: the parameters need the state of the layer before and the context lacks it, or
                the context has it and the parameters do not need it.
        """
        self._check(params)
        h = _affine(x, params["down"], params["down_bias"])
        before = (context or {}).get("router_states")
        if before is None and "depth_scale" in params:
            raise ValueError(
                "context: expected 'router_states' float[T, H], the router's state of the MoE layer "
                "before, since the weights of this layer have router_states_scale; got none. Pass "
                'context={"router_states": ...} from DepthRouter.hidden of that layer.'
            )
        if before is None:
            return h
        if "depth_scale" not in params:
            raise ValueError(
                "context: expected no 'router_states', since the weights of this layer have no "
                "router_states_scale (the first layer of a model), got them. Leave them out."
            )
        scale = params["depth_scale"].astype(jnp.float32)[None, :]
        return h + before.astype(jnp.float32).reshape(h.shape) * scale

    def logits(self, params, x, *, key=None, token_mask=None, context=None) -> Array:
        self._check(params)
        check_array(
            "x",
            x,
            "T D",
            sizes={"D": params["down"].shape[0]},
            fix="Pass hidden states flattened to [tokens, d_model].",
        )
        h = rms_norm(self.hidden(params, zero_padding(x, token_mask), context), self.norm_eps)
        h = h * params["norm"].astype(jnp.float32)[None, :]
        for name in ("fc1", "fc2"):
            h = jax.nn.gelu(_affine(h, params[name], params[f"{name}_bias"]), approximate=False)
        logits = _affine(h, params["kernel"], None)
        # As from a gate: -inf would give NaN in the gradients of some losses.
        return jnp.maximum(self.gate.exclude(logits), jnp.finfo(jnp.float32).min)

    def _check(self, params: Params) -> None:
        """Refuses parameters of other names or sizes."""
        h = self.hidden_size
        names = ("down_bias", "fc1_bias", "fc2_bias", "norm")
        if isinstance(params, Mapping) and "depth_scale" in params:  # all layers but the first
            names = (*names, "depth_scale")
        check_params(
            params,
            down=(None, h),
            fc1=(h, h),
            fc2=(h, h),
            kernel=(h, self.num_classes),
            **dict.fromkeys(names, (h,)),
        )


def _affine(x: Array, kernel: Array, bias: Array | None) -> Array:
    out = jnp.matmul(
        x.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return out if bias is None else out + bias.astype(jnp.float32)[None, :]
