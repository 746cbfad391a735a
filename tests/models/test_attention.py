"""Attention and rotary positions against loops over heads and tokens, written from the formulas."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from moe_jax.models import attention
from moe_jax.models.attention import attend
from moe_jax.models.causal_lm import token_layout
from moe_jax.models.decoder_config import DecoderConfig, LatentConfig, LayerConfig, RopeConfig
from moe_jax.models.hub_layout import layer_entries, take
from moe_jax.models.rope import angles, inverse_frequencies

D, HEADS, KV, DIM, LENGTH = 12, 4, 2, 6, 5


def norm(x, scale, eps=1e-6):
    return x / math.sqrt(float((x * x).mean()) + eps) * scale


def turn(x, position, rope: RopeConfig):
    """One head's vector at one position, pair by pair."""
    out = x.copy()
    half = rope.dim // 2
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
        angle = position * rope.theta ** (-2 * i / rope.dim)
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return out


def grouped(config: DecoderConfig, layer: LayerConfig, w: dict, x: np.ndarray) -> np.ndarray:
    """Tensors as the checkpoint has them, [out, in]; one sequence [S, D]."""

    def vectors(part, heads):
        out = []
        for t in range(len(x)):
            v = w[f"self_attn.{part}_proj.weight"] @ x[t]
            v = v + w.get(f"self_attn.{part}_proj.bias", 0)
            scale = w.get(f"self_attn.{part}_norm.weight")
            if config.qk_norm == "full" and scale is not None:
                v = norm(v, scale)
            if config.qkv_clip is not None:
                v = np.clip(v, -config.qkv_clip, config.qkv_clip)
            per_head = [v[h * DIM : (h + 1) * DIM] for h in range(heads)]
            for h, head in enumerate(per_head):
                normed = config.qk_norm == "head" and scale is not None
                if normed and not config.qk_norm_after_rope:
                    head = norm(head, scale)
                if part != "v" and layer.rope is not None:
                    head = turn(head, t, layer.rope)
                if normed and config.qk_norm_after_rope:
                    head = norm(head, scale)
                per_head[h] = head
            out.append(per_head)
        return out

    q, k, v = vectors("q", HEADS), vectors("k", KV), vectors("v", KV)
    out = np.zeros((len(x), D))
    for t in range(len(x)):
        heads = []
        for h in range(HEADS):
            g = h // (HEADS // KV)
            first = 0 if layer.window is None else max(0, t - layer.window + 1)
            logits = [float(q[t][h] @ k[s][g]) * config.softmax_scale for s in range(first, t + 1)]
            total = sum(map(math.exp, logits))
            if config.sinks:
                total += math.exp(float(w["self_attn.sinks"][h]))
            heads.append(sum(math.exp(z) / total * v[first + i][g] for i, z in enumerate(logits)))
        joined = np.concatenate(heads)
        if config.output_gate:
            joined = joined / (1 + np.exp(-(w["self_attn.gate_proj.weight"] @ x[t])))
        out[t] = w["self_attn.o_proj.weight"] @ joined + w.get("self_attn.o_proj.bias", 0)
    return out


def latent(config: DecoderConfig, layer: LayerConfig, w: dict, x: np.ndarray) -> np.ndarray:
    m, rope = config.latent, layer.rope
    assert m is not None
    assert rope is not None
    out = np.zeros((len(x), D))
    keys, values = [], []
    for t in range(len(x)):
        compressed = w["self_attn.kv_a_proj_with_mqa.weight"] @ x[t]
        short = norm(compressed[: m.rank], w["self_attn.kv_a_layernorm.weight"])
        shared = turn(compressed[m.rank :], t, rope)
        both = (w["self_attn.kv_b_proj.weight"] @ short).reshape(HEADS, m.nope_dim + m.value_dim)
        keys.append([np.concatenate([b[: m.nope_dim], shared]) for b in both])
        values.append([b[m.nope_dim :] for b in both])
    for t in range(len(x)):
        q = x[t]
        if m.query_rank is not None:
            q = norm(w["self_attn.q_a_proj.weight"] @ q, w["self_attn.q_a_layernorm.weight"])
            q = w["self_attn.q_b_proj.weight"] @ q
        else:
            q = w["self_attn.q_proj.weight"] @ q
        heads = []
        for h, one in enumerate(q.reshape(HEADS, -1)):
            one = np.concatenate([one[: m.nope_dim], turn(one[m.nope_dim :], t, rope)])
            weights = np.exp([float(one @ keys[s][h]) * config.softmax_scale for s in range(t + 1)])
            heads.append(sum(p * values[s][h] for s, p in enumerate(weights / weights.sum())))
        out[t] = w["self_attn.o_proj.weight"] @ np.concatenate(heads)
    return out


