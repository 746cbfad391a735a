"""The contract of an implementation: a table of plans times every way of running experts.

Each must equal the dense oracle, written out here once more as a plain loop, in its output and in
every gradient, dropless and dropping alike, and must let nothing cross between tokens and experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts import (
    IMPLEMENTATIONS,
    FeedForward,
    choose,
    explain_choice,
    run_experts,
)
from moe_jax.routing import dispatch
from moe_jax.routing.dispatch import plan_dispatch, to_assignments
from moe_jax.types import DispatchPlan, ExpertChoice, Routing

D, F = 6, 10
SWIGLU = FeedForward(activation="silu", gated=True)


@pytest.fixture(params=list(IMPLEMENTATIONS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# --- the table of plans ---------------------------------------------------------------------


def routing_of(indices: np.ndarray, num_experts: int) -> Routing:
    """A routing with these experts, [T, K], ``num_experts`` being none, and distinct weights."""
    tokens, _ = indices.shape
    weights = -np.sort(-np.random.default_rng(7).uniform(0.1, 1.0, indices.shape), axis=1)
    even = np.full((tokens, num_experts), 1.0 / num_experts, np.float32)
    return Routing(
        expert_indices=jnp.asarray(indices, jnp.int32),
        combine_weights=jnp.asarray(np.where(indices < num_experts, weights, 0.0), jnp.float32),
        router_logits=jnp.zeros((tokens, num_experts), jnp.float32),
        router_probs=jnp.asarray(even),
        token_mask=jnp.ones((tokens,), bool),
        num_experts=num_experts,
    )


def picks(tokens: int, experts: int, k: int, *, skew: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    appeal = rng.gumbel(size=(tokens, experts)) - skew * np.arange(experts)
    return np.argsort(-appeal, axis=1)[:, :k]


def dynamic(tokens: int, experts: int, k: int) -> np.ndarray:
    used = np.random.default_rng(1).integers(0, k + 1, (tokens, 1))
    return np.where(np.arange(k)[None, :] < used, picks(tokens, experts, k), experts)


def expert_choice() -> ExpertChoice:
    tokens = np.argsort(np.random.default_rng(3).random((4, 13)), axis=1)[:, :5]
    tokens[1, 3:] = 13  # two slots that the expert left unused
    weights = np.where(tokens < 13, np.random.default_rng(4).uniform(0.1, 1, tokens.shape), 0.0)
    flat = jnp.zeros((13, 4), jnp.float32)
    return ExpertChoice(
        token_indices=jnp.asarray(tokens, jnp.int32),
        combine_weights=jnp.asarray(weights, jnp.float32),
        router_logits=flat,
        router_probs=flat + 0.25,
        token_mask=jnp.ones((13,), bool),
        num_tokens=13,
    )


# Eager calls compile every operation by itself.
@partial(jax.jit, static_argnames=("capacity", "max_rows", "priority"))
def plan_from(routing: Routing | ExpertChoice, **bounds) -> DispatchPlan:
    return plan_dispatch(to_assignments(routing), **bounds)


kept_weights = jax.jit(dispatch.kept_weights)


def plan_of(indices: np.ndarray, experts: int, **bounds) -> DispatchPlan:
    return plan_from(routing_of(indices, experts), **bounds)


def first(count: int, indices: np.ndarray) -> np.ndarray:
    """The first ``count`` slots alone; the rest hold "no expert", which is 4 here."""
    return np.where(np.arange(indices.shape[1])[None, :] < count, indices, 4)


# Most plans have one shape, T=13, E=4, K=3, and are compiled once: what differs is their values.
PLANS: dict[str, Callable[[], DispatchPlan]] = {
    "uniform": lambda: plan_of((np.arange(13)[:, None] + np.arange(3)) % 4, 4),
    "skewed": lambda: plan_of(first(2, picks(13, 4, 3, skew=1.5)), 4),
    "one expert empty": lambda: plan_of(picks(13, 3, 3), 4),
    "all on one expert": lambda: plan_of(first(1, np.full((13, 3), 2)), 4),
    "dynamic k": lambda: plan_of(dynamic(13, 4, 3), 4),
    "all padding": lambda: plan_of(np.full((13, 3), 4), 4),
    "capacity": lambda: plan_of(picks(13, 4, 3, skew=1.5), 4, capacity=5),
    "capacity, batch order": lambda: plan_of(picks(13, 4, 3), 4, capacity=5, priority="order"),
    "row budget": lambda: plan_of(dynamic(13, 4, 3), 4, max_rows=16),
    "capacity and row budget": lambda: plan_of(picks(13, 4, 3), 4, capacity=6, max_rows=15),
    "E=1": lambda: plan_of(np.zeros((5, 1), int), 1),
    "k=E": lambda: plan_of(picks(5, 3, 3), 3),
    "T=1": lambda: plan_of(np.array([[2, 0]]), 4),
    "expert choice": lambda: plan_from(expert_choice()),
}


# --- the oracle, as a loop ------------------------------------------------------------------


def by_hand(expert_fn, params, x, plan: DispatchPlan, weights) -> np.ndarray:
    expert_fn = jax.jit(expert_fn)
    y = 0.0 * np.asarray(x, np.float32)
    a = plan.assignments
    for n in np.flatnonzero(np.asarray(plan.kept)):
        t, e = int(a.token_indices[n]), int(a.expert_indices[n])
        out = expert_fn(jax.tree.map(lambda p, e=e: p[e], params), x[t][None, :])
        y[t] += float(weights[n]) * np.asarray(out, np.float32)[0]
    return y


def test_the_oracle_is_the_definition():
    plan = PLANS["capacity and row budget"]()
    params, x = inputs(plan)
    y = run_experts(SWIGLU, params, x, plan, kept_weights(plan), implementation="dense").y
    want = by_hand(SWIGLU, params, x, plan, kept_weights(plan))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


def inputs(plan: DispatchPlan, expert_fn: FeedForward = SWIGLU):
    return drawn(plan.assignments.num_tokens, plan.assignments.num_experts, expert_fn)


@cache
def drawn(tokens: int, experts: int, expert_fn: FeedForward):
    params = expert_fn.init(jax.random.key(0), num_experts=experts, d_model=D, d_ff=F)
    keys = iter(jax.random.split(jax.random.key(2), len(params)))
    biases = {
        k: v + jax.random.normal(next(keys), v.shape, v.dtype)
        for k, v in params.items()
        if k.endswith("bias")
    }
    return {**params, **biases}, jax.random.normal(jax.random.key(1), (tokens, D))


def value_and_gradients(*args):
    return jax.tree.map(np.asarray, compiled_value_and_gradients(*args))


@partial(jax.jit, static_argnums=(0, 1))
def compiled_value_and_gradients(expert_fn, implementation, params, x, weights, plan):
    """The output, and the gradients of (params, x, weights) for a fixed cotangent."""

    def f(params, x, weights):
        return run_experts(expert_fn, params, x, plan, weights, implementation=implementation).y

    y, pull = jax.vjp(f, params, x, weights)
    return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


forward = jax.jit(run_experts, static_argnums=0, static_argnames="implementation")


def check_equal(got, want, *, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=rtol, atol=atol
        ),
        got,
        want,
    )


@pytest.mark.parametrize("case", list(PLANS))
def test_equals_the_oracle_in_values_and_gradients(case, name):
    plan = PLANS[case]()
    params, x = inputs(plan)
    weights = kept_weights(plan)
    got = value_and_gradients(SWIGLU, name, params, x, weights, plan)
    want = value_and_gradients(SWIGLU, "dense", params, x, weights, plan)
    check_equal(got, want)
    assert got[0].dtype == jnp.float32


@pytest.mark.parametrize(
    "expert_fn",
    [
        FeedForward(),
        FeedForward(activation="relu", use_bias=True),
        FeedForward(activation="gelu_tanh", gated=True, use_bias=True),
    ],
    ids=["plain", "plain with bias", "gated with bias"],
)
def test_every_kind_of_expert(expert_fn, name):
    plan = PLANS["dynamic k"]()
    params, x = inputs(plan, expert_fn)
    weights = kept_weights(plan)
    got = value_and_gradients(expert_fn, name, params, x, weights, plan)
    check_equal(got, value_and_gradients(expert_fn, "dense", params, x, weights, plan))


def own_expert(params, rows, /):
    """Nothing like a feed-forward layer, and wider than its input."""
    wide = jnp.concatenate([rows, jnp.sin(rows)], axis=1)
    return wide * params["scale"][None, :] + params["shift"][None, :]


def test_an_expert_of_the_users_own(name):
    plan = PLANS["dynamic k"]()
    experts, tokens = plan.assignments.num_experts, plan.assignments.num_tokens
    params = {
        "scale": jax.random.normal(jax.random.key(0), (experts, 2 * D)),
        "shift": jax.random.normal(jax.random.key(1), (experts, 2 * D)),
    }
    x, weights = jax.random.normal(jax.random.key(2), (tokens, D)), kept_weights(plan)
    if name in ("grouped", "ragged"):  # products, which run FeedForward only and say so
        try:
            value_and_gradients(own_expert, name, params, x, weights, plan)
        except (TypeError, ValueError) as refusal:
            message = str(refusal)
            if not ("expected" in message and "got" in message):
                raise
            return
    got = value_and_gradients(own_expert, name, params, x, weights, plan)
    assert got[0].shape == (tokens, 2 * D)
    check_equal(got, value_and_gradients(own_expert, "dense", params, x, weights, plan))
    want = by_hand_wide(params, x, plan, weights)
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-5)


def by_hand_wide(params, x, plan, weights):
    params, x, weights = jax.tree.map(np.asarray, (params, x, weights))
    y = np.zeros((x.shape[0], 2 * D), np.float32)
    a = plan.assignments
    for n in np.flatnonzero(np.asarray(plan.kept)):
        t, e = int(a.token_indices[n]), int(a.expert_indices[n])
        wide = np.concatenate([x[t], np.sin(x[t])])
        y[t] += float(weights[n]) * (wide * params["scale"][e] + params["shift"][e])
    return y


@pytest.mark.parametrize("case", ["skewed", "capacity and row budget", "expert choice"])
def test_isolation(case, name):
    """A token of NaN and an expert of inf reach what uses them, and nothing else."""
    if name == "ragged":
        pytest.skip("XLA for CPU expands it to every expert on every row, as its file says")
    plan = PLANS[case]()
    params, x = inputs(plan)
    weights = kept_weights(plan)
    a, kept = plan.assignments, np.asarray(plan.kept)
    token, expert = 3, 1
    pairs = [(int(a.token_indices[n]), int(a.expert_indices[n])) for n in np.flatnonzero(kept)]
    clean_y, (clean_p, clean_x, clean_w) = value_and_gradients(
        SWIGLU, name, params, x, weights, plan
    )
    rows = np.asarray(a.token_indices), np.asarray(a.expert_indices)
    params, x = jax.tree.map(np.array, (params, x))

    dirty = x.copy()
    dirty[token] = np.nan
    y, (dp, dx, dw) = value_and_gradients(SWIGLU, name, params, dirty, weights, plan)
    others = np.arange(x.shape[0]) != token
    unused = [e for e in range(a.num_experts) if (token, e) not in pairs]
    check_equal((y[others], dx[others]), (clean_y[others], clean_x[others]))
    check_equal(*(jax.tree.map(lambda p: p[np.array(unused, int)], g) for g in (dp, clean_p)))
    check_equal(dw[rows[0] != token], clean_w[rows[0] != token])

    bad = jax.tree.map(np.copy, params)
    for leaf in bad.values():
        leaf[expert] = np.inf
    y, (dp, dx, dw) = value_and_gradients(SWIGLU, name, bad, x, weights, plan)
    others = np.array([(t, expert) not in pairs for t in range(x.shape[0])])
    healthy = np.arange(a.num_experts) != expert
    assert others.any()
    assert not others.all()
    check_equal((y[others], dx[others]), (clean_y[others], clean_x[others]))
    check_equal(*(jax.tree.map(lambda p: p[healthy], g) for g in (dp, clean_p)))
    check_equal(dw[rows[1] != expert], clean_w[rows[1] != expert])


def test_bfloat16_is_close(name):
    plan = PLANS["skewed"]()
    params, x = inputs(plan)
    weights = kept_weights(plan)
    y = forward(SWIGLU, params, x.astype(jnp.bfloat16), plan, weights, implementation=name).y
    want, _ = value_and_gradients(SWIGLU, "dense", params, x, weights, plan)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, want, rtol=0.05, atol=0.05 * float(np.abs(want).max()))


def test_weights_of_dropped_assignments_do_not_count(name):
    plan = PLANS["capacity"]()
    params, x = inputs(plan)
    assert not plan.kept.all()
    y, _ = value_and_gradients(SWIGLU, name, params, x, plan.assignments.weights, plan)
    want, _ = value_and_gradients(SWIGLU, "dense", params, x, kept_weights(plan), plan)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


@partial(jax.jit, static_argnums=0)
def executed_rows(name, plan):
    return choose(plan, name).slots_executed(plan)


@pytest.mark.parametrize("case", list(PLANS))
def test_rows_executed_cover_rows_used(case, name):
    plan = PLANS[case]()
    executed = executed_rows(name, plan)
    assert executed.dtype == jnp.float32
    assert float(executed) >= float(plan.group_sizes.sum())


# --- choosing -------------------------------------------------------------------------------


def test_every_implementation_says_what_it_is():
    for key, implementation in IMPLEMENTATIONS.items():
        assert implementation.name == key
        assert implementation.summary
        assert dataclasses.is_dataclass(implementation)


def test_the_oracle_is_never_chosen_by_itself():
    for build in PLANS.values():
        said = dict(explain_choice(build()).candidates)
        assert list(said) == list(IMPLEMENTATIONS)
        assert said["dense"] != "chosen"
        assert list(said.values()).count("chosen") == 1


def test_a_name_insists_and_a_tuple_prefers():
    plan = PLANS["uniform"]()
    assert explain_choice(plan, "dense").candidates == (("dense", "chosen"),)
    assert choose(plan, "dense").name == "dense"
    reasons = dict(explain_choice(plan, ("capacity", "tiered")).candidates)
    assert "no capacity" in reasons["capacity"]
    assert reasons["tiered"] == "chosen"
    reasons = explain_choice(PLANS["capacity"](), ("capacity", "tiered")).candidates
    assert reasons[0] == ("capacity", "chosen")
    assert "earlier" in reasons[1][1]


def test_refusals_of_all_are_told_with_reasons():
    with pytest.raises(ValueError, match=r"expected one that can run.*capacity: has no capacity"):
        choose(PLANS["uniform"](), ("capacity",))


def test_unknown_names_are_refused_with_the_known_ones():
    for unknown in ("fast", ("capacity", "fast")):
        with pytest.raises(ValueError, match=r"expected names among .*'dense'.*got \['fast'\]"):
            choose(PLANS["uniform"](), unknown)
