"""The kernels under ``grouped_product``: each computes the three forms of ``ProductSpec``.

All take ``(spec, left, right, group_sizes)``, and the scales f32[E, N] of 8-bit matrices in the form
"rows"; without scales, 8-bit numbers count as they are. All apply ``spec.activation`` to the scaled
product, and all are traced while a program is lowered. tokamax is an optional library (the extra
``accelerator``) and takes seconds to import, so it is imported where it is used.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.experts.feed_forward import ACTIVATIONS
from moe_jax.types import Array

_LANES = 128  # TPU kernels take tiles of multiples of this, and no axis below it
_TPU_DTYPES = {"bfloat16", "float32"}  # of rows and results
_VMEM_BYTES = (
    12 * 2**20
)  # what the tiles of one kernel may take; v5e and v5p allow 16 MB by default
_MOST_PADDING = 0.1  # of the rows, computed twice because a tile has rows of two experts
_LOOP_ROWS = 128


def has_tokamax() -> bool:
    """Whether tokamax is installed."""
    return importlib.util.find_spec("tokamax") is not None


# --- activations --------------------------------------------------------------------------------
# In operations that the compilers of kernels know: without erfc, and without a derivative of their own.
# They have names because tokamax writes the names of its arguments into its programs, for tuning.


def _gelu(x: Array) -> Array:
    # Within 1e-6 of the one by erfc between -20 and 20. Below zero 1 + erf cancels.
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _relu(x: Array) -> Array:
    return jnp.maximum(x, 0.0)


def _relu2(x: Array) -> Array:
    return jnp.square(_relu(x))


def _silu(x: Array) -> Array:
    return x * jax.lax.logistic(x)


IN_KERNELS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
    "silu": _silu,
}


def _in_kernel(spec: Any) -> Callable[[Array], Array] | None:
    """The activation for a kernel that applies it to its sums in float32."""
    return None if spec.activation is None else IN_KERNELS[spec.activation]


def _activated(spec: Any, out: Array) -> Array:
    """The activation of a product that was computed without, in the dtype of the result."""
    if spec.activation is not None:
        out = ACTIVATIONS[spec.activation](out.astype(jnp.float32))
    return out.astype(spec.dtype)


# --- TPU ----------------------------------------------------------------------------------------


def tpu_product(
    spec: Any, left: Array, right: Array, group_sizes: Array, scales: Array | None = None
) -> Array:
    """A grouped product by Mosaic kernels: tokamax's, or jax's own megablox without tokamax.

    Both are versions of the kernels of MegaBlocks (Gale et al. 2022, arXiv:2211.15841). An axis of the
    matrices below 128 is left to XLA, and so are dtypes that Mosaic cannot load, such as float16.
    """
    widths = (left.shape[1], *right.shape[1:])
    dtypes = {jnp.dtype(left.dtype).name, jnp.dtype(spec.dtype).name}
    if min(widths) < _LANES or not dtypes <= _TPU_DTYPES:
        return xla_product(spec, left, right, group_sizes, scales)
    if has_tokamax():
        return _tpu_product(spec, left, _with_scales(right, scales), group_sizes)
    # megablox takes no scales and one dtype.
    return _scaled(_tpu_product, spec, left, right.astype(left.dtype), group_sizes, scales)


def _tpu_product(spec: Any, left: Array, right: Any, group_sizes: Array) -> Array:
    rows = left.shape[0]
    # Kernels take whole tiles of rows.
    whole = -(-rows // _LANES) * _LANES
    tiles = tpu_tiles(spec, whole, left, right, group_sizes.shape[0])
    whole = -(-rows // tiles[0]) * tiles[0]
    left = _pad_rows(left, whole)
    # megablox takes the precision that is in force, of which it has only these two.
    with jax.default_matmul_precision(_precision(left).name.lower()):
        if spec.form == "outer":
            return _tpu_outer()(left, _pad_rows(right, whole), group_sizes, spec.dtype, tiles)
        return _tpu_rows()(left, right, group_sizes, spec, tiles)[:rows]


def tpu_tiles(spec: Any, rows: int, left: Any, right: Any, experts: int) -> tuple[int, int, int]:
    """Returns the tile (rows, contracted or K, N) whose traffic with memory is least.

    A tile of rows that two experts share is computed for each, so taller tiles compute more padding:
    the tallest with at most a tenth of it is taken, and never less than 128, below which the matrix
    unit waits for weights. A matrix that fits as one tile of its contracted axis is read once for all
    rows of its expert; otherwise it is read again for every tile of rows.

    Example:
        >>> from moe_jax.experts.grouped_product import ProductSpec
        >>> spec = ProductSpec("rows", jnp.dtype("bfloat16"))
        >>> left = jax.ShapeDtypeStruct((65536, 2048), jnp.bfloat16)
        >>> right = jax.ShapeDtypeStruct((64, 2048, 1024), jnp.bfloat16)
        >>> tpu_tiles(spec, 65536, left, right, 64)
        (128, 2048, 1024)
    """
    # At most one tile an expert is shared with the next, hence E times t rows of padding at worst.
    fitting = [t for t in (512, 256, 128) if experts * t <= _MOST_PADDING * rows and rows % t == 0]
    tall = fitting[0] if fitting else _LANES
    outer = spec.form == "outer"
    k = left.shape[1]
    n = right.shape[1] if outer or spec.form == "transposed" else right.shape[2]
    size, out = left.dtype.itemsize, jnp.dtype(spec.dtype).itemsize

    def cost(tile: tuple[int, int]) -> float:
        tk, tn = tile
        if outer:
            # Inputs and output are double-buffered, and the sum is held in float32 besides.
            held = 2 * tall * (tk + tn) * size + tk * tn * (4 + 2 * out)
            read = rows * (k * math.ceil(n / tn) + n * math.ceil(k / tk)) * size
        else:
            held = 2 * size * (tall * tk + tk * tn) + tall * tn * (4 + 2 * out)
            visits = experts if tk >= k else rows // tall + experts
            read = (rows * k * math.ceil(n / tn) + visits * k * n) * size
        # Ties go to the larger tile, which takes fewer steps.
        return math.inf if held > _VMEM_BYTES else read - 1e-6 * tk * tn

    tiles = [(tk, tn) for tk in _tile_widths(k) for tn in _tile_widths(n)]
    best = min(tiles, key=cost)
    return tall, *best


def _tile_widths(width: int) -> list[int]:
    """The width itself and its halves, in whole lanes."""
    widths = {width}
    for parts in (2, 4, 8, 16, 32, 64):
        widths.add(min(width, -(-width // parts // _LANES) * _LANES))
    return sorted(widths | {_LANES})


def _pad_rows(rows: Array, length: int) -> Array:
    return jnp.pad(rows, ((0, length - rows.shape[0]), (0, 0))) if length > rows.shape[0] else rows


def _with_scales(right: Array, scales: Array | None) -> Any:
    """What tokamax's kernels read as 8-bit matrices with a scale for each expert and column."""
    if scales is None:
        return right
    return importlib.import_module("qwix").QArray(qvalue=right, scale=scales[:, None, :])


