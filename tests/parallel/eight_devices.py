"""Run by test_eight_devices.py in a process of its own, as JAX must start with 8 host devices.

Prints one JSON object: measurement name -> what was measured. It judges nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import moe_jax
from moe_jax.experts import exchange
from moe_jax.experts.exchange import ExpertParallel
from moe_jax.nn.nnx import MoE
from moe_jax.parallel import sharded_layer, sharding
from moe_jax.parallel.collectives import collectives_of
from moe_jax.parallel.sharding import P
from moe_jax.routing.losses import LossWeights, aux_loss
from moe_jax.routing.stats import merge_stats

T, D, F = 64, 8, 16
FFN = moe_jax.FeedForward(activation="silu", use_bias=True)
MESHES = {"8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4), "1x8": (1, 8)}
RULES = {
    "top-k": lambda e: moe_jax.TopK(num_experts=e, k=2, balance_rate=1e-2),
    "dynamic k": lambda e: moe_jax.DynamicK(num_experts=e, min_k=1, max_k=3, balance_rate=1e-2),
    "top-p": lambda e: moe_jax.TopP(num_experts=e, p=0.4, max_k=3, target_mean_k=1.5),
    # Tokens may use no expert at all, and the cutoffs follow what is observed.
    "null": lambda e: moe_jax.ExpertThreshold(
        num_experts=e, target_k=1.5, min_k=0, max_k=3, decay=0.5
    ),
}
LOSSES = LossWeights(load_balancing=0.1, router_z=0.1)
DENSE = moe_jax.LayerOptions(implementation="dense")
ALL_LOSSES = LossWeights(load_balancing=0.1, router_z=0.1, entropy=0.1, importance=0.1)


@functools.cache
def layer_params(experts, shared_d_ff=0):
    """As NumPy arrays: nothing is compiled to make, pad or cut them."""
    shapes = jax.eval_shape(
        lambda key: moe_jax.init_moe_layer(
            moe_jax.TopK(num_experts=experts, k=2),
            FFN,
            key,
            d_model=D,
            d_ff=F,
            shared_d_ff=shared_d_ff,
        ),
        jax.random.key(0),
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: rng.normal(size=p.shape, scale=0.3).astype(np.float32), shapes)


def state_of(router):
    """The first state; of thresholds, one that leaves some tokens without any expert."""
    state = router.init_state()
    if isinstance(router, moe_jax.ExpertThreshold):
        state = dataclasses.replace(state, cutoffs=np.full(router.num_experts, 0.62, np.float32))
    return state


def batch(tokens=T):
    x = np.random.default_rng(1).normal(size=(tokens, D)).astype(np.float32)
    return x, np.arange(tokens) % 11 != 3  # some padding, spread over the devices


def objective(layer, router, params, x, mask, **options):
    """A loss that every output enters, the auxiliary losses, and what the controller makes of it."""
    state = state_of(router)
    options = moe_jax.LayerOptions(**options)
    y, aux = layer(router, FFN, params, state, x, token_mask=mask, options=options)
    wave = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    auxiliary, terms = aux_loss(aux.routing, LOSSES)
    loss = (y * wave).sum() / T + auxiliary
    return loss, {
        "output": y,
        "losses": terms,
        "update": router.update(state, aux.stats),
        "stats": aux.stats,
    }


def everything(layer, router, params, x, mask, **options):
    f = functools.partial(objective, layer, router, **options)
    (loss, parts), grads = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(params, x, mask)
    return {"loss": loss, "gradient": grads, **parts}


def sharded(router, params, mesh, parallel=None, tokens=T, **options):
    x, mask = batch(tokens)
    parallel = sharding.parallel_of(mesh) if parallel is None else parallel
    devices = int(np.prod([mesh.shape[a] for a in parallel.expert_axes], dtype=int))
    more = -router.num_experts % devices
    experts = params["experts"]
    if more:
        experts = jax.device_get(sharding.pad_experts(experts, devices))
    padded = {**params, "experts": experts}
    layer = functools.partial(sharded_layer.sharded_moe_layer, mesh=mesh, parallel=parallel)
    actual = jax.jit(functools.partial(everything, layer, router, **options))(
        sharding.shard(padded, mesh), x, mask
    )
    actual = jax.device_get(actual)
    grads, dx = actual["gradient"]
    real = sharding.unpad_experts(grads["experts"], router.num_experts)
    return {**actual, "gradient": ({**grads, "experts": real}, dx)}


def alone(router, params, tokens=T, **options):
    x, mask = batch(tokens)
    run = jax.jit(functools.partial(everything, moe_jax.moe_layer, router, **options))
    return jax.device_get(run(params, x, mask))


def differences(actual, wanted):
    def most(a, b):
        """The largest difference, in parts of the largest entry if that is below 1."""
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert a.shape == b.shape, (a.shape, b.shape)
        scale = min(1.0, max(float(np.abs(b).max()), 1e-2))
        return float(np.abs(a - b).max()) / scale

    report = {
        name: max(jax.tree.leaves(jax.tree.map(most, actual[name], wanted[name])))
        for name in ("output", "loss", "losses", "gradient", "update")
    }
    one, two = actual["stats"], wanted["stats"]
    names = [
        "token_count",
        "tokens_per_expert",
        "mean_experts_per_token",
        "dropped_fraction",
        "experts_per_token_histogram",
        "slots_used",
        "max_over_mean_load",
        "router_entropy",
        "observed",
    ]
    report["stats"] = max(most(getattr(one, n), getattr(two, n)) for n in names)
    report["dropped"] = float(one.dropped_fraction)
    report["empty"] = float(one.empty_fraction)
    return report


# (rule, dropless or dropping, mesh, E): every pair of the three, by turns. E=6 is padded.
MATRIX = [
    (rule, ("dropless", "dropping")[(i + j) % 2], mesh, experts)
    for i, rule in enumerate(RULES)
    for j, (mesh, experts) in enumerate([*((mesh, 8) for mesh in MESHES), ("2x4", 6)])
]


def label(rule, word, mesh, experts):
    return f"{rule}, {word}, {mesh}, E={experts}"


def the_matrix():
    """Every rule on every mesh, dropping or not."""
    for rule, word, mesh, experts in MATRIX:
        router, params = RULES[rule](experts), layer_params(experts)
        factor = None if word == "dropless" else 0.75
        wanted = reference(rule, experts, factor)
        data, expert = MESHES[mesh]
        # What runs the experts on a device matters little here, and dense compiles soonest; one mesh
        # takes what the library chooses.
        measured = sharded(
            router,
            params,
            sharding.make_mesh(data=data, expert=expert),
            capacity_factor=factor,
            implementation=None if mesh == "2x4" else "dense",
        )
        row = differences(measured, wanted)
        before = jax.tree.leaves(state_of(router))
        after = jax.tree.leaves(measured["update"])
        row["moved"] = max(
            float(np.abs(np.asarray(a) - b).max())
            for a, b in zip(before, after, strict=True)
            if np.issubdtype(a.dtype, np.floating)
        )
        yield label(rule, word, mesh, experts), row


@functools.cache
def reference(rule, experts, factor):
    options = {"capacity_factor": factor, "groups": 8, "implementation": "dense"}
    return alone(RULES[rule](experts), layer_params(experts), **options)


def the_rest():
    router = RULES["dynamic k"](8)
    params = {**layer_params(8, shared_d_ff=F), "shared_gate": np.full((D, 1), 0.1, np.float32)}
    wanted = alone(router, params, implementation="dense")
    three = sharding.make_mesh(data=2, expert=2, model=2)
    run = functools.partial(sharded, implementation="dense")
    yield "shared expert, expert x tensor x data", differences(run(router, params, three), wanted)

    hosts = sharding.make_mesh(expert_hosts=2, expert=4)
    levels = {}
    for two_level in (False, True):
        parallel = sharding.parallel_of(hosts, two_level=two_level)
        levels[two_level] = run(router, params, hosts, parallel)
    yield "two levels", differences(levels[True], wanted)
    yield "two levels against one", differences(levels[True], levels[False])

    odd = alone(router, params, tokens=61, implementation="dense")
    actual = run(router, params, sharding.make_mesh(data=2, expert=4), tokens=61)
    yield "61 tokens", differences(actual, odd)

    # Every token to two experts of one device: four times the load that the one size holds.
    skewed = {**params, "router": {"kernel": np.zeros((D, 8), np.float32)}}
    mesh = sharding.make_mesh(expert=8)
    parallel = sharding.parallel_of(mesh, send_shares=(0.25,))
    crowd = alone(router, skewed, implementation="dense")
    yield "further rounds", differences(run(router, skewed, mesh, parallel), crowd)

    # CPUs have no ragged all-to-all, so it is emulated and allowed here.
    original, jax.lax.ragged_all_to_all = jax.lax.ragged_all_to_all, emulated_ragged
    without, exchange._WITHOUT_RAGGED = exchange._WITHOUT_RAGGED, ()
    for factor in (None, 0.75):
        parallel = sharding.parallel_of(mesh, exchange="ragged")
        one = alone(router, params, capacity_factor=factor, groups=8, implementation="dense")
        actual = run(router, params, mesh, parallel, capacity_factor=factor)
        yield f"ragged, factor {factor}", differences(actual, one)
    jax.lax.ragged_all_to_all = original
    exchange._WITHOUT_RAGGED = without

    for factor, options in WIDE.items():
        yield f"wide rows, factor {factor}", wide_rows(mesh, factor, **options)
    yield "accumulated", accumulated(router, params, wanted)
    yield "own shard_map", own_shard_map(router, params)
    yield "noise differs by device", noise()
    yield "flax module", flax_module()
    for shape in ({"expert": 8}, {"data": 2, "expert": 2, "model": 2}):
        yield f"quantised, {shape}", quantized_experts(router, sharding.make_mesh(**shape))


def emulated_ragged(rows, out, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What jax.lax.ragged_all_to_all documents, of collectives that CPUs have."""
    rows, starts, sizes, places = (
        jax.lax.all_gather(a, axis_name) for a in (rows, input_offsets, send_sizes, output_offsets)
    )
    me = jax.lax.axis_index(axis_name)
    line = jnp.arange(out.shape[0])
    for q in range(rows.shape[0]):
        i = line - places[q, me]
        here = (i >= 0) & (i < sizes[q, me])
        taken = rows[q][jnp.clip(starts[q, me] + i, 0, rows.shape[1] - 1)]
        out = jnp.where(here[:, None], taken, out)
    # The receiver's own account of the sizes must agree, or the real one would read out of bounds.
    return jnp.where((recv_sizes == sizes[:, me]).all(), out, jnp.nan)


