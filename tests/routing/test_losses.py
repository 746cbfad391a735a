"""Auxiliary losses: 1 at balance, denominators, gradients, sequences, shards, padding."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing.losses import (
    LossWeights,
    aux_loss,
    entropy_loss,
    importance_loss,
    load_balancing_loss,
    orthogonality_loss,
    router_z_loss,
)
from moe_jax.types import Routing

GOLDENS = Path(__file__).parents[1] / "goldens"


def routing_of(used, *, logits=None, mask=None, probs=None) -> Routing:
    """A routing from a table used[T, E] of zeros and ones."""
    used = np.asarray(used, bool)
    tokens, experts = used.shape
    indices = np.where(used, np.arange(experts)[None, :], experts)
    indices = np.sort(indices, axis=1)
    logits = jnp.zeros(used.shape, jnp.float32) if logits is None else jnp.asarray(logits)
    return Routing(
        expert_indices=jnp.asarray(indices, jnp.int32),
        combine_weights=jnp.asarray(indices < experts, jnp.float32),
        router_logits=logits,
        router_probs=jax.nn.softmax(logits, axis=-1) if probs is None else probs,
        token_mask=jnp.ones((tokens,), bool) if mask is None else jnp.asarray(mask),
        num_experts=experts,
    )


def draw(tokens: int = 12, experts: int = 4, seed: int = 0) -> Routing:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts)).astype(np.float32)
    ranks = np.argsort(np.argsort(-logits, axis=1), axis=1)
    return routing_of(ranks < rng.integers(1, experts, (tokens, 1)), logits=logits)


def by_hand(routing: Routing) -> float:
    p, used = np.asarray(routing.router_probs, np.float64), np.asarray(routing.expert_mask)
    tokens, experts = p.shape
    mean_k = used.sum() / tokens
    return experts / (tokens**2 * mean_k) * (p.sum(axis=0) * used.sum(axis=0)).sum()


# --- load balancing -------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_one_at_balance_for_fixed_k(k):
    used = [[(t + e) % 4 < k for e in range(4)] for t in range(8)]
    np.testing.assert_allclose(load_balancing_loss(routing_of(used)), 1.0, rtol=1e-6)


def test_one_at_balance_for_dynamic_k():
    """Tokens use 1, 2, 1 and 4 experts; every expert is used twice. Mean k is in the denominator."""
    used = [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]]
    np.testing.assert_allclose(load_balancing_loss(routing_of(used)), 1.0, rtol=1e-6)


def test_worst_case_is_the_number_of_experts():
    logits = np.zeros((6, 4), np.float32)
    logits[:, 2] = 100.0
    used = np.zeros((6, 4), bool)
    used[:, 2] = True
    np.testing.assert_allclose(load_balancing_loss(routing_of(used, logits=logits)), 4.0)


def test_equals_the_formula():
    for seed in range(3):
        np.testing.assert_allclose(
            load_balancing_loss(draw(seed=seed)), by_hand(draw(seed=seed)), rtol=1e-5
        )


def test_equals_megatron():
    """Megatron-LM's own code: divides by k, where Hugging Face does not; coefficient 1."""
    golden = np.load(GOLDENS / "megatron_losses.npz")
    routing = routing_of(golden["routing_map"], logits=golden["logits"])
    assert set(np.asarray(routing.num_experts_per_token).tolist()) == {2}
    np.testing.assert_allclose(load_balancing_loss(routing), golden["aux"], rtol=1e-5)
    np.testing.assert_allclose(router_z_loss(routing), golden["z"], rtol=1e-5)


def test_per_sequence_is_the_mean_over_sequences():
    routing = draw(tokens=12)
    parts = [
        by_hand(
            routing_of(
                np.asarray(routing.expert_mask)[i : i + 4], logits=routing.router_logits[i : i + 4]
            )
        )
        for i in (0, 4, 8)
    ]
    got = load_balancing_loss(routing, sequence_length=4)
    np.testing.assert_allclose(got, np.mean(parts), rtol=1e-5)


