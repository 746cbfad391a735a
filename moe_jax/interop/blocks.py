"""The MoE block of a published model as pure functions over a pytree of parameters."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp

from moe_jax.checks import check_hidden_states, flat_token_mask
from moe_jax.experts import ExpertFn
from moe_jax.interop.expert_functions import rms_norm
from moe_jax.interop.rules import CapacityTopK, JointShared
from moe_jax.interop.tensors import f32
from moe_jax.layer import LayerAux, LayerOptions, add_residual, run_routing
from moe_jax.routers import Router
from moe_jax.routing.difficulty import Context
from moe_jax.types import Array, Params, Routing, pytree, static


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """Static settings of a block besides its router and experts.

    Attributes:
        output_scale: factor on the routed output, after the combine weights.
        average_shared: routed and shared output are averaged instead of added (Cohere 2).
        weight_on_input: combine weights multiply an expert's input (Llama 4).
        norm_eps: eps of the norms inside the block, if there are any.
        per_sequence: the rule counts by sequence, the last but one axis of x.
    """

    output_scale: float = 1.0
    average_shared: bool = False
    weight_on_input: bool = False
    norm_eps: float = 0.0
    per_sequence: bool = False


class BlockArguments(TypedDict, total=False):
    """What a block takes beside x, for the overloads of its calls; see ``MoEBlock.apply``."""

    key: Array | None
    token_mask: Array | None
    context: Context | None
    implementation: str | tuple[str, ...] | None


@pytree
class MoEBlock:
    """A Mixture-of-Experts block: parameters, router state, and the functions that use them.

    It is a registered pytree, so it passes through ``jit`` and ``grad``. ``params`` are trained and
    ``state`` is not: differentiate ``block.apply`` by its first argument.

    Attributes:
        params: ``router``, ``experts`` (leading axis E), and where the model has them ``shared``,
            ``shared_gate``, ``latent``, ``output_norm``, ``output_bias``.
        state: the router's state, with the selection bias of the checkpoint.
        router: the rule.
        expert_fn: one routed expert.
        shared_fn: the shared expert.
        options: scale, norms and the like around them.
    """

    params: dict[str, Params]
    state: Any
    router: Router = static()
    expert_fn: ExpertFn = static()
    shared_fn: ExpertFn = static()
    options: BlockOptions = static()

    @overload
    def __call__(
        self, x: Array, *, return_aux: Literal[False] = False, **arguments: Unpack[BlockArguments]
    ) -> Array: ...

    @overload
    def __call__(
        self, x: Array, *, return_aux: Literal[True], **arguments: Unpack[BlockArguments]
    ) -> tuple[Array, LayerAux]: ...

    def __call__(self, x: Array, **arguments: Any) -> Array | tuple[Array, LayerAux]:
        """``y[..., D]`` for ``x[..., D]``; see ``apply`` for what else may be given."""
        return self.apply(self.params, x, **arguments)

    def route(
        self,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing:
        """The routing of x [..., D], its leading axes flattened to T tokens."""
        return self._route(self.params, x, key, token_mask, context)

    @overload
    def apply(
        self,
        params: dict[str, Params],
        x: Array,
        *,
        return_aux: Literal[False] = False,
        **arguments: Unpack[BlockArguments],
    ) -> Array: ...

    @overload
    def apply(
        self,
        params: dict[str, Params],
        x: Array,
        *,
        return_aux: Literal[True],
        **arguments: Unpack[BlockArguments],
    ) -> tuple[Array, LayerAux]: ...

    def apply(
        self,
        params: dict[str, Params],
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
        implementation: str | tuple[str, ...] | None = None,
        return_aux: bool = False,
    ) -> Array | tuple[Array, LayerAux]:
        """The block with other parameters, e.g. to differentiate.

        Args:
            params: like ``block.params``.
            x: float[..., D]. Rules that count by sequence take the last but one axis as the sequence.
            key: randomness for input jitter, where the model has it; None is evaluation.
            token_mask: bool[...], False for padding: it uses no expert, and its output is zero.
            context: what some rules need beyond x, e.g. ``{"token_ids": ids}`` for DeepSeek-V4's
                hash layers, ``{"router_states": h}`` for Zaya.
            implementation: see ``moe_jax.experts``.
            return_aux: whether the routing and its statistics are returned too.

        Returns:
            float[..., D] in the dtype of x; sums are taken in float32. With ``return_aux``, also the
            ``LayerAux``.

        Raises:
            TypeError, ValueError: x is not float[..., D] with the block's D.

        Example:
            >>> import numpy as np
            >>> from moe_jax.interop import moe_block_from_hf
            >>> rng = np.random.default_rng(0)
            >>> shapes = {"gate.weight": (4, 8), "experts.gate_up_proj": (4, 12, 8),
            ...           "experts.down_proj": (4, 8, 6)}
            >>> block = moe_block_from_hf(
            ...     {"model_type": "mixtral", "num_local_experts": 4},
            ...     {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()})
            >>> x = jnp.ones((2, 3, 8))
            >>> grads = jax.grad(lambda p: block.apply(p, x).sum())(block.params)
            >>> block(x).shape, grads["router"]["kernel"].shape
            ((2, 3, 8), (8, 4))
        """
        routing = self._route(params, x, key, token_mask, context)
        flat = x.reshape(-1, x.shape[-1])
        mask = routing.token_mask[:, None]
        rows = jnp.where(mask, flat, jnp.zeros((), x.dtype))
        y, stats = run_routing(
            self.expert_fn,
            params["experts"],
            self._latent(params["latent"], rows) if "latent" in params else rows,
            routing,
            options=LayerOptions(implementation=implementation),
            observe=functools.partial(self.router.observe, self.state),
            weight_on_input=self.options.weight_on_input,
        )
        y = y * self.options.output_scale
        if "latent" in params:
            y = _affine(params["latent"], "out", y)
        y = add_residual(y, routing, rows)
        if "shared" in params:
            shared = self._shared(params, rows, routing)
            if "shared_gate" in params:
                gate = params["shared_gate"].astype(jnp.float32)
                shared = shared * jax.nn.sigmoid(rows.astype(jnp.float32) @ gate)
            y = (y + shared) / 2 if self.options.average_shared else y + shared
        if "output_bias" in params:
            y = y + params["output_bias"].astype(jnp.float32)[None, :]
        if "output_norm" in params:
            y = rms_norm(y, self.options.norm_eps) * f32(params["output_norm"])[None, :]
        y = jnp.where(mask, y, 0.0).astype(x.dtype).reshape(x.shape)
        return (y, LayerAux(routing=routing, stats=stats)) if return_aux else y

    def _route(self, params, x, key, token_mask, context) -> Routing:
        check_hidden_states(x)
        token_mask = flat_token_mask(token_mask, x.shape[:-1])
        router = self.router
        if self.options.per_sequence:
            assert isinstance(router, CapacityTopK)
            length = x.shape[-2] if x.ndim > 1 else 1
            router = dataclasses.replace(router, sequence_length=length)
        flat = x.reshape(-1, x.shape[-1])
        routing = router(
            params["router"], self.state, flat, key=key, token_mask=token_mask, context=context
        )
        assert isinstance(routing, Routing)
        return routing

    def _shared(self, params, rows: Array, routing: Routing) -> Array:
        if not isinstance(self.router, JointShared):
            return self.shared_fn(params["shared"], rows).astype(jnp.float32)
        weights = self.router.shared_weights(params["router"], rows, routing)
        each = jax.vmap(self.shared_fn, in_axes=(0, None))(params["shared"], rows)
        return jnp.einsum("std,ts->td", each.astype(jnp.float32), weights)

    def _latent(self, latent: Params, rows: Array) -> Array:
        out = _affine(latent, "in", rows)
        if "norm" in latent:
            scale = 1.0 + f32(latent["norm"])
            out = rms_norm(out, self.options.norm_eps) * scale[None, :]
        return out.astype(rows.dtype)


def _affine(params: Params, name: str, rows: Array) -> Array:
    """f32[M, out]."""
    kernel = params[name].astype(rows.dtype)
    out = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)
    bias = params.get(f"{name}_bias")
    return out if bias is None else out + f32(bias)[None, :]
