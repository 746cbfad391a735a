"""Rules whose tokens compete, and cosine routing, on cases checked by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from moe_jax import BalancedAssignment, Cosine, Gate, MixtureOfDepths, Scoring, SeqTopK, Sinkhorn
from moe_jax.routing.losses import load_balancing_loss
from moe_jax.testing.case import expert_weights

T, E = 24, 4
IDENTITY = {"kernel": jnp.eye(E)}


def skewed_logits(tokens: int = T) -> np.ndarray:
    rng = np.random.default_rng(3)
    return (rng.normal(size=(tokens, E)) + np.array([1.5, 0.0, 0.0, -1.0])).astype(np.float32)


def test_sinkhorn_is_megatrons_iteration():
    """exp(logits) scaled over tokens and experts in turn to marginals 1 / T and 1 / E; then top-k."""
    logits = skewed_logits()
    plan = np.exp(np.float64(logits))
    by_expert = np.ones(E)
    for _ in range(300):
        by_token = 1 / (T * (plan * by_expert).sum(axis=1))
        by_expert = 1 / (E * (plan * by_token[:, None]).sum(axis=0))
    plan = plan * by_expert * by_token[:, None]
    router = Sinkhorn(num_experts=E, k=1, tolerance=1e-6)
    routing = router(IDENTITY, router.init_state(), jnp.asarray(logits))
    np.testing.assert_array_equal(routing.expert_indices[:, 0], plan.argmax(axis=1))
    probs = np.asarray(jax.nn.softmax(logits, axis=-1))
    np.testing.assert_allclose(
        expert_weights(routing).max(axis=1), probs[np.arange(T), plan.argmax(axis=1)], rtol=1e-6
    )
    load, plain = np.asarray(routing.expert_mask).sum(axis=0), np.bincount(logits.argmax(axis=1))
    assert load.max() < plain.max()


def test_sinkhorn_gives_a_disabled_expert_nothing_and_the_others_their_balance():
    router = Sinkhorn(num_experts=E, k=1, gate=Gate(disabled_experts=(0,)))
    routing = router(IDENTITY, router.init_state(), jnp.asarray(skewed_logits(300)))
    load = np.asarray(routing.expert_mask).sum(axis=0)
    assert load[0] == 0
    assert np.abs(load[1:] - 100).max() < 12


def test_the_auction_is_balanced_and_near_the_best_assignment():
    logits = skewed_logits()
    router = BalancedAssignment(num_experts=E, precision=0.001)
    routing = router(IDENTITY, router.init_state(), jnp.asarray(logits))
    expert = np.asarray(routing.expert_indices)[:, 0]
    assert np.bincount(expert).tolist() == [T // E] * E
    # Every expert as T / E columns: the exact optimum.
    rows, columns = linear_sum_assignment(np.repeat(logits, T // E, axis=1), maximize=True)
    best = logits[rows, columns // (T // E)].sum()
    got = logits[np.arange(T), expert].sum()
    assert best - got <= T * 0.001 * np.ptp(logits) + 1e-4
    np.testing.assert_allclose(
        expert_weights(routing).max(axis=1),
        1 / (1 + np.exp(-logits[np.arange(T), expert])),
        rtol=1e-5,
    )
    # Padding takes no place: of 22 real tokens an expert takes at most six.
    mask = jnp.arange(T) >= 2
    load = router(IDENTITY, router.init_state(), jnp.asarray(logits), token_mask=mask)
    assert np.asarray(load.expert_mask).sum(axis=0).max() <= 6
    assert np.asarray(load.num_experts_per_token).tolist() == [0, 0] + [1] * 22


def test_balanced_rules_need_no_loss():
    logits = jnp.asarray(skewed_logits(400))
    loss = {
        name: float(load_balancing_loss(rule(IDENTITY, rule.init_state(), logits)))
        for name, rule in (
            ("sinkhorn", Sinkhorn(num_experts=E, k=1, scoring=Scoring(score="sigmoid"))),
            ("base", BalancedAssignment(num_experts=E)),
        )
    }
    # The mean probability is skewed still; an even load makes the loss 1 whatever it is.
    assert loss["base"] == pytest.approx(1.0, abs=1e-5)
    assert loss["sinkhorn"] == pytest.approx(1.0, abs=0.02)


def test_cosine_logits_are_tutels():
    """Normalised projection times normalised embeddings times exp(min(temperature, log 100))."""
    rng = np.random.default_rng(0)
    router = Cosine(num_experts=E, k=2, projection_size=3)
    params = router.init(jax.random.key(0), 6)
    assert float(params["temperature"]) == pytest.approx(np.log(1 / 0.5))
    params["projection_bias"] = jnp.asarray(rng.normal(size=3), jnp.float32)
    x = rng.normal(size=(5, 6)).astype(np.float32)
    for temperature, factor in ((0.7, np.exp(0.7)), (9.0, 100.0)):
        params["temperature"] = jnp.float32(temperature)
        low = x @ np.asarray(params["projection"]) + np.asarray(params["projection_bias"])
        low /= np.linalg.norm(low, axis=1, keepdims=True)
        kernel = np.asarray(params["kernel"])
        want = factor * low @ (kernel / np.linalg.norm(kernel, axis=0))
        routing = router(params, router.init_state(), jnp.asarray(x))
        np.testing.assert_allclose(routing.router_logits, want, rtol=1e-4, atol=1e-5)


# Scores of five tokens for four experts, all different: the logits themselves.
SCORES = jnp.array(
    [
        [9.0, 8.0, 1.0, 0.1],
        [7.0, 0.2, 0.3, 0.4],
        [8.5, 8.2, 7.5, 6.0],
        [0.5, 0.6, 0.7, 0.8],
        [9.5, 9.4, 9.3, 9.2],
    ]
)
PLAIN = Scoring(score="identity")


def counts(router: SeqTopK, mask=None) -> list[int]:
    routing = router(IDENTITY, router.init_state(), SCORES, token_mask=mask)
    return np.asarray(routing.num_experts_per_token).tolist()


def test_a_sequence_shares_its_budget():
    whole = SeqTopK(num_experts=E, k=2, online=False, scoring=PLAIN)
    # The ten best of twenty: 9.5 9.4 9.3 9.2 9 8.5 8.2 8 7.5 7.
    assert counts(whole) == [2, 1, 3, 0, 4]
    assert counts(dataclasses.replace(whole, max_k=2)) == [2, 2, 2, 2, 2]
    assert counts(dataclasses.replace(whole, max_k=3)) == [3, 1, 3, 0, 3]
    # A padding token has no budget and takes none: the eight best of the others.
    assert counts(whole, jnp.arange(5) < 4) == [3, 1, 4, 0, 0]
    assert counts(dataclasses.replace(whole, min_k=1)) == [2, 1, 3, 1, 4]


def test_online_a_token_competes_with_those_before_it():
    online = SeqTopK(num_experts=E, k=2, scoring=PLAIN)
    # The 2 best at the first token, 9 8 7 1 at the second, 9 8.5 8.2 8 7.5 7 at the third, and so on.
    assert counts(online) == [2, 1, 3, 0, 4]
    two = dataclasses.replace(online, sequence_length=1)
    assert counts(two) == [2] * 5  # one token has no one to share with
    with pytest.raises(ValueError, match="sequence_length: expected a divisor of T=5, got 2"):
        counts(dataclasses.replace(online, sequence_length=2))


def test_depths_take_a_share_and_serve_by_the_sign():
    """Five tokens, a block that takes two: by logit; served, those above 0."""
    router = MixtureOfDepths(capacity=0.4, predictor=1.0)
    z = jnp.array([0.5, -1.0, 2.0, -0.2, 1.0])
    params, state = {"kernel": jnp.ones((1, 1))}, router.init_state()
    routing = router(params, state, z[:, None])
    assert expert_weights(routing)[:, 0].tolist() == [0.0, 0.0, 2.0, 0.0, 1.0]
    taken = np.array([False, False, True, False, True])
    want = np.log1p(np.exp(np.where(taken, -z, z))).mean()
    np.testing.assert_allclose(router.regularization(params, state, routing), want, rtol=1e-6)
    served = dataclasses.replace(router, causal=True)
    weights = expert_weights(served(params, state, z[:, None]))[:, 0]
    np.testing.assert_allclose(weights, [0.5, 0.0, 2.0, 0.0, 1.0])
    assert float(served.regularization(params, state, routing)) == 0.0
