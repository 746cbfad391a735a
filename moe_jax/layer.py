"""The whole path as one pure function: route, plan, run experts, combine."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from moe_jax.checks import (
    NamedArguments,
    check_array,
    check_choice,
    check_count,
    check_flag,
    check_hidden_states,
    check_instance,
    check_key,
    check_layer_params,
    describe_value,
    flat_token_mask,
)
from moe_jax.experts import (
    ExpertFn,
    FeedForward,
    check_expert_fn,
    check_implementation,
    check_params,
    check_platform,
    run_experts,
)
from moe_jax.experts.exchange import ExpertParallel
from moe_jax.experts.expert_parallel import bias_once, run_parallel
from moe_jax.experts.explicit_axes import call_with_auto_axes, explicit_mesh
from moe_jax.experts.quantized_kernels import without_gradient
from moe_jax.experts.weighted_input import weighted_rows
from moe_jax.routers import Router
from moe_jax.routers.contracts import ExpertsChoose
from moe_jax.routing.difficulty import Context
from moe_jax.routing.dispatch import (
    PRIORITIES,
    expert_capacity,
    kept_weights,
    plan_dispatch,
    plan_in_groups,
    to_assignments,
)
from moe_jax.routing.stats import global_stats, observed_by_group, routing_stats
from moe_jax.types import (
    Array,
    ExpertChoice,
    Params,
    Routing,
    RoutingStats,
    pytree,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerOptions(NamedArguments):
    """How a layer runs its experts, as a static value: hashable, compared by value.

    Args:
        capacity_factor: None drops nothing; else an expert takes at most
            ``ceil(capacity_factor * T * K / E)`` rows, see ``expert_capacity``.
        max_rows: row budget R of the whole batch (of each group, or of each device), see
            ``plan_dispatch``; None is no budget.
        priority: which assignments are dropped first, see ``plan_dispatch``.
        renormalize_kept: whether a token's kept weights are scaled up to what its weights added up
            to before anything was dropped, see ``kept_weights``.
        implementation: None lets the library choose; a name of ``moe_jax.experts.IMPLEMENTATIONS``,
            or a tuple of names in order of preference.
        platform: what the layer is compiled for: "cpu", "tpu", "cuda" or "rocm". None takes it from
            the mesh and the arrays, and leaves it to the lowering where they do not say.
        groups: number of equal, consecutive token groups. Capacity and row budget apply within
            each group, which reproduces what that many devices would drop.

    Raises:
        TypeError, ValueError: a field of the wrong type, or out of its range.

    Example:
        >>> LayerOptions(capacity_factor=1.25, implementation="capacity").priority
        'score'
    """

    capacity_factor: float | None = None
    max_rows: int | None = None
    priority: str = "score"
    renormalize_kept: bool = False
    implementation: str | tuple[str, ...] | None = None
    platform: str | None = None
    groups: int = 1

    def __post_init__(self) -> None:
        factor = self.capacity_factor
        if factor is not None:
            if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
                raise TypeError(
                    "capacity_factor: expected a positive number or None, got "
                    f"{describe_value(factor)}. Pass a Python number such as 1.25; None drops nothing."
                )
            if not 0 < factor < math.inf:
                raise ValueError(
                    "capacity_factor: expected a positive finite number or None, got "
                    f"{factor}. 1.25 is usual; None drops nothing."
                )
        if self.max_rows is not None:
            check_count("max_rows", self.max_rows, fix="None is no row budget.")
        check_choice("priority", self.priority, PRIORITIES)
        check_flag("renormalize_kept", self.renormalize_kept)
        check_implementation(self.implementation)
        check_platform(self.platform)
        check_count("groups", self.groups, fix="1 plans for the whole batch at once.")

    def capacity(self, routing: Routing | ExpertChoice) -> int | None:
        """Rows C that one expert takes from one group of ``routing``; None without a bound."""
        if self.capacity_factor is None:
            return None
        if isinstance(routing, Routing):
            tokens, k = routing.expert_indices.shape
        else:
            tokens, k = routing.num_tokens, routing.num_experts
        # With more groups than tokens, ``plan_in_groups`` raises the more detailed error.
        return expert_capacity(
            jax.core.max_dim(1, tokens // self.groups), routing.num_experts, k, self.capacity_factor
        )


@pytree
class LayerAux:
    """What a layer reports beside its output. Unused parts cost nothing under ``jit``.

    Example:
        >>> import moe_jax
        >>> router, expert = moe_jax.TopK(num_experts=4, k=2), FeedForward()
        >>> params = init_moe_layer(router, expert, jax.random.key(0), d_model=8, d_ff=8)
        >>> _, aux = moe_layer(router, expert, params, router.init_state(), jnp.ones((3, 8)))
        >>> float(aux.stats.mean_experts_per_token), aux.routing.expert_indices.shape
        (2.0, (3, 2))
    """

    routing: Routing | ExpertChoice
    stats: RoutingStats


def init_moe_layer(
    router: Router,
    expert_fn: FeedForward,
    key: Array,
    *,
    d_model: int,
    d_ff: int,
    shared_d_ff: int = 0,
) -> dict[str, Params]:
    """Returns parameters for ``moe_layer``: ``router``, ``experts``, and ``shared`` if any.

    Args:
        router: the rule.
        expert_fn: the expert. For a function of your own, build its parameters yourself, with a
            leading expert axis.
        key: randomness.
        d_model: D.
        d_ff: F.
        shared_d_ff: width of the shared expert that every token uses; 0 adds none.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or a width below 1.

    Example:
        >>> import moe_jax
        >>> router = moe_jax.TopK(num_experts=4, k=2)
        >>> params = init_moe_layer(router, FeedForward(), jax.random.key(0), d_model=8, d_ff=16)
        >>> sorted(params), params["experts"]["up"].shape
        (['experts', 'router'], (4, 8, 16))
    """
    check_instance("router", router, Router, fix="Pass a rule such as TopK(num_experts=8, k=2).")
    check_instance(
        "expert_fn",
        expert_fn,
        FeedForward,
        fix="Build the parameters of an expert function of your own yourself: a leading axis E.",
    )
    if key is None:
        raise TypeError("key: expected one JAX key, got None. Pass jax.random.key(0).")
    check_key(key)
    check_count("d_model", d_model, fix="Pass the width of x.")
    check_count("d_ff", d_ff, fix="Pass the width of the experts' hidden layer.")
    check_count("shared_d_ff", shared_d_ff, least=0, fix="0 adds no shared expert.")
    router_key, expert_key, shared_key = jax.random.split(key, 3)
    params: dict[str, Params] = {
        "router": router.init(router_key, d_model),
        "experts": expert_fn.init(
            expert_key, num_experts=router.num_experts, d_model=d_model, d_ff=d_ff
        ),
    }
    if shared_d_ff:
        shared = expert_fn.init(shared_key, num_experts=1, d_model=d_model, d_ff=shared_d_ff)
        params["shared"] = jax.tree.map(lambda p: p[0], shared)
    return params


def moe_layer(
    router: Router,
    expert_fn: ExpertFn,
    params: dict[str, Params],
    state: Any,
    x: Array,
    *,
    key: Array | None = None,
    token_mask: Array | None = None,
    context: Context | None = None,
    options: LayerOptions = LayerOptions(),
    parallel: ExpertParallel | None = None,
) -> tuple[Array, LayerAux]:
    """Computes a Mixture-of-Experts layer.

    Args:
        router: the rule (static).
        expert_fn: one expert, ``(params, rows [M, D]) -> [M, D_out]`` (static).
        params: ``router``: the router's; ``experts``: with a leading axis E; optionally ``shared``:
            one more expert that every token uses, and ``shared_gate`` f32[D, 1], whose sigmoid then
            weighs it (as in Qwen2-MoE).
        state: the router's state.
        x: float[..., D]; leading axes are flattened to T tokens for routing.
        key: randomness for the gate's noise; None means none.
        token_mask: bool[...], False for padding: it uses no expert and its output is zero.
        context: per-token extras for difficulty estimators, flattened to T already.
        options: capacity, row budget, implementation (static).
        parallel: inside your own ``shard_map``: the axes over which tokens and experts are split.
            x is then this device's share, ``params["experts"]`` this device's experts, and the
            statistics are those of the whole batch.
            ``moe_jax.parallel.sharded_layer.sharded_moe_layer`` does it from outside.

    Returns:
        y float[..., D_out] in the dtype of x, and ``LayerAux``. Sums are taken in float32.

    Raises:
        ValueError, TypeError: an input of the wrong kind, rank, width or dtype; see the message.

    Example:
        >>> import moe_jax
        >>> router, expert_fn = moe_jax.TopK(num_experts=4, k=2), moe_jax.FeedForward()
        >>> params = init_moe_layer(router, expert_fn, jax.random.key(0), d_model=8, d_ff=16)
        >>> y, aux = moe_layer(router, expert_fn, params, router.init_state(), jnp.ones((2, 3, 8)))
        >>> y.shape, float(aux.stats.mean_experts_per_token)
        ((2, 3, 8), 2.0)
    """
    check_layer(router, expert_fn, params, options, parallel)
    check_hidden_states(x)
    check_key(key)
    mesh = None if parallel else explicit_mesh((x, params, token_mask, context))
    if mesh is not None:
        layer = functools.partial(moe_layer, router, expert_fn, options=options)
        return with_auto_axes(
            layer, mesh, router, params, state, x, key=key, token_mask=token_mask, context=context
        )
    lead, width = x.shape[:-1], x.shape[-1]
    flat = x.reshape(math.prod(lead), width)
    mask = flat_token_mask(token_mask, lead)
    if mask is not None:
        # Zeros keep the values of padding, NaN included, from the router and the experts.
        flat = jnp.where(mask[:, None], flat, jnp.zeros((), flat.dtype))
    routing = router(params["router"], state, flat, key=key, token_mask=mask, context=context)
    y, stats = run_routing(
        expert_fn,
        params["experts"],
        flat,
        routing,
        options=options,
        observe=functools.partial(router.observe, state),
        parallel=parallel,
    )
    y = add_residual(y, routing, flat)
    if "shared" in params:
        y = y + _shared(expert_fn, params, flat, mask, parallel)
    return y.astype(x.dtype).reshape(*lead, -1), LayerAux(routing=routing, stats=stats)


def with_auto_axes(
    layer: Callable[..., tuple[Array, LayerAux]],
    mesh: AbstractMesh,
    router: Router,
    params: dict[str, Params],
    state: Any,
    x: Array,
    **arguments: Any,
) -> tuple[Array, LayerAux]:
    """Runs a layer on arrays whose split over ``mesh`` is part of their type (Explicit axes).

    Counting tokens is a scatter over split tokens. With Explicit axes, JAX requires a stated
    sharding of the result of every such operation. So the axes are Auto inside, where the compiler
    decides. Only the results have a stated split: y is split like x, the routing like the tokens,
    statistics not at all.
    """
    spec = jax.typeof(x).sharding.spec if x.ndim else ()
    spec = P(*spec) if len(spec) == x.ndim else P(*[None] * x.ndim)
    # Flattened tokens are split like the first leading axis, if that is the only one.
    rows = P(spec[0]) if x.ndim > 1 and not any(spec[1:-1]) else P()
    if isinstance(router, ExpertsChoose) and not router.traits.causal:
        rows = P()  # the arrays of an ExpertChoice lead with experts
    return call_with_auto_axes(
        lambda params, state, x, arguments: layer(params, state, x, **arguments),
        mesh,
        (spec, LayerAux(routing=rows, stats=P())),  # pyright: ignore[reportArgumentType]
        params,
        state,
        x,
        arguments,
    )


def run_routing(
    expert_fn: ExpertFn,
    params: Params,
    x: Array,
    routing: Routing | ExpertChoice,
    *,
    options: LayerOptions = LayerOptions(),
    observe: Callable[[Any], Array] | None = None,
    parallel: ExpertParallel | None = None,
    weight_on_input: bool = False,
) -> tuple[Array, RoutingStats]:
    """Runs the experts that a routing chose: the second half of ``moe_layer``.

    Args:
        expert_fn: one expert (static).
        params: expert parameters with a leading axis E.
        x: float[T, D], the tokens that were routed.
        routing: the decision.
        options: capacity, row budget, implementation (static).
        observe: ``router.observe`` with its state bound, for the statistics; None reports zeros.
        parallel: see ``moe_layer``; ``options`` then bound one device.
        weight_on_input: combine weights multiply an expert's input instead of its output (Llama 4).

    Returns:
        f32[T, D_out], the sum of weighted expert outputs, and statistics. The output of
        zero-computation experts is not included: ``add_residual`` adds it.

    Raises:
        ValueError, TypeError: shapes disagree, the parameters are not those of ``expert_fn``, or
            ``options`` do not fit the batch.
    """
    assignments = to_assignments(routing)
    tokens = assignments.num_tokens
    check_array(
        "x",
        x,
        "T D",
        sizes={"T": tokens},
        fix="Pass the tokens that were routed, flattened to [tokens, width].",
    )
    plan_batch = plan_dispatch
    if options.groups > 1:
        plan_batch = functools.partial(plan_in_groups, groups=options.groups)
    plan = plan_batch(
        assignments,
        capacity=options.capacity(routing),
        max_rows=options.max_rows,
        priority=options.priority,
    )
    weights = kept_weights(plan, renormalize=options.renormalize_kept)
    # With ``weight_on_input``, ``work`` has one token per slot. The statistics still use ``plan``.
    work = x, plan, weights
    if weight_on_input:
        work = weighted_rows(*work)
    run = run_experts if parallel is None else functools.partial(run_parallel, parallel=parallel)
    ran = run(
        expert_fn,
        params,
        *work,
        implementation=options.implementation,
        platform=options.platform,
    )
    y = ran.y
    if weight_on_input:
        # Each slot ran as a separate token. Sum the slots of each original token.
        y = y.reshape(tokens, -1, y.shape[-1]).sum(axis=1)
    stats = routing_stats(
        routing,
        plan,
        slots_executed=ran.slots_executed,
        observed=None if observe is None else observed_by_group(observe, routing, options.groups),
        implementation=ran.implementation,
    )
    return y, stats if parallel is None else global_stats(stats, parallel.token_axes)


def add_residual(y: Array, routing: Routing | ExpertChoice, x: Array) -> Array:
    """Adds to y f32[T, D] the share of x [T, D] that zero-computation experts return.

    Costs nothing without such experts.

    Raises:
        ValueError: the experts' output has another width than x.
    """
    if isinstance(routing, ExpertChoice) or routing.residual_weight is None:
        return y
    if y.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"expert_fn: expected an output of width {x.shape[-1]} like x, got {y.shape[-1]}. The "
            "rule has experts that return x itself, which can only be added to an equal width."
        )
    return y + routing.residual_weight[:, None] * x.astype(jnp.float32)


def _shared(
    expert_fn: ExpertFn,
    params: dict[str, Params],
    x: Array,
    mask: Array | None,
    parallel: ExpertParallel | None,
) -> Array:
    check_params(expert_fn, params["shared"], d_model=x.shape[1], name="shared params")
    shared, axis = params["shared"], None if parallel is None else parallel.model_axis
    if axis is not None:
        # Every device of the model axis computes a part of the sum, so the bias may be in one part
        # only.
        shared = bias_once(shared, axis)
    out = expert_fn(without_gradient(expert_fn, shared), x).astype(jnp.float32)
    if axis is not None:
        out = jax.lax.psum(out, axis)
    if "shared_gate" in params:
        gate = params["shared_gate"]
        check_array(
            "shared_gate",
            gate,
            "D 1",
            sizes={"D": x.shape[1], "1": 1},
            fix="Pass one column, whose sigmoid weighs the shared expert.",
        )
        out = out * jax.nn.sigmoid(x.astype(jnp.float32) @ gate.astype(jnp.float32))
    # Biases make the output of a zero row other than zero.
    return out if mask is None else jnp.where(mask[:, None], out, 0.0)


def check_layer(
    router: Any, expert_fn: Any, params: Any, options: Any, parallel: Any = None
) -> None:
    """Raises unless the arguments of a layer are of the kinds that ``moe_layer`` takes.

    Raises:
        TypeError: an argument of another kind.
        ValueError: ``params`` lacks a part, or has one that no layer reads.
    """
    check_instance("router", router, Router, fix="Pass a rule such as TopK(num_experts=8, k=2).")
    check_expert_fn(expert_fn)
    check_instance(
        "options", options, LayerOptions, fix="Write options=LayerOptions(capacity_factor=1.25)."
    )
    if parallel is not None:
        check_instance("parallel", parallel, ExpertParallel, fix="See sharding.parallel_of(mesh).")
    check_layer_params(params)
