"""Whole published models from a folder, at once or layer by layer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.interop import MoEBlock, moe_block_from_hf
from moe_jax.interop.hub import config_of_layer
from moe_jax.interop.names import canonical
from moe_jax.interop.quantization import dequantize, part_of, quantization_of
from moe_jax.interop.safetensors import SafetensorsFolder
from moe_jax.interop.value_kinds import in_words, is_whole
from moe_jax.layer import LayerAux
from moe_jax.models.attention import TokenLayout
from moe_jax.models.causal_lm import CausalLM, Implementation, decoder_layer
from moe_jax.models.config_reader import architecture_of, decoder_config
from moe_jax.models.decoder_config import DecoderConfig
from moe_jax.models.hub_layout import (
    LAYER,
    HubSource,
    TensorRecord,
    check_present,
    check_unused,
    end_entries,
    layer_entries,
    take,
)
from moe_jax.types import Array, Params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class HubFolder:
    """A checkpoint folder, opened: its config is read, its tensors are not yet.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``, or shards with their index.
        dtype: of the parameters, ``"float32"`` or ``"bfloat16"``; None takes the one of the
            checkpoint. Routers are float32 always.

    Attributes:
        config: the decoder.

    Raises:
        FileNotFoundError: no config, no safetensors, or a shard is missing; pickled weights are never
            read.
        ValueError: a model or a setting that is not implemented, see ``decoder_config``; or a layer
            lacks a tensor that it has outside its experts, or all experts.
    """

    def __init__(self, folder: str | Path, *, dtype: Any = None) -> None:
        self.folder = Path(folder)
        self.raw = _read_config(self.folder)
        try:
            self.config: DecoderConfig = decoder_config(self.raw)
            row = architecture_of(self.raw)
        except ValueError as error:
            raise ValueError(f"{self.folder / 'config.json'}: {error}") from None
        self._tensors = SafetensorsFolder(self.folder)
        # Now and not hours later, when the last layer is read.
        self._tensors.check_shards()
        self._by_layer: dict[int, dict[str, str]] = {}
        self._ends: list[str] = []
        beyond: dict[int, list[str]] = {}
        for name in self._tensors:
            match = LAYER.fullmatch(name)
            if match is None:
                # Heads that predict further tokens; transformers leaves them out too.
                if not name.startswith(("mtp", "model.mtp")):
                    self._ends.append(name)
            elif int(match[1]) < self.config.num_layers:
                short = match[2]
                for old, new in row.renames:
                    short = short.replace(old, new)
                self._by_layer.setdefault(int(match[1]), {})[short] = name
            else:
                beyond.setdefault(int(match[1]), []).append(match[2])
        _check_beyond(beyond, self.raw, str(self.folder))
        self._row = row
        for number in range(self.config.num_layers):
            self._check_complete(number)
        self.dtype = jnp.dtype(_dtype(self._stored() if dtype is None else dtype))

    def _stored(self) -> str:
        """bfloat16 where the checkpoint has it; anything else that is not quantised fits float32."""
        name = "model.embed_tokens.weight"
        stored = self._tensors[name].dtype.name if name in self._tensors else ""
        return stored if stored in DTYPES else "float32"

    def ends(self) -> Params:
        """Embedding, last norm and head, in ``dtype``."""
        where = f"{self.folder}"
        entries = list(end_entries(self.config))
        named = self._plain({n: n for n in self._ends}, "", where=where)
        tied = ["lm_head.weight"] if self.config.tied else []
        wanted = {e.name for e in entries}
        check_unused([n for n in named if n not in wanted and n not in tied], where=where)
        if self.config.tied and "lm_head.weight" in named:
            _check_same_head(named, where)
        return take(named, iter(entries), dtype=self.dtype, where=where)

    def layer(self, number: int) -> Params:
        """The parameters of one layer, its tensors and no others read from disk."""
        where = f"{self.folder}, layer {number}"
        layer = self.config.layers[number]
        entries = list(layer_entries(self.config, layer))
        outside, inside, prefix = self._split(number)
        wanted = {e.name for e in entries}
        tensors = self._plain(outside, f"model.layers.{number}.", where=where)
        unused = () if layer.experts else self._row.unused_when_dense
        check_unused([s for s in tensors if s not in wanted and s not in unused], where=where)
        params = take(tensors, iter(entries), dtype=self.dtype, where=where)
        if layer.experts:
            block = {prefix + s: self._tensors[f] for s, f in inside.items()}
            config = config_of_layer(self.raw, number)
            params["moe"] = _cast(moe_block_from_hf(config, block, prefix), self.dtype)
        return params

    def _check_complete(self, number: int) -> None:
        """Finds a missing tensor by its name, before hours are spent on the layers below it."""
        where = f"{self.folder}, layer {number}"
        if number not in self._by_layer:
            raise ValueError(
                f"{self.folder}: expected {self.config.num_layers} layers, as num_hidden_layers in "
                f"config.json states, got no tensor of layer {number} (layers count from 0). Config "
                "and weights belong to different models: download both again."
            )
        layer = self.config.layers[number]
        outside, inside, _ = self._split(number)
        if layer.experts and not inside:
            raise ValueError(
                f"{where}: expected experts, got none. Check the config against the checkpoint."
            )
        # Names of quantised weights depend on the format, which dequantize tells.
        if not any(part_of(name) for name in outside):
            for entry in layer_entries(self.config, layer):
                check_present(outside, entry, where=where)

    def _plain(self, names: Mapping[str, str], prefix: str, *, where: str) -> dict[str, Any]:
        """The tensors of those names, quantised weights restored."""
        tensors = {short: self._tensors[full] for short, full in names.items()}
        if not any(part_of(short) for short in tensors):
            return tensors
        return dequantize(tensors, self.raw, what=where, prefix=prefix)

    def _split(self, number: int) -> tuple[dict[str, str], dict[str, str], str]:
        """Tensors outside and inside a layer's block, by name there; and the block's prefix."""
        names = self._by_layer.get(number, {})
        if not self.config.layers[number].experts:
            return names, {}, ""
        # Most checkpoints have "mlp"; transformers 5 also writes some with the older module's name.
        prefixes = (f"{self._row.block}.", "mlp.", "block_sparse_moe.")
        prefix = next((p for p in prefixes if any(s.startswith(p) for s in names)), prefixes[0])
        outside = {s: f for s, f in names.items() if not s.startswith(prefix)}
        inside = {s.removeprefix(prefix): f for s, f in names.items() if s.startswith(prefix)}
        return outside, inside, prefix

    def block_tensors(self, number: int) -> dict[str, str]:
        """The names of the tensors of a layer's block: in the files, to inside the block."""
        return {full: short for short, full in self._split(number)[1].items()}

    def num_experts(self, number: int) -> int:
        """How many experts a layer has, from the rows of its router."""
        for full, short in self.block_tensors(number).items():
            if canonical(short) == "router.kernel":
                return self._tensors[full].shape[0]
        raise ValueError(
            f"{self.folder}, layer {number}: expected a router, got none. Check the config against "
            "the checkpoint."
        )

    def size(self) -> int:
        """Bytes of the whole model in ``dtype``."""
        names = [n for held in self._by_layer.values() for n in held.values()] + self._ends
        return sum(self._tensors[name].size for name in names) * self.dtype.itemsize

    def release(self) -> None:
        """Lets go of the pages of the files that were read, so that they do not count as memory."""
        self._tensors.release()

    def source(self) -> HubSource:
        """What ``save_model`` needs of this folder."""
        kept = {e.name for e in end_entries(self.config)} | {"lm_head.weight"}
        records = {n: self._record(n, None, n, False) for n in self._ends if n in kept}
        for number, layer in enumerate(self.config.layers):
            outside, inside, _ = self._split(number)
            kept = {e.name for e in layer_entries(self.config, layer)}
            records |= {
                f: self._record(f, number, s, False) for s, f in outside.items() if s in kept
            }
            records |= {f: self._record(f, number, s, True) for s, f in inside.items()}
        files = sorted({record.file for record in records.values()})
        index = self.folder / "model.safetensors.index.json"
        return HubSource(
            folder=str(self.folder),
            config=(self.folder / "config.json").read_text("utf-8"),
            index=index.read_text("utf-8") if index.is_file() else None,
            tensors=records,
            quantised=quantization_of(self.raw) is not None,
            metadata={file: self._tensors.metadata_of(file) for file in files},
        )

    def _record(self, full: str, layer: int | None, name: str, in_block: bool) -> TensorRecord:
        tensor = self._tensors[full]  # a view: nothing is read
        return TensorRecord(
            file=self._tensors.file_of(full),
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            layer=layer,
            name=name,
            in_block=in_block,
        )


