"""Keys and values of tokens that a decoder has seen, as a pytree of fixed shape."""

from __future__ import annotations

import jax.numpy as jnp

from moe_jax.models.decoder_config import DecoderConfig
from moe_jax.types import Array, Params, pytree


@pytree
class KVCache:
    """What attention keeps of the tokens so far. Shapes never change, so a step compiles once."""

    layers: tuple[
        Params, ...
    ]  # {"k", "v"} float[B, L, kv, head_dim], or {"latent", "k_rope"} float[B, L, n]
    key_mask: Array  # bool[B, L]: which slots hold a real token
    positions: Array  # i32[B]: position of each sequence's next token
    length: Array  # i32[]: slots in use; the same for all sequences, padding included

    @property
    def capacity(self) -> int:
        """L, the number of slots."""
        return self.key_mask.shape[1]


def init_cache(
    config: DecoderConfig, batch: int, capacity: int, *, dtype: jnp.dtype | type = jnp.float32
) -> KVCache:
    """An empty cache.

    Args:
        config: the decoder.
        batch: B, sequences.
        capacity: L, the most tokens of one sequence, padding included.
        dtype: of keys and values; the model's.

    Raises:
        ValueError: the rotary positions of the model do not hold for ``capacity`` tokens.

    Example:
        >>> from moe_jax.models.decoder_config import DecoderConfig, LayerConfig
        >>> config = DecoderConfig(model_type="mixtral", vocab_size=8, d_model=4, num_heads=2,
        ...     num_kv_heads=1, head_dim=2, softmax_scale=1.0, layers=(LayerConfig(),))
        >>> init_cache(config, 1, 16).layers[0]["k"].shape
        (1, 16, 1, 2)
    """
    for layer in config.layers:
        rope = layer.rope
        if rope is None or rope.kind not in ("dynamic", "longrope"):
            continue
        longest = rope.max_length if rope.kind == "dynamic" else rope.original_length
        if capacity > longest:
            raise ValueError(
                f"capacity: expected at most {longest} tokens, got {capacity}. Rotary positions of "
                f"kind {rope.kind!r} change beyond that length, for cached keys too: shorten the "
                "sequence, or run the whole sequence without a cache (use_cache=False)."
            )
    widths: dict[str, tuple[int, ...]]
    if config.latent is None:
        shape = (config.num_kv_heads, config.head_dim)
        widths = {"k": shape, "v": shape}
    else:
        widths = {"latent": (config.latent.rank,), "k_rope": (config.latent.rope_dim,)}
    return KVCache(
        layers=tuple(
            {name: jnp.zeros((batch, capacity, *width), dtype) for name, width in widths.items()}
            for _ in config.layers
        ),
        key_mask=jnp.zeros((batch, capacity), bool),
        positions=jnp.zeros(batch, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )
