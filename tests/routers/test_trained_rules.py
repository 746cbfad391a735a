"""Rules that only training makes: ReLU routing and top-any, beyond what every rule promises."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import Gate, ReLURouter, TopAny, plan_dispatch, routing_stats, to_assignments
from moe_jax.routing.balancing import multiplicative_controller

T, D, E = 128, 8, 8


@partial(jax.jit, static_argnums=0)
def route(router, params, state, x, mask=None):
    return router(params, state, x, token_mask=mask)


def batch(step) -> jax.Array:
    # Not around 0: there half of all tokens lie on either side of an expert, whatever the kernel.
    return 0.5 + jax.random.normal(jax.random.key(step), (T, D), jnp.float32)


# --- ReLU -----------------------------------------------------------------------------------


def train(router: ReLURouter, steps: int):
    """Gradient descent on a task that wants weights to add up to 2, and on the rule's own loss."""

    def loss(params, state, x):
        routing = router(params, state, x)
        task = jnp.square(routing.combine_weights.sum(axis=-1) - 2.0).mean()
        stats = routing_stats(routing, plan_dispatch(to_assignments(routing)))
        return task + router.regularization(params, state, routing), stats

    def step(carry, i):
        params, state = carry
        grads, stats = jax.grad(loss, has_aux=True)(params, state, batch(i))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return (params, router.update(state, stats)), (stats, state.l1_coefficient)

    start = (router.init(jax.random.key(0), D), router.init_state())
    return jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))(start)


@pytest.fixture(scope="module")
def trained():
    router = ReLURouter(num_experts=E, target_k=2.0)
    return router, *train(router, 400)


def test_the_controller_of_lambda_holds_the_mean_in_training(trained):
    """From E / 2, where random logits start it, to the target; and the load stays balanced."""
    _, _, (stats, coefficient) = trained
    mean = np.asarray(stats.mean_experts_per_token)
    assert mean[0] > 3.5
    np.testing.assert_allclose(mean[-100:].mean(), 2.0, rtol=0.1)
    assert coefficient[0] == np.float32(1e-8)
    assert coefficient[-1] > 1e3 * coefficient[0]
    assert np.asarray(stats.max_over_mean_load)[-100:].mean() < 2.0


def test_a_trained_relu_router_can_be_made_sparser(trained):
    router, (params, state), _ = trained
    fitted = router.fit(params, state, batch(1000), target_mean_k=1.5)
    assert float(fitted.cutoff) > 0
    before, after = (route(router, params, s, batch(1001)) for s in (state, fitted))
    assert abs(float(after.num_experts_per_token.mean()) - 1.5) < 0.2
    assert (after.expert_mask <= before.expert_mask).all(), "experts go, none comes"
    assert fitted.l1_coefficient == state.l1_coefficient


def test_multiplicative_controller_by_hand():
    move = partial(multiplicative_controller, target=2.0, step=1.2, low=0.5, high=3.0)
    for value, measured, want in (
        (1.0, 2.5, 1.2),
        (1.0, 1.5, 1 / 1.2),
        (1.0, 2.0, 1 / 1.2),  # at the target it falls, as the authors' does
        (2.9, 2.5, 3.0),
        (0.5, 1.5, 0.5),
    ):
        got = move(jnp.float32(value), measured=jnp.float32(measured))
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_relu_weights_come_and_go_without_a_jump():
    """Continuous in the input, where top-k is not: what the rule is for."""
    router = ReLURouter(num_experts=2, target_k=1.0)
    kernel = {"kernel": jnp.eye(2)}
    for z in (-1e-3, 0.0, 1e-3):
        routing = route(router, kernel, router.init_state(), jnp.array([[z, 1.0]]))
        weights = dict(
            zip(
                routing.expert_indices[0].tolist(), routing.combine_weights[0].tolist(), strict=True
            )
        )
        assert weights.get(0, 0.0) == pytest.approx(max(z, 0.0))


# --- top-any --------------------------------------------------------------------------------


def sigmoid(z):
    return 1 / (1 + np.exp(-np.asarray(z, np.float64)))


def by_hand(cosines) -> tuple[dict[str, jax.Array], jax.Array]:
    """A kernel and tokens of unit length: token t has these cosines to the unit axes."""
    x = np.asarray(cosines, np.float32)
    rest = np.sqrt(1 - np.square(x).sum(axis=1, keepdims=True))
    kernel = np.eye(x.shape[1] + 1, x.shape[1], dtype=np.float32)
    return {"kernel": jnp.asarray(kernel)}, jnp.asarray(np.concatenate([x, rest], axis=1))


