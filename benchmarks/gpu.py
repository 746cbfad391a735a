"""bf16 expert layers of published shapes on one accelerator, against its own dense product rate.

    python benchmarks/gpu.py --out benchmarks/results/h100.json [--tokens 8192] [--only mixtral]

For each shape: the rate of one large dense product in the same run, then every implementation that
runs here, ``jax.lax.ragged_dot`` as XLA lowers it, and tokamax's where that is installed. Rates are
useful operations (rows that carry an assignment) over time; ``share`` is the rate over the card's own
dense rate. Refuses to run on a CPU unless ``--small`` asks for a trial with toy shapes.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.bench.layer_cost import experts_step, with_gradients
from moe_jax.bench.measure import interleave, write_results
from moe_jax.bench.workload import sample_routing
from moe_jax.experts import IMPLEMENTATIONS, FeedForward
from moe_jax.routing.dispatch import plan_dispatch, to_assignments

SHAPES = {  # d_model, d_ff, experts, k
    "mixtral": (4096, 14336, 8, 2),
    "deepseek_v3": (7168, 2048, 256, 8),
}
SMALL = {"small": (64, 128, 8, 2)}


def ragged_pair(params: Any, rows: jax.Array, group_sizes: jax.Array, ragged: Callable) -> Any:
    """The gated feed-forward of sorted rows by grouped products alone: no sort, no combine."""
    hidden = jax.nn.silu(ragged(rows, params["gate"], group_sizes))
    hidden = hidden * ragged(rows, params["up"], group_sizes)
    return ragged(hidden.astype(rows.dtype), params["down"], group_sizes)


def tokamax_ragged() -> Callable | None:
    try:
        import tokamax  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return tokamax.ragged_dot


def measure(name: str, shape: tuple[int, int, int, int], tokens: int, rounds: int, load: str):
    d_model, d_ff, experts, k = shape
    ffn = FeedForward(activation="silu", gated=True)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        n: (jax.random.normal(key, s, jnp.bfloat16) / s[1] ** 0.5).astype(jnp.bfloat16)
        for n, key, s in zip(
            ("gate", "up", "down"),
            keys,
            [(experts, d_model, d_ff)] * 2 + [(experts, d_ff, d_model)],
            strict=True,
        )
    }
    x = jax.random.normal(jax.random.key(1), (tokens, d_model), jnp.bfloat16)
    routing = sample_routing(tokens=tokens, experts=experts, k=k, load=load)
    plan = plan_dispatch(to_assignments(routing))
    side = min(8192, 64 * d_model)
    square = jax.random.normal(jax.random.key(2), (side, side), jnp.bfloat16)
    dense = jax.jit(lambda a: a @ a)

    cases: dict[str, Callable[[], Any]] = {}
    for implementation in IMPLEMENTATIONS:
        if implementation in ("dense", "capacity"):
            continue
        step = experts_step(ffn, implementation=implementation)
        cases[implementation] = functools.partial(jax.jit(step), params, x, routing)
        cases[f"{implementation} bwd"] = functools.partial(
            jax.jit(with_gradients(step)), params, x, routing
        )
    rows = x[plan.assignments.token_indices[plan.order]]
    grouped = {"lax.ragged_dot": jax.lax.ragged_dot, "tokamax.ragged_dot": tokamax_ragged()}
    for label, ragged in grouped.items():
        if ragged is not None:
            pair = jax.jit(functools.partial(ragged_pair, ragged=ragged))
            cases[label] = functools.partial(pair, params, rows, plan.group_sizes)
    runnable, failed = {}, {}
    for label, thunk in cases.items():
        try:
            jax.block_until_ready(thunk())
            runnable[label] = thunk
        except Exception as error:
            failed[label] = f"{type(error).__name__}: {str(error)[:200]}"
    timings, floors = interleave(functools.partial(dense, square), runnable, rounds=rounds)
    rate = 2 * side**3 / sorted(floors)[len(floors) // 2]
    useful = tokens * k * ffn.flops_per_row(d_model, d_ff)
    out = []
    for label, timing in timings.items():
        passes = 3 if label.endswith("bwd") else 1  # gradients of rows and of weights
        achieved = passes * useful / timing.median_seconds
        out.append(
            {
                "shape": name,
                "tokens": tokens,
                "load": load,
                "case": label,
                "ms": round(1e3 * timing.median_seconds, 3),
                "tflops": round(achieved / 1e12, 2),
                "dense_tflops": round(rate / 1e12, 2),
                "share": round(achieved / rate, 4),
            }
        )
    return out + [
        {"shape": name, "tokens": tokens, "load": load, "case": label, "failed": why}
        for label, why in failed.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", choices=sorted(SHAPES))
    parser.add_argument("--small", action="store_true", help="toy shapes, any backend")
    args = parser.parse_args()
    if jax.default_backend() == "cpu" and not args.small:
        sys.exit(
            "gpu.py: expected an accelerator, got a CPU, where these shapes take hours. "
            "Run it on a GPU or TPU, or pass --small to try the script."
        )
    shapes = SMALL if args.small else SHAPES
    if args.only:
        shapes = {args.only: SHAPES[args.only]}
    rows = []
    for name, shape in shapes.items():
        for load in ("uniform", "zipf"):
            print(f"{name} {load} ...", file=sys.stderr)
            rows += measure(name, shape, args.tokens, args.rounds, load)
    write_results(args.out, bench="gpu", settings=vars(args) | {"out": str(args.out)}, rows=rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
