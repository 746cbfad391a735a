"""Writes tiny whole models of Hugging Face transformers, with what they compute.

Not a dependency of the library or of its tests: run it where transformers and torch are installed.

    python -m venv hf && hf/bin/pip install torch transformers numpy          # CPU is enough
    hf/bin/python tests/goldens/generate_models.py --out models_generated flex_olmo dots1
    hf/bin/python tests/goldens/generate_models.py --list
    hf/bin/python tests/goldens/generate_models.py --check FOLDER             # a folder that was saved

A folder has the layout of the Hub and an ``io.npz`` with the keys of ``models/`` (see README.md):
``input_ids``, ``logits``, ``padded_ids``, ``padded_mask``, ``padded_logits``, ``greedy``, ``hidden``,
``meta``. Everything is float32 with eager attention. Weights are ``weights.draw`` of their name and
shape, so ``shapes.json`` stands for them unless ``--keep`` is given. ``--check`` opens a folder in
transformers and compares its logits with the ``io.npz`` of another folder, by default its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from weights import draw

E, K, F = 4, 2, 12
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 20,
    "moe_intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "moe_num_experts": E,
    "num_experts_per_tok": K,
    "moe_k": K,
    "moe_topk": K,
    "shared_expert_intermediate_size": F,
    "shared_intermediate_size": F,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "head_dim": 4,
}
GROUPS = {"n_group": 2, "topk_group": 1}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWS = {"sliding_window": 4, "layer_types": [SLIDING, FULL]}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}


def rope(kind: str, **more: object) -> dict:
    """Rotary settings as transformers 5 spells them."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}


LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 4.0, 6.0, 9.0]}
PHI = {"attention_bias": True, "lm_head_bias": True}
PHI_LONG = {
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
}
# name -> settings beside SIZES. A name is <model type>__<variant>.
TABLE: dict[str, dict] = {
    # Families that models/ does not hold.
    "flex_olmo": {},
    "dots1": {"first_k_dense_replace": 1, **WINDOWS, **GROUPS},
    "ernie4_5_moe": {"use_bias": True, "moe_layer_start_index": 1, "moe_intermediate_size": 12},
    "hunyuan_v1_moe": HEADS,
    "mellum": {
        **HEADS,
        **WINDOWS,
        "mlp_layer_types": ["sparse", "sparse"],
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
    "solar_open": HEADS,
    "exaone_moe": {**HEADS, **WINDOWS, "mlp_layer_types": ["dense", "sparse"]},
    "flint": {**HEADS, **WINDOWS, "mlp_only_layers": [0]},
    "kolibri1": {**HEADS, **WINDOWS},
    "hy_v3": {**HEADS, "mlp_layer_types": ["dense", "sparse"]},
    "minimax_m2": HEADS | {"rotary_dim": 4},
    "glm4_moe_lite": {**LATENT, "mlp_layer_types": ["dense", "sparse"]},
    "axk1": {**LATENT, **GROUPS, "mlp_layer_types": ["dense", "sparse"]},
    "granitemoeshared": GRANITE,
    "granitemoe_swa": {**GRANITE, **WINDOWS},
    "afmoe": {**HEADS, **WINDOWS, "num_dense_layers": 1, "mup_enabled": True},
    # Settings of families that models/ holds, and of others. They are compared, not committed.
    "mixtral__window": {"sliding_window": 4, "tie_word_embeddings": True},
    "mixtral__linear": HEADS | rope("linear", factor=2.0),
    "mixtral__dynamic": HEADS | rope("dynamic", factor=2.0) | {"max_position_embeddings": 8},
    "mixtral__llama3": HEADS
    | rope(
        "llama3",
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    "mixtral__longrope": HEADS | rope("longrope", original_max_position_embeddings=16, **LONG),
    "mixtral__longrope_beyond": HEADS
    | rope("longrope", original_max_position_embeddings=8, **LONG),
    "phimoe__longrope": PHI | rope("longrope", original_max_position_embeddings=16, **PHI_LONG),
    "phimoe__longrope_beyond": PHI
    | rope("longrope", original_max_position_embeddings=8, **PHI_LONG),
    "olmoe__clip": {"clip_qkv": 0.5, "norm_topk_prob": True},
    "qwen2_moe__window": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe__window": {**HEADS, "use_sliding_window": True, "sliding_window": 4},
    "gpt_oss__window": {**HEADS, "sliding_window": 4},
    "deepseek_v2__plain": {**LATENT, "q_lora_rank": None, "first_k_dense_replace": 1},
    "deepseek_v2__groups": {
        **LATENT,
        **GROUPS,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 2.0,
    },
    "deepseek_v3__yarn": {
        **LATENT,
        **GROUPS,
        "first_k_dense_replace": 1,
        "rope_interleave": False,
        **rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            mscale=1.0,
            mscale_all_dim=0.7,
            beta_fast=32,
            beta_slow=1,
        ),
    },
    "glm4_moe__plain": {**HEADS, "use_qk_norm": False, "first_k_dense_replace": 0, **GROUPS},
    "granitemoe__bias": {**GRANITE, "attention_bias": True},
    "minimax_m2__default": HEADS,
    "ernie4_5_moe__plain": {"moe_num_shared_experts": 0},
    "hunyuan_v1_moe__alpha": {
        **HEADS,
        **rope("dynamic", alpha=1000.0, factor=1.0),
        "moe_topk": 1,
    },
}
COMMITTED = tuple(name for name in TABLE if "__" not in name)


def config_of(name: str) -> transformers.PretrainedConfig:
    """The config class of the type, with the settings that it takes."""
    model_type = name.split("__")[0]
    kind = type(transformers.AutoConfig.for_model(model_type))
    taken = dir(kind()) + list(kind().to_dict()) + list(getattr(kind, "attribute_map", {}))
    settings = {k: v for k, v in SIZES.items() if k in taken} | TABLE[name]
    config = kind(**settings)
    config._attn_implementation = "eager"
    return config


def run(model: torch.nn.Module, vocab: int, *, length: int) -> dict[str, np.ndarray]:
    """What is in ``io.npz``, but for ``meta``."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, vocab, (2, length)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    padded = np.where(mask, ids, 0).astype(np.int32)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)

    def call(ids: np.ndarray, **more: object) -> object:
        with torch.no_grad():
            return model(torch.tensor(ids, dtype=torch.long), use_cache=False, **more)

    out = call(ids, output_hidden_states=True)
    left = call(
        padded,
        attention_mask=torch.tensor(mask),
        position_ids=torch.tensor(positions, dtype=torch.long),
    )
    longer = ids
    for _ in range(6):
        best = call(longer).logits[:, -1].argmax(-1).numpy().astype(np.int32)
        longer = np.concatenate([longer, best[:, None]], axis=1)
    return {
        "input_ids": ids,
        "logits": out.logits.numpy(),
        "hidden": np.stack([h.numpy() for h in out.hidden_states]),
        "padded_ids": padded,
        "padded_mask": mask,
        "padded_logits": left.logits.numpy(),
        "greedy": longer[:, length:],
    }


def write(name: str, out: Path, *, keep: bool) -> None:
    """Writes one folder; the weights stay in it where ``keep`` says so."""
    folder, config = out / name, config_of(name)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.float().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    file = folder / "model.safetensors"
    shapes = {n: list(t.shape) for n, t in load_file(file).items()}
    drawn = {n: torch.tensor(draw(n, shape)) for n, shape in shapes.items()}
    save_file(drawn, file, metadata={"format": "pt"})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    meta = {"name": name, "transformers": transformers.__version__, "torch": torch.__version__}
    arrays = run(loaded.eval(), config.vocab_size, length=10)
    np.savez_compressed(folder / "io.npz", meta=np.array(json.dumps(meta)), **arrays)
    (folder / "shapes.json").write_text(json.dumps(shapes, sort_keys=True) + "\n")
    if not keep:
        file.unlink()


def check(folder: Path, reference: Path) -> float:
    """The largest difference between transformers' logits of a folder and those in an io.npz."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with np.load(reference / "io.npz") as io, torch.no_grad():
        ids = torch.tensor(io["input_ids"], dtype=torch.long)
        return float(np.abs(model(ids, use_cache=False).logits.numpy() - io["logits"]).max())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of the table; none is those that are committed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models_generated")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--keep", action="store_true", help="leave the weights in the folders")
    parser.add_argument("--check", type=Path)
    parser.add_argument("--reference", type=Path)
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(TABLE))
    elif asked.check is not None:
        print(f"{asked.check.name}: {check(asked.check, asked.reference or asked.check):.3g}")
    else:
        for name in asked.names or COMMITTED:
            try:
                write(name, asked.out, keep=asked.keep)
                print(name)
            except Exception as error:  # the table goes on; what failed is said
                print(f"{name}: FAILED: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
