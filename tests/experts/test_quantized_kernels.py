"""Experts with 8-bit kernels equal experts with the dequantised ones, by every way of running them."""

from __future__ import annotations

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax import FeedForward, LayerOptions, init_moe_layer, moe_layer, quantize_experts
from moe_jax.checkpoint import Checkpoint, LayerSpec, restore, save
from moe_jax.experts import IMPLEMENTATIONS, run_experts
from moe_jax.experts.feed_forward import QUANTIZED_DTYPES
from moe_jax.experts.grouped_kernels import has_tokamax
from moe_jax.experts.grouped_product import grouped_dot
from moe_jax.nn.linen import MoE as LinenMoE
from moe_jax.nn.nnx import MoE
from moe_jax.parallel.targets import compile_program, open_target
from tests.experts.test_contract import (
    PLANS,
    D,
    F,
    check_equal,
    drawn,
    kept_weights,
)

E = 4
KINDS = {
    "plain": FeedForward(),
    "gated": FeedForward(activation="silu", gated=True),
    "gated with bias": FeedForward(activation="silu", gated=True, use_bias=True),
}


@pytest.fixture(params=list(IMPLEMENTATIONS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=QUANTIZED_DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


def quantized(expert_fn: FeedForward, dtype: str) -> FeedForward:
    return FeedForward(
        activation=expert_fn.activation,
        gated=expert_fn.gated,
        use_bias=expert_fn.use_bias,
        quantized=dtype,
    )


def dequantized(small):
    """The float kernels that the 8-bit ones stand for."""
    return {
        n: p.astype(jnp.float32) * small[f"{n}_scale"][..., None, :] if f"{n}_scale" in small else p
        for n, p in small.items()
        if not n.endswith("_scale")
    }


@partial(jax.jit, static_argnums=(0, 1))
def outputs_and_gradients(expert_fn, implementation, params, x, weights, plan):
    """The output, and the gradients of (biases, x, weights) for a fixed cotangent."""

    def f(biases, x, weights):
        full = {**params, **biases}
        return run_experts(expert_fn, full, x, plan, weights, implementation=implementation).y

    biases = {n: p for n, p in params.items() if n.endswith("_bias")}
    y, pull = jax.vjp(f, biases, x, weights)
    return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


# --- quantisation ---------------------------------------------------------------------------


def test_an_int8_weight_is_off_by_at_most_half_its_scale():
    params, _ = drawn(3, E, KINDS["gated with bias"])
    small = quantize_experts(params)
    for n in ("up", "gate", "down"):
        scale = np.asarray(small[f"{n}_scale"])[:, None, :]
        assert small[n].dtype == jnp.int8
        assert np.abs(small[n]).max() == 127
        error = np.abs(np.asarray(small[n]) * scale - np.asarray(params[n]))
        assert (error <= 0.5 * scale * (1 + 1e-5)).all()
    assert small["up_scale"].shape == (E, F)
    assert small["down_scale"].shape == (E, D)
    np.testing.assert_array_equal(small["up_bias"], params["up_bias"])


def test_a_float8_weight_has_four_significant_bits():
    params, _ = drawn(3, E, KINDS["gated"])
    small = quantize_experts(params, "float8_e4m3fn")
    for n in ("up", "gate", "down"):
        scale = np.asarray(small[f"{n}_scale"])[:, None, :]
        wide = np.asarray(small[n], np.float32) * scale
        # Half a unit in the last of four bits; below 2**-6 the numbers are spaced by 2**-9.
        allowed = np.maximum(np.abs(params[n]) / 16, scale * 2.0**-10)
        assert (np.abs(wide - np.asarray(params[n])) <= allowed * (1 + 1e-5)).all()
        assert float(jnp.abs(small[n].astype(jnp.float32)).max()) == 448.0


def test_a_channel_of_zeros_or_of_almost_nothing_stays_finite(dtype):
    params = {"up": jnp.ones((2, 3, 4)), "down": jnp.ones((2, 4, 3))}
    params["up"] = params["up"].at[0, :, 1].set(0.0).at[0, :, 2].set(1e-42)
    small = quantize_experts(params, dtype)
    assert float(small["up_scale"][0, 1]) == 1.0
    wide = dequantized(small)["up"]
    np.testing.assert_array_equal(wide[0, :, 1], 0)
    np.testing.assert_allclose(wide[0, :, 2], 0, atol=1e-41)
    np.testing.assert_allclose(wide[1], 1.0, rtol=1e-6)


def test_kernels_of_bfloat16_and_traced_ones_are_taken(dtype):
    params, _ = drawn(3, E, KINDS["gated"])
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    eager, traced = quantize_experts(half, dtype), jax.jit(partial(quantize_experts, dtype=dtype))
    small = traced(half)
    assert small["up_scale"].dtype == jnp.float32
    check_equal(small, eager, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"up": jnp.full((E, D, F), jnp.nan)}, "finite numbers in up, got NaN or infinity"),
        ({"down": jnp.full((E, F, D), jnp.inf)}, "finite numbers in down"),
        ({"up": jnp.ones((E, D, F), jnp.int8)}, r"up to be an array of floats, got int8\[4"),
        ({"up_scale": jnp.ones((E, F))}, r"not quantised yet.*not known: \['up_scale'\]"),
        ({"norm": jnp.ones((E, F))}, r"not known: \['norm'\]"),
    ],
)
def test_what_cannot_be_quantised_is_named(change, words):
    params, _ = drawn(3, E, KINDS["plain"])
    with pytest.raises((TypeError, ValueError), match=words):
        quantize_experts({**params, **change})
    with pytest.raises(ValueError, match=r"missing: \['down'\]"):
        quantize_experts({"up": params["up"]})
    with pytest.raises(ValueError, match="dtype: expected one of 'int8', 'float8_e4m3fn'"):
        quantize_experts(params, "int4")
    with pytest.raises(TypeError, match="expected a dict of arrays, got float32"):
        quantize_experts(params["up"])


