"""Grouped products over expert-sorted rows: the experts of TPUs and GPUs.

Every projection is one ``grouped_dot``: a kernel that multiplies each row by the matrix of its expert
and so does exactly the work of the kept rows, up to the tiles in which two experts meet. Runs
``FeedForward`` only, because a product cannot run an expert that is a function.

The gradient is written by hand. Its products are grouped too, six for a gated expert, and it keeps the
hidden activations [R, F] only: rows are gathered again, and the gradient of a combine weight is
``hidden . (dy @ down.T)``, so the experts' outputs are not kept. Everything moves by gathers. Forward
mode and derivatives of derivatives run by ``jax.lax.ragged_dot``, see ``derivatives.call``.

Where no gradient follows, the first product of experts without gate and bias applies the activation to
its sums, and the second reads what it wrote. A gate or a bias needs a pass over the hidden activations,
which applies the activation too.

Kernels never write rows past the last expert's, so these are masked after every product whose rows an
operation other than a product reads. The number of rows is the row budget of the plan in whole tiles;
kernels skip the tiles past the kept rows, so a smaller dynamic k computes less without a budget.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp

from moe_jax.experts import ragged
from moe_jax.experts.derivatives import call
from moe_jax.experts.feed_forward import (
    ACTIVATIONS,
    ExpertFn,
    FeedForward,
    check_params,
    constant_names,
)
from moe_jax.experts.grouped_product import (
    grouped_dot,
    grouped_dot_transposed,
    grouped_outer,
)
from moe_jax.experts.implementation import (
    Implementation,
    learned_params,
    mask_rows,
    with_learned,
)
from moe_jax.experts.ragged import masked_dot, product
from moe_jax.experts.tier_loop import sum_over_slots
from moe_jax.types import Array, DispatchPlan, Params

_TILE = 128

_Product = Callable[..., Array]  # (rows, kernels, group sizes, scales or None) -> rows


class _Rows(NamedTuple):
    """The kept rows in sorted order, padded to whole tiles. R is their number."""

    live: Array  # bool[R]
    assignments: Array  # i32[R]
    tokens: Array  # i32[R]
    experts: Array  # i32[R]: E - 1 where not live


def padded_rows(plan: DispatchPlan) -> int:
    """R: the most rows that the plan keeps, in whole tiles.

    Fewer than a tile stay as they are; the kernels pad them.
    """
    rows = plan.num_rows
    return rows if rows <= _TILE else -(-rows // _TILE) * _TILE


def _sorted_rows(plan: DispatchPlan) -> _Rows:
    a = plan.assignments
    row = jnp.arange(padded_rows(plan), dtype=jnp.int32)
    n = plan.order[jnp.minimum(row, plan.order.shape[0] - 1)]
    live = row < plan.group_sizes.sum(dtype=jnp.int32)
    # The last expert for padding keeps the indices sorted, which the sum of bias gradients relies
    # on.
    experts = jnp.where(live, a.expert_indices[n], a.num_experts - 1)
    return _Rows(live, n, a.token_indices[n], experts)


def _matrices(params: Params, name: str, dtype: Any) -> tuple[Array, Array | None]:
    """(kernels, scales or None) of one projection; float kernels in the dtype of the rows."""
    kernel, scales = params[name], params.get(f"{name}_scale")
    return kernel if scales is not None else kernel.astype(dtype), scales


def _project(
    params: Params, name: str, rows: Array, where: _Rows, group_sizes: Array, dot: _Product
) -> Array:
    kernel, scales = _matrices(params, name, rows.dtype)
    out = dot(rows, kernel, group_sizes, scales).astype(rows.dtype)
    bias = params.get(f"{name}_bias")
    if bias is not None:
        out = (out.astype(jnp.float32) + bias.astype(jnp.float32)[where.experts]).astype(out.dtype)
    # Kernels leave rows past the last expert's unwritten, so they may hold anything.
    return mask_rows(where.live, out)


def _act(expert_fn: FeedForward, projected: dict[str, Array]) -> Array:
    """The hidden activations [R, F] from the projections, in float32 inside."""
    act = ACTIVATIONS[expert_fn.activation]
    wide = {name: rows.astype(jnp.float32) for name, rows in projected.items()}
    hidden = act(wide["gate"]) * wide["up"] if expert_fn.gated else act(wide["up"])
    return hidden.astype(projected["up"].dtype)


def _projected(
    expert_fn: FeedForward,
    params: Params,
    x: Array,
    plan: DispatchPlan,
    where: _Rows,
    dot: _Product,
) -> dict[str, Array]:
    rows = mask_rows(where.live, x[where.tokens])
    names = ("gate", "up") if expert_fn.gated else ("up",)
    sizes = plan.group_sizes
    return {name: _project(params, name, rows, where, sizes, dot) for name in names}


def _hidden(
    expert_fn: FeedForward, params: Params, x: Array, plan: DispatchPlan, where: _Rows
) -> Array:
    """Returns the hidden activations [R, F] for a product; rows that are not live may hold anything."""
    if expert_fn.gated or expert_fn.use_bias:
        return _act(expert_fn, _projected(expert_fn, params, x, plan, where, grouped_dot))
    rows = mask_rows(where.live, x[where.tokens])
    kernel, scales = _matrices(params, "up", rows.dtype)
    # A mask would be a pass over memory of its own. It is not needed: a product keeps rows apart.
    return grouped_dot(rows, kernel, plan.group_sizes, scales, activation=expert_fn.activation)


@dataclasses.dataclass(frozen=True)
class _Grouped:
    """The weighted sum over every token's kept rows, as a ``DifferentiableFunction``."""

    expert_fn: FeedForward

    batched_in_a_loop = False

    def run(
        self, params: Params, x: Array, weights: Array, plan: DispatchPlan, *, in_place: bool
    ) -> Array:
        if not in_place:
            return self.forward(params, x, weights, plan, in_place=False)[0]
        where = _sorted_rows(plan)
        hidden = _hidden(self.expert_fn, params, x, plan, where)
        outputs = _project(params, "down", hidden, where, plan.group_sizes, grouped_dot)
        return sum_over_slots(plan, outputs, weights)

    def forward(
        self, params: Params, x: Array, weights: Array, plan: DispatchPlan, *, in_place: bool
    ) -> tuple[Array, dict[str, Array]]:
        # Kernels have no derivative of their own; the ragged product has.
        dot = grouped_dot if in_place else _dequantized(product)
        return self._forward(params, x, weights, plan, dot)

    def _forward(
        self, params: Params, x: Array, weights: Array, plan: DispatchPlan, dot: _Product
    ) -> tuple[Array, dict[str, Array]]:
        where = _sorted_rows(plan)
        projected = _projected(self.expert_fn, params, x, plan, where, dot)
        hidden = _act(self.expert_fn, projected)
        outputs = _project(params, "down", hidden, where, plan.group_sizes, dot)
        return sum_over_slots(plan, outputs, weights), projected

    def backward(
        self, arguments: tuple[Any, ...], residuals: Any, cotangents: Array, *, in_place: bool
    ) -> tuple[Any, ...]:
        if in_place:
            return _backward(self.expert_fn, arguments, residuals, cotangents)
        # A derivative of this derivative follows, so it runs in operations that have one.
        params, x, weights, plan = arguments

        def values(learned: Params, x: Array, weights: Array) -> Array:
            return self.run(with_learned(params, learned), x, weights, plan, in_place=False)

        pull = jax.vjp(values, learned_params(self.expert_fn, params), x, weights)[1]
        return (*pull(cotangents), None)

    def reference(
        self, params: Params, x: Array, weights: Array, plan: DispatchPlan
    ) -> tuple[Array, dict[str, Array]]:
        return self._forward(params, x, weights, plan, _dequantized(masked_dot))


