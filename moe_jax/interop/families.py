"""Which published model routes how: one table from model type to rule.

Read in the modeling files of transformers 5.23 and checked against their numbers (tests/goldens/hf).
Defaults are those of the config classes there. A new family is a function of ten lines or none, and a
row; a new member of a family is a name in a row.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.experts import ExpertFn
from moe_jax.interop.config import HFConfig, flatten
from moe_jax.interop.experts import GatedExpert, activation_name, feed_forward
from moe_jax.interop.rules import CapacityTopK, DepthRouter, SparseMixer, TokenTable, ZeroExperts
from moe_jax.logits import Gate
from moe_jax.routers import Router, TopK
from moe_jax.scoring import Scoring

# --- routing rules, one function a family ---------------------------------------------------


def _top_k(c: HFConfig, *, gate: Gate | None = None, expert_scale: bool = False, **scoring) -> TopK:
    return TopK(
        num_experts=c.get("num_experts"), k=c.get("k"), gate=gate or _jittered(c),
        scoring=Scoring(**scoring), use_expert_scale=expert_scale,
    )  # fmt: skip


def _jittered(c: HFConfig) -> Gate:
    """Input jitter, where the family has it: only ever used with a key."""
    stated = c.key_of("jitter") is not None or "jitter" in c.defaults
    return Gate(jitter=float(c.get("jitter"))) if stated else Gate()


def _norm(c: HFConfig, kind: str) -> str:
    return kind if c.get("norm") else "none"


def _softmax_sum(c: HFConfig) -> Router:
    return _top_k(c, norm="sum")


def _softmax_optional(c: HFConfig) -> Router:
    return _top_k(c, norm=_norm(c, "sum"))


def _softmax_raw(c: HFConfig) -> Router:
    return _top_k(c)


def _dbrx(c: HFConfig) -> Router:
    p = c.get("moe_normalize_expert_weights")
    return _top_k(c, norm="none" if p is None else "p", norm_p=1.0 if p is None else float(p))


def _gemma4(c: HFConfig) -> Router:
    gate = Gate(input_norm_eps=c.get("norm_eps"), multiplier=c.get("hidden_size") ** -0.5)
    return _top_k(c, gate=gate, norm="sum", expert_scale=True)


def _logits_softmax(c: HFConfig) -> Router:
    return _top_k(c, score="identity", post="softmax")


def _gpt_oss(c: HFConfig) -> Router:
    return _top_k(c, gate=Gate(use_bias=True), score="identity", post="softmax")


def _privacy_filter(c: HFConfig) -> Router:
    # Weights are divided by k here, and the block multiplies its output by k again.
    gate = Gate(use_bias=True)
    return _top_k(c, gate=gate, score="identity", post="softmax", scale=1.0 / c.get("k"))


def _cohere2(c: HFConfig) -> Router:
    kind = c.get("expert_selection_fn")
    if kind == "softmax":
        return _logits_softmax(c)
    if kind == "sigmoid":
        return _top_k(c, score="identity", post="sigmoid", norm=_norm(c, "sum"))
    raise _unsupported(c, "expert_selection_fn", kind, "'softmax' or 'sigmoid'")


def _llama4(c: HFConfig) -> Router:
    return _top_k(c, score="identity", post="sigmoid")


def _grouped(c: HFConfig, **scoring) -> Router:
    groups, top_groups = c.get("groups"), c.get("top_groups")
    if groups is None:
        groups = top_groups = 1
    return _top_k(c, num_groups=groups, top_groups=top_groups, **scoring)


def _deepseek_v3(c: HFConfig) -> Router:
    return _grouped(c, score="sigmoid", norm=_norm(c, "sum_eps"), scale=c.get("scale"))


def _axk2(c: HFConfig) -> Router:
    """As DeepSeek-V3, but experts outside the best groups score 0 and may win against a negative."""
    return _grouped(
        c, score="sigmoid", norm=_norm(c, "sum_eps"), scale=c.get("scale"), group_fill="zero"
    )


def _beam(c: HFConfig) -> Router:
    return _grouped(c, score="sigmoid", norm=_norm(c, "sum_eps"))


def _deepseek_v2(c: HFConfig) -> Router:
    method = c.get("topk_method")
    if method == "greedy":
        return _top_k(c, scale=c.get("scale"))
    if method == "group_limited_greedy":
        return _grouped(c, scale=c.get("scale"), group_score="max", group_fill="zero")
    raise _unsupported(
        c, "topk_method", method,
        "'greedy' or 'group_limited_greedy'; 'noaux_tc' is model type deepseek_v3",
    )  # fmt: skip


def _mistral4(c: HFConfig) -> Router:
    return _grouped(c, norm=_norm(c, "sum_eps"), scale=c.get("scale"), group_fill="zero")


def _sigmoid(c: HFConfig) -> Router:
    return _top_k(c, score="sigmoid", norm="sum")


def _sigmoid_eps(c: HFConfig) -> Router:
    return _top_k(c, score="sigmoid", norm="sum_eps", scale=c.get("scale"))


def _flint(c: HFConfig) -> Router:
    return _top_k(c, score="sigmoid", norm=_norm(c, "sum"))


def _lfm2(c: HFConfig) -> Router:
    return _top_k(c, score="sigmoid", norm=_norm(c, "sum_eps"), norm_eps=1e-6, scale=c.get("scale"))


def _laguna(c: HFConfig) -> Router:
    cap = c.get("moe_router_logit_softcapping")
    return _top_k(c, gate=Gate(softcap=cap if cap > 0 else None), score="sigmoid", norm="sum")


def _muse_spark(c: HFConfig) -> Router:
    gate = Gate(multiplier=c.get("output_multiplier"))
    return _top_k(
        c, gate=gate, score="sigmoid", norm="sum_eps", norm_eps=1e-15, scale=c.get("scale")
    )


def _scored(c: HFConfig) -> Scoring:
    """DeepSeek-V4 and Inkling 2: the score's name is in the config."""
    score = c.get("scoring_func")
    if score not in ("softmax", "sigmoid", "sqrtsoftplus"):
        raise _unsupported(c, "scoring_func", score, "softmax, sigmoid or sqrtsoftplus")
    if score == "softmax":
        raise _unsupported(c, "scoring_func", score, "'sigmoid' or 'sqrtsoftplus'")
    return Scoring(score=score, norm="sum_eps", scale=c.get("scale"))


