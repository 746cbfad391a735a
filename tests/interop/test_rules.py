"""The rules of single models keep what every rule promises, and give numbers worked out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts import FeedForward
from moe_jax.interop.rules import (
    CapacityTopK,
    DepthRouter,
    JointShared,
    MoEPlusPlus,
    NullExperts,
    ProductKeys,
    SparseMixer,
    TableState,
    TokenTable,
    ZeroExperts,
)
from moe_jax.layer import moe_layer
from moe_jax.routers import NoState, Router, router_from_json
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.sparse_mix import sparse_mix
from moe_jax.types import Routing

T, D, E = 12, 16, 8
CASES: dict[str, Any] = {
    "capacity": CapacityTopK(num_experts=E, k=2, capacity=2),
    "capacity, sequences": CapacityTopK(num_experts=E, capacity=1, sequence_length=4),
    "capacity, share, best first": CapacityTopK(
        num_experts=E, k=2, capacity_fraction=0.1, prioritize=True, scoring=Scoring(norm="sum")
    ),
    "token table": TokenTable(num_experts=E, k=2, vocab_size=64, scoring=Scoring(norm="sum")),
    "sparse mixer": SparseMixer(num_experts=E, eps=0.3),
    "zero experts": ZeroExperts(num_experts=E, num_zero_experts=4, k=3, scoring=Scoring(scale=6.0)),
    "null experts": NullExperts(num_experts=E, num_null_experts=4, k=3),
    "joint shared": JointShared(num_experts=E, num_shared=2, k=3, scale=1.7),
    "moe++": MoEPlusPlus(num_experts=E),
    "depth": DepthRouter(num_experts=E, k=1, hidden_size=6),
}
X = jax.random.normal(jax.random.key(1), (T, D), jnp.float32)
CONTEXT = {
    "token_ids": jnp.arange(T, dtype=jnp.int32) * 7 % 64,
    "router_states": jnp.ones((T, 6)),
    "logits_before": jax.random.normal(jax.random.key(2), (T, E + 4), jnp.float32),
}


@pytest.fixture(params=list(CASES))
def router(request: pytest.FixtureRequest) -> Router:
    return CASES[request.param]


def route(router: Router, x=X, mask=None, context=CONTEXT) -> Routing:
    params, state = router.init(jax.random.key(0), D), router.init_state()
    call = jax.jit(lambda x: router(params, state, x, token_mask=mask, context=context))
    return call(x)


def test_the_contract(router):
    mask = jnp.arange(T) % 5 != 3
    routing = route(router, jnp.where(mask[:, None], X, jnp.nan), mask)
    indices, weights = np.asarray(routing.expert_indices), np.asarray(routing.combine_weights)
    used = indices < E
    assert indices.shape == weights.shape == (T, router.max_k)
    assert routing.num_experts == router.num_experts == E
    assert (indices >= 0).all()
    assert (indices[~used] == E).all()
    assert (weights[~used] == 0).all()
    assert (np.diff(used.astype(int), axis=1) <= 0).all(), "used slots come first"
    assert not used[~np.asarray(mask)].any(), "padding uses no expert"
    real = used[np.asarray(mask)].sum(axis=1)
    assert real.min() >= router.min_k
    assert router.traits.may_leave_token_empty or real.min() >= 1
    for row in indices:
        assert len(set(row[row < E])) == (row < E).sum(), "no expert twice"
    assert routing.router_logits.shape == routing.router_probs.shape == (T, E)
    assert np.isfinite(weights).all()
    probs = np.asarray(routing.router_probs)[np.asarray(mask)]
    np.testing.assert_allclose(probs.sum(axis=1), 1.0, rtol=1e-5)
    if routing.residual_weight is not None:
        assert routing.residual_weight.shape == (T,)
        assert (np.asarray(routing.residual_weight)[~np.asarray(mask)] == 0).all()


def test_a_rule_is_a_value(router):
    again = router_from_json(router.to_json())
    assert again == router
    assert hash(again) == hash(router)
    assert again.fingerprint() == router.fingerprint()


def test_batch_invariance_as_stated(router):
    whole = route(router)
    half = route(router, X[:8], context={k: v[:8] for k, v in CONTEXT.items()})
    same = np.array_equal(whole.expert_indices[:8], half.expert_indices)
    if router.traits.batch_invariant or router.traits.causal:
        assert same


def test_gradients_reach_the_router(router):
    params, state = router.init(jax.random.key(0), D), router.init_state()

    def loss(params):
        routing = router(params, state, X, context=CONTEXT)
        total = (routing.combine_weights**2).sum()
        if routing.residual_weight is not None:
            total += (routing.residual_weight**2).sum()
        if isinstance(router, MoEPlusPlus):
            total += router.constant_output(params, X, context=CONTEXT).sum()
        return total

    for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(g).all(), path
        assert np.abs(g).max() > 0, path


# --- disabled experts -------------------------------------------------------------------------

OFF = (0, 3, 5)
ALL = {**CASES, "product keys": ProductKeys(num_experts=16, k=3)}
WITH_GROUPS = {
    name: dataclasses.replace(ALL[name], scoring=scoring)
    for name in ("capacity", "token table")
    for scoring in (Scoring(score="sigmoid", num_groups=4, top_groups=2, group_score="max"),)
}


def without(router: Any, *off: int) -> Any:
    return dataclasses.replace(router, gate=dataclasses.replace(router.gate, disabled_experts=off))


@pytest.mark.parametrize(
    "router",
    [*ALL.values(), *WITH_GROUPS.values(), ZeroExperts(num_experts=2, num_zero_experts=4, k=4)],
    ids=[*ALL, *(f"{name}, groups" for name in WITH_GROUPS), "k above E"],
)
def test_a_disabled_expert_is_never_chosen(router):
    off = OFF if router.num_experts > 5 else (0,)
    rule = without(router, *off)
    params, state = rule.init(jax.random.key(0), D), rule.init_state()
    if hasattr(state, "expert_bias"):  # a bias that would bring them back
        bias = jnp.where(jnp.arange(state.expert_bias.shape[0]) < 6, 10.0, 0.0)
        state = dataclasses.replace(state, expert_bias=bias)
    routing = jax.jit(lambda x: rule(params, state, x, context=CONTEXT))(X)
    indices, weights = np.asarray(routing.expert_indices), np.asarray(routing.combine_weights)
    used = indices < router.num_experts
    assert not np.isin(indices[used], off).any()
    assert np.isfinite(weights).all()
    assert np.isfinite(routing.router_logits).all()
    assert np.abs(weights).max() < 100, "no weight of a logit that stands for minus infinity"
    assert used.sum(axis=1).min() >= rule.min_k
    assert (np.diff(used.astype(int), axis=1) <= 0).all()
    np.testing.assert_allclose(np.asarray(routing.router_probs)[:, list(off)], 0.0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"capacity", "token table"}))
def test_what_is_left_is_routed_as_if_the_others_had_lost(name):
    """Where no disabled expert was among the best, nothing changes."""
    plain = ALL[name]
    off = next(e for e in range(plain.num_experts) if not (route(plain).expert_indices == e).all())
    one, two = route(plain), route(without(plain, off))
    same = ~(np.asarray(one.expert_indices) == off).any(axis=1)
    if name.startswith("capacity"):
        return  # another token's place is free
    assert same.any()
    np.testing.assert_array_equal(
        np.asarray(one.expert_indices)[same], np.asarray(two.expert_indices)[same]
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda gate: SparseMixer(num_experts=4, k=3, gate=gate),
        lambda gate: ProductKeys(num_experts=4, k=3, gate=gate),
        lambda gate: JointShared(num_experts=4, num_shared=2, k=3, gate=gate),
        lambda gate: CapacityTopK(num_experts=4, k=3, gate=gate),
        lambda gate: TokenTable(num_experts=4, k=3, vocab_size=9, gate=gate),
        lambda gate: ZeroExperts(num_experts=4, num_zero_experts=1, k=4, gate=gate),
        lambda gate: DepthRouter(num_experts=4, k=4, hidden_size=6, gate=gate),
        lambda gate: MoEPlusPlus(num_experts=4, num_constant=0, num_zero=0, k=4, gate=gate),
    ],
)
def test_k_above_what_is_enabled_is_refused(make):
    make(Gate())
    with pytest.raises(ValueError, match=r"k: expected at most 2, the number of experts left"):
        make(Gate(disabled_experts=(1, 2)))


def test_the_table_names_no_other_expert_for_a_disabled_one():
    rule = without(TokenTable(num_experts=4, k=2, vocab_size=2), 1)
    state = TableState(table=jnp.array([[0, 1], [1, 2]]))
    params, x = {"kernel": jnp.zeros((2, 4))}, jnp.ones((2, 2))
    routing = rule(params, state, x, context={"token_ids": jnp.array([0, 1])})
    assert routing.expert_indices.tolist() == [[0, 4], [2, 4]]


# --- what a rule needs beside x ---------------------------------------------------------------


def test_the_state_of_the_layer_before_is_required_where_the_weights_call_for_it():
    rule = DepthRouter(num_experts=4, k=1, hidden_size=6)
    params, state = rule.init(jax.random.key(0), D), rule.init_state()
    with pytest.raises(ValueError, match=r"expected 'router_states' .*router_states_scale"):
        rule(params, state, X)
    first = {name: p for name, p in params.items() if name != "depth_scale"}
    rule(first, state, X)
    with pytest.raises(ValueError, match=r"expected no 'router_states'.*first layer"):
        rule(first, state, X, context={"router_states": jnp.ones((T, 6))})


def test_nothing_is_twice_in_what_a_rule_returns(router):
    """A caller may donate parameters and state: no array is in them twice."""
    key = jax.random.key(0)
    plus = lambda tree: jax.tree.map(lambda v: v + jnp.ones((), v.dtype), tree)  # noqa: E731
    jax.jit(plus, donate_argnums=0)((router.init(key, D), router.init_state()))


def by_hand(logits) -> tuple[dict[str, jax.Array], jax.Array]:
    """Parameters and tokens whose logits are these."""
    return {"kernel": jnp.eye(len(logits[0]))}, jnp.asarray(logits, jnp.float32)


def test_capacity_by_position_and_by_sequence():
    params, x = by_hand([[3, 0], [2, 0], [0, 1], [9, 0]])
    rule = CapacityTopK(num_experts=2, capacity=1)
    first = lambda r: r(params, NoState(), x).expert_indices[:, 0].tolist()  # noqa: E731
    assert first(rule) == [0, 2, 1, 2]
    assert first(dataclasses.replace(rule, sequence_length=2)) == [0, 2, 1, 0]
    assert first(dataclasses.replace(rule, prioritize=True)) == [2, 2, 1, 0]
    assert first(dataclasses.replace(rule, capacity=None)) == [0, 0, 1, 0]
    assert first(dataclasses.replace(rule, capacity_fraction=0.5)) == [0, 0, 1, 2]


def test_first_choices_are_served_before_second_ones():
    params, x = by_hand([[2, 1], [1, 2]])
    routing = CapacityTopK(num_experts=2, k=2, capacity=1)(params, NoState(), x)
    assert routing.expert_indices.tolist() == [[0, 2], [1, 2]]


def test_null_experts_take_choices_and_no_weight():
    rule = NullExperts(num_experts=2, num_null_experts=2, k=2)
    params, x = by_hand([[3, 1, 2, 0], [1, 2, -9, 0], [0, 0, 5, 4]])
    routing = rule(params, rule.init_state(), x)
    p = np.asarray(jax.nn.softmax(x, axis=-1))
    assert routing.expert_indices.tolist() == [[0, 2], [1, 0], [2, 2]]
    shares = p[1, [1, 0]] / p[1, :2].sum()
    np.testing.assert_allclose(routing.combine_weights, [[1, 0], shares, [0, 0]], rtol=1e-6)


def test_a_zero_experts_weight_is_what_x_keeps():
    rule = ZeroExperts(num_experts=2, num_zero_experts=1, k=2, scoring=Scoring(scale=6.0))
    params, x = by_hand([[3, 1, 2], [1, 2, -9]])
    routing = rule(params, rule.init_state(), x)
    p = np.asarray(jax.nn.softmax(x, axis=-1)) * 6
    assert routing.expert_indices.tolist() == [[0, 2], [1, 0]]
    np.testing.assert_allclose(
        routing.combine_weights, [[p[0, 0], 0], [p[1, 1], p[1, 0]]], rtol=1e-6
    )
    np.testing.assert_allclose(routing.residual_weight, [p[0, 2], 0], rtol=1e-6)


def test_sparse_mixer_weights_stand_alone():
    """Far apart, each chosen expert is alone in its softmax: two weights of 1."""
    params, x = by_hand([[9, 5, 1], [9, 8.9, 8.8]])
    weights = SparseMixer(num_experts=3)(params, NoState(), x).combine_weights
    np.testing.assert_allclose(weights[0], [1, 1])
    near = np.exp([9, 8.9]) / np.exp([9, 8.9]).sum()
    np.testing.assert_allclose(weights[1, 0], near[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenTable(num_experts=2, k=1, vocab_size=2)(*_two()), "expected 'token_ids'"),
        (
            lambda: CapacityTopK(num_experts=2, sequence_length=2)(
                {"kernel": jnp.eye(2)}, NoState(), jnp.ones((3, 2))
            ),
            "multiple of sequence_len",
        ),
        (
            lambda: CapacityTopK(num_experts=2, capacity=0),
            "capacity: expected an integer of at least 1",
        ),
        (
            lambda: CapacityTopK(num_experts=2, prioritize=True, sequence_length=2),
            "prioritize: expected sequence_length=None",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _two():
    return {"kernel": jnp.eye(2)}, TableState(table=jnp.zeros((2, 1), jnp.int32)), jnp.ones((3, 2))


def test_shared_experts_take_their_share_of_one_budget():
    router = JointShared(num_experts=E, num_shared=2, k=3, scale=1.7)
    params, state = router.init(jax.random.key(0), D), router.init_state()
    mask = jnp.arange(T) > 0
    routing = router(params, state, X, token_mask=mask)
    shared = router.shared_weights(params, X, routing)
    both = routing.combine_weights.sum(axis=-1) + shared.sum(axis=-1)
    np.testing.assert_allclose(both, 1.7 * np.asarray(mask, np.float32), rtol=1e-6)
    with pytest.raises(ValueError, match="num_shared: expected an integer of at least 1"):
        JointShared(num_experts=E, num_shared=0, k=3)


def test_phis_training_rule_equals_transformers_on_the_same_random_numbers():
    with np.load(Path(__file__).parents[1] / "goldens" / "phimoe_sampler.npz") as file:
        g = dict(file)
    noise = {"gumbel": g["gumbel"], "coins": g["coins"]}
    indices, weights = sparse_mix(g["scores"], k=2, eps=0.3, **noise)
    np.testing.assert_array_equal(indices, g["indices"])
    assert (indices != sparse_mix(g["scores"], k=2, eps=0.3)[0]).any()
    np.testing.assert_allclose(weights, g["weights"], rtol=0, atol=1e-6)
    grad = jax.grad(lambda z: (sparse_mix(z, k=2, eps=0.3, **noise)[1] * g["cot"]).sum())
    np.testing.assert_allclose(grad(g["scores"]), g["grad"], rtol=1e-4, atol=1e-6)


def test_sparse_mixer_samples_with_a_key_and_only_then():
    router = SparseMixer(num_experts=E, eps=5.0)  # every expert is near enough
    params = {"kernel": jnp.zeros((D, E)).at[0].set(jnp.linspace(0.0, 1.0, E))}
    x = jnp.zeros((4000, D)).at[:, 0].set(1.0)
    routing = jax.jit(lambda key: router(params, NoState(), x, key=key))(jax.random.key(0))
    share = np.bincount(routing.expert_indices[:, 0], minlength=E) / 4000
    np.testing.assert_allclose(share, jax.nn.softmax(jnp.linspace(0.0, 1.0, E)), atol=0.03)
    assert (routing.expert_indices[:, 0] != routing.expert_indices[:, 1]).all()
    assert (router(params, NoState(), x[:5]).expert_indices == jnp.array([[E - 1, E - 2]])).all()


def test_product_keys_by_hand():
    router = ProductKeys(num_experts=4, k=1)
    # One token: its numbers are a = (1, 0) and b = (0, 5), so pair (0, 1) is expert 1.
    params = {"kernel": jnp.array([[1.0, 0.0, 0.0, 5.0]])}
    routing = router(params, NoState(), jnp.ones((1, 1)))
    assert routing.expert_indices.tolist() == [[1]]
    assert routing.router_logits.tolist() == [[1.0, 6.0, 0.0, 5.0]]
    assert not router.traits.causal
    assert router_from_json(router.to_json()) == router


def test_moe_plus_plus_balances_all_classes_and_free_ones_for_less():
    """arXiv:2410.07348: sum over classes of eta f P, eta 0.75 for free ones; written out in numpy."""
    rule = MoEPlusPlus(num_experts=4)
    params = rule.init(jax.random.key(0), 8)
    x = jax.random.normal(jax.random.key(1), (30, 8))
    mask = jnp.arange(30) % 5 != 0
    z = np.asarray(rule.all_logits(params, x), np.float64)[np.asarray(mask)]
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    chosen = np.argsort(np.argsort(-p, axis=1), axis=1) < 2
    eta = np.array([1.0] * 4 + [0.75] * 4)
    want = (eta * chosen.mean(axis=0) * p.mean(axis=0)).sum()
    got = rule.balancing_loss(params, jnp.where(mask[:, None], x, jnp.nan), token_mask=mask)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # Twice as many rows for a free expert at half the share.
    expert, free = dataclasses.replace(rule, free_share=0.5).capacities(600, factor=1.0)
    assert (expert, free) == (100, 200)
    with pytest.raises(ValueError, match="free_share: expected 0 < free_share"):
        MoEPlusPlus(num_experts=4, free_share=0.0)


@pytest.mark.parametrize("residual", [False, True])
def test_moe_plus_plus_equals_the_authors_code(residual):
    """arXiv:2410.07348: logits, and the layer's output over all four kinds of experts."""
    with np.load(Path(__file__).parents[1] / "goldens" / "moepp.npz") as file:
        g = {k: file[k] for k in file.files}
    w = lambda name: jnp.asarray(g[f"w/moe.{name}"].T)  # noqa: E731  # torch keeps [out, in]
    rule = MoEPlusPlus(num_experts=4)
    own = range(4)
    router = {
        "kernel": w("gate.wg.weight"),
        "kernel_before": w("gate.gate_map.weight"),
        "constant": jnp.stack([w(f"experts.experts.{e}.constant") for e in (4, 5)]),
        "constant_mix": jnp.stack([w(f"experts.experts.{e}.wg.weight") for e in (4, 5)]),
    }
    experts = {
        "up": jnp.stack([w(f"experts.experts.{e}.a.weight") for e in own]),
        "down": jnp.stack([w(f"experts.experts.{e}.b.weight") for e in own]),
    }
    x = jnp.asarray(g["x"])
    flat = x.reshape(-1, x.shape[-1])
    context = {"logits_before": jnp.asarray(g["gate_residual_in"])} if residual else None
    ending = "_with_residual" if residual else ""

    @jax.jit
    def layer(params):
        y, aux = moe_layer(
            rule, FeedForward(activation="silu"), params, NoState(), x, context=context
        )
        constant = rule.constant_output(params["router"], flat, context=context)
        logits = rule.all_logits(params["router"], flat, context=context)
        return y + constant.reshape(y.shape), aux.routing, logits

    y, routing, logits = layer({"router": router, "experts": experts})
    np.testing.assert_allclose(logits, g[f"gate_logits{ending}"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(y, g[f"y{ending}"], rtol=1e-5, atol=1e-5)
    # Weights, from the authors' logits in float64; every kind of expert is in use.
    p = np.exp(np.float64(g[f"gate_logits{ending}"]))
    p /= p.sum(axis=1, keepdims=True)
    best = np.argsort(-p, axis=1)[:, :2]
    assert set(best.ravel()) == set(range(8))
    p = np.where((best[:, :, None] == np.arange(8)).any(axis=1), p, 0.0)
    p[:, 7] = 0.0
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(routing.expert_mask, p[:, :4] > 0)
    for t, (indices, weights) in enumerate(
        zip(np.asarray(routing.expert_indices), np.asarray(routing.combine_weights), strict=True)
    ):
        used = indices < 4
        np.testing.assert_allclose(weights[used], p[t, indices[used]], rtol=0, atol=1e-6)
