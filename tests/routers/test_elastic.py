"""Elastic budgets: how they are drawn, scheduled, taught and served."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import Elastic, MinP, RandomSecond, Schedule, TopK, distillation_loss, with_share

E, K, D, T = 8, 4, 16, 512
X = jax.random.normal(jax.random.key(1), (T, D), jnp.float32)


@partial(jax.jit, static_argnums=0)
def route(router, params, state, x, key=None):
    return router(params, state, x, key=key)


def built(**options):
    router = Elastic(num_experts=E, k=K, **options)
    params = router.init(jax.random.key(0), D)
    return router, {"kernel": 2.0 * params["kernel"]}, router.init_state()


def test_a_token_that_draws_nothing_is_routed_as_by_top_k():
    router, params, state = built()
    trained = TopK(num_experts=E, k=K)
    want = trained(params, trained.init_state(), X)
    got = route(router, params, state, X)
    np.testing.assert_array_equal(got.expert_indices, want.expert_indices)
    np.testing.assert_allclose(got.combine_weights, want.combine_weights, rtol=1e-6)


@pytest.mark.parametrize("min_k", [1, 2])
def test_drawn_k_is_uniform(min_k):
    router, params, state = built(share=1.0, min_k=min_k)
    k = np.asarray(route(router, params, state, X).num_experts_per_token)
    counts = np.bincount(k, minlength=K + 1)
    assert not counts[:min_k].any()
    even = T / (K - min_k + 1)
    assert np.abs(counts[min_k:] - even).max() < 4 * even**0.5


def test_the_share_of_tokens_that_draw_is_the_states():
    router, params, state = built()
    k = np.asarray(route(router, params, with_share(state, 0.4), X).num_experts_per_token)
    # A quarter of those who draw from 1..4 draw 4.
    assert abs((k < K).mean() - 0.4 * 0.75) < 0.07


def test_a_key_draws_anew_and_the_hash_does_not():
    router, params, state = built(share=1.0)
    k = [
        np.asarray(route(router, params, state, X, key).num_experts_per_token)
        for key in (None, None, jax.random.key(0), jax.random.key(1))
    ]
    assert (k[0] == k[1]).all()
    assert (k[0] != k[2]).any()
    assert (k[2] != k[3]).any()


def test_a_fitted_cutoff_is_min_p_exactly():
    router, params, state = built(draw="min_p", share=1.0)
    state = router.fit(params, state, X, target_mean_k=2.5)
    assert float(state.share) == 0.0
    served = MinP(num_experts=E, max_k=K)
    want = served(params, dataclasses.replace(served.init_state(), ratio=state.level), X)
    got = route(router, params, state, X)
    np.testing.assert_array_equal(got.expert_indices, want.expert_indices)
    assert abs(float(got.num_experts_per_token.mean()) - 2.5) < 0.01


def test_rescaled_weights_sum_to_the_weights_of_all_k():
    router, params, state = built(share=1.0, rescale=True)
    plain = dataclasses.replace(router, rescale=False, share=0.0)
    whole = plain(params, plain.init_state(), X).combine_weights.sum(axis=1)
    got = route(router, params, state, X)
    assert int(got.num_experts_per_token.min()) == 1
    np.testing.assert_allclose(got.combine_weights.sum(axis=1), whole, rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_a_random_second_expert_is_as_likely_as_its_weight_says(threshold):
    router = RandomSecond(num_experts=2, threshold=threshold)
    # Two experts of probability 0.85 and 0.15, for all tokens.
    params = {"kernel": jnp.array([[float(np.log(0.85)), float(np.log(0.15))]])}
    x = jnp.ones((T, 1))
    k = [
        np.asarray(route(router, params, router.init_state(), x, key).num_experts_per_token)
        for key in (jax.random.key(0), None)
    ]
    assert abs((k[0] == 2).mean() - 0.15 / threshold) < 0.08
    assert len(set(k[1].tolist())) == 1  # equal tokens have equal hashes


def test_with_share_leaves_other_rules_alone():
    states = {"a": TopK(num_experts=E, k=2).init_state(), "b": built()[2]}
    changed = jax.jit(with_share)(states, 0.25)
    assert float(changed["b"].share) == 0.25
    np.testing.assert_array_equal(changed["a"].expert_bias, states["a"].expert_bias)


def test_schedules_rise_when_they_say():
    steps = np.arange(10)
    late = [float(Schedule(share=0.5, start=0.7).share_at(s, 10)) for s in steps]
    assert late == [0.0] * 7 + [0.5] * 3
    ramp = [float(Schedule(start=0.2, ramp=0.4).share_at(s, 10)) for s in steps]
    np.testing.assert_allclose(ramp, np.clip((steps - 2) / 4, 0, 1), atol=1e-6)
    with pytest.raises(ValueError, match=r"start: expected a part between 0 and 1, got 70"):
        Schedule(start=70.0)


def test_distillation_is_zero_where_equal_and_teaches_the_student_alone():
    a, b = jax.random.normal(jax.random.key(2), (2, 3, 5))
    log_p, log_q = (np.asarray(jax.nn.log_softmax(v)) for v in (b, a))
    want = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    np.testing.assert_allclose(distillation_loss(a, b), want.mean(), rtol=1e-5)
    mask = jnp.array([True, False, False])
    np.testing.assert_allclose(distillation_loss(a, b, mask), want[0], rtol=1e-5)
    student, teacher = jax.grad(distillation_loss, argnums=(0, 1))(a, b)
    assert np.abs(student).max() > 0
    assert not np.asarray(teacher).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_k": 0}, "min_k: expected at least 1"),
        ({"share": 1.5}, "share: expected 0 <= share <= 1"),
        ({"draw": "p"}, "draw: expected"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Elastic(num_experts=E, k=K, **options)
