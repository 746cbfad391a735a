"""Flax Linen modules. They hold arrays; pure functions do every computation.

Parameters are in the collection ``params``, the router's state in ``router_state``. Only
``update_router`` writes that state, and only if ``apply`` is called with the collection mutable.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import jax
from flax import linen as nn
from jax.sharding import Mesh

from moe_jax.checks import NamedArguments, check_count, check_instance
from moe_jax.experts import ExpertFn, FeedForward
from moe_jax.layer import LayerAux, LayerOptions
from moe_jax.nn import serialization as serialization  # registers router states with Flax
from moe_jax.nn.setup import (
    CallArguments,
    ExpertInit,
    LayerDefinition,
    logical_axes,
    routing_of,
    stats_of,
)
from moe_jax.routers import DynamicK
from moe_jax.routers import Router as Rule
from moe_jax.routing.difficulty import Context, Estimator
from moe_jax.routing.gate import Gate
from moe_jax.routing.losses import Axes
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, ExpertChoice, Params, Routing, RoutingStats

STATE = "router_state"


def _boxed(params: Params, root: str) -> Params:
    """Boxes each array together with the logical names of its axes; ``root`` starts its path."""

    def box(path: Any, leaf: Array) -> Any:
        name = "/".join([root, *[str(getattr(p, "key", getattr(p, "idx", p))) for p in path]])
        return nn.LogicallyPartitioned(leaf, logical_axes(name, leaf.ndim))

    return jax.tree_util.tree_map_with_path(box, params)


class Router(NamedArguments, nn.Module):
    """A routing rule with its parameters and state.

    Example:
        >>> import jax.numpy as jnp, moe_jax
        >>> layer = Router(moe_jax.TopK(num_experts=4, k=2), d_model=8)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((3, 8)))
        >>> layer.apply(variables, jnp.ones((3, 8))).expert_indices.shape
        (3, 2)
    """

    router: Rule
    d_model: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_instance(
            "router", self.router, Rule, fix="Pass a rule such as TopK(num_experts=8, k=2)."
        )
        check_count("d_model", self.d_model, fix="Pass the width of x.")

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing | ExpertChoice:
        """Routes x float[T, D]; see ``moe_jax.Router.__call__``."""
        params = self.param("router", lambda k: _boxed(self.router.init(k, self.d_model), "router"))
        state = self.variable(STATE, "state", self.router.init_state).value
        return self.router(params, state, x, key=key, token_mask=token_mask, context=context)

    def regularization(
        self, aux: LayerAux | Routing | ExpertChoice, *, axis_name: Axes = None
    ) -> Array:
        """f32[]: the term that the rule's paper adds to the training loss, for this layer's parameters.

        Call ``apply(variables, aux, method="regularization")`` inside the function that is
        differentiated. The parameters may be boxed or not. ``ReLURouter`` and ``TopAny`` need the
        term; it is 0 for most rules.
        """
        return _regularization(self, self.router, aux, axis_name)

    def update_router(self, aux: LayerAux | RoutingStats) -> None:
        """Writes the state after a training batch: ``apply(..., method="update_router",
        mutable=["router_state"])``."""
        _write(self, self.router, aux)


class _MoELayer(NamedArguments, nn.Module, kw_only=True):
    """The common part of ``MoE`` and ``DynamicMoE``, which differ in how they give their rule."""

    d_model: int
    d_ff: int | None = None
    expert_init: ExpertInit | None = None
    shared_d_ff: int = 0
    mesh: Mesh | None = None
    capacity_factor: float | None = None
    max_rows: int | None = None
    priority: str = "score"
    renormalize_kept: bool = False
    implementation: str | tuple[str, ...] | None = None
    groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.spec()  # rejects a wrong value at construction, before the first call

    @nn.nowrap  # a value, not a call that nn.tabulate should list
    def rule(self) -> Rule:
        """The routing rule."""
        raise NotImplementedError

    @nn.nowrap
    def spec(self) -> LayerDefinition:
        """Returns the static description of the layer."""
        return LayerDefinition(
            router=self.rule(),
            expert_fn=self.expert_fn,  # pyright: ignore[reportAttributeAccessIssue]
            d_model=self.d_model,
            d_ff=self.d_ff,
            shared_d_ff=self.shared_d_ff,
            expert_init=self.expert_init,
            options=LayerOptions(
                capacity_factor=self.capacity_factor,
                max_rows=self.max_rows,
                priority=self.priority,
                renormalize_kept=self.renormalize_kept,
                implementation=self.implementation,
                groups=self.groups,
            ),
            mesh=self.mesh,
        )

    @overload
    def __call__(
        self, x: Array, *, return_aux: Literal[False] = False, **arguments: Unpack[CallArguments]
    ) -> Array: ...

    @overload
    def __call__(
        self, x: Array, *, return_aux: Literal[True], **arguments: Unpack[CallArguments]
    ) -> tuple[Array, LayerAux]: ...

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
        return_aux: bool = False,
    ) -> Array | tuple[Array, LayerAux]:
        """y float[..., D] from x float[..., D]; with ``return_aux``, also the ``LayerAux``.

        Reads the router's state and never writes it: see ``update_router``.
        """
        spec = self.spec()
        # All parts come from one key, as in init_moe_layer. Outside initialization, Linen evaluates
        # the initializers only abstractly, to check the shapes of given parameters: any key will do.
        rng = self.make_rng("params") if self.is_initializing() else jax.random.key(0)
        names = jax.eval_shape(spec.init, rng)
        params = {
            name: self.param(name, lambda _, n=name: _boxed(spec.init(rng)[n], n)) for name in names
        }
        state = self.variable(STATE, "state", spec.router.init_state).value
        y, aux = spec.run(params, state, x, key=key, token_mask=token_mask, context=context)
        return (y, aux) if return_aux else y

    def regularization(
        self, aux: LayerAux | Routing | ExpertChoice, *, axis_name: Axes = None
    ) -> Array:
        """f32[]: the rule's term of the training loss; see ``Router.regularization``."""
        return _regularization(self, self.rule(), aux, axis_name)

    def update_router(self, aux: LayerAux | RoutingStats) -> None:
        """Writes the state after a training batch: ``apply(..., method="update_router",
        mutable=["router_state"])``."""
        _write(self, self.rule(), aux)


class MoE(_MoELayer):
    """A Mixture-of-Experts layer, with the arguments of ``moe_jax.nn.nnx.MoE``.

    Example:
        >>> import jax.numpy as jnp, moe_jax
        >>> layer = MoE(moe_jax.TopK(num_experts=4, k=2), d_model=8, d_ff=16)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3, 8)))
        >>> layer.apply(variables, jnp.ones((2, 3, 8))).shape
        (2, 3, 8)
    """

    router: Rule
    expert_fn: ExpertFn = FeedForward()

    @nn.nowrap
    def rule(self) -> Rule:
        return self.router


class DynamicMoE(_MoELayer):
    """``MoE`` with the rule ``DynamicK``; the arguments are those of ``moe_jax.nn.nnx.DynamicMoE``.

    Example:
        >>> import jax.numpy as jnp
        >>> layer = DynamicMoE(8, FeedForward(), 1, 3, d_model=8, d_ff=16)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3, 8)))
        >>> layer.apply(variables, jnp.ones((2, 3, 8))).shape
        (2, 3, 8)
    """

    num_experts: int
    expert_fn: ExpertFn = FeedForward()
    min_k: int = 1
    max_k: int = 4
    difficulty: str | Estimator = "router_entropy"
    gate: Gate = Gate()
    scoring: Scoring = Scoring()
    balance_rate: float = 0.0

    @nn.nowrap
    def rule(self) -> Rule:
        return DynamicK(
            num_experts=self.num_experts,
            min_k=self.min_k,
            max_k=self.max_k,
            difficulty=self.difficulty,
            gate=self.gate,
            scoring=self.scoring,
            balance_rate=self.balance_rate,
        )


def _write(module: nn.Module, rule: Rule, aux: LayerAux | RoutingStats) -> None:
    if not module.is_mutable_collection(STATE):
        raise ValueError(
            f"update_router: expected a mutable collection {STATE!r}, got a fixed one. "
            f"Call apply(variables, ..., method='update_router', mutable=[{STATE!r}])."
        )
    state = module.get_variable(STATE, "state")
    module.put_variable(STATE, "state", rule.update(state, stats_of(aux)))


def _regularization(
    module: nn.Module, rule: Rule, aux: LayerAux | Routing | ExpertChoice, axis_name: Axes
) -> Array:
    # `get_variable` returns a stored variable in its box; only `self.param` unboxes.
    params = nn.meta.unbox(module.get_variable("params", "router"))
    state = nn.meta.unbox(module.get_variable(STATE, "state"))
    return rule.regularization(params, state, routing_of(aux), axis_name=axis_name)
