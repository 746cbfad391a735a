"""Derivatives of every order and mode, and vmap, through every implementation: the oracle's values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.experts import IMPLEMENTATIONS, FeedForward, derivatives, run_experts
from tests.experts.test_tiered import draw, kept_weights, plan_of

E, D, F, T = 4, 4, 6, 12
FFN = FeedForward(activation="gelu_tanh")
# JAX differentiates capacity and dense by itself.
COMPARED = tuple(name for name in IMPLEMENTATIONS if name not in ("capacity", "dense"))
# What is compared with the oracle's values; docs/composition.md says so too. The derivatives of active
# are those of tiered.
FIRST = ("linearize", "jvp of grad", "vmap of grad")
HIGHER = ("grad of jvp", "grad of grad", "vmap of jvp of grad", "grad of vmap")
KEPT = np.random.default_rng(1).uniform(size=(T, 2)) < 0.8


def arguments(dtype=jnp.float32):
    plan = plan_of(np.where(KEPT, draw(T, E, 2, skew=1.0), E), E)
    params = FFN.init(jax.random.key(0), num_experts=E, d_model=D, d_ff=F)
    x = jax.random.normal(jax.random.key(1), (T, D))
    params, x = jax.tree.map(lambda a: a.astype(dtype), (params, x))
    return plan, (params, x, kept_weights(plan))


def along(at):
    return jax.tree.map(lambda a: jax.random.normal(jax.random.key(2), a.shape, a.dtype), at)


def inner(a, b):
    return sum((u * v).sum() for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def derivatives_of(name: str, plan, at):
    """Values by name of what is differentiated how, each a tree of arrays."""

    def loss(at):
        params, x, weights = at
        return jnp.sin(IMPLEMENTATIONS[name].run(FFN, params, x, plan, weights)).sum()

    def of_x(x):
        return loss((at[0], x, at[2]))

    def pushed(at):
        return jax.jvp(loss, (at,), (along(at),))[1]

    gradient, batch = jax.grad(loss), jnp.stack([at[1], -at[1]])
    # jacfwd and hessian are such products under vmap.
    directions = jnp.stack([jnp.ones_like(at[1]), at[1]])
    first = {
        "linearize": jax.linearize(loss, at)[1](along(at)),
        "jvp of grad": jax.jvp(gradient, (at,), (along(at),))[1],
        "vmap of grad": jax.vmap(jax.grad(of_x))(batch),
    }
    if name == "active":  # its derivatives are those of tiered
        return first
    return {
        **first,
        "grad of jvp": jax.grad(pushed)(at),
        "grad of grad": jax.grad(lambda at: inner(gradient(at), along(at)))(at),
        "vmap of jvp of grad": jax.vmap(lambda t: jax.jvp(jax.grad(of_x), (at[1],), (t,))[1])(
            directions
        ),
        "grad of vmap": jax.grad(lambda at: jax.vmap(of_x)(batch * at[1][None]).sum())(at),
    }


@pytest.fixture(scope="module")
def oracle():
    plan, at = arguments()
    return jax.jit(derivatives_of, static_argnums=0)("dense", plan, at)


@pytest.mark.parametrize("name", COMPARED)
def test_every_derivative_equals_the_oracles(name: str, oracle):
    plan, at = arguments()
    actual = jax.jit(derivatives_of, static_argnums=0)(name, plan, at)
    assert set(actual) == {*FIRST, *(HIGHER if name != "active" else ())}
    for how, value in actual.items():
        for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(oracle[how]), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4, err_msg=how)


def test_bfloat16_has_second_derivatives():
    # Its rows move as bits, which have no derivative; a second derivative must not lose them.
    def product(name: str):
        plan, at = arguments(jnp.bfloat16)

        def loss(x):
            y = IMPLEMENTATIONS[name].run(FFN, at[0], x, plan, at[2])
            return jnp.square(y).sum()

        return jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (along(x),))[1])(at[1])

    wanted = product("dense").astype(jnp.float32)
    assert float(jnp.abs(wanted).max()) > 0.1
    np.testing.assert_allclose(product("tiered").astype(jnp.float32), wanted, atol=0.1, rtol=0.1)


def test_a_gradient_runs_no_reference(monkeypatch):
    """The reference costs more than the function: first derivatives and jvp of grad leave it alone."""
    plan, at = arguments()
    used = []
    reference = derivatives._program

    def watched(function, tree, structures):
        program = reference(function, tree, structures)
        plain = program.reference

        def noted(*arrays):
            used.append(function)
            return plain(*arrays)

        return derivatives.dataclasses.replace(program, reference=noted)

    monkeypatch.setattr(derivatives, "_program", watched)

    def loss(x):
        return IMPLEMENTATIONS["tiered"].run.__wrapped__(FFN, at[0], x, plan, at[2]).sum()

    jax.make_jaxpr(jax.grad(loss))(at[1])
    jax.make_jaxpr(lambda x: jax.jvp(jax.grad(loss), (x,), (x,)))(at[1])
    assert not used
    jax.make_jaxpr(jax.grad(lambda x: jax.grad(loss)(x).sum()))(at[1])
    assert used


@pytest.mark.parametrize("name", ["tiered", "active"])
@pytest.mark.parametrize("transform", ["jit", "grad", "grad in jit", "vmap"])
def test_an_expert_function_may_use_traced_arrays_from_outside(name, transform):
    plan, (params, x, weights) = arguments()

    def loss(scale, name=name):
        def expert(p, rows):
            return jnp.tanh(rows @ p["up"]) @ p["down"] * scale

        return run_experts(expert, params, x, plan, weights, implementation=name).y.sum()

    def result(name):
        def of(scale):
            return loss(scale, name)

        return {
            "jit": jax.jit(of),
            "grad": jax.grad(of),
            "grad in jit": jax.jit(jax.grad(of)),
            "vmap": lambda scale: jax.vmap(of)(jnp.stack([scale, 2 * scale])),
        }[transform](jnp.float32(1.5))

    np.testing.assert_allclose(result(name), result("dense"), rtol=1e-5)


@pytest.mark.parametrize("name", ["tiered", "active"])
def test_traced_arrays_from_outside_inside_shard_map(name: str):
    """One device's gradient without check_vma; with it, a sentence that names what works."""
    plan, (params, x, weights) = arguments()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def of(scale, name, **options):
        def run(scale, x, weights):
            def expert(p, rows):
                return jnp.tanh(rows @ p["up"]) @ p["down"] * scale

            return run_experts(expert, params, x, plan, weights, implementation=name).y

        if options:
            split = (P(), P("data"), P("data"))
            run = jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=P("data"), **options)
        return run(scale, x, weights).sum()

    gradient = jax.grad(of)(jnp.float32(1.5), name, check_vma=False)
    np.testing.assert_allclose(gradient, jax.grad(of)(jnp.float32(1.5), "dense"), rtol=1e-5)
    with pytest.raises(ValueError, match=r"expert_fn: .*check_vma=True.*leading axis E.*'dense'"):
        jax.eval_shape(lambda s: of(s, name, check_vma=True), jnp.float32(1.5))
