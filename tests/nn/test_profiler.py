"""FLOPProfiler counts what XLA counts, names its baseline, and leaves the model as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax.nn.nnx import DynamicMoE, MoE
from moe_jax.nn.profiler import FLOPProfiler

D, F, E, T = 64, 256, 8, 96
FFN = moe_jax.FeedForward(activation="relu", gated=True)


class Model(nnx.Module):
    def __init__(self, rngs):
        router = moe_jax.TopK(num_experts=E, k=2)
        common = {"d_model": D, "d_ff": F, "expert_fn": FFN, "rngs": rngs}
        self.first = MoE(router, **common)
        self.second = DynamicMoE(E, max_k=3, **common)

    def __call__(self, x):
        return self.second(x + self.first(x))


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (T, D))


def test_the_dense_oracle_costs_what_xla_says_within_two_percent(x):
    layer = MoE(
        moe_jax.TopK(num_experts=E, k=2),
        d_model=D,
        d_ff=F,
        expert_fn=FFN,
        rngs=nnx.Rngs(0),
        implementation="dense",
    )
    with FLOPProfiler(layer, baseline="dense") as profiler:
        layer(x)
    params, state = layer.params(), layer.router_state.get_value()

    def pure(params, x):
        options = layer.spec.options
        y, _ = moe_jax.moe_layer(layer.spec.router, FFN, params, state, x, options=options)
        return y

    counted = jax.jit(pure).lower(params, x).compile().cost_analysis()["flops"]
    assert profiler.total.executed_flops == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("jit", [False, True])
def test_every_layer_is_watched_inside_jit_or_not(x, jit):
    model = Model(nnx.Rngs(0))
    call = nnx.jit(lambda m, x: m(x)) if jit else (lambda m, x: m(x))
    plain = call(model, x)
    with FLOPProfiler(model, baseline="trained_k", trained_k=2) as profiler:
        watched = call(model, x)
    np.testing.assert_allclose(watched, plain, rtol=1e-6, atol=1e-6)
    assert list(profiler.per_layer) == ["first", "second"]
    first = profiler.per_layer["first"]
    assert first.used_flops == T * (2 * FFN.flops_per_row(D, F) + 2 * D * E)
    assert first.saving_used == 0.0
    assert profiler.total.baseline == "trained_k=2"
    assert "total" in profiler.summary()
    # Afterwards nothing is watched, and the layers are what they were.
    assert type(model.first) is MoE
    before = profiler.total.used_flops
    call(model, x)
    jax.effects_barrier()
    assert profiler.total.used_flops == before


def test_a_shared_expert_is_a_cost_of_both_sides(x):
    layer = MoE(
        moe_jax.TopK(num_experts=E, k=2),
        d_model=D,
        d_ff=F,
        shared_d_ff=32,
        expert_fn=FFN,
        rngs=nnx.Rngs(0),
    )
    with FLOPProfiler(layer, baseline="top_max") as profiler:
        layer(x)
    shared = T * FFN.flops_per_row(D, 32)
    report = profiler.total
    assert report.used_flops == T * (2 * FFN.flops_per_row(D, F) + 2 * D * E) + shared
    assert report.saving_used == 0.0


def test_experts_of_ones_own_are_counted_by_xla(x):
    layer = MoE(
        moe_jax.TopK(num_experts=E, k=2),
        d_model=D,
        rngs=nnx.Rngs(0),
        expert_fn=lambda p, rows: rows @ p["w"],
        expert_init=lambda key, n: {"w": jax.random.normal(key, (n, D, D))},
    )
    assert layer.spec.flops_per_row() == pytest.approx(2 * D * D, rel=0.01)


def test_pure_functions_report_by_hand(x):
    router = moe_jax.TopK(num_experts=E, k=2)
    params = moe_jax.init_moe_layer(router, FFN, jax.random.key(0), d_model=D, d_ff=F)
    _, aux = moe_jax.moe_layer(router, FFN, params, router.init_state(), x)
    with FLOPProfiler(baseline="dense") as profiler:
        profiler.record(
            "layer", aux.stats, d_model=D, max_k=2, flops_per_row=FFN.flops_per_row(D, F)
        )
    assert profiler.total.saving_used == pytest.approx(1 - 2 / E, abs=0.01)


def test_a_budget_is_a_baseline_and_unfitted_layers_are_named(x):
    layer = DynamicMoE(E, max_k=3, d_model=D, d_ff=F, expert_fn=FFN, rngs=nnx.Rngs(0))
    with FLOPProfiler(layer, baseline="mean_k", mean_k=1.5) as profiler:
        layer(x)
    assert profiler.total.baseline == "mean_k=1.5"
    assert profiler.total.baseline_flops == T * (1.5 * FFN.flops_per_row(D, F) + 2 * D * E)
    assert "not calibrated: model" in profiler.summary()
    layer.fit_router(x, target_mean_k=1.5)
    with FLOPProfiler(layer, baseline="mean_k", mean_k=1.5) as profiler:
        layer(x)
    assert abs(profiler.total.saving_used) < 0.02
    assert "not calibrated" not in profiler.summary()
    with pytest.raises(ValueError, match="mean_k: expected experts per token above 0"):
        FLOPProfiler(baseline="mean_k").record(
            "layer", _stats(), d_model=4, max_k=2, flops_per_row=1.0
        )


def test_a_baseline_must_be_named_and_known():
    with pytest.raises(TypeError):
        FLOPProfiler()
    with pytest.raises(ValueError, match="baseline"):
        FLOPProfiler(baseline="before")
    with pytest.raises(ValueError, match="trained_k"), FLOPProfiler(baseline="trained_k") as p:
        p.record("layer", _stats(), d_model=4, max_k=2, flops_per_row=1.0)
    with pytest.raises(ValueError, match="got none"):
        _ = FLOPProfiler(baseline="dense").total
    with pytest.raises(ValueError, match="without any"):
        FLOPProfiler(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), baseline="dense").__enter__()


def _stats():
    router = moe_jax.TopK(num_experts=4, k=2)
    routing = router(router.init(jax.random.key(0), 4), router.init_state(), jnp.ones((3, 4)))
    plan = moe_jax.plan_dispatch(moe_jax.to_assignments(routing))
    return moe_jax.routing_stats(routing, plan)