def _dequantized(dot: Callable[[Array, Array, Array], Array]) -> _Product:
    """A product that takes 8-bit matrices with scales too, from one of float matrices."""

    def run(rows: Array, kernels: Array, sizes: Array, scales: Array | None) -> Array:
        if scales is not None:
            kernels = (kernels.astype(jnp.float32) * scales[:, None, :]).astype(rows.dtype)
        return dot(rows, kernels, sizes)

    return run


def _backward(
    expert_fn: FeedForward, arguments: tuple[Any, ...], projected: dict[str, Array], dy: Array
) -> tuple[Any, ...]:
    """Returns the gradients of (params, x, weights), and None for the plan."""
    params, x, weights, plan = arguments
    a, sizes, dtype = plan.assignments, plan.group_sizes, x.dtype
    where, constants = _sorted_rows(plan), constant_names(expert_fn)
    hidden, pull = jax.vjp(functools.partial(_act, expert_fn), projected)
    rows = mask_rows(where.live, x[where.tokens])
    # Kernels take the dtype of x. Rounding first keeps f32[R, D] out of memory.
    dy_rows = mask_rows(where.live, dy.astype(dtype)[where.tokens])
    row_weights = jnp.where(where.live, weights[where.assignments], 0.0)[:, None]

    # `back` is the gradient of the hidden activations before the combine weight. Its product with
    # them is the gradient of the weight, so neither the outputs nor a second product are needed.
    back = mask_rows(where.live, _transposed(params, "down", dy_rows, where, sizes))
    wide = back.astype(jnp.float32)
    row_dweights = (wide * hidden.astype(jnp.float32)).sum(axis=1)
    if "down_bias" in params:
        biases = params["down_bias"].astype(jnp.float32)[where.experts]
        row_dweights += (biases * dy_rows.astype(jnp.float32)).sum(axis=1)

    weighted = (dy_rows.astype(jnp.float32) * row_weights).astype(dtype)
    (dprojected,) = pull((wide * row_weights).astype(dtype))
    gradients: dict[str, Any] = {}
    dx = jnp.zeros((), jnp.float32)
    for name, inputs, dout in (
        ("down", hidden, weighted),
        *((name, rows, dprojected[name]) for name in projected),
    ):
        dout = mask_rows(where.live, dout)
        if name not in constants:
            gradients[name] = grouped_outer(inputs, dout, sizes, params[name].dtype)
        if f"{name}_bias" in params:
            gradients[f"{name}_bias"] = _bias_gradient(params[f"{name}_bias"], dout, where)
        if name != "down":
            part = _transposed(params, name, dout, where, sizes)
            # Summed by token at once: f32[T, D] instead of f32[R, D].
            dx = dx + sum_over_slots(plan, part, None)

    sorted_row = plan.group_offsets[jnp.minimum(a.expert_indices, a.num_experts - 1)]
    row = jnp.where(plan.kept, sorted_row + plan.position, 0)
    dweights = jnp.where(plan.kept, row_dweights[row], 0.0)
    return {name: gradients.get(name) for name in params}, dx.astype(dtype), dweights, None


