"""Published decoders as pure functions, and ``CausalLM``, the module that holds their arrays."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from moe_jax.checks import check_array
from moe_jax.experts import ACTIVATIONS, FeedForward
from moe_jax.interop import MoEBlock
from moe_jax.layer import LayerAux
from moe_jax.models.attention import TokenLayout, attend, normalize, product, project
from moe_jax.models.decoder_config import DecoderConfig, LayerConfig
from moe_jax.models.kv_cache import KVCache
from moe_jax.nn.nnx import RouterState, arrays, hold
from moe_jax.types import Array, Params, pytree

Implementation = str | tuple[str, ...] | None


@pytree
class DecoderOutput:
    """The logits of a decoder and what the call requested besides; the rest is empty or None."""

    logits: Array  # f32[B, S, V]
    # float[B, S, D] each: the embeddings, then the output of each layer; the last one is normed.
    hidden: tuple[Array, ...]
    reports: tuple[LayerAux, ...]  # one per layer with experts
    cache: KVCache | None


# --- pure functions ---------------------------------------------------------------------------


@jax.jit
def token_layout(input_ids: Array, attention_mask: Array | None) -> TokenLayout:
    """Returns positions and masks of whole sequences; positions count real tokens from 0.

    Args:
        input_ids: i32[B, S].
        attention_mask: bool or int[B, S], 0 for padding; None is no padding.
    """
    mask = (
        jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    )
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    return TokenLayout(
        positions=positions, mask=mask, key_mask=mask, start=jnp.zeros((), jnp.int32)
    )


@jax.jit
def cached_layout(layout: TokenLayout, cache: KVCache) -> TokenLayout:
    """Returns the layout of tokens that follow the tokens of a cache."""
    start = cache.length
    # `start * 0` is a zero of the dtype of `start`: both indices of the update need one dtype.
    key_mask = jax.lax.dynamic_update_slice(cache.key_mask, layout.mask, (start * 0, start))
    positions = layout.positions + cache.positions[:, None]
    return TokenLayout(positions=positions, mask=layout.mask, key_mask=key_mask, start=start)


@functools.partial(jax.jit, static_argnames="config")
def embed(config: DecoderConfig, params: Params, input_ids: Array) -> Array:
    """float[B, S, D]: the embeddings of input_ids i32[B, S], in the dtype of the parameters."""
    h = params["embedding"][input_ids]
    return (h * config.embedding_multiplier).astype(h.dtype)


@functools.partial(jax.jit, static_argnames="config")
def final_norm(config: DecoderConfig, params: Params, h: Array) -> Array:
    """float[B, S, D]: hidden states h after the last layer, normed."""
    return normalize(params["norm"], h, eps=config.norm_eps)


@functools.partial(jax.jit, static_argnames="config")
def unembed(config: DecoderConfig, params: Params, h: Array) -> Array:
    """f32[B, S, V]: the logits of normed hidden states h float[B, S, D]."""
    if config.tied:
        kernel = params["embedding"].T.astype(h.dtype)
        logits = jnp.matmul(h, kernel, preferred_element_type=jnp.float32)
    else:
        logits = product(h, params["head"]["kernel"].astype(h.dtype))
    if config.head_bias:
        logits = logits + params["head"]["bias"].astype(jnp.float32)[None, None, :]
    logits = logits * config.logits_multiplier
    if config.logits_softcap is not None:
        logits = config.logits_softcap * jnp.tanh(logits / config.logits_softcap)
    return logits


@functools.partial(
    jax.jit,
    static_argnames=("config", "layer", "implementation", "report"),
    donate_argnames="cache",
)
def decoder_layer(
    config: DecoderConfig,
    layer: LayerConfig,
    params: Params,
    h: Array,
    layout: TokenLayout,
    cache: Params | None = None,
    *,
    implementation: Implementation = None,
    report: bool = False,
) -> tuple[Array, Params | None, LayerAux | None]:
    """Computes one layer. It is compiled once for all layers of equal ``layer`` and shapes.

    Args:
        config: the decoder (static).
        layer: the configuration of this layer (static).
        params: ``attention``, norms, and ``moe`` (a ``MoEBlock``) or ``mlp``.
        h: float[B, S, D].
        layout: positions and padding.
        cache: this layer's keys and values, or None. It is donated: do not use it after the call.
        implementation: how experts run, see ``moe_jax.experts``.
        report: whether the block's routing and statistics are returned.

    Returns:
        float[B, S, D], the cache with this call's tokens, and the report or None.
    """
    h, cache = attention_half(config, layer, params, h, layout, cache)
    h, aux = feed_forward_half(config, layer, params, h, layout.mask, implementation=implementation)
    return h, cache, aux if report else None


def attention_half(
    config: DecoderConfig,
    layer: LayerConfig,
    params: Params,
    h: Array,
    layout: TokenLayout,
    cache: Params | None = None,
) -> tuple[Array, Params | None]:
    """Computes the first half of ``decoder_layer``: h float[B, S, D] after attention, and the cache."""
    x = _norm_if(config, params, "attention_norm", h)
    y, cache = attend(config, layer, params["attention"], x, layout, cache)
    return _add(config, h, _norm_if(config, params, "attention_post_norm", y)), cache


def block_input(config: DecoderConfig, params: Params, h: Array) -> Array:
    """float[B, S, D]: what the experts' block of a layer receives, from h after attention."""
    return _norm_if(config, params, "mlp_norm", h)