def _scaled(
    product: Callable[..., Array],
    spec: Any,
    left: Array,
    right: Any,
    group_sizes: Array,
    scales: Array | None,
) -> Array:
    """``product``, which takes no scales, times the scale of each row's expert and column."""
    if scales is None:
        return product(spec, left, right, group_sizes)
    # Without their scale, sums exceed what float16 holds.
    wide = jnp.float32 if left.dtype == jnp.float16 else spec.dtype
    out = product(spec._replace(dtype=wide, activation=None), left, right, group_sizes)
    by_row = jnp.repeat(scales, group_sizes, axis=0, total_repeat_length=left.shape[0])
    return _activated(spec, out.astype(jnp.float32) * by_row)


def _tpu_rows() -> Any:
    if has_tokamax():
        kernels = importlib.import_module("tokamax._src.ops.ragged_dot.pallas_mosaic_tpu_kernel")

        def product(left, right, group_sizes, spec, tiles) -> Any:
            return kernels.gmm(
                left,
                right,
                group_sizes=group_sizes,
                precision=(_precision(left),) * 2,
                out_dtype=spec.dtype,
                tiling=tiles,
                transpose_rhs=spec.form == "transposed",
                activation=_in_kernel(spec),
            )

        return product
    kernels = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

    def product(left, right, group_sizes, spec, tiles) -> Any:
        transposed = spec.form == "transposed"
        out = kernels.gmm(left, right, group_sizes, spec.dtype, tiles, transpose_rhs=transposed)
        return _activated(spec, out)

    return product


