"""A model back in the layout of the Hub: the same tensor names and shards, the same ``config.json``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.checkpoint import check_free
from moe_jax.interop import router_from_hf
from moe_jax.interop.families import BY_TYPE
from moe_jax.interop.hub import config_of_layer
from moe_jax.interop.model_config import ALIASES
from moe_jax.interop.names import canonical
from moe_jax.interop.safetensors import write_safetensors
from moe_jax.models.causal_lm import CausalLM
from moe_jax.models.hub_layout import (
    BlockTensors,
    HubSource,
    TensorRecord,
    end_entries,
    give,
    layer_entries,
)
from moe_jax.types import Params

# Files beside the weights that belong to the model: they are copied where the source still has them.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def save_model(model: CausalLM, folder: str | Path) -> Path:
    """Writes a model as the checkpoint that it came from was laid out.

    Tensors have the names, shapes and files of the checkpoint, and the dtype that they are held in.
    ``config.json`` keeps its text; only its ``dtype`` changes, where the model has another. Tokenizer
    and generation settings are copied from the folder that was loaded, where it still exists.
    Layers that predict further tokens, which ``load_model`` leaves out, are not written.

    Args:
        model: from ``load_model``.
        folder: where to write. It must not exist yet, or be empty.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds files.
        ValueError: the model was not loaded from a folder, a block's sizes or its rule have changed,
            or its parameters do not determine a tensor of the checkpoint.

    Example:
        >>> import tempfile
        >>> from moe_jax.models import load_model
        >>> model = load_model("tests/goldens/models/mixtral")
        >>> path = save_model(model, Path(tempfile.mkdtemp()) / "mine")
        >>> sorted(file.name for file in path.iterdir())
        ['config.json', 'model.safetensors']
    """
    source = model.source
    if not isinstance(source, HubSource):
        raise ValueError(
            "model: expected one from load_model, which knows the checkpoint's layout, got one without "
            "it. Save its params with moe_jax.checkpoint instead."
        )
    if source.quantised:
        raise ValueError(
            "model: expected one from a plain checkpoint, got one from a quantised checkpoint. Its "
            "tensors have no place for restored weights: save its params with moe_jax.checkpoint."
        )
    target = check_new(folder)
    get = _reader(model, source)
    config = _config(source.config, model)
    records = {name: _as_held(record, model) for name, record in source.tensors.items()}
    with whole_folder(target) as part:
        for file in sorted({record.file for record in records.values()}):
            inside = {n: (r.dtype, r.shape) for n, r in records.items() if r.file == file}
            write_safetensors(
                part / file,
                inside,
                lambda name: get(name).astype(records[name].dtype),
                metadata=source.metadata[file],
            )
        if source.index is not None:
            (part / "model.safetensors.index.json").write_text(
                _index(source.index, records), encoding="utf-8"
            )
        (part / "config.json").write_text(config, encoding="utf-8")
        copy_companions(Path(source.folder), part)
    return target


def check_new(folder: str | Path) -> Path:
    """Returns the path of a folder that does not exist yet, or is empty.

    Raises:
        FileExistsError: the folder holds files.
        CheckpointError: it lies under a file, or in a folder that may not be written.
    """
    target = Path(folder)
    if not target.exists():
        check_free(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{target}: expected a new or empty folder, got one with files. Choose another name."
        )
    return target


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields a folder beside ``target`` that is renamed to it, or removed after an error."""
    part = target.parent / f".{target.name}.writing-{os.getpid()}"
    part.mkdir(parents=True)
    try:
        yield part
        if target.exists():
            target.rmdir()
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer and generation settings, where the source has them."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _reader(model: CausalLM, source: HubSource) -> Callable[[str], np.ndarray]:
    """A function from a tensor's name to the tensor, one layer's block on the host at a time."""
    config = model.config
    ends = {entry.name: entry for entry in end_entries(config)}
    params = model.params()
    if config.tied:  # some checkpoints keep the head too; it is the embedding
        ends["lm_head.weight"] = ends["model.embed_tokens.weight"]
    layers = [{e.name: e for e in layer_entries(config, layer)} for layer in config.layers]
    interleaved = BY_TYPE[config.model_type].interleaved
    block: dict[int, BlockTensors] = {}

    def tensors_of(number: int, layer: Params) -> BlockTensors:
        if number not in block:
            block.clear()
            inside = (r for r in source.tensors.values() if r.layer == number and r.in_block)
            shapes = {record.name: record.shape for record in inside}
            held = layer["moe"]
            block[number] = BlockTensors(shapes, held.params, held.state, interleaved=interleaved)
        return block[number]

    def get(name: str) -> np.ndarray:
        record = source.tensors[name]
        if record.layer is None:
            return give(params, ends[record.name])
        layer = params["layers"][record.layer]
        if record.in_block:
            return tensors_of(record.layer, layer)[record.name]
        return give(layer, layers[record.layer][record.name])

    return get


def _as_held(record: TensorRecord, model: CausalLM) -> TensorRecord:
    """The record in the dtype to write: the model's, or float32 where the checkpoint keeps that.

    Routers compute in float32 whatever the model's dtype is. Those that the checkpoint keeps in
    bfloat16 go back to it together with the model, without loss unless they were trained.
    """
    meaning = (canonical(record.name) or "") if record.in_block else ""
    of_router = meaning.startswith(("router.", "expert_bias"))
    dtype = np.dtype(model.dtype)
    if of_router and record.dtype.itemsize > dtype.itemsize:
        dtype = record.dtype
    return dataclasses.replace(record, dtype=dtype)


def _index(text: str, records: Mapping[str, TensorRecord]) -> str:
    """The index of the shards, for the tensors that are written."""
    index = json.loads(text)
    total = sum(math.prod(r.shape) * r.dtype.itemsize for r in records.values())
    weight_map = {name: records[name].file for name in index["weight_map"] if name in records}
    metadata = index.get("metadata") or {}
    if "total_size" in metadata:
        metadata["total_size"] = total
    return json.dumps({**index, "metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"


def _config(text: str, model: CausalLM) -> str:
    """``config.json``; its text is kept where nothing changed.

    Raises:
        ValueError: a layer has a rule that the config has no words for.
    """
    config = json.loads(text)
    changed = dict(config)
    for key in ("dtype", "torch_dtype"):
        if key in config:
            changed[key] = model.dtype.name
    trained: Any = router_from_hf(config_of_layer(config, model.config.moe_layers[0]))
    counts = set()
    for number, block in model.blocks().items():
        rule: Any = block.router
        same = type(rule) is type(trained) and hasattr(rule, "k")
        # A checkpoint that does not state its number of experts is read by its tensors.
        alike = (
            same and dataclasses.replace(trained, k=rule.k, num_experts=rule.num_experts) == rule
        )
        if not alike:
            raise ValueError(
                f"layer {number}: expected the rule that the model was trained with, got "
                f"{type(rule).__name__}. A config.json has no words for it: save the router with "
                "moe_jax.checkpoint, and the model with its own rule."
            )
        counts.add(rule.k)
    if len(counts) > 1:
        raise ValueError(
            f"blocks: expected one number of experts a token in all layers, got {sorted(counts)}. A "
            "config.json has room for one: use the same in each layer."
        )
    for key in ALIASES["k"]:
        if config.get(key) is not None and counts and config[key] != min(counts):
            changed[key] = min(counts)
    return text if changed == config else json.dumps(changed, indent=2) + "\n"
