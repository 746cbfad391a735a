"""Flags and parameters of an expert agree, or are refused by name, by every way of running experts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import FeedForward, LayerOptions, init_moe_layer, moe_layer
from moe_jax.experts import IMPLEMENTATIONS, check_params, run_experts
from moe_jax.experts.exchange import ExpertParallel
from moe_jax.interop.expert_functions import GatedExpert
from moe_jax.parallel.sharded_layer import sharded_moe_layer
from moe_jax.parallel.sharding import make_mesh
from moe_jax.types import Params
from tests.experts.test_contract import PLANS, D, F

E = 4
GATED = FeedForward(activation="silu", gated=True)
BIASED = FeedForward(activation="silu", gated=True, use_bias=True)


def params_of(expert_fn: FeedForward) -> Params:
    return expert_fn.init(jax.random.key(0), num_experts=E, d_model=D, d_ff=F)


def without(params: Params, *names: str) -> Params:
    return {n: p for n, p in params.items() if n not in names}


# expert, parameters, and words of the refusal
WRONG: dict[str, tuple[Any, Callable[[], Params], str]] = {
    "a plain expert on gated parameters": (
        FeedForward(activation="silu"),
        lambda: params_of(GATED),
        r"not used: gate\b",
    ),
    "a gated expert without a gate": (
        GATED,
        lambda: params_of(FeedForward()),
        r"missing: gate\b",
    ),
    "biases that are not asked for": (
        GATED,
        lambda: params_of(BIASED),
        "not used: down_bias, gate_bias, up_bias",
    ),
    "biases that are missing": (
        BIASED,
        lambda: params_of(GATED),
        "missing: down_bias, gate_bias, up_bias",
    ),
    "one bias that is missing": (
        BIASED,
        lambda: without(params_of(BIASED), "down_bias"),
        r"missing: down_bias\.",
    ),
    "a parameter that no expert reads": (
        GATED,
        lambda: {**params_of(GATED), "scale": jnp.ones((E, D))},
        "not used: scale",
    ),
    "no down": (GATED, lambda: without(params_of(GATED), "down"), "missing: down"),
    "kernels of another width": (
        GATED,
        lambda: GATED.init(jax.random.key(0), num_experts=E, d_model=D + 1, d_ff=F),
        rf"gate \[E=4, D={D}, F={F}\], got float32\[4, {D + 1}, {F}\]",
    ),
    "a down of another width": (
        GATED,
        lambda: {**params_of(GATED), "down": jnp.ones((E, F + 1, D))},
        rf"down \[E=4, F={F}, D={D}\], got float32\[4, {F + 1}, {D}\]",
    ),
    "kernels as PyTorch keeps them": (
        GATED,
        lambda: jax.tree.map(lambda p: p.swapaxes(1, 2), params_of(GATED)),
        rf"\[E=4, D={D}, .*got float32\[4, {F}, {D}\]",
    ),
    "a bias of another width": (
        BIASED,
        lambda: {**params_of(BIASED), "up_bias": jnp.ones((E, D))},
        rf"up_bias \[E=4, F={F}\]",
    ),
    "a bias without an expert axis": (
        BIASED,
        lambda: {**params_of(BIASED), "up_bias": jnp.ones(F)},
        r"leading axis|leading axes",
    ),
    "experts of another number": (
        GATED,
        lambda: GATED.init(jax.random.key(0), num_experts=3, d_model=D, d_ff=F),
        "E=4, got 3",
    ),
    "no parameters": (GATED, dict, "leading axes"),
    "a list": (GATED, lambda: list(params_of(GATED).values()), "expected a dict.*got a list"),
    "a clamped expert without a gate": (
        GatedExpert(limit=7.0),
        lambda: params_of(FeedForward()),
        r"missing: gate\b",
    ),
    "a clamped expert with some biases": (
        GatedExpert(limit=7.0),
        lambda: without(params_of(BIASED), "up_bias"),
        "missing: up_bias",
    ),
    "a clamped expert with a norm that it does not have": (
        GatedExpert(),
        lambda: {**params_of(GATED), "post_norm": jnp.ones((E, D))},
        "not used: post_norm",
    ),
    "a clamped expert without its norm": (
        GatedExpert(post_norm_eps=1e-6),
        lambda: params_of(GATED),
        "missing: post_norm",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
@pytest.mark.parametrize("name", list(IMPLEMENTATIONS))
def test_every_implementation_refuses_parameters_that_disagree(case, name):
    expert_fn, params, words = WRONG[case]
    plan = PLANS["capacity"]()
    x, weights = jnp.ones((13, D)), moe_jax.kept_weights(plan)
    with pytest.raises((ValueError, TypeError), match=re.compile(words, re.DOTALL)) as caught:
        run_experts(expert_fn, params(), x, plan, weights, implementation=name)
    assert re.search(r"expected .+ got .+", str(caught.value), re.DOTALL)


@pytest.mark.parametrize("name", ["active", "ragged"])
def test_what_does_not_call_the_expert_checks_by_itself(name):
    """These two write the expert's products out, so its own check would not be reached."""
    plan = PLANS["capacity"]()
    with pytest.raises(ValueError, match="not used: gate"):
        IMPLEMENTATIONS[name].run(
            FeedForward(), params_of(GATED), jnp.ones((13, D)), plan, moe_jax.kept_weights(plan)
        )


