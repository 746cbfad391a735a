"""Flax NNX modules. Arrays only; every computation is a call of a pure function."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from flax import nnx
from jax.sharding import Mesh

from moe_jax.checks import check_count, check_instance, check_layer_params
from moe_jax.experts import ExpertFn, FeedForward
from moe_jax.layer import LayerAux
from moe_jax.nn import serialization as serialization  # registers router states with Flax
from moe_jax.nn.setup import (
    CallArguments,
    ExpertInit,
    LayerDefinition,
    layer_options,
    logical_axes,
    routing_of,
    stats_of,
    tokens_of,
)
from moe_jax.routers import DynamicK
from moe_jax.routers import Router as Rule
from moe_jax.routing.difficulty import Context, Estimator
from moe_jax.routing.gate import Gate
from moe_jax.routing.losses import Axes
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, ExpertChoice, Params, Routing, RoutingStats


class RouterState(nnx.Variable):
    """What a router learns without gradients. Not an ``nnx.Param``, so no optimiser touches it."""


def hold(tree: Params, path: str) -> Any:
    """Returns the tree with arrays as ``nnx.Param`` that name their axes, for a module to hold."""
    if isinstance(tree, dict):
        return nnx.Dict({k: hold(v, f"{path}/{k}" if path else k) for k, v in tree.items()})
    if isinstance(tree, list | tuple):
        return nnx.List([hold(v, f"{path}/{i}") for i, v in enumerate(tree)])
    # Logical names, for rules to map to a mesh later: not for nnx to place arrays by right now.
    return nnx.Param(tree, out_sharding=logical_axes(path, tree.ndim), eager_sharding=False)


def arrays(held: Any) -> Params:
    """Returns the plain tree of arrays: the inverse of ``hold``."""
    if isinstance(held, nnx.Dict):
        # nnx.tabulate replaces every public method of a node's class, `items` too, and would recurse.
        # It also leaves a private number in each node.
        return {k: arrays(held[k]) for k in held if not k.startswith("_nnx")}
    if isinstance(held, nnx.List):
        return [arrays(v) for v in held]
    return held.get_value()


class _Routed(nnx.Module):
    """What ``Router`` and ``MoE`` do with their rule besides calling it."""

    router: Any  # the rule's parameters
    router_state: RouterState

    def _routing_rule(self) -> Rule:
        raise NotImplementedError

    def _width(self) -> int:
        """D."""
        raise NotImplementedError

    def regularization(
        self, aux: LayerAux | Routing | ExpertChoice, *, axis_name: Axes = None
    ) -> Array:
        """f32[]: the term that the rule's paper adds to the training loss, for this layer's parameters.

        Call it inside the function that is differentiated. ``ReLURouter`` and ``TopAny`` need the term;
        it is 0 for most rules.
        """
        state = self.router_state.get_value()
        return self._routing_rule().regularization(
            arrays(self.router), state, routing_of(aux), axis_name=axis_name
        )

    def update_router(self, aux: LayerAux | RoutingStats) -> None:
        """Writes the router's state after a training batch. No other method calls it."""
        state = self.router_state.get_value()
        self.router_state.set_value(self._routing_rule().update(state, stats_of(aux)))

    def fit_router(self, x: Array, *, target_mean_k: float, **kwargs: Any) -> None:
        """Calibrates the router on x float[..., D], outside of ``jit``; see ``moe_jax.Router.fit``."""
        x, kwargs = tokens_of(x, kwargs, self._width())
        params, state = arrays(self.router), self.router_state.get_value()
        rule = self._routing_rule()
        self.router_state.set_value(
            rule.fit(params, state, x, target_mean_k=target_mean_k, **kwargs)
        )


