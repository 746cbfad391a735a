"""Routing rules and expert functions from the settings of a config, one function for a family.

Formulas were read in the modeling files of transformers 5.23.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from moe_jax.experts import ExpertFn
from moe_jax.interop.expert_functions import GatedExpert, activation_name, feed_forward
from moe_jax.interop.model_config import HFConfig
from moe_jax.interop.rules import (
    CapacityTopK,
    DepthRouter,
    JointShared,
    ProductKeys,
    SparseMixer,
    TokenTable,
    ZeroExperts,
)
from moe_jax.routers import Router, TopK
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring


def unsupported(c: HFConfig, key: str, value: Any, wanted: str) -> ValueError:
    """The error for a value of a key that the family does not implement."""
    return ValueError(
        f"config of {c.model_type!r}: expected {key} to be {wanted}, got {value!r}. If a model "
        "was trained with that, this library has no rule for it."
    )


# --- routing rules, one function a family ---------------------------------------------------


def top_k(c: HFConfig, *, gate: Gate | None = None, expert_scale: bool = False, **scoring) -> TopK:
    """Top-k with the sizes of the config; ``scoring`` are the fields of ``Scoring``."""
    return TopK(
        num_experts=c.get("num_experts"),
        k=c.get("k"),
        gate=gate or jittered(c),
        scoring=Scoring(**scoring),
        use_expert_scale=expert_scale,
    )


def jittered(c: HFConfig) -> Gate:
    """Input jitter, where the family has it: only ever used with a key."""
    stated = c.key_of("jitter") is not None or "jitter" in c.defaults
    return Gate(jitter=float(c.get("jitter"))) if stated else Gate()


def norm(c: HFConfig, kind: str) -> str:
    """The norm ``kind`` where the config normalises weights, else ``"none"``."""
    return kind if c.get("norm") else "none"


def stated_scale(c: HFConfig) -> float:
    """For blocks that scale their routed output after the weights were applied."""
    return float(c.get("scale"))


def softmax_sum(c: HFConfig) -> Router:
    """Softmax, top-k, weights divided by their sum."""
    return top_k(c, norm="sum")


def softmax_optional(c: HFConfig) -> Router:
    """Softmax, top-k; weights divided by their sum if the config says so."""
    return top_k(c, norm=norm(c, "sum"))


def softmax_raw(c: HFConfig) -> Router:
    """Softmax, top-k, weights as they are."""
    return top_k(c)


def dbrx(c: HFConfig) -> Router:
    """Softmax, top-k, weights divided by their p-norm."""
    p = c.get("moe_normalize_expert_weights")
    return top_k(c, norm="none" if p is None else "p", norm_p=1.0 if p is None else float(p))


def gemma4(c: HFConfig) -> Router:
    """Softmax of the logits of a normalised x; a learned factor on the weight of each expert."""
    gate = Gate(input_norm_eps=c.get("norm_eps"), multiplier=c.get("hidden_size") ** -0.5)
    return top_k(c, gate=gate, norm="sum", expert_scale=True)


def logits_softmax(c: HFConfig) -> Router:
    """Top-k of the logits, softmax over the chosen."""
    return top_k(c, score="identity", post="softmax")


def gpt_oss(c: HFConfig) -> Router:
    """As ``logits_softmax``, with a bias on the logits."""
    return top_k(c, gate=Gate(use_bias=True), score="identity", post="softmax")


def privacy_filter(c: HFConfig) -> Router:
    """As ``gpt_oss``, with weights divided by k."""
    # Weights are divided by k here, and the block multiplies its output by k again.
    gate = Gate(use_bias=True)
    return top_k(c, gate=gate, score="identity", post="softmax", scale=1.0 / c.get("k"))


def cohere2(c: HFConfig) -> Router:
    """Top-k of the logits, then softmax over the chosen or sigmoid."""
    kind, norm_of_sigmoid = c.get("score"), norm(c, "sum")
    if kind == "softmax":  # sums to 1 with and without a norm
        return logits_softmax(c)
    if kind == "sigmoid":
        return top_k(c, score="identity", post="sigmoid", norm=norm_of_sigmoid)
    raise unsupported(c, c.key_of("score") or "expert_selection_fn", kind, "'softmax' or 'sigmoid'")


def llama4(c: HFConfig) -> Router:
    """Top-k of the logits, then sigmoid."""
    return top_k(c, score="identity", post="sigmoid")


def grouped(c: HFConfig, **scoring) -> Router:
    """Top-k inside the best groups; no groups where the config has null."""
    groups, top_groups = c.get("groups"), c.get("top_groups")
    if groups is None:
        groups = top_groups = 1
    return top_k(c, num_groups=groups, top_groups=top_groups, **scoring)


def deepseek_v3(c: HFConfig) -> Router:
    """Sigmoid, selected with a bias inside the best groups."""
    return grouped(c, score="sigmoid", norm=norm(c, "sum_eps"), scale=c.get("scale"))


def axk2(c: HFConfig) -> Router:
    """As DeepSeek-V3, but experts outside the best groups score 0 and may win against a negative."""
    return grouped(
        c, score="sigmoid", norm=norm(c, "sum_eps"), scale=c.get("scale"), group_fill="zero"
    )


def beam(c: HFConfig) -> Router:
    """As DeepSeek-V3; the scale multiplies the output instead of the weights."""
    return grouped(c, score="sigmoid", norm=norm(c, "sum_eps"))


def deepseek_v2(c: HFConfig) -> Router:
    """Softmax, top-k, inside the best groups (by their best expert) if the config says so."""
    method = c.get("topk_method")
    if method == "greedy":
        return top_k(c, scale=c.get("scale"))
    if method == "group_limited_greedy":
        return grouped(c, scale=c.get("scale"), group_score="max", group_fill="zero")
    raise unsupported(
        c,
        "topk_method",
        method,
        "'greedy' or 'group_limited_greedy'; 'noaux_tc' is model type deepseek_v3",
    )


def mistral4(c: HFConfig) -> Router:
    """Softmax, top-k inside the best groups; experts outside score 0."""
    return grouped(c, norm=norm(c, "sum_eps"), scale=c.get("scale"), group_fill="zero")


def sigmoid(c: HFConfig) -> Router:
    """Sigmoid, selected with a bias, weights divided by their sum."""
    return top_k(c, score="sigmoid", norm="sum")


def sigmoid_eps(c: HFConfig) -> Router:
    """As ``sigmoid``, with an eps in the sum and a scale."""
    return top_k(c, score="sigmoid", norm="sum_eps", scale=c.get("scale"))


def flint(c: HFConfig) -> Router:
    """Sigmoid, selected without a bias."""
    return top_k(c, score="sigmoid", norm=norm(c, "sum"))


def lfm2(c: HFConfig) -> Router:
    """Sigmoid, selected with a bias if the config says so."""
    return top_k(c, score="sigmoid", norm=norm(c, "sum_eps"), norm_eps=1e-6, scale=c.get("scale"))


def laguna(c: HFConfig) -> Router:
    """Sigmoid of softcapped logits, selected with a bias."""
    cap = c.get("softcap")
    return top_k(c, gate=Gate(softcap=cap if cap > 0 else None), score="sigmoid", norm="sum")


def muse_spark(c: HFConfig) -> Router:
    """Sigmoid of scaled logits, selected with a bias."""
    gate = Gate(multiplier=c.get("output_multiplier"))
    return top_k(
        c, gate=gate, score="sigmoid", norm="sum_eps", norm_eps=1e-15, scale=c.get("scale")
    )


def scored(c: HFConfig) -> Scoring:
    """DeepSeek-V4 and Inkling 2: the score's name is in the config."""
    score = c.get("score")
    if score not in ("sigmoid", "sqrtsoftplus"):
        raise unsupported(
            c, c.key_of("score") or "scoring_func", score, "'sigmoid' or 'sqrtsoftplus'"
        )
    return Scoring(score=score, norm="sum_eps", scale=c.get("scale"))


