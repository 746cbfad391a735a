"""One layer's MoE block from a checkpoint folder as the Hub has them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_jax.checks import check_count
from moe_jax.interop.block_builder import moe_block_from_hf
from moe_jax.interop.blocks import MoEBlock
from moe_jax.interop.families import Family, read
from moe_jax.interop.model_config import ALIASES, NESTED
from moe_jax.interop.names import canonical
from moe_jax.interop.quantization import part_of
from moe_jax.interop.safetensors import SafetensorsFolder

_LAYER = re.compile(r"^(?:(.*?)\.)?(layers|blocks|block|h)\.(\d+)\.(.+)$")
# Config keys that may list one value a layer.
_PER_LAYER = (*ALIASES["num_experts"], "moe_topk", "swiglu_limits", "swiglu_limits_shared")


def load_hf_block(folder: str | Path, layer: int, *, prefix: str | None = None) -> MoEBlock:
    """Loads the MoE block of one layer of a checkpoint; no other tensors are read from disk.

    Args:
        folder: holds ``config.json`` and ``model.safetensors`` or shards with their index.
        layer: number of the decoder layer.
        prefix: what the names of the block's tensors begin with, e.g. ``"model.layers.3.mlp."``;
            by default it follows from the layer's number.

    Returns:
        The block, as from ``moe_block_from_hf``.

    Raises:
        FileNotFoundError: no config, no safetensors, or a missing shard; pickled weights are never
            read.
        ValueError: the layer is dense or does not exist, several blocks of it have experts, index
            and shards disagree, or anything that ``moe_block_from_hf`` refuses.
    """
    check_count("layer", layer, least=0, fix="Layers are numbered from 0.")
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the model's config, got no such file. Give the folder that holds "
            "config.json and the weights."
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: expected JSON, got something else. Download it again.") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"{path}: expected a JSON object, got a {type(config).__name__}.")
    config = config_of_layer(config, layer)
    family, _ = read(config)
    tensors = SafetensorsFolder(folder)
    if prefix is None:
        names = _block_names(tensors, layer, family, where=str(folder))
    else:
        names = {n: n[len(prefix) :] for n in tensors if n.startswith(prefix)}
        if not names:
            raise ValueError(
                f"{folder}: expected tensors under the prefix {prefix!r}, got none; the names begin "
                f"with {sorted(tensors)[:4]}."
            )
    _check_listed(tensors, names, where=str(folder))
    # A dict of views: what is not touched is never read.
    return moe_block_from_hf(config, {short: tensors[full] for full, short in names.items()})


def _check_listed(tensors: SafetensorsFolder, names: Mapping[str, str], *, where: str) -> None:
    """Refuses a shard that holds a tensor of the block which the index does not list."""
    prefixes = {full[: len(full) - len(short)] for full, short in names.items()}
    missing = [
        name
        for name in tensors.unlisted(names)
        for prefix in prefixes
        if name.startswith(prefix) and _meaning(name[len(prefix) :]) is not None
    ]
    if missing:
        raise ValueError(
            f"{where}: expected every tensor of the block in the index, got {missing[0]!r} in a shard "
            "alone. Index and shards are of different checkpoints: download both again."
        )


def config_of_layer(config: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """The config with per-layer lists and overrides replaced by this layer's values."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key in NESTED and isinstance(value, Mapping):
            out[key] = config_of_layer(value, layer)
        elif key in _PER_LAYER and isinstance(value, list) and layer < len(value):
            out[key] = value[layer]
        else:
            out[key] = value
    overrides = config.get("per_layer_config")
    if isinstance(overrides, Mapping):
        out.update(overrides.get(str(layer)) or {})
    return out


def _expert_prefix(rest: str) -> str | None:
    """``"mlp."`` for ``"mlp.experts.0.w1.weight"``; None if the name is not an expert's."""
    parts = rest.split(".")
    for i in range(len(parts)):
        meaning = _meaning(".".join(parts[i:]))
        if meaning and meaning.startswith("experts."):
            return "".join(f"{p}." for p in parts[:i])
    return None


def _block_names(names: Iterable[str], layer: int, family: Family, *, where: str) -> dict[str, str]:
    """The tensors of the layer's block: full name -> name inside the block."""
    inside: dict[str, dict[str, str]] = {}  # stack of layers -> rest of name -> full name
    blocks: set[tuple[str, str]] = set()
    with_experts: set[int] = set()
    for full in names:
        match = _LAYER.match(full)
        if not match:
            continue
        stack, number, rest = f"{match[1]}.{match[2]}", int(match[3]), match[4]
        expert = _expert_prefix(rest)
        # JetMoE has experts inside its attention too.
        expert = None if expert is not None and re.search(r"att(entio)?n", expert) else expert
        if expert is not None:
            with_experts.add(number)
        if number != layer:
            continue
        inside.setdefault(stack, {})[rest] = full
        if expert is not None:
            blocks.add((stack, expert))
    blocks = {(s, p.removesuffix("text_moe.").removesuffix("vision_moe.")) for s, p in blocks}
    if not blocks:
        listed = ", ".join(map(str, sorted(with_experts)[:12])) or "none"
        raise ValueError(
            f"{where}: expected experts in layer {layer}, got none: it is dense or does not exist. "
            f"Layers with experts: {listed}."
        )
    if len(blocks) > 1:
        listed = ", ".join(sorted(f"{s.removeprefix('None.')}.{layer}.{p}" for s, p in blocks))
        raise ValueError(
            f"{where}: expected one block of experts in layer {layer}, got {listed}. Say which with "
            "prefix=."
        )
    stack, sub = blocks.pop()
    # Where the experts sit in the layer itself, so do attention and norms: then only names inside a
    # module of the block are the block's, with whatever else those modules hold (scales, say).
    modules = {rest.split(".")[0] for rest in inside[stack] if _is_routing(rest)}
    out = {}
    for rest, full in inside[stack].items():
        if sub and rest.startswith(sub):
            out[full] = rest[len(sub) :]
        elif _beside(rest, family, alone=not sub) or (not sub and rest.split(".")[0] in modules):
            out[full] = rest
    return out


def _meaning(rest: str) -> str | None:
    """What a tensor is, or what the weight is that it is a part of if it is quantised."""
    meaning = canonical(rest)
    if meaning is None and (part := part_of(rest)):
        stem, _ = part
        meaning = canonical(f"{stem}.weight") or canonical(stem)
    return meaning


def _is_routing(rest: str) -> bool:
    meaning = _meaning(rest)
    return meaning is not None and meaning.startswith(("experts.", "router."))


def _beside(rest: str, family: Family, *, alone: bool) -> bool:
    """Whether a tensor of the layer, kept outside the experts' module, is part of the block."""
    meaning = _meaning(rest)
    if meaning is None:
        return False
    if meaning.startswith("shared"):
        return family.shared != "none"
    if meaning in ("output_norm", "output_bias"):
        return meaning in family.extras
    return alone or meaning == "expert_bias"
