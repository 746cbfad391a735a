"""Rules beside their authors' formulas: dynamic skipping, product keys, Ada-K, DynMoE's experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import AdaK, ExpertRetrieval, Gate, MixtureOfDepths, SkipSecond, TopAny
from moe_jax.routers import (
    NoState,
    adapt_experts,
    empty_record,
    record_experts,
    reward_advantages,
)

T, D, E = 201, 6, 4


def tokens(seed: int = 0, count: int = T) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32)


def kernel(columns: int = E, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(D, columns)).astype(np.float32)


def softmax(z: np.ndarray) -> np.ndarray:
    shifted = np.exp(z - z.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("count", [T, T + 1])
def test_dynamic_skipping_is_naees(count):
    """Lucky-Lance/Expert_Sparsity: skip where p2 < median(p2 / p1) * p1, then renormalise."""
    x, w = tokens(count=count), kernel()
    p = softmax(x.astype(np.float64) @ w)
    order = np.argsort(-p, axis=1)[:, :2]
    best = np.take_along_axis(p, order, axis=1)
    beta = np.median(best[:, 1] / best[:, 0])
    skipped = best[:, 1] < beta * best[:, 0]
    want = np.where(skipped[:, None] & np.array([False, True]), 0.0, best)
    want /= want.sum(axis=1, keepdims=True)

    router = SkipSecond(num_experts=E)
    params = {"kernel": jnp.asarray(w)}
    state = router.fit(params, router.init_state(), jnp.asarray(x), target_mean_k=1.5)
    assert float(state.beta) == pytest.approx(beta, rel=1e-5)
    routing = router(params, state, jnp.asarray(x))
    got = np.asarray(routing.combine_weights)
    # With an odd number of tokens one of them is the median, which rounding may put on either side.
    far = np.abs(best[:, 1] / best[:, 0] - beta) > 1e-6
    np.testing.assert_allclose(got[far], want[far], rtol=1e-4, atol=1e-6)
    assert far.sum() >= count - 1


@pytest.mark.parametrize("counts", [(2, 6), (3, 4)])
def test_product_keys_are_found_as_their_authors_search_them(counts):
    """The k best of the k x k pairs of the k best keys of each half; softmax over the chosen."""
    k, half = 3, 5
    router = ExpertRetrieval(num_experts=12, k=k, query_size=2 * half, num_keys=counts)
    params = router.init(jax.random.key(0), D)
    x = tokens()
    query = x.astype(np.float64) @ np.asarray(params["kernel"], np.float64)
    first = query[:, :half] @ np.asarray(params["keys_1"], np.float64)
    second = query[:, half:] @ np.asarray(params["keys_2"], np.float64)
    best = [np.argsort(-scores, axis=1)[:, :k] for scores in (first, second)]
    a, b = (np.take_along_axis(s, i, axis=1) for s, i in zip((first, second), best, strict=True))
    pairs = (a[:, :, None] + b[:, None, :]).reshape(T, -1)
    ids = (best[0][:, :, None] * counts[1] + best[1][:, None, :]).reshape(T, -1)
    chosen = np.argsort(-pairs, axis=1)[:, :k]
    routing = router(params, router.init_state(), jnp.asarray(x))
    np.testing.assert_array_equal(routing.expert_indices, np.take_along_axis(ids, chosen, axis=1))
    np.testing.assert_allclose(
        routing.combine_weights, softmax(np.take_along_axis(pairs, chosen, axis=1)), rtol=1e-4
    )


def test_product_keys_of_no_pair_are_refused():
    with pytest.raises(
        ValueError, match=r"num_keys: expected a tuple of two counts whose product is"
    ):
        ExpertRetrieval(num_experts=12, k=2, num_keys=(3, 5))
    for counts in ((-4, -3), (12,), (3, 2, 2)):
        with pytest.raises(ValueError, match=r"num_keys: expected a tuple of two counts"):
            ExpertRetrieval(num_experts=12, k=2, num_keys=counts)  # pyright: ignore[reportArgumentType]
    for counts in (12, [3, 4], (3.0, 4.0), ("3", "4"), (True, 12)):
        with pytest.raises(TypeError, match=r"num_keys: expected a tuple of two counts"):
            ExpertRetrieval(num_experts=12, k=2, num_keys=counts)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="query_size: expected an even number, got 7"):
        ExpertRetrieval(num_experts=12, k=2, query_size=7)
    assert ExpertRetrieval(num_experts=12, k=2).key_counts == (3, 4)


def test_ada_k_learns_by_reward_which_tokens_need_experts():
    """Tokens with a positive first channel lose 1 nat for each expert short of 3; others nothing."""
    router = AdaK(num_experts=E, max_k=3)
    params, state = router.init(jax.random.key(0), D), router.init_state()
    x = jnp.asarray(tokens())
    hard = x[:, 0] > 0

    @jax.jit
    def step(params, key):
        counts = router(params, state, x, key=key).num_experts_per_token
        nats = jnp.where(hard, 3.0 - counts.astype(jnp.float32), 0.0)
        gain = reward_advantages(nats, counts, price=0.2)
        grads = jax.grad(router.policy_loss)(params, state, x, counts, gain)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)

    learned = params
    for i in range(80):
        learned = step(learned, jax.random.key(i))
    counts = np.asarray(router(learned, state, x).num_experts_per_token)
    clear = np.abs(np.asarray(x[:, 0])) > 0.5
    assert counts[clear & np.asarray(hard)].mean() > 2.8
    assert counts[clear & ~np.asarray(hard)].mean() < 1.2
    np.testing.assert_array_equal(learned["kernel"], params["kernel"])


def test_ada_ks_surrogate_is_ppos():
    router = AdaK(num_experts=E, max_k=3, min_k=2)
    params, state = router.init(jax.random.key(0), D), router.init_state()
    x, counts = jnp.asarray(tokens(count=5)), jnp.array([2, 3, 2, 3, 2])
    log_probs = np.asarray(router.log_probs(params, state, x))
    assert np.isneginf(log_probs[:, 0]).all()
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1.0, rtol=1e-5)
    now = log_probs[np.arange(5), np.asarray(counts) - 1]
    old = now + np.array([0.5, -0.5, 0.5, -0.5, 0.1])
    gain = np.array([1.0, 1.0, -1.0, -1.0, 2.0])
    ratio = np.exp(now - old)
    want = -np.minimum(ratio * gain, np.clip(ratio, 0.8, 1.2) * gain)
    mask = jnp.array([True, True, True, True, False])
    got = router.policy_loss(
        params,
        state,
        x.at[4].set(jnp.nan),
        counts,
        jnp.asarray(gain, jnp.float32),
        old_log_probs=jnp.asarray(old, jnp.float32),
        token_mask=mask,
    )
    assert float(got) == pytest.approx(want[:4].mean(), rel=1e-5)


def test_padding_counts_in_no_advantage():
    nats, counts = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1, 1, 2])
    real = jnp.array([True, True, False])
    got = reward_advantages(nats, counts, price=0.1, token_mask=real)
    assert got.tolist() == pytest.approx([1.0, -1.0, 0.0])
    nothing = reward_advantages(nats, counts, price=0.1, token_mask=jnp.zeros(3, bool))
    assert nothing.tolist() == [0.0, 0.0, 0.0]


def test_ada_k_refuses_what_broadcasting_would_hide():
    router = AdaK(num_experts=E, max_k=3)
    params, state = router.init(jax.random.key(0), D), router.init_state()
    x, counts, gain = jnp.asarray(tokens(count=5)), jnp.array([2, 3, 2, 3, 2]), jnp.ones(5)
    good = {"counts": counts, "advantages": gain}
    for change, error, words in (
        ({"advantages": gain[:, None]}, ValueError, r"advantages: expected float\[T=5\]"),
        ({"advantages": gain[:1]}, ValueError, r"advantages: expected float\[T=5\]"),
        ({"counts": gain}, TypeError, r"counts: expected int\[T=5\]"),
        ({"old_log_probs": gain[:1]}, ValueError, r"old_log_probs: expected float\[T=5\]"),
        ({"clip": -1.0}, ValueError, "clip: expected 0 < clip < 1"),
        ({"token_mask": gain}, TypeError, r"token_mask: expected bool\[T=5\]"),
    ):
        with pytest.raises(error, match=words):
            router.policy_loss(params, state, x, **{**good, **change})
    with pytest.raises(TypeError, match="state: expected a AdaKState"):
        router.policy_loss(params, TopAny(num_experts=E).init_state(), x, **good)  # pyright: ignore
    with pytest.raises(TypeError, match=r"x: expected float\[T, D\], got a list"):
        router(params, state, [[1.0] * D], key=jax.random.key(0))  # pyright: ignore
    with pytest.raises(ValueError, match=r"draw: expected float\[T=5, K=3\]"):
        router(params, state, x, context={"draw": jnp.zeros((1, 3))})
    with pytest.raises(ValueError, match=r"counts: expected int\[T=5\]"):
        reward_advantages(gain, counts[:1], price=0.1)


def test_a_nan_token_moves_no_expert():
    router = TopAny(num_experts=E, min_k=0, gate=Gate(disabled_experts=(3,)))
    params = {"kernel": jnp.asarray(kernel()), "thresholds": jnp.full(E, 0.3)}
    x = jnp.asarray(tokens(count=20))
    broken = jnp.concatenate([x, jnp.full((1, D), jnp.nan), jnp.full((1, D), jnp.inf)])
    kernels = []
    for part in (x, broken):
        routing = router(params, router.init_state(), part)
        record = record_experts(empty_record(E, D), routing, part)
        kernels.append(adapt_experts(router, params, record)[1]["kernel"])
    assert (kernels[0] != params["kernel"]).any()
    np.testing.assert_array_equal(*kernels)


@pytest.mark.parametrize(("experts", "tokens"), [(3, 20), (3, 1000), (6, 100), (7, 10)])
def test_a_block_takes_the_share_that_was_written(experts, tokens):
    """0.05 * 3 in floats is above 0.15, which would take a token more."""
    for capacity in (0.05, 0.1, 0.2, 0.35):
        router = MixtureOfDepths(num_experts=experts, capacity=capacity)
        shape = jax.eval_shape(
            lambda x, router=router: router({"kernel": jnp.ones((D, experts))}, NoState(), x),
            jax.ShapeDtypeStruct((tokens, D), jnp.float32),
        )
        assert shape.token_indices.shape[1] == -(-round(100 * capacity) * tokens // 100)


def test_experts_are_added_and_removed_as_dynmoe_does():
    """Unused experts leave; the first free one returns towards the sum of the unrouted tokens."""
    x = jnp.asarray(tokens(count=200))
    router = TopAny(num_experts=E, min_k=0, gate=Gate(disabled_experts=(3,)))
    w = kernel()
    w[:, 1] = w[:, 0]
    # Expert 1 is like expert 0 with a threshold that no cosine passes.
    params = {"kernel": jnp.asarray(w), "thresholds": jnp.array([0.4, 1.5, 0.4, 0.0])}
    state = router.init_state()
    record = empty_record(E, D)
    step = jax.jit(lambda record, part: record_experts(record, router(params, state, part), part))
    for part in (x[:100], x[100:]):
        record = step(record, part)
    cosines = np.asarray(x) @ w / np.linalg.norm(w, axis=0)
    cosines /= np.linalg.norm(x, axis=1, keepdims=True)
    used = cosines[:, :3] > np.array([0.4, 1.5, 0.4])
    np.testing.assert_array_equal(record.tokens_per_expert, [*used.sum(axis=0), 0])
    lost = np.asarray(x)[~used.any(axis=1)].sum(axis=0)
    np.testing.assert_allclose(record.unrouted, lost, rtol=1e-4, atol=1e-4)

    adapted, changed = adapt_experts(router, params, record)
    assert adapted.gate.disabled_experts == (3,)  # 1 was removed, and is the first that is free
    np.testing.assert_allclose(
        changed["kernel"][:, 1], lost / np.linalg.norm(lost), rtol=1e-4, atol=1e-5
    )
    assert changed["thresholds"].tolist() == pytest.approx([0.4, 0.0, 0.4, 0.0])
    np.testing.assert_array_equal(changed["kernel"][:, [0, 2, 3]], w[:, [0, 2, 3]])
    with pytest.raises(ValueError, match="record: expected tokens of at least one step"):
        adapt_experts(router, params, empty_record(E, D))
    with pytest.raises(ValueError, match="router: expected min_k=0"):
        adapt_experts(TopAny(num_experts=E), params, record)
