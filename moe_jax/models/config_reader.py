"""A decoder's static configuration from a published ``config.json``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from moe_jax.interop import router_from_hf
from moe_jax.interop.expert_functions import activation_name
from moe_jax.interop.families import BY_TYPE
from moe_jax.interop.hub import config_of_layer
from moe_jax.interop.model_config import ALIASES, NESTED, normal_name
from moe_jax.models.architectures import BY_MODEL_TYPE, Architecture
from moe_jax.models.config_keys import ConfigKeys, read_rope
from moe_jax.models.decoder_config import DecoderConfig, LatentConfig, LayerConfig, RopeConfig
from moe_jax.models.layer_patterns import FULL, SLIDING, no_window, one_a_layer
from moe_jax.models.unsupported import REASONS

# Keys of the experts' half of a config: ``moe_jax.interop`` reads them, or refuses what they say.
_EXPERT_KEYS = frozenset(name for names in ALIASES.values() for name in names) | {
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "topk_method",
    "quantization_config",
    "compression_config",
}


def supported_decoders() -> tuple[str, ...]:
    """Every model type that ``load_model`` takes, sorted.

    Example:
        >>> "mixtral" in supported_decoders()
        True
    """
    return tuple(sorted(BY_MODEL_TYPE))


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The row of a config.

    Raises:
        TypeError: the config is not a dict.
        ValueError: no ``model_type``, or one whose attention is not in the table.
    """
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config: expected a dict as in config.json, got a {type(config).__name__}. Read the file "
            "with json.loads first."
        )
    stated = config.get("model_type")
    if not isinstance(stated, str) or not stated:
        raise ValueError(
            "config: expected a 'model_type' key as in config.json, got keys "
            f"{sorted(config)[:12]}. Pass the whole config.json as a dict."
        )
    model_type = normal_name(stated)
    if model_type in BY_MODEL_TYPE:
        nested = [name for name in NESTED if isinstance(config.get(name), Mapping)]
        if nested:
            raise ValueError(
                f"config of {model_type!r}: expected a text model, got one with {nested[0]!r}. Only "
                "decoders of text are read."
            )
        return BY_MODEL_TYPE[model_type]
    if model_type in BY_TYPE or model_type in REASONS:
        reason = REASONS.get(model_type, "attention that is not implemented")
        block = ""
        if model_type in BY_TYPE:
            block = " moe_jax.interop.load_hf_block reads one block of its experts."
        raise ValueError(
            f"model_type {model_type!r}: expected a decoder that is implemented, got one with "
            f"{reason}. The whole model cannot run.{block} Whole models: "
            f"{', '.join(supported_decoders())}."
        )
    near = difflib.get_close_matches(model_type, BY_MODEL_TYPE, n=3, cutoff=0.75)
    hint = f"The nearest are {', '.join(near)}. " if near else ""
    raise ValueError(
        f"model_type: expected a Mixture-of-Experts decoder that is known, got {model_type!r}. {hint}"
        "moe_jax.models.supported_decoders() lists all."
    )


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The attention and layout of a published model from its ``config.json``.

    Args:
        config: the file as a dict. Keys that are left out have the defaults of transformers 5.24.

    Raises:
        TypeError, ValueError: see ``architecture_of``; or a key or value that would change the model's
            numbers and is not implemented. It is named.

    Example:
        >>> small = {"model_type": "mixtral", "vocab_size": 96, "hidden_size": 32,
        ...          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        ...          "intermediate_size": 48}
        >>> decoder_config(small).head_dim
        8
    """
    row = architecture_of(config)
    model_type = normal_name(config["model_type"])
    keys = ConfigKeys(model_type, config, row.defaults)
    layers, width = keys.number("num_hidden_layers"), keys.number("hidden_size")
    heads = keys.number("num_attention_heads")
    kv_heads = keys.get("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"config of {model_type!r}: expected num_key_value_heads to divide num_attention_heads="
            f"{heads}, got {kv_heads}. Correct config.json."
        )
    head_dim = keys.get("head_dim") or width // heads
    latent = None
    if row.latent:
        latent = LatentConfig(
            query_rank=keys.get("q_lora_rank"),
            rank=keys.number("kv_lora_rank"),
            nope_dim=keys.number("qk_nope_head_dim"),
            rope_dim=keys.number("qk_rope_head_dim"),
            value_dim=keys.number("v_head_dim"),
        )
        keys.get("qk_head_dim")
        head_dim = latent.nope_dim + latent.rope_dim
    types = row.windows(keys, layers)
    # Read where the family has windows at all: layer_types may leave all layers without one.
    stated_window = None if row.windows is no_window else keys.get("sliding_window")
    window = stated_window if SLIDING in types else None
    if SLIDING in types and not window:
        raise keys.error("sliding_window", "a positive whole number", window)
    interleaved = row.interleaved
    if isinstance(interleaved, str):
        interleaved = bool(keys.get(interleaved, True))
    ropes = {
        kind: read_rope(
            keys,
            head_dim=head_dim if latent is None else latent.rope_dim,
            interleaved=interleaved,
            layer_type=kind,
            partial=row.partial,
        )
        for kind in sorted(set(types))
    }
    thetas = _layer_thetas(keys, layers)
    scale = head_dim**-0.5
    if latent is not None:
        scale *= ropes[types[0]][1]
    if row.granite:
        scale = float(keys.get("attention_multiplier", 1.0))
    qk_norm = row.qk_norm
    if qk_norm.startswith("{"):
        qk_norm = "head" if keys.get(qk_norm.strip("{}"), False) else "none"
    clip = keys.get(row.clip) if row.clip else None
    for key, values in row.fixed.items():
        keys.fixed(key, values)
    decoder = DecoderConfig(
        model_type=model_type,
        vocab_size=keys.number("vocab_size"),
        d_model=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        softmax_scale=scale,
        layers=tuple(
            LayerConfig(
                experts=experts,
                window=window if kind == SLIDING else None,
                rope=_rope_of(keys, row, ropes[kind][0], kind, theta),
            )
            for experts, kind, theta in zip(row.experts(keys, layers), types, thetas, strict=True)
        ),
        latent=latent,
        qkv_bias=_flag(keys, row.qkv_bias),
        out_bias=_flag(keys, row.out_bias),
        qk_norm=qk_norm,
        qk_norm_after_rope=row.qk_norm_after_rope,
        qkv_clip=None if clip is None else float(clip),
        sinks=row.sinks,
        output_gate=row.output_gate,
        norm=row.norm,
        norms=row.norms,
        norm_eps=float(keys.get("rms_norm_eps", 1e-6)),
        activation=activation_name(keys.get("hidden_act", "silu"), model_type=model_type),
        mlp_bias=_flag(keys, row.mlp_bias),
        d_ff=keys.get("intermediate_size", 0),
        shared_d_ff=keys.get(row.shared, 0) if row.shared else 0,
        embedding_multiplier=_embedding_multiplier(keys, row, width),
        residual_multiplier=_multiplier(keys, row, "residual_multiplier"),
        logits_multiplier=1.0 / _multiplier(keys, row, "logits_scaling"),
        tied=bool(keys.get("tie_word_embeddings", False)),
        head_bias=_flag(keys, row.head_bias),
    )
    keys.get("num_nextn_predict_layers")  # of the weights: ``HubFolder`` reads it
    checked: dict[str, Any] = {}
    for number in decoder.moe_layers:
        # Now and not hours later, when the layer is read. Most models have one config for all.
        of_layer = config_of_layer(config, number)
        if of_layer != checked:
            router_from_hf(of_layer)
        checked = of_layer
    keys.finish(_EXPERT_KEYS | frozenset(BY_TYPE[model_type].defaults) | frozenset(row.ignored))
    return decoder


def _layer_thetas(keys: ConfigKeys, layers: int) -> list[float | None]:
    """A base of the rotary wavelengths for each layer, None where the config has one for all."""
    given = keys.get("layer_rope_theta") if keys.model_type == "granitemoe_swa" else None
    if given is None:
        return [None] * layers
    return one_a_layer(keys, "layer_rope_theta", given, layers)


def _rope_of(
    keys: ConfigKeys, row: Architecture, rope: RopeConfig | None, kind: str, theta: float | None
) -> RopeConfig | None:
    """The rotary positions of one layer."""
    windows_only = row.rope_on == "window" or (
        row.rope_on == "window_if_any" and keys.get("sliding_window") is not None
    )
    if windows_only and kind == FULL:
        return None
    if rope is None or theta is None:
        return rope
    return dataclasses.replace(rope, theta=float(theta)) if theta else None


def _embedding_multiplier(keys: ConfigKeys, row: Architecture, width: int) -> float:
    if keys.model_type == "afmoe":
        return width**0.5 if keys.get("mup_enabled", False) else 1.0
    return _multiplier(keys, row, "embedding_multiplier")


def _flag(keys: ConfigKeys, key: str) -> bool:
    return bool(keys.get(key, False)) if key else False


def _multiplier(keys: ConfigKeys, row: Architecture, key: str) -> float:
    return float(keys.get(key, 1.0)) if row.granite else 1.0