def test_a_sequence_of_padding_alone_is_left_out_of_the_mean():
    routing = draw(tokens=12)
    mask = jnp.arange(12) < 8
    masked = routing_of(
        np.asarray(routing.expert_mask) & np.asarray(mask)[:, None],
        logits=routing.router_logits,
        mask=mask,
    )
    short = routing_of(np.asarray(routing.expert_mask)[:8], logits=routing.router_logits[:8])
    np.testing.assert_allclose(
        load_balancing_loss(masked, sequence_length=4),
        load_balancing_loss(short, sequence_length=4),
        rtol=1e-6,
    )


@pytest.mark.parametrize("mask", [None, np.arange(12) % 5 != 0], ids=["full", "padded"])
def test_global_batch_equals_the_whole_batch_at_once(mask):
    """Every shard has the whole batch's loss, however padding is spread over the shards."""
    whole = draw(tokens=12)
    if mask is not None:
        whole = routing_of(
            np.asarray(whole.expert_mask) & mask[:, None], logits=whole.router_logits, mask=mask
        )
    shards = jax.tree.map(lambda leaf: leaf.reshape(3, 4, *leaf.shape[1:]), whole)
    for loss in (load_balancing_loss, router_z_loss, entropy_loss, importance_loss):
        each = jax.vmap(lambda r, f=loss: f(r, axis_name="data"), axis_name="data")(shards)
        np.testing.assert_allclose(each, np.full(3, loss(whole)), rtol=1e-4)
    by_sequence = jax.vmap(
        lambda r: load_balancing_loss(r, sequence_length=2, axis_name="data"), axis_name="data"
    )(shards)
    wanted = load_balancing_loss(whole, sequence_length=2)
    np.testing.assert_allclose(by_sequence, np.full(3, wanted), rtol=1e-5)
    local = jax.vmap(load_balancing_loss)(shards)
    assert not np.allclose(local.mean(), load_balancing_loss(whole), rtol=1e-3)


def test_earlier_micro_batches_count_in_the_load_and_not_in_the_probabilities():
    """Two micro-batches with the load of both equal the loss of the whole batch, on average."""
    whole = draw(tokens=12)
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 6], whole) for i in (0, 6)]
    counts = [part.expert_mask.sum(axis=0) for part in parts]
    losses = [
        load_balancing_loss(part, earlier_counts=other)
        for part, other in zip(parts, reversed(counts), strict=True)
    ]
    np.testing.assert_allclose(np.mean(losses), load_balancing_loss(whole), rtol=1e-6)
    alone = np.mean([load_balancing_loss(part) for part in parts])
    assert not np.allclose(alone, load_balancing_loss(whole), rtol=1e-3)
    with pytest.raises(ValueError, match="none together with sequence_length"):
        load_balancing_loss(whole, earlier_counts=counts[0], sequence_length=6)


def test_a_dear_expert_weighs_more():
    """HMoE, arXiv:2408.10681: sizes 1 and 3 are 0.5 and 1.5 of the mean."""
    routing = routing_of([[1, 0], [0, 1]], probs=jnp.array([[0.8, 0.2], [0.4, 0.6]], jnp.float32))
    want = 2 * (0.5 * 0.6 * 0.5 + 1.5 * 0.4 * 0.5)
    got = load_balancing_loss(routing, expert_cost=(1.0, 3.0))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for wrong in ((1.0,), (1.0, 0.0)):
        with pytest.raises(ValueError, match="expert_cost: expected 2 positive numbers"):
            load_balancing_loss(routing, expert_cost=wrong)


