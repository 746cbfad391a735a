"""Routing decisions with a chosen load, and the floors that layers are compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.experts import FeedForward
from moe_jax.types import Array, Params, Routing

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
LOADS = ("uniform", "zipf")
ZIPF_MAX_OVER_MEAN = 3.0


def sample_routing(
    *, tokens: int, experts: int, k: int, load: str, mean_k: float | None = None, seed: int = 0
) -> Routing:
    """Returns a routing of ``tokens`` with ``k`` distinct experts each, drawn with a given load.

    ``uniform`` draws all experts alike. ``zipf`` draws expert e in proportion to ``(e + 1) ** -s``,
    shuffled, with s such that the busiest expert gets 3 times the mean (or as near as k of E allows).
    With ``mean_k`` a random share of the tokens gives up its last experts, down to that mean.
    """
    rng = np.random.default_rng(seed)
    noise = rng.gumbel(size=(tokens, experts))

    def draw(s: float) -> np.ndarray:
        bias = -s * np.log(np.arange(1, experts + 1))
        return np.argsort(-(noise + bias[None, :]), axis=1)[:, :k]

    exponent = 0.0
    if load == "zipf":
        low, high = 0.0, 4.0
        for _ in range(30):
            exponent = 0.5 * (low + high)
            counts = np.bincount(draw(exponent).reshape(-1), minlength=experts)
            if counts.max() / counts.mean() < ZIPF_MAX_OVER_MEAN:
                low = exponent
            else:
                high = exponent
    indices = rng.permutation(experts)[draw(exponent)]
    weights = np.sort(rng.dirichlet(np.ones(k), size=tokens), axis=1)[:, ::-1]
    if mean_k is not None:
        base = int(np.floor(mean_k))
        counts = base + (rng.uniform(size=tokens) < mean_k - base)
        unused = np.arange(k)[None, :] >= counts[:, None]
        indices = np.where(unused, experts, indices)
        weights = np.where(unused, 0.0, weights)
    return Routing(
        expert_indices=jnp.asarray(indices, jnp.int32),
        combine_weights=jnp.asarray(weights, jnp.float32),
        router_logits=jnp.zeros((tokens, experts), jnp.float32),
        router_probs=jnp.full((tokens, experts), 1.0 / experts, jnp.float32),
        token_mask=jnp.ones((tokens,), bool),
        num_experts=experts,
    )


def dense_floor(expert_fn: FeedForward, params: Params, rows: Array) -> Array:
    """Runs one dense feed-forward over all rows, which is the work without any routing."""
    return expert_fn(jax.tree.map(lambda p: p[0], params), rows)


def balanced(expert_fn: FeedForward, params: Params, rows: Array) -> Array:
    """Runs a perfectly balanced batched feed-forward over the experts: [E, M, D] -> [E, M, D]."""
    return jax.vmap(expert_fn)(params, rows)


def sliced(expert_fn: FeedForward, params: Params, rows: Array) -> Array:
    """``balanced`` one expert after another, each a slice of the stacked parameters."""
    return jax.lax.map(lambda one: expert_fn(*one), (params, rows))


def separate(expert_fn: FeedForward, params: list[Params], rows: list[Array]) -> Array:
    """``balanced`` one expert after another, with parameters that are arrays of their own."""
    return jnp.stack([expert_fn(p, r) for p, r in zip(params, rows, strict=True)])


# What a layer is compared with beside the dense floor: no routing, an equal share for every expert.
REFERENCES = {"balanced": balanced, "sliced": sliced, "separate": separate}


def reference_case(
    name: str, expert_fn: FeedForward, params: Params, rows: Array
) -> tuple[Callable[..., Array], Any, Any]:
    """Returns the function of a reference and the parameters and rows that it takes."""
    run = functools.partial(REFERENCES[name], expert_fn)
    if name != "separate":
        return run, params, rows
    each = range(rows.shape[0])
    return run, [jax.tree.map(lambda p, e=e: p[e], params) for e in each], [rows[e] for e in each]


def random_array(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """Returns standard normal values, because some hardware multiplies zeros faster."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(DTYPES[dtype])
