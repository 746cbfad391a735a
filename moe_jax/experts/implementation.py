"""The contract of an implementation, and the pieces that implementations share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from moe_jax.experts.feed_forward import ExpertFn, constant_names
from moe_jax.types import Array, DispatchPlan, Params, pytree, static

_T = TypeVar("_T")


@pytree
class ExpertsOutput:
    """The result of ``run_experts``, and what it took."""

    y: Array  # f32[T, D_out]: the weighted sum over each token's experts
    slots_executed: Array  # f32[]: rows pushed through experts, padding included
    implementation: str = static()  # what ran, or what runs on which platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way of running experts: a file of this package, and a line in its ``_ALL``.

    Attributes:
        name: what ``implementation=`` calls it.
        run: ``(expert_fn, params, x[T, D], plan, weights f32[N]) -> f32[T, D_out]``. Computes the
            sum over every token's kept assignments of weight times expert output, and nothing else:
            what is dropped was decided in the plan.
        slots_executed: ``(plan) -> f32[]``, the rows that ``run`` pushes through experts, padding
            included.
        refuse: ``(expert_fn, plan, platform) -> str | None``, the reason why it cannot or should not
            run this plan on this platform. Asked when the choice is automatic; an implementation
            asked for by name runs.
        summary: one line for people.
        sized_by_platform: whether ``run`` and ``slots_executed`` take ``platform=``, because their
            static sizes or loops depend on it.
    """

    name: str
    run: Callable[..., Array]
    slots_executed: Callable[..., Array]
    refuse: Callable[[ExpertFn, DispatchPlan, str], str | None]
    summary: str
    sized_by_platform: bool = False


def all_experts(expert_fn: ExpertFn, params: Params, rows: Array) -> Array:
    """Runs each expert on its own block: ``[E, M, D] -> [E, M, D_out]``, one batched product."""
    return jax.vmap(expert_fn)(params, rows)


def num_experts_of(params: Params) -> int:
    """The size of the leading axis that all expert parameters share.

    Raises:
        ValueError: there are no parameters, or their leading axes differ.
    """
    leaves = jax.tree.leaves(params)
    sizes = sorted({leaf.shape[0] if leaf.ndim else 0 for leaf in leaves})
    if len(sizes) != 1 or sizes[0] < 1:
        raise ValueError(
            "expert params: expected arrays with one common leading axis of E experts, got leading "
            f"axes {sizes}. Stack the experts' parameters along axis 0."
        )
    return sizes[0]


def learned_params(expert_fn: ExpertFn, params: Params) -> Params:
    """``params`` with None in the place of those that have no gradient: integers and constants."""
    constants = constant_names(expert_fn)
    if constants:
        return {n: None if n in constants else p for n, p in params.items()}
    return jax.tree.map(lambda p: p if jnp.issubdtype(p.dtype, jnp.inexact) else None, params)


def with_learned(params: Params, learned: Params) -> Params:
    """``params`` with the arrays of ``learned`` in their places: the inverse of ``learned_params``."""
    none = lambda leaf: leaf is None  # noqa: E731
    return jax.tree.map(lambda new, p: p if new is None else new, learned, params, is_leaf=none)


def mask_rows(live: Array, rows: Array) -> Array:
    """``rows`` [..., W] where ``live`` bool[...] holds, zeros elsewhere.

    Selects instead of multiplying: 0 * NaN is NaN, and an empty row must not carry a token's NaN.
    """
    return jnp.where(live[..., None], rows, jnp.zeros((), rows.dtype))


def output_shape(expert_fn: ExpertFn, params: Params, x: Array) -> jax.ShapeDtypeStruct:
    """Shape [1, D_out] and dtype of one expert's output for one row of x, without running it."""
    one = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), params)
    return jax.eval_shape(expert_fn, one, jax.ShapeDtypeStruct((1, x.shape[1]), x.dtype))


def to_bits(array: Array) -> Array:
    """Returns floats of 16 and 8 bits as their bits, unsigned integers of the same shape, and any other
    array unchanged.

    XLA for CPU does not slice or update such floats: it widens the whole array to float32, in a loop
    at every step, even for a few rows. It does slice and update their bits in place. No gradient flows
    through the bits.
    """
    if not is_narrow(array.dtype):
        return array
    return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def is_narrow(dtype: Any) -> bool:
    """Whether XLA for CPU cannot slice arrays of this dtype in place, see ``to_bits``."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4


def from_bits(bits: Array, dtype: Any) -> Array:
    """The inverse of ``to_bits`` for an array of ``dtype``."""
    return jax.lax.bitcast_convert_type(bits, dtype) if bits.dtype != dtype else bits


def one_expert(params: Params, expert: Array, *, in_place: bool = True) -> Params:
    """Returns the parameters of the expert with index ``expert`` i32[].

    With ``in_place``, for written gradients only, the bits of narrow floats are sliced, see
    ``to_bits``, and a barrier keeps the reinterpretation, which would be a copy of the whole stack,
    from being moved out of a loop over experts.
    """

    def pick(stack: Array, expert: Array) -> Array:
        if not in_place:
            return jax.lax.dynamic_index_in_dim(stack, expert, axis=0, keepdims=False)
        if is_narrow(stack.dtype):
            stack, expert = jax.lax.optimization_barrier((stack, expert))
        part = jax.lax.dynamic_index_in_dim(to_bits(stack), expert, axis=0, keepdims=False)
        return from_bits(part, stack.dtype)

    return jax.tree.map(lambda stack: pick(stack, expert), params)


def varying_axes(tree: Any) -> frozenset[str]:
    """The mapped axes over which any array of the tree differs; empty outside of ``shard_map``."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(tree):
        axes |= jax.typeof(leaf).manual_axis_type.varying
    return axes


def vary_over(tree: _T, axes: Iterable[str]) -> _T:
    """The same arrays, typed as differing over these axes too, as ``check_vma`` requires.

    The transpose sums the gradient of an array that did not differ before over the axes.
    """

    def cast(leaf: Array) -> Array:
        # `pcast` refuses an axis over which the array differs already.
        missing = tuple(a for a in axes if a not in varying_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def vary_like(tree: _T, others: Any) -> _T:
    """``tree`` typed as differing over every axis that ``others`` differ over.

    For zeros that start a loop: inside ``shard_map`` a loop's carry may not change its type.
    """
    return vary_over(tree, sorted(varying_axes(others)))
