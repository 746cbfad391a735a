"""The kernels of accelerators in interpreters, on the CPU, against the dense oracle.

The interpreter of TPU kernels fills memory with NaN before anything is written to it and raises for a
read out of bounds, so a row that no kernel wrote, and that nothing masks, is seen here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from moe_jax.experts import FeedForward, dense, grouped, grouped_kernels, quantize_experts
from moe_jax.experts.feed_forward import ACTIVATIONS, QUANTIZED_DTYPES
from moe_jax.experts.grouped_kernels import IN_KERNELS
from moe_jax.experts.grouped_product import ProductSpec, grouped_dot, kernel_context
from moe_jax.parallel.target_hlo import kernels_of
from moe_jax.parallel.targets import CompilerMissing, open_target
from moe_jax.routing.dispatch import kept_weights
from tests.experts.test_quantized_kernels import dequantized
from tests.experts.test_tiered import plan_of

WIDTH, EXPERTS, TOKENS = 128, 4, 96
FFN = FeedForward(activation="silu", gated=True, use_bias=True)
INTERPRETER = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")


@pytest.fixture(params=["tokamax", "megablox"])
def library(request, monkeypatch):
    """The kernels of both libraries, run by the interpreter wherever the CPU would run its loop."""
    if request.param == "tokamax" and not grouped_kernels.has_tokamax():
        pytest.skip("tokamax is not installed: pip install 'moe_jax[accelerator]'")
    monkeypatch.setattr(grouped_kernels, "has_tokamax", lambda: request.param == "tokamax")
    # The interpreter has effects, which a primitive has not: the products are replaced as a whole.
    for name, form in (("grouped_dot", "rows"), ("grouped_dot_transposed", "transposed")):
        product = functools.partial(of_form, form)
        monkeypatch.setattr(grouped, name, product)
    monkeypatch.setattr(grouped, "grouped_outer", functools.partial(of_form, "outer"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield request.param


def of_form(form, left, right, sizes, more=None, activation=None):
    """``more`` is the dtype of the result for "outer" and scales for "rows"."""
    if form == "outer":
        return interpreted(ProductSpec(form, jnp.dtype(more)), left, right, sizes)
    return interpreted(ProductSpec(form, left.dtype, activation), left, right, sizes, more)


def interpreted(*args):
    with kernel_context("tpu"), pltpu.force_tpu_interpret_mode(INTERPRETER):
        return grouped_kernels.tpu_product(*args)


def skewed_plan():
    """Expert 0 has most rows, expert 2 none; some slots are unused, so rows end before the buffer."""
    rng = np.random.default_rng(0)
    first = np.where(rng.random(TOKENS) < 0.7, 0, rng.choice([1, 3], TOKENS))
    second = np.where(rng.random(TOKENS) < 0.5, EXPERTS, np.where(first == 1, 3, 1))
    return plan_of(np.stack([first, second], axis=1), EXPERTS)


def inputs():
    params = FFN.init(jax.random.key(0), num_experts=EXPERTS, d_model=WIDTH, d_ff=2 * WIDTH)
    params = {k: v + 0.1 if k.endswith("bias") else v for k, v in params.items()}
    return params, jax.random.normal(jax.random.key(1), (TOKENS, WIDTH))


def cotangent(y):
    return jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)


def by_kernels(params, x, weights, plan):
    arguments, function = (params, x, weights, plan), grouped._Grouped(FFN)
    y, residuals = function.forward(*arguments, in_place=True)
    return y, function.backward(arguments, residuals, cotangent(y), in_place=True)[:3]


def by_oracle(params, x, weights, plan):
    run = functools.partial(dense.run, FFN)
    y, pull = jax.vjp(lambda p, x, w: run(p, x, plan, w), params, x, weights)
    return y, pull(cotangent(y))


def test_a_layer_on_tpu_kernels_equals_the_oracle_forward_and_backward(library):
    plan = skewed_plan()
    sizes = np.asarray(plan.group_sizes)
    assert sizes[2] == 0
    assert sizes.sum() < plan.num_rows
    params, x = inputs()
    weights = kept_weights(plan)
    # A function of its own, so that what another library's kernels made is not reused.
    got = jax.jit(lambda *args: by_kernels(*args))(params, x, weights, plan)
    want = jax.jit(by_oracle)(params, x, weights, plan)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.isfinite(a).all()
        scale = max(float(np.abs(b).max()), 1e-2)
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=2e-5)


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_8_bit_kernels_on_tpu_kernels_equal_the_oracle_on_dequantised_ones(library, dtype):
    plan, (params, x) = skewed_plan(), inputs()
    weights, small = kept_weights(plan), quantize_experts(params, dtype)
    # NaN in the scales of the expert without rows reaches nothing.
    used = jnp.arange(EXPERTS) != 2
    given = {
        n: jnp.where(used[:, None], p, jnp.nan) if "scale" in n else p for n, p in small.items()
    }
    function = grouped._Grouped(dataclasses.replace(FFN, quantized=dtype))

    def run(params, x, weights, plan):
        arguments = (params, x, weights, plan)
        y, residuals = function.forward(*arguments, in_place=True)
        dparams, *rest = function.backward(arguments, residuals, cotangent(y), in_place=True)[:3]
        return y, {n: d for n, d in dparams.items() if n.endswith("_bias")}, *rest

    y, (dparams, *rest) = jax.jit(by_oracle)(dequantized(small), x, weights, plan)
    want = y, {n: d for n, d in dparams.items() if n.endswith("_bias")}, *rest
    got = jax.jit(run)(given, x, weights, plan)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.isfinite(a).all()
        scale = max(float(np.abs(b).max()), 1e-2)
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=2e-5)


@pytest.mark.parametrize("form", ["rows", "transposed", "outer"])
def test_each_product_on_tpu_kernels_keeps_experts_apart(library, form):
    """An expert of inf and a row of NaN reach their own results only; bfloat16 is summed in float32."""
    sizes = jnp.array([100, 0, 57, 9], jnp.int32)
    owner = np.repeat(np.arange(EXPERTS), np.asarray(sizes))
    rows = np.random.default_rng(1).normal(size=(256, WIDTH)).astype(jnp.bfloat16)
    rows[owner.size :] = np.nan
    rows[3] = np.nan  # of expert 0
    kernels = np.random.default_rng(2).normal(size=(EXPERTS, WIDTH, WIDTH)).astype(jnp.bfloat16)
    kernels[2] = np.inf
    right = kernels if form != "outer" else np.where(np.isnan(rows), 0, rows)
    run = functools.partial(interpreted, ProductSpec(form, jnp.dtype("float32")))
    got = np.asarray(jax.jit(run)(jnp.asarray(rows), jnp.asarray(right), sizes))
    wide, matrices = rows.astype(np.float32), kernels.astype(np.float32)
    if form == "outer":
        for e in (2, 3):
            mine = wide[: owner.size][owner == e]
            np.testing.assert_allclose(got[e], mine.T @ mine, atol=2e-2)
        np.testing.assert_array_equal(got[1], 0)
        return
    for t in np.flatnonzero((owner != 2) & (np.arange(owner.size) != 3)):
        matrix = matrices[owner[t]] if form == "rows" else matrices[owner[t]].T
        np.testing.assert_allclose(got[t], wide[t] @ matrix, atol=2e-2)


def test_what_mosaic_cannot_load_on_a_tpu_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(grouped_kernels, "_tpu_product", lambda *_: "kernel")
    monkeypatch.setattr(grouped_kernels, "_xla_product", lambda *_: "xla")
    monkeypatch.setattr(grouped_kernels, "has_tokamax", lambda: True)
    sizes = jnp.array([8, 8], jnp.int32)
    for rows, out, by in (
        ("bfloat16", "float32", "kernel"),
        ("float32", "bfloat16", "kernel"),
        ("float16", "float16", "xla"),
        ("float32", "float16", "xla"),
    ):
        left, right = jnp.ones((16, 128), rows), jnp.ones((2, 128, 128), rows)
        spec = ProductSpec("rows", jnp.dtype(out))
        assert grouped_kernels.tpu_product(spec, left, right, sizes) == by


@pytest.mark.parametrize("dtype", [None, *QUANTIZED_DTYPES])
def test_ungated_experts_without_a_gradient_equal_the_oracle(library, dtype):
    """The second product reads what the first left unwritten, and the matrices of no unused expert."""
    expert_fn, plan = FeedForward(activation="silu"), skewed_plan()
    params = expert_fn.init(jax.random.key(0), num_experts=EXPERTS, d_model=WIDTH, d_ff=2 * WIDTH)
    x, weights, given = inputs()[1], kept_weights(plan), params
    if dtype is not None:
        given = quantize_experts(params, dtype)
        expert_fn, params = dataclasses.replace(expert_fn, quantized=dtype), dequantized(given)
    used = (jnp.arange(EXPERTS) != 2)[:, None]
    given = {
        n: jnp.where(used if p.ndim == 2 else used[..., None], p, jnp.nan)
        if p.dtype == jnp.float32
        else p
        for n, p in given.items()
    }
    function = grouped._Grouped(expert_fn)
    run = jax.jit(lambda *args: function.run(*args, in_place=True))
    want = dense.run(dataclasses.replace(expert_fn, quantized=None), params, x, plan, weights)
    np.testing.assert_allclose(run(given, x, weights, plan), want, atol=2e-5)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_an_activation_is_that_of_the_sums_in_float32(library, activation):
    """tokamax's kernels round once, after it; megablox has none, so its sums are rounded before."""
    sizes = jnp.array([100, 0, 57, 9], jnp.int32)
    owner = np.repeat(np.arange(EXPERTS), np.asarray(sizes))
    rows = np.random.default_rng(1).normal(size=(256, WIDTH)).astype(jnp.bfloat16)
    kernels = np.random.default_rng(2).normal(size=(EXPERTS, WIDTH, WIDTH)).astype(jnp.bfloat16)
    kernels = (kernels / WIDTH**0.5).astype(jnp.bfloat16)
    kernels[1] = np.nan
    sums = np.einsum(
        "tm,tmn->tn", rows[: owner.size].astype(np.float32), kernels[owner].astype(np.float32)
    )
    want = np.asarray(ACTIVATIONS[activation](jnp.asarray(sums)))

    def product(dtype):
        run = functools.partial(interpreted, ProductSpec("rows", jnp.dtype(dtype), activation))
        return jax.jit(run)(jnp.asarray(rows), jnp.asarray(kernels), sizes)[: owner.size]

    np.testing.assert_allclose(product("float32"), want, atol=5e-6)
    if activation == "silu":
        once = np.asarray(product("bfloat16") == jnp.asarray(want).astype(jnp.bfloat16)).mean()
        assert once > 0.98 if library == "tokamax" else 0.5 < once < 0.95