def _check_same_head(ends: Mapping[str, Any], where: str) -> None:
    """Refuses a head of its own where the config says that the embedding is the head."""
    head, embedding = ends["lm_head.weight"], ends.get("model.embed_tokens.weight")
    if embedding is not None and not np.array_equal(head, embedding):
        # transformers 5 goes by the tensors then, older versions by the config.
        raise ValueError(
            f"{where}: expected 'lm_head.weight' to equal 'model.embed_tokens.weight', as "
            "tie_word_embeddings in config.json states, got other numbers. If the head was trained, "
            "set tie_word_embeddings to false."
        )


def _check_beyond(layers: Mapping[int, list[str]], config: Mapping[str, Any], where: str) -> None:
    """Refuses tensors of layers beyond the last one, unless they predict further tokens."""
    stated = config["num_hidden_layers"]
    predictors = config.get("num_nextn_predict_layers") or 0
    for number, names in sorted(layers.items()):
        # Such a layer joins the embedding of the next token to the hidden states (DeepSeek-V3's names).
        # It is no part of the forward pass, and transformers leaves it out too.
        joins = any(name.startswith(("eh_proj.", "enorm.", "hnorm.")) for name in names)
        if not joins and number >= stated + predictors:
            raise ValueError(
                f"{where}: expected {stated} layers, as num_hidden_layers in config.json states, got "
                f"tensors of layer {number} (layers count from 0). Config and weights belong to "
                "different models: download both again."
            )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the model's config, got no such file. Give the folder that holds "
            "config.json and the weights."
        )
    return _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: expected JSON, got something else. Download it again.") from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got a {type(value).__name__}. Download it again."
        )
    return value