def _deepseek_v4(c: HFConfig) -> Router:
    return TopK(num_experts=c.get("num_experts"), k=c.get("k"), scoring=_scored(c))


def hash_router(c: HFConfig) -> Router:
    """DeepSeek-V4's first layers, told by their table of token ids among the tensors."""
    return TokenTable(
        num_experts=c.get("num_experts"), k=c.get("k"), vocab_size=c.get("vocab_size"),
        scoring=_scored(c),
    )  # fmt: skip


def _kolibri1(c: HFConfig) -> Router:
    return _top_k(c, score="sigmoid", select_by="logit", norm=_norm(c, "sum"))


def _ernie(c: HFConfig) -> Router:
    return _top_k(c, norm="clamp", norm_eps=c.get("moe_norm_min"))


def _longcat(c: HFConfig) -> Router:
    scoring, zero = Scoring(scale=c.get("scale")), c.get("zero_experts")
    return ZeroExperts(
        num_experts=c.get("num_experts"), num_zero_experts=zero or 0, k=c.get("k"), scoring=scoring
    )


def _zaya(c: HFConfig) -> Router:
    return DepthRouter(
        num_experts=c.get("num_experts"), k=c.get("k"), hidden_size=c.get("router_hidden_size"),
        norm_eps=c.get("norm_eps"),
    )  # fmt: skip


def _phimoe(c: HFConfig) -> Router:
    return SparseMixer(num_experts=c.get("num_experts"), k=c.get("k"), eps=c.get("jitter"))


def _switch(c: HFConfig) -> Router:
    gate = dataclasses.replace(_jittered(c), use_bias=bool(c.get("router_bias")))
    return CapacityTopK(
        num_experts=c.get("num_experts"), k=1, capacity=c.get("expert_capacity"), gate=gate
    )


