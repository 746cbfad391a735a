"""A small byte-level language model with MoE layers, as pure functions.

A decoder-only transformer: RMSNorm before each part, causal attention with rotary positions, and in
every layer, or every n-th, experts in place of the feed-forward part. It is trained at a fixed k. At
evaluation any other routers and states may be handed to ``forward``, which is how dynamic rules are
tried on a model that was never trained for them.

``examples/nnx_decoder.py`` and ``examples/linen_decoder.py`` are the same model as Flax modules. Both
hold arrays and call the functions of this file.

Axis letters beyond those of ``moe_jax.types``: B sequences, S bytes of a sequence (T = B * S), V
byte values, H heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.lab.data import VOCAB_SIZE
from moe_jax.lab.lm_config import LMConfig
from moe_jax.layer import LayerAux, LayerOptions, init_moe_layer
from moe_jax.parallel.sharded_layer import layer_over
from moe_jax.parallel.sharding import Mesh
from moe_jax.routers import Router, with_share
from moe_jax.routing.elasticity import distillation_loss
from moe_jax.routing.losses import aux_loss
from moe_jax.types import Array, Params, pytree

_NATS_PER_BIT = math.log(2.0)


def init(config: LMConfig, key: Array) -> dict[str, Params]:
    """Parameters, all float32: ``embedding`` [V, D], ``layers``, ``norm`` [D].

    ``layers`` has every array of a layer with experts, with a leading axis of such layers: see
    ``layer_params``. If ``moe_every`` is over 1, ``dense`` in it holds the ``moe_every - 1`` plain
    layers that come before, along a second axis. The embedding is also the output projection.
    """
    embed_key, layer_key = jax.random.split(key)
    return {
        "embedding": 0.02 * jax.random.normal(embed_key, (VOCAB_SIZE, config.d_model)),
        # A loop, not vmap: it compiles in half the time.
        "layers": jax.lax.map(
            functools.partial(_init_layer, config),
            jax.random.split(layer_key, config.num_moe_layers),
        ),
        "norm": jnp.ones((config.d_model,)),
    }


def _init_layer(config: LMConfig, key: Array) -> dict[str, Params]:
    width = config.d_model
    qkv_key, out_key, moe_key = jax.random.split(key, 3)
    layer = _init_attention(config, qkv_key, out_key)
    layer["moe"] = init_moe_layer(
        config.router(), config.experts, moe_key, d_model=width, d_ff=config.d_ff
    )
    if config.moe_every > 1:
        keys = jax.random.split(jax.random.fold_in(key, 1), config.moe_every - 1)
        layer["dense"] = jax.lax.map(functools.partial(_init_dense, config), keys)
    return layer


def _init_dense(config: LMConfig, key: Array) -> dict[str, Params]:
    qkv_key, out_key, mlp_key = jax.random.split(key, 3)
    width = config.dense_d_ff or config.k * config.d_ff
    mlp = config.experts.init(mlp_key, num_experts=1, d_model=config.d_model, d_ff=width)
    return _init_attention(config, qkv_key, out_key) | {"mlp": layer_of(mlp, 0)}


def _init_attention(config: LMConfig, qkv_key: Array, out_key: Array) -> dict[str, Params]:
    width = config.d_model
    # Two residual branches a layer add up, so each starts smaller by the root of their number (GPT-2).
    return {
        "attention_norm": jnp.ones((width,)),
        "qkv": jax.random.normal(qkv_key, (width, 3 * width)) / width**0.5,
        "out": jax.random.normal(out_key, (width, width)) / (width * 2 * config.num_layers) ** 0.5,
        "moe_norm": jnp.ones((width,)),
    }


def layer_of(stacked: Any, layer: int) -> Any:
    """Returns one layer of a tree whose arrays all have a leading axis of layers."""
    return jax.tree.map(lambda leaf: leaf[layer], stacked)


def layer_params(params: dict[str, Params], layer: int) -> dict[str, Params]:
    """The parameters of one layer with experts, without the leading axis of layers.

    ``attention_norm`` [D], ``qkv`` [D, 3D], ``out`` [D, D], ``moe_norm`` [D], ``moe`` as in
    ``init_moe_layer``; ``dense`` if plain layers come before, with a leading axis of these, each
    with ``mlp`` in place of ``moe``.
    """
    return layer_of(params["layers"], layer)


def rms_norm(x: Array, scale: Array) -> Array:
    """x [..., D] divided by its root mean square over D, times scale [D]."""
    mean = jnp.square(x).mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + 1e-6) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def rotary(x: Array) -> Array:
    """Turns pairs of channels of x [B, S, H, W] by angles that grow with the position (RoPE)."""
    half = x.shape[-1] // 2
    rate = 10_000.0 ** (-np.arange(half, dtype=np.float32) / half)
    angle = np.arange(x.shape[1], dtype=np.float32)[:, None] * rate[None, :]
    cos, sin = (jnp.asarray(f(angle))[None, :, None, :] for f in (np.cos, np.sin))
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


def attention(config: LMConfig, layer: dict[str, Params], x: Array) -> Array:
    """Causal attention on x f32[B, S, D]; bytes see themselves and what came before."""
    batch, length, width = x.shape
    shape = (batch, length, config.num_heads, width // config.num_heads)
    q, k, v = (part.reshape(shape) for part in jnp.split(x @ layer["qkv"], 3, axis=-1))
    scores = jnp.einsum("bqhw,bkhw->bhqk", rotary(q), rotary(k)) / shape[-1] ** 0.5
    visible = np.tril(np.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(visible[None, None], scores, -1e30), axis=-1)
    mixed = jnp.einsum("bhqk,bkhw->bqhw", weights, v)
    return mixed.reshape(batch, length, width) @ layer["out"]


def attention_part(config: LMConfig, layer: dict[str, Params], h: Array) -> tuple[Array, Array]:
    """(h after attention f32[B, S, D], its norm, which is what the layer's second part sees)."""
    h = h + attention(config, layer, rms_norm(h, layer["attention_norm"]))
    return h, rms_norm(h, layer["moe_norm"])


def dense_layer(config: LMConfig, layer: dict[str, Params], h: Array) -> Array:
    """h f32[B, S, D] after a layer whose feed-forward part every token uses."""
    h, x = attention_part(config, layer, h)
    return h + config.experts(layer["mlp"], x.reshape(-1, x.shape[-1])).reshape(h.shape)


def router_input(config: LMConfig, layer: dict[str, Params], h: Array) -> tuple[Array, Array]:
    """``attention_part``, after the plain layers that come before, if there are any."""
    for i in range(config.moe_every - 1):
        h = dense_layer(config, layer_of(layer["dense"], i), h)
    return attention_part(config, layer, h)


def block(
    config: LMConfig,
    router: Router,
    layer: dict[str, Params],
    state: Any,
    h: Array,
    mask: Array,
    mesh: Mesh | None = None,
) -> tuple[Array, LayerAux, Array]:
    """Runs a layer with experts and the plain layers before it.

    Returns:
        h f32[B, S, D], what the MoE layer reports, and what its router saw f32[T, D].
    """
    h, x = router_input(config, layer, h)
    y, aux = layer_over(mesh)(
        router,
        config.experts,
        layer["moe"],
        state,
        x,
        token_mask=mask,
        options=LayerOptions(implementation=config.implementation),
    )
    return h + y, aux, x.reshape(-1, config.d_model)


def embed(params: dict[str, Params], tokens: Array) -> Array:
    """f32[B, S, D] of unit scale from bytes i32[B, S]."""
    table = params["embedding"]
    return table[tokens] * table.shape[1] ** 0.5


def unembed(params: dict[str, Params], h: Array) -> Array:
    """f32[B, S, V]: logits of the next byte."""
    return rms_norm(h, params["norm"]) @ params["embedding"].T


@pytree
class Output:
    """The results of a forward pass. Parts that are not used cost nothing under ``jit``."""

    logits: Array  # f32[B, S, V]
    layers: tuple[LayerAux, ...]  # one a layer with experts: its Routing and its stats
    router_inputs: tuple[Array, ...]  # f32[T, D] each: what the router of such a layer saw


def forward(
    config: LMConfig,
    params: dict[str, Params],
    states: Sequence[Any],
    tokens: Array,
    *,
    routers: Sequence[Router] | None = None,
    mask: Array | None = None,
    mesh: Mesh | None = None,
) -> Output:
    """Runs the model.

    Args:
        config: static.
        params: from ``init``.
        states: a router state for each layer with experts.
        tokens: i32[B, S], byte values.
        routers: a rule for each such layer; None is the trained rule everywhere.
        mask: bool[B, S], False for padding; None is all real.
        mesh: spreads tokens and experts over its devices; see ``moe_jax.parallel.sharding``.

    Raises:
        ValueError: not as many routers or states as layers.

    Example:
        >>> config = LMConfig(num_layers=1, d_model=16, num_heads=2, num_experts=4, k=2, d_ff=8)
        >>> params, states = init(config, jax.random.key(0)), init_states(config)
        >>> forward(config, params, states, jnp.zeros((2, 8), jnp.int32)).logits.shape
        (2, 8, 256)
    """
    routers = check_layers(config, routers, states)
    if mask is None:
        mask = jnp.ones(tokens.shape, bool)
    h = embed(params, tokens)
    if all(router == routers[0] for router in routers):
        # One rule throughout: the layers are one loop, which compiles in a quarter of the time.
        def step(h: Array, layer: tuple[Params, Any]) -> tuple[Array, tuple[LayerAux, Array]]:
            h, aux, x = block(config, routers[0], *layer, h, mask, mesh)
            return h, (aux, x)

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        h, reports = jax.lax.scan(step, h, (params["layers"], stacked))
        each = [layer_of(reports, i) for i in range(config.num_moe_layers)]
    else:
        each = []
        for i, (router, state) in enumerate(zip(routers, states, strict=True)):
            h, aux, x = block(config, router, layer_params(params, i), state, h, mask, mesh)
            each.append((aux, x))
    layers, seen = zip(*each, strict=True)
    return Output(logits=unembed(params, h), layers=layers, router_inputs=seen)


def check_layers(
    config: LMConfig, routers: Sequence[Router] | None, states: Sequence[Any]
) -> tuple[Router, ...]:
    """The rule of each layer with experts; None is the trained rule everywhere.

    Raises:
        ValueError: not as many routers or states as layers with experts.
    """
    if routers is None:
        routers = (config.router(),) * config.num_moe_layers
    for name, given in (("routers", routers), ("states", states)):
        if len(given) != config.num_moe_layers:
            raise ValueError(
                f"{name}: expected one for each of the {config.num_moe_layers} layers with experts, "
                f"got {len(given)}. Pass a sequence in the order of the layers."
            )
    return tuple(routers)


def nats(logits: Array, targets: Array) -> Array:
    """f32[B, S]: negative log likelihood of every target byte, in nats."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def init_states(config: LMConfig) -> tuple[Any, ...]:
    """Returns a state for each router, before training."""
    return tuple(config.router().init_state() for _ in range(config.num_moe_layers))


def loss(
    config: LMConfig,
    params: dict[str, Params],
    states: Sequence[Any],
    tokens: Array,
    mesh: Mesh | None = None,
    *,
    share: Array | None = None,
) -> tuple[Array, tuple[tuple[Any, ...], dict[str, Array]]]:
    """Returns the training loss: mean nats per byte plus the auxiliary losses, averaged over layers.

    Args:
        tokens: i32[B, S + 1].
        share: f32[], share of tokens that draw their budget, see ``LMConfig.schedule``.

    Returns:
        f32[], and (states after ``router.update``, metrics): ``bits_per_byte``, the auxiliary terms
        before weighting, ``distillation``, ``max_over_mean_load``, ``load_balance_score``,
        ``mean_experts_per_token`` and ``computed_experts_per_token`` (of all passes of a step).
    """
    drawn = None if share is None else with_share(tuple(states), share)
    if drawn is not None and not config.distill:
        states = drawn
    inputs, router = tokens[:, :-1], config.router()
    out = forward(config, params, states, inputs, mesh=mesh)
    value, metrics = objective(config, out, tokens[:, 1:])
    layers = range(config.num_moe_layers)
    regularizations = [
        router.regularization(
            layer_params(params, i)["moe"]["router"], states[i], out.layers[i].routing
        )
        for i in layers
    ]
    value = value + jnp.stack(regularizations).mean()
    metrics["distillation"] = jnp.zeros(())
    metrics["computed_experts_per_token"] = metrics["mean_experts_per_token"]
    if drawn is not None and config.distill:
        # A branch, so that steps before the schedule's start pay for one pass alone.
        def second_pass() -> tuple[Array, Array]:
            reduced = forward(config, params, drawn, inputs, mesh=mesh)
            used = [layer.stats.mean_experts_per_token for layer in reduced.layers]
            return distillation_loss(reduced.logits, out.logits), jnp.stack(used).mean()

        def no_pass() -> tuple[Array, Array]:
            return jnp.zeros(()), jnp.zeros(())

        taught, used = jax.lax.cond(jnp.asarray(share) > 0, second_pass, no_pass)
        value = value + config.distill * taught
        metrics["distillation"] = taught
        metrics["computed_experts_per_token"] += used
    new = tuple(router.update(s, a.stats) for s, a in zip(states, out.layers, strict=True))
    return value, (new, metrics)


def objective(config: LMConfig, out: Output, targets: Array) -> tuple[Array, dict[str, Array]]:
    """The training loss f32[] of a forward pass on targets i32[B, S], and metrics: see ``loss``."""
    language = nats(out.logits, targets).mean()
    pairs = [aux_loss(layer.routing, config.loss_weights) for layer in out.layers]
    auxiliary = sum((value for value, _ in pairs), jnp.zeros(())) / config.num_moe_layers
    stats = [layer.stats for layer in out.layers]
    metrics = {name: jnp.stack([t[name] for _, t in pairs]).mean() for name in pairs[0][1]}
    metrics["bits_per_byte"] = language / _NATS_PER_BIT
    metrics["max_over_mean_load"] = jnp.stack([s.max_over_mean_load for s in stats]).max()
    metrics["load_balance_score"] = jnp.stack([s.load_balance_score for s in stats]).min()
    metrics["mean_experts_per_token"] = jnp.stack([s.mean_experts_per_token for s in stats]).mean()
    return language + auxiliary, metrics
