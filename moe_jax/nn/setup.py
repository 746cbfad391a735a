"""What the NNX and the Linen modules share: the layer as a static value, and its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.checks import (
    check_count,
    check_hidden_states,
    check_instance,
    describe_array,
    flat_token_mask,
)
from moe_jax.experts import ExpertFn, FeedForward, check_expert_fn
from moe_jax.layer import LayerAux, LayerOptions, init_moe_layer
from moe_jax.parallel.sharded_layer import layer_over
from moe_jax.parallel.sharding import logical_axes
from moe_jax.routers import Router
from moe_jax.routing.difficulty import Context
from moe_jax.types import Array, ExpertChoice, Params, Routing, RoutingStats

__all__ = [
    "CallArguments",
    "ExpertInit",
    "LayerDefinition",
    "layer_options",
    "logical_axes",
    "routing_of",
    "stats_of",
    "tokens_of",
]

ExpertInit = Callable[[Array, int], Params]


class CallArguments(TypedDict, total=False):
    """What a layer takes beside x, for the overloads of ``__call__``; see ``moe_jax.moe_layer``."""

    key: Array | None
    token_mask: Array | None
    context: Context | None


def check_width(x: Array, d_model: int) -> None:
    """Checks hidden states before they are flattened, so that a message shows the caller's shape.

    Raises:
        TypeError: x is not an array of floats.
        ValueError: its last axis is not ``d_model``.
    """
    check_hidden_states(x)
    if x.shape[-1] != d_model:
        raise ValueError(
            f"x: expected float[..., D={d_model}], got {describe_array(x)}. Pass hidden states as wide "
            "as the module's d_model, with any leading axes."
        )


def tokens_of(x: Array, arguments: dict[str, Any], d_model: int) -> tuple[Array, dict[str, Any]]:
    """Returns hidden states [..., D] as tokens [T, D], and the arguments with their mask as bool[T].

    Raises:
        TypeError: x or the mask is not an array of the right dtype.
        ValueError: x is not ``d_model`` wide, or the mask has other leading axes than x.
    """
    check_width(x, d_model)
    mask = flat_token_mask(arguments.get("token_mask"), x.shape[:-1])
    return x.reshape(-1, x.shape[-1]), {**arguments, "token_mask": mask}


def layer_options(owner: str, options: dict[str, Any]) -> LayerOptions:
    """Returns ``LayerOptions`` from keyword arguments of a module.

    Raises:
        TypeError: a name that is no option; all options are listed.

    Example:
        >>> layer_options("MoE", {"capacity_factor": 1.25}).capacity_factor
        1.25
    """
    names = [f.name for f in dataclasses.fields(LayerOptions)]
    unknown = [name for name in options if name not in names]
    if unknown:
        raise TypeError(
            f"{owner}: expected options among {', '.join(names)}, got {', '.join(unknown)}. The "
            "expert is expert_fn, its width d_ff, and the experts per token of DynamicMoE are min_k "
            "and max_k; correct the name or leave it out."
        )
    return LayerOptions(**options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerDefinition:
    """The static part of an MoE layer: how to create its parameters and how to call it.

    Args:
        router: the rule.
        expert_fn: ``FeedForward``, or any ``(params, rows) -> rows`` together with ``expert_init``.
        d_model: D.
        d_ff: F, for ``FeedForward``.
        shared_d_ff: width of a shared expert; 0 for no shared expert. For ``FeedForward``.
        expert_init: ``(key, num_experts) -> params`` with a leading expert axis, for a function of
            your own.
        options: capacity, row budget, implementation.
        mesh: the devices that tokens and experts are spread over, see
            ``moe_jax.parallel.sharded_layer.sharded_moe_layer``; None is one device.
    """

    router: Router
    expert_fn: ExpertFn
    d_model: int
    d_ff: int | None = None
    shared_d_ff: int = 0
    expert_init: ExpertInit | None = None
    options: LayerOptions = LayerOptions()
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        check_instance(
            "router", self.router, Router, fix="Pass a rule, e.g. TopK(num_experts=8, k=2)."
        )
        check_expert_fn(self.expert_fn)
        if self.mesh is not None:
            check_instance(
                "mesh", self.mesh, Mesh, fix="Pass moe_jax.parallel.sharding.make_mesh()."
            )
        check_count("d_model", self.d_model, fix="Pass the width of x.")
        if self.d_ff is not None:
            check_count("d_ff", self.d_ff, fix="Pass the width of the experts' hidden layer.")
        check_count("shared_d_ff", self.shared_d_ff, least=0, fix="0 adds no shared expert.")
        custom = self.expert_init is not None
        if isinstance(self.expert_fn, FeedForward) and not custom:
            if self.d_ff is None:
                raise ValueError(
                    "d_ff: expected the experts' width, got None. Pass d_ff=, or expert_init= for "
                    "experts of your own."
                )
        elif not custom:
            raise ValueError(
                f"expert_init: expected (key, num_experts) -> params for {self.expert_fn!r}, got "
                "None. A function of your own needs it, to make its parameters."
            )
        elif self.shared_d_ff:
            raise ValueError(
                "shared_d_ff: expected 0 with experts of your own, got "
                f"{self.shared_d_ff}. Add a shared expert as a layer beside this one."
            )

    def init(self, key: Array) -> dict[str, Params]:
        """Parameters as ``moe_layer`` takes them: ``router``, ``experts`` and, if any, ``shared``."""
        if self.expert_init is None:
            assert isinstance(self.expert_fn, FeedForward)
            assert self.d_ff is not None
            return init_moe_layer(
                self.router,
                self.expert_fn,
                key,
                d_model=self.d_model,
                d_ff=self.d_ff,
                shared_d_ff=self.shared_d_ff,
            )
        router_key, expert_key = jax.random.split(key)
        return {
            "router": self.router.init(router_key, self.d_model),
            "experts": self.expert_init(expert_key, self.router.num_experts),
        }

    def run(
        self, params: dict[str, Params], state: Any, x: Array, **arguments: Any
    ) -> tuple[Array, LayerAux]:
        """``moe_layer``, over the devices of the mesh if there is one."""
        check_width(x, self.d_model)
        layer = layer_over(self.mesh)
        return layer(
            self.router, self.expert_fn, params, state, x, options=self.options, **arguments
        )

    def flops_per_row(self) -> float:
        """Operations of one routed expert on one token; of a user's own expert, as XLA counts it."""
        return self._flops(self.d_ff, "experts")

    def shared_flops(self) -> float:
        """Operations of the shared expert on one token; 0 without one."""
        return self._flops(self.shared_d_ff, "shared") if self.shared_d_ff else 0.0

    def _flops(self, width: int | None, name: str) -> float:
        if isinstance(self.expert_fn, FeedForward) and self.expert_init is None:
            assert width is not None
            return float(self.expert_fn.flops_per_row(self.d_model, width))
        shapes = jax.eval_shape(self.init, jax.random.key(0))[name]
        one = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), shapes)
        rows = jax.ShapeDtypeStruct((1, self.d_model), jnp.float32)
        cost = jax.jit(self.expert_fn).lower(one, rows).cost_analysis()
        return float((cost or {}).get("flops", 0.0))


def stats_of(aux: LayerAux | RoutingStats) -> RoutingStats:
    """The statistics of a batch, from what an MoE layer returns or from ``routing_stats``."""
    return aux.stats if isinstance(aux, LayerAux) else aux


def routing_of(aux: LayerAux | Routing | ExpertChoice) -> Routing | ExpertChoice:
    """The routing of a batch, from what an MoE layer returns or by itself."""
    return aux.routing if isinstance(aux, LayerAux) else aux