def _precision(rows: Array) -> jax.lax.Precision:
    """What ``jax.default_matmul_precision`` asks for, as far as TPU kernels have it: one pass in
    bfloat16 or, for every finer one, float32. Rows of 16 bits have nothing finer."""
    asked = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    coarse = (None, "default", "bfloat16", "BF16_BF16_F32")
    fine = rows.dtype.itemsize >= 4 and asked not in coarse
    return jax.lax.Precision.HIGHEST if fine else jax.lax.Precision.DEFAULT


def _tpu_outer() -> Any:
    if has_tokamax():
        kernels = importlib.import_module("tokamax._src.ops.ragged_dot.pallas_mosaic_tpu_kernel")

        def product(left, right, group_sizes, dtype, tiles):
            return kernels.tgmm(
                left.T,
                right,
                group_sizes=group_sizes,
                precision=(_precision(left),) * 2,
                out_dtype=dtype,
                tiling=tiles,
            )

        return product
    kernels = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

    def product(left, right, group_sizes, dtype, tiles):
        return kernels.tgmm(left.T, right, group_sizes, dtype, tiles)

    return product


# --- NVIDIA -------------------------------------------------------------------------------------

_MOSAIC_BLOCK = 64  # what rows and widths of Mosaic products are multiples of


def gpu_product(
    spec: Any,
    left: Array,
    right: Array,
    group_sizes: Array,
    scales: Array | None = None,
    *,
    device: Any = None,
) -> Array:
    """A grouped product by tokamax's kernels; by ``loop_product`` without tokamax.

    Args:
        spec, left, right, group_sizes, scales: as everywhere here.
        device: what code is generated for. Without one (an export from a host without GPU) only the
            Triton kernels can be generated.
    """
    if not has_tokamax():
        return loop_product(spec, left, right, group_sizes, scales)
    if scales is None:
        right = right.astype(left.dtype)
    else:
        # The kernel multiplies matrices by their scales in the dtype of the rows, which would round
        # them. So it gets ones, and the product is scaled in float32.
        right = _with_scales(right, jnp.ones(scales.shape, left.dtype))
    product = functools.partial(_gpu_product, device=device, quantized=scales is not None)
    return _scaled(product, spec, left, right, group_sizes, scales)


def _gpu_product(
    spec: Any, left: Array, right: Any, group_sizes: Array, *, device: Any, quantized: bool
) -> Array:
    # tokamax reads its settings from absl's flags, and parses the command line of whatever program
    # runs for them, unless they count as parsed.
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():
        flags.mark_as_parsed()
    tokamax = importlib.import_module("tokamax")
    general = functools.partial(
        tokamax.ragged_dot_general,
        group_sizes=group_sizes,
        ragged_dot_dimension_numbers=_dimensions(spec),
        preferred_element_type=spec.dtype,
    )
    # tokamax's Mosaic kernels for 8-bit matrices (0.0.12) do not trace with jax 0.10, which lacks a
    # function that they call.
    widths = (left.shape[1], *right.shape[1:])
    if device is not None and not quantized and all(w % _MOSAIC_BLOCK == 0 for w in widths):
        rows = left.shape[0]
        whole = -(-rows // _MOSAIC_BLOCK) * _MOSAIC_BLOCK
        operands = _pad_rows(left, whole), right
        if spec.form == "outer":
            operands = operands[0], _pad_rows(right, whole)
        try:
            out = general(*operands, implementation=mosaic_product, activation=_in_kernel(spec))
        except NotImplementedError:  # the device or the dtype has no Mosaic kernel
            pass
        else:
            return out if spec.form == "outer" else out[:rows]
    # Without a device, code is generated for one that is not there.
    with tokamax.config.cross_compile(device is None):
        out = general(left, right, implementation="triton")
    if spec.form != "outer":
        # The kernel (0.0.12) drops its activation where a tuned setting splits the sum.
        return _activated(spec, out)
    # The kernel (0.0.12) gives an expert without rows the sum of the rows before its own.
    return jnp.where((group_sizes > 0)[:, None, None], out, jnp.zeros((), out.dtype))


def mosaic_product(left: Array, right: Array, **options: Any) -> Array:
    """tokamax's Mosaic product, with blocks that divide the axis which is summed over.

    The kernel of Hopper (0.0.12) sums over whole blocks only: of 192 numbers it leaves out the last 64
    without an error.

    Args:
        left, right: operands, whose widths are multiples of 64.
        options: what ``tokamax.ragged_dot_general`` gives to an implementation.
    """
    module = importlib.import_module("tokamax._src.ops.ragged_dot.pallas_mosaic_gpu")
    kernel = module.PallasMosaicGpuRaggedDot()
    # Settings are tuned, and looked up, for products without activation.
    config = kernel.bind(left, right, **{**options, "activation": None}).default_config
    if right.ndim == 3:  # otherwise rows are summed over, and the kernel masks the last block
        width = left.shape[1]
        blocks = (b for b in (config.block_k, 128, _MOSAIC_BLOCK) if width % b == 0)
        kernel = kernel.replace(config=dataclasses.replace(config, block_k=next(blocks)))
    return kernel(left, right, **options)


def _dimensions(spec: Any) -> Any:
    contracted = {
        "rows": ([1], [1]),
        "transposed": ([1], [2]),
        "outer": ([0], [0]),
    }[spec.form]
    return jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracted, ([], [])),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[] if spec.form == "outer" else [0],
    )


