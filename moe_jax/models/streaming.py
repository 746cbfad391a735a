"""Sequences on their way through a model, layer by layer, under several routing rules at once.

One read of a layer serves all lanes: the model as it was trained, a rule under test, its controls.
After each layer the work can be saved, so an interrupted run continues with the next layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.interop import MoEBlock
from moe_jax.layer import LayerAux
from moe_jax.models.attention import TokenLayout
from moe_jax.models.causal_lm import (
    CausalLM,
    Implementation,
    attention_half,
    block_input,
    check_tokens,
    decoder_layer,
    embed,
    feed_forward_half,
    final_norm,
    token_layout,
    unembed,
)
from moe_jax.models.decoder_config import DecoderConfig, LayerConfig
from moe_jax.models.load import HubFolder, StreamedLayer, stream_layers
from moe_jax.types import Array, Params

# Called with the layers that are done, how many there are, and what is done now.
Progress = Callable[[int, int, str], None]
ModelSource = str | Path | HubFolder | CausalLM


@functools.partial(jax.jit, static_argnames=("config", "layer"), donate_argnames="h")
def _attend(
    config: DecoderConfig, layer: LayerConfig, params: Params, h: Array, layout: TokenLayout
) -> Array:
    return attention_half(config, layer, params, h, layout)[0]


@functools.partial(jax.jit, static_argnames="config")
def _block_input(config: DecoderConfig, params: Params, h: Array) -> Array:
    return block_input(config, params, h)


@functools.partial(jax.jit, static_argnames=("config", "layer", "implementation"))
def _experts(
    config: DecoderConfig,
    layer: LayerConfig,
    params: Params,
    h: Array,
    mask: Array,
    *,
    implementation: Implementation = None,
) -> tuple[Array, LayerAux | None]:
    return feed_forward_half(config, layer, params, h, mask, implementation=implementation)


@functools.partial(jax.jit, static_argnames="config")
def _losses(config: DecoderConfig, ends: Params, h: Array, input_ids: Array, mask: Array) -> Array:
    """f32[B, S - 1]: negative log probability of each next token, 0 where it is padding."""
    logits = unembed(config, ends, final_norm(config, ends, h[:, :-1]))
    chosen = jnp.take_along_axis(logits, input_ids[:, 1:, None], axis=-1)[:, :, 0]
    predicted = mask[:, :-1] & mask[:, 1:]
    return jnp.where(predicted, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)


class Stream:
    """All sequences, in every lane, between two layers of a model.

    Iterate over ``layers()``. In each layer with experts, pass every lane through
    ``LayerPass.experts``; dense layers need no call. ``arrays`` and ``notes`` hold the caller's
    results, and are saved with the hidden states where ``work`` is given.

    Args:
        model: a folder (see ``load_model``), the same opened, or a model in memory.
        input_ids: i32[N, S].
        attention_mask: bool or int[N, S], 0 for padding; None is no padding.
        lanes: a name for each independent pass.
        batch_size: sequences that run at a time.
        dtype: see ``HubFolder``; for a folder only.
        implementation: how experts run, see ``moe_jax.experts``.
        progress: called after each layer.
        work: folder that keeps the state after each layer, or None. A later run with the same model,
            text and ``task`` continues from it.
        task: what is computed, as JSON values; another task does not continue from ``work``.

    Raises:
        TypeError, ValueError: see ``forward``; or no sequence has two real tokens.
    """

    def __init__(
        self,
        model: ModelSource,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        lanes: Sequence[str] = ("model",),
        batch_size: int = 8,
        dtype: Any = None,
        implementation: Implementation = None,
        progress: Progress | None = None,
        work: str | Path | None = None,
        task: Any = None,
    ) -> None:
        ids: Any = np.asarray(input_ids)
        mask: Any = None if attention_mask is None else np.asarray(attention_mask)
        self._opened = None
        if isinstance(model, CausalLM):
            self.config, self._params = model.config, model.params()
            self.ends: Params = {k: v for k, v in self._params.items() if k != "layers"}
            name = "in memory"
        else:
            self._opened = model if isinstance(model, HubFolder) else HubFolder(model, dtype=dtype)
            self.config, self.ends = self._opened.config, self._opened.ends()
            # The config stands for the model: a digest of the weights would read all of them.
            name = json.dumps([self._opened.raw, str(self._opened.dtype)], sort_keys=True)
        check_tokens(self.config, ids, mask)
        self.ids = ids.astype(np.int32)
        self.mask = np.ones(ids.shape, bool) if mask is None else mask.astype(bool)
        self.predicted = (self.mask[:, :-1] & self.mask[:, 1:]).sum(axis=1)
        if not self.predicted.sum():
            raise ValueError(
                f"input_ids: expected sequences of at least two real tokens, got {list(ids.shape)} "
                "with nothing to predict. Give longer sequences."
            )
        self.parts = [slice(i, i + batch_size) for i in range(0, len(ids), batch_size)]
        self.layouts = [token_layout(self.ids[part], self.mask[part]) for part in self.parts]
        self.lanes = tuple(lanes)
        self.hidden: dict[str, list[Array]] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.notes: dict[str, Any] = {}
        self._done = 0
        self._implementation: Implementation = implementation
        self._progress = progress
        digest = hashlib.sha256(name.encode())
        # Two models of one config differ in their weights: the last norm and some embeddings tell.
        weights = (self.ends["norm"]["scale"], self.ends["embedding"][:8])
        for array in (self.ids, self.mask, *map(np.asarray, weights)):
            digest.update(array.tobytes())
        digest.update(json.dumps([self.lanes, batch_size, task], sort_keys=True).encode())
        self._identity = digest.hexdigest()
        self._work = None if work is None else Path(work)
        if self._work is not None and self._work.exists() and not self._work.is_dir():
            raise ValueError(
                f"work: expected a folder, got the file {self._work}. Name a folder, which is made."
            )
        if self._work is None or not self._restore(self._work):
            start = [embed(self.config, self.ends, self.ids[part]) for part in self.parts]
            # A copy for each lane, since a layer's first half takes over the buffers it is given.
            self.hidden = {lane: [jnp.array(h) for h in start] for lane in self.lanes}

    def layers(self) -> Iterator[LayerPass]:
        """Yields the layers in order, after attention; saves the state after each."""
        count = self.config.num_layers
        for layer in self._read():
            config = self.config.layers[layer.number]
            taken = LayerPass(self, layer, config)
            if config.experts:
                for held in self.hidden.values():
                    for i, layout in enumerate(self.layouts):
                        held[i] = _attend(self.config, config, layer.params, held[i], layout)
            else:
                for held in self.hidden.values():
                    for i, layout in enumerate(self.layouts):
                        held[i] = decoder_layer(self.config, config, layer.params, held[i], layout)[
                            0
                        ]
            yield taken
            # Work is queued, not done, when a call returns: the next layer is read only after it.
            jax.block_until_ready(self.hidden)
            # The generator that reads layers still refers to this one: without its parameters, one
            # layer at a time is in memory.
            layer.params = {}
            self._done = layer.number + 1
            if self._work is not None:
                self._save(self._work)
            if self._progress is not None:
                self._progress(self._done, count, "layers")

    def _read(self) -> Iterator[StreamedLayer]:
        if self._opened is not None:
            yield from stream_layers(self._opened, start=self._done)
            return
        for number, params in enumerate(self._params["layers"]):
            if number >= self._done:
                yield StreamedLayer(number, self.config, params)

    def losses(self, lane: str) -> np.ndarray:
        """f32[N, S - 1]: the loss of each next token in nats, 0 where it is padding."""
        held = zip(self.parts, self.hidden[lane], strict=True)
        return np.concatenate(
            [
                np.asarray(_losses(self.config, self.ends, h, self.ids[part], self.mask[part]))
                for part, h in held
            ]
        )

    def finish(self) -> None:
        """Removes the files of ``work``; call it once the results are kept elsewhere."""
        if self._work is not None:
            for name in ("state.npz", "state.json"):
                (self._work / name).unlink(missing_ok=True)
            if self._work.is_dir() and not any(self._work.iterdir()):
                self._work.rmdir()

    def _save(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        stored = {f"result/{name}": array for name, array in self.arrays.items()}
        for lane, held in self.hidden.items():
            for i, h in enumerate(held):
                # NumPy's format has no bfloat16: the bits are stored as integers.
                array = np.asarray(h)
                wide = array.dtype == np.float32
                stored[f"hidden/{lane}/{i}"] = array if wide else array.view(np.uint16)
        part = work / ".state.npz"
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **stored)
        state = {"identity": self._identity, "done": self._done, "notes": self.notes}
        (work / ".state.json").write_text(json.dumps(state), encoding="utf-8")
        # The old note goes first: arrays and note of two different layers are never together.
        (work / "state.json").unlink(missing_ok=True)
        os.replace(part, work / "state.npz")
        os.replace(work / ".state.json", work / "state.json")

    def _restore(self, work: Path) -> bool:
        if not (work / "state.json").is_file():
            return False
        state, identity = {}, None
        # What is no saved state is refused below, as another model's is.
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
            state = json.loads((work / "state.json").read_text(encoding="utf-8"))
            identity = state["identity"]
        if identity != self._identity:
            raise ValueError(
                f"{work}: expected the saved state of this model, text and task, got that of "
                "another. Remove the folder, or name another one."
            )
        self._done, self.notes = state["done"], state["notes"]
        dtype = self.ends["embedding"].dtype
        with np.load(work / "state.npz") as stored:
            for name in stored.files:
                kind, _, rest = name.partition("/")
                if kind == "result":
                    self.arrays[rest] = stored[name]
            for lane in self.lanes:
                held = [stored[f"hidden/{lane}/{i}"] for i in range(len(self.parts))]
                self.hidden[lane] = [
                    jnp.asarray(h if h.dtype == np.float32 else h.view(dtype)) for h in held
                ]
        return True


@dataclasses.dataclass
class LayerPass:
    """One layer, with all lanes after its attention.

    Attributes:
        stream: what passes.
        layer: its parameters; they are released when the next layer is read.
        config: its configuration.
    """

    stream: Stream
    layer: StreamedLayer
    config: LayerConfig

    @property
    def number(self) -> int:
        """The layer's number."""
        return self.layer.number

    @property
    def block(self) -> MoEBlock | None:
        """The block as it was trained; None in a dense layer."""
        return self.layer.block

    def inputs(self, lane: str) -> np.ndarray:
        """f32[T, D]: what reaches the block, real tokens only."""
        stream = self.stream
        rows = []
        for part, h in zip(stream.parts, stream.hidden[lane], strict=True):
            x = _block_input(stream.config, self.layer.params, h)
            rows.append(np.asarray(x, np.float32)[stream.mask[part]])
        return np.concatenate(rows)

    def input_of(self, lane: str, batch: int) -> Array:
        """float[B, S, D]: what reaches the block in one batch."""
        stream = self.stream
        return _block_input(stream.config, self.layer.params, stream.hidden[lane][batch])

    def experts(self, lane: str, block: MoEBlock) -> Iterator[tuple[int, LayerAux]]:
        """Passes a lane through the layer with this block; yields each batch's number and report."""
        for i, h in enumerate(self.stream.hidden[lane]):
            self.stream.hidden[lane][i], aux = self.output(i, h, block)
            yield i, aux

    def output(self, batch: int, h: Array, block: MoEBlock) -> tuple[Array, LayerAux]:
        """float[B, S, D] after the layer with this block, from h after attention, and the report."""
        stream = self.stream
        params = self.layer.params | {"moe": block}
        out, aux = _experts(
            stream.config,
            self.config,
            params,
            h,
            stream.layouts[batch].mask,
            implementation=stream._implementation,
        )
        assert aux is not None
        return out, aux


def with_rule(block: MoEBlock, router: Any, state: Any) -> MoEBlock:
    """The block with another rule."""
    return dataclasses.replace(block, router=router, state=state)


def pack_state(arrays: dict[str, np.ndarray], name: str, state: Any) -> None:
    """Puts the leaves of a router's state into ``arrays`` under ``name``."""
    for i, leaf in enumerate(jax.tree.leaves(state)):
        arrays[f"{name}/{i}"] = np.asarray(leaf)


def unpack_state(arrays: Mapping[str, np.ndarray], name: str, like: Any) -> Any:
    """The inverse of ``pack_state``, with the structure of ``like``."""
    leaves, structure = jax.tree.flatten(like)
    held = [jnp.asarray(arrays[f"{name}/{i}"]) for i in range(len(leaves))]
    return jax.tree.unflatten(structure, held)
