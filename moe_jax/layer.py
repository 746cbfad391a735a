"""The whole path as one pure function: route, plan, run experts, combine."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from moe_jax.checks import check_array
from moe_jax.experts import ExpertFn, FeedForward, choose, run_experts
from moe_jax.experts.exchange import ExpertParallel
from moe_jax.experts.expert_parallel import bias_once, run_parallel
from moe_jax.routers import Router
from moe_jax.routing.difficulty import Context
from moe_jax.routing.dispatch import (
    expert_capacity,
    kept_weights,
    plan_dispatch,
    plan_in_groups,
    to_assignments,
)
from moe_jax.routing.stats import global_stats, routing_stats
from moe_jax.types import Array, ExpertChoice, Params, Routing, RoutingStats, pytree


@pytree
class LayerAux:
    """What a layer reports beside its output. Unused parts cost nothing under ``jit``."""

    routing: Routing | ExpertChoice
    stats: RoutingStats


def init_moe_layer(
    router: Router,
    experts: FeedForward,
    key: Array,
    *,
    d_model: int,
    d_ff: int,
    shared_d_ff: int = 0,
) -> dict[str, Params]:
    """Parameters for ``moe_layer``: ``{"router": ..., "experts": ...}`` and ``"shared"`` if any.

    Args:
        router: the rule.
        experts: the expert; for a function of your own, build its parameters yourself, with a
            leading expert axis.
        key: randomness.
        d_model: D.
        d_ff: F.
        shared_d_ff: width of the shared expert that every token uses; 0 is none.
    """
    router_key, expert_key, shared_key = jax.random.split(key, 3)
    params: dict[str, Params] = {
        "router": router.init(router_key, d_model),
        "experts": experts.init(
            expert_key, num_experts=router.num_experts, d_model=d_model, d_ff=d_ff
        ),
    }
    if shared_d_ff:
        shared = experts.init(shared_key, num_experts=1, d_model=d_model, d_ff=shared_d_ff)
        params["shared"] = jax.tree.map(lambda p: p[0], shared)
    return params


def moe_layer(
    router: Router,
    expert_fn: ExpertFn,
    params: dict[str, Params],
    state,
    x: Array,
    *,
    key: Array | None = None,
    token_mask: Array | None = None,
    context: Context | None = None,
    capacity_factor: float | None = None,
    max_rows: int | None = None,
    priority: str = "score",
    renormalize_kept: bool = False,
    implementation: str | tuple[str, ...] | None = None,
    groups: int = 1,
    parallel: ExpertParallel | None = None,
) -> tuple[Array, LayerAux]:
    """A Mixture-of-Experts layer.

    Args:
        router: the rule (static).
        expert_fn: one expert, ``(params, rows [M, D]) -> [M, D]`` (static).
        params: ``router``: the router's; ``experts``: with a leading axis E; optionally ``shared``:
            one more expert that every token uses, and ``shared_gate`` f32[D, 1], whose sigmoid then
            weighs it (as in Qwen2-MoE).
        state: the router's state.
        x: float[..., D]; leading axes are flattened to T tokens for routing.
        key: randomness for the gate's noise; None means none.
        token_mask: bool[...], False for padding: it uses no expert and its output is zero.
        context: per-token extras for difficulty estimators, flattened to T already.
        capacity_factor: None is dropless; else experts take ``capacity_factor * T * K / E`` rows.
        max_rows: row budget R, see ``plan_dispatch``.
        priority: who is dropped, see ``plan_dispatch``.
        renormalize_kept: scale a token's kept weights up to what they were before drops.
        implementation: see ``moe_jax.experts``.
        groups: hold capacity and row budget in each of so many equal runs of tokens, as so many
            devices would (``plan_in_groups``), and let the rule observe each by itself.
        parallel: inside your own ``shard_map``: the axes over which tokens and experts are split.
            x is then this device's share, ``params["experts"]`` this device's experts, and the
            statistics are those of the whole batch.
            ``moe_jax.parallel.sharding.sharded_moe_layer`` does it from outside.

    Returns:
        y like x, and ``LayerAux``. Sums are taken in float32.

    Raises:
        ValueError, TypeError: an input of the wrong rank, width or dtype; see the message.

    Example:
        >>> import moe_jax
        >>> router, ffn = moe_jax.TopK(num_experts=4, k=2), moe_jax.FeedForward()
        >>> params = init_moe_layer(router, ffn, jax.random.key(0), d_model=8, d_ff=16)
        >>> y, aux = moe_layer(router, ffn, params, router.init_state(), jnp.ones((2, 3, 8)))
        >>> y.shape, float(aux.stats.mean_experts_per_token)
        ((2, 3, 8), 2.0)
    """
    if not hasattr(x, "ndim") or x.ndim < 1:
        check_array("x", x, "T D", fix="Pass hidden states [..., d_model].")
    lead, width = x.shape[:-1], x.shape[-1]
    flat = x.reshape(math.prod(lead), width)
    mask = None if token_mask is None else _flat_mask(token_mask, lead)
    if mask is not None:  # whatever padding holds, NaN included, goes no further than here
        flat = jnp.where(mask[:, None], flat, jnp.zeros((), flat.dtype))
    routing = router(params["router"], state, flat, key=key, token_mask=mask, context=context)
    capacity = None
    if capacity_factor is not None:
        each = flat.shape[0] // groups
        capacity = expert_capacity(each, router.num_experts, router.max_k, capacity_factor)
    y, stats = run_routing(
        expert_fn, params["experts"], flat, routing,
        capacity=capacity, max_rows=max_rows, priority=priority,
        renormalize_kept=renormalize_kept, implementation=implementation,
        observed=_observed(router, state, routing, groups), groups=groups, parallel=parallel,
    )  # fmt: skip
    if "shared" in params:
        y = y + _shared(expert_fn, params, flat, mask, parallel)
    return y.astype(x.dtype).reshape(*lead, -1), LayerAux(routing=routing, stats=stats)


def run_routing(
    expert_fn: ExpertFn,
    params: Params,
    x: Array,
    routing: Routing | ExpertChoice,
    *,
    capacity: int | None = None,
    max_rows: int | None = None,
    priority: str = "score",
    renormalize_kept: bool = False,
    implementation: str | tuple[str, ...] | None = None,
    observed: Array | None = None,
    groups: int = 1,
    parallel: ExpertParallel | None = None,
) -> tuple[Array, RoutingStats]:
    """The second half of ``moe_layer``: what follows a routing decision, whoever made it.

    Args:
        expert_fn: one expert (static).
        params: expert parameters with a leading axis E.
        x: float[T, D], the tokens that were routed.
        routing: the decision.
        capacity, max_rows, priority: see ``plan_dispatch``.
        renormalize_kept: see ``kept_weights``.
        implementation: see ``moe_jax.experts``.
        observed: f32[E] from ``router.observe``, for the statistics.
        groups, parallel: see ``moe_layer``; the bounds are then those of one group, or device.

    Returns:
        f32[T, D_out], the sum of weighted expert outputs and of the residual, and statistics.
    """
    bounds = {"capacity": capacity, "max_rows": max_rows, "priority": priority}
    assignments = to_assignments(routing)
    if groups == 1:
        plan = plan_dispatch(assignments, **bounds)
    else:
        plan = plan_in_groups(assignments, groups, **bounds)
    weights = kept_weights(plan, renormalize=renormalize_kept)
    if parallel is None:
        chosen = choose(plan, implementation, expert_fn=expert_fn)
        y = run_experts(expert_fn, params, x, plan, weights, implementation=chosen.name)
        name, executed = chosen.name, chosen.slots_executed(plan)
    else:
        y, executed = run_parallel(
            expert_fn, params, x, plan, weights, parallel, implementation=implementation
        )
        name = "expert_parallel"
    if isinstance(routing, Routing):
        y = y + routing.residual_weight[:, None] * x.astype(jnp.float32)
    stats = routing_stats(
        routing,
        plan,
        slots_executed=executed,
        observed=observed,
        implementation=name,
    )
    return y, stats if parallel is None else global_stats(stats, parallel.token_axes)


def _observed(router: Router, state, routing: Routing | ExpertChoice, groups: int) -> Array:
    """What the rule observes, in each group by itself and averaged by tokens, as devices do it."""
    if groups == 1:
        return router.observe(state, routing)
    split = jax.tree.map(lambda leaf: leaf.reshape(groups, -1, *leaf.shape[1:]), routing)
    tokens = split.token_mask.sum(axis=1, dtype=jnp.float32)
    seen = jax.vmap(lambda part: router.observe(state, part))(split)
    return (seen * tokens[:, None]).sum(axis=0) / jnp.maximum(tokens.sum(), 1.0)


def _flat_mask(token_mask: Array, lead: tuple[int, ...]) -> Array:
    if token_mask.shape != lead:
        raise ValueError(
            f"token_mask: expected bool{list(lead)} like the leading axes of x, got "
            f"{token_mask.dtype}{list(token_mask.shape)}. Pass one flag a token."
        )
    return token_mask.reshape(-1)


def _shared(
    expert_fn: ExpertFn,
    params: dict[str, Params],
    x: Array,
    mask: Array | None,
    parallel: ExpertParallel | None,
) -> Array:
    shared, axis = params["shared"], None if parallel is None else parallel.model_axis
    if axis is not None:
        shared = bias_once(shared, axis)
    out = expert_fn(shared, x).astype(jnp.float32)
    if axis is not None:
        out = jax.lax.psum(out, axis)
    if "shared_gate" in params:
        gate = params["shared_gate"].astype(jnp.float32)
        out = out * jax.nn.sigmoid(x.astype(jnp.float32) @ gate)
    return out if mask is None else jnp.where(mask[:, None], out, 0.0)
