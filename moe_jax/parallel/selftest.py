"""A check of the user's machine: do the promises that matter hold on these devices?

Shapes are small and it takes seconds to a minute. All comparisons are in float32 at the highest
precision of the device's products, so a tolerance means rounding and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.experts import IMPLEMENTATIONS, FeedForward, run_experts
from moe_jax.layer import LayerOptions, init_moe_layer, moe_layer
from moe_jax.parallel.collectives import collectives_of
from moe_jax.parallel.sharded_layer import sharded_moe_layer
from moe_jax.parallel.sharding import (
    P,
    jit_sharded,
    make_mesh,
    param_specs,
    token_spec,
)
from moe_jax.routers import DynamicK, Router, TopK
from moe_jax.routing.dispatch import kept_weights, plan_dispatch, to_assignments
from moe_jax.routing.losses import LossWeights, aux_loss

TOLERANCE = 1e-5  # of the largest value of what is compared
_T, _D, _F = 64, 16, 32
_FFN = FeedForward(activation="silu", gated=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table.

    ``passed`` is None if the check does not apply to these devices; ``detail`` says what was measured,
    or why it does not apply.
    """

    name: str
    passed: bool | None
    detail: str


def verify(devices: int | None = None) -> list[Check]:
    """Runs every check on the first ``devices`` devices; None is all there are.

    Raises:
        ValueError: there are not so many devices.

    Example:
        >>> all(check.passed is not False for check in verify(1))
        True
    """
    available = jax.devices()
    count = len(available) if devices is None else devices
    if not 1 <= count <= len(available):
        raise ValueError(
            f"devices: expected 1 to {len(available)}, got {count}. On CPU, moe-jax verify --devices N "
            "makes as many."
        )
    # The comparison is about where rows go. TF32 or bfloat16 products would need a wide tolerance.
    with jax.default_matmul_precision("highest"):
        return [*_implementations(), *_isolation(), *_many(available[:count])]


def _guarded(name: str, check: Callable[[], tuple[bool | None, str]]) -> Check:
    try:
        passed, detail = check()
    except Exception as error:  # whatever it is, the table must say it and go on
        lines = str(error).splitlines() or [""]
        passed, detail = False, f"{type(error).__name__}: {lines[0][:200]}"
    return Check(name=name, passed=passed, detail=detail)