def deepseek_v4(c: HFConfig) -> Router:
    """The score that the config names, selected with a bias."""
    return TopK(num_experts=c.get("num_experts"), k=c.get("k"), scoring=scored(c))


def hash_router(c: HFConfig) -> Router:
    """DeepSeek-V4's first layers, which have a table of token ids among their tensors."""
    return TokenTable(
        num_experts=c.get("num_experts"),
        k=c.get("k"),
        vocab_size=c.get("vocab_size"),
        scoring=scored(c),
    )


def kolibri1(c: HFConfig) -> Router:
    """Sigmoid; the selection bias is added to the logit instead of the score."""
    return top_k(c, score="sigmoid", select_by="logit", norm=norm(c, "sum"))


def ernie(c: HFConfig) -> Router:
    """Softmax, selected with a bias; weights divided by at least ``moe_norm_min``."""
    return top_k(c, norm="clamp", norm_eps=c.get("moe_norm_min"))


def longcat(c: HFConfig) -> Router:
    """Softmax over experts and identity experts, selected with a bias."""
    scoring, zero = Scoring(scale=c.get("scale")), c.get("zero_experts")
    return ZeroExperts(
        num_experts=c.get("num_experts"), num_zero_experts=zero or 0, k=c.get("k"), scoring=scoring
    )


