"""Numbers that other authors' code produced; see ``goldens/README.md``."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import (
    FeedForward,
    Gate,
    ReLURouter,
    Scoring,
    TopAny,
    TopK,
    TopP,
    expert_capacity,
    kept_weights,
    plan_dispatch,
    routing_stats,
    to_assignments,
)
from moe_jax.experts import IMPLEMENTATIONS
from moe_jax.routing.losses import load_balancing_loss, relu_l1_loss

GOLDENS = Path(__file__).parents[1] / "goldens"


@functools.partial(
    jax.jit,
    static_argnums=(0, 1),
    static_argnames="options",
)
def moe_layer(*args, **kwargs):
    return moe_jax.moe_layer(*args, **kwargs)


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / name) as file:
        return {key: file[key] for key in file.files}


def dense_weights(indices, weights, none: int, experts: int) -> np.ndarray:
    out = np.zeros((len(indices), experts), np.float32)
    for t, slot in np.ndindex(np.shape(indices)):
        if indices[t, slot] != none:
            out[t, indices[t, slot]] = weights[t, slot]
    return out


@pytest.mark.parametrize("p", [0.4, 0.8])
def test_top_p_equals_dynamic_moe(p):
    """arXiv:2403.07652, the authors' code: experts, weights and the block's output."""
    golden = load(f"topp_huang_p{round(100 * p)}.npz")
    experts = golden["w/router.weight"].shape[0]
    router = TopP(num_experts=experts, p=p)

    def stacked(name: str) -> jax.Array:  # torch keeps [out, in]
        return jnp.stack([golden[f"w/experts.{e}.{name}.weight"].T for e in range(experts)])

    params = {
        "router": {"kernel": jnp.asarray(golden["w/router.weight"].T)},
        "experts": {n: stacked(f"{n}_proj") for n in ("gate", "up", "down")},
    }
    x = jnp.asarray(golden["x"])
    expert_fn = FeedForward(activation="silu", gated=True)
    y, aux = moe_layer(router, expert_fn, params, router.init_state(), x)

    routing = aux.routing
    np.testing.assert_allclose(
        routing.router_probs, golden["probs"].reshape(-1, experts), rtol=1e-5, atol=1e-7
    )
    want = golden["sorted_index"].reshape(-1, experts)
    np.testing.assert_array_equal(
        routing.num_experts_per_token, (want >= 0).sum(axis=1), err_msg="k of each token"
    )
    ours = dense_weights(
        np.asarray(routing.expert_indices), np.asarray(routing.combine_weights), experts, experts
    )
    theirs = dense_weights(want, golden["sorted_weights"].reshape(-1, experts), -1, experts)
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(y, golden["y"], rtol=1e-4, atol=1e-5)
    for name in sorted({"capacity", "dense"} & set(IMPLEMENTATIONS)):
        options = moe_jax.LayerOptions(implementation=name)
        y, _ = moe_layer(router, expert_fn, params, router.init_state(), x, options=options)
        np.testing.assert_allclose(y, golden["y"], rtol=1e-4, atol=1e-5)


def test_sigmoid_groups_and_bias_equal_megatron():
    """DeepSeek-V3's rule as Megatron-LM has it: 2 of 4 groups, bias for selection alone.

    There a group is worth its ``k / top_groups`` best scores, which at k = 2 is its best one.
    """
    golden = load("megatron_sigmoid_group.npz")
    tokens, experts = golden["logits"].shape
    scoring = Scoring(
        score="sigmoid", norm="sum_eps", num_groups=4, top_groups=2, group_score="max"
    )
    router = TopK(num_experts=experts, k=2, scoring=scoring)
    state = type(router.init_state())(expert_bias=jnp.asarray(golden["bias"]))
    identity = {"kernel": jnp.eye(experts, dtype=jnp.float32)}
    routing = router(identity, state, jnp.asarray(golden["logits"]))
    np.testing.assert_array_equal(routing.expert_mask, golden["routing_map"])
    ours = dense_weights(
        np.asarray(routing.expert_indices), np.asarray(routing.combine_weights), experts, experts
    )
    np.testing.assert_allclose(ours, golden["probs"], rtol=1e-5, atol=1e-7)
    assert tokens == 64


def test_top_any_equals_dynmoe():
    """arXiv:2405.14297, the authors' gate in evaluation, expert 7 masked off: experts and counts.

    Its output is 1 for each used expert, which their dispatch then divides by the token's count.
    """
    golden = load("topany_dynmoe_eval.npz")
    off = tuple(np.flatnonzero(golden["w/experts_mask"] == 0).tolist())
    router = TopAny(
        num_experts=golden["w/gates"].size,
        scale=float(np.exp(golden["w/temperature"][0])),
        gate=Gate(disabled_experts=off),
    )
    params = {
        "kernel": jnp.asarray(golden["w/sim_matrix"]),
        "thresholds": jnp.asarray(golden["w/gates"]),
    }
    routing = jax.jit(router)(params, router.init_state(), jnp.asarray(golden["x"]))
    np.testing.assert_array_equal(routing.expert_mask, golden["gate_out"] > 0)
    np.testing.assert_array_equal(routing.num_experts_per_token, golden["count"])
    assert len(set(golden["count"].tolist())) >= 4
    assert off == (7,)
    experts = router.num_experts
    ours = dense_weights(
        np.asarray(routing.expert_indices), np.asarray(routing.combine_weights), experts, experts
    )
    want = golden["gate_out"] / golden["count"][:, None]
    np.testing.assert_allclose(ours, want, rtol=0, atol=1e-6)


def test_relu_routing_and_its_loss_equal_remoe():
    """arXiv:2412.14711, the authors' router: experts, weights and the loss before lambda."""
    golden = load("remoe_relu.npz")
    experts = golden["logits"].shape[1]
    router = ReLURouter(num_experts=experts, target_k=2.0)
    identity = {"kernel": jnp.eye(experts, dtype=jnp.float32)}
    state = router.init_state()
    routing = jax.jit(router)(identity, state, jnp.asarray(golden["logits"]))
    np.testing.assert_array_equal(routing.expert_mask, golden["routing_map"])
    assert (~golden["routing_map"].any(axis=1)).any(), "some tokens have no expert"
    ours = dense_weights(
        np.asarray(routing.expert_indices), np.asarray(routing.combine_weights), experts, experts
    )
    np.testing.assert_allclose(ours, golden["weights"], rtol=0, atol=1e-6)
    want = golden["l1_over_coeff"]
    np.testing.assert_allclose(relu_l1_loss(routing, target_k=2.0), want, rtol=1e-6)
    own = router.regularization(identity, state, routing)
    np.testing.assert_allclose(own, 1e-8 * want, rtol=1e-6)