# --- running --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_equals_the_oracle_on_dequantised_kernels(kind, dtype, name):
    expert_fn, plan = KINDS[kind], PLANS["capacity and row budget"]()
    params, x = drawn(13, E, expert_fn)
    small, weights = quantize_experts(params, dtype), kept_weights(plan)
    got = outputs_and_gradients(quantized(expert_fn, dtype), name, small, x, weights, plan)
    want = outputs_and_gradients(expert_fn, "dense", dequantized(small), x, weights, plan)
    assert got[0].dtype == jnp.float32
    check_equal(got, want)


@pytest.mark.parametrize("case", ["skewed", "one expert empty", "all padding", "expert choice"])
def test_every_load(case, name):
    expert_fn, plan = KINDS["gated with bias"], PLANS[case]()
    params, x = drawn(13, E, expert_fn)
    small, weights = quantize_experts(params), kept_weights(plan)
    got = outputs_and_gradients(quantized(expert_fn, "int8"), name, small, x, weights, plan)
    want = outputs_and_gradients(expert_fn, "dense", dequantized(small), x, weights, plan)
    check_equal(got, want)


def test_rows_of_bfloat16(dtype, name):
    expert_fn, plan = KINDS["gated with bias"], PLANS["skewed"]()
    params, x = drawn(13, E, expert_fn)
    small, weights = quantize_experts(params, dtype), kept_weights(plan)
    x = x.astype(jnp.bfloat16)
    got = outputs_and_gradients(quantized(expert_fn, dtype), name, small, x, weights, plan)
    want = outputs_and_gradients(
        expert_fn, "dense", dequantized(small), x.astype(jnp.float32), weights, plan
    )
    assert got[1][1].dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), b, atol=0.05 * float(np.abs(b).max()), rtol=0.05
        )


def test_nan_in_the_scales_of_an_expert_reaches_its_own_tokens_only(dtype, name):
    if name == "ragged":
        pytest.skip("XLA for CPU expands it to every expert on every row, as its file says")
    expert_fn, plan = KINDS["gated"], PLANS["capacity and row budget"]()
    params, x = drawn(13, E, expert_fn)
    small, weights = quantize_experts(params, dtype), kept_weights(plan)
    run = partial(outputs_and_gradients, quantized(expert_fn, dtype), name)
    y, (_, dx, dw) = run(small, x, weights, plan)
    bad = {n: p.at[1].set(jnp.nan) if n.endswith("_scale") else p for n, p in small.items()}
    bad_y, (_, bad_dx, bad_dw) = run(bad, x, weights, plan)
    a, kept = plan.assignments, np.asarray(plan.kept)
    uses = kept & (np.asarray(a.expert_indices) == 1)
    others = ~np.isin(np.arange(13), np.asarray(a.token_indices)[uses])
    assert others.any()
    assert not others.all()
    check_equal((bad_y[others], bad_dx[others]), (y[others], dx[others]))
    check_equal(bad_dw[~uses], dw[~uses])
    assert np.isnan(bad_y[~others]).all()