def zaya(c: HFConfig) -> Router:
    """A network of its own over experts and "no expert", selected with a bias."""
    return DepthRouter(
        num_experts=c.get("num_experts"),
        k=c.get("k"),
        hidden_size=c.get("router_hidden_size"),
        norm_eps=c.get("norm_eps"),
    )


def inkling(c: HFConfig) -> Router:
    """Sigmoid; routed and shared experts share one budget of weight."""
    if not c.get("shared_expert_sink"):
        raise unsupported(c, "shared_expert_sink", c.get("shared_expert_sink"), "True")
    return JointShared(
        num_experts=c.get("num_experts"),
        num_shared=c.get("shared"),
        k=c.get("k"),
        scale=c.get("scale"),
    )


def doge(c: HFConfig) -> Router:
    """Top-k over pairs of keys."""
    return ProductKeys(num_experts=c.get("num_experts"), k=c.get("k"))


def phimoe(c: HFConfig) -> Router:
    """SparseMixer."""
    return SparseMixer(
        num_experts=c.get("num_experts"),
        k=c.get("k"),
        eps=c.get("jitter"),
        gate=Gate(jitter=float(c.get("input_jitter_noise"))),
    )


def switch(c: HFConfig) -> Router:
    """Top-1 with a capacity counted by sequence."""
    gate = dataclasses.replace(jittered(c), use_bias=bool(c.get("router_bias")))
    return CapacityTopK(
        num_experts=c.get("num_experts"), k=1, capacity=c.get("expert_capacity"), gate=gate
    )


def nllb(c: HFConfig) -> Router:
    """Top-2 with a capacity counted over the batch."""
    if c.get("second_expert_policy") != "all":
        raise unsupported(c, "second_expert_policy", c.get("second_expert_policy"), "'all'")
    fraction = c.get("moe_eval_capacity_token_fraction")
    return CapacityTopK(
        num_experts=c.get("num_experts"),
        k=2,
        gate=Gate(use_bias=bool(c.get("router_bias"))),
        capacity=c.get("expert_capacity"),
        capacity_fraction=fraction if fraction > 0 else None,
        prioritize=c.get("batch_prioritized_routing"),
        norm_after=not c.get("normalize_router_prob_before_dropping"),
        # The reference divides by at least the float32 epsilon.
        scoring=Scoring(norm="clamp", norm_eps=2.0**-23),
    )


# --- experts --------------------------------------------------------------------------------


def plain(c: HFConfig) -> ExpertFn:
    """A gated feed-forward with the activation of the config."""
    return feed_forward(activation_name(c.get("activation"), model_type=c.model_type))


def ungated(c: HFConfig) -> ExpertFn:
    """A feed-forward without a gate."""
    name = activation_name(c.get("activation"), model_type=c.model_type)
    return feed_forward(name, gated=False)


def silu(c: HFConfig) -> ExpertFn:
    """A gated feed-forward with SiLU, whatever the config says of other layers."""
    return feed_forward("silu")


def clamped_swish(c: HFConfig) -> ExpertFn:
    """``x * sigmoid(alpha * x)``, bounded, with up shifted by 1 (gpt-oss)."""
    alpha, limit = c.get("swiglu_alpha"), c.get("swiglu_limit")
    return GatedExpert(activation="swish", alpha=alpha, limit=limit, up_shift=1.0)


def clamped_silu(c: HFConfig) -> ExpertFn:
    """SiLU with bounds on gate and up."""
    return GatedExpert(activation="silu", limit=c.get("swiglu_limit"))


def clamped_act(c: HFConfig) -> ExpertFn:
    """The activation of the config with bounds on gate and up."""
    name = activation_name(c.get("activation"), model_type=c.model_type)
    return GatedExpert(activation=name, limit=c.get("swiglu_limit"))


def step3(key: str) -> Callable[[HFConfig], ExpertFn]:
    """The expert whose bound the config states under ``key``, one value a layer."""

    def expert(c: HFConfig) -> ExpertFn:
        name = activation_name(c.get("activation"), model_type=c.model_type)
        limit = c.get(key) or math.inf  # 0 and nothing both mean "no bound"
        return GatedExpert(activation=name, limit=limit, limit_after=True)

    return expert


def inkling2(c: HFConfig) -> ExpertFn:
    """SiLU with softcaps on gate and up."""
    return GatedExpert(gate_softcap=c.get("mlp_gate_softcap"), up_softcap=c.get("mlp_up_softcap"))


def muse_expert(c: HFConfig) -> ExpertFn:
    """The activation of the config, and a norm after the last projection."""
    name = activation_name(c.get("activation"), model_type=c.model_type)
    return GatedExpert(activation=name, post_norm_eps=c.get("post_norm_eps"))