def feed_forward_half(
    config: DecoderConfig,
    layer: LayerConfig,
    params: Params,
    h: Array,
    mask: Array,
    *,
    implementation: Implementation = None,
) -> tuple[Array, LayerAux | None]:
    """Computes the second half of ``decoder_layer`` from h float[B, S, D] after attention.

    Returns:
        float[B, S, D], and the report of the block, None in a dense layer.
    """
    x = block_input(config, params, h)
    aux = None
    if layer.experts:
        block: MoEBlock = params["moe"]
        y, aux = block.apply(
            block.params,
            x,
            token_mask=mask,
            implementation=implementation,
            return_aux=True,
        )
        if config.shared_d_ff:
            y = y + _shared_mlp(config, params["shared_mlp"], x)
    else:
        dense = FeedForward(activation=config.activation, gated=True, use_bias=config.mlp_bias)
        y = dense(params["mlp"], x.reshape(-1, x.shape[-1])).reshape(x.shape)
    return _add(config, h, _norm_if(config, params, "mlp_post_norm", y)), aux


def _shared_mlp(config: DecoderConfig, params: Params, x: Array) -> Array:
    """Computes the shared feed-forward part; one kernel holds gate and up (Granite)."""
    both = project(params["gate_up"], x)
    gate, up = both[..., : config.shared_d_ff], both[..., config.shared_d_ff :]
    return project(params["down"], ACTIVATIONS[config.activation](gate) * up)


def _norm_if(config: DecoderConfig, params: Params, name: str, x: Array) -> Array:
    """Applies the norm ``name`` if the layer has it, else returns x."""
    return normalize(params[name], x, eps=config.norm_eps) if name in params else x


def _add(config: DecoderConfig, h: Array, y: Array) -> Array:
    return (h + y * config.residual_multiplier).astype(h.dtype)


def forward(
    config: DecoderConfig,
    params: Params,
    input_ids: Array,
    attention_mask: Array | None = None,
    *,
    cache: KVCache | None = None,
    implementation: Implementation = None,
    return_hidden: bool = False,
    return_reports: bool = False,
    last_only: bool = False,
) -> DecoderOutput:
    """Computes the logits of a decoder. Each layer is compiled separately, equal layers once.

    Args:
        config: the decoder.
        params: ``embedding``, ``layers``, ``norm`` and ``head``, as ``CausalLM.params`` gives them.
        input_ids: i32[B, S].
        attention_mask: bool or int[B, S], 0 for padding; None is no padding.
        cache: keys and values of the preceding tokens, from ``init_cache`` or an earlier call. It is
            donated: use the returned cache after the call.
        implementation: how experts run, see ``moe_jax.experts``.
        return_hidden: whether hidden states are returned.
        return_reports: whether each block's routing and statistics are returned.
        last_only: whether only the last position is unembedded: logits f32[B, 1, V], and the last
            of ``hidden`` float[B, 1, D].

    Raises:
        TypeError, ValueError: an input has the wrong shape or dtype, an id is outside the vocabulary,
            or the cache has no room for the tokens.
    """
    check_tokens(config, input_ids, attention_mask, cache)
    layout = token_layout(input_ids, attention_mask)
    if cache is not None:
        layout = cached_layout(layout, cache)
    held: Sequence[Params | None] = [None] * config.num_layers if cache is None else cache.layers
    h = embed(config, params, input_ids)
    hidden, reports, layers = [h], [], []
    for layer, weights, kept in zip(config.layers, params["layers"], held, strict=True):
        h, kept, aux = decoder_layer(
            config,
            layer,
            weights,
            h,
            layout,
            kept,
            implementation=implementation,
            report=return_reports,
        )
        hidden.append(h)
        layers.append(kept)
        if aux is not None:
            reports.append(aux)
    normed = final_norm(config, params, h[:, -1:] if last_only else h)
    if return_hidden:
        hidden[-1] = normed
    if cache is not None:
        cache = KVCache(
            layers=tuple(layers),
            key_mask=layout.key_mask,
            positions=cache.positions + layout.mask.sum(axis=1, dtype=jnp.int32),
            length=cache.length + input_ids.shape[1],
        )
    return DecoderOutput(
        logits=unembed(config, params, normed),
        hidden=tuple(hidden) if return_hidden else (),
        reports=tuple(reports),
        cache=cache,
    )


