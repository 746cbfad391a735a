"""What a rule is checked on: seeded tokens, a context, and the measurements that promises compare."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routers import Router, TopK
from moe_jax.routing.dispatch import plan_dispatch, to_assignments
from moe_jax.routing.losses import LossWeights, aux_loss
from moe_jax.routing.stats import routing_stats
from moe_jax.types import ExpertChoice, Routing

TOKENS, D_MODEL = 24, 16
ALL_LOSSES = LossWeights(load_balancing=1.0, router_z=1.0, entropy=1.0, importance=1.0)

ContextOf = Callable[[jax.Array], Mapping[str, Any]]


def example_context(x: jax.Array) -> dict[str, jax.Array]:
    """Returns a value for every key of ``context`` that the library's estimators read.

    Each is a function of the token alone, as the promises about other tokens require.
    """
    wide = x.astype(jnp.float32)
    return {
        "gradients": wide[:, ::-1] * wide[:, :1],
        "attention": jax.nn.softmax(wide, axis=-1),
        "logits": 2.0 * wide,
        "targets": jnp.argmax(wide[:, ::-1], axis=-1).astype(jnp.int32),
    }


@functools.partial(jax.jit, static_argnums=0)
def route(router: Router, params: Any, state: Any, x: Any, mask: Any, context: Any) -> Any:
    """The one compiled function of a case that most promises are checked through."""
    return router(params, state, x, token_mask=mask, context=context)


@dataclasses.dataclass
class RouterCase:
    """A rule with parameters, a state and tokens to check it on.

    Attributes:
        router: the rule.
        params, state: of the rule.
        x: f32[T, D].
        context_of: what the rule gets as ``context`` for tokens x.
    """

    router: Router
    params: Any
    state: Any
    x: jax.Array
    context_of: ContextOf = example_context

    def __call__(
        self,
        x: Any = None,
        *,
        params: Any = None,
        state: Any = None,
        mask: Any = None,
        context: Any = None,
    ) -> Any:
        """Routes the case's tokens, or others, through one compiled function."""
        x = self.x if x is None else x
        return route(
            self.router,
            self.params if params is None else params,
            self.state if state is None else state,
            x,
            jnp.ones((x.shape[0],), bool) if mask is None else mask,
            self.context_of(x) if context is None else context,
        )


def build_case(
    router: Router,
    *,
    params: Any = None,
    state: Any = None,
    context_of: ContextOf = example_context,
) -> RouterCase:
    """Returns a case with seeded tokens; parameters and state are new ones unless given."""
    x = jax.random.normal(jax.random.key(1), (TOKENS, D_MODEL), jnp.float32)
    if params is None:
        params = router.init(jax.random.key(0), D_MODEL)
        if isinstance(params, Mapping) and "kernel" in params:
            params = {**params, "kernel": 2.0 * params["kernel"]}  # so that probabilities differ
    state = router.init_state() if state is None else state
    return RouterCase(router, params, state, x, context_of)


def require(condition: Any, message: str) -> None:
    """Raises AssertionError with this message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def expert_weights(routing: Routing | ExpertChoice) -> np.ndarray:
    """f32[T, E]: every expert's weight on every token, 0 where unused; what the model feels."""
    dense = np.zeros(np.shape(routing.router_logits), np.float32)
    if isinstance(routing, ExpertChoice):
        for e, (tokens, weights) in enumerate(
            zip(np.asarray(routing.token_indices), np.asarray(routing.combine_weights), strict=True)
        ):
            dense[tokens[tokens < routing.num_tokens], e] = weights[tokens < routing.num_tokens]
        return dense
    indices, weights = np.asarray(routing.expert_indices), np.asarray(routing.combine_weights)
    for t, e in np.ndindex(indices.shape):
        if indices[t, e] < routing.num_experts:
            dense[t, indices[t, e]] = weights[t, e]
    return dense


def same(a: Any, b: Any) -> None:
    """Raises AssertionError unless two trees are equal in structure and in every value."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def same_routing(a: Any, b: Any, *, rows: Any = slice(None), rtol: float = 0.0) -> None:
    """Raises AssertionError unless these tokens use the same experts with the same weights."""
    np.testing.assert_array_equal(np.asarray(a.expert_mask)[rows], np.asarray(b.expert_mask)[rows])
    wa, wb = expert_weights(a)[rows], expert_weights(b)[rows]
    np.testing.assert_allclose(wa, wb, rtol=rtol, atol=rtol)


def changed_from(x: jax.Array, first: int) -> jax.Array:
    """x with every token from ``first`` on replaced."""
    fresh = 3.0 * jax.random.normal(jax.random.key(9), x.shape, jnp.float32)
    return jnp.where(jnp.arange(len(x))[:, None] < first, x, fresh)


@jax.jit
def everything_measured(routing: Any) -> dict[str, Any]:
    """Statistics and every auxiliary loss of a routing."""
    plan = plan_dispatch(to_assignments(routing))
    _, terms = aux_loss(routing, ALL_LOSSES)
    return {"stats": routing_stats(routing, plan), **terms}


@functools.partial(jax.jit, static_argnums=(0, 5))
def _gradients(router: Router, params: Any, state: Any, x: Any, mask: Any, context_of: Any) -> Any:
    def loss(params: Any, x: Any) -> Any:
        routing = router(params, state, x, token_mask=mask, context=context_of(x))
        ramp = jnp.cos(jnp.arange(routing.combine_weights.size, dtype=jnp.float32))
        weighed = (routing.combine_weights * ramp.reshape(routing.combine_weights.shape)).sum()
        regularization = router.regularization(params, state, routing)
        return weighed + aux_loss(routing, ALL_LOSSES)[0] + regularization

    return jax.grad(loss, argnums=(0, 1))(params, x)


def gradients_of(case: RouterCase, x: Any, mask: Any = None) -> Any:
    """Gradients of weights and losses in (parameters, tokens)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "router: expected raw weights for training")
        mask = jnp.ones((len(x),), bool) if mask is None else mask
        return _gradients(case.router, case.params, case.state, x, mask, case.context_of)


def statistics_of(num_experts: int) -> Any:
    """Returns the statistics of equal tokens routed by top-1 over ``num_experts`` experts."""
    router = TopK(num_experts=num_experts, k=1)
    x = jnp.ones((TOKENS, D_MODEL), jnp.float32)
    routing = router(router.init(jax.random.key(0), D_MODEL), router.init_state(), x)
    return routing_stats(routing, plan_dispatch(to_assignments(routing)))
