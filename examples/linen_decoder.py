"""A decoder in Flax Linen with MoE layers, and a few training steps: the twin of
``examples/nnx_decoder.py``.

    python examples/linen_decoder.py

It shows what a Linen model needs: the experts are ``moe_jax.nn.linen.MoE``, layers are one
``nn.scan``, the routers' states are the collection ``router_state``, and the optimiser gives routers
and experts their own settings. Its parameter tree is that of ``moe_jax.lab.language_model.init``,
so both can be handed over as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from moe_jax.lab import language_model as pure
from moe_jax.lab.language_model import Output
from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.optimizer import optimizer
from moe_jax.nn import linen as moe_linen
from moe_jax.types import Array, Params


def _attention_params(module: nn.Module, config: LMConfig) -> Params:
    d, ones, normal = config.d_model, nn.initializers.ones, nn.initializers.normal
    return {
        "attention_norm": module.param("attention_norm", ones, (d,)),
        "qkv": module.param("qkv", normal(d**-0.5), (d, 3 * d)),
        "out": module.param("out", normal((d * 2 * config.num_layers) ** -0.5), (d, d)),
        "moe_norm": module.param("moe_norm", ones, (d,)),
    }


class DenseLayer(nn.Module):
    """Attention, and a feed-forward part that every token uses."""

    config: LMConfig

    @nn.compact
    def __call__(self, h: Array, _: None) -> tuple[Array, None]:
        c, make = self.config, nn.initializers.lecun_normal()
        width = c.dense_d_ff or c.k * c.d_ff
        layer = _attention_params(self, c)
        mlp = self.param(
            "mlp",
            lambda key: {
                "up": make(jax.random.fold_in(key, 0), (c.d_model, width)),
                "down": make(jax.random.fold_in(key, 1), (width, c.d_model)),
            },
        )
        return pure.dense_layer(c, layer | {"mlp": mlp}, h), None


class MoELayer(nn.Module):
    """The plain layers before it, if any; attention; experts."""

    config: LMConfig

    @nn.compact
    def __call__(self, h: Array, mask: Array) -> tuple[Array, Any]:
        c = self.config
        if c.moe_every > 1:
            h, _ = _stacked(DenseLayer, c.moe_every - 1, "dense")(c, name="dense")(h, None)
        h, x = pure.attention_part(c, _attention_params(self, c), h)
        experts = moe_linen.MoE(
            c.router(),
            d_model=c.d_model,
            d_ff=c.d_ff,
            expert_fn=c.experts,
            implementation=c.implementation,
            name="moe",
        )
        y, aux = experts(x, token_mask=mask, return_aux=True)
        return h + y, (aux, x.reshape(-1, c.d_model))


def _stacked(layer: type[nn.Module], length: int, name: str) -> Any:
    return nn.scan(
        layer,
        variable_axes={"params": 0, "router_state": 0},
        split_rngs={"params": True},
        length=length,
        in_axes=nn.broadcast,
        metadata_params={nn.PARTITION_NAME: name},
    )


class Decoder(nn.Module):
    """``moe_jax.lab.language_model.forward`` as a Linen module."""

    config: LMConfig

    @nn.compact
    def __call__(self, tokens: Array) -> Output:
        c = self.config
        ends = {
            "embedding": self.param("embedding", nn.initializers.normal(0.02), (256, c.d_model)),
            "norm": self.param("norm", nn.initializers.ones, (c.d_model,)),
        }
        layers = _stacked(MoELayer, c.num_moe_layers, "layers")(c, name="layers")
        h, stacked = layers(pure.embed(ends, tokens), jnp.ones(tokens.shape, bool))
        reports, seen = zip(
            *(pure.layer_of(stacked, i) for i in range(c.num_moe_layers)), strict=True
        )
        return Output(logits=pure.unembed(ends, h), layers=reports, router_inputs=seen)


def router_state(states: tuple[Any, ...]) -> dict[str, Any]:
    """The collection ``router_state`` of a ``Decoder``, from one state a router."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return {"layers": {"moe": {"state": stacked}}}


@functools.partial(jax.jit, static_argnames=("config", "steps"))
def step(
    config: LMConfig, steps: int, variables: dict[str, Any], opt_state: Any, tokens: Array
) -> tuple[dict[str, Any], Any, dict[str, Array]]:
    """One training step on tokens i32[B, S + 1]."""
    states = variables["router_state"]

    def value(params: Params) -> tuple[Array, tuple[Output, dict[str, Array]]]:
        out = Decoder(config).apply({"params": params, "router_state": states}, tokens[:, :-1])
        assert isinstance(out, Output)
        total, metrics = pure.objective(config, out, tokens[:, 1:])
        return total, (out, metrics)

    (_, (out, metrics)), grads = jax.value_and_grad(value, has_aux=True)(variables["params"])
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer(config, steps).update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
    old = [pure.layer_of(states["layers"]["moe"]["state"], i) for i in range(config.num_moe_layers)]
    new = [config.router().update(s, a.stats) for s, a in zip(old, out.layers, strict=True)]
    return {"params": params, "router_state": router_state(tuple(new))}, opt_state, metrics


EXAMPLE = LMConfig(
    num_layers=2,
    moe_every=2,
    d_model=32,
    num_heads=2,
    num_experts=4,
    k=2,
    d_ff=32,
    length=32,
    batch_size=4,
    balance_rate=1e-3,
    learning_rate=1e-2,
    router_rate=0.5,
    expert_decay=0.0,
)


def main(config: LMConfig = EXAMPLE, steps: int = 20) -> None:
    """Trains a new decoder on one sentence and prints its loss."""
    text = jnp.frombuffer(b"every token has just enough experts. " * 8, jnp.uint8)
    shape = (config.batch_size, config.length + 1)
    tokens = text[: shape[0] * shape[1]].reshape(shape).astype(jnp.int32)
    variables = nn.meta.unbox(Decoder(config).init(jax.random.key(0), tokens[:, :-1]))
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer(config, steps).init(variables["params"])
    for i in range(steps):
        variables, opt_state, metrics = step(config, steps, variables, opt_state, tokens)
        if i % 5 in (0, 4):
            print(f"step {i + 1}: {float(metrics['bits_per_byte']):.2f} bits a byte")


if __name__ == "__main__":
    main()
