"""Measures a few tokens at a time, where the floor is reading the active experts' weights once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.bench.layer_cost import experts_step
from moe_jax.bench.measure import interleave
from moe_jax.bench.workload import DTYPES, random_array, sample_routing
from moe_jax.experts import FeedForward, choose
from moe_jax.routing.dispatch import plan_dispatch, to_assignments

_FLOOR_ROW = 16384  # numbers summed at a time by the floor


def bench_decode(
    *,
    tokens: Sequence[int],
    experts: int,
    k: int,
    d_model: int,
    d_ff: int,
    dtype: str = "f32",
    activation: str = "gelu_tanh",
    gated: bool = False,
    implementations: Sequence[str] = (),
    rounds: int = 30,
    progress: Callable[[str], None] = lambda label: None,
) -> list[dict[str, Any]]:
    """Returns one row for each token count and implementation.

    The byte floor is float32 sums over the rows of a contiguous array of as many bytes as the
    weights of the distinct active experts: it reads every byte once, on all cores, and does nothing
    else. (Of the ways tried the fastest; one sum over everything runs on one core.) Turns rotate so
    that both read memory and not caches: routings use other experts from turn to turn, and the
    floor's blocks are together about as large as all experts.
    """
    rows = []
    expert_fn = FeedForward(activation=activation, gated=gated)
    params = expert_fn.init(jax.random.key(0), num_experts=experts, d_model=d_model, d_ff=d_ff)
    params = jax.tree.map(lambda p: p.astype(DTYPES[dtype]), params)
    expert_bytes = sum(p.nbytes for p in jax.tree.leaves(params)) // experts
    for t in tokens:
        progress(f"T={t}")
        x = random_array((t, d_model), dtype, 1)
        routings = [
            sample_routing(tokens=t, experts=experts, k=k, load="uniform", seed=s)
            for s in range(max(8, experts // (k * t)))
        ]
        active = [len(np.unique(np.asarray(r.expert_indices))) for r in routings]
        block_rows = max(1, round(float(np.mean(active)) * expert_bytes / (4 * _FLOOR_ROW)))
        read_bytes = block_rows * 4 * _FLOOR_ROW
        blocks = [
            random_array((block_rows, _FLOOR_ROW), "f32", 10 + s)
            for s in range(max(2, round(experts * expert_bytes / read_bytes)))
        ]
        read = jax.jit(lambda block: block.sum(axis=1))
        # The floor reads whole rows of numbers, so a little more or less than the experts hold.
        scale = float(np.mean(active)) * expert_bytes / read_bytes
        default = choose(plan_dispatch(to_assignments(routings[0])), expert_fn=expert_fn).name
        cases: dict[str, Callable[[], Any]] = {}
        for name in dict.fromkeys((default, *implementations)):
            step = jax.jit(
                experts_step(expert_fn, implementation=None if name == default else name)
            )
            cases[name] = Rotating(functools.partial(step, params, x), routings)
        timings, floors = interleave(Rotating(read, blocks), cases, rounds=rounds)
        floor_ms = 1e3 * sorted(floors)[len(floors) // 2] * scale
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
                    "floor_ms": round(floor_ms, 3),
                    "floor_gb_per_s": round(
                        float(np.mean(active)) * expert_bytes / floor_ms / 1e6, 2
                    ),
                }
            )
    return rows


class Rotating:
    """Calls a function with the next of several inputs each time."""

    def __init__(self, function: Callable[[Any], Any], inputs: Sequence[Any]) -> None:
        self._function, self._inputs, self._turn = function, inputs, 0

    def __call__(self) -> Any:
        self._turn += 1
        return self._function(self._inputs[self._turn % len(self._inputs)])
