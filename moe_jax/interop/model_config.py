"""A Hugging Face model config, read by what its keys mean instead of by what they are called.

The same number has many names (``num_experts``, ``num_local_experts``, ``n_routed_experts``, ...), and
sits at the top or in ``text_config``. The names are those of transformers 5.23 and of the config files
on the Hub; nothing here imports transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

ALIASES: dict[str, tuple[str, ...]] = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "k": (
        "num_experts_per_tok", "num_experts_per_token", "experts_per_token",
        "moe_k", "moe_topk", "moe_top_k", "top_k_experts",
    ),
    "norm": ("norm_topk_prob", "moe_renormalize"),
    "scale": (
        "routed_scaling_factor", "route_scale", "router_scaling_factor",
        "moe_router_scaling_factor", "moe_routed_scaling_factor",
    ),
    "groups": ("n_group", "num_expert_group"),
    "top_groups": ("topk_group",),
    "shared": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "activation": (
        "mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function", "dense_act_fn",
    ),
    "hidden_size": ("hidden_size", "d_model"),
    "norm_eps": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "jitter": ("router_jitter_noise", "moe_jitter_eps"),
    "zero_experts": ("zero_expert_num",),
}  # fmt: skip

NESTED = ("text_config", "language_config", "llm_config", "thinker_config", "ffn_config")


@dataclasses.dataclass(frozen=True)
class HFConfig:
    """One model's MoE settings: stated values, then the defaults that transformers has.

    Attributes:
        model_type: as the table of families spells it.
        stated: the keys of the config, nested text config merged over the outer one.
        defaults: by meaning (see ``ALIASES``) or by key, used where the config is silent.
    """

    model_type: str
    stated: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def key_of(self, meaning: str) -> str | None:
        """The key under which the config states ``meaning``, if it does."""
        for key in ALIASES.get(meaning, (meaning,)):
            if self.stated.get(key) is not None:
                return key
        return None

    def get(self, meaning: str) -> Any:
        """The stated value, else the default.

        Raises:
            ValueError: neither is there, or two names of the same thing disagree.
        """
        keys = ALIASES.get(meaning, (meaning,))
        stated = {key: self._plain(key) for key in keys if self.stated.get(key) is not None}
        if len(set(map(repr, stated.values()))) > 1:
            told = ", ".join(f"{k}={v!r}" for k, v in stated.items())
            raise ValueError(
                f"config of {self.model_type!r}: expected one value for {meaning}, got {told}. "
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

    def _plain(self, key: str) -> Any:
        """Per-layer and per-modality lists become one number where that is unambiguous."""
        value = self.stated[key]
        if not isinstance(value, (list, tuple)):
            return value
        if not value or (len(set(value)) > 1 and not self.model_type.startswith("ernie4_5_vl")):
            raise ValueError(
                f"config of {self.model_type!r}: expected one value for {key}, got {value}, one a "
                "layer. Put in the value of the layer that you load."
            )
        return value[0]  # Ernie VL: text first, then vision

    def with_value(self, key: str, value: Any) -> HFConfig:
        """The same config with ``key`` stated."""
        return dataclasses.replace(self, stated={**self.stated, key: value})


def normal_name(model_type: str) -> str:
    return model_type.replace("-", "_").lower()


def flatten(config: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
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
            f"{sorted(config)[:12]}. Pass the whole config.json as a dict."
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
        kind = normal_name(inner.get("model_type") or "")
        if kind in known:
            model_type = kind
    return model_type, flat