@pytest.mark.parametrize("case", [c for c in WRONG if "number" not in c and "no param" not in c])
def test_a_shared_expert_is_checked_like_the_others(case):
    expert_fn, params, words = WRONG[case]
    router = moe_jax.TopK(num_experts=E, k=2)
    good = params_for(expert_fn)
    shared = params()
    shared = shared[0] if isinstance(shared, list) else {n: p[0] for n, p in shared.items()}
    tree = {"router": router.init(jax.random.key(0), D), "experts": good, "shared": shared}
    # Without the expert axis the shapes are shorter, so only the names of parameters are compared.
    named = words if "missing" in words or "not used" in words else "expected"
    with pytest.raises((ValueError, TypeError), match="shared params: ") as caught:
        jax.eval_shape(
            lambda: moe_layer(router, expert_fn, tree, router.init_state(), jnp.ones((3, D)))
        )
    assert re.search(named, str(caught.value), re.DOTALL)


def params_for(expert_fn: Any) -> Params:
    if isinstance(expert_fn, FeedForward):
        return params_of(expert_fn)
    extra = {"post_norm": jnp.ones((E, D))} if expert_fn.post_norm_eps is not None else {}
    return {**params_of(GATED), **extra}


@pytest.mark.parametrize("case", ["a plain expert on gated parameters", "biases that are missing"])
def test_a_layer_over_devices_refuses_them_too(case):
    expert_fn, params, words = WRONG[case]
    router = moe_jax.TopK(num_experts=E, k=2)
    tree = {"router": router.init(jax.random.key(0), D), "experts": params()}
    mesh = make_mesh(devices=jax.devices()[:1])
    parallel = ExpertParallel(token_axes=("data", "expert"))
    for layout in (None, parallel):
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(
                lambda layout=layout: sharded_moe_layer(
                    router,
                    expert_fn,
                    tree,
                    router.init_state(),
                    jnp.ones((3, D)),
                    mesh=mesh,
                    parallel=layout,
                )
            )


@pytest.mark.parametrize(
    "expert_fn", [FeedForward(), GATED, BIASED], ids=["plain", "gated", "biased"]
)
def test_what_init_returns_is_accepted(expert_fn):
    params = params_of(expert_fn)
    check_params(expert_fn, params, d_model=D, num_experts=E)
    one = {n: p[0] for n, p in params.items()}
    check_params(expert_fn, one, d_model=D)
    assert jax.eval_shape(expert_fn, one, jnp.ones((3, D))).shape == (3, D)
    # Any dtype of the parameters will do: they are converted to that of the rows.
    half = jax.tree.map(lambda p: p.astype(jnp.float8_e4m3fn), params)
    check_params(expert_fn, half, d_model=D, num_experts=E)


def test_the_check_adds_nothing_to_the_program():
    router = moe_jax.TopK(num_experts=E, k=2)
    params = init_moe_layer(router, GATED, jax.random.key(0), d_model=D, d_ff=F)

    def unchecked(params, rows):
        return GATED(params, rows)

    def program(expert_fn):
        options = LayerOptions(implementation="dense")
        return str(
            jax.make_jaxpr(
                lambda p, x: moe_layer(
                    router, expert_fn, p, router.init_state(), x, options=options
                )[0]
            )(params, jnp.ones((3, D)))
        )

    assert program(GATED) == program(unchecked)


# --- the width of the output ----------------------------------------------------------------


def widening(params, rows):
    return jnp.concatenate([rows, rows * params["scale"][None, :]], axis=1)


def test_an_expert_may_return_another_width():
    router = moe_jax.TopK(num_experts=E, k=2)
    params = {
        "router": router.init(jax.random.key(0), D),
        "experts": {"scale": jnp.arange(E * D, dtype=jnp.float32).reshape(E, D)},
    }
    x = jax.random.normal(jax.random.key(1), (2, 3, D))
    run = jax.jit(moe_layer, static_argnums=(0, 1), static_argnames="options")
    want, _ = run(
        router,
        widening,
        params,
        router.init_state(),
        x,
        options=LayerOptions(implementation="dense"),
    )
    assert want.shape == (2, 3, 2 * D)
    y, _ = run(router, widening, params, router.init_state(), x)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