def _nllb(c: HFConfig) -> Router:
    if c.get("second_expert_policy") != "all":
        raise _unsupported(c, "second_expert_policy", c.get("second_expert_policy"), "'all'")
    fraction = c.get("moe_eval_capacity_token_fraction")
    return CapacityTopK(
        num_experts=c.get("num_experts"), k=2, gate=Gate(use_bias=bool(c.get("router_bias"))),
        capacity=c.get("expert_capacity"),
        capacity_fraction=fraction if fraction > 0 else None,
        prioritize=c.get("batch_prioritized_routing"),
        norm_after=not c.get("normalize_router_prob_before_dropping"),
        scoring=Scoring(norm="clamp", norm_eps=2.0**-23),
    )  # fmt: skip


# --- experts --------------------------------------------------------------------------------


def _plain(c: HFConfig) -> ExpertFn:
    return feed_forward(activation_name(c.get("activation"), model_type=c.model_type))


def _ungated(c: HFConfig) -> ExpertFn:
    name = activation_name(c.get("activation"), model_type=c.model_type)
    return feed_forward(name, gated=False)


def _silu(c: HFConfig) -> ExpertFn:
    return feed_forward("silu")


def _clamped_swish(c: HFConfig) -> ExpertFn:
    alpha, limit = c.get("swiglu_alpha"), c.get("swiglu_limit")
    return GatedExpert(activation="swish", alpha=alpha, limit=limit, up_shift=1.0)


def _clamped_silu(c: HFConfig) -> ExpertFn:
    return GatedExpert(activation="silu", limit=c.get("swiglu_limit"))


def _clamped_act(c: HFConfig) -> ExpertFn:
    name = activation_name(c.get("activation"), model_type=c.model_type)
    return GatedExpert(activation=name, limit=c.get("swiglu_limit"))


def _step3(key: str) -> Callable[[HFConfig], ExpertFn]:
    def expert(c: HFConfig) -> ExpertFn:
        name = activation_name(c.get("activation"), model_type=c.model_type)
        limit = c.get(key) or math.inf  # 0 and nothing both mean "no bound"
        return GatedExpert(activation=name, limit=limit, limit_after=True)

    return expert


def _inkling2(c: HFConfig) -> ExpertFn:
    return GatedExpert(gate_softcap=c.get("mlp_gate_softcap"), up_softcap=c.get("mlp_up_softcap"))


def _muse_expert(c: HFConfig) -> ExpertFn:
    name = activation_name(c.get("activation"), model_type=c.model_type)
    return GatedExpert(activation=name, post_norm_eps=c.get("post_norm_eps"))


