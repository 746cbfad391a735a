"""A few tokens at a time: the floor is reading the active experts' weights once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.bench.layer import experts_step
from moe_jax.bench.measure import interleave
from moe_jax.bench.workload import random_array, sample_routing
from moe_jax.dispatch import plan_dispatch, to_assignments
from moe_jax.experts import FeedForward, choose


def bench_decode(
    *,
    tokens: Sequence[int],
    experts: int,
    k: int,
    d_model: int,
    d_ff: int,
    dtype: str = "f32",
    activation: str = "gelu_tanh",
    implementations: Sequence[str] = (),
    rounds: int = 30,
    progress: Callable[[str], None] = lambda told: None,
) -> list[dict[str, Any]]:
    """One row a token count and implementation.

    The byte floor is a sum over a contiguous array as large as the weights of the distinct active
    experts, which reads every byte once and does nothing else. Weights are rotated through several
    copies larger than the caches together, for the floor and the layer alike.
    """
    rows = []
    ffn = FeedForward(activation=activation)
    params = ffn.init(jax.random.key(0), num_experts=experts, d_model=d_model, d_ff=d_ff)
    params = jax.tree.map(lambda p: p.astype(random_array((1,), dtype, 0).dtype), params)
    for t in tokens:
        progress(f"T={t}")
        x = random_array((t, d_model), dtype, 1)
        turns = 8
        routings = [
            sample_routing(tokens=t, experts=experts, k=k, load="uniform", seed=s)
            for s in range(turns)
        ]
        active = [len(np.unique(np.asarray(r.expert_indices))) for r in routings]
        flat = max(active) * 2 * d_model * d_ff
        blocks = [random_array((flat,), dtype, 10 + s) for s in range(3)]
        read = jax.jit(lambda block: block.sum(dtype=jnp.float32))
        default = choose(plan_dispatch(to_assignments(routings[0]))).name
        cases: dict[str, Callable[[], Any]] = {}
        for name in dict.fromkeys((default, *implementations)):
            step = jax.jit(experts_step(ffn, implementation=None if name == default else name))
            cases[name] = _Rotating(functools.partial(step, params, x), routings)
        timings, floors = interleave(_Rotating(read, blocks), cases, rounds=rounds)
        scale = float(np.mean(active)) / max(active)  # the floor reads for the largest case
        for name, timing in timings.items():
            rows.append(
                {
                    "implementation": name,
                    "default": name == default,
                    "tokens": t,
                    "experts": experts,
                    "k": k,
                    "d_model": d_model,
                    "d_ff": d_ff,
                    "dtype": dtype,
                    "active_experts": float(np.mean(active)),
                    "ratio": round(timing.ratio / scale, 4),
                    "spread": [round(s / scale, 4) for s in timing.spread],
                    "ms": round(1e3 * timing.median_seconds, 3),
                    "floor_ms": round(1e3 * sorted(floors)[len(floors) // 2] * scale, 3),
                }
            )
    return rows


class _Rotating:
    """Calls a function with the next of several inputs each time."""

    def __init__(self, function: Callable[[Any], Any], inputs: Sequence[Any]) -> None:
        self._function, self._inputs, self._turn = function, inputs, 0

    def __call__(self) -> Any:
        self._turn += 1
        return self._function(self._inputs[self._turn % len(self._inputs)])
