"""The implementations for few rows and for sorted rows against the dense oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import experts
from moe_jax.experts import active, dense, ragged
from moe_jax.experts.feed_forward import FeedForward
from moe_jax.experts.implementation import one_expert
from moe_jax.experts.vector_product import vector_product
from tests.experts.test_tiered import (
    FFN,
    PLANS,
    D,
    assert_close,
    draw,
    inputs,
    kept_weights,
    plan_of,
    value_and_gradients,
)


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


# One shape but for the last. T = 1 is in the contract's table.
FEW = {
    "eight tokens": lambda: plan_of(draw(8, 16, 2), 16),
    "same expert": lambda: plan_of(np.tile([2, 16], (8, 1)), 16),
    "nothing kept": lambda: plan_of(np.full((8, 2), 16), 16),
    "row budget": lambda: plan_of(draw(8, 16, 2), 16, max_rows=10),
}


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("implementation", [active, ragged], ids=["active", "ragged"])
def test_equals_the_oracle_in_values_and_gradients(implementation, name):
    plan = FEW[name]()
    a = plan.assignments
    params, x = inputs(a.num_tokens, a.num_experts)
    weights = kept_weights(plan)
    got = value_and_gradients(implementation.run, FFN, params, x, weights, plan)
    assert_close(got, value_and_gradients(dense.run, FFN, params, x, weights, plan), 2e-5)


def test_active_computes_the_kept_rows_and_nothing_else():
    executed = jax.jit(active.slots_executed)
    assert float(executed(FEW["eight tokens"]())) == 16
    assert float(executed(FEW["nothing kept"]())) == 0


def test_active_leaks_nothing_between_tokens_and_experts():
    plan = FEW["eight tokens"]()
    params, x = inputs(8, 16)
    weights = kept_weights(plan)
    clean = active.run(FFN, params, x, plan, weights)
    chosen = np.asarray(plan.assignments.expert_indices).reshape(8, 2)
    bad = int(chosen[0, 0])
    poisoned = dict(params, up=params["up"].at[bad].set(jnp.inf))
    y = active.run(FFN, poisoned, x.at[1].set(jnp.nan), plan, weights)
    well = ~(chosen == bad).any(axis=1)
    well[1] = False
    np.testing.assert_allclose(np.asarray(y)[well], np.asarray(clean)[well], atol=1e-6)


def test_ragged_runs_gated_experts_with_biases_and_no_others():
    plan = PLANS["capacity"]()
    expert_fn = FeedForward(activation="silu", gated=True, use_bias=True)
    params = expert_fn.init(jax.random.key(0), num_experts=4, d_model=D, d_ff=12)
    params = jax.tree.map(lambda p: p + 0.1, params)
    x = jax.random.normal(jax.random.key(1), (48, D))
    weights = kept_weights(plan)
    got = jax.jit(ragged.run, static_argnums=0)(expert_fn, params, x, plan, weights)
    want = jax.jit(dense.run, static_argnums=0)(expert_fn, params, x, plan, weights)
    np.testing.assert_allclose(got, want, atol=1e-4)
    with pytest.raises(ValueError, match="expected FeedForward"):
        ragged.run(lambda p, rows: rows, params, x, plan, weights)


def test_the_automatic_choice():
    def chosen(plan, platform):
        return experts.choose(plan, platform=platform).name

    assert chosen(plan_of(draw(1, 8, 2), 8), "cpu") == "active"
    assert chosen(PLANS["uniform"](), "cpu") == "tiered"
    assert ragged.refuse(FeedForward(), PLANS["uniform"](), "tpu") is None
    assert "E times" in ragged.refuse(FeedForward(), PLANS["uniform"](), "cuda")
    for platform in ("tpu", "cuda"):
        assert chosen(plan_of(draw(1, 8, 2), 8), platform) == "grouped"
        assert chosen(PLANS["uniform"](), platform) == "grouped"
    assert chosen(PLANS["uniform"](), "rocm") == "tiered"
    assert experts.choose(PLANS["uniform"](), "ragged").name == "ragged"


def test_gradients_of_active_agree_with_finite_differences():
    plan = FEW["eight tokens"]()
    params, x = inputs(8, 16)

    def f(params, x, weights):
        return active.run(FFN, params, x, plan, weights)

    check = (params, x, kept_weights(plan))
    jax.test_util.check_grads(f, check, order=1, modes=("rev",), rtol=2e-2)


def test_active_is_recomputed_under_checkpoint_to_the_same_gradient():
    plan = FEW["eight tokens"]()
    params, x = inputs(8, 16)

    def loss(x):
        return jnp.square(active.run(FFN, params, x, plan, kept_weights(plan))).sum()

    np.testing.assert_allclose(jax.grad(jax.checkpoint(loss))(x), jax.grad(loss)(x), atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "capacity", "tiered", "active", "ragged", "grouped"])
def test_bfloat16_products_accumulate_in_float32(name):
    """2048 ones add up to 2048; in bfloat16 the sum would stay at 256, where 256 + 1 is 256."""
    wide = 2048
    plan = plan_of([[0, 1], [1, 0]], 2, capacity=2)
    params = {
        "up": jnp.ones((2, wide, 1), jnp.bfloat16),
        "down": jnp.ones((2, 1, wide), jnp.bfloat16),
    }
    x = jnp.ones((2, wide), jnp.bfloat16)
    weights = jnp.full((4,), 0.5, jnp.float32)
    run = experts.IMPLEMENTATIONS[name].run
    y = run(FeedForward(activation="relu"), params, x, plan, weights)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, np.full((2, wide), wide, np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_weights_are_picked_bit_by_bit(dtype):
    stack = {"a": jax.random.normal(jax.random.key(0), (5, 3, 2)).astype(dtype)}
    pick = jax.jit(one_expert)
    for e in range(5):
        got = pick(stack, jnp.int32(e))["a"]
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(stack["a"][e]))


def test_no_copy_of_all_experts_is_made_to_decode():
    """Beside its arguments XLA holds a part of one expert in float32, of every dtype."""
    plan = plan_of(draw(1, 32, 2), 32)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn):
        params = {
            "up": jnp.ones((32, 64, 128), dtype),
            "down": jnp.ones((32, 128, 64), dtype),
        }
        step = jax.jit(active.run, static_argnums=0)
        x = jnp.ones((1, 64), jnp.bfloat16 if jnp.dtype(dtype).itemsize == 1 else dtype)
        memory = step.lower(FFN, params, x, plan, kept_weights(plan)).compile().memory_analysis()
        one = sum(p.size for p in params.values()) // 32
        assert memory.temp_size_in_bytes < 4 * one, dtype


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("rows", [1, 7, 8, 22])
def test_a_row_times_the_matrix_of_its_expert(dtype, rows):
    kernels = jax.random.normal(jax.random.key(0), (3, rows, 5)).astype(dtype)
    row = jax.random.normal(jax.random.key(1), (rows,))
    for e in range(3):
        got = jax.jit(vector_product)(kernels, jnp.int32(e), row)
        expected = np.asarray(row, np.float64) @ np.asarray(kernels[e], np.float64)
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


def test_every_number_of_float8_keeps_its_value():
    numbers = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), jnp.float8_e4m3fn)
    got = jax.jit(vector_product)(numbers[None, None], jnp.int32(0), jnp.ones((1,)))
    np.testing.assert_array_equal(got, numbers.astype(jnp.float32))