@pytest.mark.parametrize("implementation", ["tiered", "active", "grouped"])
def test_second_derivatives_and_forward_mode_in_x(implementation):
    expert_fn, plan = KINDS["gated with bias"], PLANS["dynamic k"]()
    params, x = drawn(13, E, expert_fn)
    small, weights = quantize_experts(params), kept_weights(plan)

    def value(expert_fn, params, name, x):
        return run_experts(expert_fn, params, x, plan, weights, implementation=name).y.sum()

    got = partial(value, quantized(expert_fn, "int8"), small, implementation)
    want = partial(value, expert_fn, dequantized(small), "dense")
    for derivative in (
        lambda f: jax.jvp(f, (x,), (jnp.cos(x),))[1],
        lambda f: jax.grad(lambda x: (jax.grad(f)(x) ** 2).sum())(x),
        lambda f: jax.vmap(jax.grad(f))(jnp.stack([x, 2 * x])),
    ):
        check_equal(jax.jit(derivative, static_argnums=0)(got), derivative(want), rtol=1e-3)


def test_a_derivative_of_kernels_or_scales_is_refused_with_what_to_do(dtype, name):
    expert_fn, plan = quantized(KINDS["gated with bias"], dtype), PLANS["capacity"]()
    params, x = drawn(13, E, KINDS["gated with bias"])
    small, weights = quantize_experts(params, dtype), kept_weights(plan)

    def loss(chosen):
        full = {**small, **chosen}
        return run_experts(expert_fn, full, x, plan, weights, implementation=name).y.sum()

    with pytest.raises(
        TypeError, match=r"no derivative with respect to quantised kernels.*up_scale"
    ):
        jax.grad(loss)({"up_scale": small["up_scale"]})
    with pytest.raises(
        TypeError, match="int8" if dtype == "int8" else "no derivative with respect"
    ):
        jax.grad(loss)({"up": small["up"]})
    jax.eval_shape(jax.grad(loss), {"up_bias": small["up_bias"]})


def test_a_derivative_of_a_shared_experts_kernels_is_refused_too():
    router, expert_fn = moe_jax.TopK(num_experts=E, k=2), KINDS["plain"]
    params = init_moe_layer(router, expert_fn, jax.random.key(0), d_model=D, d_ff=F, shared_d_ff=F)
    small = {**params, **{n: quantize_experts(params[n]) for n in ("experts", "shared")}}
    x, plain = (
        jnp.ones((3, D)),
        {**params, **{n: dequantized(small[n]) for n in ("experts", "shared")}},
    )

    def layer(expert_fn, params, scale=None):
        if scale is not None:
            params = {**params, "shared": {**params["shared"], "up_scale": scale}}
        return moe_layer(router, expert_fn, params, router.init_state(), x)[0]

    got = layer(quantized(expert_fn, "int8"), small)
    check_equal(got, layer(expert_fn, plain))
    with pytest.raises(TypeError, match="no derivative with respect to quantised kernels"):
        jax.grad(lambda s: layer(quantized(expert_fn, "int8"), small, s).sum())(
            small["shared"]["up_scale"]
        )


def test_one_token_reads_8_bit_weights_in_place():
    """`active` makes no copy of all experts in another dtype, and none of one; sums take 1/8 of it."""
    expert_fn, plan = KINDS["gated"], PLANS["T=1"]()
    params = expert_fn.init(jax.random.key(0), num_experts=E, d_model=64, d_ff=128)
    run = partial(run_experts, implementation="active")
    args = (quantize_experts(params), jnp.ones((1, 64)), plan, kept_weights(plan))
    compiled = jax.jit(run, static_argnums=0).lower(quantized(expert_fn, "int8"), *args).compile()
    assert not re.search(rf"f32\[{E},(64,128|128,64)", compiled.as_text())
    memory = compiled.memory_analysis()
    one_in_16_bits = 2 * args[0]["up"][0].nbytes
    assert memory.temp_size_in_bytes < one_in_16_bits


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu"
)
def test_a_tpu_kernel_reads_8_bits_and_no_converted_copy(dtype):
    struct, experts, width = jax.ShapeDtypeStruct, 4, 512
    if not has_tokamax():
        pytest.skip("megablox takes one dtype: pip install 'moe_jax[accelerator]'")
    program = compile_program(
        open_target("v5e:2x4"),
        grouped_dot,
        (
            struct((256, width), jnp.bfloat16),
            struct((experts, width, width), dtype),
            struct((experts,), jnp.int32),
            struct((experts, width), jnp.float32),
        ),
        what="product",
        gradient=False,
        implementation="grouped",
    )
    assert program.error is None
    assert program.kernels == {"tpu_custom_call": 1}
    assert program.temp_bytes < 2 * experts * width * width  # the copy in bfloat16


# --- refusals -------------------------------------------------------------------------------


