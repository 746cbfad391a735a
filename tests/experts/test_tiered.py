"""The dropless implementation against the dense oracle, in values and in every gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts import dense, tier_loop, tiered
from moe_jax.experts.feed_forward import FeedForward
from moe_jax.routing import dispatch
from moe_jax.routing.dispatch import plan_dispatch, to_assignments
from moe_jax.types import Assignments, DispatchPlan, ExpertChoice

D, F = 8, 12
FFN = FeedForward(activation="gelu_tanh")


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def plan_of(indices, num_experts: int, **bounds) -> DispatchPlan:
    """A plan from expert indices [T, K] (E is "no expert"), with distinct positive weights."""
    indices = np.asarray(indices, np.int32)
    tokens, k = indices.shape
    weights = np.random.default_rng(0).uniform(0.2, 1.0, indices.shape).astype(np.float32)
    weights = np.where(indices < num_experts, -np.sort(-weights, axis=1), 0.0)
    assignments = Assignments(
        token_indices=jnp.arange(tokens * k, dtype=jnp.int32) // k,
        expert_indices=jnp.asarray(indices.reshape(-1)),
        weights=jnp.asarray(weights.reshape(-1), jnp.float32),
        valid=jnp.asarray(indices.reshape(-1) < num_experts),
        num_tokens=tokens,
        num_experts=num_experts,
        slots_per_token=k,
    )
    return _plan_dispatch(assignments, **bounds)


# Eager calls compile every operation by itself.
_plan_dispatch = jax.jit(plan_dispatch, static_argnames=("capacity", "max_rows", "priority"))
kept_weights = jax.jit(dispatch.kept_weights)


def draw(tokens: int, num_experts: int, k: int, *, skew: float = 0.0, seed: int = 0) -> np.ndarray:
    """Distinct experts per token; loads fall as a power of the expert's rank."""
    rng = np.random.default_rng(seed)
    scores = -skew * np.log(np.arange(1, num_experts + 1)) + rng.gumbel(size=(tokens, num_experts))
    return np.argsort(-scores, axis=1)[:, :k]


def dynamic(tokens: int, num_experts: int, k: int) -> np.ndarray:
    indices = draw(tokens, num_experts, k)
    used = np.random.default_rng(1).integers(0, k + 1, size=(tokens, 1))
    return np.where(np.arange(k)[None, :] < used, indices, num_experts)


# The first six have one shape, so each function is compiled for them once. E = 1, k = E and T = 1 are
# in the contract's table.
PLANS = {
    "uniform": lambda: plan_of(draw(101, 8, 2), 8),
    "skewed": lambda: plan_of(draw(101, 8, 2, skew=2.0), 8),
    "empty expert": lambda: plan_of(draw(101, 6, 2), 8),
    "all to one expert": lambda: plan_of(np.tile([3, 8], (101, 1)), 8),
    "dynamic k": lambda: plan_of(dynamic(101, 8, 2), 8),
    "nothing kept": lambda: plan_of(np.full((101, 2), 8), 8),
    "many experts": lambda: plan_of(draw(64, 32, 2), 32),
    "capacity": lambda: plan_of(draw(48, 4, 2, skew=1.0), 4, capacity=17),
    "row budget": lambda: plan_of(draw(48, 4, 2, skew=1.0), 4, max_rows=60),
    "both": lambda: plan_of(draw(48, 4, 2, skew=1.0), 4, capacity=20, max_rows=50),
}


@functools.cache
def inputs(num_tokens: int, num_experts: int, dtype=jnp.float32):
    params = FFN.init(jax.random.key(0), num_experts=num_experts, d_model=D, d_ff=F)
    x = jax.random.normal(jax.random.key(1), (num_tokens, D)).astype(dtype)
    return params, x


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(run, expert_fn, params, x, weights, plan):
    probe = jax.random.normal(jax.random.key(2), x.shape)

    def loss(params, x, weights):
        y = run(expert_fn, params, x, plan, weights)
        return (y * probe).sum(), y

    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, weights)
    return y, grads


def assert_close(got, wanted, tolerance: float) -> None:
    def close(a, b):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(close, got, wanted)


@pytest.mark.parametrize("name", PLANS)
def test_equals_the_oracle_in_values_and_gradients(name):
    plan = PLANS[name]()
    a = plan.assignments
    params, x = inputs(a.num_tokens, a.num_experts)
    weights = kept_weights(plan)
    got = value_and_gradients(tiered.run, FFN, params, x, weights, plan)
    assert_close(got, value_and_gradients(dense.run, FFN, params, x, weights, plan), 2e-5)


