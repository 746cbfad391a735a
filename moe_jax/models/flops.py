"""Floating-point operations of a forward pass: what routing uses, and what is executed."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from moe_jax.interop import MoEBlock
from moe_jax.models.decoder_config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopCount:
    """Floating-point operations of matrix products; two a multiplication with its addition.

    Attributes:
        experts_used: of routed experts, for the experts that tokens use.
        experts_executed: the same for the rows that were computed, padding of groups included.
        rest: attention, dense and shared feed-forward parts, and the head.
    """

    experts_used: float
    experts_executed: float
    rest: float

    @property
    def used(self) -> float:
        """Everything, with the experts that tokens use."""
        return self.experts_used + self.rest

    @property
    def executed(self) -> float:
        """Everything, with the rows that were computed."""
        return self.experts_executed + self.rest


def flops_of_experts(block: MoEBlock, rows: np.ndarray) -> np.ndarray:
    """f64[2]: operations of a block's routed experts for f64[2] expert rows, used and executed."""
    matrices = [leaf for leaf in jax.tree.leaves(block.params["experts"]) if leaf.ndim == 3]
    each = 2.0 * sum(leaf.shape[1] * leaf.shape[2] for leaf in matrices)
    return each * rows


def flops_of_rest(config: DecoderConfig, mask: np.ndarray) -> float:
    """Operations outside the routed experts and their block.

    Args:
        config: the decoder.
        mask: bool[N, S], the tokens; padding is not counted.
    """
    d, heads = config.d_model, config.num_heads
    lengths = mask.sum(axis=1).astype(np.float64)
    if config.latent is None:
        key, value = config.head_dim, config.head_dim
        weights = d * config.head_dim * (2 * heads + 2 * config.num_kv_heads)
    else:
        part = config.latent
        key, value = part.nope_dim + part.rope_dim, part.value_dim
        queries = heads * key
        weights = d * queries if part.query_rank is None else part.query_rank * (d + queries)
        weights += d * (part.rank + part.rope_dim)
        weights += part.rank * heads * (part.nope_dim + value) + heads * value * d
    total = 0.0
    for layer in config.layers:
        # A token attends to itself and what is before it, at most to its window.
        seen = lengths * (lengths + 1) / 2
        if layer.window is not None:
            over = np.maximum(lengths - layer.window, 0)
            seen = seen - over * (over + 1) / 2
        dense = config.shared_d_ff if layer.experts else config.d_ff
        total += float(lengths.sum()) * 2 * (weights + 3 * d * dense)
        total += float(seen.sum()) * 2 * heads * (key + value)
    return total + float(lengths.sum()) * 2 * d * config.vocab_size