WRONG = {
    "a scale is missing": ({"up_scale": None}, ValueError, "missing: up_scale"),
    "a scale of the other axis": (
        {"up_scale": jnp.ones((E, D))},
        ValueError,
        rf"up_scale \[E=4, F={F}\], got float32\[4, {D}\]",
    ),
    "a scale of another dtype": (
        {"up_scale": jnp.ones((E, F), jnp.bfloat16)},
        TypeError,
        r"up_scale in float32.*got bfloat16\[4, 10\]",
    ),
    "float kernels": (
        {"up": jnp.ones((E, D, F))},
        TypeError,
        r"up in int8.*got float32\[4, 6, 10\]",
    ),
    "kernels of the other 8 bits": (
        {"down": jnp.ones((E, F, D), jnp.float8_e4m3fn)},
        TypeError,
        "down in int8.*got float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_parameters_that_are_not_those_of_the_flag_are_named(case, name):
    change, error, words = WRONG[case]
    params, x = drawn(13, E, KINDS["gated"])
    plan = PLANS["capacity"]()
    wrong = {n: p for n, p in {**quantize_experts(params), **change}.items() if p is not None}
    expert_fn = quantized(KINDS["gated"], "int8")
    with pytest.raises(error, match=words):
        run_experts(expert_fn, wrong, x, plan, kept_weights(plan), implementation=name)


def test_quantised_parameters_without_the_flag_are_refused():
    params, x = drawn(13, E, KINDS["gated"])
    plan = PLANS["capacity"]()
    with pytest.raises(ValueError, match="not used: down_scale, gate_scale, up_scale"):
        run_experts(KINDS["gated"], quantize_experts(params), x, plan, kept_weights(plan))
    with pytest.raises(
        ValueError, match="quantized: expected one of None, 'int8', 'float8_e4m3fn'"
    ):
        FeedForward(quantized="int4")


def test_modules_take_quantised_parameters_and_do_not_create_them():
    expert_fn, router = FeedForward(quantized="int8"), moe_jax.TopK(num_experts=E, k=2)
    x = jax.random.normal(jax.random.key(1), (3, D))
    words = "made from trained ones: initialise and train without it"
    with pytest.raises(ValueError, match=words):
        MoE(router, d_model=D, d_ff=F, expert_fn=expert_fn, rngs=nnx.Rngs(0))
    module = LinenMoE(router, expert_fn, d_model=D, d_ff=F)
    with pytest.raises(ValueError, match=words):
        module.init(jax.random.key(0), x)
    params = init_moe_layer(router, FeedForward(), jax.random.key(0), d_model=D, d_ff=F)
    params["experts"] = quantize_experts(params["experts"])
    layer = MoE(router, d_model=D, d_ff=F, expert_fn=expert_fn, params=params)
    assert layer.params()["experts"]["up"].dtype == jnp.int8
    want, _ = moe_layer(router, expert_fn, params, router.init_state(), x)
    check_equal(layer(x), want)
    given = LinenMoE(
        router, expert_fn, d_model=D, expert_init=lambda key, num_experts: params["experts"]
    )
    variables = given.init(jax.random.key(0), x)
    variables = {**variables, "params": {**variables["params"], "router": params["router"]}}
    check_equal(given.apply(variables, x), want)


# --- whole layers and checkpoints -----------------------------------------------------------


def test_a_checkpoint_keeps_every_bit(dtype, tmp_path):
    params, _ = drawn(3, E, KINDS["gated with bias"])
    small = quantize_experts(params, dtype)
    expert_fn = quantized(KINDS["gated with bias"], dtype)
    save(tmp_path / "step", Checkpoint(params={"experts": small}))
    loaded = restore(tmp_path / "step").params["experts"]
    assert jax.tree.map(lambda p: p.dtype, loaded) == jax.tree.map(lambda p: p.dtype, small)
    for n, p in small.items():
        assert np.asarray(loaded[n]).tobytes() == np.asarray(p).tobytes(), n
    spec = LayerSpec(router=("router",), layer=(), experts=expert_fn)
    assert LayerSpec.from_json(spec.to_json()) == spec


def test_a_layer_and_its_gradient_in_x(dtype):
    router, expert_fn = moe_jax.TopK(num_experts=E, k=2), KINDS["gated"]
    params = init_moe_layer(router, expert_fn, jax.random.key(0), d_model=D, d_ff=F)
    small = {**params, "experts": quantize_experts(params["experts"], dtype)}
    plain = {**params, "experts": dequantized(small["experts"])}
    x = jax.random.normal(jax.random.key(1), (2, 3, D))

    @partial(jax.jit, static_argnums=0)
    def value_and_grad(expert_fn, params, x):
        def loss(gate, x):
            full = {**params, "router": gate}
            y, _ = moe_layer(
                router, expert_fn, full, router.init_state(), x, options=LayerOptions()
            )
            return (y**2).sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(params["router"], x)

    check_equal(
        value_and_grad(quantized(expert_fn, dtype), small, x), value_and_grad(expert_fn, plain, x)
    )
