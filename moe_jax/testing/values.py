"""Promises about gradients and precision, and about the rule and its state as values."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routers import TopK, TopP, router_from_json
from moe_jax.routing.dispatch import plan_dispatch, to_assignments
from moe_jax.routing.stats import routing_stats
from moe_jax.testing.case import (
    D_MODEL,
    TOKENS,
    RouterCase,
    gradients_of,
    require,
    route,
    same,
    statistics_of,
)


def gradients_are_finite(case: RouterCase, scales: Sequence[float] = (0.0, 1.0, 30.0, 1e4)) -> None:
    """At ties (scale 0) and at logits of tens, where float32 underflows, to ten thousands."""
    for scale in scales:
        inputs = [scale * case.x]
        kernel = case.params.get("kernel") if isinstance(case.params, Mapping) else None
        if kernel is not None and kernel.shape[0] == D_MODEL:
            # One token whose scores all underflow, one whose scores all saturate.
            mean = kernel.mean(axis=1)
            push = scale * mean[None, :] / jnp.square(mean).sum()
            inputs += [jnp.broadcast_to(sign * push, case.x.shape) for sign in (-1.0, 1.0)]
        for x in inputs:
            finite = [np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients_of(case, x))]
            require(all(finite), f"gradients are not finite at tokens of scale {scale}")


def the_router_learns(case: RouterCase) -> None:
    """Every expert's column of the gate's kernel receives a gradient."""
    for name, leaf in gradients_of(case, case.x)[0].items():
        if name == "kernel":
            require((np.abs(leaf).max(axis=0) > 0).all(), "an expert's column has no gradient")


def padding_sends_no_gradient(case: RouterCase) -> None:
    """Padding, NaN included, changes no gradient and receives none."""
    mask = jnp.arange(TOKENS) % 3 != 1
    want = gradients_of(case, jnp.where(mask[:, None], case.x, 0.0), mask)
    got = gradients_of(case, jnp.where(mask[:, None], case.x, jnp.nan), mask)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, got, want)
    require(not np.asarray(got[1])[~np.asarray(mask)].any(), "padding receives a gradient")


def logits_are_float32(case: RouterCase) -> None:
    """bfloat16 tokens give the answer of the same numbers in float32, not of a rounded product."""
    rounded = case.x.astype(jnp.bfloat16)
    half, wide = case(rounded), case(rounded.astype(jnp.float32))
    np.testing.assert_allclose(half.router_logits, wide.router_logits, rtol=1e-6, atol=1e-6)


def noise_acts_only_with_a_key(case: RouterCase) -> None:
    """Jitter and noise change logits if and only if the call has a key."""
    rule: Any = case.router
    gate = rule.gate
    quiet = dataclasses.replace(rule, gate=dataclasses.replace(gate, jitter=0.0, noise=0.0))
    context = case.context_of(case.x)
    without = quiet(case.params, case.state, case.x, context=context)
    same(rule(case.params, case.state, case.x, context=context), without)
    one, two = (
        rule(case.params, case.state, case.x, key=jax.random.key(i), context=context)
        for i in range(2)
    )
    noisy = bool(gate.jitter or gate.noise)
    for a, b in ((one, without), (one, two)):
        differ = not np.array_equal(a.router_logits, b.router_logits)
        require(differ == noisy, "router_logits: expected noise exactly where gate has some")


# --- promises: the rule as a value, its state -----------------------------------------------


def nothing_retraces(case: RouterCase) -> None:
    """An equal router rebuilt elsewhere, and another state, hit the same compiled function."""
    case()
    rule: Any = case.router
    compiled: Any = route
    before = compiled._cache_size()
    rebuilt = dataclasses.replace(rule)
    require(rebuilt == rule and hash(rebuilt) == hash(rule), "equal fields: expected equal rules")
    state = jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), case.state)
    dataclasses.replace(case, router=rebuilt, state=state)()
    require(compiled._cache_size() == before, "the rule was traced again")


def a_state_is_small_and_keeps_its_shape(case: RouterCase) -> None:
    """``update`` keeps structure, shapes and dtypes of the state, which takes a few KB at most."""
    router: Any = case.router

    def step(state: Any, routing: Any) -> Any:
        observed = router.observe(state, routing)
        plan = plan_dispatch(to_assignments(routing))
        return router.update(state, routing_stats(routing, plan, observed=observed))

    after = jax.eval_shape(step, case.state, case())
    require(
        jax.tree.structure(after) == jax.tree.structure(case.state), "update: another structure"
    )
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(case.state), strict=True):
        require((a.shape, a.dtype) == (b.shape, b.dtype), f"update: {b.shape} became {a.shape}")
    leaves = jax.tree.leaves(case.state)
    require(
        all(hasattr(leaf, "nbytes") for leaf in leaves),
        "init_state: expected a pytree of arrays. Decorate its class with moe_jax.pytree",
    )
    # Four bytes a leaf and an expert, and a table of expert pairs at most.
    limit = 4096 + 8 * router.num_experts**2
    require(sum(leaf.nbytes for leaf in leaves) < limit, f"state: expected under {limit} bytes")


def the_state_of_another_rule_is_refused(case: RouterCase) -> None:
    """Another rule's state, None and a dict raise TypeError with the expected class."""
    router = case.router
    other = TopK(num_experts=router.num_experts, k=1).init_state()
    if type(other) is type(router.init_state()):
        other = TopP(num_experts=router.num_experts).init_state()
    for wrong in (other, None, {}):
        try:
            jax.eval_shape(functools.partial(router, case.params, wrong), case.x)
        except TypeError as error:
            require("state: expected a" in str(error), f"a wrong state raised {error}")
        else:
            raise AssertionError(f"a state of type {type(wrong).__name__} was accepted")


