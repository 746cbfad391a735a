"""A decoder in Flax NNX with MoE layers, and a few training steps: the twin of
``examples/linen_decoder.py``.

    python examples/nnx_decoder.py

It shows what an NNX model needs: the experts are ``moe_jax.nn.nnx.MoE``, the routers' states are
variables of their own, written by ``update_router`` alone, and the optimiser gives routers and experts
their own settings. Attention, norms and losses are functions of ``moe_jax.lab.language_model``.
Parameters convert both ways, so a model trained as one of the two can be trained further as the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax import checkpoint
from moe_jax.checkpoint.sealed import PathLike
from moe_jax.lab.language_model import (
    Output,
    attention_part,
    check_layers,
    dense_layer,
    embed,
    init,
    layer_of,
    layer_params,
    objective,
    unembed,
)
from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.model_files import Model, load_model, save_model
from moe_jax.lab.optimizer import optimizer
from moe_jax.layer import LayerAux
from moe_jax.nn.nnx import MoE, arrays, hold
from moe_jax.routers import Router
from moe_jax.types import Array, Params

_ATTENTION = ("attention_norm", "qkv", "out", "moe_norm")


class _Layer(nnx.Module):
    def __init__(self, config: LMConfig, params: dict[str, Params]) -> None:
        self.config = config
        for name in _ATTENTION:
            setattr(self, name, hold(params[name], name))

    def params(self) -> dict[str, Params]:
        """The arrays in the tree that the functions of ``moe_jax.lab.language_model`` take."""
        return {name: arrays(getattr(self, name)) for name in _ATTENTION}


class DenseLayer(_Layer):
    """Attention, and a feed-forward part that every token uses."""

    def __init__(self, config: LMConfig, params: dict[str, Params]) -> None:
        super().__init__(config, params)
        self.mlp = hold(params["mlp"], "shared")

    def params(self) -> dict[str, Params]:
        return super().params() | {"mlp": arrays(self.mlp)}

    def __call__(self, h: Array) -> Array:
        """h f32[B, S, D] after the layer."""
        return dense_layer(self.config, self.params(), h)


class MoELayer(_Layer):
    """Attention, and experts: ``moe`` is a ``moe_jax.nn.nnx.MoE``."""

    def __init__(
        self, config: LMConfig, params: dict[str, Params], router: Router, state: Any
    ) -> None:
        super().__init__(config, params)
        self.moe = MoE(
            router,
            d_model=config.d_model,
            d_ff=config.d_ff,
            expert_fn=config.experts,
            params=params["moe"],
            state=state,
            implementation=config.implementation,
        )

    def params(self) -> dict[str, Params]:
        return super().params() | {"moe": self.moe.params()}

    def __call__(self, h: Array, mask: Array) -> tuple[Array, LayerAux, Array]:
        """h f32[B, S, D] after the layer, what the MoE layer reports, what it saw f32[T, D]."""
        h, x = attention_part(self.config, _Layer.params(self), h)
        y, aux = self.moe(x, token_mask=mask, return_aux=True)
        return h + y, aux, x.reshape(-1, x.shape[-1])


class Decoder(nnx.Module):
    """A decoder-only byte-level language model with MoE layers.

    RMSNorm, causal attention with rotary positions, and in every ``config.moe_every``-th layer
    experts. ``layers`` holds ``DenseLayer`` and ``MoELayer`` one by one, so everything that works on
    an NNX model works here: ``FLOPProfiler``, ``patch_model_with_dynamic_routing``, ``fit_model``.

    Args:
        config: sizes.
        rngs: ``params`` makes new parameters; or give
        params: those of ``moe_jax.lab.language_model.init`` or of a checkpoint.
        states: a router state for each layer with experts; None is new ones.
        routers: a rule for each such layer; None is the trained rule.

    Raises:
        ValueError: not as many routers or states as layers with experts, or neither rngs nor params.
    """

    def __init__(
        self,
        config: LMConfig,
        *,
        rngs: nnx.Rngs | None = None,
        params: dict[str, Params] | None = None,
        states: Sequence[Any] | None = None,
        routers: Sequence[Router] | None = None,
    ) -> None:
        if params is None:
            if rngs is None:
                raise ValueError(
                    "rngs: expected nnx.Rngs or params=, got neither. Pass rngs=nnx.Rngs(0) for new "
                    "parameters."
                )
            params = init(config, rngs.params())
        given = [None] * config.num_moe_layers if states is None else states
        rules = check_layers(config, routers, given)
        self.config = config
        self.embedding = hold(params["embedding"], "embedding")
        self.norm = hold(params["norm"], "norm")
        layers: list[DenseLayer | MoELayer] = []
        for i, (rule, state) in enumerate(zip(rules, given, strict=True)):
            layer = layer_params(params, i)
            for j in range(config.moe_every - 1):
                layers.append(DenseLayer(config, layer_of(layer["dense"], j)))
            layers.append(MoELayer(config, layer, rule, state))
        self.layers = nnx.List(layers)

    def moe_layers(self) -> list[MoELayer]:
        """The layers with experts, in order."""
        return [layer for layer in self.layers if isinstance(layer, MoELayer)]

    def __call__(self, tokens: Array, *, mask: Array | None = None) -> Output:
        """Logits of the next byte for tokens i32[B, S], and each MoE layer's report: see
        ``moe_jax.lab.language_model.forward``. Reads the routers' states and never writes them."""
        if mask is None:
            mask = jnp.ones(tokens.shape, bool)
        ends = {"embedding": arrays(self.embedding), "norm": arrays(self.norm)}
        h = embed(ends, tokens)
        reports, inputs = [], []
        for layer in self.layers:
            if isinstance(layer, MoELayer):
                h, aux, x = layer(h, mask)
                reports.append(aux)
                inputs.append(x)
            else:
                h = layer(h)
        return Output(logits=unembed(ends, h), layers=tuple(reports), router_inputs=tuple(inputs))

    def update_routers(self, out: Output) -> None:
        """Writes every router's state after a training batch. Nothing else writes it."""
        for layer, aux in zip(self.moe_layers(), out.layers, strict=True):
            layer.moe.update_router(aux)

    def params(self) -> dict[str, Params]:
        """The parameters as ``moe_jax.lab.language_model.forward`` takes them, layers stacked."""
        groups = []
        step = self.config.moe_every
        for i in range(0, self.config.num_layers, step):
            *dense, last = (layer.params() for layer in self.layers[i : i + step])
            groups.append(last | ({"dense": _stack(dense)} if dense else {}))
        return {
            "embedding": arrays(self.embedding),
            "layers": _stack(groups),
            "norm": arrays(self.norm),
        }

    def states(self) -> tuple[Any, ...]:
        """Each router's state."""
        return tuple(layer.moe.router_state.get_value() for layer in self.moe_layers())

    def routers(self) -> tuple[Router, ...]:
        """Each layer's rule."""
        return tuple(layer.moe.spec.router for layer in self.moe_layers())


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@nnx.jit
def decoder_step(decoder: Decoder, state: nnx.Optimizer, tokens: Array) -> dict[str, Array]:
    """One training step in place, on tokens i32[B, S + 1]; see ``moe_jax.lab.training.train_step``.

    The loss has the auxiliary terms of ``config.loss_weights``; routers' states move with the batch.

    Args:
        decoder: the model.
        state: ``nnx.Optimizer(decoder, tx, wrt=nnx.Param)`` with
            ``tx = moe_jax.lab.optimizer.optimizer(config, steps)``.
        tokens: i32[B, S + 1].

    Returns:
        Metrics, as ``moe_jax.lab.language_model.objective``.
    """

    def value(model: Decoder) -> tuple[Array, tuple[Output, dict[str, Array]]]:
        out = model(tokens[:, :-1])
        total, metrics = objective(model.config, out, tokens[:, 1:])
        return total, (out, metrics)

    (_, (out, metrics)), grads = nnx.value_and_grad(value, has_aux=True)(decoder)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts with float32 rates
        state.update(decoder, grads)
    decoder.update_routers(out)
    return metrics


