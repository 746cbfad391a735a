"""Which published model has which attention and layout: one row a family.

Read in the modeling and configuration files of transformers 5.24. A new member of a family is a name in
a row; a new family is a row. Families that are not here are refused by name.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.interop.expert_functions import activation_name
from moe_jax.interop.families import BY_TYPE
from moe_jax.interop.model_config import ALIASES, NESTED, normal_name
from moe_jax.models.config_keys import ConfigKeys, read_rope
from moe_jax.models.decoder_config import DecoderConfig, LatentConfig, LayerConfig

# --- which layers have experts ----------------------------------------------------------------


def all_layers(keys: ConfigKeys, layers: int) -> list[bool]:
    """Every layer has experts."""
    return [True] * layers


def after_first(keys: ConfigKeys, layers: int) -> list[bool]:
    """All but the first ``first_k_dense_replace``, every ``moe_layer_freq``-th of them."""
    first, every = keys.get("first_k_dense_replace", 0), keys.get("moe_layer_freq", 1)
    if isinstance(every, list):
        return [bool(flag) for flag in _one_a_layer(keys, "moe_layer_freq", every, layers)]
    return [i >= first and i % every == 0 for i in range(layers)]


def sparse_step(keys: ConfigKeys, layers: int) -> list[bool]:
    """Every ``decoder_sparse_step``-th layer that is not in ``mlp_only_layers``."""
    step, dense = keys.get("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    return [i not in dense and (i + 1) % step == 0 for i in range(layers)]


# --- which layers see how far -----------------------------------------------------------------


def no_window(keys: ConfigKeys, layers: int) -> list[str]:
    """Every layer sees all that came before."""
    return [FULL] * layers


def one_window(keys: ConfigKeys, layers: int) -> list[str]:
    """Every layer has ``sliding_window``, if there is one."""
    return [FULL if keys.get("sliding_window") is None else SLIDING] * layers


def switched_window(keys: ConfigKeys, layers: int) -> list[str]:
    """Every layer has ``sliding_window`` where ``use_sliding_window`` says so."""
    return [SLIDING if keys.get("use_sliding_window", False) else FULL] * layers


def listed(default: Callable[[ConfigKeys, int], str]) -> Callable[[ConfigKeys, int], list[str]]:
    """As ``layer_types`` say; where there are none, ``default`` of each layer's number."""

    def types(keys: ConfigKeys, layers: int) -> list[str]:
        given = keys.get("layer_types")
        if given is None:
            return [default(keys, i) for i in range(layers)]
        unknown = sorted(set(given) - {FULL, SLIDING})
        if unknown:
            raise keys.error("layer_types", f"{FULL!r} or {SLIDING!r} in each layer", unknown[0])
        return _one_a_layer(keys, "layer_types", given, layers)

    return types


def _one_a_layer(keys: ConfigKeys, key: str, values: list[Any], layers: int) -> list[Any]:
    if len(values) != layers:
        raise keys.error(key, f"a list of {layers}, one a layer", f"a list of {len(values)}")
    return list(values)


FULL, SLIDING = "full_attention", "sliding_attention"


def _qwen2_type(keys: ConfigKeys, i: int) -> str:
    slides = keys.get("use_sliding_window", False) and i < keys.get("max_window_layers", 28)
    return SLIDING if slides and (i + 1) % 2 else FULL


def _alternating(keys: ConfigKeys, i: int) -> str:
    return FULL if i % 2 else SLIDING


