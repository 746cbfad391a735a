"""Measures whether fewer experts per token cost less time, not only fewer operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.bench.layer_cost import experts_step, with_gradients
from moe_jax.bench.measure import interleave
from moe_jax.bench.workload import random_array, sample_routing
from moe_jax.experts import FeedForward, choose
from moe_jax.routing.dispatch import plan_dispatch, to_assignments
from moe_jax.routing.row_budget import row_budget


def bench_dynamic(
    *,
    tokens: int,
    d_model: int,
    d_ff: int,
    experts: int,
    k: int,
    mean_ks: Sequence[float],
    load: str = "uniform",
    backward: bool = False,
    activation: str = "gelu_tanh",
    rounds: int = 10,
    progress: Callable[[str], None] = lambda label: None,
) -> list[dict[str, Any]]:
    """Times the layer at each mean k against the same layer with every token at k, in turns.

    Two ways each: ``tiers`` (the default implementation as it is) and ``row budget``
    (``max_rows`` from ``row_budget`` at an overflow probability of 0.1 %).

    Returns:
        Rows of {way, mean_k, time_fall, flops_fall, share, ...}; ``share`` is the part of the fall
        in operations that became a fall in time.

    Raises:
        ValueError: so few tokens that their mean rounds to k, and nothing falls.
    """
    expert_fn = FeedForward(activation=activation)
    params = expert_fn.init(jax.random.key(0), num_experts=experts, d_model=d_model, d_ff=d_ff)
    x = random_array((tokens, d_model), "f32", 1)

    def case(mean_k: float | None, max_rows: int | None) -> Callable[[], Any]:
        routing = sample_routing(tokens=tokens, experts=experts, k=k, load=load, mean_k=mean_k)
        step = experts_step(expert_fn, implementation=None, max_rows=max_rows)
        compiled = jax.jit(with_gradients(step) if backward else step)
        return functools.partial(compiled, params, x, routing)

    cases: dict[str, Callable[[], Any]] = {}
    about: dict[str, dict[str, Any]] = {}
    for mean_k in mean_ks:
        routing = sample_routing(tokens=tokens, experts=experts, k=k, load=load, mean_k=mean_k)
        counts = np.asarray(routing.num_experts_per_token)
        if counts.sum() == tokens * k:
            raise ValueError(
                f"tokens, mean_k: expected enough tokens for some to have fewer than k={k} experts, "
                f"got {tokens} at a mean of {mean_k:g}, which rounds to k for each. "
                "Raise --tokens, or lower --mean-k."
            )
        histogram = np.bincount(counts, minlength=k + 1) / counts.size
        budget = row_budget(histogram, num_tokens=tokens)
        for way, max_rows in (("tiers", None), ("row budget", budget)):
            name = f"{way} {mean_k}"
            progress(name)
            plan = plan_dispatch(to_assignments(routing), max_rows=max_rows)
            cases[name] = case(mean_k, max_rows)
            about[name] = {
                "way": way,
                "implementation": choose(plan).name,
                "mean_k": float(counts.mean()),
                "max_rows": max_rows,
                "dropped": 1.0 - float(plan.group_sizes.sum()) / float(counts.sum()),
                "slots_executed": float(choose(plan).slots_executed(plan)),
            }
    timings, _ = interleave(case(None, None), cases, rounds=rounds)
    rows = []
    for name, timing in timings.items():
        flops_fall = 1.0 - about[name]["mean_k"] / k
        fall = 1.0 - timing.ratio
        rows.append(
            {
                **about[name],
                "k": k,
                "tokens": tokens,
                "experts": experts,
                "load": load,
                "pass": "bwd" if backward else "fwd",
                "flops_fall": round(flops_fall, 4),
                "time_fall": round(fall, 4),
                "share": round(fall / flops_fall, 4),
                "spread": [round((1 - s) / flops_fall, 4) for s in reversed(timing.spread)],
                "ms": round(1e3 * timing.median_seconds, 3),
            }
        )
    return rows