# --- on disk --------------------------------------------------------------------------------


def save_decoder(
    path: PathLike,
    decoder: Decoder,
    state: nnx.Optimizer | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Saves a decoder as ``moe_jax.lab.model_files.save_model`` does, for ``moe-jax calibrate``.

    With the optimiser beside it, ``load_decoder`` resumes a run with the same bits.
    """
    model = Model(
        config=decoder.config,
        params=decoder.params(),
        routers=decoder.routers(),
        states=decoder.states(),
        metadata=metadata or {},
    )
    extra = {} if state is None else {"nnx_optimizer": _leaves(state)}
    return save_model(path, model, extra=extra, overwrite=overwrite)


def load_decoder(
    path: PathLike, tx: optax.GradientTransformation | None = None, *, variant: str = ""
) -> tuple[Decoder, nnx.Optimizer | None]:
    """A decoder from a checkpoint of ``save_decoder``, ``moe_jax.lab.training.train`` or ``calibrate``.

    Args:
        path: the checkpoint.
        tx: with ``moe_jax.lab.optimizer.optimizer(config, steps)`` the ``nnx.Optimizer`` that was
            saved is restored too.
        variant: see ``moe_jax.lab.model_files.load_model``.

    Returns:
        The decoder, and the optimiser or None.

    Raises:
        ValueError, CheckpointError: see ``moe_jax.lab.model_files.load_model``; or the checkpoint
            has no optimiser, or another.
    """
    model = load_model(path, variant)
    decoder = Decoder(model.config, params=model.params, states=model.states, routers=model.routers)
    if tx is None:
        return decoder, None
    fresh = nnx.Optimizer(decoder, tx, wrt=nnx.Param)
    wanted = _leaves(fresh)
    expected = checkpoint.Checkpoint(extra={"nnx_optimizer": wanted})
    saved = checkpoint.restore(path, expected=expected).extra["nnx_optimizer"]
    graph, state = nnx.split(fresh)
    leaves = [saved[name] for name in wanted]
    return decoder, nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))


def _leaves(optimizer: nnx.Optimizer) -> dict[str, Array]:
    """The optimiser's arrays by their path, for a checkpoint."""
    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.state(optimizer))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


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
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    with jax.numpy_dtype_promotion("standard"):
        tx = optimizer(config, steps)
        state = nnx.Optimizer(decoder, tx, wrt=nnx.Param)
    for i in range(steps):
        metrics = decoder_step(decoder, state, tokens)
        if i % 5 in (0, 4):
            print(f"step {i + 1}: {float(metrics['bits_per_byte']):.2f} bits a byte")


if __name__ == "__main__":
    main()