# --- any platform -------------------------------------------------------------------------------


def xla_product(
    spec: Any, left: Array, right: Array, group_sizes: Array, scales: Array | None = None
) -> Array:
    """A grouped product by ``jax.lax.ragged_dot``: native on TPU, E times the work elsewhere."""
    return _scaled(_xla_product, spec, left, right.astype(left.dtype), group_sizes, scales)


def _xla_product(spec: Any, left: Array, right: Array, group_sizes: Array) -> Array:
    out = jax.lax.ragged_dot_general(
        left,
        right,
        group_sizes,
        ragged_dot_dimension_numbers=_dimensions(spec),
        preferred_element_type=jnp.float32,
    )
    return _activated(spec, out)


def loop_product(
    spec: Any, left: Array, right: Array, group_sizes: Array, scales: Array | None = None
) -> Array:
    """A grouped product in a loop over tiles of at most 128 rows of one expert.

    The trip count is the number of tiles in use, so experts without rows cost nothing.
    """
    rows, most = left.shape[0], min(_LOOP_ROWS, left.shape[0])
    left = jnp.pad(left, ((0, most), (0, 0)))  # a tile may start at the last row
    tiles_end = jnp.cumsum(-(-group_sizes // most))
    starts = jnp.cumsum(group_sizes) - group_sizes
    slot = jnp.arange(most, dtype=jnp.int32)
    outer = spec.form == "outer"
    if outer:
        right = jnp.pad(right, ((0, most), (0, 0)))
        shape = (group_sizes.shape[0], left.shape[1], right.shape[1])
    else:
        shape = (rows + most, right.shape[2 if spec.form == "rows" else 1])

    def step(index: Array, total: Array) -> Array:
        expert = (tiles_end <= index).sum(dtype=jnp.int32)
        done = (index - tiles_end[expert] + -(-group_sizes[expert] // most)) * most
        first = starts[expert] + done
        live = (slot < group_sizes[expert] - done)[:, None]
        block = jax.lax.dynamic_slice_in_dim(left, first, most)
        block = jnp.where(live, block, jnp.zeros((), block.dtype))
        if outer:
            other = jax.lax.dynamic_slice_in_dim(right, first, most)
            other = jnp.where(live, other, jnp.zeros((), other.dtype))
            part = jnp.matmul(block.T, other, preferred_element_type=jnp.float32)
            old = jax.lax.dynamic_index_in_dim(total, expert, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(total, old + part, expert, 0)
        matrix = jax.lax.dynamic_index_in_dim(right, expert, keepdims=False)
        matrix = (matrix if spec.form == "rows" else matrix.T).astype(block.dtype)
        part = jnp.matmul(block, matrix, preferred_element_type=jnp.float32)
        if scales is not None:
            part = part * scales[expert]
        part = _activated(spec, part)
        old = jax.lax.dynamic_slice_in_dim(total, first, most)
        # The tile may reach into the rows of the next expert, which keep what they hold.
        part = jnp.where(live, part, old)
        return jax.lax.dynamic_update_slice_in_dim(total, part, first, 0)

    total = jnp.zeros(shape, jnp.float32 if outer else spec.dtype)
    total = jax.lax.fori_loop(jnp.int32(0), tiles_end[-1], step, total)
    return total.astype(spec.dtype) if outer else total[:rows]