# Rows so wide, and so few for each device (16 with a capacity, else 24), that their counts travel in
# columns. The size without capacity is half a balanced load, so there are several rounds.
WIDE_SHAPE = {"tokens": 512, "width": 4096, "d_ff": 8, "experts": 8}
WIDE = {1.0: {}, None: {"send_shares": (0.5,)}}


def wide_rows(mesh, factor, **options):
    """Output and gradients against one device."""
    router = moe_jax.TopK(num_experts=WIDE_SHAPE["experts"], k=2)
    init = functools.partial(moe_jax.init_moe_layer, router, FFN, d_model=4096, d_ff=8)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: rng.normal(size=p.shape, scale=0.02).astype(np.float32),
        jax.eval_shape(init, jax.random.key(0)),
    )
    x = rng.normal(size=(WIDE_SHAPE["tokens"], 4096)).astype(np.float32)

    def run(layer, groups, params, x):
        chosen = moe_jax.LayerOptions(capacity_factor=factor, groups=groups, implementation="dense")

        def f(params, x):
            y = layer(router, FFN, params, router.init_state(), x, options=chosen)[0]
            return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum(), y

        return jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(params, x)

    layer = functools.partial(
        sharded_layer.sharded_moe_layer, mesh=mesh, parallel=sharding.parallel_of(mesh, **options)
    )
    spread = sharding.shard(params, mesh)
    many = jax.device_get(jax.jit(functools.partial(run, layer, 1))(spread, x))
    one = jax.device_get(jax.jit(functools.partial(run, moe_jax.moe_layer, 8))(params, x))
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), many, one)
    return {"output": apart[0][1], "gradient": max(jax.tree.leaves(apart[1]))}