def _worst(actual: Any, wanted: Any) -> float:
    """The largest difference, in parts of the largest value of each array."""

    def one(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        if not np.isfinite(a).all():
            return float("inf")
        # The bound keeps arrays of zeros from dividing rounding errors by zero.
        return float(np.abs(a - b).max()) / max(float(np.abs(b).max()), 1e-2)

    return max(jax.tree.leaves(jax.tree.map(one, actual, wanted)))


def _equal(actual: Any, wanted: Any, what: str) -> tuple[bool, str]:
    worst = _worst(actual, wanted)
    return worst <= TOLERANCE, f"{what} within {worst:.1e}"


# --- one device -----------------------------------------------------------------------------


def _one_layer() -> tuple[Any, Any, Any]:
    router = DynamicK(num_experts=8, min_k=1, max_k=3)
    params = init_moe_layer(router, _FFN, jax.random.key(0), d_model=_D, d_ff=_F)
    x = jax.random.normal(jax.random.key(1), (_T, _D))
    routing = jax.jit(lambda p, x: router(p, router.init_state(), x))(params["router"], x)
    # A capacity of T drops nothing, and lets `capacity` run, which needs one to size its buffers.
    plan = plan_dispatch(to_assignments(routing), capacity=_T)
    return params["experts"], x, plan


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradients(name: str, params: Any, x: Any, weights: Any, plan: Any) -> Any:
    def f(params: Any, x: Any, weights: Any) -> Any:
        return run_experts(_FFN, params, x, plan, weights, implementation=name).y

    y, pull = jax.vjp(f, params, x, weights)
    return y, pull(jnp.cos(y))


def _implementations() -> Iterator[Check]:
    params, x, plan = _one_layer()
    weights = kept_weights(plan)
    wanted = _value_and_gradients("dense", params, x, weights, plan)
    for name in IMPLEMENTATIONS:
        if name == "dense":
            continue

        def check(name: str = name) -> tuple[bool | None, str]:
            actual = _value_and_gradients(name, params, x, weights, plan)
            return _equal(actual, wanted, "outputs and gradients")

        yield _guarded(f"{name} = dense oracle", check)


def _isolation() -> Iterator[Check]:
    params, x, plan = _one_layer()
    weights = kept_weights(plan)
    others = np.arange(_T) != 3
    for name in ("active", "tiered", "capacity"):

        def check(name: str = name) -> tuple[bool | None, str]:
            clean = _value_and_gradients(name, params, x, weights, plan)[0]
            spoilt = _value_and_gradients(name, params, x.at[3].set(jnp.nan), weights, plan)[0]
            return _equal(spoilt[others], clean[others], "tokens beside one of NaN")

        yield _guarded(f"{name}: nothing leaks", check)


# --- many devices ---------------------------------------------------------------------------


def _step(layer: Any, router: Router, params: Any, x: Any) -> Any:
    """Loss, gradients, and what a controller makes of it."""
    state = router.init_state()

    def loss(params: Any, x: Any) -> Any:
        y, aux = layer(router, _FFN, params, state, x)
        return jnp.square(y).mean() + aux_loss(aux.routing, LossWeights())[0], (y, aux.stats)

    (value, (y, stats)), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return value, y, grads, router.update(state, stats)


def _many(devices: list[Any]) -> Iterator[Check]:
    n = len(devices)
    if n == 1:
        yield Check(
            name="many devices = one", passed=None, detail="one device here; try --devices 8 on CPU"
        )
        return
    shapes = [(1, n)] + ([(2, n // 2)] if n % 2 == 0 and n > 2 else [])
    for data, expert in shapes:
        mesh = make_mesh(data=data, expert=expert, devices=devices)
        for word, factor in (("dropping", 1.0), ("dropless", None)):
            if factor:
                router = TopK(num_experts=2 * expert, k=2, balance_rate=1e-2)
            else:
                router = DynamicK(num_experts=2 * expert, min_k=1, max_k=3, balance_rate=1e-2)
            yield _guarded(
                f"{n} devices = 1: {data} data x {expert} expert, {word}",
                functools.partial(_same_on_many, mesh, router, factor, n),
            )
    mesh = make_mesh(expert=n, devices=devices)
    for word, factor in (("dropping", 1.25), ("dropless", None)):
        for gradient in (False, True):
            yield _guarded(
                f"messages: {word}, {'forward + backward' if gradient else 'forward'}",
                functools.partial(_messages, mesh, n, factor, gradient),
            )


def _same_on_many(mesh: Any, router: Router, factor: float | None, n: int) -> tuple[bool, str]:
    params = init_moe_layer(router, _FFN, jax.random.key(0), d_model=_D, d_ff=_F)
    x = jax.random.normal(jax.random.key(1), (8 * n, _D))
    options = LayerOptions(capacity_factor=factor)
    grouped = dataclasses.replace(options, groups=n, implementation="dense")
    one = functools.partial(moe_layer, options=grouped)
    wanted = jax.jit(functools.partial(_step, one, router))(params, x)
    layer = functools.partial(sharded_moe_layer, mesh=mesh, options=options)
    specs, rows = param_specs(params, mesh), token_spec(mesh)
    run = jit_sharded(
        functools.partial(_step, layer, router),
        mesh,
        in_specs=(specs, rows),
        out_specs=(P(), rows, (specs, rows), P()),
    )
    actual = jax.device_get(run(params, x))
    return _equal(actual, jax.device_get(wanted), "output, loss, gradients and bias")


def _messages(mesh: Any, n: int, factor: float | None, gradient: bool) -> tuple[bool, str]:
    router = TopK(num_experts=2 * n, k=2)
    shapes = jax.eval_shape(
        lambda key: init_moe_layer(router, _FFN, key, d_model=_D, d_ff=_F), jax.random.key(0)
    )
    specs, rows = param_specs(shapes, mesh), token_spec(mesh)

    def forward(params: Any, x: Any) -> Any:
        state = router.init_state()
        options = LayerOptions(capacity_factor=factor)
        return sharded_moe_layer(router, _FFN, params, state, x, mesh=mesh, options=options)[0]

    f, out = forward, rows
    if gradient:
        f = jax.grad(lambda params, x: jnp.square(forward(params, x)).sum(), argnums=(0, 1))
        out = (specs, rows)
    x = jax.ShapeDtypeStruct((32 * n, _D), jnp.float32)
    program = jit_sharded(f, mesh, in_specs=(specs, rows), out_specs=out).lower(shapes, x).compile()
    sent = collectives_of(program)
    swaps = sent["all-to-all"].count if "all-to-all" in sent else 0
    summary = ", ".join(f"{t.count} {kind}" for kind, t in sent.items())
    return swaps == (4 if gradient else 2) and set(sent) <= {"all-to-all", "all-reduce"}, summary
