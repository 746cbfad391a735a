"""Experts with 8-bit kernels beside float ones: decoding here, memory on absent accelerators.

    python benchmarks/quantized.py decode [--rounds 100]
    python benchmarks/quantized.py compile --target v5e:2x4 --layer olmoe

``decode`` times one token through ``active`` with float kernels and with 8-bit ones in alternate turns,
and prints the time over that of the float kernels. ``compile`` prints what a target's compiler says of
the forward pass of one layer.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.bench.decode_cost import Rotating
from moe_jax.bench.layer_cost import experts_step
from moe_jax.bench.measure import interleave
from moe_jax.bench.script_options import at_least
from moe_jax.bench.workload import DTYPES, random_array, sample_routing
from moe_jax.experts import FeedForward, quantize_experts, run_experts
from moe_jax.experts.feed_forward import QUANTIZED_DTYPES
from moe_jax.parallel.target_layers import LAYERS, plan_shapes
from moe_jax.parallel.targets import Target, bfloat16_shapes, compile_program, open_target
from moe_jax.types import Params

FLOAT = FeedForward(activation="silu", gated=True)
EXPERTS, K, D_MODEL, D_FF = 32, 2, 1024, 2048


def quantized(params: Params, dtype: str) -> tuple[FeedForward, Params]:
    """The expert and its parameters in 8 bits."""
    small = jax.jit(functools.partial(quantize_experts, dtype=dtype))(params)
    return dataclasses.replace(FLOAT, quantized=dtype), small


def decode(rounds: int) -> None:
    """Prints a line for each dtype of the rows and of the kernels."""
    init = functools.partial(FLOAT.init, num_experts=EXPERTS, d_model=D_MODEL, d_ff=D_FF)
    params = jax.jit(init)(jax.random.key(0))
    routings = [
        sample_routing(tokens=1, experts=EXPERTS, k=K, load="uniform", seed=s) for s in range(16)
    ]
    print(
        f"{EXPERTS} experts, k={K}, {D_MODEL} -> {D_FF}, one token; load {os.getloadavg()[0]:.1f}"
    )
    for rows in ("f32", "bf16"):
        x = random_array((1, D_MODEL), rows, 1)
        cast = jax.tree.map(lambda p, rows=rows: p.astype(DTYPES[rows]), params)
        kinds = {rows: (FLOAT, cast), **{d: quantized(params, d) for d in QUANTIZED_DTYPES}}
        cases = {}
        for name, (expert_fn, weights) in kinds.items():
            step = jax.jit(experts_step(expert_fn, implementation="active"))
            cases[name] = Rotating(functools.partial(step, weights, x), routings)
        timings, floors = interleave(cases.pop(rows), cases, rounds=rounds)
        read = {n: K * sum(p.nbytes for p in w.values()) / EXPERTS for n, (_, w) in kinds.items()}
        float_ms = 1e3 * sorted(floors)[len(floors) // 2]
        print(f"{rows} rows, {rows} kernels: {read[rows] / 1e6:.1f} MB, {float_ms:.2f} ms")
        for name, timing in timings.items():
            low, high = timing.spread
            print(
                f"{rows} rows, {name} kernels: {read[name] / 1e6:.1f} MB, "
                f"{1e3 * timing.median_seconds:.2f} ms, ratio {timing.ratio:.2f} "
                f"(middle half {low:.2f}-{high:.2f})"
            )
    print(f"load {os.getloadavg()[0]:.1f}")


def compile_layer(target: Target, layer: str) -> None:
    """Prints the memory of one layer's forward pass for each dtype of the kernels."""
    shape = LAYERS[layer]
    init = functools.partial(
        FLOAT.init, num_experts=shape.num_experts, d_model=shape.d_model, d_ff=shape.d_ff
    )
    params = jax.eval_shape(init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((shape.tokens, shape.d_model), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((shape.rows,), jnp.float32)
    kinds = {"bfloat16": (FLOAT, bfloat16_shapes(params))}
    for dtype in QUANTIZED_DTYPES:
        small = jax.eval_shape(functools.partial(quantize_experts, dtype=dtype), params)
        kinds[dtype] = dataclasses.replace(FLOAT, quantized=dtype), small
    for name, (expert_fn, arguments) in kinds.items():

        def forward(
            params: Any, x: Any, weights: Any, plan: Any, expert_fn: Any = expert_fn
        ) -> Any:
            return run_experts(expert_fn, params, x, plan, weights).y

        program = compile_program(
            target,
            forward,
            (arguments, x, weights, plan_shapes(shape)),
            what=layer,
            gradient=False,
            implementation="default",
            useful_flops=shape.flops,
        )
        print(
            f"{target.name} {layer}, {name} kernels: arguments {program.argument_bytes / 1e6:,.1f} MB, "
            f"temporary {program.temp_bytes / 1e6:,.1f} MB, kernels {program.kernels}"
            f"{f', {program.error}' if program.error else ''}"
        )


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("decode").add_argument("--rounds", type=at_least(1), default=100)
    compiler = commands.add_parser("compile")
    compiler.add_argument("--target", default="v5e:2x4")
    compiler.add_argument("--layer", default="olmoe", choices=sorted(LAYERS))
    arguments = parser.parse_args()
    if arguments.command == "decode":
        decode(arguments.rounds)
    else:
        try:
            target = open_target(arguments.target)
        except ValueError as error:
            compiler.error(f"--target: {error}")
        compile_layer(target, arguments.layer)


if __name__ == "__main__":
    main()