def accumulated(router, params, wanted):
    """Gradients of two halves of the batch, summed, against the same on one device."""
    x, mask = batch()
    mesh = sharding.make_mesh(data=2, expert=4)
    layer = functools.partial(sharded_layer.sharded_moe_layer, mesh=mesh)
    halves = [(x[: T // 2], mask[: T // 2]), (x[T // 2 :], mask[T // 2 :])]

    def total(layer, params):
        def part(params, x, mask):
            y, aux = layer(
                router, FFN, params, router.init_state(), x, token_mask=mask, options=DENSE
            )
            return jnp.square(y).sum() / T + aux_loss(aux.routing, LOSSES)[0], aux.stats

        actual = [jax.value_and_grad(part, has_aux=True)(params, *half) for half in halves]
        loss = sum(value for (value, _), _ in actual)
        grads = jax.tree.map(lambda *g: sum(g), *[g for _, g in actual])
        stats = merge_stats([stats for (_, stats), _ in actual])
        return loss, grads, router.update(router.init_state(), stats), stats

    many = jax.jit(functools.partial(total, layer))(sharding.shard(params, mesh))
    one = jax.jit(functools.partial(total, moe_jax.moe_layer))(params)
    diff = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a, np.float32) - np.asarray(b)).max()),
        many[:3],
        one[:3],
    )
    whole = wanted["stats"]
    same = [
        float(jnp.abs(getattr(many[3], n) - getattr(whole, n)).max())
        for n in ("tokens_per_expert", "mean_experts_per_token", "router_entropy")
    ]
    return {"halves": max(jax.tree.leaves(diff)), "whole": max(same)}


