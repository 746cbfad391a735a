"""Routing rules that one published model needs and ``Scoring`` cannot say.

They follow the contract of ``moe_jax.routers.base.Router``. What a rule needs beyond x comes in
``context``, by the names in each docstring.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from moe_jax.difficulty import Context
from moe_jax.interop.experts import rms_norm
from moe_jax.logits import Gate
from moe_jax.routers.base import Router, Traits
from moe_jax.scoring import Scoring
from moe_jax.selection import build_routing, top_slots
from moe_jax.types import Array, Params, Routing, check_array, check_k, pytree


@pytree
class NoState:
    """A rule that learns nothing without gradients."""


@pytree
class BiasState:
    expert_bias: Array  # f32[E] or f32[E + Z], added for selection only


@pytree
class TableState:
    table: Array  # i32[V, K]: the experts of each token id


def _compact(keep: Array, *slots: Array) -> tuple[Array, ...]:
    """Moves the kept slots to the front, in their order: (keep, slots...), each [T, K]."""
    place = jnp.argsort(~keep, axis=-1, stable=True)
    return tuple(jnp.take_along_axis(a, place, axis=-1) for a in (keep, *slots))


# --- capacity by position: Switch, NLLB -----------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapacityTopK(Router):
    """Top-k in which an expert serves only the first ``capacity`` tokens that ask for it.

    The Switch Transformer of transformers (capacity counted a sequence) and NLLB-MoE's top-2 (counted
    over the batch). All first choices are served before any second choice. A choice over capacity
    becomes an unused slot. So a token's routing depends on the tokens before it, and second
    choices even on later ones: compare ``moe_layer(capacity_factor=...)``, which drops in the plan.

    Args:
        num_experts: E.
        k: experts per token.
        capacity: most tokens an expert serves, in each sequence; None is no bound.
        capacity_fraction: if given, the capacity is this share of all T tokens, rounded up.
        sequence_length: T is a multiple of it, and every sequence is counted by itself; None
            counts the whole batch as one.
        prioritize: serve tokens by descending best probability instead of by position.
        norm_after: whether weights are normalised over what was kept, or before dropping.
        gate: the map to logits.
        scoring: logits to scores and weights.

    Example:
        >>> router = CapacityTopK(num_experts=2, k=1, capacity=1)
        >>> params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
        >>> x = jnp.array([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> router(params, router.init_state(), x).expert_indices[:, 0].tolist()
        [0, 2, 1]
    """

    num_experts: int
    k: int = 1
    capacity: int | None = None
    capacity_fraction: float | None = None
    sequence_length: int | None = None
    prioritize: bool = False
    norm_after: bool = True
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        check_k(num_experts=self.num_experts, min_k=0, max_k=self.k)
        self.scoring.check(num_experts=self.num_experts, max_k=self.k)
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"capacity: expected at least 1 or None, got {self.capacity}.")
        if self.prioritize and self.sequence_length is not None:
            raise ValueError(
                "prioritize: expected sequence_length=None, since tokens are ranked over the whole "
                f"batch, got {self.sequence_length}."
            )

    @property
    def max_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.k

    @property
    def min_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 0

    @property
    def traits(self) -> Traits:
        causal = self.k == 1 and not self.prioritize and self.capacity_fraction is None
        return Traits(
            causal=causal, batch_invariant=False, may_leave_token_empty=True, budget="none"
        )

    def init_state(self) -> NoState:
        return NoState()

    def __call__(
        self,
        params: Params,
        state: NoState,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing:
        logits = self.gate(params, x, key=key, token_mask=token_mask)
        scores = self.scoring.scores(logits)
        bias = jnp.zeros((self.num_experts,), jnp.float32)
        indices, _ = top_slots(self.scoring.selection_scores(logits, scores, bias), self.k)
        slot_scores = jnp.take_along_axis(scores, indices, axis=-1)
        asked = jnp.ones(indices.shape, bool)
        if token_mask is not None:
            asked = asked & token_mask[:, None]
        keep = asked & (self._position(indices, asked, scores) < self._bound(x.shape[0]))
        # A token may keep one expert of two; starving the router is the published rule's own doing.
        weights = self.scoring.weights(
            slot_scores, keep if self.norm_after else asked, min_k=max(self.k, 2)
        )
        keep, indices, weights = _compact(keep, indices, weights)
        return build_routing(
            logits=logits, probs=self.scoring.probs(scores), indices=indices, weights=weights,
            keep=keep, token_mask=token_mask,
        )  # fmt: skip

    def _bound(self, tokens: int) -> int:
        if self.capacity_fraction is not None:
            return math.ceil(self.capacity_fraction * tokens)
        return tokens if self.capacity is None else self.capacity

    def _position(self, indices: Array, asked: Array, scores: Array) -> Array:
        """i32[T, K]: how many were served before, by the same expert in the same sequence."""
        tokens, k = indices.shape
        length = tokens if self.sequence_length is None else self.sequence_length
        if tokens % length:
            raise ValueError(
                f"x: expected a multiple of sequence_length={length} tokens, got {tokens}. "
                "Pass whole sequences, flattened."
            )
        experts = jnp.arange(self.num_experts, dtype=jnp.int32)
        hits = (indices[:, :, None] == experts[None, None, :]) & asked[:, :, None]
        hits = hits.astype(jnp.int32)
        if self.prioritize:
            order = jnp.argsort(-scores.max(axis=-1), stable=True)
            hits = hits[order]
        hits = hits.reshape(tokens // length, length, k, self.num_experts)
        before = jnp.cumsum(hits, axis=1) - hits
        earlier_slots = jnp.cumsum(hits.sum(axis=1), axis=1) - hits.sum(axis=1)
        before = (before + earlier_slots[:, None]).reshape(tokens, k, self.num_experts)
        if self.prioritize:
            before = before[jnp.argsort(order)]
        return jnp.take_along_axis(before, indices[:, :, None], axis=-1)[:, :, 0]


# --- experts by token id: DeepSeek-V4 -------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTable(Router):
    """A token's experts are looked up by its id; only their weights depend on x (DeepSeek-V4).

    ``context["token_ids"]`` int[T] is required. The table is in the state.

    Args:
        num_experts: E.
        k: experts per token.
        vocab_size: V.
        gate: the map to logits.
        scoring: logits to scores and weights.

    Example:
        >>> router = TokenTable(num_experts=4, k=1, vocab_size=3)
        >>> state = TableState(table=jnp.array([[2], [0], [3]]))
        >>> params = router.init(jax.random.key(0), 8)
        >>> ids = {"token_ids": jnp.array([1, 2])}
        >>> router(params, state, jnp.ones((2, 8)), context=ids).expert_indices.tolist()
        [[0], [3]]
    """

    num_experts: int
    k: int
    vocab_size: int
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        check_k(num_experts=self.num_experts, min_k=self.k, max_k=self.k)

    @property
    def max_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.k

    @property
    def min_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.k

    @property
    def traits(self) -> Traits:
        return Traits(
            causal=True, batch_invariant=True, may_leave_token_empty=False, budget="exact"
        )

    def init_state(self) -> TableState:
        """Round robin: id v uses experts v, v + 1, ... modulo E."""
        ids = jnp.arange(self.vocab_size, dtype=jnp.int32)[:, None]
        slots = jnp.arange(self.k, dtype=jnp.int32)[None, :]
        return TableState(table=(ids + slots) % self.num_experts)

    def __call__(
        self,
        params: Params,
        state: TableState,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing:
        if context is None or "token_ids" not in context:
            raise ValueError(
                "context: expected 'token_ids' int[T], since this layer's experts are looked up by "
                'token id, got none. Pass context={"token_ids": ids}.'
            )
        ids = context["token_ids"].reshape(-1)
        check_array(
            "token_ids", ids, "T", kind="int", sizes={"T": x.shape[0]}, fix="Pass one id a token."
        )
        logits = self.gate(params, x, key=key, token_mask=token_mask)
        scores = self.scoring.scores(logits)
        indices = state.table[ids].astype(jnp.int32)
        slot_scores = jnp.take_along_axis(scores, indices, axis=-1)
        best = jnp.argsort(-jax.lax.stop_gradient(slot_scores), axis=-1, stable=True)
        indices = jnp.take_along_axis(indices, best, axis=-1)
        slot_scores = jnp.take_along_axis(slot_scores, best, axis=-1)
        keep = jnp.ones(indices.shape, bool)
        return build_routing(
            logits=logits, probs=self.scoring.probs(scores), indices=indices,
            weights=self.scoring.weights(slot_scores, keep, min_k=self.k),
            keep=keep, token_mask=token_mask,
        )  # fmt: skip


# --- one expert at a time: Phi-3.5-MoE ------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseMixer(Router):
    """SparseMixer-v2 at evaluation, the rule of Phi-3.5-MoE (Liu et al. 2024, arXiv:2409.12136).

    The best expert is taken, then the best of the rest; each has a softmax of its own over the
    logits within a relative distance of ``2 * eps`` from the best. So a token's weights need not
    add up to 1. The training rule (sampled experts, Heun's gradient estimate) is not part of this:
    gradients are those of the evaluation rule, and a key is refused.

    Args:
        num_experts: E.
        k: experts per token (2 in the published models).
        eps: ``router_jitter_noise`` of the config.
        gate: the map to logits.

    Example:
        >>> router = SparseMixer(num_experts=8)
        >>> params = router.init(jax.random.key(0), 16)
        >>> router(params, NoState(), jnp.ones((5, 16))).expert_indices.shape
        (5, 2)
    """

    num_experts: int
    k: int = 2
    eps: float = 0.01
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        check_k(num_experts=self.num_experts, min_k=self.k, max_k=self.k)

    @property
    def max_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.k

    @property
    def min_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.k

    @property
    def traits(self) -> Traits:
        return Traits(
            causal=True, batch_invariant=True, may_leave_token_empty=False, budget="exact"
        )

    def init_state(self) -> NoState:
        return NoState()

    def __call__(
        self,
        params: Params,
        state: NoState,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing:
        if key is not None:
            raise ValueError(
                "key: expected None, since SparseMixer is the evaluation rule only, got a key. "
                "To train, use TopK on the same parameters."
            )
        logits = self.gate(params, x, token_mask=token_mask)
        indices, _ = top_slots(logits, self.k)
        experts = jnp.arange(self.num_experts, dtype=jnp.int32)
        left = jnp.ones(logits.shape, bool)
        weights = []
        for slot in range(self.k):
            chosen = indices[:, slot : slot + 1]
            best = jnp.take_along_axis(logits, chosen, axis=-1)
            # The distance is relative to |logit|, though at least to the best logit, as published.
            size = jnp.maximum(jnp.abs(logits), best)
            near = jax.lax.stop_gradient(~((best - logits) / size > 2 * self.eps))
            probs = jax.nn.softmax(jnp.where(left & near, logits, -jnp.inf), axis=-1)
            weights.append(jnp.take_along_axis(probs, chosen, axis=-1))
            left = left & (experts[None, :] != chosen)
        return build_routing(
            logits=logits, probs=jax.nn.softmax(logits, axis=-1), indices=indices,
            weights=jnp.concatenate(weights, axis=-1),
            keep=jnp.ones(indices.shape, bool), token_mask=token_mask,
        )  # fmt: skip


# --- classes that cost nothing: LongCat, Zaya -----------------------------------------------


def _with_free_classes(
    logits: Array, bias: Array, scoring: Scoring, *, experts: int, k: int, identity: bool,
    token_mask: Array | None,
) -> Routing:  # fmt: skip
    """Top-k over E experts and Z free classes; a free class fills no slot.

    Returns a routing over the E experts: logits and probabilities are theirs alone, the latter
    divided by their sum. With ``identity`` the weight of free classes goes to ``residual_weight``.
    """
    scores = scoring.scores(logits)
    indices, _ = top_slots(scoring.selection_scores(logits, scores, bias), k)
    slot_scores = jnp.take_along_axis(scores, indices, axis=-1)
    weights = scoring.weights(slot_scores, jnp.ones(indices.shape, bool), min_k=k)
    keep = indices < experts
    residual = jnp.where(keep, 0.0, weights).sum(axis=-1)
    keep, indices, weights = _compact(keep, indices, weights)
    probs = scoring.probs(scores)[:, :experts]
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
