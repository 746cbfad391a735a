"""Checks of a rule's arguments. They read types and shapes, so ``jit`` runs them only while tracing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from moe_jax.checks import check_key, describe_array
from moe_jax.routing.difficulty import CONTEXT_KEYS
from moe_jax.types import RoutingStats


def check_state(router: Any, state: Any) -> None:
    """Refuses a state that is not of this router's class and sizes.

    Raises:
        TypeError: a state of another class, or not a state.
        ValueError: a state of this rule for other sizes: another number of experts, or another k.
    """
    kind, structure, shapes = _expected_state(router)
    leaves, got = jax.tree.flatten(state)
    # Of two dataclasses with equal fields the tree structures compare equal, so the class decides.
    if type(state) is kind and got == structure and tuple(map(np.shape, leaves)) == shapes:
        return
    wanted = jax.eval_shape(router.init_state)
    if type(state) is not type(wanted):
        raise TypeError(
            f"state: expected a {type(wanted).__name__} for {router!r}, got a "
            f"{type(state).__name__}. Pass router.init_state(), or what fit or update returned."
        )
    raise ValueError(
        f"state: expected the sizes of {router!r}, got a {type(wanted).__name__} with "
        f"{_first_difference(wanted, state)}. It was made for a router of another num_experts or k: "
        "calibrate again, or use the router it was made for."
    )


@functools.lru_cache(maxsize=512)
def _expected_state(router: Any) -> tuple[type, Any, tuple[tuple[int, ...], ...]]:
    """Class, structure and leaf shapes of ``router.init_state()``. Equal routers share an entry."""
    state = jax.eval_shape(router.init_state)
    leaves, structure = jax.tree.flatten(state)
    return type(state), structure, tuple(leaf.shape for leaf in leaves)


def _first_difference(wanted: Any, state: Any) -> str:
    expected = jax.tree_util.tree_flatten_with_path(wanted)[0]
    got = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
    for path, leaf in expected:
        name = jax.tree_util.keystr(path)
        if name not in got:
            return f"no array at {name}"
        if np.shape(got[name]) != leaf.shape:
            return (
                f"{name.lstrip('.')} of shape {list(np.shape(got[name]))} instead of "
                f"{list(leaf.shape)}"
            )
    return "another structure"


def check_stats(router: Any, stats: Any) -> None:
    """Refuses anything that is not the statistics of a batch routed by this router.

    Raises:
        TypeError: not ``RoutingStats``.
        ValueError: statistics of another number of experts.
    """
    if not isinstance(stats, RoutingStats):
        raise TypeError(
            f"stats: expected RoutingStats, got a {type(stats).__name__}. Pass aux.stats of what "
            "moe_layer returned, or what routing_stats returns."
        )
    shape = np.shape(stats.tokens_per_expert)
    if shape != (router.num_experts,):
        raise ValueError(
            f"stats: expected the counts of num_experts={router.num_experts} experts, got "
            f"tokens_per_expert of shape {list(shape)}. Pass the statistics of one layer that this "
            "router routed."
        )


def check_params(params: Any, **shapes: tuple[int | None, ...]) -> None:
    """Raises ValueError unless the router's parameters have these names and shapes.

    Indexing and broadcasting would hide a wrong size: an array [1] passes for one [E].

    Args:
        params: the router's parameters.
        **shapes: by name; None stands for any size.
    """
    fix = "Pass what router.init of this router returned."
    if not isinstance(params, Mapping) or not all(name in params for name in shapes):
        got = ", ".join(sorted(params)) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(
            f"params: expected a router's parameters with {', '.join(shapes)}, got {got}. {fix}"
        )
    for name, wanted in shapes.items():
        shape = np.shape(params[name])
        same = len(shape) == len(wanted) and all(
            want in (None, size) for want, size in zip(wanted, shape, strict=True)
        )
        if not same:
            sizes = ", ".join("any" if want is None else str(want) for want in wanted)
            raise ValueError(
                f"params: expected {name} of shape [{sizes}], got {describe_array(params[name])}. {fix}"
            )


def check_classes(logits: jax.Array, wanted: int) -> None:
    """Raises ValueError unless the parameters gave this many logits a token."""
    if logits.shape[1] != wanted:
        raise ValueError(
            f"params: expected parameters for {wanted} classes of experts, got ones for "
            f"{logits.shape[1]}. Pass what router.init of this router returned."
        )


def check_context(router: Any, context: Any) -> None:
    """Refuses a context key that nothing in the library reads: it is probably misspelt.

    The keys that built-in estimators and rules read are in ``difficulty.CONTEXT_KEYS``; a rule adds
    its own in ``context_keys``, where None allows any.

    Raises:
        TypeError: not a mapping.
        ValueError: an unknown key.
    """
    if context is None:
        return
    if not isinstance(context, Mapping):
        raise TypeError(
            f"context: expected a mapping from names to arrays, got {describe_array(context)}. Write "
            'context={"gradients": ...}.'
        )
    reads = router.context_keys
    if reads is None:
        return
    unknown = sorted(str(key) for key in context if key not in CONTEXT_KEYS and key not in reads)
    if unknown:
        accepted = ", ".join(sorted({*CONTEXT_KEYS, *reads}))
        raise ValueError(
            f"context: expected keys among {accepted}, got {', '.join(unknown)}. Correct the name, or "
            "declare it in the rule's or the estimator's context_keys."
        )


def check_uses_an_expert(min_k: int, why: str) -> None:
    """Raises ValueError if ``min_k`` is 0, for a rule that always uses an expert."""
    if min_k < 1:
        raise ValueError(f"min_k: expected at least 1, got {min_k}. {why}")


def check_ungrouped(scoring: Any, why: str) -> None:
    """Raises ValueError if ``scoring`` limits tokens to groups, for a rule without groups."""
    if scoring.num_groups != 1:
        raise ValueError(f"num_groups: expected 1, got {scoring.num_groups}. {why}")


def check_concrete(name: str, *trees: Any) -> None:
    """Raises TypeError if an array of ``trees`` is traced: ``name`` calculates on the host."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees)):
        raise TypeError(
            f"{name}: expected arrays with values, got traced ones: it calibrates on the host, once. "
            "Call it outside jit, grad and vmap."
        )


