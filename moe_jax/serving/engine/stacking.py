"""One request for all layers of a model: an order for each layer, and one answer of all of theirs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_jax.serving.cache import Entry
from moe_jax.serving.engine.requests import Order
from moe_jax.serving.engine.snapshot import ALL_LAYERS

# What fills the slots of a layer with fewer experts, or fewer per token, than another one has.
_FILL = {"expert_indices": -1, "router_logits": -np.inf}


def stack_layers(orders: Sequence[Order], entries: Sequence[Entry]) -> Entry:
    """Returns the results of the layers [B, S, ...] as one result [L, B, S, ...].

    It is not kept in the cache, where each layer has its own.

    Args:
        orders: one for each layer, in their order.
        entries: their results.
    """
    names = [name for name in entries[0].arrays if name[0] != "_"]
    arrays = {
        name: _stacked([entry.arrays[name] for entry in entries], _FILL.get(name, 0))
        for name in names
    }
    for name in ("_load", "_histogram"):
        arrays[name] = _stacked([entry.arrays[name] for entry in entries], 0).sum(axis=0)
    abouts = [entry.about for entry in entries]
    return Entry(
        arrays=arrays,
        about={
            **{n: sum(about[n] for about in abouts) for n in ("nonfinite_tokens", "large_tokens")},
            **{n: any(about[n] for about in abouts) for n in ("sanitized", "degraded")},
            "fallback": next((about["fallback"] for about in abouts if about["fallback"]), ""),
        },
        seconds=sum(entry.seconds for entry in entries),
        version=orders[0].snapshot.versions[ALL_LAYERS],
        owner=orders[0].owner,
        cacheable=False,
    )


def _stacked(arrays: list[np.ndarray], fill: float) -> np.ndarray:
    """Returns arrays that may differ in their last axis as one read-only array."""
    shape = arrays[0].shape[:-1]
    widest = max(array.shape[-1] for array in arrays)
    out = np.full((len(arrays), *shape, widest), fill, arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[..., : array.shape[-1]] = array
    out.flags.writeable = False
    return out


def outcome_of(outcomes: Sequence[str]) -> str:
    """Returns what the cache did for a whole request: ``hit`` if no layer was computed.

    Example:
        >>> outcome_of(["hit", "coalesced"]), outcome_of(["hit", "miss"])
        ('hit', 'miss')
    """
    computed = [outcome for outcome in outcomes if outcome not in ("hit", "coalesced")]
    return computed[0] if computed else "hit"
