"""Why a published family that the table of architectures lacks cannot run as a whole model.

Read in the modeling files of transformers 5.24. ``architectures`` has the families that run.
"""

from __future__ import annotations

from collections.abc import Mapping

# What such a family has -> its model types.
_TYPES: dict[str, str] = {
    "state-space (Mamba) layers": "jamba granitemoehybrid nemotron_h",
    "linear attention with a delta rule": (
        "qwen3_next qwen3_5_moe qwen3_5_moe_text qwen4_exp qwen4_exp_text kimi_linear bailing_hybrid"
    ),
    "linear (lightning) attention": "minimax",
    "linear attention and an indexer of keys": "glm5_next glm5_next_text",
    "convolutions between its layers": (
        "lfm2_moe inkling inkling_text inkling_mm_model inkling2 inkling2_text zaya"
    ),
    "sparse attention, whose keys an indexer chooses": (
        "axk2 deepseek_v32 deepseek_v4 dots3_note dots3_note_text glm_moe_dsa hy_v4 minimax_m3_vl "
        "minimax_m3_vl_text mistral_large4 mistral_large4_text"
    ),
    "experts inside its attention": "jetmoe",
    "two attention blocks a layer": "longcat_flash",
    "a mask that is computed from the values": "doge",
    "queries that are scaled by their position": "mistral4 llama4 llama4_text",
    "an encoder": "nllb_moe switch_transformers openai_privacy_filter",
    "a decoder that denoises blocks of text": "diffusion_gemma diffusion_gemma_text",
    "inputs besides text": (
        "aria aria_text deepseek_ocr2 deepseek_ocr2_text ernie4_5_vl_moe ernie4_5_vl_moe_text gemma4 "
        "glm4v_moe glm4v_moe_text kimi_k25 kimi_vl muse_spark muse_spark_text "
        "qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker qwen3_omni_moe_talker "
        "qwen3_omni_moe_talker_text qwen3_vl_moe qwen3_vl_moe_text step3p7 unlimited_ocr "
        "unlimited_ocr_text"
    ),
    "code that is published beside its weights only, so there is nothing to compare with": (
        "bailing_moe bailing_moe_linear bailing_moe_v2 bailing_moe_v2_5 deepseek grok_1 xverse_moe"
    ),
    "no experts": (
        "llama mistral gemma gemma2 gemma3 gemma3_text gpt2 gpt_neox olmo olmo2 olmo3 phi phi3 qwen2 "
        "qwen3 granite glm glm4 seed_oss ernie4_5 smollm3 cohere cohere2 starcoder2 exaone4 nemotron"
    ),
}

REASONS: Mapping[str, str] = {
    model_type: reason for reason, types in _TYPES.items() for model_type in types.split()
}
