"""Controllers (R08): measured load falls, budgets are held, and nothing winds up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routers import DynamicK, ExpertThreshold, ReLURouter, Router, TopK, TopP
from moe_jax.routing.balancing import (
    balancing_bias,
    ema_quantile,
    histogram_bias,
    loss_free_bias,
    margin_histogram,
    pi_controller,
    quantile_bias,
)
from moe_jax.routing.budget import per_expert_quantiles
from moe_jax.routing.dispatch import plan_dispatch, to_assignments
from moe_jax.routing.losses import load_balancing_loss
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.stats import routing_stats

T, D, E = 256, 8, 8


def skewed(router: Router):
    """Parameters and a stream of batches under which a few experts are everybody's favourites."""
    kernel = jax.random.normal(jax.random.key(0), (D, E)) / D**0.5
    push = jnp.linspace(1.0, -1.0, E)[None, :] * 0.5
    params = {"kernel": kernel + push}  # tokens have mean 0.5, so this shifts every logit

    def batch(step):
        return jax.random.normal(jax.random.key(step + 100), (T, D)) + 0.5

    return params, batch


def follow(router: Router, params, batch, steps: int):
    """Runs the controller over a stream; (final state, stats of every step)."""

    def step(state, x):
        routing = router(params, state, x)
        plan = plan_dispatch(to_assignments(routing))
        stats = routing_stats(routing, plan, observed=router.observe(state, routing))
        return router.update(state, stats), stats

    xs = jax.vmap(batch)(jnp.arange(steps))
    return jax.jit(lambda state, xs: jax.lax.scan(step, state, xs))(router.init_state(), xs)


def test_loss_free_bias_lowers_the_load_of_a_skewed_stream():
    routers = [
        TopK(num_experts=E, k=2, balance_rate=0.003, scoring=Scoring(score="sigmoid")),
        DynamicK(num_experts=E, min_k=1, max_k=3, balance_rate=0.002),
    ]
    for router in routers:
        params, batch = skewed(router)
        _, stats = follow(router, params, batch, 300)
        load = np.asarray(stats.max_over_mean_load)
        first, last = load[:5].mean(), load[-30:].mean()
        assert first > 3.0, "the stream must be skewed to begin with"
        assert last < 1.5, (first, last)
        score = np.asarray(stats.load_balance_score)
        assert score[-30:].mean() > 0.94 > score[:5].mean()


def test_quantile_balancing_evens_out_a_skewed_stream_at_once():
    """No step to tune: a few batches do what the sign controller takes hundreds for."""
    for rate, scoring, balance in (
        (1.0, Scoring(score="sigmoid"), "quantile"),
        (0.3, Scoring(), "quantile"),
        (0.3, Scoring(), "histogram"),
    ):
        router = TopK(num_experts=E, k=2, balance=balance, balance_rate=rate, scoring=scoring)
        params, batch = skewed(router)
        state, stats = follow(router, params, batch, 40)
        load = np.asarray(stats.max_over_mean_load)
        assert load[0] > 3.0, "the stream must be skewed to begin with"
        assert load[15:].mean() < 1.35, load
        np.testing.assert_allclose(state.expert_bias.mean(), 0.0, atol=1e-6)


