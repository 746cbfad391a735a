"""``flax.serialization`` of router states: to and from plain dicts, for msgpack.

``moe_jax.nn.nnx`` and ``moe_jax.nn.linen`` import this module, so ``flax.serialization.to_bytes``
takes Linen variables and ``nnx.to_pure_dict(nnx.state(model))`` with router states in them. A state is
restored into a model that has the same rules: ``from_bytes`` raises otherwise, and says what to do
first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import serialization

from moe_jax.types import on_pytree

_FIX = (
    "Restore into a model with the same rules: build or patch it with the same number of experts and "
    "the same least and most experts a token (patch_model_with_dynamic_routing, DynamicMoE) first."
)


def _to_dict(value: Any) -> dict[str, Any]:
    """The array fields by name; static fields belong to the model, not to its state."""
    return {
        f.name: serialization.to_state_dict(getattr(value, f.name))
        for f in dataclasses.fields(value)
        if not f.metadata.get("static")
    }


def _from_dict(target: Any, stored: Any) -> Any:
    """``target`` with the arrays of ``stored``.

    Raises:
        ValueError: other fields, or an array of another shape.
    """
    kind = type(target).__name__
    wanted = [f.name for f in dataclasses.fields(target) if not f.metadata.get("static")]
    if not isinstance(stored, dict) or set(stored) != set(wanted):
        names = ", ".join(stored) if isinstance(stored, dict) else type(stored).__name__
        raise ValueError(
            f"{kind}: expected the fields {', '.join(wanted) or 'of an empty state'}, got "
            f"{names or 'none'}. The file was written under another rule. {_FIX}"
        )
    restored = {}
    for name in wanted:
        old = getattr(target, name)
        new: Any = serialization.from_state_dict(old, stored[name], name=name)
        if hasattr(old, "shape"):
            if jnp.shape(new) != old.shape:
                raise ValueError(
                    f"{kind}.{name}: expected {list(old.shape)}, got {list(jnp.shape(new))}. {_FIX}"
                )
            new = jnp.asarray(new, old.dtype)
        restored[name] = new
    return dataclasses.replace(target, **restored)


# A cell of a notebook that runs twice defines its class twice, hence `override`.
on_pytree(
    lambda cls: serialization.register_serialization_state(cls, _to_dict, _from_dict, override=True)
)
