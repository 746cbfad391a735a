"""Which tensor of a checkpoint on the Hub is which parameter: one table, read by load and by save."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from moe_jax.interop.names import canonical
from moe_jax.interop.tensors import Tensor, check_plain, to_device
from moe_jax.models.decoder_config import DecoderConfig, LayerConfig
from moe_jax.types import Params

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """Where a checkpoint keeps a tensor, as what, and which part of the model it is.

    Attributes:
        file: name of the file.
        dtype: in the file.
        shape: in the file.
        layer: number of its layer, or None.
        name: inside its layer or its block, as ``TensorEntry.name`` and ``moe_jax.interop`` spell it.
        in_block: whether it belongs to the layer's Mixture-of-Experts block.
    """

    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    layer: int | None
    name: str
    in_block: bool


@dataclasses.dataclass(frozen=True)
class HubSource:
    """How a checkpoint was laid out, so that ``save_model`` can write it that way again.

    Attributes:
        folder: where it was.
        config: ``config.json`` as text.
        index: ``model.safetensors.index.json`` as text, or None where there is one file.
        tensors: the tensors that the model is made of, by name.
        metadata: each file's own metadata, by file.
        quantised: whether its weights were restored from a quantised form.
    """

    folder: str
    config: str
    index: str | None
    tensors: Mapping[str, TensorRecord]
    metadata: Mapping[str, Mapping[str, str]]
    quantised: bool = False


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor outside the experts.

    Attributes:
        path: keys of the parameter, e.g. ``("attention", "q", "kernel")``.
        name: name of the tensor inside its layer, e.g. ``"self_attn.q_proj.weight"``.
        shape: of the tensor; torch keeps kernels as [out, in], parameters are [in, out].
    """

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Whether the parameter is the tensor's transpose."""
        return self.path[-1] == "kernel"


def layer_entries(config: DecoderConfig, layer: LayerConfig) -> Iterator[TensorEntry]:
    """The tensors of one layer, but for those of its Mixture-of-Experts block."""
    yield from _attention_entries(config)
    d = config.d_model
    for parameter, name in config.norms:
        yield from _norm(config, (parameter,), name, d)
    if layer.experts and config.shared_d_ff:
        fused = (2 * config.shared_d_ff, d)
        yield TensorEntry(
            ("shared_mlp", "gate_up", "kernel"), "shared_mlp.input_linear.weight", fused
        )
        out = (d, config.shared_d_ff)
        yield TensorEntry(("shared_mlp", "down", "kernel"), "shared_mlp.output_linear.weight", out)
    if not layer.experts:
        sizes = {"gate": (config.d_ff, d), "up": (config.d_ff, d), "down": (d, config.d_ff)}
        for part, (out, into) in sizes.items():
            # Feed-forward parameters are bare arrays by part, as in moe_jax.experts.FeedForward.
            yield TensorEntry(("mlp", part, "kernel"), f"mlp.{part}_proj.weight", (out, into))
            if config.mlp_bias:
                yield TensorEntry(("mlp", part, "bias"), f"mlp.{part}_proj.bias", (out,))


def end_entries(config: DecoderConfig) -> Iterator[TensorEntry]:
    """The tensors outside the layers: embedding, last norm, head."""
    v, d = config.vocab_size, config.d_model
    yield TensorEntry(("embedding",), "model.embed_tokens.weight", (v, d))
    yield from _norm(config, ("norm",), "model.norm", d)
    if not config.tied:
        yield TensorEntry(("head", "kernel"), "lm_head.weight", (v, d))
    if config.head_bias:
        yield TensorEntry(("head", "bias"), "lm_head.bias", (v,))


def _norm(
    config: DecoderConfig, path: tuple[str, ...], name: str, size: int
) -> Iterator[TensorEntry]:
    yield TensorEntry((*path, "scale"), f"{name}.weight", (size,))
    if config.norm == "layer":
        yield TensorEntry((*path, "bias"), f"{name}.bias", (size,))


def _linear(part: str, name: str, out: int, into: int, bias: bool) -> Iterator[TensorEntry]:
    yield TensorEntry(("attention", part, "kernel"), f"self_attn.{name}.weight", (out, into))
    if bias:
        yield TensorEntry(("attention", part, "bias"), f"self_attn.{name}.bias", (out,))