def test_the_histogram_form_is_the_same_over_devices_and_near_the_exact_bias():
    """Four shards that differ give the whole batch's histogram; the mean of quantiles does not."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(400, 4)).astype(np.float32) + np.repeat(np.eye(4), 100, 0)
    scores = jax.nn.sigmoid(jnp.asarray(scores, jnp.float32))
    bias, mask = jnp.array([0.3, -0.1, 0.0, -0.2]), jnp.arange(400) % 7 != 0
    tokens = mask.reshape(4, 100).sum(axis=1, dtype=jnp.float32)

    def over_shards(form):
        parts = jax.vmap(lambda s, m: form(s, bias, m, k=2))(
            scores.reshape(4, 100, 4), mask.reshape(4, 100)
        )
        weights = tokens.reshape(4, *(1 for _ in parts.shape[1:]))
        return (parts * weights).sum(axis=0) / tokens.sum()

    whole = margin_histogram(scores, bias, mask, k=2)
    np.testing.assert_allclose(over_shards(margin_histogram), whole, rtol=0, atol=1e-6)
    one = histogram_bias(bias, whole, k=2, rate=1.0)
    many = histogram_bias(bias, over_shards(margin_histogram), k=2, rate=1.0)
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-4)
    exact = quantile_bias(bias, balancing_bias(scores, bias, mask, k=2), rate=1.0)
    averaged = quantile_bias(bias, over_shards(balancing_bias), rate=1.0)
    assert np.abs(np.asarray(one - exact)).max() < 0.01
    assert np.abs(np.asarray(averaged - exact)).max() > 0.03


def test_padding_takes_no_part_in_quantile_balancing():
    scores = jax.random.normal(jax.random.key(0), (40, 4))
    bias, mask = jnp.array([0.3, -0.1, 0.0, -0.2]), jnp.arange(40) % 4 != 0
    got = jax.jit(balancing_bias, static_argnames="k")(scores, bias, mask, k=2)
    real = np.asarray(scores)[np.asarray(mask)]
    alpha = np.sort(real + np.asarray(bias), axis=1)[:, ::-1][:, 2:3]
    want = -np.sort(real - alpha, axis=0)[::-1][30 * 2 // 4]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_without_a_rate_the_bias_stays_where_it_is():
    router = TopK(num_experts=E, k=2)
    params, batch = skewed(router)
    state, stats = follow(router, params, batch, 5)
    assert not np.asarray(state.expert_bias).any()
    assert np.asarray(stats.max_over_mean_load).min() > 1.5


def test_the_bias_changes_selection_and_never_weights():
    router = TopK(num_experts=E, k=2, scoring=Scoring(score="sigmoid"))
    params, batch = skewed(router)
    state = router.init_state()
    moved = type(state)(expert_bias=jnp.zeros(E, jnp.float32).at[7].set(10.0))
    routing = router(params, moved, batch(0))
    assert (np.asarray(routing.expert_indices)[:, 0] == 7).all()
    want = jax.nn.sigmoid(routing.router_logits[:, 7])
    np.testing.assert_allclose(routing.combine_weights[:, 0], want, rtol=1e-6)


def test_gradient_steps_on_the_load_balancing_loss_lower_the_load():
    router = TopK(num_experts=E, k=2)
    params, batch = skewed(router)
    state = router.init_state()

    def loss(params, x):
        return load_balancing_loss(router(params, state, x))

    @jax.jit
    def train(params):
        def step(params, i):
            return jax.tree.map(
                lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params, batch(i))
            ), 0

        return jax.lax.scan(step, params, jnp.arange(100))[0]

    def load(params):
        routing = router(params, state, batch(1000))
        return float(
            routing_stats(routing, plan_dispatch(to_assignments(routing))).max_over_mean_load
        )

    before, after = load(params), load(train(params))
    assert before > 1.8
    assert after < 1.4, (before, after)


def test_loss_free_bias_by_hand():
    bias = loss_free_bias(jnp.zeros(3), jnp.array([6.0, 3.0, 0.0]), rate=0.5)
    assert bias.tolist() == [-0.5, 0.0, 0.5]
    # Without the second expert the mean is 5; with it, 10 / 3, and all others would seem overloaded.
    bias = loss_free_bias(jnp.zeros(3), jnp.array([6.0, 0.0, 4.0]), rate=0.5, disabled=(1,))
    assert bias.tolist() == [-0.5, 0.0, 0.5]


# --- the PI controller of top-p -------------------------------------------------------------


def test_pi_controller_reaches_the_target_mean_k():
    for target in (1.5, 2.5, 4.0):
        router = TopP(num_experts=E, p=0.2, target_mean_k=target, ki=0.01)
        params, batch = skewed(router)
        state, stats = follow(router, params, batch, 400)
        mean = np.asarray(stats.mean_experts_per_token)[-100:].mean()
        np.testing.assert_allclose(mean, target, rtol=0.02)
        assert 0 <= float(state.p) <= 1


def pi(integral, measured, **bounds):
    return pi_controller(
        anchor=jnp.float32(0.5),
        integral=jnp.float32(integral),
        measured=jnp.float32(measured),
        target=2.0,
        kp=0.1,
        ki=0.01,
        **({"low": 0.0, "high": 1.0} | bounds),
    )


def test_pi_controller_by_hand():
    value, integral = pi(3.0, 1.0)  # e = 1: 0.5 + 0.1 * 1 + 0.01 * (3 + 1)
    np.testing.assert_allclose([value, integral], [0.64, 4.0], rtol=1e-6)


def test_pi_controller_does_not_wind_up():
    """A long time at a bound is forgotten at once when the error turns."""
    integral = 0.0
    for _ in range(1000):  # the measurement is stuck far below the target
        value, integral = pi(integral, 0.0)
        assert float(value) <= 1.0
    assert float(integral) <= 60.0  # without the hold it would be 2000
    steps = 0
    while float(pi(integral, 3.0)[0]) >= 0.5 and steps < 100:
        integral = pi(integral, 3.0)[1]
        steps += 1
    assert steps < 60


# --- the quantile controller of expert threshold --------------------------------------------


def test_ema_quantile_holds_mean_k_on_a_drifting_stream():
    """Tokens grow threefold over the stream; cutoffs follow, frozen ones would not."""
    router = ExpertThreshold(num_experts=E, target_k=2.0, min_k=0, decay=0.7)
    params, batch = skewed(router)
    steps = 200

    def drifting(step):
        return batch(step) * (
            1.0 + 2.0 * jnp.maximum(step - 50, 0).astype(jnp.float32) / (steps - 50)
        )

    _, stats = follow(router, params, drifting, steps)
    mean = np.asarray(stats.mean_experts_per_token)
    np.testing.assert_allclose(mean[50:].mean(), 2.0, rtol=0.03)
    assert np.abs(mean[50:] - 2.0).max() < 0.4
    assert np.asarray(stats.max_over_mean_load)[50:].mean() < 1.3, "and the load is balanced"


def test_ema_quantile_by_hand():
    assert ema_quantile(jnp.array([1.0]), jnp.array([3.0]), decay=0.75).tolist() == [1.5]


def test_per_expert_quantiles_are_numpys_over_real_tokens():
    scores = jax.random.normal(jax.random.key(0), (40, 3))
    mask = jnp.arange(40) % 4 != 0
    got = per_expert_quantiles(scores, mask, 0.3)
    want = np.quantile(np.asarray(scores)[np.asarray(mask)], 0.7, axis=0)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_batch_of_padding_alone_moves_no_controller():
    for router in (
        TopK(num_experts=E, k=2, balance_rate=0.1),
        TopK(num_experts=E, k=2, balance_rate=0.1, balance="quantile"),
        ReLURouter(num_experts=E, target_k=2.0),
        DynamicK(num_experts=E, min_k=1, max_k=2, balance_rate=0.1),
        TopP(num_experts=E, target_mean_k=2.0),
        ExpertThreshold(num_experts=E, target_k=2.0),
    ):
        params, state = router.init(jax.random.key(0), D), router.init_state()
        routing = router(params, state, jnp.ones((4, D)), token_mask=jnp.zeros(4, bool))
        plan = plan_dispatch(to_assignments(routing))
        stats = routing_stats(routing, plan, observed=router.observe(state, routing))
        jax.tree.map(np.testing.assert_array_equal, router.update(state, stats), state)


def test_routing_never_moves_the_state_by_itself():
    """R08: the answer to one input does not depend on earlier inputs."""
    router = TopK(num_experts=E, k=2, balance_rate=0.1)
    params, batch = skewed(router)
    state = router.init_state()
    first = router(params, state, batch(0))
    for i in range(3):
        router(params, state, batch(i))
    jax.tree.map(np.testing.assert_array_equal, router(params, state, batch(0)), first)
