"""MoE++: experts that cost next to nothing beside the ones that compute."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax.checks import check_range
from moe_jax.interop.rules.free_classes import FreeClasses
from moe_jax.routers.arguments import check_params
from moe_jax.routers.base import NoState
from moe_jax.routing.difficulty import Context
from moe_jax.routing.gate import Gate
from moe_jax.routing.losses import Axes, class_balancing_loss
from moe_jax.routing.numerics import exact
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, Params, Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEPlusPlus(FreeClasses):
    """Top-k over E experts and three kinds of free ones (MoE++, Jin et al. 2024, arXiv:2410.07348).

    A copy expert returns x. A zero expert returns nothing: its weight is taken out and the others are
    renormalised. A constant expert returns ``a * x + b * v`` with a learned vector v and
    ``[a, b] = softmax(x @ constant_mix)``. None of them fills a slot of the routing: what they return
    of x is in ``residual_weight``, which ``moe_layer`` adds; ``b * v`` is ``constant_output``, which
    the caller adds to the layer's output.

    With the gating residual, ``context["logits_before"]`` float[T, E + Z] is ``all_logits`` of the
    MoE layer before; without it (as in the first layer) that term is left out.

    A token that uses a zero expert and one other has weight 1 there, which sends no gradient to the
    router. ``losses.load_balancing_loss`` sees the E experts alone; ``balancing_loss`` is the paper's
    over all classes, and ``capacities`` the rows that it allows each kind.

    Args:
        num_experts: E, the experts that compute; classes are in the order experts, constant, copy,
            zero.
        num_constant: constant experts.
        num_copy: copy experts.
        num_zero: zero experts.
        k: choices per token, free experts included.
        free_share: the paper's tau, what a free expert's load counts beside that of an expert that
            computes; smaller moves tokens to free experts.
        gate: the map to E + Z logits.

    Example:
        >>> router = MoEPlusPlus(num_experts=4)
        >>> params = router.init(jax.random.key(0), 16)
        >>> x = jax.random.normal(jax.random.key(1), (5, 16))
        >>> router(params, router.init_state(), x).expert_indices.shape
        (5, 2)
        >>> router.constant_output(params, x).shape, router.all_logits(params, x).shape
        ((5, 16), (5, 8))
    """

    num_experts: int
    num_constant: int = 2
    num_copy: int = 1
    num_zero: int = 1
    k: int = 2
    free_share: float = 0.75
    gate: Gate = Gate()

    # Divides by at least the float32 epsilon, as the authors' code does.
    scoring: ClassVar[Scoring] = Scoring(norm="clamp", norm_eps=2.0**-23)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        if min(self.num_constant, self.num_copy, self.num_zero) < 0:
            raise ValueError(
                "num_constant, num_copy, num_zero: expected at least 0, got "
                f"{self.num_constant}, {self.num_copy}, {self.num_zero}. 0 is none of that kind."
            )
        alike = "The authors use 0.75; 1 counts all classes alike."
        check_range("free_share", self.free_share, above=0, fix=alike)
        super().__post_init__()

    @property
    def num_free(self) -> int:
        return self.num_constant + self.num_copy + self.num_zero

    def init(self, key: Array, d_model: int) -> Params:
        gate_key, mix_key = jax.random.split(key)
        shape = (self.num_constant, d_model, 2)
        return {
            **self.gate.init(gate_key, d_model=d_model, num_experts=self.num_classes),
            "kernel_before": jnp.zeros((self.num_classes, self.num_classes), jnp.float32),
            "constant": jnp.zeros((self.num_constant, d_model), jnp.float32),
            "constant_mix": jax.random.normal(mix_key, shape, jnp.float32) / d_model**0.5,
        }

    def init_state(self) -> NoState:
        return NoState()

    def all_logits(
        self,
        params: Params,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Array:
        """f32[T, E + Z]: what the next MoE layer takes as ``context["logits_before"]``."""
        logits = self.gate(params, x, key=key, token_mask=token_mask)
        classes, width = self.num_classes, x.shape[1]
        check_params(
            params,
            kernel=(width, classes),
            kernel_before=(classes, classes),
            constant=(self.num_constant, width),
            constant_mix=(self.num_constant, width, 2),
        )
        if context is None or "logits_before" not in context:
            return logits
        before = context["logits_before"].astype(jnp.float32).reshape(logits.shape)
        if token_mask is not None:
            before = jnp.where(token_mask[:, None], before, 0.0)
        kernel = params["kernel_before"].astype(jnp.float32)
        return logits + jnp.matmul(before, kernel, precision=jax.lax.Precision.HIGHEST)

    def logits(self, params, x, *, key=None, token_mask=None, context=None) -> Array:
        return self.all_logits(params, x, key=key, token_mask=token_mask, context=context)

    def select(self, params, state, slots, x, context):
        returns = slots.available & (slots.indices < self.num_classes - self.num_zero)
        weights = jnp.where(returns, self.weights(slots, returns), 0.0)
        return slots.indices < self.num_experts, weights

    def __call__(
        self, params, state, x, *, key=None, token_mask=None, context: Context | None = None
    ) -> Routing:
        slots = self.score(params, state, x, key=key, token_mask=token_mask, context=context)
        keep, weights = self.select(params, state, slots, x, context or {})
        routing = self.build(slots, keep & slots.available, weights)
        constant, residual = self._free_weights(slots.indices, weights)
        residual = residual + (constant * self._mix(params, x, token_mask)[:, :, 0]).sum(axis=1)
        residual = jnp.where(routing.token_mask, residual, 0.0)
        return dataclasses.replace(routing, residual_weight=residual)

    def constant_output(
        self,
        params: Params,
        x: Array,
        *,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Array:
        """f32[T, D]: what constant experts return beside their share of x; 0 for padding."""
        slots = self.score(params, NoState(), x, token_mask=token_mask, context=context)
        _, weights = self.select(params, NoState(), slots, x, context or {})
        constant, _ = self._free_weights(slots.indices, weights)
        amounts = constant * self._mix(params, x, token_mask)[:, :, 1]
        if token_mask is not None:
            amounts = jnp.where(token_mask[:, None], amounts, 0.0)
        return amounts @ params["constant"].astype(jnp.float32)

    def balancing_loss(
        self,
        params: Params,
        x: Array,
        *,
        token_mask: Array | None = None,
        context: Context | None = None,
        axis_name: Axes = None,
    ) -> Array:
        """f32[]: ``sum_i eta_i f_i P_i`` over all classes (the paper's heterogeneous loss).

        ``f_i`` is the share of tokens that choose class i, ``P_i`` its mean probability, and ``eta_i``
        is 1 for experts that compute and ``free_share`` for free ones. The paper's coefficient is 0.01.
        """
        slots = self.score(params, NoState(), x, token_mask=token_mask, context=context)
        classes = jnp.arange(self.num_classes, dtype=jnp.int32)
        chosen = (slots.indices[:, :, None] == classes[None, None, :]) & slots.available[:, :, None]
        return class_balancing_loss(
            slots.probs,
            chosen.any(axis=1),
            cost=jnp.where(classes < self.num_experts, 1.0, jnp.float32(self.free_share)),
            token_mask=slots.token_mask,
            axis_name=axis_name,
        )

    def capacities(self, tokens: int, *, factor: float = 1.1) -> tuple[int, int]:
        """Rows that one expert that computes, and one free expert, may take of ``tokens``.

        The paper's ``gamma tau T / (tau E + Z)`` and ``gamma T / (tau E + Z)`` with all choices
        ``tokens * k`` as T, rounded up. ``LayerOptions(capacity_factor=rows * E / (tokens * max_k))``
        limits the experts that compute; free experts are not limited here, as they cost nothing.

        Example:
            >>> MoEPlusPlus(num_experts=12).capacities(1000, factor=1.0)
            (116, 154)
        """
        tau, gamma = exact(self.free_share), exact(factor)
        row = gamma * tokens * self.k / (tau * self.num_experts + self.num_free)
        return math.ceil(tau * row), math.ceil(row)

    def _free_weights(self, indices: Array, weights: Array) -> tuple[Array, Array]:
        """f32[T, C] of each constant expert, f32[T] of all copy experts."""
        first = self.num_experts
        ids = first + jnp.arange(self.num_constant, dtype=jnp.int32)
        hits = indices[:, :, None] == ids[None, None, :]
        constant = jnp.where(hits, weights[:, :, None], 0.0).sum(axis=1)
        copies = (indices >= first + self.num_constant) & (
            indices < self.num_classes - self.num_zero
        )
        return constant, jnp.where(copies, weights, 0.0).sum(axis=1)

    def _mix(self, params: Params, x: Array, token_mask: Array | None) -> Array:
        """f32[T, C, 2]: how much of x and of its own vector each constant expert returns."""
        x = x.astype(jnp.float32)
        if token_mask is not None:  # a NaN in padding would survive in the parameters' gradient
            x = jnp.where(token_mask[:, None], x, 0.0)
        mix = params["constant_mix"].astype(jnp.float32)
        return jax.nn.softmax(jnp.einsum("td,cdm->tcm", x, mix), axis=-1)
