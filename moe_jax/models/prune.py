"""Removes the experts that a model uses least, and writes the smaller model in Hub layout."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.interop import MoEBlock
from moe_jax.interop.model_config import ALIASES
from moe_jax.interop.names import canonical
from moe_jax.interop.quantization import part_of
from moe_jax.interop.retrofit import fixed_rule
from moe_jax.interop.safetensors import SafetensorsFolder, write_safetensors
from moe_jax.models.expert_saliency import Saliency
from moe_jax.models.load import HubFolder
from moe_jax.models.save import check_new, copy_companions, whole_folder
from moe_jax.types import Params

METHODS = ("reap", "frequency", "mean_weight")
COUNTS = ("uniform", "sensitivity")
_ONE_EXPERT = re.compile(r"(.*\bexperts\.)(\d+)(\..+)")


def experts_to_keep(
    saliency: Mapping[int, Saliency],
    keep: float,
    *,
    method: str = "reap",
    counts: str = "uniform",
    least: int = 1,
    groups: int = 1,
) -> dict[int, np.ndarray]:
    """Returns the experts that each layer keeps, sorted, by the layer's number.

    Args:
        saliency: from ``expert_saliency``.
        keep: share of the experts, above 0 and at most 1.
        method: ``reap``, ``frequency`` or ``mean_weight``.
        counts: "uniform" keeps the same number in each layer. "sensitivity" removes the experts with
            the smallest part in their layer's hidden states, wherever they are.
        least: fewest experts that a layer keeps; at least the k of its rule.
        groups: routing groups; each keeps the same number of experts.

    Raises:
        ValueError: an unknown method, or a share that leaves too few experts.

    Example:
        >>> used = np.array([5, 1, 3, 2])
        >>> one = Saliency(tokens=used, weight=np.ones(4), reap=np.ones(4), hidden=1.0)
        >>> experts_to_keep({0: one}, 0.5, method="frequency")[0].tolist()
        [0, 2]
    """
    totals = {layer: len(one.tokens) for layer, one in saliency.items()}
    wanted = check_pruning(totals, keep, method=method, counts=counts, least=least, groups=groups)
    numbers = wanted if counts == "uniform" else _by_sensitivity(saliency, wanted, least, groups)
    kept = {}
    for layer, one in saliency.items():
        scores, count = one.score(method), numbers[layer]
        size = len(scores) // groups
        chosen = []
        for group in range(groups):
            part = scores[group * size : (group + 1) * size]
            order = np.argsort(-part, kind="stable")[: count // groups]
            chosen.append(group * size + np.sort(order))
        kept[layer] = np.concatenate(chosen)
    return kept


def check_pruning(
    totals: Mapping[int, int], keep: float, *, method: str, counts: str, least: int, groups: int
) -> dict[int, int]:
    """Returns how many experts each layer keeps if all keep the same share; needs no saliency.

    Args:
        totals: the number of experts of each layer.
        keep, method, counts, least, groups: see ``experts_to_keep``.

    Raises:
        ValueError: see ``experts_to_keep``.
    """
    if method == "mone":
        raise ValueError(
            "method mone: expected experts that are kept or removed, got constant ones in their place "
            "(MoNE, arXiv:2507.00390). A constant is a bias without weights, and the Hub layout of all "
            "families but gpt_oss has no place for it, so no other program could open the model. Use "
            "reap, which removes experts."
        )
    for name, value, accepted in (("method", method, METHODS), ("counts", counts, COUNTS)):
        if value not in accepted:
            raise ValueError(f"{name}: expected one of {', '.join(accepted)}, got {value!r}.")
    if not 0 < keep <= 1:
        raise ValueError(
            f"keep: expected a share above 0 and at most 1, got {keep}. 0.5 keeps half the experts."
        )
    wanted = {layer: round(keep * total / groups) * groups for layer, total in totals.items()}
    least = math.ceil(least / groups) * groups
    short = {layer: n for layer, n in wanted.items() if n < least}
    if short:
        raise ValueError(
            f"keep: expected at least {least} experts in each layer, which its k and groups need, got "
            f"{min(short.values())}. Keep a larger share."
        )
    return wanted


def _by_sensitivity(
    saliency: Mapping[int, Saliency], wanted: Mapping[int, int], least: int, groups: int
) -> dict[int, int]:
    """Returns as many experts in all as ``wanted``, with fewer where the least is lost."""
    totals = {layer: len(one.tokens) for layer, one in saliency.items()}
    least = math.ceil(least / groups) * groups
    # Experts are removed one group's worth at a time, from the layer where the least is lost.
    parts = {layer: np.sort(one.reap / max(one.hidden, 1e-30)) for layer, one in saliency.items()}
    removed = dict.fromkeys(saliency, 0)
    target = sum(totals.values()) - sum(wanted.values())
    while sum(removed.values()) < target:
        open_ = [n for n in saliency if totals[n] - removed[n] - groups >= least]
        cheapest = min(open_, key=lambda n: parts[n][removed[n] : removed[n] + groups].sum())
        removed[cheapest] += groups
    return {layer: totals[layer] - removed[layer] for layer in saliency}


def prune_block(block: MoEBlock, kept: np.ndarray) -> MoEBlock:
    """Returns the block with these experts alone; the rule keeps its k, or uses all that are left."""
    trained = fixed_rule(block)
    index = jnp.asarray(kept)

    by_expert = ("kernel", "bias", "expert_scale")
    params: dict[str, Params] = {
        **block.params,
        "experts": jax.tree.map(lambda leaf: leaf[index], block.params["experts"]),
        "router": {
            name: leaf[..., index] if name in by_expert else leaf
            for name, leaf in block.params["router"].items()
        },
    }
    rule = dataclasses.replace(trained, num_experts=len(kept), k=min(trained.k, len(kept)))
    bias = getattr(block.state, "expert_bias", None)
    state = rule.init_state()
    if bias is not None:
        state = dataclasses.replace(state, expert_bias=bias[index])
    return dataclasses.replace(block, params=params, router=rule, state=state)


def pruning_limits(folder: HubFolder) -> tuple[int, int]:
    """(fewest experts that a layer may keep, routing groups) of a model."""
    number = folder.config.moe_layers[0]
    block = folder.layer(number)["moe"]
    rule = fixed_rule(block)
    groups = rule.scoring.num_groups
    least = rule.k
    if groups > 1:
        # The k experts come from the allowed groups, and a group is worth its two best scores.
        each = max(math.ceil(rule.k / rule.scoring.top_groups), 2)
        least = groups * each
    return least, groups


def write_pruned(
    source: str | Path | HubFolder, kept: Mapping[int, np.ndarray], folder: str | Path
) -> Path:
    """Writes a checkpoint without the other experts: tensors, router rows, biases and config.

    Tensors are copied as they are stored, quantised ones too; one is in memory at a time. A config
    states one number of experts for all layers; where layers keep different numbers, the key holds a
    list, one entry a layer, which ``load_model`` reads and, of transformers' families, HunYuan alone.

    Args:
        source: the model's folder.
        kept: from ``experts_to_keep``.
        folder: where to write. It must not exist yet, or be empty.

    Raises:
        FileExistsError: the folder holds files.
        ValueError: a tensor of a block that is not understood.
    """
    opened = source if isinstance(source, HubFolder) else HubFolder(source)
    target = check_new(folder)
    tensors = SafetensorsFolder(opened.folder)
    plan: dict[str, tuple[str, Any]] = {}  # new name -> old name, rows to take along the first axis
    inside = {
        full: (layer, name)
        for layer in opened.config.moe_layers
        for full, name in opened.block_tensors(layer).items()
    }
    total = {layer: opened.num_experts(layer) for layer in opened.config.moe_layers}
    for full in tensors:
        if full not in inside:
            plan[full] = (full, None)
            continue
        layer, name = inside[full]
        one = _ONE_EXPERT.fullmatch(full)
        rows = kept[layer]
        if one:
            place = np.flatnonzero(rows == int(one[2]))
            if place.size:
                plan[f"{one[1]}{int(place[0])}{one[3]}"] = (full, None)
            continue
        plan[full] = (full, rows if _has_expert_axis(name, tensors[full], total[layer]) else None)
    files: dict[str, dict[str, tuple[np.dtype, tuple[int, ...]]]] = {}
    for new, (old, rows) in plan.items():
        tensor = tensors[old]
        shape = _taken_shape(tensor.shape, rows)
        files.setdefault(tensors.file_of(old), {})[new] = (tensor.dtype, shape)

    def get(name: str) -> np.ndarray:
        old, rows = plan[name]
        return tensors[old] if rows is None else _take(tensors[old], rows)

    with whole_folder(target) as part:
        for file, specs in files.items():
            write_safetensors(part / file, specs, get, metadata=tensors.metadata_of(file))
            tensors.release()
        index = opened.folder / "model.safetensors.index.json"
        if index.is_file():
            held = json.loads(index.read_text("utf-8"))
            held["weight_map"] = {n: tensors.file_of(old) for n, (old, _) in plan.items()}
            sizes = (s for specs in files.values() for s in specs.values())
            size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in sizes)
            held["metadata"] = {**(held.get("metadata") or {}), "total_size": size}
            (part / index.name).write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
        (part / "config.json").write_text(_config(opened, kept), encoding="utf-8")
        copy_companions(opened.folder, part)
    return target


def _has_expert_axis(name: str, tensor: np.ndarray, total: int) -> bool:
    """Whether a tensor of a block, not of one expert, has a row for each expert."""
    stem = part_of(name)
    meaning = canonical(name) or (canonical(f"{stem[0]}.weight") if stem else None) or ""
    meaning = meaning or (canonical(stem[0]) if stem else "") or ""
    if meaning.startswith(("experts.", "router.", "expert_bias")):
        if total in tensor.shape[:1] or tensor.shape == (1, total):
            return True
        if meaning.startswith("experts.") or tensor.ndim != 1:
            raise ValueError(
                f"{name!r}: expected a tensor with a row for each of {total} experts, got shape "
                f"{list(tensor.shape)}. This layout of experts is not pruned."
            )
    return False


def _taken_shape(shape: tuple[int, ...], rows: Any) -> tuple[int, ...]:
    if rows is None:
        return tuple(shape)
    return (1, len(rows)) if shape[0] == 1 else (len(rows), *shape[1:])


def _take(tensor: np.ndarray, rows: np.ndarray) -> np.ndarray:
    # Ernie keeps its biases as [1, E].
    return tensor[:, rows] if tensor.shape[0] == 1 else tensor[rows]


def _config(opened: HubFolder, kept: Mapping[int, np.ndarray]) -> str:
    config = json.loads((opened.folder / "config.json").read_text("utf-8"))
    numbers = {layer: len(rows) for layer, rows in kept.items()}
    fewest = min(numbers.values())
    value: Any = fewest
    if len(set(numbers.values())) > 1:
        value = [numbers.get(i, fewest) for i in range(opened.config.num_layers)]
    keys = [key for key in ALIASES["num_experts"] if key in config]
    for key in keys or ["num_experts"]:
        config[key] = value
    for key in ALIASES["k"]:
        if isinstance(config.get(key), int) and config[key] > fewest:
            config[key] = fewest
    return json.dumps(config, indent=2) + "\n"
