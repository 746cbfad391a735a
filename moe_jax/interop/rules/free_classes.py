"""Classes that cost nothing: LongCat-Flash and Zaya."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.checks import check_array, check_k
from moe_jax.interop.expert_functions import rms_norm
from moe_jax.routers.base import Router, Traits
from moe_jax.routing.difficulty import Context
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import build_routing, compact, top_slots
from moe_jax.types import Array, Params, Routing, pytree


@pytree
class BiasState:
    expert_bias: Array  # f32[E] or f32[E + Z], added for selection only


def _with_free_classes(
    logits: Array, bias: Array, scoring: Scoring, *, experts: int, k: int, identity: bool,
    token_mask: Array | None,
) -> Routing:  # fmt: skip
    """Top-k over E experts and Z free classes; a free class fills no slot.

    Returns a routing over the E experts: logits and probabilities are theirs alone, the latter
    divided by their sum. With ``identity`` the weight of free classes goes to ``residual_weight``.
    """
    scores = scoring.scores(logits)
    selection = scoring.limit_groups(scoring.selection_scores(logits, scores, bias))
    indices, _ = top_slots(selection, k)
    slot_scores = jnp.take_along_axis(scores, indices, axis=-1)
    weights = scoring.weights(slot_scores, jnp.ones(indices.shape, bool), min_k=k)
    keep = indices < experts
    residual = jnp.where(keep, 0.0, weights).sum(axis=-1)
    keep, indices, weights = compact(keep, indices, weights)
    probs = scoring.probs(logits, scores)[:, :experts]
    routing = build_routing(
        logits=logits[:, :experts],
        probs=probs / jnp.maximum(probs.sum(axis=-1, keepdims=True), 1e-30),
        indices=indices, weights=weights, keep=keep, token_mask=token_mask,
    )  # fmt: skip
    if identity:
        residual = jnp.where(routing.token_mask, residual, 0.0)
        routing = dataclasses.replace(routing, residual_weight=residual)
    return routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroExperts(Router):
    """Top-k over E experts and Z that return their input (LongCat-Flash, arXiv:2509.01322).

    Such an identity expert fills no slot of the routing: what it weighs is in ``residual_weight``.

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

    def __post_init__(self) -> None:
        check_k(num_experts=self.num_experts + self.num_zero_experts, min_k=0, max_k=self.k)

    @property
    def max_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.k

    @property
    def min_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return max(0, self.k - self.num_zero_experts)

    @property
    def traits(self) -> Traits:
        return Traits(
            causal=True, batch_invariant=True, may_leave_token_empty=self.min_k == 0, budget="none"
        )

    def init(self, key: Array, d_model: int) -> Params:
        classes = self.num_experts + self.num_zero_experts
        return self.gate.init(key, d_model=d_model, num_experts=classes)

    def init_state(self) -> BiasState:
        classes = self.num_experts + self.num_zero_experts
        return BiasState(expert_bias=jnp.zeros((classes,), jnp.float32))

    def __call__(
        self,
        params: Params,
        state: BiasState,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing:
        return _with_free_classes(
            self.gate(params, x, key=key, token_mask=token_mask), state.expert_bias, self.scoring,
            experts=self.num_experts, k=self.k, identity=True, token_mask=token_mask,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthRouter(Router):
    """Zaya's router: a small network whose hidden state is carried from layer to layer.

    ``h = x @ down + scale * (h of the MoE layer before)``; RMS norm and two GELU layers lead to E + 1
    logits, the last of which means "no expert". ``context["router_states"]`` float[T, H] is the
    hidden state of the layer before; without it that term is left out (as in the first layer).
    ``hidden`` returns this layer's state for the next.

    Args:
        num_experts: E.
        k: choices per token.
        hidden_size: H.
        norm_eps: eps of the norm.
        gate: unused, present because every rule has one.
        scoring: logits to scores and weights.

    Example:
        >>> router = DepthRouter(num_experts=4, k=1, hidden_size=6)
        >>> params = router.init(jax.random.key(0), 16)
        >>> router(params, router.init_state(), jnp.ones((5, 16))).router_logits.shape
        (5, 4)
    """

    num_experts: int
    k: int
    hidden_size: int
    norm_eps: float = 1e-5
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        check_k(num_experts=self.num_experts, min_k=0, max_k=self.k)

    @property
    def max_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.k

    @property
    def min_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.k - 1

    @property
    def traits(self) -> Traits:
        return Traits(
            causal=True, batch_invariant=True, may_leave_token_empty=self.k == 1, budget="none"
        )

    def init(self, key: Array, d_model: int) -> Params:
        h, keys = self.hidden_size, jax.random.split(key, 4)
        shapes = {
            "down": (d_model, h),
            "fc1": (h, h),
            "fc2": (h, h),
            "kernel": (h, self.num_experts + 1),
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
        return BiasState(expert_bias=jnp.zeros((self.num_experts + 1,)).at[-1].set(-1.0))

    def hidden(self, params: Params, x: Array, context: Context | None = None) -> Array:
        """f32[T, H]: the state that the next MoE layer takes as ``context["router_states"]``."""
        h = _affine(x, params["down"], params["down_bias"])
        if context is not None and "router_states" in context:
            before = context["router_states"].astype(jnp.float32).reshape(h.shape)
            h = h + before * params["depth_scale"].astype(jnp.float32)[None, :]
        return h

    def __call__(
        self,
        params: Params,
        state: BiasState,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing:
        check_array(
            "x", x, "T D", sizes={"D": params["down"].shape[0]},
            fix="Pass hidden states flattened to [tokens, d_model].",
        )  # fmt: skip
        if token_mask is not None:  # a NaN in padding would survive in the kernel's gradient
            check_array(
                "token_mask", token_mask, "T", kind="bool", sizes={"T": x.shape[0]},
                fix="Pass bool[T], True for real tokens, flattened like x.",
            )  # fmt: skip
            x = jnp.where(token_mask[:, None], x, jnp.zeros((), x.dtype))
        h = rms_norm(self.hidden(params, x, context), self.norm_eps)
        h = h * params["norm"].astype(jnp.float32)[None, :]
        for name in ("fc1", "fc2"):
            h = jax.nn.gelu(_affine(h, params[name], params[f"{name}_bias"]), approximate=False)
        logits = _affine(h, params["kernel"], None)
        return _with_free_classes(
            logits, state.expert_bias, self.scoring,
            experts=self.num_experts, k=self.k, identity=False, token_mask=token_mask,
        )  # fmt: skip


def _affine(x: Array, kernel: Array, bias: Array | None) -> Array:
    out = jnp.matmul(
        x.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return out if bias is None else out + bias.astype(jnp.float32)[None, :]
