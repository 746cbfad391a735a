"""Rules that look at the batch of a decoding step, on cases that can be checked by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import (
    Piggyback,
    Reroute,
    Scoring,
    SharedBudget,
    TopK,
    plan_dispatch,
    routing_stats,
    to_assignments,
)
from moe_jax.routers import expert_similarity, with_similarity
from moe_jax.routing.stats import bytes_read
from moe_jax.testing.case import expert_weights

# The kernel is the identity and scores are the logits, so these are the scores of five experts.
X = jnp.array(
    [
        [9.0, 5.0, 4.0, 1.0, 0.0],
        [8.0, 1.0, 6.0, 5.0, 0.0],
        [0.0, 1.0, 2.0, 7.0, 3.0],
    ]
)
PLAIN = Scoring(score="identity")
PARAMS = {"kernel": jnp.eye(5)}


def weights(router, x=X, state=None, mask=None):
    state = router.init_state() if state is None else state
    return expert_weights(router(PARAMS, state, x, token_mask=mask))


def test_piggyback_keeps_the_best_and_adds_what_others_load():
    router = Piggyback(num_experts=5, k=3, keep_k=1, scoring=PLAIN)
    # Loaded are 0 (tokens 0 and 1) and 3 (token 2); every token uses both.
    want = [[9, 0, 0, 1, 0], [8, 0, 0, 5, 0], [0, 0, 0, 7, 0]]
    # A score of 0 weighs nothing, so token 2 uses expert 0 with weight 0.
    np.testing.assert_array_equal(weights(router), want)
    near = dataclasses.replace(router, reach=3)
    np.testing.assert_array_equal(weights(near)[0], [9, 0, 0, 0, 0])  # 3 is its fourth
    two = dataclasses.replace(router, keep_k=2)
    # Loaded are 0, 1, 2, 3, 4: everybody has three again.
    np.testing.assert_array_equal(weights(two)[0], [9, 5, 4, 0, 0])


def test_a_budget_of_distinct_experts_takes_those_with_most_mass():
    # Softmax probabilities are close to one-hot, so mass is dominated by the exponentials.
    router = SharedBudget(num_experts=5, k=3, max_distinct=3)
    mask = np.asarray(router(PARAMS, router.init_state(), X / 4).expert_mask)
    p = np.asarray(jax.nn.softmax(X / 4, axis=-1))
    mass = np.zeros(5)
    for row in p:
        best = np.argsort(-row)[:3]
        mass[best] += row[best]
    mass[[0, 3]] = np.inf  # the best expert of some token
    loaded = set(np.argsort(-mass)[:3])
    assert set(np.flatnonzero(mask.any(axis=0))) == loaded
    for row, used in zip(p, mask, strict=True):
        assert set(np.flatnonzero(used)) == set(np.argsort(-row)[:3]) & loaded
    tight = dataclasses.replace(router, max_distinct=1)
    assert np.flatnonzero(np.asarray(weights(tight)).any(axis=0)).tolist() == [0, 3]


def test_rerouting_moves_weight_to_the_most_similar_primary_expert():
    router = Reroute(num_experts=5, k=2, keep_k=1, scoring=PLAIN)
    close = jnp.eye(5).at[1, 3].set(0.9).at[1, 0].set(0.4).at[2, 0].set(0.8).at[4, 0].set(0.05)
    state = with_similarity(router.init_state(), close)
    # Primary are 0 and 3. Token 0: 1 -> 3. Token 1: 2 -> 0. Token 2: 4 has no similar one and stays.
    want = [[9, 0, 0, 5, 0], [14, 0, 0, 0, 0], [0, 0, 0, 7, 3]]
    np.testing.assert_array_equal(weights(router, state=state), want)
    # Without calibration nothing is re-routed.
    plain = TopK(num_experts=5, k=2, scoring=PLAIN)
    np.testing.assert_array_equal(weights(router), weights(plain))


def test_similarity_is_the_mean_cosine_of_outputs():
    outputs = jnp.array([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, -1.0]]])
    np.testing.assert_allclose(expert_similarity(outputs), [[1.0, 0.0], [0.0, 1.0]], atol=1e-6)
    with pytest.raises(ValueError, match="similarity"):
        with_similarity(Reroute(num_experts=5, k=2).init_state(), jnp.eye(4))


RULES = [
    Piggyback(num_experts=5, k=3, scoring=PLAIN),
    SharedBudget(num_experts=5, k=3, max_distinct=1, scoring=PLAIN),
    Reroute(num_experts=5, k=3, scoring=PLAIN),
]


@pytest.mark.parametrize("router", RULES, ids=lambda r: type(r).__name__)
def test_a_token_keeps_its_best_expert_and_prefill_is_left_alone(router):
    best = np.asarray(X).argmax(axis=1)
    assert (weights(router)[np.arange(3), best] >= np.asarray(X).max(axis=1)).all()
    prefill = dataclasses.replace(router, max_tokens=2)
    plain = TopK(num_experts=5, k=3, scoring=PLAIN)
    np.testing.assert_array_equal(weights(prefill), weights(plain))
    # Alone, as padding's only neighbour, a token loads what it alone needs.
    mask = jnp.array([True, False, False])
    alone = weights(router, X, mask=mask)
    np.testing.assert_array_equal(alone[1:], np.zeros((2, 5)))
    np.testing.assert_allclose(alone[0], weights(router, X[:1])[0])


def test_distinct_experts_and_their_bytes_are_in_the_statistics():
    router = TopK(num_experts=5, k=2)
    routing = router(PARAMS, router.init_state(), X)
    stats = routing_stats(routing, plan_dispatch(to_assignments(routing)))
    assert float(stats.distinct_experts) == 5.0  # 0, 1; 0, 2; 3, 4
    params = {"up": jnp.zeros((5, 2, 3)), "down": jnp.zeros((5, 3, 2), jnp.bfloat16)}
    assert float(bytes_read(stats, params)) == 5 * (6 * 4 + 6 * 2)
