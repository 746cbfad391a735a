"""Which published model has which attention and layout: one row a family.

Read in the modeling and configuration files of transformers 5.24. A new member of a family is a name in
a row; a new family is a row. Families that are not here are refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.models.config_keys import ConfigKeys
from moe_jax.models.layer_patterns import (
    FULL,
    SLIDING,
    after_first,
    all_full,
    all_layers,
    alternating,
    by_types,
    every,
    flint_type,
    granite_type,
    interval,
    late,
    listed,
    no_window,
    one_window,
    qwen2_type,
    sparse_step,
    switched_window,
)

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
        windows=listed(qwen2_type),
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
        windows=listed(alternating),
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
    # The following have their goldens in tests/goldens/models_generated.
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
        windows=listed(late),
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
        windows=listed(all_full),
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
        windows=listed(every(4, "sliding_window_pattern")),
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
        windows=listed(flint_type),
        qk_norm="head",
        rope_on="window",
        sinks=True,
        renames=(("softmax_offset", "sinks"),),
    ),
    Architecture(
        types=("kolibri1",),
        defaults={"num_key_value_heads": 4, "head_dim": 128, "sliding_window": 513},
        windows=listed(every(5)),
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
        windows=listed(granite_type),
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
        windows=listed(every(4, "global_attn_every_n_layers")),
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
