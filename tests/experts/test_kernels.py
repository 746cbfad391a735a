"""The kernels of accelerators in interpreters, on the CPU, against the dense oracle.

The interpreter of TPU kernels fills memory with NaN before anything is written to it and raises for a
read out of bounds, so a row that no kernel wrote, and that nothing masks, is seen here.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from moe_jax.experts import FeedForward, dense, grouped, grouped_kernels, quantize_experts
from moe_jax.experts.feed_forward import QUANTIZED_DTYPES
from moe_jax.experts.grouped_product import ProductSpec, kernel_context
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


def of_form(form, left, right, sizes, more=None):
    """``more`` is the dtype of the result for "outer" and scales for "rows"."""
    if form == "outer":
        return interpreted(ProductSpec(form, jnp.dtype(more)), left, right, sizes)
    return interpreted(ProductSpec(form, left.dtype), left, right, sizes, more)


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
