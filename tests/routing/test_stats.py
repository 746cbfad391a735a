"""Statistics and the FLOPs report (R15, R16)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import TopK, flops_report, plan_dispatch, routing_stats, to_assignments
from moe_jax.routing.stats import load_balance_score


def stats_of(tokens: int = 10, k: int = 2, *, executed: float | None = None, **bounds):
    router = TopK(num_experts=4, k=k)
    params, state = router.init(jax.random.key(0), 8), router.init_state()
    routing = router(params, state, jax.random.normal(jax.random.key(1), (tokens, 8)))
    plan = plan_dispatch(to_assignments(routing), **bounds)
    slots = None if executed is None else jnp.float32(executed)
    return routing_stats(routing, plan, slots_executed=slots)


# 10 tokens at k = 2; a row costs 100; the router costs 2 * 8 * 4 = 64 a token.
ROUTER = 10 * 64


@pytest.mark.parametrize(
    ("baseline", "flops"),
    [
        ("trained_k", 10 * 3 * 100 + ROUTER),
        ("top_max", 10 * 4 * 100 + ROUTER),
        ("dense", 10 * 4 * 100),  # every expert on every token has nothing to choose
    ],
)
def test_every_baseline_by_hand(baseline, flops):
    report = flops_report(
        stats_of(executed=24.0),
        baseline=baseline,
        d_model=8,
        flops_per_row=100,
        max_k=4,
        trained_k=3,
        estimator_flops_per_token=5.0,
    )
    assert report.baseline_flops == flops
    assert report.router_flops == ROUTER
    assert report.estimator_flops == 50
    assert report.used_flops == 20 * 100 + ROUTER + 50
    assert report.executed_flops == 24 * 100 + ROUTER + 50
    assert report.saving_used == 1 - report.used_flops / flops
    assert report.saving_executed < report.saving_used
    assert baseline in report.summary()
    assert "used" in report.summary()
    assert "executed" in report.summary()


def test_a_baseline_is_required():
    with pytest.raises(TypeError, match="baseline"):
        flops_report(stats_of(), d_model=8, flops_per_row=100, max_k=2)


def test_running_at_the_trained_k_saves_nothing():
    report = flops_report(
        stats_of(), baseline="trained_k", d_model=8, flops_per_row=100, max_k=2, trained_k=2
    )
    assert report.saving_used == report.saving_executed == 0.0


def test_load_balance_score_by_hand():
    assert float(load_balance_score(jnp.array([5.0, 5.0, 5.0, 5.0]))) == 1.0
    assert float(load_balance_score(jnp.array([9.0, 0.0, 0.0, 0.0]))) == 0.25  # 1 / E
    load = np.array([1.0, 2.0, 3.0, 4.0])
    cv = load.std() / load.mean()
    np.testing.assert_allclose(load_balance_score(jnp.asarray(load, jnp.float32)), 1 / (1 + cv**2))
    assert float(load_balance_score(jnp.zeros(4))) == 1.0


@pytest.mark.parametrize("factor", [2.0, 100.0, 1e6])
def test_load_balance_score_does_not_depend_on_the_batch_size(factor):
    load = jnp.array([1.0, 2.0, 3.0, 10.0])
    np.testing.assert_allclose(
        load_balance_score(factor * load), load_balance_score(load), rtol=1e-5
    )


def test_drops_are_counted_against_what_was_asked():
    stats = stats_of(tokens=10, k=2, max_rows=12)
    np.testing.assert_allclose(stats.dropped_fraction, 8 / 20, rtol=1e-6)
    assert float(stats.slots_used) == float(stats.slots_executed) == 12
    assert float(stats.mean_experts_per_token) == 2, "what was asked, before drops"
    assert float(stats.tokens_per_expert.sum()) == 20
