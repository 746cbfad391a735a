"""Scores far from 0: shares, weights and gradients exist as far down as float32 reaches."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import Scoring, TopK, kept_weights, plan_dispatch, to_assignments
from moe_jax.routing.losses import entropy_loss, importance_loss, load_balancing_loss

T, E, K = 32, 8, 2
LOGITS = jax.random.normal(jax.random.key(0), (T, E), jnp.float32)
SHIFTS = (0.0, -40.0, -60.0, -100.0, -1000.0)


def route(scoring: Scoring, logits):
    router = TopK(num_experts=E, k=K, scoring=scoring)
    return router({"kernel": jnp.eye(E, dtype=jnp.float32)}, router.init_state(), logits)


@partial(jax.jit, static_argnums=(0, 1))
def loss_and_gradient(loss, scoring, logits):
    return jax.value_and_grad(lambda z: loss(route(scoring, z)))(logits)


def shares(score: str, logits) -> np.ndarray:
    """The shares in float64, by the leading term of log s where s itself would underflow."""
    z = np.asarray(logits, np.float64)
    log_s = -np.logaddexp(0, -z)  # sigmoid
    if score == "sqrtsoftplus":
        log_s = 0.5 * np.where(z < -30, z, np.log(np.logaddexp(0, np.maximum(z, -30))))
    log_s = log_s - log_s.max(axis=1, keepdims=True)
    return np.exp(log_s) / np.exp(log_s).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_probabilities_are_shares_however_low_the_logits(score, shift):
    scoring = Scoring(score=score)
    logits = LOGITS + shift
    got = scoring.probs(logits, scoring.scores(logits))
    np.testing.assert_allclose(got, shares(score, logits), rtol=3e-4, atol=1e-6)


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("loss", [load_balancing_loss, importance_loss, entropy_loss])
def test_losses_see_low_logits_and_push_back(score, loss):
    """At -100 all scores are 0 in float32, and the loss was 1 with gradient 0."""
    scoring = Scoring(score=score)
    high, slope = loss_and_gradient(loss, scoring, LOGITS - 40.0)
    for shift in (-60.0, -100.0, -1000.0):
        value, gradient = loss_and_gradient(loss, scoring, LOGITS + shift)
        np.testing.assert_allclose(value, high, rtol=1e-3)
        np.testing.assert_allclose(gradient, slope, rtol=2e-2, atol=1e-5)
        assert float(jnp.abs(gradient).max()) > 1e-4


def test_the_balance_loss_of_an_unbalanced_batch_is_above_1_at_every_level():
    values = [
        float(load_balancing_loss(route(Scoring(score="sigmoid"), LOGITS + s)))
        for s in (-60.0, -100.0)
    ]
    assert min(values) > 1.02
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_normalised_weights_sum_to_1_however_low_the_logits(score, shift):
    routing = route(Scoring(score=score, norm="sum"), LOGITS + shift)
    weights = np.asarray(routing.combine_weights)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)
    all_shares = shares(score, LOGITS + shift)
    want = np.take_along_axis(all_shares, np.asarray(routing.expert_indices), axis=1)
    want = want / want.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, want, rtol=1e-3)


@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(score="sigmoid", norm="sum"),
        Scoring(score="sigmoid", norm="sum_eps"),
        Scoring(score="sigmoid", norm="clamp"),
        Scoring(score="sigmoid", norm="p", norm_p=1.0),
        Scoring(score="sigmoid", norm="p", norm_p=2.0),
        Scoring(score="sqrtsoftplus", norm="sum"),
        Scoring(score="relu", norm="sum"),
    ],
    ids=lambda s: f"{s.score}-{s.norm}-{s.norm_p:g}",
)
def test_gradients_of_weights_are_finite_however_small_the_scores(scoring):
    """The derivative of s / sum(s) divides by the square of the sum, which underflows first."""
    levels = {"relu": (1e-12, 1e-25)}.get(scoring.score, SHIFTS)

    @jax.jit
    def gradient(logits):
        ramp = jnp.arange(1.0, K + 1.0)[None, :]
        return jax.grad(lambda z: (route(scoring, z).combine_weights * ramp).sum())(logits)

    for level in levels:
        logits = jnp.abs(LOGITS) * level if scoring.score == "relu" else LOGITS + level
        assert np.isfinite(np.asarray(gradient(logits))).all(), level


def test_weights_given_back_after_drops_have_finite_gradients():
    """``kept_weights(renormalize=True)`` divides sums of weights, tiny where logits are low."""

    @jax.jit
    def gradient(logits):
        def total(z):
            routing = route(Scoring(score="sigmoid"), z)
            plan = plan_dispatch(to_assignments(routing), capacity=4)
            weights = kept_weights(plan, renormalize=True)
            return (weights * jnp.cos(jnp.arange(T * K, dtype=jnp.float32))).sum()

        return jax.grad(total)(logits)

    for shift in (0.0, -45.0, -60.0):
        assert np.isfinite(np.asarray(gradient(LOGITS + shift))).all(), shift


def test_ordinary_weights_are_plain_quotients():
    """The guard against underflow moves no bit where nothing underflows."""
    s = jax.nn.sigmoid(LOGITS)[:, :K]
    keep = jnp.ones(s.shape, bool)
    got = Scoring(score="sigmoid", norm="sum").weights(s, keep, min_k=2, slot_logits=LOGITS[:, :K])
    np.testing.assert_array_equal(got, s / s.sum(axis=1, keepdims=True))
    got = Scoring(score="sigmoid", norm="sum_eps").weights(s, keep, min_k=2)
    np.testing.assert_array_equal(got, s / (s.sum(axis=1, keepdims=True) + 1e-20))
