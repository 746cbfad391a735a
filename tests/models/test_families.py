"""Every row of the table loads, goes on from a cache as without, and is saved with the same bits.

The numbers of the families without a golden are held by ``test_attention``, variant by variant.
"""

from __future__ import annotations

import numpy as np
import pytest

from moe_jax.interop.safetensors import SafetensorsFolder
from moe_jax.models import generate, load_model, save_model, supported_decoders
from moe_jax.models.architectures import BY_MODEL_TYPE, decoder_config
from tests.models.made import SMALL, block_shapes, make_folder

pytestmark = pytest.mark.compile_cheaply

FULL, SLIDING = "full_attention", "sliding_attention"
SHARED = {"n_shared_experts": 1}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
GRANITE = {
    "router.layer.weight": (4, 32),
    "input_linear.weight": (4, 96, 32),
    "output_linear.weight": (4, 32, 48),
}
# model type -> (config beside SMALL, tensors of the block beside or instead of the usual ones)
CASES: dict[str, tuple[dict, dict]] = {
    "flex_olmo": ({}, {}),
    "dots1": (
        {
            "n_routed_experts": 4,
            "num_key_value_heads": 2,
            "first_k_dense_replace": 1,
            "sliding_window": 4,
            "layer_types": [SLIDING, FULL],
        }
        | SHARED,
        {},
    ),
    "ernie4_5_moe": (
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "use_bias": True,
            "num_key_value_heads": 2,
        },
        {
            "moe_statics.e_score_correction_bias": (1, 4),
            "shared_experts.gate_proj.bias": (24,),
            "shared_experts.up_proj.bias": (24,),
            "shared_experts.down_proj.bias": (32,),
        },
    ),
    "hunyuan_v1_moe": (
        {
            "num_experts": 4,
            "moe_topk": [2, 2],
            "head_dim": 8,
            "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
        },
        {f"shared_mlp.{p}_proj.weight": (24, 32) for p in ("gate", "up")}
        | {"shared_mlp.down_proj.weight": (32, 24)},
    ),
    "mellum": (
        {
            "head_dim": 16,
            "sliding_window": 4,
            "layer_types": [SLIDING, FULL],
            "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": {
                FULL: {
                    "rope_type": "yarn",
                    "rope_theta": 5e5,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {},
    ),
    "solar_open": ({"n_routed_experts": 4, "head_dim": 16} | SHARED, {}),
    "exaone_moe": (
        {
            "sliding_window": 4,
            "layer_types": [SLIDING, FULL],
            "num_shared_experts": 1,
            "num_key_value_heads": 2,
        },
        {},
    ),
    "flint": (
        {
            "head_dim": 16,
            "sliding_window": 4,
            "layer_types": [SLIDING, FULL],
            "mlp_only_layers": [0],
        },
        {f"shared_expert.{p}_proj.weight": (24, 32) for p in ("gate", "up")}
        | {"shared_expert.down_proj.weight": (32, 24)},
    ),
    "kolibri1": (
        {"head_dim": 16, "sliding_window": 4, "layer_types": [SLIDING, FULL]},
        {f"shared_expert.{p}_proj.weight": (24, 32) for p in ("gate", "up")}
        | {"shared_expert.down_proj.weight": (32, 24)},
    ),
    "hy_v3": ({"head_dim": 16, "num_shared_experts": 1}, {}),
    "minimax_m2": ({"num_local_experts": 4, "head_dim": 16, "rotary_dim": 8}, {}),
    "glm4_moe_lite": ({"n_routed_experts": 4} | SHARED | LATENT, {}),
    "axk1": (
        {"n_routed_experts": 4, "n_group": 2, "topk_group": 1} | SHARED | LATENT,
        {"post_mlp_layernorm.weight": (32,)},
    ),
    "granitemoeshared": (
        {
            "num_local_experts": 4,
            "shared_intermediate_size": 24,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
        },
        GRANITE,
    ),
    "granitemoe_swa": (
        {
            "num_local_experts": 4,
            "shared_intermediate_size": 24,
            "sliding_window": 4,
            "layer_rope_theta": [0, 5000.0],
        },
        GRANITE,
    ),
    "afmoe": (
        {
            "head_dim": 16,
            "num_shared_experts": 1,
            "sliding_window": 4,
            "mup_enabled": True,
            "layer_types": [FULL, SLIDING],
        },
        {},
    ),
}
WITHOUT_BIAS = ("flex_olmo", "ernie4_5_moe", "hunyuan_v1_moe", "mellum", "flint")
GOLDENS = {
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "granitemoe",
    "phimoe",
}


def make(folder, name):
    more, block = CASES[name]
    stated = {"num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"} & set(more)
    config = SMALL | {"model_type": name, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config["num_key_value_heads"] = 2
    config |= more if stated else {"num_experts": 4} | more
    if "moe_k" in config or "moe_topk" in config:
        del config["num_experts_per_tok"]
    row = BY_MODEL_TYPE[name]
    if row.granite:
        config.pop("moe_intermediate_size")
    elif name == "flex_olmo":
        config.pop("moe_intermediate_size")
        block = dict(block_shapes(config, bias=False))
    else:
        block = dict(block_shapes(config, bias=name not in WITHOUT_BIAS)) | block
    return make_folder(folder, config, block, prefix=f"{row.block}.")


def test_every_family_has_a_case_or_a_golden():
    assert set(CASES) | GOLDENS == set(supported_decoders())


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_made_model_runs_with_a_cache_as_without_and_is_saved_with_its_bits(name, tmp_path):
    folder = make(tmp_path / "made", name)
    model = load_model(folder)
    ids = np.random.default_rng(1).integers(0, 96, (2, 6))
    made = generate(model, ids, max_new_tokens=3)
    logits = model(np.concatenate([ids, made[:, :-1]], axis=1))
    np.testing.assert_array_equal(np.argmax(logits[:, -3:], axis=-1), made)
    saved = SafetensorsFolder(save_model(model, tmp_path / "saved"))
    tensors = SafetensorsFolder(folder)
    assert set(saved) == set(tensors)
    for tensor in tensors:
        np.testing.assert_array_equal(saved[tensor], tensors[tensor], err_msg=tensor)


def test_layers_have_the_windows_and_positions_that_transformers_gives_them():
    def layers(model_type, **more):
        config = SMALL | {
            "model_type": model_type,
            "num_hidden_layers": 5,
            "num_key_value_heads": 2,
        }
        counts = {"num_experts": 4, "num_experts_per_tok": 2}
        return decoder_config(config | counts | more).layers

    kinds = [(x.window, x.rope is not None) for x in layers("exaone_moe", sliding_window=8)]
    assert kinds == [(8, True), (8, True), (8, True), (None, False), (8, True)]
    kinds = [(x.window, x.rope is not None) for x in layers("kolibri1", sliding_window=8)]
    assert kinds == [(8, True)] * 4 + [(None, False)]
    kinds = [(x.window, x.experts) for x in layers("flint", sliding_window=8)]
    assert kinds == [(None, False), (None, False), (8, True), (8, True), (None, True)]
    kinds = [x.experts for x in layers("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[1])]
    assert kinds == [False, False, False, True, False]
    windows = [
        x.window
        for x in layers("qwen2_moe", use_sliding_window=True, sliding_window=4, max_window_layers=3)
    ]
    assert windows == [4, None, 4, None, None]
    assert [x.window for x in layers("mixtral", sliding_window=4)] == [4] * 5
