"""Captures what the MoE layers of an NNX model see and return, without a change of its code."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen, nnx

from moe_jax.checks import describe_value
from moe_jax.layer import LayerAux
from moe_jax.nn.nnx import MoE
from moe_jax.types import Array

Watcher = Callable[[str, Array, LayerAux], None]


def moe_layers(model: nnx.Module) -> dict[str, MoE]:
    """Returns the ``MoE`` layers of a model by path (``"blocks/0/moe"``), in the order of the graph."""
    return {
        "/".join(map(str, path)) or "model": node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, MoE)
    }


def check_has_layers(model: nnx.Module) -> dict[str, MoE]:
    """Returns ``moe_layers`` of a model that must have at least one MoE layer.

    Raises:
        TypeError: not an NNX model.
        ValueError: the model has no MoE layer.
    """
    if isinstance(model, linen.Module):
        raise TypeError(
            f"model: expected an NNX model, got the Linen module {type(model).__name__}. Of a Linen "
            "model, fit each layer's rule with router.fit and put its state into the variables, see "
            "docs/how-to/own-model.md."
        )
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model: expected an NNX model, got {describe_value(model)}. Pass the nnx model itself, "
            "before nnx.split."
        )
    layers = moe_layers(model)
    if not layers:
        raise ValueError(
            f"model: expected an nnx model with MoE layers, got {type(model).__name__} without any. "
            "Use moe_jax.nn.nnx.MoE or DynamicMoE in it."
        )
    return layers


@contextlib.contextmanager
def watching(model: nnx.Module, watch: Watcher) -> Iterator[None]:
    """While the context is open, every call of an MoE layer also calls ``watch(path, x, aux)``.

    x and aux hold host arrays. Works inside ``jit`` as well: a watched layer has another type, so the
    model is traced anew, and a callback carries the values out.

    Raises:
        ValueError: the model has no MoE layer.
    """
    layers = check_has_layers(model)
    originals = {path: type(layer) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.__class__ = _watched(type(layer), path, watch)
    try:
        yield
        jax.effects_barrier()
    finally:
        for path, layer in layers.items():
            layer.__class__ = originals[path]


def _watched(kind: type[MoE], path: str, watch: Watcher) -> type[MoE]:
    def call(self: MoE, x: Array, *, return_aux: bool = False, **kwargs: Any) -> Any:
        y, aux = kind.__call__(self, x, return_aux=True, **kwargs)
        jax.debug.callback(functools.partial(watch, path), x, aux)
        return (y, aux) if return_aux else y

    return type(f"Watched{kind.__name__}", (kind,), {"__call__": call})