def test_activations_in_kernels_are_the_activations_and_have_a_name_to_import():
    assert set(IN_KERNELS) == set(ACTIVATIONS)
    x = jnp.linspace(-20.0, 20.0, 4001)
    for name, function in IN_KERNELS.items():
        np.testing.assert_allclose(function(x), ACTIVATIONS[name](x), atol=1e-6, rtol=1e-6)
        module = importlib.import_module(function.__module__)
        assert getattr(module, function.__qualname__) is function


def test_ungated_experts_pass_over_their_hidden_activations_in_products_only():
    """Where no gradient follows: XLA for an accelerator runs a pass of its own for anything else."""

    def hidden_operations(expert_fn, gradient):
        params = expert_fn.init(jax.random.key(0), num_experts=EXPERTS, d_model=6, d_ff=10)
        plan = skewed_plan()
        x, function = jnp.ones((TOKENS, 6)), grouped._Grouped(expert_fn)
        run = function.forward if gradient else function.run
        args = params, x, kept_weights(plan), plan
        jaxpr = jax.make_jaxpr(lambda *args: run(*args, in_place=True))(*args)
        shape = (grouped.padded_rows(plan), 10)
        return [e.primitive.name for e in jaxpr.eqns if e.outvars[0].aval.shape == shape]

    assert hidden_operations(FeedForward(), False) == ["moe_grouped_product"]
    assert len(hidden_operations(FeedForward(), True)) > 1
    assert len(hidden_operations(FeedForward(use_bias=True), False)) > 1
    assert len(hidden_operations(FeedForward(gated=True), False)) > 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_values_are_those_of_the_program_that_a_gradient_follows(activation, dtype):
    """Without a gradient sums are not rounded before the activation: closer in 16 bits, not equal."""
    expert_fn, plan = FeedForward(activation=activation), skewed_plan()
    params = expert_fn.init(jax.random.key(0), num_experts=EXPERTS, d_model=WIDTH, d_ff=WIDTH)
    x, weights = inputs()[1].astype(dtype), kept_weights(plan)
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    run = jax.jit(lambda p, x, w: grouped.run(expert_fn, p, x, plan, w))
    alone, (with_gradient, _) = run(params, x, weights), jax.vjp(run, params, x, weights)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    want = dense.run(expert_fn, wide, x.astype(jnp.float32), plan, weights)
    if dtype == "float32":
        np.testing.assert_allclose(alone, with_gradient, rtol=1e-5, atol=1e-6)
        return
    largest = float(jnp.abs(want).max())
    np.testing.assert_allclose(alone, with_gradient, atol=0.01 * largest)
    assert jnp.square(alone - want).sum() < jnp.square(with_gradient - want).sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jax, while a target is opened