# --- the table --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The attention and layout of some model types.

    Attributes:
        types: model types.
        defaults: of the config class in transformers, by key.
        experts: which layers have experts.
        windows: the type of each layer, "full_attention" or "sliding_attention".
        latent: whether attention is multi-head latent attention.
        qkv_bias: key that says whether queries, keys and values have biases; "" is never.
        out_bias: the same of the output projection.
        mlp_bias: the same of dense feed-forward parts.
        head_bias: the same of the head.
        qk_norm: see ``DecoderConfig``; the name of a key in braces asks that key for "head".
        interleaved: see ``RopeConfig``; the name of a key in braces asks that key.
        partial: part of a head that is rotated, where the config states none.
        norm: see ``DecoderConfig``.
        sinks: see ``DecoderConfig``.
        granite: whether the four multipliers of Granite are read.
        clip: key of ``DecoderConfig.qkv_clip``; "" is none.
        fixed: keys that the maths depends on, with the values that are implemented, default first.
        ignored: further keys that transformers does not read for these types.
        block: the name of the experts' module in a layer.
    """

    types: tuple[str, ...]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    experts: Callable[[ConfigKeys, int], list[bool]] = all_layers
    windows: Callable[[ConfigKeys, int], list[str]] = no_window
    latent: bool = False
    qkv_bias: str = "attention_bias"
    out_bias: str = "attention_bias"
    mlp_bias: str = ""
    head_bias: str = ""
    qk_norm: str = "none"
    interleaved: bool | str = False
    partial: float = 1.0
    norm: str = "rms"
    sinks: bool = False
    granite: bool = False
    clip: str = ""
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    block: str = "mlp"


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        types=("mixtral",),
        defaults={"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8},
        windows=one_window,
        qkv_bias="",
        out_bias="",
        block="block_sparse_moe",
    ),
    Architecture(
        types=("olmoe",),
        defaults={"rms_norm_eps": 1e-5},
        qk_norm="full",
        clip="clip_qkv",
    ),
    Architecture(
        types=("qwen2_moe",),
        defaults={"num_key_value_heads": 16, "qkv_bias": True, "sliding_window": 4096},
        experts=sparse_step,
        windows=listed(_qwen2_type),
        qkv_bias="qkv_bias",
        out_bias="",
        ignored=("max_window_layers", "use_sliding_window", "sliding_window"),
    ),
    Architecture(
        types=("qwen3_moe",),
        defaults={"num_key_value_heads": 4, "sliding_window": 4096},
        experts=sparse_step,
        windows=switched_window,
        qk_norm="head",
        ignored=("max_window_layers",),
    ),
    Architecture(
        types=("gpt_oss",),
        defaults={
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "attention_bias": True,
            "rope_theta": 150_000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        windows=listed(_alternating),
        sinks=True,
        ignored=("initial_context_length",),
    ),
    Architecture(
        types=("deepseek_v2",),
        defaults={"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
                  "qk_rope_head_dim": 64, "v_head_dim": 128},
        experts=after_first,
        latent=True,
        mlp_bias="mlp_bias",
        interleaved=True,
        fixed={"scoring_func": ("softmax",)},
    ),
    Architecture(
        types=("deepseek_v3",),
        defaults={"first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512,
                  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        experts=after_first,
        latent=True,
        interleaved="rope_interleave",
        fixed={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    ),
    Architecture(
        types=("glm4_moe",),
        defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "first_k_dense_replace": 1},
        experts=after_first,
        out_bias="",
        qk_norm="{use_qk_norm}",
        partial=0.5,
        fixed={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    ),
    Architecture(
        types=("granitemoe",),
        granite=True,
        block="block_sparse_moe",
    ),
    Architecture(
        types=("phimoe",),
        defaults={"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8},
        windows=one_window,
        head_bias="lm_head_bias",
        norm="layer",
        block="block_sparse_moe",
    ),
)  # fmt: skip

BY_MODEL_TYPE: dict[str, Architecture] = {t: row for row in ARCHITECTURES for t in row.types}

# Keys of the experts' half of a config, which ``moe_jax.interop`` reads.
_EXPERT_KEYS = frozenset(name for names in ALIASES.values() for name in names) | {
    "moe_intermediate_size", "shared_expert_intermediate_size",
}  # fmt: skip


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
    if model_type in BY_TYPE:
        raise ValueError(
            f"model_type {model_type!r}: its experts are known (moe_jax.interop.load_hf_block reads "
            "one block), but not its attention, so the whole model cannot run. "
            f"Whole models: {', '.join(supported_decoders())}."
        )
    near = difflib.get_close_matches(model_type, BY_MODEL_TYPE, n=3, cutoff=0.5)
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
        ...          "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        >>> decoder_config(small).head_dim
        8
    """
    row = architecture_of(config)
    model_type = normal_name(config["model_type"])
    keys = ConfigKeys(model_type, config, row.defaults)
    layers, width = keys.number("num_hidden_layers"), keys.number("hidden_size")
    heads = keys.number("num_attention_heads")
    kv_heads = keys.get("num_key_value_heads", heads)
    if not isinstance(kv_heads, int) or kv_heads < 1 or heads % kv_heads:
        raise keys.error("num_key_value_heads", f"a divisor of {heads} heads", kv_heads)
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
    window = keys.get("sliding_window") if SLIDING in types else None
    if SLIDING in types and (not isinstance(window, int) or window < 1):
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
                rope=ropes[kind][0],
            )
            for experts, kind in zip(row.experts(keys, layers), types, strict=True)
        ),
        latent=latent,
        qkv_bias=_flag(keys, row.qkv_bias),
        out_bias=_flag(keys, row.out_bias),
        qk_norm=qk_norm,
        qkv_clip=None if clip is None else float(clip),
        sinks=row.sinks,
        norm=row.norm,
        norm_eps=float(keys.get("rms_norm_eps", 1e-6)),
        activation=activation_name(keys.get("hidden_act", "silu"), model_type=model_type),
        mlp_bias=_flag(keys, row.mlp_bias),
        d_ff=keys.get("intermediate_size", 0),
        embedding_multiplier=_multiplier(keys, row, "embedding_multiplier"),
        residual_multiplier=_multiplier(keys, row, "residual_multiplier"),
        logits_multiplier=1.0 / _multiplier(keys, row, "logits_scaling"),
        tied=bool(keys.get("tie_word_embeddings", False)),
        head_bias=_flag(keys, row.head_bias),
    )
    keys.finish(_EXPERT_KEYS | frozenset(BY_TYPE[model_type].defaults) | frozenset(row.ignored))
    return decoder


def _flag(keys: ConfigKeys, key: str) -> bool:
    return bool(keys.get(key, False)) if key else False


def _multiplier(keys: ConfigKeys, row: Architecture, key: str) -> float:
    return float(keys.get(key, 1.0)) if row.granite else 1.0