def _dtype(asked: Any) -> Any:
    name = asked if isinstance(asked, str) else jnp.dtype(asked).name
    if name not in DTYPES:
        raise ValueError(
            f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}. Choose the one to compute in."
        )
    return DTYPES[name]


def _cast(block: MoEBlock, dtype: Any) -> MoEBlock:
    """All but the router in ``dtype``."""
    for name, held in block.params.items():
        if name != "router":
            _cast_leaves(block.params, name, held, dtype)
    return block


def _cast_leaves(parent: Params, name: str, held: Any, dtype: Any) -> None:
    # In place and one by one: a second copy of all experts could be most of the memory.
    if isinstance(held, dict):
        for key in list(held):
            _cast_leaves(held, key, held[key], dtype)
    else:
        parent[name] = jax.block_until_ready(held.astype(dtype))


def available_memory() -> int | None:
    """Bytes that this machine, or its first accelerator, has free; None if it does not say."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    lines = (line.split() for line in path.read_text("utf-8").splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), None)


def load_model(folder: str | Path | HubFolder, *, dtype: Any = None) -> CausalLM:
    """A published Mixture-of-Experts model from a folder as the Hub has them.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``, or shards with their index; or the
            same opened.
        dtype: see ``HubFolder``; not together with an opened folder.

    Returns:
        The model, all of it in memory; see ``stream_layers`` for models that do not fit.

    Raises:
        FileNotFoundError, ValueError: see ``HubFolder``; or a tensor is missing, left over, of
            another shape or quantised (it is named); or the model is larger than the free memory.

    Example:
        >>> model = load_model("tests/goldens/models/qwen3_moe")
        >>> model.config.num_layers, model.config.moe_layers
        (2, (1,))
    """
    opened = folder if isinstance(folder, HubFolder) else HubFolder(folder, dtype=dtype)
    free, size = available_memory(), opened.size()
    if free is not None and size > free:
        raise ValueError(
            f"{opened.folder}: expected {size / 2**30:.1f} GiB of free memory for the whole model in "
            f"{opened.dtype}, got {free / 2**30:.1f} GiB. Read it layer by layer (stream_layers, "
            "evaluate, fit_budget), or load it in bfloat16."
        )
    params = opened.ends()
    params["layers"] = [opened.layer(i) for i in range(opened.config.num_layers)]
    return CausalLM(opened.config, params, source=opened.source())


@dataclasses.dataclass
class StreamedLayer:
    """One layer of a model that is read layer by layer.

    Attributes:
        number: of the layer.
        config: the decoder.
        params: of this layer alone, see ``decoder_layer``. They are let go of when the next layer is
            read: keep no reference to them.
    """

    number: int
    config: DecoderConfig
    params: Params

    @property
    def block(self) -> MoEBlock | None:
        """The layer's Mixture-of-Experts block, None in a dense layer."""
        return self.params.get("moe")

    def __call__(
        self, h: Array, layout: TokenLayout, *, implementation: Implementation = None
    ) -> tuple[Array, LayerAux | None]:
        """float[B, S, D] after the layer, and its block's routing and statistics, if it has one."""
        h, _, aux = decoder_layer(
            self.config,
            self.config.layers[self.number],
            self.params,
            h,
            layout,
            implementation=implementation,
            report=True,
        )
        return h, aux


