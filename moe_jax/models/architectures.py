"""Which published model has which attention and layout: one row a family.

Read in the modeling and configuration files of transformers 5.24. A new member of a family is a name in
a row; a new family is a row. Families that are not here are refused by name.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.interop import router_from_hf
from moe_jax.interop.expert_functions import activation_name
from moe_jax.interop.families import BY_TYPE
from moe_jax.interop.hub import config_of_layer
from moe_jax.interop.model_config import ALIASES, NESTED, normal_name
from moe_jax.models.config_keys import ConfigKeys, read_rope
from moe_jax.models.decoder_config import DecoderConfig, LatentConfig, LayerConfig, RopeConfig

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


def by_types(first: str = "", dense: int = 0) -> Callable[[ConfigKeys, int], list[bool]]:
    """As ``mlp_layer_types`` say; where there are none, all but the first few.

    Args:
        first: the key that says how many are dense.
        dense: how many, where that key is not there.
    """

    def experts(keys: ConfigKeys, layers: int) -> list[bool]:
        skipped = keys.get(first, dense) if first else dense
        given = keys.get("mlp_layer_types")
        if given is None:
            return [i >= skipped for i in range(layers)]
        unknown = sorted(set(given) - {"dense", "sparse"})
        if unknown:
            raise keys.error("mlp_layer_types", "'dense' or 'sparse' in each layer", unknown[0])
        flags = _one_a_layer(keys, "mlp_layer_types", given, layers)
        return [flag == "sparse" for flag in flags]

    return experts


def interval(keys: ConfigKeys, layers: int) -> list[bool]:
    """Every ``moe_layer_interval``-th layer from a first to a last one (Ernie)."""
    every = keys.get("moe_layer_interval", 1)
    first, last = keys.get("moe_layer_start_index", 1), keys.get("moe_layer_end_index", -1)
    last = layers - 1 if last == -1 else last
    return [(i + 1) % every == 0 and first <= i <= last for i in range(layers)]


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


def _late(keys: ConfigKeys, i: int) -> str:
    first = keys.get("max_window_layers", 62)
    return SLIDING if keys.get("sliding_window") is not None and i >= first else FULL


def _every(period: int, key: str = "") -> Callable[[ConfigKeys, int], str]:
    """Every so-many-th layer sees all; the others have a window."""

    def kind(keys: ConfigKeys, i: int) -> str:
        every = keys.get(key, period) if key else period
        if not isinstance(every, int) or every < 1:
            raise keys.error(key, "a positive whole number, or layer_types beside it", every)
        return SLIDING if (i + 1) % every else FULL

    return kind


def _flint_type(keys: ConfigKeys, i: int) -> str:
    whole = i < 2 or i % 4 == 1 or i == keys.number("num_hidden_layers") - 1
    return FULL if whole else SLIDING


def _granite_type(keys: ConfigKeys, i: int) -> str:
    return SLIDING if i % 4 else FULL


def _all_full(keys: ConfigKeys, i: int) -> str:
    return FULL


# --- names of norms ---------------------------------------------------------------------------

BEFORE = (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"))
AFTER = (
    ("attention_post_norm", "post_attention_layernorm"),
    ("mlp_post_norm", "post_feedforward_layernorm"),
)


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
        norms: see ``DecoderConfig``.
        rope_on: "all" layers, or those with a "window" alone; "window_if_any" is the latter where the
            config has ``sliding_window``.
        qk_norm_after_rope: see ``DecoderConfig``.
        output_gate: see ``DecoderConfig``.
        sinks: see ``DecoderConfig``.
        granite: whether the four multipliers of Granite are read.
        shared: key of ``DecoderConfig.shared_d_ff``; "" if the family has no such key.
        clip: key of ``DecoderConfig.qkv_clip``; "" if the family has no such key.
        fixed: keys that the maths depends on, with the values that are implemented, default first.
        ignored: further keys that transformers does not read for these types.
        renames: (old, new) parts of tensor names, where a checkpoint spells them otherwise.
        unused_when_dense: tensors that transformers leaves out in layers without experts.
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
    norms: tuple[tuple[str, str], ...] = BEFORE
    rope_on: str = "all"
    qk_norm_after_rope: bool = False
    output_gate: bool = False
    sinks: bool = False
    granite: bool = False
    clip: str = ""
    shared: str = ""
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    unused_when_dense: tuple[str, ...] = ()
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
        defaults={
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        experts=after_first,
        latent=True,
        mlp_bias="mlp_bias",
        interleaved=True,
    ),
    Architecture(
        types=("deepseek_v3",),
        defaults={
            "first_k_dense_replace": 3,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        experts=after_first,
        latent=True,
        interleaved="rope_interleave",
    ),
    Architecture(
        types=("glm4_moe",),
        defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "first_k_dense_replace": 1},
        experts=after_first,
        out_bias="",
        qk_norm="{use_qk_norm}",
        partial=0.5,
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
    # The following have no golden of a whole model in tests/goldens; their parts do.
    Architecture(
        types=("flex_olmo",),
        defaults={"rope_theta": 5e5},
        qk_norm="full",
        norms=AFTER,
    ),
    Architecture(
        types=("dots1",),
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
        experts=after_first,
        windows=listed(_late),
        qk_norm="head",
        ignored=("max_window_layers", "sliding_window"),
    ),
    Architecture(
        types=("ernie4_5_moe",),
        defaults={
            "rope_theta": 5e5,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        experts=interval,
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        head_bias="use_bias",
        interleaved=True,
    ),
    Architecture(
        types=("hunyuan_v1_moe",),
        defaults={"rms_norm_eps": 1e-5},
        qk_norm="head",
        qk_norm_after_rope=True,
        fixed={"use_cla": (False,), "use_qk_norm": (True,)},
        renames=(("query_layernorm", "q_norm"), ("key_layernorm", "k_norm")),
    ),
    Architecture(
        types=("mellum",),
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 128,
            "sliding_window": 1024,
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 5e5},
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        experts=by_types(),
        windows=listed(_all_full),
        qk_norm="head",
        ignored=("sliding_window", "mtp_layer_types", "mtp_mlp_layer_types"),
    ),
    Architecture(
        types=("solar_open",),
        defaults={
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        out_bias="",
    ),
    Architecture(
        types=("exaone_moe",),
        defaults={
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        experts=by_types("first_k_dense_replace", 1),
        windows=listed(_every(4, "sliding_window_pattern")),
        qkv_bias="",
        out_bias="",
        qk_norm="head",
        rope_on="window_if_any",
        ignored=("sliding_window_pattern", "first_k_dense_replace"),
    ),
    Architecture(
        types=("flint",),
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 128,
            "sliding_window": 513,
            "mlp_only_layers": [0, 1],
        },
        experts=sparse_step,
        windows=listed(_flint_type),
        qk_norm="head",
        rope_on="window",
        sinks=True,
        renames=(("softmax_offset", "sinks"),),
    ),
    Architecture(
        types=("kolibri1",),
        defaults={"num_key_value_heads": 4, "head_dim": 128, "sliding_window": 513},
        windows=listed(_every(5)),
        qkv_bias="",
        out_bias="",
        qk_norm="head",
        norms=(
            ("attention_norm", "input_layernorm"),
            ("attention_post_norm", "post_self_attn_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
            ("mlp_post_norm", "post_mlp_layernorm"),
        ),
        rope_on="window_if_any",
        renames=(
            ("moe.router.expert_bias", "mlp.gate.e_score_correction_bias"),
            ("post_attn_norm", "post_self_attn_layernorm"),
            ("post_ffn_norm", "post_mlp_layernorm"),
        ),
    ),
    Architecture(
        types=("hy_v3",),
        defaults={
            "rope_theta": 11_158_840.0,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        experts=by_types("", 1),
        mlp_bias="mlp_bias",
        qk_norm="head",
        ignored=("enable_moe_fp32_combine",),
    ),
    Architecture(
        types=("minimax_m2",),
        defaults={"rope_theta": 5e6, "num_key_value_heads": 8, "head_dim": 128},
        qkv_bias="",
        out_bias="",
        qk_norm="full",
        fixed={
            "use_qk_norm": (True,),
            "qk_norm_type": ("per_layer",),
            "shared_intermediate_size": (0,),
        },
        block="block_sparse_moe",
    ),
    Architecture(
        types=("glm4_moe_lite",),
        defaults={
            "q_lora_rank": 768,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "rms_norm_eps": 1e-5,
        },
        experts=by_types("", 1),
        latent=True,
        interleaved="rope_interleave",
    ),
    Architecture(
        types=("axk1",),
        defaults={
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        experts=by_types("first_k_dense_replace", 1),
        latent=True,
        interleaved="rope_interleave",
        fixed={"moe_layer_freq": (1,)},
        # The norm of the experts' output stands beside their module in the files.
        renames=(
            ("mlp.post_mlp_layernorm", "post_mlp_layernorm"),
            ("post_mlp_layernorm", "mlp.post_mlp_layernorm"),
        ),
        unused_when_dense=("mlp.post_mlp_layernorm.weight",),
    ),
    Architecture(
        types=("granitemoeshared",),
        granite=True,
        shared="shared_intermediate_size",
        block="block_sparse_moe",
    ),
    Architecture(
        types=("granitemoe_swa",),
        defaults={"sliding_window": 128},
        windows=listed(_granite_type),
        granite=True,
        sinks=True,
        shared="shared_intermediate_size",
        block="block_sparse_moe",
    ),
    Architecture(
        types=("afmoe",),
        defaults={
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "sliding_window": 1024,
            "global_attn_every_n_layers": 4,
            "num_dense_layers": 1,
        },
        experts=by_types("num_dense_layers", 1),
        windows=listed(_every(4, "global_attn_every_n_layers")),
        qk_norm="head",
        norms=(
            ("attention_norm", "input_layernorm"),
            ("attention_post_norm", "post_attention_layernorm"),
            ("mlp_norm", "pre_mlp_layernorm"),
            ("mlp_post_norm", "post_mlp_layernorm"),
        ),
        rope_on="window",
        output_gate=True,
        ignored=("global_attn_every_n_layers", "load_balance_coeff"),
    ),
)

BY_MODEL_TYPE: dict[str, Architecture] = {t: row for row in ARCHITECTURES for t in row.types}

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
    if decoder.moe_layers:
        router_from_hf(config_of_layer(config, decoder.moe_layers[0]))
    keys.finish(_EXPERT_KEYS | frozenset(BY_TYPE[model_type].defaults) | frozenset(row.ignored))
    return decoder


def _layer_thetas(keys: ConfigKeys, layers: int) -> list[float | None]:
    """A base of the rotary wavelengths for each layer, None where the config has one for all."""
    given = keys.get("layer_rope_theta") if keys.model_type == "granitemoe_swa" else None
    if given is None:
        return [None] * layers
    return _one_a_layer(keys, "layer_rope_theta", given, layers)


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