ROPE = RopeConfig(dim=DIM, theta=100.0)
HALF = RopeConfig(dim=4, theta=100.0)
PAIRS = RopeConfig(dim=DIM, theta=100.0, interleaved=True)
MLA = LatentConfig(query_rank=5, rank=7, nope_dim=4, rope_dim=6, value_dim=3)
VARIANTS = {
    "plain": ({}, {"rope": ROPE}),
    "biases, window": ({"qkv_bias": True, "out_bias": True}, {"rope": ROPE, "window": 2}),
    "norm by head, part of the head": ({"qk_norm": "head"}, {"rope": HALF}),
    "norm by head, after rotation": (
        {"qk_norm": "head", "qk_norm_after_rope": True},
        {"rope": ROPE},
    ),
    "norm of all heads, clipped": ({"qk_norm": "full", "qkv_clip": 0.5}, {"rope": ROPE}),
    "interleaved": ({}, {"rope": PAIRS}),
    "sinks, no positions": ({"sinks": True}, {"rope": None, "window": 3}),
    "gated": ({"output_gate": True, "qk_norm": "head"}, {"rope": ROPE}),
    "latent": ({"latent": MLA}, {"rope": PAIRS}),
    "latent, direct queries": (
        {"latent": LatentConfig(query_rank=None, rank=7, nope_dim=4, rope_dim=6, value_dim=3)},
        {"rope": ROPE},
    ),
}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_attention_in_blocks_is_what_the_formulas_say(name, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 2)  # three blocks, the last of one token
    # One head after the other, as for long sequences; the goldens run all heads at once.
    monkeypatch.setattr(attention, "_MOST_SCORES", 0)
    of_model, of_layer = VARIANTS[name]
    layer = LayerConfig(experts=True, **of_layer)
    config = DecoderConfig(
        model_type="mixtral",
        vocab_size=8,
        d_model=D,
        num_heads=HEADS,
        num_kv_heads=KV,
        head_dim=DIM,
        softmax_scale=0.4,
        layers=(layer,),
        **of_model,
    )
    rng = np.random.default_rng(0)
    entries = list(layer_entries(config, layer))
    tensors = {e.name: rng.normal(0.3, 0.5, e.shape).astype(np.float32) for e in entries}
    params = take(tensors, iter(entries), dtype=np.float32, where="made")
    x = rng.normal(size=(1, LENGTH, D)).astype(np.float32)
    layout = token_layout(np.zeros((1, LENGTH), np.int32), None)
    got = jax.jit(lambda p, x: attend(config, layer, p, x, layout)[0])(params["attention"], x)
    reference = grouped if config.latent is None else latent
    wide = {n: t.astype(np.float64) for n, t in tensors.items()}
    want = reference(config, layer, wide, x[0].astype(np.float64))
    np.testing.assert_allclose(got[0], want, rtol=0, atol=2e-5)


def test_longrope_has_other_factors_beyond_the_length_of_pretraining():
    rope = RopeConfig(
        dim=4,
        kind="longrope",
        original_length=3,
        short_factors=(1.0, 2.0),
        long_factors=(4.0, 8.0),
        attention_factor=1.1,
        long_attention_factor=1.3,
    )
    for last, factors, magnitude in ((2, (1.0, 2.0), 1.1), (3, (4.0, 8.0), 1.3)):
        cosine, sine = angles(rope, np.array([[0, last]], np.int32))
        radians = last * np.array([1.0, 0.01]) / factors
        np.testing.assert_allclose(cosine[0, 1], magnitude * np.cos(radians), rtol=1e-6)
        np.testing.assert_allclose(sine[0, 1], magnitude * np.sin(radians), rtol=1e-6)


def test_frequencies_of_every_kind_are_what_transformers_computes():
    dim, theta = 8, 10_000.0
    plain = [theta ** (-2 * i / dim) for i in range(4)]

    def of(kind, **settings):
        return inverse_frequencies(RopeConfig(dim=dim, theta=theta, kind=kind, **settings))

    np.testing.assert_allclose(of("default"), plain, rtol=1e-6)
    np.testing.assert_allclose(of("linear", factor=4.0), np.array(plain) / 4, rtol=1e-6)
    short = (1.0, 2.0, 3.0, 4.0)
    longrope = of("longrope", short_factors=short, original_length=16)
    np.testing.assert_allclose(longrope, np.array(plain) / short, rtol=1e-6)
    # Llama 3: short wavelengths stay, long ones are stretched, those between are mixed.
    settings = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    want = []
    for f in plain:
        wavelength = 2 * math.pi / f
        if wavelength < 100 / 4:
            want.append(f)
        elif wavelength > 100:
            want.append(f / 8)
        else:
            smooth = (100 / wavelength - 1) / 3
            want.append((1 - smooth) * f / 8 + smooth * f)
    np.testing.assert_allclose(of("llama3", original_length=100, **settings), want, rtol=1e-5)
    # YaRN with its ramp rounded to whole dimensions.
    low = math.floor(dim * math.log(64 / (32 * 2 * math.pi)) / (2 * math.log(theta)))
    high = math.ceil(dim * math.log(64 / (2 * math.pi)) / (2 * math.log(theta)))
    low, high = max(low, 0), min(high, dim - 1)
    want = []
    for i, f in enumerate(plain):
        stretched = min(max((i - low) / (high - low), 0), 1)
        want.append(f / 4 * stretched + f * (1 - stretched))
    np.testing.assert_allclose(of("yarn", factor=4.0, original_length=64), want, rtol=1e-5)


def test_dynamic_positions_change_beyond_the_length_of_the_model_alone():
    rope = RopeConfig(dim=8, theta=10_000.0, kind="dynamic", factor=2.0, max_length=16)
    plain = RopeConfig(dim=8, theta=10_000.0)
    short, long = (np.arange(n, dtype=np.int32)[None] for n in (16, 24))
    for got, want in zip(angles(rope, short), angles(plain, short), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    theta = 10_000.0 * (2 * 24 / 16 - 1) ** (8 / 6)
    stretched = RopeConfig(dim=8, theta=theta)
    for got, want in zip(angles(rope, long), angles(stretched, long), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