def _attention_entries(config: DecoderConfig) -> Iterator[TensorEntry]:
    d, heads = config.d_model, config.num_heads
    latent = config.latent
    if latent is not None:
        queries = heads * (latent.nope_dim + latent.rope_dim)
        if latent.query_rank is None:
            yield from _linear("q", "q_proj", queries, d, False)
        else:
            yield from _linear("q_a", "q_a_proj", latent.query_rank, d, config.qkv_bias)
            path = ("attention", "q_a_norm", "scale")
            yield TensorEntry(path, "self_attn.q_a_layernorm.weight", (latent.query_rank,))
            yield from _linear("q", "q_b_proj", queries, latent.query_rank, False)
        rank, up = latent.rank, heads * (latent.nope_dim + latent.value_dim)
        yield from _linear("kv_a", "kv_a_proj_with_mqa", rank + latent.rope_dim, d, config.qkv_bias)
        yield TensorEntry(
            ("attention", "kv_a_norm", "scale"), "self_attn.kv_a_layernorm.weight", (rank,)
        )
        yield from _linear("kv_b", "kv_b_proj", up, rank, False)
        yield from _linear("o", "o_proj", d, heads * latent.value_dim, config.out_bias)
        return
    queries, keys = heads * config.head_dim, config.num_kv_heads * config.head_dim
    for part, out in (("q", queries), ("k", keys), ("v", keys)):
        yield from _linear(part, f"{part}_proj", out, d, config.qkv_bias)
    yield from _linear("o", "o_proj", d, queries, config.out_bias)
    if config.qk_norm != "none":
        whole = config.qk_norm == "full"
        for part, size in (("q", queries), ("k", keys)):
            path = ("attention", f"{part}_norm", "scale")
            name = f"self_attn.{part}_norm.weight"
            yield TensorEntry(path, name, (size if whole else config.head_dim,))
    if config.output_gate:
        yield from _linear("gate", "gate_proj", queries, d, False)
    if config.sinks:
        yield TensorEntry(("attention", "sinks"), "self_attn.sinks", (heads,))


def check_present(names: Collection[str], entry: TensorEntry, *, where: str) -> None:
    """Checks that an entry's tensor is among these names inside its layer.

    Raises:
        ValueError: it is missing.
    """
    if entry.name in names:
        return
    near = sorted(n for n in names if n.split(".")[0] == entry.name.split(".")[0])
    raise ValueError(
        f"{where}: expected a tensor {entry.name!r} of shape {list(entry.shape)}, got none. There are "
        f"{', '.join(near[:8]) or 'none of that module'}. Check the config against the checkpoint."
    )


def take(
    tensors: Mapping[str, Tensor], entries: Iterator[TensorEntry], *, dtype: Any, where: str
) -> dict[str, Any]:
    """The parameters that the entries name, each in ``dtype``.

    Args:
        tensors: name inside the layer -> tensor.
        entries: see ``layer_entries``.
        dtype: of the parameters.
        where: for messages, e.g. ``"olmoe, layer 3"``.

    Raises:
        ValueError: a tensor is missing, of another shape or quantised. It is named.
    """
    out: dict[str, Any] = {}
    for entry in entries:
        check_present(tensors, entry, where=where)
        tensor = tensors[entry.name]
        check_plain(f"{where}, {entry.name!r}", tensor)
        if tuple(tensor.shape) != entry.shape:
            raise ValueError(
                f"{where}: expected {entry.name!r} to be float{list(entry.shape)}, got "
                f"{tensor.dtype}{list(tensor.shape)}. Check the config against the checkpoint."
            )
        place = out
        for key in entry.path[:-1]:
            place = place.setdefault(key, {})
        array = tensor.swapaxes(0, 1) if entry.transposed else tensor
        place[entry.path[-1]] = to_device(array, dtype)
    if "mlp" in out:
        out["mlp"] = _feed_forward(out["mlp"])
    return out


def _feed_forward(parts: Mapping[str, Params]) -> Params:
    """``{"gate": kernel, "gate_bias": bias, ...}`` from ``{"gate": {"kernel", "bias"}, ...}``."""
    out = {part: held["kernel"] for part, held in parts.items()}
    return out | {f"{part}_bias": held["bias"] for part, held in parts.items() if "bias" in held}


def give(params: Params, entry: TensorEntry) -> np.ndarray:
    """The tensor of one entry: the inverse of ``take``."""
    path = entry.path
    if path[0] == "mlp":
        path = ("mlp", path[1] if path[2] == "kernel" else f"{path[1]}_bias")
    array: Any = params
    for key in path:
        array = array[key]
    held = np.asarray(array)
    return held.T if entry.transposed else held


