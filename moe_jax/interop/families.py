"""How each published model routes: one table from model type to routing rule and experts.

The rows follow the modeling files of transformers 5.23 and are checked against their numbers
(tests/goldens/hf). Defaults are those of the config classes there. A new family is a row and, if its
rule differs from all others, a function in ``router_settings``; a new member of a family is a name in
a row.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.interop import router_settings
from moe_jax.interop.family import Family
from moe_jax.interop.model_config import HFConfig, flatten
from moe_jax.interop.routing_keys import check_router_keys
from moe_jax.routers import Router


def _row(types: str, router: Callable[[HFConfig], Router], defaults: dict, **block) -> Family:
    """One row of the table; every config class has these three defaults unless it says otherwise."""
    return Family(
        types=tuple(types.split()),
        router=router,
        defaults={"activation": "silu", "groups": 1, "top_groups": 1, **defaults},
        **block,
    )


def _v3(
    types: str,
    *,
    e: int | None,
    k: int | None,
    scale: float = 1.0,
    norm: bool = True,
    groups: tuple[int, int] = (1, 1),
    router=router_settings.deepseek_v3,
    shared: str = "plain",
    activation: str = "silu",
    swiglu_limit: float | None = None,
    **block,
) -> Family:
    """A row of the DeepSeek-V3 family, whose members differ in these numbers."""
    defaults: dict[str, Any] = {"scale": scale, "norm": norm, "activation": activation}
    if swiglu_limit is not None:
        defaults["swiglu_limit"] = swiglu_limit
    defaults.update(groups=groups[0], top_groups=groups[1])
    defaults.update({n: v for n, v in (("num_experts", e), ("k", k)) if v is not None})
    return _row(types, router, defaults, bias="required", shared=shared, **block)


def _e(e: int, k: int, **more: Any) -> dict[str, Any]:
    """Defaults with E experts, of which a token uses k."""
    return {"num_experts": e, "k": k, **more}


FAMILIES: tuple[Family, ...] = (
    # softmax, top-k, renormalised
    _row("mixtral minimax", router_settings.softmax_sum, _e(8, 2)),
    _row("qwen3_vl_moe qwen3_vl_moe_text", router_settings.softmax_sum, _e(60, 4)),
    _row("qwen3_5_moe qwen3_5_moe_text", router_settings.softmax_sum, _e(256, 8), shared="gated"),
    _row("hunyuan_v1_moe", router_settings.softmax_sum, _e(1, 1), shared="plain"),
    _row("dbrx", router_settings.dbrx, _e(4, 1, moe_normalize_expert_weights=1.0)),
    _row(
        "gemma4 gemma4_text diffusion_gemma diffusion_gemma_text",
        router_settings.gemma4,
        {"hidden_size": 2304, "norm_eps": 1e-6, "activation": "gelu_pytorch_tanh"},
        extras=("router.input_scale", "router.expert_scale"),
    ),
    # softmax, top-k, renormalised if norm_topk_prob
    _row("olmoe", router_settings.softmax_optional, _e(64, 8, norm=False)),
    _row("flex_olmo", router_settings.softmax_optional, _e(7, 5, norm=False)),
    _row("qwen2_moe", router_settings.softmax_optional, _e(60, 4, norm=False), shared="gated"),
    _row("qwen3_moe", router_settings.softmax_optional, _e(128, 8, norm=False)),
    _row(
        "qwen3_next qwen4_exp qwen4_exp_text",
        router_settings.softmax_optional,
        _e(512, 10, norm=True),
        shared="gated",
    ),
    _row("mellum", router_settings.softmax_optional, _e(64, 8, norm=True)),
    _row(
        "qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker",
        router_settings.softmax_optional,
        _e(128, 8, norm=True),
        shared="optional",
    ),
    _row(
        "qwen3_omni_moe_talker qwen3_omni_moe_talker_text",
        router_settings.softmax_optional,
        _e(128, 8, norm=False),
        shared="gated",
    ),
    # softmax, top-k, never renormalised
    _row("jamba", router_settings.softmax_raw, _e(16, 2)),
    # top-k of the logits, then softmax over the chosen
    _row(
        "granitemoe granitemoe_swa granitemoeshared granitemoehybrid",
        router_settings.logits_softmax,
        _e(8, 2),
    ),
    _row(
        "aria aria_text",
        router_settings.logits_softmax,
        _e(8, 2),
        expert=router_settings.silu,
        shared="plain",
    ),
    _row("jetmoe", router_settings.logits_softmax, _e(8, 2), extras=("output_bias",)),
    _row(
        "gpt_oss",
        router_settings.gpt_oss,
        _e(128, 4, swiglu_alpha=1.702, swiglu_limit=7.0),
        expert=router_settings.clamped_swish,
        interleaved=True,
        extras=("router.bias", "experts.bias"),
    ),
    _row(
        "openai_privacy_filter",
        router_settings.privacy_filter,
        _e(128, 4, swiglu_alpha=1.702, swiglu_limit=7.0),
        expert=router_settings.clamped_swish,
        extras=("router.bias", "experts.bias"),
        output_scale=lambda c: float(c.get("k")),
    ),
    _row(
        "cohere2_moe",
        router_settings.cohere2,
        _e(
            8, 2, norm=True, score="softmax", shared=0, shared_expert_combination_strategy="average"
        ),
        shared="plain",
    ),
    # top-k of the logits, then sigmoid; the weight multiplies the expert's input
    _row(
        "llama4 llama4_text",
        router_settings.llama4,
        _e(16, 1),
        shared="plain",
        weight_on_input=True,
    ),
    # sigmoid, selected with a bias inside the best groups: the DeepSeek-V3 family
    _v3("deepseek_v3 deepseek_v32", e=256, k=8, scale=2.5, groups=(8, 4)),
    _v3("axk1", e=192, k=8, scale=2.5, groups=(8, 4), extras=("output_norm",)),
    _v3("axk2", e=128, k=8, scale=2.5, router=router_settings.axk2),
    _v3("bailing_hybrid", e=512, k=8, scale=2.5, groups=(8, 4)),
    _v3("dots1", e=None, k=None, norm=False),
    _v3("dots3_note dots3_note_text", e=256, k=8),
    _v3("glm4_moe glm4v_moe glm4v_moe_text", e=128, k=8),
    _v3("glm4_moe_lite", e=64, k=4, scale=1.8),
    _v3("glm_moe_dsa", e=256, k=8, scale=2.5),
    _v3(
        "glm5_next glm5_next_text",
        e=288,
        k=8,
        scale=2.5,
        expert=router_settings.clamped_silu,
        shared_expert=router_settings.clamped_act,
        swiglu_limit=10.0,
    ),
    _v3("kimi_linear", e=256, k=8, scale=2.446),
    _v3("solar_open", e=128, k=8),
    _v3("exaone_moe", e=64, k=8, scale=2.5),
    _v3("mimo_v2_flash", e=256, k=8, shared="none"),
    _v3("nemotron_h", e=8, k=2, expert=router_settings.ungated, gated=False, activation="relu2"),
    _v3(
        "hy_v4",
        e=256,
        k=8,
        scale=2.827,
        expert=router_settings.clamped_silu,
        shared_expert=router_settings.plain,
        swiglu_limit=10.0,
    ),
    _v3(
        "beam",
        e=256,
        k=8,
        scale=2.5,
        groups=(8, 4),
        router=router_settings.beam,
        shared="none",
        output_scale=router_settings.stated_scale,
    ),
    # the same without groups
    _row("minimax_m2", router_settings.sigmoid, _e(256, 8), bias="required"),
    _row(
        "minimax_m3_vl minimax_m3_vl_text",
        router_settings.sigmoid,
        _e(128, 4, scale=2.0, swiglu_alpha=1.702, swiglu_limit=7.0),
        bias="required",
        expert=router_settings.clamped_swish,
        shared="plain",
        output_scale=router_settings.stated_scale,
    ),
    _row(
        "step3p7 step3p5",
        router_settings.sigmoid,
        _e(288, 8, scale=1.0, swiglu_limits=None, swiglu_limits_shared=None),
        bias="required",
        expert=router_settings.step3("swiglu_limits"),
        shared_expert=router_settings.step3("swiglu_limits_shared"),
        shared="plain",
        output_scale=router_settings.stated_scale,
    ),
    _row(
        "hy_v3",
        router_settings.sigmoid_eps,
        _e(192, 8, scale=2.826),
        bias="required",
        shared="plain",
    ),
    _row(
        "lfm2_moe",
        router_settings.lfm2,
        _e(32, 4, norm=True, scale=1.0),
        bias="optional",
        expert=router_settings.silu,
    ),
    _row(
        "afmoe", router_settings.sigmoid_eps, _e(64, 6, scale=1.0), bias="required", shared="plain"
    ),
    _row(
        "laguna",
        router_settings.laguna,
        _e(256, 8, scale=1.0, softcap=0.0),
        bias="required",
        shared="plain",
        output_scale=router_settings.stated_scale,
    ),
    _row(
        "muse_spark muse_spark_text",
        router_settings.muse_spark,
        _e(
            256,
            8,
            scale=1.0,
            output_multiplier=0.1767766952966369,
            post_norm_eps=1e-8,
            norm_eps=1e-5,
        ),
        bias="required",
        expert=router_settings.muse_expert,
        extras=("latent.in", "latent.norm", "latent.out", "experts.post_norm"),
    ),
    _row(
        "inkling2 inkling2_text",
        router_settings.deepseek_v4,
        _e(384, 8, scale=8.0, score="sigmoid", mlp_gate_softcap=4.0, mlp_up_softcap=25.0),
        bias="required",
        expert=router_settings.inkling2,
    ),
    _row(
        "deepseek_v4",
        router_settings.deepseek_v4,
        _e(256, 6, scale=1.5, score="sqrtsoftplus", swiglu_limit=10.0, vocab_size=129280),
        bias="required",
        expert=router_settings.clamped_act,
        shared="plain",
    ),
    _row("flint", router_settings.flint, _e(256, 6, norm=True), shared="plain"),
    _row(
        "kolibri1",
        router_settings.kolibri1,
        _e(384, 6, norm=False),
        bias="required",
        shared="plain",
    ),
    # softmax with groups
    _row(
        "deepseek_v2 deepseek_ocr2 deepseek_ocr2_text",
        router_settings.deepseek_v2,
        {"num_experts": 64, "scale": 1.0, "topk_method": "greedy"},
        shared="plain",
    ),
    _row(
        "unlimited_ocr unlimited_ocr_text",
        router_settings.deepseek_v2,
        _e(64, 6, scale=1.0, topk_method="greedy"),
        shared="plain",
    ),
    _row(
        "mistral4 mistral_large4 mistral_large4_text",
        router_settings.mistral4,
        _e(128, 4, norm=True, scale=1.0),
        shared="plain",
    ),
    # softmax with a selection bias
    _row(
        "ernie4_5_moe ernie4_5_vl_moe ernie4_5_vl_moe_text",
        router_settings.ernie,
        _e(64, 6, moe_norm_min=1e-12),
        bias="required",
        shared="optional",
    ),
    _row(
        "longcat_flash",
        router_settings.longcat,
        _e(512, 12, scale=6.0, zero_experts=256),
        bias="required",
        # transformers allocates this bias and never adds it.
        accepts={"router_bias": (True, False)},
    ),
    # rules that only one model has
    _row(
        "inkling inkling_text inkling_mm_model",
        router_settings.inkling,
        _e(256, 6, scale=8.0, shared=2, shared_expert_sink=True),
        bias="required",
        shared="joint",
    ),
    _row(
        "doge",
        router_settings.doge,
        _e(16384, 64),
        expert=router_settings.ungated,
        shared_expert=router_settings.plain,
        shared="plain",
        gated=False,
        # The weights are a softmax over the chosen, so their sum is 1 either way.
        accepts={"norm_topk_prob": (True, False)},
    ),
    _row(
        "zaya",
        router_settings.zaya,
        _e(16, 1, router_hidden_size=256, norm_eps=1e-5),
        bias="required",
    ),
    _row("phimoe", router_settings.phimoe, _e(16, 2, jitter=0.01, input_jitter_noise=0.0)),
    _row(
        "switch_transformers",
        router_settings.switch,
        {
            "num_experts": 8,
            "expert_capacity": 64,
            "router_bias": False,
            "activation": "relu",
            "jitter": 0.01,
        },
        expert=router_settings.ungated,
        gated=False,
        per_sequence=True,
    ),
    _row(
        "nllb_moe",
        router_settings.nllb,
        {
            "num_experts": 128,
            "expert_capacity": 64,
            "router_bias": False,
            "activation": "relu",
            "second_expert_policy": "all",
            "normalize_router_prob_before_dropping": False,
            "batch_prioritized_routing": False,
            "moe_eval_capacity_token_fraction": 1.0,
            "moe_token_dropout": 0.2,
        },
        expert=router_settings.ungated,
        gated=False,
        extras=("experts.bias",),
        output_scale=lambda c: 1.0 - c.get("moe_token_dropout"),
    ),
)

BY_TYPE: dict[str, Family] = {name: family for family in FAMILIES for name in family.types}

# Model types whose way of routing no rule implements: the reason, and the nearest model type.
REFUSED: dict[str, tuple[str, str]] = {
    "vitpose_backbone": ("picks the expert by data set, not by token", "deepseek_v4 with a table"),
    "dots3_note_vision_encoder": ("routes image patches in its own layout", "dots3_note_text"),
}


def supported_model_types() -> tuple[str, ...]:
    """Returns every model type that ``router_from_hf`` accepts, sorted.

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
    """Returns the routing rule of a published model, from its ``config.json``.

    Args:
        config: the config as a dict. Of a composite model the text part counts. Missing keys have
            the defaults of transformers 5.23.

    Returns:
        A router whose parameters are still to be set; ``moe_block_from_hf`` does that too.

    Raises:
        TypeError: not a dict.
        ValueError: an unknown model type, one whose rule the library does not have (the nearest
            model types are named), a value of the wrong kind, or a routing key that says something
            else than models of this type do.

    Example:
        >>> router_from_hf({"model_type": "mixtral", "num_local_experts": 8}).scoring.norm
        'sum'
    """
    family, c = read(config)
    return build_router(family, c)


def build_router(family: Family, c: HFConfig) -> Router:
    """The rule of a config that ``read`` returned, once every routing key of it is accounted for.

    Raises:
        ValueError: see ``router_from_hf``.
    """
    try:
        router = family.router(c)
    except ValueError as error:
        if str(error).startswith("config of"):
            raise
        # A rule speaks of its own fields; a reader of config.json needs the keys that state them.
        sizes = ("num_experts", "k", "groups", "top_groups")
        stated = {key: c.value(key) for name in sizes if (key := c.key_of(name)) is not None}
        listed = ", ".join(f"{key}={value}" for key, value in stated.items())
        raise ValueError(
            f"config of {c.model_type!r}: expected sizes that fit each other, got {listed} ({error}). "
            "Correct config.json."
        ) from None
    check_router_keys(family, c, router)
    return router
