"""``moe_layer``: the whole path, its axes, masks, shared experts, drops and statistics."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import FeedForward, LayerOptions, TopK, TopP, init_moe_layer
from moe_jax.experts import IMPLEMENTATIONS, choose
from moe_jax.routers import ExpertChoiceRouter, Router, Traits
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Routing

D, F, E = 8, 12, 4
FFN = FeedForward(activation="silu", gated=True)


@functools.partial(
    jax.jit,
    static_argnums=(0, 1),
    static_argnames="options",
)
def moe_layer(*args, **kwargs):
    return moe_jax.moe_layer(*args, **kwargs)


@functools.cache
def make(router: Router, **sizes):
    params = init_moe_layer(router, FFN, jax.random.key(0), d_model=D, d_ff=F, **sizes)
    return params, router.init_state()


def draw(*lead: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (*lead, D), jnp.float32)


def dense(params, aux, x) -> np.ndarray:
    """The answer as a formula: sum over experts of weight times output."""
    weights = np.zeros((x.shape[0], E), np.float32)
    indices = np.asarray(aux.routing.expert_indices)
    for t, slot in np.ndindex(indices.shape):
        if indices[t, slot] < E:
            weights[t, indices[t, slot]] = aux.routing.combine_weights[t, slot]
    run = jax.jit(FFN)
    out = [run(jax.tree.map(lambda p, e=e: p[e], params["experts"]), x) for e in range(E)]
    return sum(weights[:, e : e + 1] * np.asarray(out[e]) for e in range(E))


# --- axes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(12,), (3, 4), (2, 3, 2)])
def test_leading_axes_are_flattened_and_restored(lead):
    router = TopP(num_experts=E)
    params, state = make(router)
    flat = draw(12)
    want, _ = moe_layer(router, FFN, params, state, flat)
    y, aux = moe_layer(router, FFN, params, state, flat.reshape(*lead, D))
    assert y.shape == (*lead, D)
    assert aux.routing.num_experts_per_token.shape == (12,)
    np.testing.assert_array_equal(y.reshape(12, D), want)
    np.testing.assert_allclose(want, dense(params, aux, flat), rtol=1e-4, atol=1e-5)


def test_one_vector_is_one_token():
    router = TopK(num_experts=E, k=2)
    params, state = make(router)
    y, aux = moe_layer(router, FFN, params, state, draw())
    assert y.shape == (D,)
    assert float(aux.stats.token_count) == 1


def test_the_output_has_the_dtype_of_the_input():
    router = TopK(num_experts=E, k=2)
    params, state = make(router)
    x = draw(12)
    want, _ = moe_layer(router, FFN, params, state, x)
    y, aux = moe_layer(router, FFN, params, state, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert aux.routing.router_logits.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=0.1, atol=0.05)


def test_one_expert_of_k_one_is_a_plain_feed_forward_layer():
    router = TopK(num_experts=1, k=1)
    params = init_moe_layer(router, FFN, jax.random.key(0), d_model=D, d_ff=F)
    y, _ = moe_layer(router, FFN, params, router.init_state(), draw(12))
    want = FFN(jax.tree.map(lambda p: p[0], params["experts"]), draw(12))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


# --- masks ----------------------------------------------------------------------------------


# Two of the four pairs: the shared expert is added after routing, whatever the rule.
@pytest.mark.parametrize(
    ("router", "shared"),
    [(TopP(num_experts=E), 6), (ExpertChoiceRouter(num_experts=E), 0)],
    ids=["TopP", "ExpertChoice"],
)
def test_padding_gives_zero_and_changes_nothing(router, shared):
    params, state = make(router, shared_d_ff=shared)
    mask = (jnp.arange(12) % 3 != 1).reshape(3, 4)

    def loss(params, x):
        y, aux = moe_layer(router, FFN, params, state, x, token_mask=mask)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum(), (y, aux)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    results = []
    for pad in (0.0, jnp.nan, jnp.inf):
        x = jnp.where(mask[:, :, None], draw(3, 4), pad)
        results.append(gradients(params, x))
    (grads, (y, aux)), *others = results
    assert not np.asarray(y)[~np.asarray(mask)].any()
    assert not np.asarray(grads[1])[~np.asarray(mask)].any()
    assert float(aux.stats.token_count) == 8
    for other_grads, (other_y, other_aux) in others:
        np.testing.assert_array_equal(y, other_y)
        jax.tree.map(np.testing.assert_array_equal, aux.stats, other_aux.stats)
        jax.tree.map(np.testing.assert_array_equal, grads, other_grads)


# --- shared expert, residual weight ---------------------------------------------------------


def test_a_shared_expert_is_added_to_every_token():
    router = TopK(num_experts=E, k=2)
    params, state = make(router, shared_d_ff=6)
    without = {k: v for k, v in params.items() if k != "shared"}
    x = draw(12)
    y, _ = moe_layer(router, FFN, params, state, x)
    base, _ = moe_layer(router, FFN, without, state, x)
    extra = FFN(params["shared"], x)
    np.testing.assert_allclose(y, base + extra, rtol=1e-5, atol=1e-6)

    gate = jax.random.normal(jax.random.key(5), (D, 1))
    y, _ = moe_layer(router, FFN, {**params, "shared_gate": gate}, state, x)
    np.testing.assert_allclose(y, base + jax.nn.sigmoid(x @ gate) * extra, rtol=1e-5, atol=1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfIdentity(Router):
    """Top-1 with half weight; the other half goes to an expert that returns its input."""

    num_experts: int
    min_k: int = 1
    max_k: int = 1
    gate: Gate = Gate()

    @property
    def traits(self) -> Traits:
        return Traits(
            causal=True, batch_invariant=True, may_leave_token_empty=False, budget="exact"
        )

    def init_state(self):
        return TopK(num_experts=self.num_experts, k=1).init_state()

    def __call__(self, params, state, x, *, key=None, token_mask=None, context=None) -> Routing:
        inner = TopK(num_experts=self.num_experts, k=1, scoring=Scoring(scale=0.5))
        routing = inner(params, state, x, key=key, token_mask=token_mask)
        return dataclasses.replace(routing, residual_weight=jnp.where(routing.token_mask, 0.5, 0.0))


def test_residual_weight_returns_a_share_of_the_input():
    router = HalfIdentity(num_experts=E)
    params, state = make(router)
    x = draw(12)
    y, aux = moe_layer(router, FFN, params, state, x)
    np.testing.assert_allclose(y, dense(params, aux, x) + 0.5 * x, rtol=1e-4, atol=1e-5)
    mask = jnp.arange(12) < 9
    y, _ = moe_layer(
        router, FFN, params, state, jnp.where(mask[:, None], x, jnp.nan), token_mask=mask
    )
    assert not np.asarray(y)[9:].any()
    assert np.isfinite(y).all()


def test_a_residual_needs_experts_of_the_inputs_width():
    router = HalfIdentity(num_experts=E)
    params, state = make(router)
    params = {"router": params["router"], "experts": {"scale": jnp.ones((E, D))}}

    def widening(params, rows):
        return jnp.concatenate([rows, rows * params["scale"][None, :]], axis=1)

    with pytest.raises(ValueError, match="an output of width 8 like x, got 16"):
        jax.eval_shape(lambda: moe_jax.moe_layer(router, widening, params, state, draw(12)))


def test_without_zero_computation_experts_there_is_no_residual():
    """None is no array, so the compiled layer neither multiplies nor adds x."""
    router = TopK(num_experts=E, k=2)
    params, state = make(router)
    _, aux = jax.eval_shape(lambda x: moe_jax.moe_layer(router, FFN, params, state, x), draw(12))
    assert aux.routing.residual_weight is None


def test_run_experts_says_what_it_did():
    router = TopK(num_experts=E, k=2)
    params, state = make(router)
    routing = jax.jit(lambda x: router(params["router"], state, x))(draw(12))
    plan = moe_jax.plan_dispatch(moe_jax.to_assignments(routing))
    run = jax.jit(
        functools.partial(moe_jax.run_experts, platform="cpu"),
        static_argnums=0,
        static_argnames="implementation",
    )
    for asked, name in ((None, choose(plan).name), ("dense", "dense")):
        ran = run(
            FFN, params["experts"], draw(12), plan, plan.assignments.weights, implementation=asked
        )
        assert ran.implementation == name
        assert ran.y.shape == (12, D)
        assert float(ran.slots_executed) == float(IMPLEMENTATIONS[name].slots_executed(plan))


# --- drops ----------------------------------------------------------------------------------


def test_capacity_drops_and_renormalises_on_request():
    router = TopK(num_experts=E, k=2, scoring=Scoring(norm="sum"))
    params, state = make(router)
    x = jnp.concatenate([draw(8), draw(8)[:1] + 0.01 * draw(8)])  # eight of a kind
    y, aux = moe_layer(router, FFN, params, state, x, options=LayerOptions(capacity_factor=0.75))
    assert 0 < float(aux.stats.dropped_fraction) < 1
    full, full_aux = moe_layer(router, FFN, params, state, x)
    assert float(full_aux.stats.dropped_fraction) == 0
    assert not np.allclose(y, full)
    renormed, _ = moe_layer(
        router,
        FFN,
        params,
        state,
        x,
        options=LayerOptions(capacity_factor=0.75, renormalize_kept=True),
    )
    rows = 6  # ceil(.75 * 16 * 2 / 4)
    assert float(aux.stats.slots_used) <= rows * E
    # A token that lost its second expert: its first, at weight 1 instead of w1.
    demand = np.asarray(full_aux.stats.tokens_per_expert)
    assert demand.max() > rows
    ratio = np.linalg.norm(renormed, axis=1) / np.maximum(np.linalg.norm(y, axis=1), 1e-9)
    assert (ratio > 1.05).any()
    assert (ratio > 0.999).all() or (np.linalg.norm(y, axis=1) == 0).any()


def test_huge_capacity_is_dropless():
    router = TopK(num_experts=E, k=2)
    params, state = make(router)
    roomy = LayerOptions(capacity_factor=float(E))
    y, aux = moe_layer(router, FFN, params, state, draw(12), options=roomy)
    want, _ = moe_layer(router, FFN, params, state, draw(12))
    assert float(aux.stats.dropped_fraction) == 0
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tiered", "capacity", "dense"])
def test_every_implementation_gives_the_layers_answer(name):
    assert name in IMPLEMENTATIONS
    router = TopP(num_experts=E)
    params, state = make(router)
    y, aux = moe_layer(
        router, FFN, params, state, draw(12), options=LayerOptions(implementation=name)
    )
    np.testing.assert_allclose(y, dense(params, aux, draw(12)), rtol=1e-4, atol=1e-5)


# --- statistics -----------------------------------------------------------------------------


def test_stats_equal_numpy():
    router = TopP(num_experts=E, p=0.45)
    params, state = make(router)
    mask = jnp.arange(12) % 4 != 3
    _, aux = moe_layer(router, FFN, params, state, draw(12), token_mask=mask)
    stats, real = aux.stats, np.asarray(mask)
    used = np.asarray(aux.routing.expert_mask)[real]
    k, load = used.sum(axis=1), used.sum(axis=0).astype(float)
    p = np.asarray(aux.routing.router_probs, np.float64)[real]
    want = {
        "token_count": 9,
        "tokens_per_expert": load,
        "mean_experts_per_token": k.mean(),
        "experts_per_token_histogram": np.bincount(k, minlength=E + 1) / 9,
        "dropped_fraction": 0,
        "empty_fraction": (k == 0).mean(),
        "slots_used": used.sum(),
        "max_over_mean_load": load.max() / load.mean(),
        "load_balance_score": 1 / (1 + (load.std() / load.mean()) ** 2),
        "router_entropy": -(p * np.log(p)).sum(axis=1).mean(),
    }
    for name, value in want.items():
        np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-5, err_msg=name)
        assert getattr(stats, name).dtype == jnp.float32
    assert float(stats.slots_executed) >= float(stats.slots_used)


def test_stats_are_a_few_hundred_bytes_however_many_tokens():
    router = TopK(num_experts=64, k=8)
    params = jax.eval_shape(
        lambda key: init_moe_layer(router, FFN, key, d_model=D, d_ff=F), jax.random.key(0)
    )
    x = jax.ShapeDtypeStruct((4096, D), jnp.float32)
    _, aux = jax.eval_shape(
        lambda p, s, x: moe_layer(
            router, FFN, p, s, x, options=LayerOptions(implementation="dense")
        ),
        params,
        router.init_state(),
        x,
    )
    assert sum(4 * leaf.size for leaf in jax.tree.leaves(aux.stats)) < 1000


def test_answers_do_not_depend_on_earlier_inputs():
    """One compiled layer, the same question before and after others, with balancing on."""
    router = TopK(num_experts=E, k=2, balance_rate=0.1)
    params, state = make(router)
    layer = jax.jit(lambda state, x: moe_layer(router, FFN, params, state, x))
    first = layer(state, draw(12))
    for i in range(3):
        layer(state, jax.random.normal(jax.random.key(i), (12, D)))
    jax.tree.map(np.testing.assert_array_equal, layer(state, draw(12)), first)


@pytest.mark.parametrize("shared_d_ff", [0, 4])
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_no_array_is_in_the_parameters_and_state_of_a_layer_twice(shared_d_ff):
    """A training step may donate both at once."""
    step = jax.jit(
        lambda tree: jax.tree.map(lambda v: v + jnp.ones((), v.dtype), tree), donate_argnums=0
    )
    for router in (TopK(num_experts=E, k=2, balance_rate=0.1), TopP(num_experts=E)):
        params = init_moe_layer(
            router,
            FeedForward(activation="silu", gated=True, use_bias=True),
            jax.random.key(0),
            d_model=D,
            d_ff=F,
            shared_d_ff=shared_d_ff,
        )
        assert set(step((params, router.init_state()))[0]) == set(params)