# --- the table ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a block of these model types is made of.

    Attributes:
        types: model types; every text model type of a composite model and the composite itself.
        router: the rule of a config.
        defaults: of the config class in transformers, by meaning (see ``interop.config.ALIASES``).
        expert: the function of one routed expert.
        shared_expert: that of the shared one, if it differs.
        shared: "none", "plain", "gated" (a sigmoid weighs it) or "optional" (if tensors are there).
        bias: whether a selection bias must be among the tensors: "none", "required", "optional".
        extras: further tensors that must be there, by canonical name (see ``interop.names``).
        output_scale: what the routed output is multiplied by, after the combine weights.
        weight_on_input: weights multiply the input of an expert instead of its output.
        interleaved: gate and up alternate in ``gate_up_proj`` instead of following each other.
        gated: whether experts have a gate projection.
        per_sequence: the rule counts by sequence, so it needs the length of one.
    """

    types: tuple[str, ...]
    router: Callable[[HFConfig], Router]
    defaults: Mapping[str, Any]
    expert: Callable[[HFConfig], ExpertFn] = _plain
    shared_expert: Callable[[HFConfig], ExpertFn] | None = None
    shared: str = "none"
    bias: str = "none"
    extras: tuple[str, ...] = ()
    output_scale: Callable[[HFConfig], float] = lambda c: 1.0
    weight_on_input: bool = False
    interleaved: bool = False
    gated: bool = True
    per_sequence: bool = False


def _rows(types: str, router: Callable[[HFConfig], Router], defaults: dict, **block) -> Family:
    return Family(
        types=tuple(types.split()),
        router=router,
        defaults={"activation": "silu", "groups": 1, "top_groups": 1, **defaults},
        **block,
    )


def _v3(types: str, *, e: int | None, k: int | None, scale: float = 1.0, norm: bool = True,
        groups: tuple[int, int] = (1, 1), router=_deepseek_v3, shared: str = "plain", **block) -> Family:  # fmt: skip
    defaults: dict[str, Any] = {"scale": scale, "norm": norm}
    defaults.update(groups=groups[0], top_groups=groups[1])
    defaults.update({n: v for n, v in (("num_experts", e), ("k", k)) if v is not None})
    return _rows(types, router, defaults, bias="required", shared=shared, **block)


def _e(e: int, k: int, **more: Any) -> dict[str, Any]:
    return {"num_experts": e, "k": k, **more}


_AFTER = {"output_scale": lambda c: c.get("scale")}

FAMILIES: tuple[Family, ...] = (
    # softmax, top-k, renormalised
    _rows("mixtral minimax", _softmax_sum, _e(8, 2)),
    _rows("qwen3_vl_moe qwen3_vl_moe_text", _softmax_sum, _e(60, 4)),
    _rows("qwen3_5_moe qwen3_5_moe_text", _softmax_sum, _e(256, 8), shared="gated"),
    _rows("hunyuan_v1_moe", _softmax_sum, _e(1, 1), shared="plain"),
    _rows("dbrx", _dbrx, _e(4, 1, moe_normalize_expert_weights=1.0)),
    _rows("gemma4 gemma4_text diffusion_gemma diffusion_gemma_text", _gemma4,
          {"hidden_size": 2304, "norm_eps": 1e-6, "activation": "gelu_pytorch_tanh"},
          extras=("router.input_scale", "router.expert_scale")),
    # softmax, top-k, renormalised if norm_topk_prob
    _rows("olmoe", _softmax_optional, _e(64, 8, norm=False)),
    _rows("flex_olmo", _softmax_optional, _e(7, 5, norm=False)),
    _rows("qwen2_moe", _softmax_optional, _e(60, 4, norm=False), shared="gated"),
    _rows("qwen3_moe", _softmax_optional, _e(128, 8, norm=False)),
    _rows("qwen3_next qwen4_exp qwen4_exp_text", _softmax_optional, _e(512, 10, norm=True),
          shared="gated"),
    _rows("mellum", _softmax_optional, _e(64, 8, norm=True)),
    _rows("qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker", _softmax_optional,
          _e(128, 8, norm=True), shared="optional"),
    _rows("qwen3_omni_moe_talker qwen3_omni_moe_talker_text", _softmax_optional,
          _e(128, 8, norm=False), shared="gated"),
    # softmax, top-k, never renormalised
    _rows("jamba", _softmax_raw, _e(16, 2)),
    # top-k of the logits, then softmax over the chosen
    _rows("granitemoe granitemoe_swa granitemoeshared granitemoehybrid", _logits_softmax, _e(8, 2)),
    _rows("aria aria_text", _logits_softmax, _e(8, 2), expert=_silu, shared="plain"),
    _rows("jetmoe", _logits_softmax, _e(8, 2), extras=("output_bias",)),
    _rows("gpt_oss", _gpt_oss, _e(128, 4, swiglu_alpha=1.702, swiglu_limit=7.0),
          expert=_clamped_swish, interleaved=True, extras=("router.bias", "experts.bias")),
    _rows("openai_privacy_filter", _privacy_filter,
          _e(128, 4, swiglu_alpha=1.702, swiglu_limit=7.0), expert=_clamped_swish,
          extras=("router.bias", "experts.bias"), output_scale=lambda c: float(c.get("k"))),
    _rows("cohere2_moe", _cohere2,
          _e(8, 2, norm=True, expert_selection_fn="softmax", shared=0,
             shared_expert_combination_strategy="average"), shared="plain"),
    # top-k of the logits, then sigmoid; the weight multiplies the expert's input
    _rows("llama4 llama4_text", _llama4, _e(16, 1), shared="plain", weight_on_input=True),
    # sigmoid, selected with a bias inside the best groups: the DeepSeek-V3 family
    _v3("deepseek_v3 deepseek_v32", e=256, k=8, scale=2.5, groups=(8, 4)),
    _v3("axk1", e=192, k=8, scale=2.5, groups=(8, 4), extras=("output_norm",)),
    _v3("axk2", e=128, k=8, scale=2.5, router=_axk2),
    _v3("bailing_hybrid", e=512, k=8, scale=2.5, groups=(8, 4)),
    _v3("dots1", e=None, k=None, norm=False),
    _v3("dots3_note dots3_note_text", e=256, k=8),
    _v3("glm4_moe glm4v_moe glm4v_moe_text", e=128, k=8),
    _v3("glm4_moe_lite", e=64, k=4, scale=1.8),
    _v3("glm_moe_dsa", e=256, k=8, scale=2.5),
    _v3("glm5_next glm5_next_text", e=288, k=8, scale=2.5, expert=_clamped_silu,
        shared_expert=_clamped_act),
    _v3("kimi_linear", e=256, k=8, scale=2.446),
    _v3("solar_open", e=128, k=8),
    _v3("exaone_moe", e=64, k=8, scale=2.5),
    _v3("mimo_v2_flash", e=256, k=8, shared="none"),
    _v3("nemotron_h", e=8, k=2, expert=_ungated, gated=False),
    _v3("hy_v4", e=256, k=8, scale=2.827, expert=_clamped_silu, shared_expert=_plain),
    _v3("beam", e=256, k=8, scale=2.5, groups=(8, 4), router=_beam, shared="none", **_AFTER),
    # the same without groups
    _rows("minimax_m2", _sigmoid, _e(256, 8), bias="required"),
    _rows("minimax_m3_vl minimax_m3_vl_text", _sigmoid,
          _e(128, 4, scale=2.0, swiglu_alpha=1.702, swiglu_limit=7.0), bias="required",
          expert=_clamped_swish, shared="plain", **_AFTER),
    _rows("step3p7 step3p5", _sigmoid,
          _e(288, 8, scale=1.0, swiglu_limits=None, swiglu_limits_shared=None), bias="required",
          expert=_step3("swiglu_limits"), shared_expert=_step3("swiglu_limits_shared"),
          shared="plain", **_AFTER),
    _rows("hy_v3", _sigmoid_eps, _e(192, 8, scale=2.826), bias="required", shared="plain"),
    _rows("lfm2_moe", _lfm2, _e(32, 4, norm=True, scale=1.0), bias="optional", expert=_silu),
    _rows("afmoe", _sigmoid_eps, _e(64, 6, scale=1.0), bias="required", shared="plain"),
    _rows("laguna", _laguna, _e(256, 8, scale=1.0, moe_router_logit_softcapping=0.0),
          bias="required", shared="plain", **_AFTER),
    _rows("muse_spark muse_spark_text", _muse_spark,
          _e(256, 8, scale=1.0, output_multiplier=0.1767766952966369, post_norm_eps=1e-8,
             norm_eps=1e-5),
          bias="required", expert=_muse_expert,
          extras=("latent.in", "latent.norm", "latent.out", "experts.post_norm")),
    _rows("inkling2 inkling2_text", _deepseek_v4,
          _e(384, 8, scale=8.0, scoring_func="sigmoid", mlp_gate_softcap=4.0, mlp_up_softcap=25.0),
          bias="required", expert=_inkling2),
    _rows("deepseek_v4", _deepseek_v4,
          _e(256, 6, scale=1.5, scoring_func="sqrtsoftplus", swiglu_limit=10.0, vocab_size=129280),
          bias="required", expert=_clamped_act, shared="plain"),
    _rows("flint", _flint, _e(256, 6, norm=True), shared="plain"),
    _rows("kolibri1", _kolibri1, _e(384, 6, norm=False), bias="required", shared="plain"),
    # softmax with groups
    _rows("deepseek_v2 deepseek_ocr2 deepseek_ocr2_text", _deepseek_v2,
          {"num_experts": 64, "scale": 1.0, "topk_method": "greedy"}, shared="plain"),
    _rows("unlimited_ocr unlimited_ocr_text", _deepseek_v2,
          _e(64, 6, scale=1.0, topk_method="greedy"), shared="plain"),
    _rows("mistral4 mistral_large4 mistral_large4_text", _mistral4,
          _e(128, 4, norm=True, scale=1.0), shared="plain"),
    # softmax with a selection bias
    _rows("ernie4_5_moe ernie4_5_vl_moe ernie4_5_vl_moe_text", _ernie,
          _e(64, 6, moe_norm_min=1e-12), bias="required", shared="optional"),
    _rows("longcat_flash", _longcat, _e(512, 12, scale=6.0, zero_experts=256), bias="required"),
    # rules of their own
    _rows("zaya", _zaya, _e(16, 1, router_hidden_size=256, norm_eps=1e-5), bias="required"),
    _rows("phimoe", _phimoe, _e(16, 2, jitter=0.01)),
    _rows("switch_transformers", _switch,
          {"num_experts": 8, "expert_capacity": 64, "router_bias": False, "activation": "relu",
           "jitter": 0.01},
          expert=_ungated, gated=False, per_sequence=True),
    _rows("nllb_moe", _nllb,
          {"num_experts": 128, "expert_capacity": 64, "router_bias": False, "activation": "relu",
           "second_expert_policy": "all", "normalize_router_prob_before_dropping": False,
           "batch_prioritized_routing": False, "moe_eval_capacity_token_fraction": 1.0,
           "moe_token_dropout": 0.2},
          expert=_ungated, gated=False, extras=("experts.bias",),
          output_scale=lambda c: 1.0 - c.get("moe_token_dropout")),
)  # fmt: skip

BY_TYPE: dict[str, Family] = {name: family for family in FAMILIES for name in family.types}

# Model types that route in ways no rule here has: why, and what comes closest.
REFUSED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("inkling", "inkling_text", "inkling_mm_model"),
        ("normalises routed and shared experts together", "inkling2 (routed experts alone)"),
    ),
    "doge": ("retrieves experts by product keys", "granitemoe (top-k of the logits, then softmax)"),
    "vitpose_backbone": ("picks the expert by data set, not by token", "deepseek_v4 with a table"),
    "dots3_note_vision_encoder": ("routes image patches in its own layout", "dots3_note_text"),
}


def supported_model_types() -> tuple[str, ...]:
    """Every model type that ``router_from_hf`` takes, sorted.

    Example:
        >>> "mixtral" in supported_model_types(), len(supported_model_types()) >= 60
        (True, True)
    """
    return tuple(sorted(BY_TYPE))


def read(config: Mapping[str, Any]) -> tuple[Family, HFConfig]:
    """The family and the settings of a config.

    Raises:
        TypeError, ValueError: see ``router_from_hf``.
    """
    model_type, stated = flatten(config, BY_TYPE)
    if model_type in REFUSED:
        why, nearest = REFUSED[model_type]
        raise ValueError(
            f"model_type {model_type!r}: expected a rule that this library has, got one that {why}. "
            f"The nearest that it has is {nearest}."
        )
    if model_type not in BY_TYPE:
        near = difflib.get_close_matches(model_type, [*BY_TYPE, *REFUSED], n=3, cutoff=0.5)
        hint = f"The nearest known are {', '.join(near)}. " if near else ""
        raise ValueError(
            f"model_type: expected a known Mixture-of-Experts type, got {model_type!r}. {hint}"
            "moe_jax.interop.supported_model_types() lists all; a dense model has no router."
        )
    family = BY_TYPE[model_type]
    return family, HFConfig(model_type=model_type, stated=stated, defaults=family.defaults)


def router_from_hf(config: Mapping[str, Any]) -> Router:
    """The routing rule of a published model, from its ``config.json``.

    Args:
        config: the config as a dict. Of a composite model the text part counts. Keys that are not
            there have the defaults of transformers 5.23.

    Returns:
        A router whose parameters are still to be set; ``moe_block_from_hf`` does that too.

    Raises:
        TypeError: not a dict.
        ValueError: an unknown model type (the nearest known are named), one whose rule the library
            does not have (the nearest that it has is named), or a value that it cannot honour.

    Example:
        >>> router_from_hf({"model_type": "mixtral", "num_local_experts": 8}).scoring.norm
        'sum'
    """
    family, c = read(config)
    return family.router(c)


def _unsupported(c: HFConfig, key: str, value: Any, wanted: str) -> ValueError:
    return ValueError(
        f"config of {c.model_type!r}: expected {key} to be {wanted}, got {value!r}. Nothing else is "
        "known to exist; if it does, add it to moe_jax.interop.families."
    )