@pytest.mark.parametrize("name", ["v5e:2x4", "h100"])
def test_the_compilers_of_accelerators_take_each_activation_in_a_kernel(name):
    if not grouped_kernels.has_tokamax():
        pytest.skip("tokamax is not installed: pip install 'moe_jax[accelerator]'")
    try:
        target = open_target(name)
    except (CompilerMissing, NotImplementedError) as error:
        pytest.skip(str(error))
    width, struct = 256, jax.ShapeDtypeStruct
    arguments = (
        struct((width, width), jnp.bfloat16),
        struct((EXPERTS, width, width), jnp.bfloat16),
        struct((EXPERTS,), jnp.int32),
    )
    where = jax.sharding.SingleDeviceSharding(target.devices[0])
    cuda = target.platform == "cuda"
    options: dict[str, str | bool] = {"xla_gpu_autotune_level": "0"} if cuda else {}
    for activation in ACTIVATIONS:
        product = functools.partial(grouped_dot, activation=activation)
        with jax.default_device(target.devices[0]):
            lowered = jax.jit(product, in_shardings=where, out_shardings=where).lower(*arguments)
        text = lowered.compile(compiler_options=options).as_text() or ""
        assert sum(kernels_of(text).values()) == 1
        assert not re.search(rf"= \w+\[{width},{width}\]\S* fusion\(", text)  # a pass over the sums


