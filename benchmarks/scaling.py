"""Expert parallelism on host devices: the cost model against compiled programs, and weak scaling.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json

Every number of devices needs a JAX of its own, so the script starts itself again for each. The host
devices of one machine share its cores and its memory: what is *sent* and *held* is exact, and the
same as on as many real devices, while times are of threads that wait for each other. With W devices
on C cores, work that scales perfectly takes W / min(W, C) times as long as on one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from moe_jax.bench.script_options import at_least, file_to_write

D, F, K, TOKENS = 64, 128, 2, 256  # tokens of each device
CASES = (("capacity 1.25", 1.25, None), ("dropless, one size", None, (1.5,)))


def measure(devices: int, timed: bool, rounds: int) -> list[dict[str, Any]]:
    """In a process with so many host devices."""
    import jax
    import jax.numpy as jnp

    import moe_jax
    from moe_jax.parallel.collectives import collectives_of
    from moe_jax.parallel.planning import exchange_cost
    from moe_jax.parallel.sharded_layer import sharded_moe_layer
    from moe_jax.parallel.sharding import (
        jit_sharded,
        make_mesh,
        parallel_of,
        param_specs,
        shard,
        token_spec,
    )

    mesh = make_mesh(expert=devices)
    router, expert_fn = moe_jax.TopK(num_experts=2 * devices, k=K), moe_jax.FeedForward()

    def init(key: Any) -> Any:
        return moe_jax.init_moe_layer(router, expert_fn, key, d_model=D, d_ff=F)

    shapes = jax.eval_shape(init, jax.random.key(0))
    specs, rows = param_specs(shapes, mesh), token_spec(mesh)
    x = jax.ShapeDtypeStruct((devices * TOKENS, D), jnp.float32)
    results = []
    for name, factor, shares in CASES:
        options = {} if shares is None else {"send_shares": shares}
        parallel = parallel_of(mesh, **options)

        def forward(params: Any, x: Any, factor=factor, parallel=parallel) -> Any:
            state = router.init_state()
            return sharded_moe_layer(
                router,
                expert_fn,
                params,
                state,
                x,
                mesh=mesh,
                parallel=parallel,
                options=moe_jax.LayerOptions(capacity_factor=factor),
            )[0]

        def loss(params: Any, x: Any, forward=forward) -> Any:
            return jnp.square(forward(params, x)).sum()

        step = jit_sharded(
            jax.grad(loss, argnums=(0, 1)), mesh, in_specs=(specs, rows), out_specs=(specs, rows)
        )
        one_way = jit_sharded(forward, mesh, in_specs=(specs, rows), out_specs=rows)
        program, there = step.lower(shapes, x).compile(), one_way.lower(shapes, x).compile()
        both, ahead = collectives_of(program), collectives_of(there)
        memory, work = program.memory_analysis(), there.cost_analysis()
        entry: dict[str, Any] = {
            "devices": devices,
            "case": name,
            "all_to_alls": [
                t["all-to-all"].count if "all-to-all" in t else 0 for t in (ahead, both)
            ],
            "other_collectives": {k: t.count for k, t in both.items() if k != "all-to-all"},
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "forward_flops": work.get("flops"),
        }
        if devices > 1:
            cost = exchange_cost(
                tokens=TOKENS,
                num_experts=2 * devices,
                k=K,
                d_model=D,
                devices=devices,
                itemsize=4,
                capacity_factor=factor,
                send_shares=shares,
            )
            sent = [t["all-to-all"].num_bytes for t in (ahead, both)]
            entry["hlo_bytes"] = [sent[0], sent[1] - sent[0]]
            entry["model_bytes"] = [cost.forward_bytes, cost.backward_bytes]
            entry["buffer_rows"] = cost.buffer_rows
        if timed:
            params = shard(jax.jit(init)(jax.random.key(0)), mesh)
            batch = shard(jax.random.normal(jax.random.key(1), x.shape), mesh, rows)
            jax.block_until_ready(program(params, batch))
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                jax.block_until_ready(program(params, batch))
                seconds.append(time.perf_counter() - start)
            entry["seconds"] = statistics.median(seconds)
            entry["seconds_middle_half"] = statistics.quantiles(seconds, n=4)[::2]
        results.append(entry)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=file_to_write)
    devices = [1, 2, 4, 8, 16, 32, 64]
    parser.add_argument("--devices", type=at_least(1), nargs="+", default=devices)
    parser.add_argument("--timed-up-to", type=at_least(0), default=8)
    parser.add_argument("--rounds", type=at_least(2), default=20, help="2 have a middle half")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.one)
        timed = options.one <= options.timed_up_to
        sys.stdout.write(json.dumps(measure(options.one, timed, options.rounds)))
        return
    rows: list[dict[str, Any]] = []
    for count in options.devices:
        command = [
            sys.executable,
            __file__,
            "--one",
            str(count),
            "--timed-up-to",
            str(options.timed_up_to),
            "--rounds",
            str(options.rounds),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows += json.loads(done.stdout)
        for row in rows[-len(CASES) :]:
            print(row, file=sys.stderr)
    report = {
        "layer": {"d_model": D, "d_ff": F, "k": K, "experts": "2 a device", "tokens": TOKENS},
        "cores": os.cpu_count(),
        "rows": rows,
    }
    text = json.dumps(report, indent=1) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
