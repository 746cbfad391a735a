"""The layer from routing decision to output, against dense products over the same rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.bench.measure import compile_for, interleave
from moe_jax.bench.peers import peer_cases, versions
from moe_jax.bench.workload import (
    DTYPES,
    REFERENCES,
    dense_floor,
    random_array,
    reference_case,
    sample_routing,
)
from moe_jax.experts import FeedForward, choose, run_experts
from moe_jax.routing.dispatch import expert_capacity, kept_weights, plan_dispatch, to_assignments
from moe_jax.types import Array, Params, Routing

Step = Callable[[Params, Array, Routing], Any]

PROMISED = (
    "implementation",
    "default",
    "tokens",
    "experts",
    "k",
    "dtype",
    "load",
    "pass",
    "ratio",
    "temp_mb",
    "dropped",
)


def experts_step(
    expert_fn: FeedForward,
    *,
    implementation: str | None,
    capacity: int | None = None,
    max_rows: int | None = None,
) -> Step:
    """``(params, x, routing) -> y``: plan, experts, combine, as ``moe_layer`` does after routing."""

    def step(params: Params, x: Array, routing: Routing) -> Array:
        plan = plan_dispatch(to_assignments(routing), capacity=capacity, max_rows=max_rows)
        ran = run_experts(
            expert_fn, params, x, plan, kept_weights(plan), implementation=implementation
        )
        return ran.y.astype(x.dtype)

    return step


def with_gradients(step: Step) -> Step:
    """Forward and backward: gradients of parameters and x under a fixed cotangent of ones."""

    def both(params: Params, x: Array, routing: Routing) -> Any:
        def total(params: Params, x: Array) -> Array:
            return step(params, x, routing).astype(jnp.float32).sum()

        return jax.grad(total, argnums=(0, 1))(params, x)

    return both


def bench_layer(
    *,
    tokens: int,
    d_model: int,
    d_ff: int,
    experts: Sequence[int],
    k: int,
    dtypes: Sequence[str],
    loads: Sequence[str],
    passes: Sequence[str],
    implementations: Sequence[str] = ("capacity", "balanced"),
    activation: str = "gelu_tanh",
    gated: bool = False,
    mean_k: float | None = None,
    max_rows: int | None = None,
    peers: bool = False,
    rounds: int = 10,
    most_seconds: float | None = None,
    progress: Callable[[str], None] = lambda label: None,
    so_far: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Times the default implementation and others over a grid; one row each.

    The floor is one dense feed-forward of the same kind over ``tokens * k`` rows (``tokens * mean_k``
    where given), in the same dtype. Three ``implementations`` are references and route nothing:
    ``balanced``, a batched product in which every expert gets exactly its share; ``sliced`` and
    ``separate``, the same share for one expert after another, whose weights are slices of the stack
    or arrays of their own. ``ratio_balanced`` is the ratio to ``balanced``, the fairer one in bf16 on
    CPU and where all experts' weights must be streamed.
    ``so_far`` is called with all rows after each point of the grid, so that a long run may be cut.
    A point that takes longer than ``most_seconds`` ends with fewer rounds, three at least.

    Returns:
        Rows of {implementation, default, tokens, experts, k, dtype, load, pass, ratio, spread,
        ratio_balanced, ms, floor_ms, temp_mb, dropped, rounds, ...}.
    """
    expert_fn = FeedForward(activation=activation, gated=gated)
    rows = []
    grid = list(itertools.product(experts, dtypes, loads, passes))
    for at, (e, dtype, load, direction) in enumerate(grid, start=1):
        label = f"{at} of {len(grid)}: E={e} {dtype} {load} {direction}"
        progress(f"{label}, compiling")
        routing = sample_routing(tokens=tokens, experts=e, k=k, load=load, mean_k=mean_k)
        load_of = np.asarray(plan_dispatch(to_assignments(routing)).group_sizes)
        about = {
            "tokens": tokens,
            "d_model": d_model,
            "d_ff": d_ff,
            "experts": e,
            "k": k,
            "mean_k": mean_k or k,
            "dtype": dtype,
            "load": load,
            "max_over_mean": round(float(load_of.max() / load_of.mean()), 3),
            "pass": direction,
        }
        params = expert_fn.init(jax.random.key(0), num_experts=e, d_model=d_model, d_ff=d_ff)
        params = jax.tree.map(lambda p, to=DTYPES[dtype]: p.astype(to), params)
        x = random_array((tokens, d_model), dtype, 1)
        measured = _grid_point(
            expert_fn,
            params,
            x,
            routing,
            k=k,
            max_rows=max_rows,
            backward=direction == "bwd",
            peers=peers and load == "uniform" and mean_k is None and max_rows is None,
            implementations=implementations,
            rounds=rounds,
            most_seconds=most_seconds,
            after_round=lambda done, label=label: progress(f"{label}, round {done} of {rounds}"),
        )
        rows += [{**about, **row} for row in measured]
        so_far(rows)
    return rows


