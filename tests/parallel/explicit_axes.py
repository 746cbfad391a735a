"""Plain data parallelism on a mesh with Explicit axes, in a process of its own with four devices.

Prints one JSON object: for each case the largest difference to one device.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax
from moe_jax.experts import IMPLEMENTATIONS
from moe_jax.nn.nnx import DynamicMoE
from moe_jax.parallel import sharded_layer, sharding

D, F, E = 8, 12, 4
FFN = moe_jax.FeedForward(activation="silu", gated=True)


def difference(actual, wanted):
    def one(a, b):
        return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max())

    return max(jax.tree.leaves(jax.tree.map(one, jax.device_get(actual), jax.device_get(wanted))))


def step(layer, router, options, params, x, mask):
    """Output, statistics and gradients."""

    def loss(params, x):
        y, aux = layer(
            router, FFN, params, router.init_state(), x, token_mask=mask, options=options
        )
        return jnp.square(y).sum(), (y, aux.routing.combine_weights, aux.stats.tokens_per_expert)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def main() -> None:
    warnings.simplefilter("error")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    mesh = jax.make_mesh((4,), ("data",))
    assert mesh.axis_types == (jax.sharding.AxisType.Explicit,)
    x = jax.random.normal(jax.random.key(1), (8, 3, D))
    mask = jnp.arange(24).reshape(8, 3) % 7 != 2
    split = functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    rules = {
        "top-k": moe_jax.TopK(num_experts=E, k=2),
        "dynamic k": moe_jax.DynamicK(num_experts=E, min_k=1, max_k=3),
        "expert choice": moe_jax.ExpertChoiceRouter(num_experts=E),
        "mixture of depths": moe_jax.MixtureOfDepths(num_experts=E, capacity=0.5),
    }
    cases = [("top-k", name, None) for name in IMPLEMENTATIONS if name != "capacity"]
    cases += [
        ("top-k", "capacity", 1.0),
        ("dynamic k", "dense", None),
        ("expert choice", "dense", None),
        ("mixture of depths", "dense", None),
    ]
    measured = {}
    for rule, name, factor in cases:
        router = rules[rule]
        params = moe_jax.init_moe_layer(router, FFN, jax.random.key(0), d_model=D, d_ff=F)
        options = moe_jax.LayerOptions(implementation=name, capacity_factor=factor)
        run = jax.jit(functools.partial(step, moe_jax.moe_layer, router, options))
        wanted, actual = run(params, x, mask), run(params, split(x), split(mask))
        y = actual[0][1][0]
        assert jax.typeof(y).sharding.spec == P("data", None, None), jax.typeof(y)
        measured[f"{rule}, {name}"] = difference(actual, wanted)

    router, dense = rules["top-k"], moe_jax.LayerOptions(implementation="dense")
    params = moe_jax.init_moe_layer(router, FFN, jax.random.key(0), d_model=D, d_ff=F)
    wanted = jax.jit(functools.partial(step, moe_jax.moe_layer, router, dense))(params, x, mask)
    run = functools.partial(step, moe_jax.moe_layer, router, dense)
    with jax.set_mesh(mesh):
        measured["set_mesh"] = difference(jax.jit(run)(params, split(x), split(mask)), wanted)
    whole = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
    actual = jax.jit(run)(jax.tree.map(whole, params), whole(x), whole(mask))
    measured["whole on every device"] = difference(actual, wanted)
    y, _ = moe_jax.moe_layer(
        router, FFN, params, router.init_state(), split(x), token_mask=split(mask), options=dense
    )
    measured["eager"] = difference(y, wanted[0][1][0])

    both = jax.make_mesh((2, 2), ("data", "expert"))
    for label, context, given in (
        ("sharded, set_mesh", jax.set_mesh(both), None),
        ("sharded, mesh=", contextlib.nullcontext(), both),
    ):
        layer = functools.partial(sharded_layer.sharded_moe_layer, mesh=given)
        with context:
            actual = jax.jit(functools.partial(step, layer, router, dense))(
                params,
                jax.device_put(x, NamedSharding(both, P("data"))),
                jax.device_put(mask, NamedSharding(both, P("data"))),
            )
        measured[label] = difference(actual, wanted)

    # Second derivatives through the exchange, and a call without jit: seconds, once 40 s.
    mesh = sharding.make_mesh(data=2, expert=2)
    layer = functools.partial(sharded_layer.sharded_moe_layer, mesh=mesh)
    start = time.monotonic()
    y, _ = layer(router, FFN, params, router.init_state(), x, token_mask=mask)
    measured["sharded, eager"] = difference(y, wanted[0][1][0])
    measured["sharded, eager: seconds"] = time.monotonic() - start

    def curvature(layer, options, x):
        def loss(x):
            y = layer(router, FFN, params, router.init_state(), x, options=options)[0]
            return jnp.sin(y).sum()

        def slope(x):
            return jax.jvp(loss, (x,), (x,))[1]

        return jax.jvp(jax.grad(loss), (x,), (x,))[1], jax.grad(slope)(x)

    few = x[:, :1]
    of_one = jax.jit(functools.partial(curvature, moe_jax.moe_layer, dense))(few)
    of_many = jax.jit(functools.partial(curvature, layer, moe_jax.LayerOptions()))(few)
    measured["sharded, jvp of grad and grad of jvp"] = difference(of_many, of_one)

    module = DynamicMoE(E, FFN, 1, 3, d_model=D, d_ff=F, rngs=nnx.Rngs(0))
    call = nnx.jit(lambda module, x: module(x))
    measured["DynamicMoE, nnx.jit"] = difference(call(module, split(x)), call(module, x))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
