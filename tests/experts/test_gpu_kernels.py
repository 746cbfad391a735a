"""tokamax's kernels for NVIDIA GPUs in interpreters, on the CPU, against products of each expert.

Its Triton kernels run in Pallas' plain interpreter, and its Mosaic kernels for Hopper in that of Mosaic
GPU, which lacks what the kernel of the form "outer" does: a product with an operand in registers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts import FeedForward, grouped, grouped_kernels, quantize_experts
from moe_jax.experts.feed_forward import ACTIVATIONS, QUANTIZED_DTYPES
from moe_jax.experts.grouped_product import ProductSpec, kernel_context
from moe_jax.routing.dispatch import kept_weights
from tests.experts import test_kernels as tpu

pytestmark = pytest.mark.skipif(
    not grouped_kernels.has_tokamax(),
    reason="tokamax is not installed: pip install 'moe_jax[accelerator]'",
)
FORMS = ("rows", "transposed", "outer")
SIZES = jnp.array([37, 0, 90, 0, 23], jnp.int32)


@contextlib.contextmanager
def triton():
    """Runs Triton kernels in Pallas' interpreter; without a device the library takes no others."""
    pallas = importlib.import_module("jax.experimental.pallas")
    compiled = pallas.pallas_call

    def interpreted(*args, compiler_params=None, **options):
        return compiled(*args, **options, interpret=True)

    with mock.patch.object(pallas, "pallas_call", interpreted), kernel_context("cuda"):
        yield grouped_kernels.gpu_product


@contextlib.contextmanager
def mosaic():
    """Runs Mosaic kernels for Hopper in their interpreter."""
    interpreter = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    devices = importlib.import_module("tokamax._src.gpu_utils")
    hopper = {"is_sm90": True, "is_sm100": False, "has_mosaic_gpu_support": True}
    with contextlib.ExitStack() as stack:
        for name, value in hopper.items():
            stack.enter_context(mock.patch.object(devices, name, lambda *_, value=value: value))
        stack.enter_context(interpreter.force_gpu_interpret_mode())
        stack.enter_context(kernel_context("cuda", jax.devices("cpu")[0]))
        yield functools.partial(grouped_kernels.gpu_product, device=jax.devices("cpu")[0])


def run(interpreter, form, *operands, dtype="float32"):
    with interpreter() as product:
        return jax.jit(functools.partial(product, ProductSpec(form, jnp.dtype(dtype))))(*operands)


def operands(form, rows, d, f, dtype, seed=0):
    """Rows after the last expert's hold NaN, and so do the matrices of experts without rows."""
    rng = np.random.default_rng(seed)
    used = int(SIZES.sum())

    def some_rows(width):
        out = rng.normal(size=(rows, width))
        # The rows of a sum over rows are masked by the layer: what is past them is zero there.
        out[used:] = 0 if form == "outer" else np.nan
        return jnp.asarray(out, dtype)

    if form == "outer":
        return some_rows(d), some_rows(f)
    kernels = rng.normal(size=(len(SIZES), d, f))
    kernels[np.asarray(SIZES) == 0] = np.nan
    return some_rows(d if form == "rows" else f), jnp.asarray(kernels, dtype)


def expected(form, left, right):
    """The product expert by expert in float64."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    ends = np.cumsum(SIZES)
    parts = [slice(end - size, end) for end, size in zip(ends, np.asarray(SIZES), strict=True)]
    if form == "outer":
        return np.stack([left[p].T @ right[p] for p in parts])
    return np.concatenate(
        [left[p] @ (right[e] if form == "rows" else right[e].T) for e, p in enumerate(parts)]
    )


def check(form, got, want):
    got = np.asarray(got, np.float64)[: len(want)]
    np.testing.assert_allclose(got / np.abs(want).max(), want / np.abs(want).max(), atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(256, 256, 128), (160, 72, 128), (151, 20, 256)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_triton_kernels_equal_the_product_of_each_expert(form, rows, inner, outer, dtype):
    """Also the sum of an expert without rows, for which the kernel takes rows of the one before.

    The interpreter does not run kernels whose output is no whole number of blocks of 128 columns.
    """
    d, f = (outer, inner) if form == "transposed" else (inner, outer)
    left, right = operands(form, rows, d, f, dtype)
    check(form, run(triton, form, left, right, SIZES), expected(form, left, right))


@pytest.mark.parametrize("form", ["rows", "transposed"])
@pytest.mark.parametrize(("rows", "d", "f"), [(192, 128, 64), (150, 192, 192), (151, 64, 320)])
def test_mosaic_kernels_equal_the_product_of_each_expert(form, rows, d, f):
    """Also where the axis that is summed over has no whole number of 128, the kernel's own block."""
    left, right = operands(form, rows, d, f, "bfloat16")
    check(form, run(mosaic, form, left, right, SIZES), expected(form, left, right))