def test_orthogonality_is_the_sum_of_squared_cosines():
    """Columns at 60 degrees have cosine 0.5, counted from both sides, whatever their length."""
    kernel = jnp.array([[2.0, 0.5, 0.0], [0.0, 0.75**0.5, 0.0], [0.0, 0.0, 7.0]])
    np.testing.assert_allclose(orthogonality_loss(kernel), 0.5, rtol=1e-6)
    assert float(orthogonality_loss(kernel, disabled=(1,))) == 0.0
    assert np.isfinite(jax.grad(orthogonality_loss)(jnp.zeros((3, 2)))).all()


# --- the others, by hand --------------------------------------------------------------------


def test_router_z_by_hand():
    routing = routing_of(np.ones((2, 2)), logits=np.log(np.array([[1, 1], [3, 5]], np.float32)))
    want = (np.log(2) ** 2 + np.log(8) ** 2) / 2
    np.testing.assert_allclose(router_z_loss(routing), want, rtol=1e-6)


def test_entropy_by_hand():
    probs = jnp.array([[0.5, 0.5], [1.0, 0.0]], jnp.float32)
    routing = routing_of(np.ones((2, 2)), probs=probs)
    np.testing.assert_allclose(entropy_loss(routing), np.log(2) / 2, rtol=1e-6)


def test_importance_by_hand():
    probs = jnp.array([[1.0, 0.0], [0.5, 0.5]], jnp.float32)  # importance 1.5 and .5
    routing = routing_of(np.ones((2, 2)), probs=probs)
    np.testing.assert_allclose(importance_loss(routing), (0.5 / 1.0) ** 2, rtol=1e-6)
    np.testing.assert_allclose(importance_loss(routing_of(np.ones((5, 4)))), 0.0, atol=1e-10)


TERMS = [load_balancing_loss, router_z_loss, entropy_loss, importance_loss]


@pytest.mark.parametrize("term", TERMS, ids=lambda f: f.__name__)
def test_padding_counts_in_nothing(term):
    clean = draw(tokens=8)
    mask = jnp.arange(12) < 8
    pad = jnp.full((4, 4), jnp.nan, jnp.float32)
    padded = dataclasses.replace(
        clean,
        expert_indices=jnp.concatenate([clean.expert_indices, jnp.full((4, 4), 4, jnp.int32)]),
        combine_weights=jnp.concatenate([clean.combine_weights, jnp.zeros((4, 4), jnp.float32)]),
        router_logits=jnp.concatenate([clean.router_logits, pad]),
        router_probs=jnp.concatenate([clean.router_probs, pad]),
        token_mask=mask,
    )
    np.testing.assert_allclose(term(padded), term(clean), rtol=1e-6)


@pytest.mark.parametrize("term", TERMS, ids=lambda f: f.__name__)
def test_gradients_equal_finite_differences(term):
    routing = draw(tokens=6)

    @jax.jit
    def f(logits):
        probs = jax.nn.softmax(logits, axis=-1)
        return term(dataclasses.replace(routing, router_logits=logits, router_probs=probs))

    gradient = jax.jit(jax.grad(f))(routing.router_logits)
    step = jax.random.normal(jax.random.key(0), routing.router_logits.shape)
    eps = 1e-2
    slope = (f(routing.router_logits + eps * step) - f(routing.router_logits - eps * step)) / (
        2 * eps
    )
    np.testing.assert_allclose((gradient * step).sum(), slope, rtol=2e-2, atol=1e-4)


def test_aux_loss_sums_what_has_a_weight_and_leaves_out_the_rest():
    routing = draw()
    total, terms = aux_loss(routing, LossWeights(load_balancing=0.5, router_z=0.0, entropy=2.0))
    assert sorted(terms) == ["entropy", "load_balancing"]
    np.testing.assert_allclose(
        total, 0.5 * load_balancing_loss(routing) + 2.0 * entropy_loss(routing), rtol=1e-6
    )
    nothing, terms = aux_loss(routing, LossWeights(load_balancing=0.0, router_z=0.0))
    assert (float(nothing), terms) == (0.0, {})