def test_a_token_that_passes_no_threshold_has_its_best_expert_or_none():
    params, x = by_hand([[0.1, 0.3, 0.2], [0.9, 0.1, 0.1]])
    params["thresholds"] = jnp.array([0.5, 0.6, 0.4])
    router = TopAny(num_experts=3)
    routing = route(router, params, router.init_state(), x)
    # The best score, not the least missed threshold (expert 2).
    assert routing.expert_indices.tolist() == [[1, 3, 3], [0, 3, 3]]
    assert routing.combine_weights.tolist() == [[1, 0, 0], [1, 0, 0]]
    router = TopAny(num_experts=3, min_k=0)
    routing = route(router, params, router.init_state(), x)
    assert routing.num_experts_per_token.tolist() == [0, 1]


def test_gradients_pass_straight_through_the_sign():
    """Weights are constant, and still d weight / d score = 1 / n, and -1 / n for the threshold's."""
    cosines, thresholds, scale = [[0.5, 0.4, 0.1], [0.1, 0.2, 0.1]], [0.2, 0.3, 0.4], 2.0
    params, x = by_hand(cosines)
    router = TopAny(num_experts=3, scale=scale)
    state, pull = router.init_state(), jnp.array([[3.0, 5.0, 7.0]])

    def total(thresholds):
        routing = router({**params, "thresholds": thresholds}, state, x)
        return (routing.combine_weights * pull).sum()

    got = jax.jit(jax.grad(total))(jnp.array(thresholds))
    s = sigmoid(scale * np.array(thresholds))
    # Token 0 uses experts 0 and 1, each at weight 1/2; token 1 falls back, without a gradient.
    want = -np.array([3.0, 5.0, 0.0]) / 2 * s * (1 - s) * scale
    np.testing.assert_allclose(got, want, rtol=1e-5)

    def through_the_tokens(x):
        routing = router({**params, "thresholds": jnp.array(thresholds)}, state, x)
        return (routing.combine_weights * pull).sum()

    got = np.asarray(jax.jit(jax.grad(through_the_tokens))(x))
    c = np.array(cosines[0])
    s = sigmoid(scale * c)
    along = np.array([3.0, 5.0, 0.0]) / 2 * s * (1 - s) * scale
    # Of unit length already: what changes a token's length changes no cosine.
    unit = np.asarray(x[0], np.float64)
    want = np.append(along, 0.0)
    np.testing.assert_allclose(got[0], want - unit * (unit @ want), rtol=1e-4, atol=1e-6)
    assert not got[1].any()


def test_a_token_with_one_expert_still_teaches_the_router():
    """Dividing by a count is no renormalisation: the weight is 1 and its gradient is not 0."""
    params, x = by_hand([[0.5, 0.1, 0.1]])
    router = TopAny(num_experts=3)

    def weight(thresholds):
        routing = router({**params, "thresholds": thresholds}, router.init_state(), x)
        return routing.combine_weights[0, 0]

    value, gradient = jax.jit(jax.value_and_grad(weight))(jnp.array([0.3, 0.3, 0.3]))
    assert float(value) == 1.0
    assert float(gradient[0]) < -0.1
    assert gradient[1:].tolist() == [0.0, 0.0]


def test_regularization_is_the_authors_formula():
    """Diversity and simplicity over the experts that are on, and the mean gate."""
    router = TopAny(num_experts=E, diversity=0.5, efficiency=0.25, gate=Gate(disabled_experts=(2,)))
    params, state = router.init(jax.random.key(0), D), router.init_state()
    mask = jnp.arange(T) % 4 > 0
    routing = route(router, params, state, batch(0), mask)
    got = jax.jit(router.regularization)(params, state, routing)

    w = np.asarray(params["kernel"], np.float64)
    unit = w / np.linalg.norm(w, axis=0)
    on = np.array([e != 2 for e in range(E)])
    similar = np.linalg.norm((unit.T @ unit - np.eye(E))[np.ix_(on, on)])
    gates = np.asarray(routing.expert_mask)[np.asarray(mask)].mean()
    want = 0.5 * (similar + np.linalg.norm(w, axis=0).mean()) + 0.25 * gates
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_efficiency_lowers_the_mean_in_training():
    router = TopAny(num_experts=E, min_k=0, diversity=0.0, efficiency=1.0)

    def step(params, i):
        def loss(params):
            routing = router(params, router.init_state(), batch(i))
            own = router.regularization(params, router.init_state(), routing)
            return own, routing.num_experts_per_token.mean(dtype=jnp.float32)

        grads, mean = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 1.0 * g, params, grads), mean

    params = router.init(jax.random.key(0), D)
    _, mean = jax.jit(lambda p: jax.lax.scan(step, p, jnp.arange(60)))(params)
    assert mean[0] > 3.0
    assert mean[-1] < 0.7 * mean[0]