@pytest.mark.parametrize("interpreter", [triton, mosaic])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_an_activation_is_that_of_the_product(interpreter, activation):
    left, right = operands("rows", 192, 128, 128, "bfloat16")
    spec = ProductSpec("rows", jnp.dtype("float32"), activation)
    with interpreter() as product:
        got = jax.jit(functools.partial(product, spec))(left, right, SIZES)
    want = jnp.asarray(expected("rows", left, right), jnp.float32)
    check("rows", got, np.asarray(ACTIVATIONS[activation](want), np.float64))


@pytest.mark.parametrize(("d", "f", "mosaics"), [(192, 256, True), (72, 128, False)])
def test_widths_that_mosaic_kernels_do_not_take_are_left_to_triton(d, f, mosaics, monkeypatch):
    """The kernels read and write tiles of 64 columns, and refuse others with an error of their own."""
    taken = []

    def record(left, right, **options):
        taken.append((left.shape, right.shape))
        raise NotImplementedError

    monkeypatch.setattr(grouped_kernels, "mosaic_product", record)
    with (
        triton() as product,
        mock.patch("tokamax._src.gpu_utils.has_triton_support", return_value=1),
    ):
        left, right = operands("rows", 150, d, f, "bfloat16")
        product = functools.partial(product, device=jax.devices("cpu")[0])
        got = product(ProductSpec("rows", jnp.dtype("float32")), left, right, SIZES)
    check("rows", got, expected("rows", left, right))
    assert taken == ([((192, d), right.shape)] if mosaics else [])


def layer(monkeypatch):
    """A gated layer with biases on Triton kernels: plan, parameters, x, weights."""

    def of_form(form, left, right, sizes, more=None):
        spec = ProductSpec(form, jnp.dtype(more) if form == "outer" else left.dtype)
        with triton() as product:
            return product(spec, left, right, sizes, None if form == "outer" else more)

    for name, form in (
        ("grouped_dot", "rows"),
        ("grouped_dot_transposed", "transposed"),
        ("grouped_outer", "outer"),
    ):
        monkeypatch.setattr(grouped, name, functools.partial(of_form, form))
    plan, (params, x) = tpu.skewed_plan(), tpu.inputs()
    return plan, params, x, kept_weights(plan)


def check_trees(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(np.abs(b).max()), 1e-2)
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=2e-5)


def test_a_layer_on_triton_kernels_equals_the_oracle_forward_and_backward(monkeypatch):
    plan, params, x, weights = layer(monkeypatch)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got = jax.jit(lambda *args: tpu.by_kernels(*args))(params, x, weights, plan)
    check_trees(got, jax.jit(tpu.by_oracle)(params, x, weights, plan))


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_8_bit_kernels_on_triton_kernels_equal_dequantised_ones(dtype, monkeypatch):
    plan, params, x, weights = layer(monkeypatch)
    small = quantize_experts(params, dtype)
    expert_fn = FeedForward(activation="silu", gated=True, use_bias=True, quantized=dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        forward = functools.partial(grouped._Grouped(expert_fn).forward, in_place=True)
        got = jax.jit(lambda *args: forward(*args)[0])(small, x, weights, plan)
    check_trees(got, tpu.by_oracle(tpu.dequantized(small), x, weights, plan)[0])
