"""Measures routing alone, against its own logits product and top-k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from moe_jax.bench.measure import interleave
from moe_jax.bench.workload import random_array
from moe_jax.routers import DynamicK, ExpertThreshold, MinP, Router, TopK, TopP
from moe_jax.types import Routing

# Estimators that need only x and the router's logits, beside the default of DynamicK.
_ESTIMATORS = ("router_margin", "activation_norm", "large_activation_share")


def bench_route(
    *,
    tokens: int,
    d_model: int,
    experts: int,
    k: int,
    rounds: int = 30,
    progress: Callable[[str], None] = lambda label: None,
) -> list[dict[str, Any]]:
    """Returns one row for each rule and each difficulty estimator that needs only x.

    ``ratio`` is to ``top_k(x @ kernel)`` with the same K.
    """
    rows = []
    x = random_array((tokens, d_model), "f32", 1)
    rules: dict[str, Router] = {
        "TopK": TopK(num_experts=experts, k=k),
        "DynamicK": DynamicK(num_experts=experts, min_k=1, max_k=k),
        **{
            f"DynamicK, {name}": DynamicK(num_experts=experts, min_k=1, max_k=k, difficulty=name)
            for name in _ESTIMATORS
        },
        "TopP": TopP(num_experts=experts, max_k=k),
        "MinP": MinP(num_experts=experts, max_k=k),
        "ExpertThreshold": ExpertThreshold(num_experts=experts, target_k=k / 2, max_k=k),
    }
    params = rules["TopK"].init(jax.random.key(0), d_model)
    floor = jax.jit(
        lambda x: jax.lax.top_k(
            jax.numpy.matmul(x, params["kernel"], precision=jax.lax.Precision.HIGHEST), k
        )
    )
    cases: dict[str, Callable[[], Any]] = {}
    for name, router in rules.items():
        progress(name)

        def decide(state, x, router=router):
            routing = router(params, state, x)
            assert isinstance(routing, Routing)
            return routing.expert_indices, routing.combine_weights

        step, state = jax.jit(decide), router.init_state()
        cases[name] = lambda f=step, s=state: f(s, x)
    timings, floors = interleave(lambda: floor(x), cases, rounds=rounds)
    for name, timing in timings.items():
        rows.append(
            {
                "rule": name,
                "tokens": tokens,
                "d_model": d_model,
                "experts": experts,
                "k": k,
                "ratio": round(timing.ratio, 4),
                "spread": [round(s, 4) for s in timing.spread],
                "ms": round(1e3 * timing.median_seconds, 3),
                "floor_ms": round(1e3 * sorted(floors)[len(floors) // 2], 3),
                "tokens_per_second": round(tokens / timing.median_seconds),
            }
        )
    return rows