def check_unused(names: list[str], *, where: str) -> None:
    """Refuses tensors that no parameter was made of.

    Raises:
        ValueError: there are some.
    """
    left = [n for n in names if not n.endswith("rotary_emb.inv_freq")]
    if not left:
        return
    raise ValueError(
        f"{where}: expected no further tensors, got {', '.join(map(repr, sorted(left)[:6]))}. The "
        "config describes a layer without them, so the model would give other numbers."
    )


# --- experts, the way back --------------------------------------------------------------------


class BlockTensors:
    """The tensors of a Mixture-of-Experts block as the Hub has them.

    The inverse of ``moe_jax.interop.moe_block_from_hf`` for blocks of the families in
    ``moe_jax.models.architectures``.

    Args:
        shapes: of the checkpoint's tensors, by name inside the block.
        params: of the ``MoEBlock``.
        state: its router's state.
        interleaved: whether gate and up alternate in a fused tensor.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        params: Params,
        state: Any,
        *,
        interleaved: bool,
    ) -> None:
        self._shapes = dict(shapes)
        # Once for all tensors: on an accelerator this copies the block to the host.
        self._params = jax.tree.map(np.asarray, params)
        self._state = state
        self._interleaved = interleaved
        by_meaning = {canonical(name) or "": shape for name, shape in shapes.items()}
        self._torch_like = _torch_like(by_meaning, self._params["experts"])

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor of that name inside the block.

        Raises:
            ValueError: no parameter determines it, or it has another shape than in the checkpoint.
        """
        params, shape = self._params, self._shapes[name]
        meaning = canonical(name) or ""
        part, _, rest = meaning.partition(".")
        array = None
        if part == "experts":
            array = _expert_tensor(rest, params["experts"], self._torch_like, self._interleaved)
        elif part == "router" and rest in params["router"]:
            held = params["router"][rest]
            array = held.T if rest == "kernel" else held
        elif part == "shared" and "shared" in params:
            array = _shared_tensor(rest, params["shared"])
        elif meaning == "shared_gate":
            array = params["shared_gate"].T
        elif meaning in ("output_norm", "output_bias"):
            array = params[meaning]
        elif meaning == "expert_bias" and hasattr(self._state, "expert_bias"):
            array = np.asarray(self._state.expert_bias).reshape(shape)
        if array is None:
            raise ValueError(
                f"{name!r}: expected a tensor that the block's parameters determine, got one that "
                "they do not. Save the block with moe_jax.checkpoint instead."
            )
        if array.shape != shape:
            raise ValueError(
                f"{name!r}: expected shape {list(shape)} as in the checkpoint, got "
                f"{list(array.shape)}. The block has other sizes than the folder that it came from."
            )
        return array


def _torch_like(shapes: Mapping[str, tuple[int, ...]], experts: Params) -> bool:
    """Whether stacked expert tensors are [E, out, in]; parameters are [E, in, out]."""
    down, d, f = shapes.get("experts.down"), *experts["up"].shape[1:]
    if down is None or f != d:
        return down is None or down[1:] == (d, f)
    # Square matrices: the fused tensor tells.
    fused = shapes.get("experts.gate_up") or shapes.get("experts.gate_up_interleaved")
    return fused is None or fused[1:] == (2 * f, d)


def _expert_tensor(
    rest: str, experts: Params, torch_like: bool, interleaved: bool
) -> np.ndarray | None:
    first, _, part = rest.partition(".")
    if first.isdigit():  # one matrix an expert
        held = experts[part][int(first)]
        return held if part.endswith("_bias") else held.T
    if rest in ("gate_up", "gate_up_interleaved"):
        both = _both(experts, "gate", "up", interleaved or rest.endswith("interleaved"))
        return both.swapaxes(1, 2) if torch_like else both
    if rest == "gate_up_bias":
        return _both(experts, "gate_bias", "up_bias", interleaved)
    if rest not in experts:
        return None
    held = experts[rest]
    return held.swapaxes(1, 2) if torch_like and held.ndim == 3 else held


def _both(params: Params, gate: str, up: str, interleaved: bool) -> np.ndarray:
    """Gate and up in the last axis, alternating or one after the other."""
    halves = [params[gate], params[up]]
    if interleaved:
        return np.stack(halves, axis=-1).reshape(*halves[0].shape[:-1], -1)
    return np.concatenate(halves, axis=-1)


def _shared_tensor(rest: str, shared: Params) -> np.ndarray | None:
    if rest == "gate_up":
        return _both(shared, "gate", "up", interleaved=False).T
    if rest not in shared:
        return None
    return shared[rest].T  # a bias is its own transpose