def stream_layers(
    folder: str | Path | HubFolder, *, dtype: Any = None, start: int = 0
) -> Iterator[StreamedLayer]:
    """Yields a model's layers in order, one in memory at a time.

    Pass all sequences through a layer before the next is asked for. Embedding and head come from
    ``HubFolder.ends``.

    Args:
        folder: see ``load_model``, or the folder already opened.
        dtype: see ``HubFolder``; not together with an opened folder.
        start: number of the first layer to read.

    Raises:
        FileNotFoundError, ValueError: see ``load_model``.

    Example:
        >>> [layer.block is not None for layer in stream_layers("tests/goldens/models/qwen3_moe")]
        [False, True]
    """
    opened = folder if isinstance(folder, HubFolder) else HubFolder(folder, dtype=dtype)
    for number in range(start, opened.config.num_layers):
        layer = StreamedLayer(number, opened.config, opened.layer(number))
        opened.release()
        yield layer
        # The consumer's loop variable still refers to the layer while the next one is read.
        layer.params = {}


def end_of_text(folder: str | Path) -> tuple[int, ...]:
    """The ids that end a text, from ``generation_config.json``, else ``config.json``, else none.

    Raises:
        ValueError: a file is no JSON object, or its ``eos_token_id`` is no id and no list of ids.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        stated = _read_object(path).get("eos_token_id") if path.is_file() else None
        if stated is None:
            continue
        ids = stated if isinstance(stated, list) else [stated]
        if not all(is_whole(one, least=0) for one in ids):
            raise ValueError(
                f"{path}: expected eos_token_id to be a token's id or a list of them, got "
                f"{in_words(stated)}. Correct the file."
            )
        return tuple(ids)
    return ()