def _transposed(params: Params, name: str, rows: Array, where: _Rows, group_sizes: Array) -> Array:
    """Each row times the transposed matrix of its expert."""
    kernel, scales = params[name], params.get(f"{name}_scale")
    if scales is None:
        return grouped_dot_transposed(rows, kernel.astype(rows.dtype), group_sizes)
    # The scales are of the axis that the product sums over, so they multiply the rows before it.
    scaled = rows.astype(jnp.float32) * scales[where.experts]
    return grouped_dot_transposed(
        mask_rows(where.live, scaled).astype(rows.dtype), kernel, group_sizes
    )


def _bias_gradient(bias: Array, dout: Array, where: _Rows) -> Array:
    total = jnp.zeros(bias.shape, jnp.float32)
    added = total.at[where.experts].add(dout.astype(jnp.float32), indices_are_sorted=True)
    return added.astype(bias.dtype)


@functools.partial(jax.jit, static_argnums=0)
def run(expert_fn: ExpertFn, params: Params, x: Array, plan: DispatchPlan, weights: Array) -> Array:
    """Computes f32[T, D_out] by grouped products; see ``Implementation.run``."""
    if not isinstance(expert_fn, FeedForward):
        raise ValueError(
            f"expert_fn: expected FeedForward, got {type(expert_fn).__name__}. "
            "A grouped product runs no other expert; use implementation='tiered'."
        )
    check_params(expert_fn, params, d_model=x.shape[1], num_experts=plan.assignments.num_experts)
    if jax.export.is_symbolic_dim(plan.num_rows):  # a kernel's tiles need a number of rows
        return ragged.run(expert_fn, params, x, plan, weights)
    return call(_Grouped(expert_fn), params, x, weights, plan)


def slots_executed(plan: DispatchPlan) -> Array:
    """f32[]: the kept rows. Tiles in which two experts meet are computed for both, beyond this."""
    return plan.group_sizes.sum().astype(jnp.float32)


def refuse(expert_fn: ExpertFn, plan: DispatchPlan, platform: str) -> str | None:
    """Refuses experts other than ``FeedForward``, symbolic rows, and platforms without kernels."""
    if not isinstance(expert_fn, FeedForward):
        return "runs FeedForward only: a grouped product cannot run an expert that is a function"
    if jax.export.is_symbolic_dim(plan.num_rows):
        return "has tiles that need a number of rows, and this plan has a symbolic one"
    if platform in ("tpu", "cuda"):
        return None
    return f"has no kernel for {platform}, where it is a loop over tiles"


GROUPED = Implementation(
    name="grouped",
    run=run,
    slots_executed=slots_executed,
    refuse=refuse,
    summary="kernels that multiply sorted rows by their expert's matrix (FeedForward; TPU, GPU)",
)
