"""Checkpoint folders with random weights, for any config of the table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.interop.safetensors import write_safetensors
from moe_jax.models import decoder_config
from moe_jax.models.hub_layout import end_entries, layer_entries

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def block_shapes(config: Mapping[str, Any], *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of a block in the commonest layout: one matrix an expert, shared experts if any."""
    d = config["hidden_size"]
    f = config.get("moe_intermediate_size", config["intermediate_size"])
    keys = ("num_experts", "n_routed_experts", "moe_num_experts", "num_local_experts")
    experts = next(config[key] for key in keys if key in config)
    yield "gate.weight", (experts, d)
    for i in range(experts):
        for part in ("gate_proj", "up_proj"):
            yield f"experts.{i}.{part}.weight", (f, d)
        yield f"experts.{i}.down_proj.weight", (d, f)
    if bias:
        yield "gate.e_score_correction_bias", (experts,)
    keys = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
    shared = sum(config.get(key, 0) for key in keys)
    if shared:
        for part in ("gate_proj", "up_proj"):
            yield f"shared_experts.{part}.weight", (f * shared, d)
        yield "shared_experts.down_proj.weight", (d, f * shared)


def make_folder(
    folder: Path,
    config: Mapping[str, Any],
    block: Mapping[str, tuple[int, ...]],
    *,
    prefix: str = "mlp.",
    seed: int = 0,
) -> Path:
    """Writes ``config.json`` and ``model.safetensors``.

    Args:
        folder: where; it is made.
        config: of ``config.json``.
        block: name inside the block -> shape.
        prefix: of the block inside its layer.
        seed: of the weights.
    """
    decoder = decoder_config(config)
    shapes = {e.name: e.shape for e in end_entries(decoder)}
    for i, layer in enumerate(decoder.layers):
        inside = {e.name: e.shape for e in layer_entries(decoder, layer)}
        if layer.experts:
            inside |= {prefix + name: shape for name, shape in block.items()}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in inside.items()}
    rng = np.random.default_rng(seed)

    def draw(name: str) -> np.ndarray:
        shape = shapes[name]
        # Norms around 1 and not at it, so that a forgotten one shows.
        center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.2
        return (center + scale * rng.standard_normal(shape)).astype(np.float32)

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "model.safetensors"
    specs = {name: (np.dtype(np.float32), shape) for name, shape in shapes.items()}
    write_safetensors(path, specs, draw, metadata={"format": "pt"})
    return folder
