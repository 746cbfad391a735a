"""Measures throughput and latency by batch size, and recommends a range for this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax

from moe_jax.bench.measure import interleave
from moe_jax.bench.workload import random_array
from moe_jax.experts import FeedForward
from moe_jax.layer import init_moe_layer, moe_layer
from moe_jax.routers import TopK


def bench_batch(
    *,
    sizes: Sequence[int],
    sequence: int,
    d_model: int,
    d_ff: int,
    experts: int,
    k: int,
    training: bool = False,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda label: None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Throughput and latency of the whole layer by batch size; and a recommendation.

    Each ratio is to the first size in the same round, so ratios show drift-free how latency grows. The
    recommended range starts where throughput reaches 80 % of the best and ends where latency passes
    twice that of the first size in the range.
    """
    router, expert_fn = TopK(num_experts=experts, k=k), FeedForward(activation="silu", gated=True)
    params = init_moe_layer(router, expert_fn, jax.random.key(0), d_model=d_model, d_ff=d_ff)
    state = router.init_state()

    def forward(params, x):
        return moe_layer(router, expert_fn, params, state, x)[0]

    def backward(params, x):
        return jax.grad(lambda p: moe_layer(router, expert_fn, p, state, x)[0].sum())(params)

    step = jax.jit(backward if training else forward)
    cases: dict[str, Callable[[], Any]] = {}
    for size in sizes:
        x = random_array((size, sequence, d_model), "f32", size)
        cases[str(size)] = lambda x=x: step(params, x)
        progress(f"batch {size}")
    timings, _ = interleave(cases[str(sizes[0])], cases, rounds=rounds)
    # Not to the floors beside it: a small batch right after a large one finds the caches cold, and
    # the first size would be 0.8 of itself.
    first_seconds = timings[str(sizes[0])].seconds
    rows = []
    for size in sizes:
        timing = timings[str(size)]
        pairs = zip(timing.seconds, first_seconds, strict=True)
        ratio = statistics.median(taken / first for taken, first in pairs)
        rows.append(
            {
                "batch": size,
                "tokens": size * sequence,
                "ms": round(1e3 * timing.median_seconds, 3),
                "latency_ratio": round(ratio, 3),
                "tokens_per_second": round(size * sequence / timing.median_seconds),
                # From the ratio, so that drift between rounds cancels.
                "relative_throughput": round(size / sizes[0] / ratio, 4),
            }
        )
    best = max(r["relative_throughput"] for r in rows)
    good = [r for r in rows if r["relative_throughput"] >= 0.8 * best]
    first = good[0]
    within = [r["batch"] for r in good if r["ms"] <= 2 * first["ms"]]
    return rows, {
        "work": "training" if training else "inference",
        "from": first["batch"],
        "to": max(within),
        "latency_ms": first["ms"],
        "tokens_per_second": first["tokens_per_second"],
    }
