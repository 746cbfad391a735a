"""The attention and layout half of a published model's ``config.json``, as a value.

The other half, how a Mixture-of-Experts block routes, is ``moe_jax.interop``'s.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embeddings of one kind of layer.

    Attributes:
        dim: how many of a head's dimensions are rotated; the others pass unchanged.
        theta: base of the wavelengths.
        kind: "default", "linear", "dynamic", "yarn", "llama3" or "longrope".
        interleaved: whether dimensions 2i and 2i + 1 form a pair, instead of i and i + dim / 2.
        factor: how much longer the context is than in pretraining.
        original_length: positions in pretraining ("yarn", "llama3", "longrope").
        max_length: ``max_position_embeddings``; "dynamic" changes its base beyond it.
        beta_fast: "yarn": rotations above which a frequency is kept.
        beta_slow: "yarn": rotations below which a frequency is divided by ``factor``.
        truncate: "yarn": whether the ends of the ramp are rounded to whole dimensions.
        low_freq_factor: "llama3": wavelengths above ``original_length / low_freq_factor`` are
            stretched.
        high_freq_factor: "llama3": wavelengths below ``original_length / high_freq_factor`` are kept.
        short_factors: "longrope": a divisor for each frequency, for sequences up to
            ``original_length``.
        long_factors: "longrope": the same for longer sequences.
        attention_factor: multiplies cosine and sine, and so the logits by its square.
        long_attention_factor: "longrope": the same for sequences longer than ``original_length``.
    """

    dim: int
    theta: float = 10_000.0
    kind: str = "default"
    interleaved: bool = False
    factor: float = 1.0
    original_length: int = 0
    max_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    long_attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek): keys and values come from one low-rank vector a token.

    Attributes:
        query_rank: width of the queries' low-rank vector; None projects queries directly.
        rank: width of the vector that keys and values are made of.
        nope_dim: dimensions of a head's query and key without positions.
        rope_dim: dimensions of a head's query and key with positions; all heads share this key.
        value_dim: dimensions of a head's value.
        norm_eps: eps of the norms of both low-rank vectors.
    """

    query_rank: int | None
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What differs from layer to layer. Layers of equal value share one compiled program.

    Attributes:
        experts: whether the layer has a Mixture-of-Experts block instead of one feed-forward part.
        window: how many positions a token sees, itself included; None is all before it.
        rope: rotary positions; None applies no rotation.
    """

    experts: bool = True
    window: int | None = None
    rope: RopeConfig | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything static about a decoder except its experts. Hashable, so it is a static argument.

    Attributes:
        model_type: as ``config.json`` spells it.
        vocab_size: V.
        d_model: D.
        num_heads: query heads.
        num_kv_heads: key and value heads; it divides ``num_heads``.
        head_dim: dimensions of a head.
        softmax_scale: multiplies the attention logits.
        layers: one entry a layer.
        latent: multi-head latent attention instead of ``num_kv_heads`` keys and values.
        qkv_bias: whether the projections of queries, keys and values have biases.
        out_bias: whether the output projection of attention has one.
        qk_norm: "none", "head" (each head by itself) or "full" (all heads together).
        qk_norm_after_rope: whether queries and keys are rotated before their norm.
        qkv_clip: bound on queries, keys and values after their norms; None sets no bound.
        sinks: whether each head has a logit that takes attention from nothing (gpt-oss).
        output_gate: whether the sigmoid of a projection of attention's input weighs its output.
        norm: "rms" or "layer" (with biases).
        norm_eps: eps of the norms.
        norms: (parameter, name of the tensor's module) of a layer's norms. Parameters are
            ``attention_norm`` and ``mlp_norm`` before, ``attention_post_norm`` and ``mlp_post_norm``
            after attention and experts.
        activation: of dense feed-forward parts, a name in ``moe_jax.experts.ACTIVATIONS``.
        mlp_bias: whether dense feed-forward parts have biases.
        d_ff: width of dense feed-forward parts.
        shared_d_ff: width of a feed-forward part beside the experts' block, 0 if absent. Most models
            keep shared experts inside the block, where ``moe_jax.interop`` reads them.
        embedding_multiplier: multiplies embeddings.
        residual_multiplier: multiplies what attention and experts add.
        logits_multiplier: multiplies the logits.
        logits_softcap: bound that a tanh puts on the logits; None sets no bound.
        tied: whether the embedding is the head too.
        head_bias: whether the head has a bias.
    """

    model_type: str
    vocab_size: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    layers: tuple[LayerConfig, ...]
    latent: LatentConfig | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str = "none"
    qk_norm_after_rope: bool = False
    qkv_clip: float | None = None
    sinks: bool = False
    output_gate: bool = False
    norm: str = "rms"
    norm_eps: float = 1e-6
    norms: tuple[tuple[str, str], ...] = (
        ("attention_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
    )
    activation: str = "silu"
    mlp_bias: bool = False
    d_ff: int = 0
    shared_d_ff: int = 0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None
    tied: bool = False
    head_bias: bool = False

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with experts."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.experts)