def _grid_point(
    expert_fn: FeedForward,
    params: Params,
    x: Array,
    routing: Routing,
    *,
    k: int,
    max_rows: int | None,
    backward: bool,
    peers: bool,
    implementations: Sequence[str],
    rounds: int,
    most_seconds: float | None,
    after_round: Callable[[int], None],
) -> list[dict[str, Any]]:
    tokens, d_model = x.shape
    experts = routing.num_experts
    dropless = plan_dispatch(to_assignments(routing))
    default = choose(dropless).name
    active = int(dropless.group_sizes.sum())
    # Unrouted rows, as many as the routing has: in one dense product, and in equal shares.
    rows = jax.random.normal(jax.random.key(2), (active, d_model)).astype(x.dtype)
    share = max(1, round(active / experts))
    shares = jax.random.normal(jax.random.key(3), (experts, share, d_model)).astype(x.dtype)
    one = jax.tree.map(lambda p: p[:1], params)

    floor = functools.partial(dense_floor, expert_fn)
    if backward:
        floor = _both(floor)

    cases: dict[str, Callable[[], Any]] = {}
    details: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys((default, *implementations)):
        if name in REFERENCES:
            even, *arguments = reference_case(name, expert_fn, params, shares)
            cases[name], size = compile_for(_both(even) if backward else even, *arguments)
            details[name] = {"temp_mb": _mb(size), "dropped": 0.0}
            continue
        capacity = expert_capacity(tokens, experts, k, 1.25) if name == "capacity" else None
        step = experts_step(
            expert_fn,
            implementation=None if name == default else name,
            capacity=capacity,
            max_rows=max_rows,
        )
        step = with_gradients(step) if backward else step
        plan = plan_dispatch(to_assignments(routing), capacity=capacity, max_rows=max_rows)
        cases[name], size = compile_for(step, params, x, routing)
        details[name] = {
            "temp_mb": _mb(size),
            "dropped": round(1 - float(plan.group_sizes.sum()) / active, 6),
            "slots_executed": float(choose(plan, name).slots_executed(plan)),
        }
    refused: dict[str, str] = {}
    if peers:
        width = jax.tree.leaves(params)[0].shape[1]  # of "down", the first in name order
        available, refused = peer_cases(
            expert_fn,
            params,
            x,
            routing,
            d_ff=width,
            k=k,
            backward=backward,
            with_gradients=with_gradients,
        )
        cases |= available
        details |= {
            name: {"temp_mb": None, "dropped": 0.0, "peer": True, "version": versions(name)}
            for name in available
        }
    # What did not run has a row too, without a ratio, and says why.
    failed = [
        {
            "implementation": name,
            "default": False,
            "ratio": None,
            "temp_mb": None,
            "dropped": None,
            "rounds": 0,
            "peer": True,
            "not_run": why,
        }
        for name, why in refused.items()
    ]
    dense, _ = compile_for(floor, one, rows)
    timings, floors = interleave(
        dense, cases, rounds=rounds, most_seconds=most_seconds, after_round=after_round
    )
    balanced = timings["balanced"].ratio if "balanced" in timings else None
    return [
        {
            "implementation": name,
            "default": name == default,
            "ratio": round(timing.ratio, 4),
            "spread": [round(s, 4) for s in timing.spread],
            "ratio_balanced": None if balanced is None else round(timing.ratio / balanced, 4),
            "ms": round(1e3 * timing.median_seconds, 3),
            "floor_ms": round(1e3 * sorted(floors)[len(floors) // 2], 3),
            "rounds": len(timing.ratios),
            **details[name],
        }
        for name, timing in timings.items()
    ] + failed


def _both(step: Callable[..., Array]) -> Callable[..., Any]:
    def both(params: Params, rows: Array) -> Any:
        def total(params: Params, rows: Array) -> Array:
            return step(params, rows).astype(jnp.float32).sum()

        return jax.grad(total, argnums=(0, 1))(params, rows)

    return both


def _mb(size: int | None) -> float | None:
    return None if size is None else round(size / 1e6, 1)
