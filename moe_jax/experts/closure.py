"""Traced arrays that an expert function takes from outside become parameters.

Hand-written gradients know the parameters of an expert only. A gradient, or a batch axis of
``jax.vmap``, of an array that the function closes over would pass them by.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from moe_jax.experts.feed_forward import ExpertFn, FeedForward
from moe_jax.experts.implementation import varying_axes
from moe_jax.types import Array, Params


class _Converted:
    """The expert function of ``{"params": ..., "closed": [...]}``."""

    def __init__(self, expert_fn: ExpertFn, closed: list[Any]) -> None:
        self.expert_fn, self.closed = expert_fn, closed

    def __call__(self, params: Params, x: Array) -> Array:
        jaxpr = jax.make_jaxpr(self.expert_fn)(params["params"], x)
        # The same function closes over the same tracers, whatever it is called with.
        place = {id(c): i for i, c in enumerate(self.closed)}
        values = [params["closed"][place[id(c)]] if id(c) in place else c for c in jaxpr.consts]
        run = jaxpr_as_fun(ClosedJaxpr(jaxpr.jaxpr, values))
        (y,) = run(*jax.tree.leaves((params["params"], x)))
        return y


def with_closed_over(expert_fn: ExpertFn, params: Params, x: Array) -> tuple[ExpertFn, Params]:
    """Returns an expert function that takes no traced array from outside, and its parameters.

    Args:
        expert_fn: one expert.
        params: of all experts, with a leading axis E.
        x: float[T, D].

    Returns:
        ``expert_fn`` and ``params`` as they are, if the function closes over no traced array. Otherwise
        each of these arrays has become a parameter that all E experts share.

    Raises:
        ValueError: there is such an array, inside ``shard_map`` with ``check_vma``.

    Example:
        >>> def loss(scale):
        ...     fn, params = with_closed_over(
        ...         lambda p, x: x @ p["w"] * scale, {"w": jnp.ones((2, 4, 4))}, jnp.ones((3, 4))
        ...     )
        ...     return params["closed"][0].sum()
        >>> float(jax.grad(loss)(1.0))
        2.0
    """
    # The usual expert closes over nothing: no trace is spent on it.
    if isinstance(expert_fn, FeedForward):
        return expert_fn, params

    def first(params: Params, x: Array) -> Array:
        return expert_fn(jax.tree.map(lambda a: a[0], params), x[:1])

    consts = jax.make_jaxpr(first)(params, x).consts
    closed = [c for c in consts if isinstance(c, jax.core.Tracer)]
    if not closed:
        return expert_fn, params
    axes = varying_axes((closed, params, x))
    if axes:
        # The function's own program converts such an array to one that varies where it meets x. As a
        # parameter it varies already, and JAX has no conversion back.
        raise ValueError(
            "expert_fn: expected no traced array from outside, inside shard_map with check_vma=True, "
            f"got {len(closed)}. Make it a parameter with a leading axis E, choose "
            "implementation='dense' or 'capacity', or pass check_vma=False."
        )
    experts = jax.tree.leaves(params)[0].shape[0]
    # A leading axis E like every parameter has. The transpose of the broadcast sums the experts'
    # gradients.
    shared = [jnp.broadcast_to(c[None], (experts, *c.shape)) for c in closed]
    return _Converted(expert_fn, closed), {"params": params, "closed": shared}