def test_quantile_balancing_equals_megatron():
    """Six rounds on one batch: loads 0 to 39 become 15 to 18. Their beta is our bias, negated.

    A quantile puts one token of each expert exactly on its edge, where two of the token's experts have
    equal scores: those ties are by construction, and torch breaks them otherwise than we do.
    """
    golden = load("megatron_quantile_balancing.npz")
    logits = jnp.asarray(golden["logits"])
    experts = logits.shape[1]
    router = TopK(
        num_experts=experts,
        k=2,
        scoring=Scoring(score="identity"),
        balance="quantile",
        balance_rate=1.0,
    )
    identity = {"kernel": jnp.eye(experts, dtype=jnp.float32)}

    @jax.jit
    def round_of(state):
        routing = router(identity, state, logits)
        plan = plan_dispatch(to_assignments(routing))
        stats = routing_stats(routing, plan, observed=router.observe(state, routing))
        return router.update(state, stats), routing

    state, routing, clear = router.init_state(), None, np.zeros(len(logits), bool)
    for i, loads in enumerate(golden["loads"]):
        np.testing.assert_allclose(-state.expert_bias, golden["betas"][i], rtol=0, atol=1e-6)
        best = -np.sort(-(golden["logits"] - golden["betas"][i]), axis=1)
        clear = best[:, 1] - best[:, 2] > 1e-6
        assert (~clear).sum() <= experts
        state, routing = round_of(state)
        off = np.abs(np.asarray(routing.expert_mask).sum(axis=0) - loads)
        assert off.sum() <= 2 * (~clear).sum()
    np.testing.assert_allclose(-state.expert_bias, golden["betas"][-1], rtol=0, atol=1e-6)
    last = np.zeros((len(logits), experts), bool)
    np.put_along_axis(last, golden["last_index"], True, axis=1)
    np.testing.assert_array_equal(np.asarray(routing.expert_mask)[clear], last[clear])
    assert np.asarray(routing.expert_mask).sum(axis=0).max() <= 18


def test_drops_by_choice_equal_deepspeed():
    """GShard's top-2 at capacity 8 of 64 tokens and 8 experts: half of what was asked for is dropped.

    DeepSpeed takes the second choice without noise here, and divides by what it kept, so a token
    that lost one choice gives the other weight 1, and six tokens that lost both get nothing.
    """
    golden = load("deepspeed_top2_drop.npz")
    logits = jnp.asarray(golden["logits"])
    tokens, experts, capacity = golden["combine"].shape
    assert expert_capacity(tokens, experts, 2, 0.5) == capacity
    identity = {"kernel": jnp.eye(experts, dtype=jnp.float32)}

    @jax.jit
    def planned():
        router = TopK(num_experts=experts, k=2, scoring=Scoring(norm="sum"))
        routing = router(identity, router.init_state(), logits)
        plan = plan_dispatch(to_assignments(routing), capacity=capacity, priority="choice")
        return plan, kept_weights(plan, renormalize=True)

    plan, weights = planned()
    combine = np.zeros((tokens, experts, capacity), np.float32)
    kept = np.asarray(plan.kept)
    a = plan.assignments
    place = tuple(np.asarray(v)[kept] for v in (a.token_indices, a.expert_indices, plan.position))
    combine[place] = np.asarray(weights)[kept]
    np.testing.assert_array_equal(combine > 0, golden["dispatch"])
    np.testing.assert_allclose(combine, golden["combine"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(plan.demand, golden["exp_counts"])
    assert kept.sum() == 64
    assert (~golden["dispatch"].any(axis=(1, 2))).sum() == 6
    other = plan_dispatch(a, capacity=capacity, priority="order")
    assert not np.array_equal(other.kept, plan.kept), "position alone drops others"
    # Its loss counts first choices alone.
    first = TopK(num_experts=experts, k=1)
    routing = jax.jit(first)(identity, first.init_state(), logits)
    np.testing.assert_allclose(load_balancing_loss(routing), golden["l_aux"], rtol=1e-5)
