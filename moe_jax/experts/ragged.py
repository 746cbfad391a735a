"""``jax.lax.ragged_dot`` over sorted rows: native on TPU, fused on some NVIDIA set-ups.

Runs ``FeedForward`` only: a ragged product multiplies sorted rows by a stack of matrices and cannot
run an expert that is a function. Where XLA has no kernel for it (CPU, and GPU unless
``--xla_gpu_experimental_use_ragged_dot_fusion`` is on) it expands to every expert on every row: E
times the work, and one expert's infinite weights reach every token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.experts.derivatives import call
from moe_jax.experts.feed_forward import ACTIVATIONS, ExpertFn, FeedForward, check_params
from moe_jax.experts.implementation import Implementation
from moe_jax.routing.dispatch import combine
from moe_jax.types import Array, DispatchPlan, Params


def run(expert_fn: ExpertFn, params: Params, x: Array, plan: DispatchPlan, weights: Array) -> Array:
    """Computes f32[T, D_out] by ``jax.lax.ragged_dot``; see ``Implementation.run``."""
    return run_with(_product, expert_fn, params, x, plan, weights)


def masked_dot(rows: Array, kernels: Array, sizes: Array) -> Array:
    """``ragged_dot`` of rows [N, M] and kernels [E, M, P] as E products of all rows, f32[N, P].

    JAX has no second reverse derivative of ``ragged_dot``, and has one of this.
    """
    ends = jnp.cumsum(sizes)
    row = jnp.arange(rows.shape[0], dtype=sizes.dtype)[None, :]
    inside = (row < ends[:, None]) & (row >= (ends - sizes)[:, None])  # [E, N]
    masked = jnp.where(inside[:, :, None], rows[None], jnp.zeros((), rows.dtype))
    return jnp.matmul(masked, kernels, preferred_element_type=jnp.float32).sum(axis=0)


class _RaggedDot:
    """``jax.lax.ragged_dot`` in float32. JAX cannot batch its group sizes, so a batch is a loop."""

    batched_in_a_loop = True

    def run(self, rows: Array, kernels: Array, sizes: Array, *, in_place: bool) -> Array:
        del in_place  # JAX differentiates the product in both modes
        return jax.lax.ragged_dot(rows, kernels, sizes, preferred_element_type=jnp.float32)

    def forward(
        self, rows: Array, kernels: Array, sizes: Array, *, in_place: bool
    ) -> tuple[Array, None]:
        return self.run(rows, kernels, sizes, in_place=in_place), None

    def backward(
        self, arguments: tuple[Any, ...], residuals: None, cotangents: Array, *, in_place: bool
    ) -> tuple[Any, ...]:
        del residuals
        rows, kernels, sizes = arguments
        product = functools.partial(self.run, sizes=sizes, in_place=in_place)
        return (*jax.vjp(product, rows, kernels)[1](cotangents), None)

    def reference(self, rows: Array, kernels: Array, sizes: Array) -> tuple[Array, None]:
        return masked_dot(rows, kernels, sizes), None


def product(rows: Array, kernels: Array, sizes: Array) -> Array:
    """``jax.lax.ragged_dot`` in float32, with derivatives of every order and under ``jax.vmap``."""
    return call(_RaggedDot(), rows, kernels, sizes)


def _product(rows: Array, kernels: Array, sizes: Array, *, preferred_element_type: Any) -> Array:
    del preferred_element_type  # float32 always
    return product(rows, kernels, sizes)


def run_with(
    ragged_dot: Callable[..., Array],
    expert_fn: ExpertFn,
    params: Params,
    x: Array,
    plan: DispatchPlan,
    weights: Array,
) -> Array:
    """``run`` with another grouped product that is called like ``jax.lax.ragged_dot``."""
    if not isinstance(expert_fn, FeedForward):
        raise ValueError(
            f"expert_fn: expected FeedForward, got {type(expert_fn).__name__}. "
            "A ragged product runs no other expert; use implementation='tiered'."
        )
    a = plan.assignments
    check_params(expert_fn, params, d_model=x.shape[1], num_experts=a.num_experts)
    n = plan.order[: plan.num_rows]
    live = (jnp.arange(plan.num_rows) < plan.group_sizes.sum())[:, None]
    experts = jnp.minimum(a.expert_indices[n], a.num_experts - 1)

    def project(name: str, rows: Array) -> Array:
        kernel = params[name].astype(rows.dtype)
        out = ragged_dot(rows, kernel, plan.group_sizes, preferred_element_type=jnp.float32)
        scale, bias = params.get(f"{name}_scale"), params.get(f"{name}_bias")
        if scale is not None:
            # Zero where no row is: the product may hold anything there.
            out = out * jnp.where(live, scale.astype(jnp.float32)[experts], 0.0)
        if bias is not None:
            out = out + bias.astype(jnp.float32)[experts]
        # Rows past the last group are zeros on one backend and never written on another.
        return jnp.where(live, out, 0.0)

    act = ACTIVATIONS[expert_fn.activation]
    rows = jnp.where(live, x[a.token_indices[n]], jnp.zeros((), x.dtype))
    hidden = project("up", rows)
    hidden = act(project("gate", rows)) * hidden if expert_fn.gated else act(hidden)
    outputs = project("down", hidden.astype(x.dtype)).astype(x.dtype)
    start = plan.group_offsets[jnp.minimum(a.expert_indices, a.num_experts - 1)]
    row = jnp.where(plan.kept, start + plan.position, 0)
    return combine(plan, outputs[row], weights)


def slots_executed(plan: DispatchPlan) -> Array:
    """Rows where the product is native; an expansion (CPU, plain GPU) computes E times as many."""
    return jnp.asarray(plan.num_rows, jnp.float32)


def refuse(expert_fn: ExpertFn, plan: DispatchPlan, platform: str) -> str | None:
    """Refuses experts other than ``FeedForward``, and platforms without a native ragged product."""
    if not isinstance(expert_fn, FeedForward):
        return "runs FeedForward only: a grouped product cannot run an expert that is a function"
    if platform == "tpu":
        return None
    return f"does E times the work on {platform} unless XLA fuses ragged_dot (a flag)"


RAGGED = Implementation(
    name="ragged",
    run=run,
    slots_executed=slots_executed,
    refuse=refuse,
    summary="jax.lax.ragged_dot over sorted rows (FeedForward only; TPU)",
)