def no_array_is_in_a_tree_twice(case: RouterCase) -> None:
    """What init, init_state, update and fit return can be donated."""
    rule, calls = case.router, []
    calls.append(("init", lambda: rule.init(jax.random.key(0), D_MODEL)))
    calls.append(("init_state", rule.init_state))
    observed = jax.eval_shape(lambda: rule.observe(case.state, case()))
    stats = dataclasses.replace(
        statistics_of(rule.num_experts), observed=jnp.zeros(observed.shape, observed.dtype)
    )
    calls.append(("update", lambda: rule.update(rule.init_state(), stats)))
    if rule.calibrates() and rule.min_k < rule.max_k:
        calls.append(("fit", lambda: _fitted(case)))
    for name, make in calls:
        leaves = jax.tree.leaves(make())
        pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.size]
        require(len(set(pointers)) == len(pointers), f"{name}: an array is in the tree twice")


def _fitted(case: RouterCase) -> Any:
    rule = case.router
    target = min(rule.min_k + 0.6, (rule.min_k + rule.max_k) / 2)
    return rule.fit(
        case.params, case.state, case.x, target_mean_k=target, context=case.context_of(case.x)
    )


def fit_reaches_its_target(case: RouterCase) -> None:
    """For rules with ``calibrate``: the tokens that were fitted on use the target's mean."""
    rule = case.router
    if not rule.calibrates() or rule.min_k == rule.max_k:
        return
    x = jax.random.normal(jax.random.key(4), (20 * TOKENS, D_MODEL), jnp.float32)
    wide = dataclasses.replace(case, x=x)
    fit = _fitted(wide).fit.describe()
    error = abs(fit["achieved_mean_k"] / fit["target_mean_k"] - 1)
    # A rule that decides by chance comes near its target only: three standard errors.
    require(error < 0.02 + 0.1 * (len(x) ** -0.5), f"fit: reached {fit['achieved_mean_k']}")


def an_unknown_context_key_is_refused(case: RouterCase) -> None:
    """A misspelt key of ``context`` raises ValueError and is named."""
    # A function of the user's own, such as an estimator, may read anything.
    if case.router.context_keys is None or callable(getattr(case.router, "difficulty", None)):
        return
    wrong = {**case.context_of(case.x), "gradiants": case.x}
    try:
        jax.eval_shape(lambda: case.router(case.params, case.state, case.x, context=wrong))
    except ValueError as error:
        require("got gradiants" in str(error), f"an unknown key raised {error}")
    else:
        raise AssertionError("context: an unknown key was accepted")


def init_works_under_eval_shape(case: RouterCase) -> None:
    """``init`` and ``init_state`` can be traced; parameters are float32."""
    router = case.router
    shapes = jax.eval_shape(lambda key: router.init(key, D_MODEL), jax.random.key(0))
    real = router.init(jax.random.key(0), D_MODEL)
    require(jax.tree.structure(shapes) == jax.tree.structure(real), "init: another structure")
    floats = all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    require(floats, "init: expected float32 parameters")
    state = jax.eval_shape(router.init_state)
    require(
        jax.tree.structure(state) == jax.tree.structure(router.init_state()), "init_state differs"
    )


def json_round_trip(case: RouterCase) -> None:
    """The rule that comes back from JSON is equal and has the same hash and fingerprint."""
    router = case.router
    if callable(getattr(router, "difficulty", None)):
        return  # a function has no JSON; to_json says to register it
    back = router_from_json(json.loads(json.dumps(router.to_json())))
    require(back == router and hash(back) == hash(router), "JSON: another rule came back")
    require(back.fingerprint() == router.fingerprint(), "JSON: another fingerprint")


def rules_are_frozen(case: RouterCase) -> None:
    """Assigning to a field raises FrozenInstanceError."""
    router: Any = case.router
    try:
        router.num_experts = 3
    except dataclasses.FrozenInstanceError:
        return
    raise AssertionError("expected @dataclasses.dataclass(frozen=True, kw_only=True)")