def own_shard_map(router, params):
    """moe_layer(parallel=...) in a user's own shard_map, under jax.set_mesh, with its losses."""
    x, mask = batch()
    mesh = sharding.make_mesh(data=2, expert=4)
    parallel = ExpertParallel(token_axes=("data", "expert"), expert_axes=("expert",))

    def step(params, x, mask):
        @functools.partial(
            jax.shard_map,
            in_specs=(
                sharding.param_specs(params, mesh),
                P(("data", "expert")),
                P(("data", "expert")),
            ),
            out_specs=(P(("data", "expert")), P(), P()),
        )
        def inside(params, x, mask):
            y, aux = moe_jax.moe_layer(
                router,
                FFN,
                params,
                router.init_state(),
                x,
                token_mask=mask,
                parallel=parallel,
                options=DENSE,
            )
            loss, _ = aux_loss(aux.routing, ALL_LOSSES, axis_name=parallel.token_axes)
            return y, loss, router.update(router.init_state(), aux.stats)

        y, loss, state = inside(params, x, mask)
        return jnp.square(y).mean() + loss, (y, loss, state)

    def reference(params, x, mask):
        y, aux = moe_jax.moe_layer(
            router, FFN, params, router.init_state(), x, token_mask=mask, options=DENSE
        )
        loss, _ = aux_loss(aux.routing, ALL_LOSSES)
        return jnp.square(y).mean() + loss, (y, loss, router.update(router.init_state(), aux.stats))

    with jax.set_mesh(mesh):
        actual = jax.jit(jax.value_and_grad(step, has_aux=True))(
            sharding.shard(params, mesh), x, mask
        )
        y, _ = jax.jit(
            lambda p, x: sharded_layer.sharded_moe_layer(
                router, FFN, p, router.init_state(), x, token_mask=mask, options=DENSE
            )
        )(sharding.shard(params, mesh), x)
    wanted = jax.jit(jax.value_and_grad(reference, has_aux=True))(params, x, mask)
    diff = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a, np.float32) - np.asarray(b)).max()), actual, wanted
    )
    return {
        "difference": max(jax.tree.leaves(diff)),
        "set_mesh": float(jnp.abs(y - wanted[0][1][0]).max()),
    }


def quantized_experts(router, mesh):
    """int8 experts, routed and shared, over the mesh and on one device: (output, gradients) apart."""
    expert_fn, (x, mask) = dataclasses.replace(FFN, quantized="int8"), batch()
    params = layer_params(8, shared_d_ff=F)
    small = {n: jax.device_get(moe_jax.quantize_experts(params[n])) for n in ("experts", "shared")}
    params = {**params, **small}

    @functools.partial(jax.jit, static_argnums=0)
    def run(layer, params, biases, x):
        def f(biases, x):
            full = {**params, **{n: {**params[n], **biases[n]} for n in biases}}
            return layer(router, expert_fn, full, router.init_state(), x, token_mask=mask)[0]

        y, pull = jax.vjp(f, biases, x)
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    def on(layer, params):
        biases = {n: {k: p for k, p in params[n].items() if k.endswith("_bias")} for n in small}
        return jax.device_get(run(layer, params, biases, x))

    layer = functools.partial(
        sharded_layer.sharded_moe_layer, mesh=mesh, parallel=sharding.parallel_of(mesh)
    )
    spread = sharding.shard(params, mesh)
    assert spread["experts"]["up"].dtype == jnp.int8
    got, want = on(layer, spread), on(moe_jax.moe_layer, params)
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), got, want)
    return {"output": apart[0], "gradient": max(jax.tree.leaves(apart[1]))}