def test_tiles_fit_the_memory_of_a_kernel_and_have_whole_lanes():
    struct = jax.ShapeDtypeStruct
    for d_model, d_ff, experts, rows in (
        (4096, 14336, 8, 16384),
        (2048, 1024, 64, 131072),
        (7168, 2048, 256, 65536),
        (2880, 2880, 32, 4096),
        (128, 128, 4, 128),
    ):
        left = struct((rows, d_model), jnp.bfloat16)
        right = struct((experts, d_model, d_ff), jnp.bfloat16)
        for form in ("rows", "transposed", "outer"):
            spec = ProductSpec(form, jnp.dtype("bfloat16"))
            if form == "transposed":
                left = struct((rows, d_ff), jnp.bfloat16)
            elif form == "outer":
                left, right = (
                    struct((rows, d_model), jnp.bfloat16),
                    struct((rows, d_ff), jnp.bfloat16),
                )
            tall, inner, wide = grouped_kernels.tpu_tiles(spec, rows, left, right, experts)
            assert rows % tall == 0
            assert 2 * 2 * (tall * inner + inner * wide) <= grouped_kernels._VMEM_BYTES
            for size, whole in ((inner, left.shape[1]), (wide, right.shape[-1])):
                assert size % 128 == 0 or size == whole or form == "transposed"


def test_row_padding_to_tiles_is_at_most_a_tenth_where_tiles_can_be_chosen():
    left = jax.ShapeDtypeStruct((131072, 2048), jnp.bfloat16)
    right = jax.ShapeDtypeStruct((64, 2048, 1024), jnp.bfloat16)
    spec = ProductSpec("rows", jnp.dtype("bfloat16"))
    tall = grouped_kernels.tpu_tiles(spec, 131072, left, right, 64)[0]
    assert 64 * tall <= 0.1 * 131072


@pytest.mark.parametrize("form", ["rows", "outer"])
@pytest.mark.parametrize(("dtype", "follows"), [(jnp.float32, True), (jnp.bfloat16, False)])
def test_tpu_kernels_follow_the_precision_that_is_asked_for(library, form, dtype, follows):
    """``jax.default_matmul_precision`` holds for products of experts as for all others."""
    right = jnp.ones((EXPERTS, WIDTH, WIDTH) if form == "rows" else (WIDTH, WIDTH), dtype)
    operands = jnp.ones((WIDTH, WIDTH), dtype), right, jnp.full((EXPERTS,), 32, jnp.int32)

    def program(precision):
        spec = ProductSpec(form, jnp.dtype("float32"))
        with jax.default_matmul_precision(precision), kernel_context("tpu"):
            run = jax.jit(lambda *operands: grouped_kernels.tpu_product(spec, *operands))
            return run.trace(*operands).lower(lowering_platforms=("tpu",)).as_text()

    assert program("default") == program("bfloat16")
    assert (program("default") != program("highest")) == follows
    assert program("highest") == program("float32") == program("high")
