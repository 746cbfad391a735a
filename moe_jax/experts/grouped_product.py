"""Products of expert-sorted rows and a stack of matrices, each row times the matrix of its expert.

``grouped_dot`` is one JAX primitive whose kernel is chosen while a program is lowered, so one trace
serves every platform, and no kernel library is imported or traced for a platform that is not compiled
for:

========= ============================================================================
TPU       tokamax's Mosaic kernels; without tokamax the ones that jax ships (megablox)
CUDA      tokamax's Mosaic kernels on Hopper and newer, its Triton kernels elsewhere
otherwise a loop over tiles of one expert's rows: right everywhere, fast nowhere
========= ============================================================================

Kernels cannot be partitioned by the compiler. In a program that the compiler splits over several
devices (no ``shard_map`` around the layer), TPUs get ``jax.lax.ragged_dot`` and the others the loop.

Matrices in 8 bits (``quantize_experts``) are read as they are by tokamax and by the loop, which
multiply each sum by the scale of its output channel. Other kernels, and those of NVIDIA GPUs for a
transposed product, take one dtype: all matrices are converted to that of the rows before.

tokamax's Mosaic kernels, ``ragged_dot`` and the loop apply an activation to the sums in float32. After
megablox, Triton kernels and products with scales on NVIDIA GPUs it is a pass over the rounded sums.

Sums are taken in float32. Rows past the sum of ``group_sizes`` are unspecified and may hold anything:
callers mask them.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src import config  # `check_vma` of a `shard_map` that is being lowered has no public name
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from moe_jax.experts.grouped_kernels import gpu_product, loop_product, tpu_product, xla_product
from moe_jax.experts.implementation import vary_like
from moe_jax.experts.platforms import default_device
from moe_jax.types import Array


class ProductSpec(NamedTuple):
    """Static arguments of one grouped product.

    ``form`` says what is multiplied, for rows of expert e:

    * ``"rows"``: rows [M, K] and kernels [E, K, N] give [M, N], ``rows @ kernels[e]``;
    * ``"transposed"``: rows [M, N] and kernels [E, K, N] give [M, K], ``rows @ kernels[e].T``;
    * ``"outer"``: rows [M, K] and rows [M, N] give [E, K, N], ``rows_e.T @ other_e``.
    """

    form: str
    dtype: Any  # of the result
    activation: str | None = None  # of the result, a name in ``ACTIVATIONS``; for "rows" only


def grouped_dot(
    rows: Array,
    kernels: Array,
    group_sizes: Array,
    scales: Array | None = None,
    *,
    activation: str | None = None,
) -> Array:
    """Returns [M, N] in the dtype of ``rows``: each row times the matrix of its expert.

    Args:
        rows: float[M, K], sorted by expert.
        kernels: [E, K, N], in the dtype of ``rows``, or in 8 bits.
        group_sizes: i32[E], rows of each expert; they may add up to less than M.
        scales: f32[E, N], multiply the product before it is rounded. None is no scale.
        activation: a name in ``ACTIVATIONS``, applied to the scaled product, or None.

    Example:
        >>> rows, kernels = jnp.ones((3, 2)), jnp.arange(8.0).reshape(2, 2, 2)
        >>> grouped_dot(rows, kernels, jnp.array([1, 2])).tolist()
        [[2.0, 4.0], [10.0, 12.0], [10.0, 12.0]]
    """
    spec = ProductSpec("rows", rows.dtype, activation)
    return _bind(spec, rows, kernels, group_sizes, *(() if scales is None else (scales,)))


def grouped_dot_transposed(rows: Array, kernels: Array, group_sizes: Array) -> Array:
    """Returns [M, K] in the dtype of ``rows`` [M, N]: each row times the transposed matrix of its
    expert, of ``kernels`` [E, K, N]."""
    return _bind(ProductSpec("transposed", rows.dtype), rows, kernels, group_sizes)


def grouped_outer(rows: Array, others: Array, group_sizes: Array, dtype: Any) -> Array:
    """Returns [E, K, N] in ``dtype``: the sum over each expert's rows of ``outer(row, other)``.

    An expert without rows gets zeros.

    Args:
        rows: float[M, K], sorted by expert.
        others: float[M, N], in the dtype of ``rows``.
        group_sizes: i32[E].
        dtype: of the result.
    """
    return _bind(ProductSpec("outer", jnp.dtype(dtype)), rows, others, group_sizes)


def result_shape(spec: ProductSpec, left: Any, right: Any, group_sizes: Any) -> tuple[int, ...]:
    """The shape of a product by its form."""
    if spec.form == "outer":
        return (group_sizes.shape[0], left.shape[1], right.shape[1])
    return (left.shape[0], right.shape[2 if spec.form == "rows" else 1])


# --- the primitive ------------------------------------------------------------------------------

_product_p = Primitive("moe_grouped_product")


def _bind(spec: ProductSpec, *operands: Array) -> Array:
    # Inside `shard_map` all must differ over the same axes, as for every primitive.
    return _product_p.bind(*(vary_like(a, operands) for a in operands), spec=spec)


@functools.cache
def _compiled(spec: ProductSpec) -> Any:
    return jax.jit(functools.partial(_product_p.bind, spec=spec))


@_product_p.def_impl
def _run_eagerly(*operands: Array, spec: ProductSpec) -> Array:
    # Outside of `jit` there is no lowering to choose a kernel in, so eager calls compile too.
    return _compiled(spec)(*operands)


@_product_p.def_abstract_eval
def _abstract(left: Any, right: Any, group_sizes: Any, *scales: Any, spec: ProductSpec) -> Any:
    del scales
    shape = result_shape(spec, left, right, group_sizes)
    # Under Explicit axes a result needs a sharding. A kernel computes all of it on each device.
    unsplit = left.sharding.update(spec=jax.sharding.PartitionSpec(*[None] * len(shape)))
    return left.update(shape=shape, dtype=jnp.dtype(spec.dtype), weak_type=False, sharding=unsplit)


def _batch(args: Any, axes: Any, *, spec: ProductSpec) -> tuple[Array, int]:
    """One product after another: kernels take one batch, and what is unbatched is not copied."""
    batched = [jnp.moveaxis(a, d, 0) for a, d in zip(args, axes, strict=True) if d is not None]

    def one(parts: list[Array]) -> Array:
        rest = iter(parts)
        full = [a if d is None else next(rest) for a, d in zip(args, axes, strict=True)]
        return _bind(spec, *full)

    return jax.lax.map(one, batched), 0


batching.primitive_batchers[_product_p] = _batch  # pyright: ignore[reportArgumentType]


# --- lowering -----------------------------------------------------------------------------------


def _lowering(platform: str) -> Any:
    def rule(ctx: Any, *operands: Any, spec: ProductSpec) -> Any:
        where = ctx.module_context.axis_context
        mesh = getattr(where, "mesh", None)
        if mesh is None:
            split = (getattr(where, "num_devices", 1) or 1) > 1
        else:
            # Axes that `shard_map` does not map are left to the compiler's partitioner.
            split = mesh.size > 1 and set(where.manual_axes) != set(mesh.axis_names)
        device = _device(platform, mesh)
        # Kernels take no float64.
        wide = any(
            jnp.dtype(d).itemsize > 4 for d in (spec.dtype, *(a.dtype for a in ctx.avals_in))
        )
        if platform == "tpu":
            product = xla_product if split else tpu_product
        elif platform == "cuda" and not split and not wide:
            product = functools.partial(gpu_product, device=device)
        else:
            product = loop_product

        def traced(*args: Array) -> Array:
            with kernel_context(platform, device):
                return product(spec, *args)

        # An export for several platforms lowers each platform's kernel in the same module.
        clean = ctx.replace(
            module_context=ctx.module_context.replace(platforms=(platform,)),
            avals_in=[_untyped(a) for a in ctx.avals_in],
            avals_out=[_untyped(a) for a in ctx.avals_out],
        )
        if ctx.dim_var_values and jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
            clean = _without_platform_index(clean, platform)
        # Kernel libraries count in 32 bits, which `jax_enable_x64` would mix with 64.
        with jax.enable_x64(wide):
            return mlir.lower_fun(traced, multiple_results=False)(clean, *operands)

    return rule


def _without_platform_index(ctx: Any, platform: str) -> Any:
    """The context without the arguments that say which platform runs, and which sizes are symbolic.

    An export for several platforms hands them to every function that it calls, in 64 bits where the
    program has these; functions that are lowered in 32 bits would expect 32. A kernel needs none. The
    functions of the two kinds differ in their arguments, so they are not to be found for each other.
    """
    alone = ctx.module_context.replace(
        shape_poly_state=mlir.ShapePolyLoweringState((), (platform,)),
        lowering_cache={},
        cached_primitive_lowerings={},
    )
    return ctx.replace(module_context=alone, dim_var_values=())


@contextlib.contextmanager
def kernel_context(platform: str, device: Any = None) -> Iterator[None]:
    """The context in which kernels are traced for a platform.

    Kernels know nothing of the mesh around them: their results have no type that says over which of
    its axes they differ. Libraries ask the default device what to generate code for, and those of
    TPUs the device of the mesh before. Without a device (a program for TPUs that names none, lowered
    on another host) the code is that of v5e, which later generations run too.
    """
    kind = None
    if device is None and platform == "tpu":
        kind = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=kind)
    with (
        warnings.catch_warnings(category=DeprecationWarning, action="ignore"),
        jax.sharding.use_abstract_mesh(mesh),
        config._check_vma(False),
        jax.default_device(device),
        # Kernel libraries are not written for the strict modes that a user's program may set, such as
        # warnings that are errors.
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def _untyped(aval: Any) -> Any:
    """Shape and dtype alone, without the mesh axes over which an array differs."""
    return jax.core.ShapedArray(aval.shape, aval.dtype)  # pyright: ignore[reportAttributeAccessIssue]


def _device(platform: str, mesh: Any) -> Any:
    """A device of the platform, as far as one is known here; None otherwise."""
    candidates = [default_device()]
    if isinstance(mesh, jax.sharding.Mesh):
        candidates.insert(0, mesh.devices.flat[0])
    kinds = {"tpu": "tpu", "cuda": "gpu"}
    for device in candidates:
        if device.platform == kinds.get(platform, platform):
            return device
    return None


for _platform in ("tpu", "cuda", "rocm", "cpu"):
    mlir.register_lowering(_product_p, _lowering(_platform), platform=_platform)
