"""Wrong uses of the layer and its Flax modules: each is refused in one sentence, as early as it can be.

Modules refuse what they were made with when they are made, and pass the rest on to ``moe_layer``. The
wrong uses of rules, plans and losses are in ``tests/test_bad_input.py``.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import moe_jax
from moe_jax import FeedForward, LayerOptions, TopK, init_moe_layer, moe_layer, run_experts
from moe_jax.nn import linen as moe_linen
from moe_jax.nn import nnx as moe_nnx
from moe_jax.nn.patching import fit_model, patch_model_with_dynamic_routing
from moe_jax.nn.profiler import FLOPProfiler
from moe_jax.parallel.sharded_layer import sharded_moe_layer
from moe_jax.parallel.sharding import make_mesh, pad_experts, parallel_of

T, D, F, E = 6, 8, 4, 4
FFN = FeedForward()
RULE = TopK(num_experts=E, k=2)
X = jnp.ones((T, D), jnp.float32)


@functools.cache
def layer_params() -> Any:
    return init_moe_layer(RULE, FFN, jax.random.key(0), d_model=D, d_ff=F, shared_d_ff=2)


def layer(x=X, *, router=RULE, expert_fn=FFN, params=None, run=moe_layer, **kwargs) -> Any:
    """Traces the layer, which is when everything is checked."""
    params = layer_params() if params is None else params
    call = functools.partial(run, router, expert_fn, **kwargs)
    state = router.init_state() if isinstance(router, moe_jax.Router) else None
    return jax.eval_shape(lambda: call(params, state, x))


def made(module: Any, **kwargs: Any) -> Any:
    kwargs = {"d_model": D, "d_ff": F} | kwargs
    if module is moe_nnx.MoE and "params" not in kwargs:
        kwargs = {"rngs": nnx.Rngs(0)} | kwargs
    return module(RULE, **kwargs)


@functools.cache
def nnx_layer() -> Any:
    return made(moe_nnx.MoE)


def mesh() -> Any:
    return make_mesh(devices=jax.devices()[:1])


def sharded(x=X, **kwargs: Any) -> Any:
    kwargs = {"mesh": mesh(), "run": sharded_moe_layer} | kwargs
    return layer(x, **kwargs)


def plan() -> Any:
    routing = RULE(RULE.init(jax.random.key(0), D), RULE.init_state(), X)
    return moe_jax.plan_dispatch(moe_jax.to_assignments(routing))


def nested(profiler: FLOPProfiler) -> None:
    with profiler, profiler:
        pass


PAIRS: dict[str, Any] = {"nnx": moe_nnx.MoE, "linen": moe_linen.MoE}

TABLE: dict[str, tuple[type[Exception], Any, str]] = {
    # --- options, when they are made
    "factor as text": (
        TypeError,
        lambda: LayerOptions(capacity_factor="1.25"),
        "capacity_factor.*'1.25'",
    ),
    "factor of NaN": (
        ValueError,
        lambda: LayerOptions(capacity_factor=float("nan")),
        "capacity_factor.*got nan",
    ),
    "factor of infinity": (
        ValueError,
        lambda: LayerOptions(capacity_factor=float("inf")),
        "got inf.*None drops",
    ),
    "factor of 0": (ValueError, lambda: LayerOptions(capacity_factor=0), "positive.*got 0"),
    "factor that is traced": (
        TypeError,
        lambda: jax.eval_shape(lambda f: LayerOptions(capacity_factor=f) and None, jnp.float32(1)),
        r"capacity_factor.*float32\[\]",
    ),
    "factor of True": (
        TypeError,
        lambda: LayerOptions(capacity_factor=True),
        "capacity_factor.*True",
    ),
    "rows below 0": (ValueError, lambda: LayerOptions(max_rows=-1), "max_rows.*at least 1, got -1"),
    "rows of 0": (ValueError, lambda: LayerOptions(max_rows=0), "max_rows.*got 0"),
    "rows as a float": (
        TypeError,
        lambda: LayerOptions(max_rows=8.0),
        "max_rows.*integer.*got 8.0",
    ),
    "priority misspelt": (
        ValueError,
        lambda: LayerOptions(priority="scores"),
        "'order', 'choice', got 'scores'",
    ),
    "renormalize as text": (
        TypeError,
        lambda: LayerOptions(renormalize_kept="yes"),
        "renormalize_kept.*got 'yes'",
    ),
    "implementation unknown": (
        ValueError,
        lambda: LayerOptions(implementation="fast"),
        r"'dense'.*got \['fast'\]",
    ),
    "implementation of another type": (
        TypeError,
        lambda: LayerOptions(implementation=3),
        "got 3.*tiered",
    ),
    "implementations in a list": (
        TypeError,
        lambda: LayerOptions(implementation=["dense"]),
        "a tuple of names, got a list",
    ),
    "no implementation": (
        ValueError,
        lambda: LayerOptions(implementation=()),
        r"names among.*got \[\]",
    ),
    "groups of 0": (ValueError, lambda: LayerOptions(groups=0), "groups.*at least 1, got 0"),
    "groups as a float": (TypeError, lambda: LayerOptions(groups=2.0), "groups.*got 2.0"),
    # --- the layer, when it is called
    "groups that do not divide T": (
        ValueError,
        lambda: layer(options=LayerOptions(groups=4)),
        "divisor of T=6, got groups=4",
    ),
    "groups that do not divide T, with a capacity": (
        ValueError,
        lambda: layer(options=LayerOptions(groups=4, capacity_factor=1.0)),
        "divisor of T=6",
    ),
    "more groups than tokens": (
        ValueError,
        lambda: layer(options=LayerOptions(groups=7, capacity_factor=1.0)),
        "T=6, got groups=7",
    ),
    "groups of expert choice": (
        ValueError,
        lambda: layer(
            router=moe_jax.ExpertChoiceRouter(num_experts=E), options=LayerOptions(groups=2)
        ),
        "expected token choice",
    ),
    "row budget below T": (
        ValueError,
        lambda: layer(options=LayerOptions(max_rows=5)),
        "at least T=6.*got 5",
    ),
    "options as a dict": (
        TypeError,
        lambda: layer(options={}),
        "options: expected LayerOptions, got a dict",
    ),
    "key of 0": (TypeError, lambda: layer(key=0), "key: expected one JAX key or None, got 0"),
    "a list of keys": (
        TypeError,
        lambda: layer(key=jax.random.split(jax.random.key(0))),
        r"one JAX key.*\[2\]",
    ),
    "a key of floats": (TypeError, lambda: layer(key=jnp.ones(2)), r"one JAX key.*float32\[2\]"),
    "mask of another shape": (
        ValueError,
        lambda: layer(token_mask=jnp.ones(T + 1, bool)),
        r"token_mask.*\[7\]",
    ),
    "mask of integers": (
        TypeError,
        lambda: layer(token_mask=jnp.ones(T, jnp.int32)),
        "token_mask.*int32",
    ),
    "mask as a list": (TypeError, lambda: layer(token_mask=[True] * T), "token_mask.*got a list"),
    "x of integers": (
        TypeError,
        lambda: layer(jnp.ones((T, D), jnp.int32)),
        "x: expected float.*int32",
    ),
    "x without a width": (ValueError, lambda: layer(jnp.ones(())), r"x: expected.*float32\[\]"),
    "the router's class": (
        TypeError,
        lambda: layer(router=TopK),
        "router: expected Router, got the class TopK",
    ),
    "router and expert exchanged": (
        TypeError,
        lambda: layer(router=FFN, expert_fn=RULE),
        "router: expected",
    ),
    "the expert's class": (
        TypeError,
        lambda: layer(expert_fn=FeedForward),
        "expert_fn.*class FeedForward",
    ),
    "no expert": (TypeError, lambda: layer(expert_fn=None), "expert_fn.*got None"),
    "params without experts": (
        ValueError,
        lambda: layer(params={"router": layer_params()["router"]}),
        "got router. Add experts",
    ),
    "params without a router": (
        ValueError,
        lambda: layer(params={"experts": layer_params()["experts"]}),
        "Add router",
    ),
    "params with a part that nobody reads": (
        ValueError,
        lambda: layer(params={**layer_params(), "expert": {}}),
        "Remove expert",
    ),
    "a gate for no shared expert": (
        ValueError,
        lambda: layer(
            params={
                **{n: layer_params()[n] for n in ("router", "experts")},
                "shared_gate": jnp.ones((D, 1)),
            }
        ),
        "Add shared",
    ),
    "a gate of another shape": (
        ValueError,
        lambda: layer(params={**layer_params(), "shared_gate": jnp.ones(D)}),
        r"shared_gate.*D=8, 1=1",
    ),
    "params as a list": (
        TypeError,
        lambda: layer(params=[1]),
        "params: expected a dict.*got a list",
    ),
    "parallel as a mesh": (
        TypeError,
        lambda: layer(parallel=mesh()),
        "parallel: expected ExpertParallel",
    ),
    "run_experts without a plan": (
        TypeError,
        lambda: run_experts(FFN, layer_params()["experts"], X, None, jnp.ones(12)),
        "plan: expected DispatchPlan, got None",
    ),
    "run_experts with other weights": (
        ValueError,
        lambda: run_experts(FFN, layer_params()["experts"], X, plan(), jnp.ones(11)),
        r"weights.*N=12.*\[11\]",
    ),
    # --- parameters, when they are made
    "init with key 0": (
        TypeError,
        lambda: init_moe_layer(RULE, FFN, 0, d_model=D, d_ff=F),
        "key: expected one JAX key",
    ),
    "init without a key": (
        TypeError,
        lambda: init_moe_layer(RULE, FFN, None, d_model=D, d_ff=F),
        "key: .*got None",
    ),
    "init of a function": (
        TypeError,
        lambda: init_moe_layer(RULE, len, jax.random.key(0), d_model=D, d_ff=F),
        "expert_fn: expected FeedForward",
    ),
    "init of width 0": (
        ValueError,
        lambda: init_moe_layer(RULE, FFN, jax.random.key(0), d_model=0, d_ff=F),
        "d_model.*got 0",
    ),
    "init of a width as text": (
        TypeError,
        lambda: init_moe_layer(RULE, FFN, jax.random.key(0), d_model=D, d_ff="4"),
        "d_ff.*got '4'",
    ),
    "flags as text": (TypeError, lambda: FeedForward(gated="yes"), "gated.*got 'yes'"),
    # --- the Flax modules alone
    "nnx: unknown option": (
        TypeError,
        lambda: made(moe_nnx.MoE, ffn=FFN),
        "options among.*got ffn.*expert_fn",
    ),
    "nnx: unknown option of DynamicMoE": (
        TypeError,
        lambda: moe_nnx.DynamicMoE(E, d_model=D, d_ff=F, rngs=nnx.Rngs(0), min_experts=1),
        "options among.*got min_experts.*are min_k and max_k",
    ),
    "linen: unknown option": (
        TypeError,
        lambda: made(moe_linen.MoE, capcity_factor=1.25),
        "MoE: expected arguments among .*got capcity_factor.*mean capacity_factor",
    ),
    "linen: unknown option of DynamicMoE": (
        TypeError,
        lambda: moe_linen.DynamicMoE(E, FFN, 1, 3, d_model=D, d_ff=F, experts=1),  # pyright: ignore
        "DynamicMoE: expected arguments among .*got experts",
    ),
    "a coefficient misspelt": (
        TypeError,
        lambda: moe_jax.LossWeights(load_balance=0.1),  # pyright: ignore
        "LossWeights: expected arguments among load_balancing.*mean load_balancing",
    ),
    **{
        f"a field of {cls.__name__} misspelt": (
            TypeError,
            functools.partial(cls, num_expert=8),
            f"{cls.__name__}: expected arguments among .*got num_expert",
        )
        for cls in (moe_jax.MinP, FeedForward, LayerOptions, moe_jax.Gate, moe_jax.Scoring)
    },
    "nnx: a key for rngs": (
        TypeError,
        lambda: made(moe_nnx.MoE, rngs=jax.random.key(0)),
        "rngs: expected Rngs",
    ),
    "nnx: neither rngs nor params": (
        ValueError,
        lambda: moe_nnx.MoE(RULE, d_model=D, d_ff=F),
        "got neither",
    ),
    "nnx: params without experts": (
        ValueError,
        lambda: made(moe_nnx.MoE, params={"router": {}}),
        "Add experts",
    ),
    "nnx: a router without rngs": (
        TypeError,
        lambda: moe_nnx.Router(RULE, D, rngs=0),
        "rngs: expected Rngs",
    ),
    "linen: a rule that gets boxed parameters": (
        TypeError,
        lambda: RULE(
            {"kernel": nn.Partitioned(jnp.ones((D, E)), names=("embed", "expert"))},
            RULE.init_state(),
            X,
        ),
        r"Partitioned.*flax\.linen\.meta\.unbox",
    ),
    "linen: a router that is none": (
        TypeError,
        lambda: moe_linen.Router(FFN, D),
        "router: expected Router",
    ),
    "nnx: statistics of something else": (
        TypeError,
        lambda: nnx_layer().update_router(X),
        "stats: expected RoutingStats",
    ),
    "nnx: another width": (
        ValueError,
        lambda: nnx_layer()(jnp.ones((2, 4, 16))),
        r"x: expected float\[\.\.\., D=8\], got float32\[2, 4, 16\].*any leading axes",
    ),
    "nnx: a fit on another width": (
        ValueError,
        lambda: nnx_layer().fit_router(jnp.ones((2, 4, 16)), target_mean_k=1.5),
        r"x: expected float\[\.\.\., D=8\], got float32\[2, 4, 16\]",
    ),
    "linen: another width": (
        ValueError,
        lambda: made(moe_linen.MoE).init(jax.random.key(0), jnp.ones((2, 4, 16))),
        r"x: expected float\[\.\.\., D=8\], got float32\[2, 4, 16\]",
    ),
    "nnx: a fit on a list": (
        TypeError,
        lambda: nnx_layer().fit_router([1.0], target_mean_k=1.5),
        "x: expected.*got a list",
    ),
    # --- patching and profiling
    "patching a model without MoE": (
        ValueError,
        lambda: patch_model_with_dynamic_routing(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        "got Linear without any",
    ),
    "patching a Linen module": (
        TypeError,
        lambda: patch_model_with_dynamic_routing(nn.Dense(2)),
        "model: expected an NNX model, got the Linen module Dense",
    ),
    "patching to a ratio as text": (
        TypeError,
        lambda: patch_model_with_dynamic_routing(nnx_layer(), "0.1"),
        "min_experts_ratio.*got '0.1'",
    ),
    "fitting without data": (
        ValueError,
        lambda: fit_model(nnx_layer(), None, target_mean_k=1.5),
        "calibration: .*got None",
    ),
    "fitting to text": (
        TypeError,
        lambda: fit_model(nnx_layer(), X, target_mean_k="1.5"),
        "target_mean_k.*got '1.5'",
    ),
    "fitting a Linen module": (
        TypeError,
        lambda: fit_model(nn.Dense(2), X, target_mean_k=1.5),  # pyright: ignore
        "expected an NNX model, got the Linen module Dense",
    ),
    "profiling a Linen module": (
        TypeError,
        lambda: FLOPProfiler(nn.Dense(2), baseline="dense").__enter__(),
        "model: expected an NNX model",
    ),
    "profiling against nothing": (
        ValueError,
        lambda: FLOPProfiler(baseline="trained_k"),
        "trained_k: .*got None",
    ),
    "profiling twice at once": (
        RuntimeError,
        lambda: nested(FLOPProfiler(nnx_layer(), baseline="dense")),
        "once at a time",
    ),
    "recording a whole report": (
        TypeError,
        lambda: FLOPProfiler(baseline="dense").record(
            "a", X, d_model=D, max_k=2, flops_per_row=1.0
        ),
        "stats: expected RoutingStats",
    ),
    # --- meshes
    "a mesh that is none": (
        TypeError,
        lambda: sharded(mesh="data"),
        "mesh: expected a jax.sharding.Mesh, got 'data'",
    ),
    "no mesh at all": (ValueError, lambda: sharded(mesh=None), "mesh: expected a mesh, got none"),
    "an axis of the mesh as text": (TypeError, lambda: make_mesh(data="2"), "data: .*got '2'"),
    "axes that the rules do not name": (
        ValueError,
        lambda: parallel_of(jax.sharding.AbstractMesh((2,), ("x",))),
        "an axis that the rules name.*got x",
    ),
    "axes that the mesh lacks": (
        ValueError,
        lambda: sharded(
            parallel=moe_jax.experts.exchange.ExpertParallel(token_axes=("rows",), expert_axes=())
        ),
        "axes of the mesh.*got rows",
    ),
    "padding to 0 devices": (
        ValueError,
        lambda: pad_experts(layer_params()["experts"], 0),
        "devices.*got 0",
    ),
    "sharded: key of 0": (TypeError, lambda: sharded(key=0), "key: expected one JAX key"),
    "sharded: mask of another shape": (
        ValueError,
        lambda: sharded(token_mask=jnp.ones(T + 1, bool)),
        r"token_mask.*\[7\]",
    ),
    "sharded: x as a list": (TypeError, lambda: sharded([1.0]), "x: expected"),
    "sharded: context of other tokens": (
        ValueError,
        lambda: sharded(context={"gradients": jnp.ones((T + 1, D))}),
        r"leading axis of T=6.*\[7, 8\]",
    ),
    "sharded: params without experts": (
        ValueError,
        lambda: sharded(params={"router": {}}),
        "Add experts",
    ),
    # --- both Flax modules, when they are made
    **{
        f"{kind}: {name}": (error, functools.partial(made, module, **kwargs), words)
        for kind, module in PAIRS.items()
        for name, kwargs, error, words in (
            ("factor as text", {"capacity_factor": "1.25"}, TypeError, "capacity_factor.*'1.25'"),
            ("priority misspelt", {"priority": "scores"}, ValueError, "got 'scores'"),
            ("groups of 0", {"groups": 0}, ValueError, "groups.*got 0"),
            ("implementation unknown", {"implementation": "fast"}, ValueError, r"got \['fast'\]"),
            ("no width of experts", {"d_ff": None}, ValueError, "d_ff.*got None"),
            ("width as text", {"d_ff": "4"}, TypeError, "d_ff.*got '4'"),
            ("width of x below 1", {"d_model": 0}, ValueError, "d_model.*got 0"),
            ("an own expert without its init", {"expert_fn": len}, ValueError, "expert_init"),
            ("the expert's class", {"expert_fn": FeedForward}, TypeError, "expert_fn.*class"),
            ("a mesh that is none", {"mesh": "data"}, TypeError, "mesh: expected Mesh, got 'data'"),
        )
    },
}


@pytest.mark.parametrize("case", list(TABLE))
def test_a_wrong_use_is_refused_in_a_sentence(case):
    error, cause, words = TABLE[case]
    with pytest.raises(error) as caught:
        cause()
    message = str(caught.value)
    assert re.search(words, message, re.DOTALL), message
    assert re.search(r"expected .+ got .+[.?)] ?[A-Z(0-9].*[.?)]$", message, re.DOTALL), message


@pytest.mark.parametrize("kind", list(PAIRS))
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"key": 0}, TypeError, "key: expected one JAX key"),
        ({"token_mask": jnp.ones(T + 1, bool)}, ValueError, r"token_mask.*\[7\]"),
        ({"token_mask": jnp.ones(T, jnp.float32)}, TypeError, "token_mask.*float32"),
        ({"context": {"gradient": X}}, ValueError, "context: expected keys among.*got gradient"),
    ],
    ids=["key", "mask shape", "mask dtype", "context key"],
)
def test_modules_pass_on_what_the_layer_checks(kind, call, error, words):
    module = made(PAIRS[kind])
    variables = {
        "params": {n: layer_params()[n] for n in ("router", "experts")},
        "router_state": {"state": RULE.init_state()},
    }
    run = module if kind == "nnx" else functools.partial(module.apply, variables)
    with pytest.raises(error, match=words):
        run(X, **call)


def test_options_are_static_values():
    """Equal options hit the same cache entry; a module's keywords become the same value."""
    options = LayerOptions(capacity_factor=1.25, implementation=("capacity", "tiered"))
    assert options == LayerOptions(capacity_factor=1.25, implementation=("capacity", "tiered"))
    assert hash(options) == hash(
        LayerOptions(capacity_factor=1.25, implementation=("capacity", "tiered"))
    )
    module = made(moe_nnx.MoE, capacity_factor=1.25, implementation=("capacity", "tiered"))
    assert module.spec.options == options
    twin = made(moe_linen.MoE, capacity_factor=1.25, implementation=("capacity", "tiered"))
    assert twin.spec().options == options
    traced = []

    @functools.partial(jax.jit, static_argnames="options")
    def run(x, options):
        traced.append(options)
        return x

    for _ in range(2):
        run(X, LayerOptions(max_rows=8))
    assert len(traced) == 1


@pytest.mark.parametrize("kind", list(PAIRS))
def test_a_context_reaches_the_rule_through_modules(kind):
    """What the rule needs is required by name, and what the caller passes arrives."""
    if kind == "nnx":
        module = moe_nnx.DynamicMoE(
            E, FFN, 1, 3, d_model=D, d_ff=F, difficulty="gradient_norm", rngs=nnx.Rngs(0)
        )
        run = module
    else:
        twin = moe_linen.DynamicMoE(E, FFN, 1, 3, d_model=D, d_ff=F, difficulty="gradient_norm")
        rule = twin.rule()
        variables = {
            "params": {n: layer_params()[n] for n in ("router", "experts")},
            "router_state": {"state": rule.init_state()},
        }
        run = functools.partial(twin.apply, variables)
    with pytest.raises(ValueError, match=r"context\['gradients'\]"):
        run(X)
    with pytest.raises(ValueError, match="got gradient"):
        run(X, context={"gradient": X})
    run(X, context={"gradients": X})
