"""The loss of a published model on token ids, with one layer in memory at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.interop import MoEBlock
from moe_jax.models.causal_lm import (
    CausalLM,
    Implementation,
    check_tokens,
    embed,
    final_norm,
    token_layout,
    unembed,
)
from moe_jax.models.decoder_config import DecoderConfig
from moe_jax.models.load import HubFolder, StreamedLayer, stream_layers
from moe_jax.types import Array, Params

# Called with the layers that are done, how many there are, and what is done now.
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a model predicts token ids.

    Attributes:
        loss: mean negative log probability of the next token, in nats.
        tokens: how many tokens were predicted.
        sequence_loss: f64[N], the mean of each sequence; NaN where nothing was predicted.
        sequence_tokens: i64[N], how many tokens of each were predicted.
        experts_per_token: mean number of experts a token used, by number of the layer.
    """

    loss: float
    tokens: int
    sequence_loss: np.ndarray
    sequence_tokens: np.ndarray
    experts_per_token: dict[int, float]

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss)


@functools.partial(jax.jit, static_argnames="config")
def token_losses(
    config: DecoderConfig, ends: Params, h: Array, input_ids: Array, mask: Array
) -> Array:
    """f32[B, S - 1]: negative log probability of each next token, 0 where it is padding.

    Args:
        config: the decoder.
        ends: last norm and head (``HubFolder.ends``).
        h: float[B, S, D] after the last layer.
        input_ids: i32[B, S].
        mask: bool[B, S], False for padding.
    """
    logits = unembed(config, ends, final_norm(config, ends, h[:, :-1]))
    chosen = jnp.take_along_axis(logits, input_ids[:, 1:, None], axis=-1)[:, :, 0]
    predicted = mask[:, :-1] & mask[:, 1:]
    return jnp.where(predicted, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)


def evaluate(
    model: str | Path | HubFolder | CausalLM,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    batch_size: int = 8,
    dtype: Any = None,
    change_block: Callable[[int, MoEBlock], MoEBlock] | None = None,
    implementation: Implementation = None,
    progress: Progress | None = None,
) -> Evaluation:
    """The loss of a model on sequences of token ids.

    A folder is read layer by layer: all sequences pass a layer before the next one is read, so memory
    holds one layer and the hidden states of all sequences (N * S * D numbers).

    Args:
        model: a folder (see ``load_model``), the same opened, or a model in memory.
        input_ids: i32[N, S].
        attention_mask: bool or int[N, S], 0 for padding.
        batch_size: sequences that run at a time.
        dtype: see ``HubFolder``; for a folder only.
        change_block: ``(layer, block) -> block``, e.g. one with another rule.
        implementation: how experts run, see ``moe_jax.experts``.
        progress: called after each layer with the number of layers done, of all, and a word.

    Raises:
        TypeError, ValueError: see ``forward``; or sequences with nothing to predict.

    Example:
        >>> ids = np.arange(20).reshape(2, 10)
        >>> result = evaluate("tests/goldens/models/mixtral", ids)
        >>> result.tokens, result.experts_per_token
        (18, {0: 2.0, 1: 2.0})
    """
    ids: Any = np.asarray(input_ids)
    mask: Any = None if attention_mask is None else np.asarray(attention_mask)
    if isinstance(model, CausalLM):
        config, params = model.config, model.params()
        ends: Params = {k: v for k, v in params.items() if k != "layers"}
        layers = (StreamedLayer(i, config, layer) for i, layer in enumerate(params["layers"]))
    else:
        opened = model if isinstance(model, HubFolder) else HubFolder(model, dtype=dtype)
        config, ends, layers = opened.config, opened.ends(), stream_layers(opened)
    check_tokens(config, ids, mask)
    ids = ids.astype(np.int32)
    real = np.ones(ids.shape, bool) if mask is None else mask.astype(bool)
    predicted = (real[:, :-1] & real[:, 1:]).sum(axis=1)
    if not predicted.sum():
        raise ValueError(
            f"input_ids: expected sequences of at least two real tokens, got {list(ids.shape)} with "
            "nothing to predict. Give longer sequences."
        )
    parts = [slice(i, i + batch_size) for i in range(0, len(ids), batch_size)]
    layouts = [token_layout(ids[part], real[part]) for part in parts]
    hidden = [embed(config, ends, ids[part]) for part in parts]
    used: dict[int, float] = {}
    for layer in layers:
        if change_block is not None and layer.block is not None:
            layer.params = layer.params | {"moe": change_block(layer.number, layer.block)}
        counts = []
        for i, layout in enumerate(layouts):
            hidden[i], aux = layer(hidden[i], layout, implementation=implementation)
            if aux is not None:
                counts.append(aux.routing.num_experts_per_token.sum())
        if counts:
            used[layer.number] = float(sum(map(int, counts)) / real.sum())
        # Work is queued, not done, when a call returns: the next layer must not be read before it is.
        jax.block_until_ready(hidden)
        if progress is not None:
            progress(layer.number + 1, config.num_layers, "layers")
    sums = np.zeros(len(ids), np.float64)
    for part, h in zip(parts, hidden, strict=True):
        losses = token_losses(config, ends, h, ids[part], real[part])
        sums[part] = np.asarray(losses, np.float64).sum(axis=1)
    with np.errstate(invalid="ignore"):
        each = np.where(predicted > 0, sums / np.maximum(predicted, 1), np.nan)
    return Evaluation(
        loss=float(sums.sum() / predicted.sum()),
        tokens=int(predicted.sum()),
        sequence_loss=each,
        sequence_tokens=predicted,
        experts_per_token=used,
    )
