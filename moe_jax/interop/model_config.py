"""A Hugging Face model config, read by what its keys mean instead of by what they are called.

The same number has many names (``num_experts``, ``num_local_experts``, ``n_routed_experts``, ...), and
sits at the top or in ``text_config``. The names are those of transformers 5.23 and of the config files
on the Hub; nothing here imports transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.interop.value_kinds import (
    COUNT,
    COUNT_OR_ZERO,
    FLAG,
    NAME,
    NOT_NEGATIVE,
    NUMBER,
    POSITIVE,
    ValueKind,
    check_value,
)

# Meaning -> the keys that state it. A meaning that is not listed is stated by the key of that name.
ALIASES: dict[str, tuple[str, ...]] = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "k": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "moe_k",
        "moe_topk",
        "moe_top_k",
        "top_k_experts",
        "num_selected_experts",
        "moe_router_topk",
    ),
    "score": (
        "scoring_func",
        "score_function",
        "score_func",
        "moe_router_activation_func",
        "moe_router_activation",
        "moe_router_score_function",
        "expert_selection_fn",
    ),
    "norm": ("norm_topk_prob", "moe_renormalize", "norm_expert_weight", "route_norm"),
    "scale": (
        "routed_scaling_factor",
        "route_scale",
        "router_scaling_factor",
        "moe_router_scaling_factor",
        "moe_routed_scaling_factor",
        "moe_router_topk_scaling_factor",
    ),
    "groups": ("n_group", "num_expert_group", "num_expert_groups", "moe_router_num_groups"),
    "top_groups": ("topk_group", "num_limited_groups", "moe_router_group_topk"),
    "selection_bias": (
        "use_expert_bias",
        "use_routing_bias",
        "use_moe_router_bias",
        "moe_router_enable_expert_bias",
        "moe_use_aux_free",
    ),
    "softcap": ("moe_router_logit_softcapping", "router_logit_softcapping"),
    "weight_on_input": ("moe_apply_router_weight_on_input", "apply_router_weight_on_input"),
    "shared": (
        "n_shared_experts",
        "num_shared_experts",
        "moe_num_shared_experts",
        "num_shared_expert",
    ),
    "activation": (
        "mlp_hidden_act",
        "hidden_act",
        "hidden_activation",
        "activation_function",
        "dense_act_fn",
        "ffn_act_fn",
    ),
    "hidden_size": ("hidden_size", "d_model"),
    "norm_eps": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "jitter": ("router_jitter_noise", "moe_jitter_eps"),
    "zero_experts": ("zero_expert_num",),
}

NESTED = ("text_config", "language_config", "llm_config", "thinker_config", "ffn_config")


# --- what a value must be ---------------------------------------------------------------------


_KINDS: dict[str, ValueKind] = {
    **dict.fromkeys(("num_experts", "k", "hidden_size", "router_hidden_size"), COUNT),
    **dict.fromkeys(("groups", "top_groups", "vocab_size", "expert_capacity"), COUNT),
    **dict.fromkeys(("shared", "zero_experts"), COUNT_OR_ZERO),
    **dict.fromkeys(("norm", "selection_bias", "weight_on_input", "router_bias"), FLAG),
    **dict.fromkeys(("shared_expert_sink", "batch_prioritized_routing"), FLAG),
    "normalize_router_prob_before_dropping": FLAG,
    **dict.fromkeys(("scale", "output_multiplier", "swiglu_alpha"), NUMBER),
    "moe_eval_capacity_token_fraction": NUMBER,  # -1 is "by capacity" in NLLB
    **dict.fromkeys(("norm_eps", "post_norm_eps", "jitter", "input_jitter_noise"), NOT_NEGATIVE),
    **dict.fromkeys(("moe_norm_min", "softcap", "moe_token_dropout"), NOT_NEGATIVE),
    **dict.fromkeys(("swiglu_limits", "swiglu_limits_shared"), NOT_NEGATIVE),  # 0 is no limit
    **dict.fromkeys(("mlp_gate_softcap", "mlp_up_softcap", "swiglu_limit"), POSITIVE),
    "moe_normalize_expert_weights": POSITIVE,
    **dict.fromkeys(("activation", "score", "topk_method", "second_expert_policy"), NAME),
    "shared_expert_combination_strategy": NAME,
}


@dataclasses.dataclass(frozen=True)
class HFConfig:
    """One model's MoE settings: stated values, then the defaults that transformers has.

    Attributes:
        model_type: as the table of families spells it.
        stated: the keys of the config, nested text config merged over the outer one.
        defaults: by meaning (see ``ALIASES``) or by key, used where the config is silent.
        read: the keys that were asked for so far. What a family reads is recorded instead of
            declared, so that the two cannot differ (see ``routing_keys``).
    """

    model_type: str
    stated: Mapping[str, Any]
    defaults: Mapping[str, Any]
    read: set[str] = dataclasses.field(default_factory=set, compare=False, repr=False)

    def key_of(self, meaning: str) -> str | None:
        """The key under which the config states ``meaning``, if it does."""
        for key in ALIASES.get(meaning, (meaning,)):
            if self.stated.get(key) is not None:
                return key
        return None

    def get(self, meaning: str) -> Any:
        """The stated value, else the default.

        Raises:
            ValueError: neither is there, two names of the same thing disagree, or the value is not
                of the kind that the setting has (text where a flag belongs, say).
        """
        keys = ALIASES.get(meaning, (meaning,))
        self.read.update(keys)
        stated = {key: self.value(key) for key in keys if self.stated.get(key) is not None}
        for key in keys:
            kind = _KINDS.get(meaning)
            # An explicit null is silence, except for a flag: null is false in Python, and a default
            # of true would contradict it.
            null_flag = kind is FLAG and key in self.stated and self.stated[key] is None
            if null_flag or key in stated:
                check_value(kind, stated.get(key), model_type=self.model_type, key=key)
        if len(set(map(repr, stated.values()))) > 1:
            listed = ", ".join(f"{k}={v!r}" for k, v in stated.items())
            raise ValueError(
                f"config of {self.model_type!r}: expected one value for {meaning}, got {listed}. "
                "Remove the stale key."
            )
        if stated:
            return next(iter(stated.values()))
        if meaning not in self.defaults:
            raise ValueError(
                f"config of {self.model_type!r}: expected a value for {meaning} under one of "
                f"{', '.join(keys)}, got none, and transformers has no default. Add it."
            )
        return self.defaults[meaning]

    def value(self, key: str) -> Any:
        """The stated value of ``key``; a list of one value a layer or modality becomes that value.

        Raises:
            ValueError: the list has several values, or none.
        """
        value = self.stated[key]
        if key == "ffn_act_fn" and isinstance(value, Mapping):  # DBRX: {"name": "silu"}
            return value.get("name")
        if not isinstance(value, (list, tuple)):
            return value
        # Ernie VL lists text first, then vision.
        several = len(set(map(repr, value))) > 1
        if not value or (several and not self.model_type.startswith("ernie4_5_vl")):
            raise ValueError(
                f"config of {self.model_type!r}: expected one value for {key}, got {value}, one a "
                "layer. Put in the value of the layer that you load."
            )
        return value[0]

    def with_value(self, key: str, value: Any) -> HFConfig:
        """The same config with ``key`` stated."""
        return dataclasses.replace(self, stated={**self.stated, key: value})


# Model types whose checkpoints name the classes of another family as their code.
_SAME_MODEL = {"kimi_k2": "deepseek_v3"}


def normal_name(model_type: str) -> str:
    """The model type as the table of families spells it.

    Example:
        >>> normal_name("Qwen3-MoE"), normal_name("kimi_k2")
        ('qwen3_moe', 'deepseek_v3')
    """
    name = model_type.replace("-", "_").lower()
    return _SAME_MODEL.get(name, name)


def flatten(config: Mapping[str, Any], accepted: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model type that decides, and the keys that count.

    A composite config (image, audio and text) is replaced by its text part, whose own model type
    decides if it is ``known``; DBRX's ``ffn_config`` is merged in the same way.

    Raises:
        TypeError: not a mapping.
        ValueError: no model type.
    """
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config: expected a dict as in config.json, got a {type(config).__name__}. "
            "For an object of transformers pass config.to_dict()."
        )
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise ValueError(
            "config: expected a 'model_type' key as in config.json, got keys "
            f"{sorted(map(str, config))[:12]}. Pass the whole config.json as a dict."
        )
    model_type = normal_name(config["model_type"])
    flat = dict(config)
    inner: Any = config
    while True:
        nested = [inner[name] for name in NESTED if isinstance(inner.get(name), Mapping)]
        if not nested:
            break
        inner = nested[0]
        flat.update({k: v for k, v in inner.items() if v is not None})
        kind = inner.get("model_type")
        kind = normal_name(kind) if isinstance(kind, str) else ""
        if kind in accepted:
            model_type = kind
    return model_type, flat