def check_tokens(
    config: DecoderConfig,
    input_ids: Array,
    attention_mask: Array | None = None,
    cache: KVCache | None = None,
) -> None:
    """Checks shapes and, outside a trace, the values of ids and the room in the cache.

    Raises:
        TypeError, ValueError: see ``forward``.
    """
    check_array(
        "input_ids",
        input_ids,
        "B S",
        kind="int",
        fix="Pass token ids [sequences, tokens] as int32.",
    )
    if attention_mask is not None and (
        not hasattr(attention_mask, "shape") or attention_mask.shape != input_ids.shape
    ):
        got = getattr(attention_mask, "shape", None)
        got = f"a {type(attention_mask).__name__}" if got is None else f"shape {list(got)}"
        raise ValueError(
            f"attention_mask: expected shape {list(input_ids.shape)} like input_ids, got {got}. Pass "
            "one flag per token, 0 for padding."
        )
    if not isinstance(input_ids, Tracer):
        ids = np.asarray(input_ids)
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            bad = ids[(ids < 0) | (ids >= config.vocab_size)][0]
            raise ValueError(
                f"input_ids: expected ids from 0 to {config.vocab_size - 1}, got {bad}. Use the "
                "model's tokenizer; for padding, pass any valid id and 0 in attention_mask."
            )
    if cache is not None and not isinstance(cache.length, Tracer):
        room = cache.capacity - int(cache.length)
        if input_ids.shape[1] > room:
            raise ValueError(
                f"input_ids: expected at most {room} tokens, the room left in the cache, got "
                f"{input_ids.shape[1]}. Give init_cache a larger capacity."
            )


# --- the module -------------------------------------------------------------------------------


class HeldBlock(nnx.Module):
    """Holds the arrays of a ``MoEBlock`` as NNX variables, and its static parts as attributes."""

    def __init__(self, block: MoEBlock) -> None:
        self.weights = hold(block.params, "")
        self.router_state = RouterState(block.state)
        self.router = block.router
        self.expert_fn = block.expert_fn
        self.shared_fn = block.shared_fn
        self.options = block.options

    def block(self) -> MoEBlock:
        """Returns the block with the current arrays."""
        return MoEBlock(
            params=arrays(self.weights),
            state=self.router_state.get_value(),
            router=self.router,
            expert_fn=self.expert_fn,
            shared_fn=self.shared_fn,
            options=self.options,
        )


class HeldLayer(nnx.Module):
    """Holds the arrays of one decoder layer as NNX variables."""

    def __init__(self, params: Params) -> None:
        self.weights = hold({k: v for k, v in params.items() if k != "moe"}, "")
        self.moe = HeldBlock(params["moe"]) if "moe" in params else None

    def params(self) -> Params:
        """The arrays as ``decoder_layer`` takes them."""
        held = arrays(self.weights)
        return held if self.moe is None else held | {"moe": self.moe.block()}


class CausalLM(nnx.Module):
    """A published decoder. It holds arrays; the functions of this file do every computation.

    Args:
        config: the decoder.
        params: ``embedding`` [V, D], ``layers`` (a list, see ``decoder_layer``), ``norm``, and
            ``head`` unless the embedding also serves as the head.
        source: what ``save_model`` needs to write the model as it was read, or None.

    Example:
        >>> from moe_jax.models import load_model
        >>> folder = "tests/goldens/models/mixtral"
        >>> model = load_model(folder)
        >>> model(jnp.array([[5, 6, 7]])).shape
        (1, 3, 96)
    """

    def __init__(self, config: DecoderConfig, params: Params, *, source: Any = None) -> None:
        self.config = config
        self.source = source
        self.ends = hold({k: v for k, v in params.items() if k != "layers"}, "")
        self.layers = nnx.List([HeldLayer(layer) for layer in params["layers"]])

    def params(self) -> Params:
        """The arrays as ``forward`` takes them."""
        return arrays(self.ends) | {"layers": [layer.params() for layer in self.layers]}

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the hidden states."""
        return self.ends["embedding"].get_value().dtype

    def __call__(
        self, input_ids: Array, attention_mask: Array | None = None, **kwargs: Any
    ) -> Array:
        """f32[B, S, V]: logits of the next token after each of input_ids i32[B, S].

        Args:
            input_ids: i32[B, S].
            attention_mask: bool or int[B, S], 0 for padding.
            **kwargs: ``implementation``: see ``forward``.
        """
        return self.run(input_ids, attention_mask, **kwargs).logits

    def run(
        self, input_ids: Array, attention_mask: Array | None = None, **kwargs: Any
    ) -> DecoderOutput:
        """Logits with hidden states, reports or a cache: see ``forward``."""
        return forward(self.config, self.params(), input_ids, attention_mask, **kwargs)

    def blocks(self) -> dict[int, MoEBlock]:
        """The Mixture-of-Experts block of each layer that has one, by the layer's number."""
        held = ((i, layer.moe) for i, layer in enumerate(self.layers))
        return {i: moe.block() for i, moe in held if moe is not None}

    def set_block(self, layer: int, block: MoEBlock) -> None:
        """Puts another block into a layer, e.g. one with another rule from ``make_dynamic``.

        Raises:
            ValueError: the layer has no experts.
        """
        if layer not in self.config.moe_layers:
            raise ValueError(
                f"layer: expected a layer with experts, one of {list(self.config.moe_layers)}, "
                f"got {layer}. Choose one of these."
            )
        self.layers[layer].moe = HeldBlock(block)