def flax_module():
    router, x = RULES["dynamic k"](8), batch()[0]
    mesh = sharding.make_mesh(data=2, expert=4)
    rows = []
    for options in ({}, {"mesh": mesh}):
        layer = MoE(
            router,
            d_model=D,
            d_ff=F,
            expert_fn=FFN,
            rngs=nnx.Rngs(0),
            implementation="dense",
            **options,
        )

        def loss(layer, x):
            y, aux = layer(x, return_aux=True)
            return jnp.square(y).mean(), (y, aux.stats.tokens_per_expert)

        actual = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(layer, x)
        rows.append(jax.device_get([*jax.tree.leaves(nnx.to_pure_dict(actual[1])), actual[0]]))
    most = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), *rows)
    return {"difference": max(jax.tree.leaves(most)), "arrays": len(rows[0])}


def noise():
    router = moe_jax.TopK(num_experts=8, k=2, gate=moe_jax.Gate(noise=1.0))
    mesh = sharding.make_mesh(expert=8)
    params = sharding.shard(layer_params(8), mesh)
    x = jnp.ones((T, D))
    run = jax.jit(
        lambda p, x, key: (
            sharded_layer.sharded_moe_layer(
                router, FFN, p, router.init_state(), x, mesh=mesh, key=key, options=DENSE
            )[1].routing.router_logits
        )
    )
    logits = np.asarray(run(params, x, jax.random.key(5))).reshape(8, -1)
    return {"distinct": len({row.tobytes() for row in logits})}


# --- what the compiled program sends and holds ----------------------------------------------


def compiled(mesh, factor, *, gradient, tokens=512, width=D, d_ff=F, experts=16, **options):
    router = moe_jax.TopK(num_experts=experts, k=2)
    shapes = jax.eval_shape(
        lambda key: moe_jax.init_moe_layer(router, FFN, key, d_model=width, d_ff=d_ff),
        jax.random.key(0),
    )
    specs, rows = sharding.param_specs(shapes, mesh), sharding.token_spec(mesh)
    parallel = sharding.parallel_of(mesh, **options)

    def forward(params, x):
        return sharded_layer.sharded_moe_layer(
            router,
            FFN,
            params,
            router.init_state(),
            x,
            mesh=mesh,
            parallel=parallel,
            options=moe_jax.LayerOptions(capacity_factor=factor),
        )[0]

    f, out = forward, rows
    if gradient:
        f = jax.grad(lambda params, x: jnp.square(forward(params, x)).sum(), argnums=(0, 1))
        out = (specs, rows)
    x = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    jitted = sharding.jit_sharded(f, mesh, in_specs=(specs, rows), out_specs=out)
    return jitted.lower(shapes, x).compile()


def the_programs():
    flat = sharding.make_mesh(expert=8)
    hosts = sharding.make_mesh(expert_hosts=2, expert=4)
    for label, mesh, factor, options in (
        ("dropping", flat, 1.25, {}),
        ("dropless", flat, None, {}),
        ("dropless, one size", flat, None, {"send_shares": (1.5,)}),
        ("two levels", hosts, 1.25, {"two_level": True}),
        *((f"wide rows, factor {f}", flat, f, options | WIDE_SHAPE) for f, options in WIDE.items()),
    ):
        for gradient in (False, True):
            program = compiled(mesh, factor, gradient=gradient, **options)
            word = "forward and backward" if gradient else "forward"
            yield (
                f"program: {label}, {word}",
                {
                    "sends": {
                        k: [t.count, t.num_bytes] for k, t in collectives_of(program).items()
                    },
                    "in the text": program.as_text().count(" all-to-all("),
                },
            )
    for devices in (1, 2, 4, 8):
        mesh = sharding.make_mesh(expert=devices, devices=jax.devices()[:devices])
        held = compiled(
            mesh, 1.25, gradient=True, tokens=16384, width=32, d_ff=64
        ).memory_analysis()
        yield (
            f"memory: {devices}",
            {
                "arguments": held.argument_size_in_bytes,
                "temporary": held.temp_size_in_bytes,
                "results": held.output_size_in_bytes,
            },
        )


def main() -> None:
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    warnings.simplefilter("error")
    assert jax.device_count() == 8, jax.devices()
    measured = {}
    for part in (the_programs, the_rest, the_matrix):
        for name, value in part():
            measured[name] = value
            print(name, value, file=sys.stderr, flush=True)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
