"""Training an NNX model for elastic budgets: two lines in a training loop of your own.

Example:
    >>> import jax, jax.numpy as jnp, moe_jax, optax
    >>> from flax import nnx
    >>> from moe_jax.nn.elastic import make_elastic, set_share
    >>> from moe_jax.nn.nnx import MoE
    >>> model = MoE(moe_jax.TopK(num_experts=8, k=4), d_model=8, d_ff=16, rngs=nnx.Rngs(0))
    >>> make_elastic(model)                                             # once
    >>> late, steps = moe_jax.Schedule(share=0.5, start=0.5), 4
    >>> @nnx.jit
    ... def step(model, optimizer, x, number):
    ...     set_share(model, late.share_at(number, steps))              # at each step
    ...     loss, grads = nnx.value_and_grad(lambda model: jnp.square(model(x) - x).mean())(model)
    ...     optimizer.update(model, grads)
    ...     return loss
    >>> optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)
    >>> x = jax.random.normal(jax.random.key(0), (64, 8))
    >>> losses = [float(step(model, optimizer, x, i)) for i in range(steps)]
    >>> losses[-1] < losses[0]
    True
    >>> set_share(model, 0.0)                                           # to serve

Afterwards ``moe_jax.nn.patching.fit_model(model, x, target_mean_k=2.5)`` fits the very rule that was
trained. In Linen the states are a collection: ``with_share(variables["router_state"], share)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx

from moe_jax.nn.capture import check_has_layers
from moe_jax.routers import Elastic, TopK, with_share
from moe_jax.routing.elasticity import distillation_loss
from moe_jax.types import Array


def make_elastic(
    model: nnx.Module, *, draw: str = "k", min_k: int = 1, rescale: bool = False
) -> None:
    """Gives every fixed-k layer of an NNX model an ``Elastic`` rule, in place.

    Parameters, gate, scoring, selection bias and its balancing stay. Nothing is drawn until
    ``set_share``.

    Args:
        model: an NNX model with ``MoE`` layers under ``TopK`` rules, trained or new.
        draw, min_k, rescale: see ``moe_jax.Elastic``.

    Raises:
        ValueError: no MoE layer, or one without a ``TopK`` rule that ``Elastic`` can express; the
            model is then unchanged.
    """
    layers = check_has_layers(model)
    rules: dict[str, Elastic] = {}
    for path, layer in layers.items():
        trained = layer.spec.router
        if not isinstance(trained, TopK) or trained.use_expert_scale or trained.balance != "sign":
            raise ValueError(
                f"{path}: expected a layer with a plain fixed k (TopK), got {trained!r}. Make the "
                "model elastic as it was trained, and only once."
            )
        rules[path] = Elastic(
            num_experts=trained.num_experts,
            k=trained.k,
            min_k=min_k,
            draw=draw,
            rescale=rescale,
            balance_rate=trained.balance_rate,
            gate=trained.gate,
            scoring=trained.scoring,
        )
    for path, layer in layers.items():
        bias = layer.router_state.get_value().expert_bias
        state = dataclasses.replace(rules[path].init_state(), expert_bias=bias)
        layer.spec = dataclasses.replace(layer.spec, router=rules[path])
        layer.router_state.set_value(state)


def set_share(model: nnx.Module, share: float | Array) -> None:
    """Sets the share of tokens that draw their budget, in every ``Elastic`` layer; works in ``jit``.

    Args:
        model: after ``make_elastic``.
        share: f32[] in [0, 1], for example of ``moe_jax.Schedule``; 0 for serving.
    """
    for layer in check_has_layers(model).values():
        layer.router_state.set_value(with_share(layer.router_state.get_value(), share))


def self_distillation(
    model: nnx.Module, call: Callable[[Any], Array], *, share: float | Array = 1.0
) -> tuple[Array, Array]:
    """Runs a model with all experts and with drawn budgets; returns the first's output and their KL.

    Part of the loss: ``logits, taught = self_distillation(model, lambda m: m(x))`` and then the usual
    loss of ``logits`` plus ``taught``. The share of the model afterwards is 0.

    Args:
        model: after ``make_elastic``.
        call: runs the model; returns logits float[..., V].
        share: of the second pass.
    """
    set_share(model, 0.0)
    full = call(model)
    set_share(model, share)
    reduced = call(model)
    set_share(model, 0.0)
    return full, distillation_loss(reduced, full)


def is_router(path: Any, value: Any) -> bool:
    """An NNX filter for the parameters of routers, to train these alone.

    ``nnx.Optimizer(model, optax.adam(1e-3), wrt=is_router)``, with
    ``nnx.DiffState(0, is_router)`` as ``argnums`` of ``nnx.value_and_grad``.
    """
    return isinstance(value, nnx.Param) and "router" in path
