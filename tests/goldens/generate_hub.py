"""Writes tiny checkpoints as the Hub has them, by transformers' own ``save_pretrained``, each with the
input and output of its MoE blocks.

Not a dependency of the library or of its tests: run it where transformers and torch are installed.

    python -m venv /tmp/hf && /tmp/hf/bin/pip install torch transformers==5.23.0 numpy  # CPU is enough
    /tmp/hf/bin/python tests/goldens/generate_hub.py

A folder ``hub/<name>`` gets what ``save_pretrained`` writes (``config.json``, ``model.safetensors`` or
shards with an index) and ``blocks.npz``: ``<layer>/x`` and ``<layer>/y``, input and output of the MoE
block of each layer that has one, ``<layer>/topk_index`` and ``<layer>/topk_weight`` as the block hands
them to its experts, and ``meta`` JSON with the versions. Weights are random. Numbers are taken from the
checkpoint read back by ``from_pretrained`` and run in float32, also where the file is bfloat16. No
index changes under perturbations of 1e-4 of x, so no tie decides.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

D, F, E, K = 16, 8, 4, 2
COMMON = {
    "vocab_size": 24,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# name: (config class, model class, settings, dtype, save_pretrained arguments)
TABLE: dict[str, tuple[str, str, dict[str, Any], torch.dtype, dict[str, Any]]] = {
    "mixtral_sharded_bf16": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": E, "num_experts_per_tok": K},
        torch.bfloat16,
        {"max_shard_size": "8KB"},
    ),
    "mixtral_fused": (  # as transformers 5 has them in memory
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": E, "num_experts_per_tok": K},
        torch.float32,
        {"save_original_format": False},
    ),
    "olmoe": (
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {"num_experts": E, "num_experts_per_tok": K, "norm_topk_prob": False},
        torch.float32,
        {},
    ),
    "deepseek_v3_sharded": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 2 * E,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": F,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        torch.float32,
        {"max_shard_size": "16KB"},
    ),
}


def randomize(model, generator) -> None:
    """Values of useful size: routers that decide, selection biases that matter."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                noise = 1.0 + 0.1 * noise
            elif "correction_bias" in name:
                noise = 0.1 * noise
            elif not re.search(r"gate\.weight|embed", name):
                noise = 0.3 * noise
            tensor.copy_(noise.to(tensor.dtype))


def record(model, tokens) -> dict[str, torch.Tensor]:
    """What goes in and out of every MoE block in one forward pass."""
    tensors: dict[str, torch.Tensor] = {}
    hooks = []
    for i, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "experts"):
            continue

        def block(_, args, output, i=i):
            tensors[f"{i}/x"] = args[0].detach()
            tensors[f"{i}/y"] = (output[0] if isinstance(output, tuple) else output).detach()

        def experts(_, args, kwargs, i=i):
            for a in (*args[1:], *kwargs.values()):
                if isinstance(a, torch.Tensor):
                    key = "topk_weight" if a.is_floating_point() else "topk_index"
                    tensors[f"{i}/{key}"] = a.detach()

        hooks.append(layer.mlp.register_forward_hook(block))
        hooks.append(layer.mlp.experts.register_forward_pre_hook(experts, with_kwargs=True))
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return tensors


def tied(model, tensors: dict[str, torch.Tensor], generator) -> bool:
    """Whether a small change of a block's input changes which experts it uses."""
    for i, layer in enumerate(model.model.layers):
        if f"{i}/x" not in tensors:
            continue
        for _ in range(3):
            seen: list[torch.Tensor] = []

            def experts(_, args, kwargs, seen=seen):
                seen.extend(
                    a
                    for a in (*args[1:], *kwargs.values())
                    if isinstance(a, torch.Tensor) and not a.is_floating_point()
                )

            hook = layer.mlp.experts.register_forward_pre_hook(experts, with_kwargs=True)
            x = tensors[f"{i}/x"]
            with torch.no_grad():
                layer.mlp(x + 1e-4 * torch.randn(x.shape, generator=generator))
            hook.remove()
            was = tensors[f"{i}/topk_index"].sort(-1).values
            if not torch.equal(was, seen[0].sort(-1).values):
                return True
    return False


def generate(name: str, folder: Path, seed: int) -> bool:
    config_class, model_class, settings, dtype, save = TABLE[name]
    config = getattr(transformers, config_class)(**COMMON, **settings)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    cls = getattr(transformers, model_class)
    model = cls(config).to(dtype).eval()
    randomize(model, generator)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, **save)
    again = cls.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    for key, tensor in again.state_dict().items():  # what was saved is what is read
        assert torch.equal(tensor, model.state_dict()[key].float()), key
    tokens = torch.randint(2, COMMON["vocab_size"], (2, 10), generator=generator)
    tensors = record(again, tokens)
    if tied(again, tensors, generator):
        return False
    meta = {
        "arch": config.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    np.savez_compressed(folder / "blocks.npz", meta=np.array(json.dumps(meta)), **arrays)
    return True


def main() -> None:
    for name in TABLE:
        folder = Path(__file__).parent / "hub" / name
        seed = next((s for s in range(1, 40) if generate(name, folder, s)), None)
        if seed is None:
            raise SystemExit(f"{name}: every seed had a tie within 1e-4; change the sizes")
        (folder / "generation_config.json").unlink(missing_ok=True)
        for path in folder.iterdir():
            path.chmod(0o644)
        files = sorted((p.name, p.stat().st_size) for p in folder.iterdir())
        print(f"{name}: seed {seed}, {sum(n for _, n in files)} bytes, {len(files)} files")


if __name__ == "__main__":
    main()
