"""Attention of published models as pure functions: grouped queries, and DeepSeek's latent attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.experts.vector_product import vector_product
from moe_jax.models.decoder_config import DecoderConfig, LatentConfig, LayerConfig
from moe_jax.models.rope import angles, rotate
from moe_jax.types import Array, Params, pytree

# Queries of one block of scores. Blocks of 128 and 512 took the same time within the noise.
# `benchmarks/whole_model.py` times the result.
_BLOCK = 256
# Scores of all heads above which a CPU computes one head after the other: 1 MiB, a core's cache.
_MOST_SCORES = 2**18


@pytree
class TokenLayout:
    """Where the tokens of one call stand in their sequences.

    Slots are columns of the cache, or of ``input_ids`` without a cache; padding takes slots.
    Positions count real tokens only.
    """

    positions: Array  # i32[B, S]
    mask: Array  # bool[B, S]: False for padding
    key_mask: Array  # bool[B, L]: which slots hold a real token, those of this call included
    start: Array  # i32[]: slot of the first token of this call


def product(x: Array, kernel: Array) -> Array:
    """``x @ kernel`` as f32[..., out] for x float[..., in] and a kernel [in, out] of the same dtype."""

    def matmul(x: Array, kernel: Array) -> Array:
        return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)

    def one_row(x: Array, kernel: Array) -> Array:
        out = vector_product(kernel[None], jnp.int32(0), x.reshape(-1))
        return out.reshape(*x.shape[:-1], -1)

    if x.size != x.shape[-1] or x.dtype != jnp.float32:
        return matmul(x, kernel)
    # One token: the time is that of reading the kernel.
    return jax.lax.platform_dependent(x, kernel, cpu=one_row, default=matmul)


def project(params: Params, x: Array) -> Array:
    """``x @ kernel + bias`` for x float[..., in], in the dtype of x, summed in float32."""
    out = product(x, params["kernel"].astype(x.dtype))
    if "bias" in params:
        bias = params["bias"].astype(jnp.float32)
        out = out + bias.reshape((1,) * (out.ndim - 1) + bias.shape)
    return out.astype(x.dtype)


def normalize(params: Params, x: Array, *, eps: float) -> Array:
    """Root-mean-square norm of x float[..., n], or layer norm where ``params`` have a bias."""
    wide = x.astype(jnp.float32)
    lead = (1,) * (x.ndim - 1)
    if "bias" in params:
        wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + eps)
    wide = wide * params["scale"].astype(jnp.float32).reshape(*lead, -1)
    if "bias" in params:
        wide = wide + params["bias"].astype(jnp.float32).reshape(*lead, -1)
    return wide.astype(x.dtype)


class _Block(NamedTuple):
    """A run of queries, and the run of keys that contains all that they attend to."""

    queries: slice
    keys: slice


def _blocks(queries: int, keys: int, *, window: int | None, cached: bool) -> list[_Block]:
    """Runs of at most ``_BLOCK`` queries.

    Scores of all pairs would be written to memory, half of them to be masked. A block's scores fit in
    the processor's cache, and keys after its last query, or before its window, are left out. In a
    cache, the slot of the first query is known at run time only, so all keys stay.
    """
    blocks = []
    for start in range(0, queries, _BLOCK):
        end = min(start + _BLOCK, queries)
        first = 0 if window is None else max(0, start - window + 1)
        reached = slice(0, keys) if cached else slice(first, end)
        blocks.append(_Block(slice(start, end), reached))
    return blocks


def _visible(layout: TokenLayout, block: _Block, window: int | None) -> Array:
    """bool[B, s, l]: which keys of a block each of its queries attends to: real tokens, not after it,
    inside the window."""
    queries = layout.start + jnp.arange(block.queries.start, block.queries.stop, dtype=jnp.int32)
    keys = jnp.arange(block.keys.start, block.keys.stop, dtype=jnp.int32)
    distance = queries[:, None] - keys[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    return allowed[None, :, :] & layout.key_mask[:, None, block.keys]


def softmax(logits: Array, allowed: Array, sinks: Array | None) -> Array:
    """Attention probabilities f32[B, kv, group, S, L]; a row that sees nothing is uniform.

    Args:
        logits: f32[B, kv, group, S, L].
        allowed: bool[B, S, L].
        sinks: f32[kv, group], one more logit a head whose share goes to nothing, or None.
    """
    # A finite bound instead of -inf, so that rows of padding, which see nothing, hold no NaN.
    logits = jnp.where(allowed[:, None, None, :, :], logits, jnp.finfo(jnp.float32).min)
    if sinks is None:
        return jax.nn.softmax(logits, axis=-1)
    column = sinks.astype(jnp.float32)[None, :, :, None, None]
    # The sink takes part in the maximum, so that neither exponential overflows.
    top = jnp.maximum(logits.max(axis=-1, keepdims=True), column)
    weights = jnp.exp(logits - top)
    return weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(column - top))


def attend(
    config: DecoderConfig,
    layer: LayerConfig,
    params: Params,
    x: Array,
    layout: TokenLayout,
    cache: Params | None = None,
) -> tuple[Array, Params | None]:
    """Self-attention of x float[B, S, D].

    Args:
        config: sizes and variants (static).
        layer: window and rotary positions (static).
        params: projections ``{"kernel", "bias"}`` and norms ``{"scale"}`` by name, see
            ``moe_jax.models.hub_layout``.
        x: float[B, S, D].
        layout: positions and padding.
        cache: this layer's keys and values (see ``moe_jax.models.kv_cache``), or None.

    Returns:
        float[B, S, D], and the cache with this call's tokens written at ``layout.start``.
    """
    if config.latent is not None:
        return _latent_attention(config, config.latent, layer, params, x, layout, cache)
    batch, length, _ = x.shape
    q, k, v = (project(params[name], x) for name in ("q", "k", "v"))
    if config.qk_norm == "full":
        q, k = _norm_qk(config, params, q, k)
    if config.qkv_clip is not None:
        q, k, v = (jnp.clip(t, -config.qkv_clip, config.qkv_clip) for t in (q, k, v))
    q, k, v = (t.reshape(batch, length, -1, config.head_dim) for t in (q, k, v))
    if config.qk_norm == "head" and not config.qk_norm_after_rope:
        q, k = _norm_qk(config, params, q, k)
    if layer.rope is not None:
        cosine, sine = angles(layer.rope, layout.positions)
        q = rotate(q, cosine, sine, interleaved=layer.rope.interleaved)
        k = rotate(k, cosine, sine, interleaved=layer.rope.interleaved)
    if config.qk_norm == "head" and config.qk_norm_after_rope:
        q, k = _norm_qk(config, params, q, k)
    if cache is not None:
        # Keys are cached with their positions in them, so that a step rotates one key and not all.
        cache = {"k": _write(cache["k"], k, layout.start), "v": _write(cache["v"], v, layout.start)}
        k, v = cache["k"], cache["v"]
    # Queries are grouped by the key head that they share, so that keys need not be repeated.
    q = q.reshape(batch, length, config.num_kv_heads, -1, config.head_dim)
    blocks = _blocks(length, k.shape[1], window=layer.window, cached=cache is not None)
    seen = [_visible(layout, block, layer.window) for block in blocks]
    precise: Any = {"preferred_element_type": jnp.float32}

    def heads(q: Array, k: Array, v: Array, *sinks: Array) -> Array:
        parts = []
        for block, visible in zip(blocks, seen, strict=True):
            logits = jnp.einsum(
                "bskgd,blkd->bkgsl", q[:, block.queries], k[:, block.keys], **precise
            )
            sink = sinks[0][0, 0] if sinks else None
            weights = softmax(logits * config.softmax_scale, visible, sink).astype(v.dtype)
            parts.append(jnp.einsum("bkgsl,blkd->bskgd", weights, v[:, block.keys], **precise))
        return jnp.concatenate(parts, axis=1)

    sinks = [params["sinks"].reshape(1, 1, config.num_kv_heads, -1)] if config.sinks else []
    scores = batch * config.num_heads * min(length, _BLOCK) * k.shape[1]
    out = _by_head(heads, [q, k, v, *sinks], large=length > 1 and scores > _MOST_SCORES)
    out = out.astype(x.dtype).reshape(batch, length, -1)
    if config.output_gate:
        gate = project(params["gate"], x).astype(jnp.float32)
        out = (out * jax.nn.sigmoid(gate).astype(x.dtype)).astype(x.dtype)
    return project(params["o"], out), cache


def _by_head(run: Callable[..., Array], arrays: list[Array], *, large: bool) -> Array:
    """``run(*arrays)``, where axis 2 of all arrays and of the result are heads that do not mix.

    If ``large``, a CPU runs one head after the other: the scores of a block then stay in the cache
    between their product, their softmax and the next product. Accelerators run all heads at once.
    """

    def one_after_the_other(*arrays: Array) -> Array:
        each = [jnp.moveaxis(array, 2, 0)[:, :, :, None] for array in arrays]
        parts = jax.lax.map(lambda one: run(*one), each)
        return jnp.moveaxis(parts[:, :, :, 0], 0, 2)

    if not large:
        return run(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=one_after_the_other, default=run)


def _norm_qk(config: DecoderConfig, params: Params, q: Array, k: Array) -> tuple[Array, Array]:
    q = normalize(params["q_norm"], q, eps=config.norm_eps)
    return q, normalize(params["k_norm"], k, eps=config.norm_eps)


def _write(cached: Array, new: Array, start: Array) -> Array:
    # Slots are axis 1 of every array of a cache.
    index: list[Any] = [jnp.zeros((), start.dtype)] * cached.ndim
    index[1] = start
    return jax.lax.dynamic_update_slice(cached, new.astype(cached.dtype), index)


def _latent_attention(
    config: DecoderConfig,
    latent: LatentConfig,
    layer: LayerConfig,
    params: Params,
    x: Array,
    layout: TokenLayout,
    cache: Params | None,
) -> tuple[Array, Params | None]:
    """Multi-head latent attention (arXiv:2405.04434): the cache holds one short vector a token."""
    batch, length, _ = x.shape
    heads, nope = config.num_heads, latent.nope_dim
    q = x
    if latent.query_rank is not None:
        q = normalize(params["q_a_norm"], project(params["q_a"], x), eps=latent.norm_eps)
    q = project(params["q"], q).reshape(batch, length, heads, nope + latent.rope_dim)
    q_nope, q_rope = q[..., :nope], q[..., nope:]
    compressed = project(params["kv_a"], x)
    kv = normalize(params["kv_a_norm"], compressed[..., : latent.rank], eps=latent.norm_eps)
    k_rope = compressed[..., None, latent.rank :]  # one head, which all share
    if layer.rope is not None:
        cosine, sine = angles(layer.rope, layout.positions)
        q_rope = rotate(q_rope, cosine, sine, interleaved=layer.rope.interleaved)
        k_rope = rotate(k_rope, cosine, sine, interleaved=layer.rope.interleaved)
    k_rope = k_rope[:, :, 0, :]
    if cache is not None:
        cache = {
            "latent": _write(cache["latent"], kv, layout.start),
            "k_rope": _write(cache["k_rope"], k_rope, layout.start),
        }
        kv, k_rope = cache["latent"], cache["k_rope"]
    up = params["kv_b"]["kernel"].astype(x.dtype)
    up = up.reshape(latent.rank, heads, nope + latent.value_dim)
    key_up, value_up = up[..., :nope], up[..., nope:]
    precise: Any = {"preferred_element_type": jnp.float32}
    # A step of one token would expand the whole cache to keys and values. Moving the expansion to the
    # query's and the output's side gives the same product from the short vectors alone.
    absorbed = cache is not None and length == 1
    if absorbed:
        q_nope = jnp.einsum("bshn,rhn->bshr", q_nope, key_up, **precise).astype(x.dtype)
        keys = values = kv
        scores, sums = "bshr,blr->bhsl", "bhsl,blr->bshr"
    else:
        keys = jnp.einsum("blr,rhn->blhn", kv, key_up, **precise).astype(x.dtype)
        values = jnp.einsum("blr,rhv->blhv", kv, value_up, **precise).astype(x.dtype)
        scores, sums = "bshn,blhn->bhsl", "bhsl,blhv->bshv"
    blocks = _blocks(length, kv.shape[1], window=layer.window, cached=cache is not None)
    seen = [_visible(layout, block, layer.window) for block in blocks]

    def run(q_nope: Array, q_rope: Array, keys: Array, values: Array) -> Array:
        parts = []
        for block, visible in zip(blocks, seen, strict=True):
            logits = jnp.einsum(scores, q_nope[:, block.queries], keys[:, block.keys], **precise)
            rotary = (q_rope[:, block.queries], k_rope[:, block.keys])
            logits = logits + jnp.einsum("bshd,bld->bhsl", *rotary, **precise)
            weights = softmax(logits[:, :, None] * config.softmax_scale, visible, None)[:, :, 0]
            parts.append(
                jnp.einsum(sums, weights.astype(x.dtype), values[:, block.keys], **precise)
            )
        return jnp.concatenate(parts, axis=1)

    # Absorbed keys and values have no axis of heads, but then there is one query.
    large = length > 1 and batch * heads * min(length, _BLOCK) * kv.shape[1] > _MOST_SCORES
    out = _by_head(run, [q_nope, q_rope, keys, values], large=large)
    if absorbed:
        out = jnp.einsum("bshr,rhv->bshv", out.astype(x.dtype), value_up, **precise)
    return project(params["o"], out.astype(x.dtype).reshape(batch, length, -1)), cache