class Router(_Routed):
    """A routing rule with its parameters and state.

    Args:
        router: the rule.
        d_model: D.
        rngs: ``params`` makes the initial kernel.

    Example:
        >>> import jax.numpy as jnp, moe_jax
        >>> layer = Router(moe_jax.TopK(num_experts=4, k=2), 8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 8))).expert_indices.shape
        (3, 2)
    """

    def __init__(self, router: Rule, d_model: int, *, rngs: nnx.Rngs) -> None:
        check_instance("router", router, Rule, fix="Pass a rule such as TopK(num_experts=8, k=2).")
        check_instance("rngs", rngs, nnx.Rngs, fix="Pass rngs=nnx.Rngs(0).")
        check_count("d_model", d_model, fix="Pass the width of x.")
        self.rule, self.d_model = router, d_model
        self.router = hold(router.init(rngs.params(), d_model), "router")
        self.router_state = RouterState(router.init_state())

    def __call__(
        self,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing | ExpertChoice:
        """Routes x float[T, D]; see ``moe_jax.Router.__call__``."""
        state = self.router_state.get_value()
        return self.rule(
            arrays(self.router), state, x, key=key, token_mask=token_mask, context=context
        )

    def _routing_rule(self) -> Rule:
        return self.rule

    def _width(self) -> int:
        return self.d_model


class MoE(_Routed):
    """A Mixture-of-Experts layer.

    Args:
        router: the rule.
        d_model: D.
        d_ff: F.
        expert_fn: the expert; a function of your own needs ``expert_init``.
        expert_init: ``(key, num_experts) -> params`` for experts of your own.
        shared_d_ff: width of a shared expert; 0 for no shared expert.
        rngs: ``params`` makes the initial parameters; or give
        params: arrays to hold instead, as ``moe_layer`` takes them.
        state: the router's state to hold; None is a new one.
        mesh: spreads tokens and experts over its devices, see
            ``moe_jax.parallel.sharded_layer.sharded_moe_layer``.
        **options: the fields of ``moe_jax.LayerOptions``: capacity_factor, max_rows, priority,
            renormalize_kept, implementation, groups.

    Raises:
        TypeError, ValueError: an unknown option, or a value that does not fit; it is named.

    Example:
        >>> import jax.numpy as jnp, moe_jax
        >>> layer = MoE(moe_jax.TopK(num_experts=4, k=2), d_model=8, d_ff=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 3, 8))).shape
        (2, 3, 8)
    """

    def __init__(
        self,
        router: Rule,
        *,
        d_model: int,
        d_ff: int | None = None,
        expert_fn: ExpertFn = FeedForward(),
        expert_init: ExpertInit | None = None,
        shared_d_ff: int = 0,
        rngs: nnx.Rngs | None = None,
        params: dict[str, Params] | None = None,
        state: Any = None,
        mesh: Mesh | None = None,
        **options: Any,
    ) -> None:
        self.spec = LayerDefinition(
            router=router,
            expert_fn=expert_fn,
            d_model=d_model,
            d_ff=d_ff,
            shared_d_ff=shared_d_ff,
            expert_init=expert_init,
            options=layer_options(type(self).__name__, options),
            mesh=mesh,
        )
        if params is None:
            if rngs is None:
                raise ValueError(
                    "rngs: expected nnx.Rngs or params=, got neither. Pass rngs=nnx.Rngs(0) for new "
                    "parameters."
                )
            check_instance("rngs", rngs, nnx.Rngs, fix="Pass rngs=nnx.Rngs(0).")
            params = self.spec.init(rngs.params())
        check_layer_params(params)
        self.router = hold(params["router"], "router")
        self.experts = hold(params["experts"], "experts")
        for name in ("shared", "shared_gate"):
            if name in params:
                setattr(self, name, hold(params[name], name))
        self.router_state = RouterState(router.init_state() if state is None else state)

    def params(self) -> dict[str, Params]:
        """The arrays as ``moe_layer`` takes them."""
        names = ("router", "experts", "shared", "shared_gate")
        return {n: arrays(getattr(self, n)) for n in names if hasattr(self, n)}

    @overload
    def __call__(
        self, x: Array, *, return_aux: Literal[False] = False, **arguments: Unpack[CallArguments]
    ) -> Array: ...

    @overload
    def __call__(
        self, x: Array, *, return_aux: Literal[True], **arguments: Unpack[CallArguments]
    ) -> tuple[Array, LayerAux]: ...

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
        y, aux = self.spec.run(
            self.params(),
            self.router_state.get_value(),
            x,
            key=key,
            token_mask=token_mask,
            context=context,
        )
        return (y, aux) if return_aux else y

    def _routing_rule(self) -> Rule:
        return self.spec.router

    def _width(self) -> int:
        return self.spec.d_model


class DynamicMoE(MoE):
    """A Mixture-of-Experts layer whose tokens use between ``min_k`` and ``max_k``.

    ``MoE`` with the rule ``DynamicK``. Calibrate it with ``fit_router(x, target_mean_k=...)``, or a
    whole model with ``moe_jax.nn.patching.fit_model``. Before that, raw difficulty decides, and by
    router entropy most tokens use nearly ``max_k``.

    Args:
        num_experts: E.
        expert_fn: the expert; a function of your own needs ``expert_init``.
        min_k: fewest experts a token uses.
        max_k: most experts a token uses.
        d_model: D.
        d_ff: F.
        difficulty: estimator, see ``moe_jax.routing.difficulty``.
        gate, scoring, balance_rate: see ``DynamicK``.
        **others: as in ``MoE``.

    Example:
        >>> import jax.numpy as jnp
        >>> layer = DynamicMoE(8, FeedForward(), 1, 3, d_model=8, d_ff=16, rngs=nnx.Rngs(0))
        >>> y, aux = layer(jnp.ones((2, 3, 8)), return_aux=True)
        >>> aux.routing.expert_indices.shape
        (6, 3)
    """

    def __init__(
        self,
        num_experts: int,
        expert_fn: ExpertFn = FeedForward(),
        min_k: int = 1,
        max_k: int = 4,
        *,
        difficulty: str | Estimator = "router_entropy",
        gate: Gate = Gate(),
        scoring: Scoring = Scoring(),
        balance_rate: float = 0.0,
        **others: Any,
    ) -> None:
        router = DynamicK(
            num_experts=num_experts,
            min_k=min_k,
            max_k=max_k,
            difficulty=difficulty,
            gate=gate,
            scoring=scoring,
            balance_rate=balance_rate,
        )
        super().__init__(router, expert_fn=expert_fn, **others)
