"""Classes that cost nothing: LongCat-Flash and Zaya."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.checks import check_array
from moe_jax.interop.expert_functions import rms_norm
from moe_jax.interop.rules.common import PublishedRule
from moe_jax.routing.difficulty import Context
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, Params, Routing, pytree


@pytree
class BiasState:
    """What balancing has learned."""

    expert_bias: Array  # f32[E] or f32[E + Z], added for selection only


class FreeClasses(PublishedRule, abc.ABC):
    """Top-k over E experts and Z classes without one, which fill no slot of the routing.

    Logits, scores and probabilities have E + Z columns until ``build``. The routing is over the E
    experts: its logits and probabilities are theirs alone, the latter divided by their sum.
    """

    keeps_prefix = False
    scoring: Scoring

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scoring.num_groups != 1:
            raise ValueError(
                f"num_groups: expected 1, since classes without an expert are in no group, got "
                f"{self.scoring.num_groups}. Leave num_groups out."
            )

    def select(self, params, state, slots, x, context):
        return slots.indices < self.num_experts, self.weights(slots, slots.available)

    def build(self, slots, keep, weights, token_mask) -> Routing:
        own = slots.probs[:, : self.num_experts]
        own = own / jnp.maximum(own.sum(axis=-1, keepdims=True), 1e-30)
        logits = slots.logits[:, : self.num_experts]
        slots = dataclasses.replace(slots, logits=logits, probs=own)
        routing = super().build(slots, keep, weights, token_mask)
        # Kept slots come first, and no token keeps more than E of its k choices.
        return dataclasses.replace(
            routing,
            expert_indices=routing.expert_indices[:, : self.max_k],
            combine_weights=routing.combine_weights[:, : self.max_k],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroExperts(FreeClasses):
    """Top-k over E experts and Z that return their input (LongCat-Flash, arXiv:2509.01322).

    Such an identity expert fills no slot of the routing: its weight is in ``residual_weight``.

    Args:
        num_experts: E, the experts that compute.
        num_zero_experts: Z.
        k: choices per token, zero experts included.
        gate: the map to E + Z logits.
        scoring: logits to scores and weights.

    Example:
        >>> router = ZeroExperts(num_experts=4, num_zero_experts=4, k=2)
        >>> params = router.init(jax.random.key(0), 16)
        >>> routing = router(params, router.init_state(), jnp.ones((5, 16)))
        >>> routing.expert_indices.shape, params["kernel"].shape
        ((5, 2), (16, 8))
    """

    num_experts: int
    num_zero_experts: int
    k: int
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    @property
    def num_free(self) -> int:
        return self.num_zero_experts

    def init(self, key: Array, d_model: int) -> Params:
        return self.gate.init(key, d_model=d_model, num_experts=self.num_classes)

    def init_state(self) -> BiasState:
        return BiasState(expert_bias=jnp.zeros((self.num_classes,), jnp.float32))

    def build(self, slots, keep, weights, token_mask) -> Routing:
        routing = super().build(slots, keep, weights, token_mask)
        zero = slots.available & (slots.indices >= self.num_experts)
        residual = jnp.where(zero & routing.token_mask[:, None], weights, 0.0).sum(axis=-1)
        return dataclasses.replace(routing, residual_weight=residual)


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
            ValueError: the parameters call for the state of the layer before and there is none, or
                the other way round.
        """
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
        check_array(
            "x",
            x,
            "T D",
            sizes={"D": params["down"].shape[0]},
            fix="Pass hidden states flattened to [tokens, d_model].",
        )
        if token_mask is not None:  # a NaN in padding would survive in the kernel's gradient
            check_array(
                "token_mask",
                token_mask,
                "T",
                kind="bool",
                sizes={"T": x.shape[0]},
                fix="Pass bool[T], True for real tokens, flattened like x.",
            )
            x = jnp.where(token_mask[:, None], x, jnp.zeros((), x.dtype))
        h = rms_norm(self.hidden(params, x, context), self.norm_eps)
        h = h * params["norm"].astype(jnp.float32)[None, :]
        for name in ("fc1", "fc2"):
            h = jax.nn.gelu(_affine(h, params[name], params[f"{name}_bias"]), approximate=False)
        logits = _affine(h, params["kernel"], None)
        # As from a gate: -inf would give NaN in the gradients of some losses.
        return jnp.maximum(self.gate.exclude(logits), jnp.finfo(jnp.float32).min)


def _affine(x: Array, kernel: Array, bias: Array | None) -> Array:
    out = jnp.matmul(
        x.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return out if bias is None else out + bias.astype(jnp.float32)[None, :]
