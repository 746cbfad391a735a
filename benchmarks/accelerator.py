"""bf16 expert layers of published shapes on one accelerator, against its own dense product rate.

    python benchmarks/accelerator.py --out benchmarks/results/h100.json --seconds 540

Made for one call of at most ten minutes on a lent machine: cases run in the order of interest, results
are written after every case, and no case starts after ``--seconds``. For each of OLMoE, Mixtral and
DeepSeek-V3 (one device's share, 32 experts): the rate of one large dense product in the same rounds,
the default, ``ragged``, ``tiered`` and the bare grouped products of tokamax and XLA, forward and
backward, with a uniform and a skewed load; then dynamic k at a mean of 1.3 of 2 and 5.2 of 8, and
decoding at T = 1, 8 and 64. Rates are useful operations (rows that carry an assignment) over time;
``share`` is the rate over the card's own dense rate. A case that fails is a row with its error, and the
exit code is 1. Refuses to run on a CPU unless ``--small`` asks
for a trial with toy shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.bench.layer_cost import experts_step, with_gradients
from moe_jax.bench.measure import interleave, write_results
from moe_jax.bench.script_options import at_least, file_to_write
from moe_jax.bench.workload import sample_routing
from moe_jax.experts import FeedForward
from moe_jax.parallel.target_layers import LAYERS, LayerShape
from moe_jax.routing.dispatch import plan_dispatch, to_assignments

FFN = FeedForward(activation="silu", gated=True)
IMPLEMENTATIONS_TIMED = (None, "ragged", "tiered")  # None is the default
LOADS = ("uniform", "zipf")
# Mean experts per token, of k: what a budget of dynamic k saves.
MEAN_K = {"mixtral": 1.3, "olmoe": 5.2, "small": 1.3}
DECODE = (1, 8, 64)


def draw_params(shape: LayerShape) -> Any:
    sizes = {
        "gate": (shape.num_experts, shape.d_model, shape.d_ff),
        "up": (shape.num_experts, shape.d_model, shape.d_ff),
        "down": (shape.num_experts, shape.d_ff, shape.d_model),
    }
    draw = jax.jit(
        lambda key, size: (jax.random.normal(key, size, jnp.bfloat16) / size[1] ** 0.5).astype(
            jnp.bfloat16
        ),
        static_argnums=1,
    )
    keys = jax.random.split(jax.random.key(0), 3)
    return {name: draw(key, size) for (name, size), key in zip(sizes.items(), keys, strict=True)}


def ragged_pair(params: Any, rows: jax.Array, group_sizes: jax.Array, ragged: Callable) -> Any:
    """The gated feed-forward of sorted rows by grouped products alone: no sort, no combine."""
    hidden = jax.nn.silu(ragged(rows, params["gate"], group_sizes))
    hidden = hidden * ragged(rows, params["up"], group_sizes)
    return ragged(hidden.astype(rows.dtype), params["down"], group_sizes)


def tokamax_ragged() -> Callable | None:
    try:
        import tokamax  # pyright: ignore[reportMissingImports]
        from absl import flags
    except ImportError:
        return None
    # Otherwise tokamax parses this script's command line for its settings and fails.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return tokamax.ragged_dot


def layer_cases(params: Any, x: jax.Array, routing: Any) -> dict[str, Callable[[], Any]]:
    """Every way of running the experts of one batch, forward and with its gradient."""
    cases: dict[str, Callable[[], Any]] = {}
    for name in IMPLEMENTATIONS_TIMED:
        step = experts_step(FFN, implementation=name)
        cases[name or "default"] = functools.partial(jax.jit(step), params, x, routing)
        both = jax.jit(with_gradients(step))
        cases[f"{name or 'default'} bwd"] = functools.partial(both, params, x, routing)
    plan = plan_dispatch(to_assignments(routing))
    rows = x[plan.assignments.token_indices[plan.order]]
    for label, ragged in (("tokamax", tokamax_ragged()), ("lax.ragged_dot", jax.lax.ragged_dot)):
        if ragged is not None:
            pair = jax.jit(functools.partial(ragged_pair, ragged=ragged))
            cases[f"{label} alone"] = functools.partial(pair, params, rows, plan.group_sizes)
    return cases


def fewer(routing: Any, mean: float) -> Any:
    """The routing with ``mean`` experts per token: the last slots of some tokens are left unused."""
    tokens, k = routing.expert_indices.shape
    whole = int(mean)
    more = jax.random.uniform(jax.random.key(3), (tokens, 1)) < mean - whole
    used = jnp.arange(k)[None, :] < whole + more.astype(jnp.int32)
    return dataclasses.replace(
        routing,
        expert_indices=jnp.where(used, routing.expert_indices, routing.num_experts),
        combine_weights=jnp.where(used, routing.combine_weights, 0.0),
    )


class Run:
    """The rows of one run, written after every case, until its time is over."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows = args, []
        self.end = time.monotonic() + args.seconds
        side = 256 if args.small else 8192
        square = jax.random.normal(jax.random.key(2), (side, side), jnp.bfloat16)
        self.dense = functools.partial(jax.jit(lambda a: a @ a), square)
        self.dense_flops = 2.0 * side**3

    def time_case(self, label: str, thunk: Callable[[], Any], flops: float, **about: Any) -> None:
        if time.monotonic() > self.end:
            self.keep({"case": label, **about, "skipped": "the time was over"})
            return
        try:
            jax.block_until_ready(thunk())
        except Exception as error:
            row = {"case": label, **about, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
        else:
            timings, floors = interleave(self.dense, {label: thunk}, rounds=self.args.rounds)
            seconds = timings[label].median_seconds
            rate = self.dense_flops / statistics.median(floors)
            row = {
                "case": label,
                **about,
                "ms": round(1e3 * seconds, 4),
                "tflops": round(flops / seconds / 1e12, 3),
                "dense_tflops": round(rate / 1e12, 3),
                "share": round(flops / seconds / rate, 4),
            }
        self.keep(row)

    def keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(row, flush=True)
        settings = {key: str(value) for key, value in vars(self.args).items()}
        settings["device"] = jax.devices()[0].device_kind
        write_results(self.args.out, bench="accelerator", settings=settings, rows=self.rows)


def measure(run: Run, name: str, shape: LayerShape) -> None:
    params = draw_params(shape)
    key = jax.random.key(1)
    x = jax.random.normal(key, (shape.tokens, shape.d_model), jnp.bfloat16)
    sizes = {"experts": shape.num_experts, "k": shape.k}
    for load in LOADS:
        routing = sample_routing(tokens=shape.tokens, load=load, **sizes)
        for label, thunk in layer_cases(params, x, routing).items():
            passes = 3 if label.endswith("bwd") else 1  # gradients of rows and of weights
            run.time_case(label, thunk, passes * shape.flops, shape=name, load=load)
    if name in MEAN_K:
        part = fewer(sample_routing(tokens=shape.tokens, load="uniform", **sizes), MEAN_K[name])
        useful = shape.flops * MEAN_K[name] / shape.k
        step = functools.partial(jax.jit(experts_step(FFN, implementation=None)), params, x, part)
        run.time_case("default, dynamic k", step, useful, shape=name, mean_k=MEAN_K[name])
    for tokens in DECODE:
        routing = sample_routing(tokens=tokens, load="uniform", **sizes)
        step = jax.jit(experts_step(FFN, implementation=None))
        few = functools.partial(step, params, x[:tokens], routing)
        flops = shape.flops * tokens / shape.tokens
        run.time_case("default, decode", few, flops, shape=name, tokens=tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=file_to_write, required=True)
    parser.add_argument("--rounds", type=at_least(1), default=10)
    parser.add_argument(
        "--seconds", type=at_least(0.0), default=540.0, help="no case starts after this"
    )
    parser.add_argument("--only", choices=sorted(LAYERS))
    parser.add_argument("--small", action="store_true", help="toy shapes, any backend")
    args = parser.parse_args()
    if jax.default_backend() == "cpu" and not args.small:
        sys.exit(
            "accelerator.py: expected an accelerator, got a CPU, where these shapes take hours. "
            "Run it on a GPU or TPU, or pass --small to try the script."
        )
    names = [args.only] if args.only else ["olmoe", "mixtral", "deepseek_v3"]
    run = Run(args)
    for name in ["small"] if args.small else names:
        measure(run, name, LAYERS[name])
    failed = sum("failed" in row for row in run.rows)
    if failed:
        sys.exit(f"accelerator.py: {failed} of {len(run.rows)} cases failed; see the rows above.")


if __name__ == "__main__":
    main()