def _checked_call(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``__call__`` of a rule: checks the state, the key and the names in the context."""

    @functools.wraps(method)
    def call(self, params, state, x, *, key=None, token_mask=None, context=None):
        check_state(self, state)
        check_key(key)
        check_context(self, context)
        return method(self, params, state, x, key=key, token_mask=token_mask, context=context)

    return call


def _checked_observe(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def observe(self, state, routing):
        check_state(self, state)
        return method(self, state, routing)

    return observe


def _checked_regularization(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def regularization(self, params, state, routing, *, axis_name=None):
        check_state(self, state)
        return method(self, params, state, routing, axis_name=axis_name)

    return regularization


def _checked_update(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``update`` of a rule: checks state and statistics, and skips batches of padding alone."""

    @functools.wraps(method)
    def update(self, state, stats):
        check_stats(self, stats)
        check_state(self, state)
        new = method(self, state, stats)
        if new is state:
            return state
        # A batch of padding alone has measured nothing, so it moves nothing.
        measured = stats.token_count > 0
        return jax.tree.map(
            lambda after, before: before if after is before else jnp.where(measured, after, before),
            new,
            state,
        )

    return update


# The methods of a rule that are wrapped when its class is defined. The checks read types and shapes
# only: under jit they run while tracing, and cost nothing after it.
_CHECKED: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "__call__": _checked_call,
    "observe": _checked_observe,
    "regularization": _checked_regularization,
    "update": _checked_update,
}


def check_arguments_of(rule: type[Any]) -> None:
    """Wraps the methods that this class defines so that they check their arguments first."""
    for name, checked in _CHECKED.items():
        if name in vars(rule):
            setattr(rule, name, checked(vars(rule)[name]))
