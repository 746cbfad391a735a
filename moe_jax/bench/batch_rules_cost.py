"""Measures a decoding step under rules that look at the batch: distinct experts, bytes, time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.bench.decode_cost import Rotating
from moe_jax.bench.layer_cost import experts_step
from moe_jax.bench.measure import interleave
from moe_jax.bench.workload import DTYPES, random_array
from moe_jax.experts import FeedForward
from moe_jax.routers import Piggyback, Router, SharedBudget, TopK

COLUMNS = [
    "rule",
    "tokens",
    "mean_k",
    "distinct_experts",
    "fewer_bytes",
    "mb_read",
    "ratio",
    "ms",
    "top_k_ms",
    "time_per_byte",
]


def batch_rules(experts: int, k: int, tokens: int) -> dict[str, Router]:
    """Rules to compare with top-k for a decoding step of so many tokens."""
    half = max(1, k // 2)
    full = min(experts, round(experts * (1 - (1 - k / experts) ** tokens)))
    return {
        f"top {half}": TopK(num_experts=experts, k=half),
        f"piggyback, keep {half}": Piggyback(
            num_experts=experts, k=k, keep_k=half, max_tokens=tokens
        ),
        "piggyback, keep 1": Piggyback(num_experts=experts, k=k, keep_k=1, max_tokens=tokens),
        "shared budget, 70 %": SharedBudget(
            num_experts=experts, k=k, max_distinct=max(1, round(0.7 * full)), max_tokens=tokens
        ),
    }


def bench_batch_rules(
    *,
    tokens: Sequence[int],
    experts: int,
    k: int,
    d_model: int,
    d_ff: int,
    dtype: str = "f32",
    gated: bool = False,
    rounds: int = 30,
    progress: Callable[[str], None] = lambda label: None,
) -> list[dict[str, Any]]:
    """Returns a row for each token count and rule; the floor of each row is top-k on the same tokens.

    Tokens and the router's kernel are random, so experts are nearly equally popular: the hardest case
    for a rule that shares experts. ``time_per_byte`` is the share of the saved bytes that became saved
    time: 1 is all of it.
    """
    expert_fn = FeedForward(gated=gated)
    params = expert_fn.init(jax.random.key(0), num_experts=experts, d_model=d_model, d_ff=d_ff)
    params = jax.tree.map(lambda p: p.astype(DTYPES[dtype]), params)
    expert_bytes = sum(p.nbytes for p in jax.tree.leaves(params)) // experts
    gate = {"kernel": random_array((d_model, experts), "f32", 2) / d_model**0.5}
    step = jax.jit(experts_step(expert_fn, implementation=None))
    rows = []
    for t in tokens:
        progress(f"T={t}")
        xs = [random_array((t, d_model), dtype, 10 + s) for s in range(8)]
        whole = TopK(num_experts=experts, k=k)
        routings = {
            name: [jax.jit(rule)(gate, rule.init_state(), x) for x in xs]
            for name, rule in {"": whole, **batch_rules(experts, k, t)}.items()
        }
        distinct = {name: _distinct(each) for name, each in routings.items()}
        cases = {
            name: Rotating(functools.partial(step, params, xs[0]), each)
            for name, each in routings.items()
        }
        timings, floors = interleave(cases.pop(""), cases, rounds=rounds)
        floor_ms = 1e3 * float(np.median(floors))
        for name, timing in timings.items():
            fewer = 1.0 - distinct[name] / distinct[""]
            rows.append(
                {
                    "rule": name,
                    "tokens": t,
                    "mean_k": float(
                        np.mean([r.num_experts_per_token.mean() for r in routings[name]])
                    ),
                    "distinct_experts": distinct[name],
                    "fewer_bytes": round(fewer, 4),
                    "mb_read": round(distinct[name] * expert_bytes / 1e6, 2),
                    "ratio": round(timing.ratio, 4),
                    "spread": [round(s, 4) for s in timing.spread],
                    "ms": round(1e3 * timing.median_seconds, 3),
                    "top_k_ms": round(floor_ms, 3),
                    "time_per_byte": round((1.0 - timing.ratio) / fewer, 3) if fewer > 0 else None,
                }
            )
    return rows


def _distinct(routings: Sequence[Any]) -> float:
    return float(np.mean([np.asarray(jnp.any(r.expert_mask, axis=0)).sum() for r in routings]))
