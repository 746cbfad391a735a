"""One table of bad inputs: each is refused with what was expected, what came, and what to do."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import (
    Cosine,
    DynamicK,
    Elastic,
    ExpertChoiceRouter,
    ExpertThreshold,
    FeedForward,
    Gate,
    LayerOptions,
    LossWeights,
    MinP,
    RandomSkip,
    ReLURouter,
    Scoring,
    Sinkhorn,
    TopAny,
    TopK,
    TopP,
    expert_capacity,
    fit_thresholds,
    flops_report,
    init_moe_layer,
    kept_weights,
    moe_layer,
    plan_dispatch,
    router_from_json,
    routing_stats,
    row_budget,
    run_experts,
    to_assignments,
)
from moe_jax.interop import DriftMonitor
from moe_jax.interop.rules import MoEPlusPlus
from moe_jax.routers import with_share, with_similarity
from moe_jax.routing.difficulty import register_estimator
from moe_jax.routing.dispatch import plan_in_groups
from moe_jax.routing.losses import aux_loss, relu_l1_loss, router_z_loss
from moe_jax.routing.row_budget import batch_design_effect
from moe_jax.routing.stats import merge_stats
from moe_jax.types import Params, Routing

T, D, E = 6, 8, 4
FFN = FeedForward()
ROUTER = TopK(num_experts=E, k=2)
X = jnp.ones((T, D), jnp.float32)


@functools.cache
def layer_params() -> Params:
    return init_moe_layer(ROUTER, FFN, jax.random.key(0), d_model=D, d_ff=4)


def layer(x: Any = X, router: Any = ROUTER, params: Params = None, **kwargs: Any) -> Any:
    made = layer_params()
    params = made if params is None else params(made)
    named = {f.name for f in dataclasses.fields(LayerOptions)}
    options = LayerOptions(**{n: kwargs.pop(n) for n in named & set(kwargs)})
    return moe_layer(router, FFN, params, router.init_state(), x, options=options, **kwargs)


@functools.cache
def routing() -> Routing:
    return ROUTER(ROUTER.init(jax.random.key(0), D), ROUTER.init_state(), X)


def plan(**bounds: Any) -> Any:
    return plan_dispatch(to_assignments(routing()), **bounds)


def fit(x: Any = None, router: Any = None, target: float = 1.5, **kwargs: Any) -> Any:
    router = DynamicK(num_experts=E, min_k=1, max_k=3) if router is None else router
    x = jax.random.normal(jax.random.key(0), (40, D)) if x is None else x
    params = router.init(jax.random.key(0), D)
    return router.fit(params, router.init_state(), x, target_mean_k=target, **kwargs)


def dynamic(difficulty: Any, **context: Any) -> Any:
    router = DynamicK(num_experts=E, min_k=1, max_k=2, difficulty=difficulty)
    return router(router.init(jax.random.key(0), D), router.init_state(), X, context=context)


def stacked_wrong(params: Params) -> Params:
    return {**params, "experts": jax.tree.map(lambda p: p[:3], params["experts"])}


def ragged_axes(params: Params) -> Params:
    return {**params, "experts": {**params["experts"], "up": params["experts"]["up"][:3]}}


def expert_choice_weights() -> Any:
    router = ExpertChoiceRouter(num_experts=E)
    routing = router(router.init(jax.random.key(0), D), router.init_state(), X)
    return kept_weights(plan_dispatch(to_assignments(routing)), renormalize=True)


def fit_relu(target: float) -> Any:
    router = ReLURouter(num_experts=4, target_k=1.0)
    x = jax.random.normal(jax.random.key(0), (40, D))
    params = router.init(jax.random.key(0), D)
    return router.fit(params, router.init_state(), x, target_mean_k=target)


def report(**kwargs: Any) -> Any:
    stats = routing_stats(routing(), plan())
    return flops_report(stats, d_model=D, flops_per_row=10, max_k=2, **kwargs)


def route(
    *,
    params: Any = "init",
    state: Any = "init",
    token_mask: Any = None,
    key: Any = None,
    context: Any = None,
) -> Any:
    params = ROUTER.init(jax.random.key(0), D) if isinstance(params, str) else params
    state = ROUTER.init_state() if isinstance(state, str) else state
    return ROUTER(params, state, X, key=key, token_mask=token_mask, context=context)


DYNAMIC = DynamicK(num_experts=E, min_k=1, max_k=3)
NAN = jnp.ones((40, D)).at[3, 2].set(jnp.nan)

TABLE: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    # --- x
    "rank: no token axis of its own": (ValueError, lambda: layer(jnp.ones(())), "x: .*T, D"),
    "rank: router given [B, S, D]": (
        ValueError,
        lambda: ROUTER(ROUTER.init(jax.random.key(0), D), ROUTER.init_state(), jnp.ones((2, 3, D))),
        r"float\[T, D=8\], got float32\[2, 3, 8\]",
    ),
    "width": (ValueError, lambda: layer(jnp.ones((T, D + 1))), r"D=8\], got float32\[6, 9\]"),
    "dtype: integers": (
        TypeError,
        lambda: layer(jnp.ones((T, D), jnp.int32)),
        r"got int32\[6, 8\]",
    ),
    "dtype: booleans": (TypeError, lambda: layer(jnp.ones((T, D), bool)), r"got bool\[6, 8\]"),
    "not an array": (TypeError, lambda: layer([[1.0] * D]), "got a list"),
    "none at all": (TypeError, lambda: layer(None), "got a NoneType"),
    "no tokens": (ValueError, lambda: layer(jnp.ones((0, D))), r"got float32\[0, 8\].*empty"),
    "no width": (ValueError, lambda: layer(jnp.ones((T, 0))), r"got float32\[6, 0\]"),
    # --- masks
    "mask of another length": (
        ValueError,
        lambda: layer(token_mask=jnp.ones((T + 1,), bool)),
        r"token_mask.*\[7\]",
    ),
    "mask of another rank": (
        ValueError,
        lambda: layer(token_mask=jnp.ones((T, D), bool)),
        r"token_mask.*\[6, 8\]",
    ),
    "mask of floats": (
        TypeError,
        lambda: layer(token_mask=jnp.ones((T,), jnp.float32)),
        "token_mask.*float32",
    ),
    "router: mask of another length": (
        ValueError,
        lambda: ROUTER(
            ROUTER.init(jax.random.key(0), D),
            ROUTER.init_state(),
            X,
            token_mask=jnp.ones((2,), bool),
        ),
        r"token_mask.*bool\[T=6\], got bool\[2\]",
    ),
    # --- k and experts
    "k above E": (ValueError, lambda: TopK(num_experts=4, k=5), "num_experts=4.*got 5"),
    "k of 0": (ValueError, lambda: TopK(num_experts=4, k=0), "k <= num_experts=4, got 0"),
    "no experts": (ValueError, lambda: TopK(num_experts=0, k=1), "num_experts.*got 0"),
    "quantiles with every expert": (
        ValueError,
        lambda: TopK(num_experts=4, k=4, balance="quantile"),
        "k=4 of 4",
    ),
    "quantiles past the batch's": (
        ValueError,
        lambda: TopK(num_experts=4, k=2, balance="quantile", balance_rate=2.0),
        "got 2.0",
    ),
    "quantiles that move nothing": (
        ValueError,
        lambda: TopK(num_experts=4, k=2, balance="quantile"),
        r"0 < balance_rate <= 1.*got 0\.0.*1\.0 is usual",
    ),
    "negative balance rate": (
        ValueError,
        lambda: TopK(num_experts=4, k=2, balance_rate=-0.1),
        "balance_rate.*got -0.1",
    ),
    "balance rate that is none": (
        ValueError,
        lambda: DynamicK(num_experts=4, min_k=1, max_k=2, balance_rate=float("nan")),
        "balance_rate.*got nan",
    ),
    "experts as a float": (
        TypeError,
        lambda: ReLURouter(num_experts=8.0, target_k=2.0),
        "an integer, got 8.0",
    ),
    "k as text": (TypeError, lambda: TopK(num_experts=4, k="2"), "k: .*got '2'"),
    "MoE++ without experts": (
        ValueError,
        lambda: MoEPlusPlus(num_experts=0),
        "num_experts.*at least 1, got 0",
    ),
    "balance unknown": (ValueError, lambda: TopK(num_experts=4, k=2, balance="qb"), "got 'qb'"),
    "min above max": (
        ValueError,
        lambda: DynamicK(num_experts=4, min_k=3, max_k=2),
        "min_k=3, max_k=2",
    ),
    "negative min": (ValueError, lambda: DynamicK(num_experts=4, min_k=-1, max_k=2), "min_k=-1"),
    "top-p without an expert": (ValueError, lambda: TopP(num_experts=4, min_k=0), "at least 1"),
    "min-p without an expert": (ValueError, lambda: MinP(num_experts=4, min_k=0), "at least 1"),
    "p above 1": (ValueError, lambda: TopP(num_experts=4, p=1.5), "0 <= p <= 1, got 1.5"),
    "ratio below 0": (ValueError, lambda: MinP(num_experts=4, ratio=-0.1), "got -0.1"),
    "target out of reach": (
        ValueError,
        lambda: TopP(num_experts=4, max_k=2, target_mean_k=3.0),
        "got 3.0",
    ),
    "threshold target above E": (
        ValueError,
        lambda: ExpertThreshold(num_experts=4, target_k=5.0),
        "got 5.0",
    ),
    "decay of 1": (
        ValueError,
        lambda: ExpertThreshold(num_experts=4, target_k=1.0, decay=1.0),
        "got 1.0",
    ),
    "expert choice above E": (
        ValueError,
        lambda: ExpertChoiceRouter(num_experts=4, mean_k=5.0),
        "got 5.0",
    ),
    "expert choice renormalised": (
        ValueError,
        lambda: ExpertChoiceRouter(num_experts=4, scoring=Scoring(norm="sum")),
        "no renormalisation",
    ),
    "thresholds with groups": (
        ValueError,
        lambda: ExpertThreshold(
            num_experts=4, target_k=1.0, scoring=Scoring(num_groups=2, top_groups=1)
        ),
        "num_groups=2",
    ),
    "relu target above E": (
        ValueError,
        lambda: ReLURouter(num_experts=4, target_k=4.0),
        r"< 4, got 4\.0.*max_k=4",
    ),
    "relu step that does not move": (
        ValueError,
        lambda: ReLURouter(num_experts=4, target_k=1.0, step=1.0),
        "1 < step, got 1.0",
    ),
    "relu with another score": (
        ValueError,
        lambda: ReLURouter(num_experts=4, target_k=1.0, scoring=Scoring()),
        "'relu'",
    ),
    "relu made denser": (ValueError, lambda: fit_relu(3.9), "use without a cutoff, got 3.9"),
    "top-any from two": (ValueError, lambda: TopAny(num_experts=4, min_k=2), "min_k <= 1, got 2"),
    "top-any scale of 0": (ValueError, lambda: TopAny(num_experts=4, scale=0.0), "got 0.0"),
    "top-any scale as text": (
        TypeError,
        lambda: TopAny(num_experts=4, scale="a"),
        "number, got 'a'",
    ),
    "top-any diversity below 0": (
        ValueError,
        lambda: TopAny(num_experts=4, diversity=-1.0),
        "diversity.*got -1.0",
    ),
    "top-any diversity that is none": (
        ValueError,
        lambda: TopAny(num_experts=4, diversity=float("nan")),
        "diversity.*got nan",
    ),
    "top-any efficiency below 0": (
        ValueError,
        lambda: TopAny(num_experts=4, efficiency=-5.0),
        "efficiency.*got -5.0",
    ),
    "relu target as text": (
        TypeError,
        lambda: ReLURouter(num_experts=4, target_k="2"),
        "target_k: .*got '2'",
    ),
    "relu lambda above its bound": (
        ValueError,
        lambda: ReLURouter(num_experts=4, target_k=1.0, max_l1_coefficient=1e-9),
        "1e-08 <= max_l1_coefficient, got 1e-09",
    ),
    "random mean above k": (
        ValueError,
        lambda: RandomSkip(num_experts=4, k=2, mean_k=2.5),
        "got 2.5",
    ),
    "random drop unknown": (
        ValueError,
        lambda: RandomSkip(num_experts=4, k=2, mean_k=1.5, drop="x"),
        "'lowest'",
    ),
    # --- gate and scoring
    "score unknown": (ValueError, lambda: Scoring(score="tanh"), "'softmax'.*got 'tanh'"),
    "norm unknown": (ValueError, lambda: Scoring(norm="l2"), "'sum_eps'.*got 'l2'"),
    "top groups above groups": (
        ValueError,
        lambda: Scoring(num_groups=2, top_groups=3),
        "num_groups=2, got 3",
    ),
    "groups that do not divide E": (
        ValueError,
        lambda: TopK(num_experts=4, k=1, scoring=Scoring(num_groups=3, top_groups=1)),
        "divisor of num_experts=4, got 3",
    ),
    "groups too small for k": (
        ValueError,
        lambda: TopK(num_experts=4, k=3, scoring=Scoring(num_groups=2, top_groups=1)),
        "at most 2.*got 3",
    ),
    "jitter of 1": (ValueError, lambda: Gate(jitter=1.0), "got 1.0"),
    "negative noise": (ValueError, lambda: Gate(noise=-1.0), "got -1.0"),
    "softcap of 0": (ValueError, lambda: Gate(softcap=0.0), "got 0.0"),
    "disabled expert out of range": (
        ValueError,
        lambda: TopK(num_experts=4, k=1, gate=Gate(disabled_experts=(4,))).init(
            jax.random.key(0), D
        ),
        r"0\.\.3.*got \(4,\)",
    ),
    "all experts disabled": (
        ValueError,
        lambda: TopK(num_experts=2, k=1, gate=Gate(disabled_experts=(0, 1))).init(
            jax.random.key(0), D
        ),
        "at least one expert",
    ),
    # --- difficulty
    "estimator unknown": (
        ValueError,
        lambda: dynamic("gradient"),
        "gradient_norm.*got 'gradient'.*register",
    ),
    "estimator neither name nor function": (TypeError, lambda: dynamic(3), "got a int"),
    "gradients not given": (
        ValueError,
        lambda: dynamic("gradient_norm"),
        r"context\['gradients'\]",
    ),
    "attention not given": (
        ValueError,
        lambda: dynamic("attention_entropy"),
        r"context\['attention'\]",
    ),
    "targets not given": (
        ValueError,
        lambda: dynamic("surprisal", logits=jnp.ones((T, 5))),
        r"context\['targets'\]",
    ),
    "attention of other tokens": (
        ValueError,
        lambda: dynamic("attention_entropy", attention=jnp.ones((T + 1, 3))),
        r"T=6, S\], got float32\[1, 7, 3\]",
    ),
    "estimator of the wrong shape": (
        ValueError,
        lambda: dynamic(lambda x, context: x),
        r"float\[T=6\], got float32\[6, 8\]",
    ),
    "estimator of the wrong dtype": (
        TypeError,
        lambda: dynamic(lambda x, context: x[:, 0].astype(jnp.int32)),
        r"got int32\[6\]",
    ),
    "estimator name taken": (
        ValueError,
        lambda: register_estimator("router_entropy", lambda x, c: x[:, 0]),
        "free name",
    ),
    # --- calibration
    "NaN in calibration": (ValueError, lambda: fit(NAN), "1 of 40 tokens with NaN"),
    "inf in calibration": (ValueError, lambda: fit(NAN.at[3, 2].set(jnp.inf)), "1 of 40"),
    "calibration on equal tokens": (
        ValueError,
        lambda: fit(jnp.ones((40, D))),
        "scores that differ",
    ),
    "calibration on padding alone": (
        ValueError,
        lambda: fit(token_mask=jnp.zeros((40,), bool)),
        "only padding",
    ),
    "target at min": (ValueError, lambda: fit(target=1.0), "between min_k=1.*got 1.0"),
    "target above max": (ValueError, lambda: fit(target=3.5), "max_k=3, got 3.5"),
    "fit_thresholds: target": (
        ValueError,
        lambda: fit_thresholds(np.linspace(0, 1, 9), min_k=1, max_k=2, target_mean_k=2.0),
        "got 2.0",
    ),
    "fit of a rule without a budget": (
        TypeError,
        lambda: fit(router=ROUTER),
        "got TopK.*Use one of .*DynamicK.*TopAny",
    ),
    # --- dispatch
    "capacity of 0": (ValueError, lambda: plan(capacity=0), "capacity.*got 0"),
    "row budget of 0": (ValueError, lambda: plan(max_rows=0), "max_rows.*got 0"),
    "row budget below T": (ValueError, lambda: plan(max_rows=T - 1), "at least T=6.*got 5"),
    "priority unknown": (
        ValueError,
        lambda: plan(priority="best"),
        "'order', 'choice', got 'best'",
    ),
    "capacity factor of 0": (ValueError, lambda: layer(capacity_factor=0.0), "got 0.0"),
    "negative capacity factor": (ValueError, lambda: expert_capacity(4, 4, 1, -1.0), "got -1.0"),
    "renormalised expert choice": (ValueError, expert_choice_weights, "got expert choice"),
    # --- experts
    "implementation unknown": (
        ValueError,
        lambda: layer(implementation="fast"),
        r"'dense'.*got \['fast'\]",
    ),
    "every implementation refuses": (
        ValueError,
        lambda: layer(implementation=("capacity",)),
        "has no capacity",
    ),
    "fewer experts than the router has": (
        ValueError,
        lambda: layer(params=stacked_wrong),
        "E=4, got 3",
    ),
    "experts of different numbers": (ValueError, lambda: layer(params=ragged_axes), r"\[3, 4\]"),
    "experts given other tokens": (
        ValueError,
        lambda: run_experts(
            FFN,
            FFN.init(jax.random.key(0), num_experts=E, d_model=D, d_ff=4),
            jnp.ones((T + 2, D)),
            plan(),
            kept_weights(plan()),
        ),
        "T=6.*got float32",
    ),
    "activation unknown": (ValueError, lambda: FeedForward(activation="swish"), "'silu'"),
    "all that a layer reports as its statistics": (
        TypeError,
        lambda: ROUTER.update(ROUTER.init_state(), layer()[1]),
        "got a LayerAux.*aux.stats",
    ),
    "the same to a rule that learns nothing so": (
        TypeError,
        lambda: RandomSkip(num_experts=4, k=2, mean_k=1.5).update(None, layer()[1]),
        "got a LayerAux.*aux.stats",
    ),
    # --- losses and reports
    "sequence length that does not divide T": (
        ValueError,
        lambda: aux_loss(routing(), LossWeights(), sequence_length=4),
        "divisor of T=6, got 4",
    ),
    "baseline unknown": (ValueError, lambda: report(baseline="best"), "'trained_k'.*got 'best'"),
    "trained k not given": (ValueError, lambda: report(baseline="trained_k"), "got None"),
    # --- keys, states, parameters and context of a router
    "seed instead of a key": (
        TypeError,
        lambda: route(key=0),
        r"key: expected one JAX key.*got 0.*key\(0\)",
    ),
    "several keys": (
        TypeError,
        lambda: route(key=jax.random.split(jax.random.key(0), 3)),
        r"got key<fry>\[3\]",
    ),
    "seed to init": (TypeError, lambda: ROUTER.init(0, D), "one JAX key, got 0"),
    "no key to init": (TypeError, lambda: ROUTER.init(None, D), "one JAX key, got None"),
    "width as a float": (
        TypeError,
        lambda: ROUTER.init(jax.random.key(0), 8.0),
        "d_model.*got 8.0",
    ),
    "width of 0": (
        ValueError,
        lambda: ROUTER.init(jax.random.key(0), 0),
        "d_model.*at least 1, got 0",
    ),
    "no state": (
        TypeError,
        lambda: route(state=None),
        "state: expected a BiasState.*got a NoneType",
    ),
    "parameters as the state": (
        TypeError,
        lambda: route(state=ROUTER.init(jax.random.key(0), D)),
        "BiasState.*got a dict",
    ),
    "state of another rule": (
        TypeError,
        lambda: route(state=TopP(num_experts=E).init_state()),
        "BiasState.*got a TopPState",
    ),
    "state of other experts": (
        ValueError,
        lambda: route(state=TopK(num_experts=8, k=2).init_state()),
        r"expert_bias of shape \[8\] instead of \[4\]",
    ),
    "state fitted for another k": (
        ValueError,
        lambda: dataclasses.replace(DYNAMIC, max_k=2)(
            DYNAMIC.init(jax.random.key(0), D), DYNAMIC.init_state(), X
        ),
        r"thresholds of shape \[2\] instead of \[1\].*calibrate again",
    ),
    "update of another rule's state": (
        TypeError,
        lambda: TopP(num_experts=E).update(ROUTER.init_state(), routing_stats(routing(), plan())),
        "expected a TopPState.*got a BiasState",
    ),
    "observe with another rule's state": (
        TypeError,
        lambda: ROUTER.observe(DYNAMIC.init_state(), routing()),
        "got a DynamicKState",
    ),
    "regularization with another rule's state": (
        TypeError,
        lambda: ROUTER.regularization({}, DYNAMIC.init_state(), routing()),
        "got a DynamicKState",
    ),
    "the layer's parameters": (
        ValueError,
        lambda: route(params=layer_params()),
        r"got experts, router\..*params\['router'\]",
    ),
    "no parameters": (ValueError, lambda: route(params=None), "with kernel, got a NoneType"),
    "parameters of a gate with a bias": (
        ValueError,
        lambda: route(
            params=TopK(num_experts=E, k=2, gate=Gate(use_bias=True)).init(jax.random.key(0), D)
        ),
        "no 'bias' for a gate without use_bias=True",
    ),
    "parameters of a gate without a bias": (
        ValueError,
        lambda: TopK(num_experts=E, k=2, gate=Gate(use_bias=True))(
            ROUTER.init(jax.random.key(0), D), ROUTER.init_state(), X
        ),
        "with kernel, bias, got kernel",
    ),
    "parameters of other experts": (
        ValueError,
        lambda: route(params=TopK(num_experts=6, k=2).init(jax.random.key(0), D)),
        "for 4 classes of experts, got ones for 6",
    ),
    "expert choice with parameters of other experts": (
        ValueError,
        lambda: ExpertChoiceRouter(num_experts=E)(
            TopK(num_experts=6, k=2).init(jax.random.key(0), D),
            ExpertChoiceRouter(num_experts=E).init_state(),
            X,
        ),
        "4.*got ones for 6",
    ),
    "top-any without thresholds": (
        ValueError,
        lambda: TopAny(num_experts=E)(
            ROUTER.init(jax.random.key(0), D), TopAny(num_experts=E).init_state(), X
        ),
        "thresholds.*got kernel",
    ),
    "no expert scale": (
        ValueError,
        lambda: TopK(num_experts=E, k=2, use_expert_scale=True)(
            ROUTER.init(jax.random.key(0), D), ROUTER.init_state(), X
        ),
        "expert_scale.*got kernel",
    ),
    "context misspelt": (
        ValueError,
        lambda: dynamic("gradient_norm", gradient=X),
        "among.*gradients.*got gradient",
    ),
    "context of another rule misspelt": (
        ValueError,
        lambda: route(context={"router_state": X}),
        "router_states.*got router_state",
    ),
    "context that is an array": (TypeError, lambda: route(context=X), "mapping.*got float32"),
    "mask as a list": (TypeError, lambda: route(token_mask=[True] * T), "token_mask.*got a list"),
    "mask of integers": (
        TypeError,
        lambda: route(token_mask=jnp.ones((T,), jnp.int32)),
        "bool.*got int32",
    ),
    # --- numbers of rules
    "k as a float": (TypeError, lambda: TopK(num_experts=4, k=2.0), "k: .*got 2.0"),
    "k as a flag": (TypeError, lambda: TopK(num_experts=4, k=True), "k: .*got True"),
    "max as a float": (
        TypeError,
        lambda: DynamicK(num_experts=4, min_k=1, max_k=2.0),
        "^max_k: .*got 2.0",
    ),
    "min as a flag": (TypeError, lambda: TopAny(num_experts=4, min_k=True), "^min_k: .*got True"),
    "similarity for another rule": (
        TypeError,
        lambda: with_similarity(TopK(num_experts=4, k=2).init_state(), jnp.eye(4)),  # pyright: ignore
        "state: expected .*RerouteState",
    ),
    "share above 1": (
        ValueError,
        lambda: with_share(Elastic(num_experts=4, k=2).init_state(), 2.0),
        "0 <= share <= 1, got 2.0",
    ),
    "share as text": (
        TypeError,
        lambda: with_share(Elastic(num_experts=4, k=2).init_state(), "a"),  # pyright: ignore
        "share: expected a number, got 'a'",
    ),
    "band as text": (
        TypeError,
        lambda: DriftMonitor(static=0, dynamic=0, target_mean_k=1.0, band="a"),  # pyright: ignore
        "band: expected a number, got 'a'",
    ),
    "counts as text": (
        TypeError,
        lambda: batch_design_effect("abc", num_tokens=1),  # pyright: ignore[reportArgumentType]
        "counts: expected experts per token",
    ),
    "counts of two axes": (
        ValueError,
        lambda: batch_design_effect(np.ones((4, 4)), num_tokens=2),
        r"counts: expected finite numbers \[M\], got float64\[4, 4\]",
    ),
    "counts with NaN": (
        ValueError,
        lambda: batch_design_effect(np.array([1.0, np.nan, 2.0, 1.0]), num_tokens=2),
        "with NaN or inf",
    ),
    "endless step": (
        ValueError,
        lambda: ReLURouter(num_experts=4, target_k=1.0, step=float("inf")),
        "step: expected a finite number, got inf",
    ),
    "endless tolerance": (
        ValueError,
        lambda: Sinkhorn(num_experts=4, k=1, tolerance=float("inf")),
        "tolerance: expected a finite number, got inf",
    ),
    "endless temperature": (
        ValueError,
        lambda: Cosine(num_experts=4, k=1, initial_temperature=float("inf")),
        "initial_temperature: expected a finite number, got inf",
    ),
    "p as text": (TypeError, lambda: TopP(num_experts=4, p="0.4"), "p: .*got '0.4'"),
    "p that is none": (ValueError, lambda: TopP(num_experts=4, p=float("nan")), "p: .*got nan"),
    "gain as text": (TypeError, lambda: TopP(num_experts=4, kp="0.1"), "kp: .*got '0.1'"),
    "gain that is none": (
        ValueError,
        lambda: TopP(num_experts=4, ki=float("nan")),
        "ki: .*got nan",
    ),
    "steered target as text": (
        TypeError,
        lambda: TopP(num_experts=4, target_mean_k="2"),
        "target_mean_k: .*got '2'",
    ),
    "ratio as an array": (
        TypeError,
        lambda: MinP(num_experts=4, ratio=jnp.ones(2)),
        r"float32\[2\]",
    ),
    "random mean as text": (
        TypeError,
        lambda: RandomSkip(num_experts=4, k=2, mean_k="1.5"),
        "mean_k: .*got '1.5'",
    ),
    "gate by name": (
        TypeError,
        lambda: TopK(num_experts=4, k=2, gate="linear"),
        "Gate, got 'linear'",
    ),
    "no gate": (TypeError, lambda: ExpertChoiceRouter(num_experts=4, gate=None), "Gate, got None"),
    "scoring by name": (
        TypeError,
        lambda: TopK(num_experts=4, k=2, scoring="softmax"),
        "Scoring, got 'softmax'",
    ),
    "scale of experts as text": (
        TypeError,
        lambda: TopK(num_experts=4, k=2, use_expert_scale="yes"),
        "True or False, got 'yes'",
    ),
    "difficulty at construction": (
        ValueError,
        lambda: DynamicK(num_experts=4, min_k=1, max_k=2, difficulty="norm"),
        "got 'norm'",
    ),
    # --- gate and scoring
    "jitter below 0": (ValueError, lambda: Gate(jitter=-0.1), "jitter.*got -0.1"),
    "jitter as text": (TypeError, lambda: Gate(jitter="0.1"), "jitter: .*got '0.1'"),
    "noise as text": (TypeError, lambda: Gate(noise="1"), "noise: .*got '1'"),
    "noise that is none": (ValueError, lambda: Gate(noise=float("nan")), "noise: .*got nan"),
    "softcap as text": (TypeError, lambda: Gate(softcap="30"), "softcap: .*got '30'"),
    "multiplier as text": (TypeError, lambda: Gate(multiplier="2"), "multiplier: .*got '2'"),
    "multiplier without bound": (ValueError, lambda: Gate(multiplier=float("inf")), "got inf"),
    "eps as text": (TypeError, lambda: Gate(input_norm_eps="1e-6"), "input_norm_eps: .*'1e-6'"),
    "bias as text": (TypeError, lambda: Gate(use_bias="no"), "use_bias: .*got 'no'"),
    "disabled expert as a number": (
        TypeError,
        lambda: Gate(disabled_experts=3),
        r"tuple.*got 3.*\(3,\)",
    ),
    "disabled experts as a list": (
        TypeError,
        lambda: Gate(disabled_experts=[0, 1]),
        r"got \[0, 1\]",
    ),
    "disabled experts as floats": (
        TypeError,
        lambda: Gate(disabled_experts=(1.0,)),
        r"got \(1.0,\)",
    ),
    "more experts than are enabled": (
        ValueError,
        lambda: TopK(num_experts=4, k=3, gate=Gate(disabled_experts=(0, 1))),
        "at most 2.*got 3",
    ),
    "weight scale as text": (TypeError, lambda: Scoring(scale="2.5"), "scale: .*got '2.5'"),
    "weight scale that is none": (
        ValueError,
        lambda: Scoring(scale=float("nan")),
        "scale: .*got nan",
    ),
    "norm eps below 0": (ValueError, lambda: Scoring(norm_eps=-1.0), "norm_eps.*got -1.0"),
    "norm p as text": (TypeError, lambda: Scoring(norm="p", norm_p="2"), "norm_p: .*got '2'"),
    "groups as a float": (TypeError, lambda: Scoring(num_groups=2.0), "num_groups: .*got 2.0"),
    "groups of 0": (ValueError, lambda: Scoring(num_groups=0), "num_groups: .*got 0"),
    "norm of None": (ValueError, lambda: Scoring(norm=None), "'none'.*got None"),
    # --- calibration
    "fit under jit": (
        TypeError,
        lambda: jax.jit(lambda x: fit(x).thresholds)(jnp.ones((40, D))),
        "outside jit",
    ),
    "fit target as text": (TypeError, lambda: fit(target="1.5"), "target_mean_k: .*got '1.5'"),
    "fit target that is none": (
        ValueError,
        lambda: fit(target=float("nan")),
        "target_mean_k: .*nan",
    ),
    "fit target as an array": (
        TypeError,
        lambda: fit(target=jnp.float32(1.5)),
        r"target_mean_k: .*got float32\[\]",
    ),
    "fit on sequences": (
        ValueError,
        lambda: fit(jnp.ones((4, 10, D))),
        r"float\[T, D\], got float32\[4, 10, 8\]",
    ),
    "fit on integers": (TypeError, lambda: fit(jnp.ones((40, D), jnp.int32)), "got int32"),
    "fit with a mask of floats": (
        TypeError,
        lambda: fit(token_mask=jnp.ones((40,))),
        "token_mask.*got float32",
    ),
    "fit with a mask of another length": (
        ValueError,
        lambda: fit(token_mask=jnp.ones((4,), bool)),
        r"bool\[T=40\], got bool\[4\]",
    ),
    "fit_thresholds: NaN": (
        ValueError,
        lambda: fit_thresholds(np.array([0.1, np.nan]), min_k=1, max_k=3, target_mean_k=2.0),
        r"finite numbers in \[0, 1\]",
    ),
    "fit_thresholds: raw scores": (
        ValueError,
        lambda: fit_thresholds(np.array([0.1, 7.0]), min_k=1, max_k=3, target_mean_k=2.0),
        r"in \[0, 1\], got 0.1 to 7.*calibrated_difficulty",
    ),
    "fit_thresholds: no tokens": (
        ValueError,
        lambda: fit_thresholds(np.array([]), min_k=1, max_k=3, target_mean_k=2.0),
        r"got float64\[0\]",
    ),
    "row budget: histogram that sums to 2": (
        ValueError,
        lambda: row_budget(np.array([1.0, 1.0]), num_tokens=8),
        "sum 2",
    ),
    "row budget: negative share": (
        ValueError,
        lambda: row_budget(np.array([-0.5, 1.5]), num_tokens=8),
        "at least 0",
    ),
    "row budget: text": (TypeError, lambda: row_budget("all", num_tokens=8), "got 'all'"),
    "row budget: tokens as a float": (
        TypeError,
        lambda: row_budget(np.array([0.0, 1.0]), num_tokens=8.5),
        "num_tokens.*got 8.5",
    ),
    "row budget: no tokens": (
        ValueError,
        lambda: row_budget(np.array([0.0, 1.0]), num_tokens=0),
        "num_tokens.*got 0",
    ),
    "row budget: probability as text": (
        TypeError,
        lambda: row_budget(np.array([0.0, 1.0]), num_tokens=8, overflow_probability="0.1"),
        "overflow_probability.*'0.1'",
    ),
    "row budget: negative effect": (
        ValueError,
        lambda: row_budget(np.array([0.0, 1.0]), num_tokens=8, design_effect=-1.0),
        "design_effect.*got -1.0",
    ),
    # --- dispatch, losses, reports
    "capacity factor as text": (
        TypeError,
        lambda: expert_capacity(4, 4, 1, "1.25"),
        "capacity_factor: .*got '1.25'",
    ),
    "capacity factor without bound": (
        ValueError,
        lambda: expert_capacity(4, 4, 1, float("inf")),
        "capacity_factor.*got inf",
    ),
    "capacity factor that is none": (
        ValueError,
        lambda: expert_capacity(4, 4, 1, float("nan")),
        "capacity_factor.*got nan",
    ),
    "capacity of a fraction of a token": (
        TypeError,
        lambda: expert_capacity(4.5, 4, 1, 1.0),
        "num_tokens: .*got 4.5",
    ),
    "capacity without experts": (
        ValueError,
        lambda: expert_capacity(4, 0, 1, 1.0),
        "num_experts: .*got 0",
    ),
    "capacity as a float": (TypeError, lambda: plan(capacity=2.5), "capacity: .*got 2.5"),
    "row budget as text": (TypeError, lambda: plan(max_rows="8"), "max_rows: .*got '8'"),
    "priority of None": (ValueError, lambda: plan(priority=None), "'choice', got None"),
    "plan of a routing": (
        TypeError,
        lambda: plan_dispatch(routing()),
        r"Assignments, got a Routing.*to_assignments",
    ),
    "plan in groups as text": (
        TypeError,
        lambda: plan_in_groups(to_assignments(routing()), "2"),
        "groups: .*got '2'",
    ),
    "plan in no group": (
        ValueError,
        lambda: plan_in_groups(to_assignments(routing()), 0),
        "groups: .*got 0",
    ),
    "assignments of a layer's report": (
        TypeError,
        lambda: to_assignments(layer()[1]),
        "got a LayerAux.*aux.routing",
    ),
    "weights of a routing": (
        TypeError,
        lambda: kept_weights(routing()),
        "DispatchPlan, got a Routing",
    ),
    "statistics of assignments": (
        TypeError,
        lambda: routing_stats(routing(), to_assignments(routing())),
        "DispatchPlan, got a Assignments",
    ),
    "statistics of a layer's report": (
        TypeError,
        lambda: routing_stats(layer()[1], plan()),
        "got a LayerAux.*aux.routing",
    ),
    "observed of other experts": (
        ValueError,
        lambda: routing_stats(routing(), plan(), observed=jnp.zeros(3)),
        r"E=4\], got float32\[3\]",
    ),
    "merged without a list": (
        TypeError,
        lambda: merge_stats(routing_stats(routing(), plan())),
        r"merge_stats\(\[stats\]\)",
    ),
    "merged reports": (TypeError, lambda: merge_stats([layer()[1]]), "got a LayerAux"),
    "loss of a layer's report": (
        TypeError,
        lambda: aux_loss(layer()[1], LossWeights()),
        "got a LayerAux.*aux.routing",
    ),
    "z-loss of a layer's report": (TypeError, lambda: router_z_loss(layer()[1]), "got a LayerAux"),
    "loss with a number as weights": (
        TypeError,
        lambda: aux_loss(routing(), 0.01),
        "LossWeights, got 0.01",
    ),
    "loss weight as text": (TypeError, lambda: LossWeights(router_z="1e-3"), "router_z: .*'1e-3'"),
    "loss weight that is none": (
        ValueError,
        lambda: LossWeights(entropy=float("nan")),
        "entropy: .*got nan",
    ),
    "sequence length as a float": (
        TypeError,
        lambda: aux_loss(routing(), LossWeights(), sequence_length=3.0),
        "sequence_length: .*got 3.0",
    ),
    "sequence length of 0": (
        ValueError,
        lambda: aux_loss(routing(), LossWeights(), sequence_length=0),
        "sequence_length: .*got 0",
    ),
    "relu loss without a target": (
        ValueError,
        lambda: relu_l1_loss(routing(), target_k=0),
        "target_k: .*got 0",
    ),
    "report of a layer": (
        TypeError,
        lambda: flops_report(layer()[1], baseline="dense", d_model=8, flops_per_row=1, max_k=2),
        "got a LayerAux.*aux.stats",
    ),
    "report with costs as text": (
        TypeError,
        lambda: flops_report(
            routing_stats(routing(), plan()),
            baseline="dense",
            d_model=8,
            flops_per_row="9",
            max_k=2,
        ),
        "flops_per_row: .*got '9'",
    ),
    "report against k of 0": (
        ValueError,
        lambda: report(baseline="trained_k", trained_k=0),
        "trained_k: .*got 0",
    ),
    "estimator that is no function": (
        TypeError,
        lambda: register_estimator("mine", 3),
        "function .*got a int",
    ),
    "estimator without a name": (
        TypeError,
        lambda: register_estimator(3, lambda x, c: x[:, 0]),
        "estimator name: .*got 3",
    ),
    "router kind that is a number": (ValueError, lambda: router_from_json({"kind": 3}), "got 3"),
    # --- routers as data
    "router kind unknown": (
        ValueError,
        lambda: router_from_json({"kind": "Top2"}),
        "got 'Top2'. Did you mean TopP or TopK",
    ),
    "router kind missing": (ValueError, lambda: router_from_json({"num_experts": 4}), "got None"),
    "router field unknown": (
        ValueError,
        lambda: router_from_json({"kind": "TopK", "num_experts": 4, "k": 2, "topk": 2}),
        "num_experts, k.*got topk",
    ),
    "router field unknown inside": (
        ValueError,
        lambda: router_from_json({"kind": "TopK", "num_experts": 4, "k": 2, "gate": {"bias": 1}}),
        "use_bias.*got bias",
    ),
    "router field missing": (
        ValueError,
        lambda: router_from_json({"kind": "TopK", "num_experts": 4}),
        r"\['num_experts'\].*'k'",
    ),
    "router field of the wrong kind": (
        ValueError,
        lambda: router_from_json({"kind": "TopK", "num_experts": 4, "k": 2, "scoring": "softmax"}),
        "scoring.*softmax",
    ),
    "router field of the wrong type": (
        ValueError,
        lambda: router_from_json({"kind": "TopK", "num_experts": 4, "k": "two"}),
        "TopK.*correct its type",
    ),
    "router field that should be plain": (
        ValueError,
        lambda: router_from_json({"kind": "TopK", "num_experts": 4, "k": {"min": 1}}),
        "TopK.k: expected a plain value",
    ),
    "router that is no object": (ValueError, lambda: router_from_json(["TopK"]), "got a list"),
}


@pytest.mark.parametrize("case", list(TABLE))
def test_refusals_say_expected_got_and_what_to_do(case):
    error, cause, words = TABLE[case]
    with pytest.raises(error) as caught:
        cause()
    message = str(caught.value)
    assert type(caught.value) is error
    assert re.search(words, message, re.DOTALL), message
    parts = re.search(r"expected (.+?)\bgot (.+)", message, re.DOTALL)
    assert parts, f"expected and got: {message}"
    # What to do: a sentence after the one that says what came.
    assert re.search(r"[.?)] ?[A-Z(0-9].*[.?)]$", parts[2], re.DOTALL), f"what to do: {message}"


def test_values_are_checked_before_anything_is_compiled():
    """The same refusals under ``jit``: shapes are known at trace time."""
    with pytest.raises(ValueError, match="x: expected"):
        jax.jit(layer)(jnp.ones((T, D + 1)))
    with pytest.raises(TypeError, match="x: expected"):
        jax.eval_shape(layer, jax.ShapeDtypeStruct((T, D), jnp.int32))


def test_a_good_router_is_not_refused():
    for router in (ROUTER, dataclasses.replace(ROUTER, k=E)):
        assert router_from_json(router.to_json()) == router
