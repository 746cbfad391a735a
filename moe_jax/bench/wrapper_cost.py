"""Measures what the engine adds to the bare jitted route: without a cache, on a hit, on a miss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moe_jax.bench.measure import interleave
from moe_jax.config import load_config
from moe_jax.serving.engine import RouterEngine
from moe_jax.serving.engine.buckets import route_tokens


def bench_wrapper(
    *,
    batch: int = 4,
    sequence: int = 128,
    d_model: int = 768,
    rounds: int = 30,
    progress: Callable[[str], None] = lambda label: None,
) -> list[dict[str, Any]]:
    """Returns one row for each case: its ratio to the bare jitted route of the same f32[B, S, D].

    The floor is the very function that the engine serves, under a plain ``jax.jit``, from a numpy
    array to numpy arrays on the host, for the outputs that the engine answers with: logits cost a
    fetch, and nobody asked for them.
    """
    settings: dict[str, Any] = {
        "input_dim": d_model,
        "max_experts": 3,
        "buckets": str(batch * sequence),
        "log_level": "ERROR",
        "serve_moe": "off",
    }
    progress("compiling")
    x = np.random.default_rng(0).standard_normal((batch, sequence, d_model)).astype(np.float32)
    fresh = x.copy()
    with (
        RouterEngine(load_config(env={}, enable_caching=False, **settings)) as plain,
        RouterEngine(load_config(env={}, **settings)) as caching,
    ):
        buckets = plain.snapshot.models["router"]
        route = functools.partial(route_tokens, buckets.program.router, buckets.program.by_logit)

        @jax.jit
        def bare(*args: Any) -> dict[str, jax.Array]:
            return {name: v for name, v in route(*args).items() if name != "router_logits"}

        mask = np.ones(batch * sequence, bool)

        def floor() -> Any:
            return jax.device_get(bare(buckets.params, buckets.state, x.reshape(-1, d_model), mask))

        def miss() -> Any:
            fresh[0, 0, 0] += 1.0  # another content, and so another digest
            return caching.infer("router", fresh).arrays

        cases: dict[str, Callable[[], Any]] = {
            "no cache": lambda: plain.infer("router", x).arrays,
            "no cache, route()": lambda: plain.route(x)["expert_indices"],
            "hit": lambda: caching.infer("router", x).arrays,
            "hit, route()": lambda: caching.route(x)["expert_indices"],
            "miss": miss,
        }
        progress("measuring")
        timings, floors = interleave(floor, cases, rounds=rounds)
        digest = caching.infer("router", x).info["digest"]
        by_digest, _ = interleave(
            floor, {"lookup by digest": lambda: _found(caching, digest)}, rounds=rounds
        )
    rows = []
    for name, timing in {**timings, **by_digest}.items():
        rows.append(
            {
                "case": name,
                "shape": f"{batch}x{sequence}x{d_model}",
                "ratio": round(timing.ratio, 3),
                "spread": [round(s, 3) for s in timing.spread],
                "ms": round(1e3 * timing.median_seconds, 3),
                "floor_ms": round(1e3 * sorted(floors)[len(floors) // 2], 3),
            }
        )
    return rows


def _found(engine: RouterEngine, digest: str) -> Any:
    result = engine.lookup("router", digest)
    assert result is not None
    return result.arrays