def test_expert_choice():
    tokens = np.stack([np.random.default_rng(e).permutation(20)[:6] for e in range(4)])
    tokens[1, 4:] = 20  # unused slots
    choice = ExpertChoice(
        token_indices=jnp.asarray(tokens, jnp.int32),
        combine_weights=jnp.asarray(np.where(tokens < 20, 0.3, 0.0), jnp.float32),
        router_logits=jnp.zeros((20, 4)),
        router_probs=jnp.full((20, 4), 0.25),
        token_mask=jnp.ones((20,), bool),
        num_tokens=20,
    )
    plan = _plan_dispatch(jax.jit(to_assignments)(choice))
    params, x = inputs(20, 4)
    weights = kept_weights(plan)
    got = value_and_gradients(tiered.run, FFN, params, x, weights, plan)
    assert_close(got, value_and_gradients(dense.run, FFN, params, x, weights, plan), 2e-5)


def test_any_expert_function():
    def expert(params, rows):
        return jnp.tanh(rows @ params["a"]) * params["scale"][None, :]

    plan = PLANS["capacity"]()
    keys = jax.random.split(jax.random.key(0))
    params = {"a": jax.random.normal(keys[0], (4, D, D)), "scale": jnp.ones((4, D))}
    _, x = inputs(48, 4)
    weights = kept_weights(plan)
    got = value_and_gradients(tiered.run, expert, params, x, weights, plan)
    assert_close(got, value_and_gradients(dense.run, expert, params, x, weights, plan), 2e-5)


def test_gradients_agree_with_finite_differences():
    plan = plan_of(draw(9, 3, 2, skew=1.0), 3)
    params, x = inputs(9, 3)

    @jax.jit
    def f(params, x, weights):
        return tiered.run(FFN, params, x, plan, weights)

    inputs_ = (params, x, kept_weights(plan))
    jax.test_util.check_grads(f, inputs_, order=1, modes=("rev",), rtol=2e-2)


@pytest.mark.parametrize("name", ["skewed", "row budget"])
def test_half_precision_rows_accumulate_in_float32(name):
    plan = PLANS[name]()
    a = plan.assignments
    params, x = inputs(a.num_tokens, a.num_experts, jnp.bfloat16)
    weights = kept_weights(plan)
    y, grads = value_and_gradients(tiered.run, FFN, params, x, weights, plan)
    assert y.dtype == jnp.float32
    assert grads[1].dtype == jnp.bfloat16
    wide = value_and_gradients(dense.run, FFN, params, x.astype(jnp.float32), weights, plan)
    narrow = jax.tree.map(lambda g: g.astype(jnp.float32), (y, grads))
    assert_close(narrow, wide, 0.06)


def test_a_piece_writes_its_half_precision_rows_and_no_others():
    """XLA for CPU would widen and write again all rows at every piece, if it saw 16-bit floats."""
    plan = PLANS["skewed"]()
    a = plan.assignments
    params, x = inputs(a.num_tokens, a.num_experts, jnp.bfloat16)
    args = (tiered.run, FFN, params, x, kept_weights(plan), plan)
    compiled = value_and_gradients.lower(*args).compile().as_text()
    length = plan.num_rows + tiered.sizes_for(plan).pieces[-1]
    updated = re.findall(rf"(\w+)\[{length},{D}\]\S* dynamic-update-slice\(", compiled)
    assert updated == ["u16"]  # outputs; gradients of rows are added up in f32[T, D] at once


def test_no_buffer_of_all_rows_unless_a_gradient_follows():
    """It would be written, read and summed whatever k is."""
    plan = PLANS["dynamic k"]()
    a = plan.assignments
    params, x = inputs(a.num_tokens, a.num_experts)
    most = tiered.sizes_for(plan).pieces[-1]
    buffers = [f"[{rows},{D}]" for rows in (plan.num_rows, plan.num_rows + most)]
    args = (params, x, plan, kept_weights(plan))
    forward = jax.jit(functools.partial(tiered.run, FFN)).lower(*args).compile().as_text()
    assert not any(buffer in forward for buffer in buffers)
    both = value_and_gradients.lower(tiered.run, FFN, params, x, args[3], plan).compile().as_text()
    assert any(buffer in both for buffer in buffers)  # the outputs, for the combine weights


def test_transformations_agree_with_plain_calls():
    plans = [plan_of(draw(40, 4, 2, skew=s), 4) for s in (0.0, 2.0)]
    params, x = inputs(40, 4)
    run = jax.jit(lambda plan: tiered.run(FFN, params, x, plan, kept_weights(plan)))
    wanted = np.stack([run(plan) for plan in plans])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *plans)
    got = jax.jit(jax.vmap(run))(stacked)
    np.testing.assert_allclose(got, wanted, atol=1e-5)

    def loss(x):
        return jnp.square(tiered.run(FFN, params, x, plans[1], kept_weights(plans[1]))).sum()

    wanted = jax.jit(jax.grad(loss))(x)
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(x)
    np.testing.assert_allclose(again, wanted, atol=1e-4)
    each = jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(each[0], wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["uniform", "skewed", "capacity", "row budget"])
def test_no_token_and_no_expert_leaks_into_another(name):
    plan = PLANS[name]()
    a = plan.assignments
    params, x = inputs(a.num_tokens, a.num_experts)
    weights = kept_weights(plan)
    clean, (clean_p, clean_x, clean_w) = value_and_gradients(
        tiered.run, FFN, params, x, weights, plan
    )
    experts = np.asarray(a.expert_indices).reshape(a.num_tokens, -1)
    kept = np.asarray(plan.kept).reshape(experts.shape)
    bad_token, bad_expert = 3, 1
    poisoned = dict(params, up=params["up"].at[bad_expert].set(jnp.inf))
    y, (dparams, dx, dw) = value_and_gradients(
        tiered.run, FFN, poisoned, x.at[bad_token].set(jnp.nan), weights, plan
    )
    well = ~((experts == bad_expert) & kept).any(axis=1)
    well[bad_token] = False
    assert well.sum() > 5
    np.testing.assert_allclose(np.asarray(y)[well], np.asarray(clean)[well], atol=1e-5)
    np.testing.assert_allclose(np.asarray(dx)[well], np.asarray(clean_x)[well], atol=1e-5)
    slots = np.repeat(well, experts.shape[1])
    np.testing.assert_allclose(np.asarray(dw)[slots], np.asarray(clean_w)[slots], atol=1e-5)
    apart = np.setdiff1d(np.arange(a.num_experts), [*experts[bad_token][kept[bad_token]], 1])
    assert apart.size
    for leaf in params:
        np.testing.assert_allclose(
            np.asarray(dparams[leaf])[apart], np.asarray(clean_p[leaf])[apart], atol=2e-5
        )


def traced_under_other_sizes(*args):
    """A function of its own, so that ``value_and_gradients`` traces it under the patched sizes."""
    return tiered.run.__wrapped__(*args)


@pytest.mark.parametrize("name", ["skewed", "empty expert", "nothing kept", "row budget"])
def test_with_a_batched_bulk(name, monkeypatch):
    monkeypatch.setitem(tiered._BULK_SHARES, "cpu", (0.0, 0.5, 1.0))
    plan = PLANS[name]()
    assert len(tiered.bulk_sizes(plan)) > 1
    a = plan.assignments
    params, x = inputs(a.num_tokens, a.num_experts)
    weights = kept_weights(plan)
    got = value_and_gradients(traced_under_other_sizes, FFN, params, x, weights, plan)
    assert_close(got, value_and_gradients(dense.run, FFN, params, x, weights, plan), 2e-5)


def test_the_rows_executed_follow_the_load():
    count = jax.jit(tiered.slots_executed)

    def executed(indices, num_experts, **bounds):
        return float(count(plan_of(indices, num_experts, **bounds)))

    full = executed(draw(2048, 8, 2), 8)
    assert 4096 <= full <= 1.2 * 4096
    few = draw(2048, 8, 2)
    few[600:, 1] = 8
    assert executed(few, 8) <= 1.2 * (2048 + 600)
    assert executed(draw(2048, 8, 2), 8, max_rows=2648) <= 1.2 * 2648
    assert executed(np.full((2048, 1), 5), 64) <= 1.1 * 2048
    assert executed(np.full((64, 2), 8), 8) == 0


def test_sizes_are_bounded_by_what_an_expert_can_hold():
    for make in PLANS.values():
        plan = make()
        for sizes in (tiered.bulk_sizes(plan), tiered.piece_sizes(plan)):
            assert sizes == tuple(sorted(set(sizes)))
            assert sizes[-1] <= plan.max_group
        assert tiered.piece_sizes(plan)[0] >= 1


def test_rows_executed_are_counted_as_the_loop_counts_them():
    sizes = (32, 48, 64)
    for rows, wanted in [(0, 0), (1, 32), (33, 48), (64, 64), (65, 96), (200, 224)]:
        assert int(tier_loop.piece_rows(sizes, jnp.asarray([rows]))[0]) == wanted
