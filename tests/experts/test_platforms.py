"""The platform that is compiled for decides how experts run, never the backend of the host."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from moe_jax.experts import FeedForward, choose, explain_choice, platform_of, run_experts
from moe_jax.experts.grouped_product import grouped_dot
from moe_jax.layer import LayerOptions
from moe_jax.routers import TopK
from moe_jax.routing.dispatch import kept_weights, plan_dispatch, to_assignments
from tests.experts.test_tiered import draw, plan_of

FFN = FeedForward(activation="silu", gated=True)
CHECKS = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
WIDTH = 128  # the narrowest that the kernels of TPUs take


@functools.cache
def parts(tokens: int = 16):
    plan = plan_of(draw(tokens, 4, 2), 4)
    params = FFN.init(jax.random.key(0), num_experts=4, d_model=WIDTH, d_ff=WIDTH)
    return params, jax.random.normal(jax.random.key(1), (tokens, WIDTH)), plan, kept_weights(plan)


def run(params, x, plan, weights, **how):
    return run_experts(FFN, params, x, plan, weights, **how)


def exported(how, platforms=("tpu", "cuda", "cpu")):
    """The modules for these platforms as text, made on this host."""
    step = jax.jit(lambda *args: run(*args, **how).y)
    return jax.export.export(step, platforms=platforms, disabled_checks=CHECKS)(
        *parts()
    ).mlir_module()


def test_what_says_which_platform_it_is():
    assert platform_of(platform="tpu") == ("tpu", "stated by platform=")
    assert platform_of(jnp.ones(3)) == ("cpu", "the devices of the arguments")
    assert platform_of(np.ones(3)).name == "cpu"
    seen = []
    jax.jit(lambda x: seen.append(platform_of(x)) or x)(jnp.ones(3))
    assert seen.pop().name is None
    device = jax.sharding.AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("a",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform_of().name == "tpu"
    for kind, name in (("NVIDIA H100 80GB HBM3", "cuda"), ("AMD Instinct MI300X", "rocm")):
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="gpu")
        with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device)):
            assert platform_of().name == name


def test_the_choice_says_platform_and_reason():
    plan = parts()[2]
    choice = explain_choice(plan, platform="tpu")
    assert (choice.platform, dict(choice.candidates)["grouped"]) == ("tpu", "chosen")
    assert "no kernel for cpu" in dict(explain_choice(plan).candidates)["grouped"]
    assert str(explain_choice(plan)).startswith("platform: cpu (the devices of the arguments)\n")
    for name in (choose, explain_choice):
        with pytest.raises(ValueError, match=r"platform.*'gpu'"):
            name(plan, platform="gpu")
    with pytest.raises(ValueError, match=r"platform.*'TPU'"):
        LayerOptions(platform="TPU")


def test_an_export_holds_the_own_choice_of_each_platform():
    assert "tpu_custom_call" in exported({})
    assert "tpu_custom_call" not in exported({}, ("cpu",))
    # Only the CPU chooses among sizes at run time.
    assert "tpu_custom_call" in exported({"platform": "tpu"}, ("tpu",))
    assert "tpu_custom_call" not in exported({"platform": "cpu"}, ("tpu",))
    assert "tpu_custom_call" not in exported({"implementation": "tiered"})


@pytest.mark.parametrize("outside", ["params", "x", "all"])
def test_an_array_that_a_program_closes_over_does_not_decide(outside):
    params, x, plan, weights = parts()
    scale = jnp.ones(())
    step, given = {
        "params": (lambda x: run(params, x, plan, weights).y, x),
        "x": (lambda params: run(params, x, plan, weights).y, params),
        "all": (lambda scale: run(params, x, plan, weights).y * scale, scale),
    }[outside]
    for transformed in (step, lambda given: jax.checkpoint(step)(given)):
        module = jax.export.export(jax.jit(transformed), platforms=("tpu",))(given).mlir_module()
        assert "tpu_custom_call" in module
    # Outside of a program the same arrays run where they are.
    assert platform_of((x, params)).name == "cpu"
    seen = []
    jax.grad(lambda x: seen.append(platform_of((x, params)).name) or x.sum())(x)
    jax.vmap(lambda x: seen.append(platform_of((x, params)).name) or x)(x)
    assert seen == ["cpu", "cpu"]


def test_a_symbolic_number_of_rows_has_no_grouped_kernel_and_the_choice_says_so():
    (b,) = jax.export.symbolic_shape("b")
    params = parts()[0]
    router = TopK(num_experts=4, k=2)
    gate = router.init(jax.random.key(2), WIDTH)
    seen = {}

    def step(x):
        plan = plan_dispatch(to_assignments(router(gate, router.init_state(), x)))
        seen.update({p: str(explain_choice(plan, platform=p)) for p in ("tpu", "cuda", "cpu")})
        out = run(params, x, plan, kept_weights(plan))
        seen["ran"] = out.implementation
        return out.y

    shape = jax.ShapeDtypeStruct((b, WIDTH), jnp.float32)
    module = jax.export.export(jax.jit(step), platforms=("tpu", "cuda"))(shape).mlir_module()
    assert seen["ran"] == "tiered (cpu, cuda), ragged (tpu)"
    assert "ragged: chosen" in seen["tpu"]
    assert "tiered: chosen" in seen["cuda"]
    assert "grouped: has tiles that need a number of rows" in seen["cuda"]
    # XLA's product does E times the work on a GPU.
    alone = jax.export.export(jax.jit(step), platforms=("cuda",))(shape).mlir_module()
    assert "ragged_dot" in module
    assert "ragged_dot" not in alone


def test_what_is_not_compiled_for_costs_the_cpu_nothing():
    def step(implementation, params, x, plan, weights):
        def loss(params):
            how = {"implementation": implementation}
            return jnp.square(run(params, x, plan, weights, **how).y).sum()

        return jax.grad(loss)(params)

    memory = [
        jax.jit(functools.partial(step, name)).lower(*parts()).compile().memory_analysis()
        for name in (None, "tiered")
    ]
    assert memory[0].temp_size_in_bytes == memory[1].temp_size_in_bytes


def test_an_unknown_platform_names_both_choices():
    ran = jax.jit(run)(*parts())
    assert ran.implementation == "tiered (cpu), grouped (tpu, cuda)"
    assert run(*parts()).implementation == "tiered"
    np.testing.assert_allclose(ran.y, run(*parts()).y, rtol=1e-5, atol=1e-5)


def test_a_product_of_a_batch_is_a_batch_of_products():
    rows = jax.random.normal(jax.random.key(0), (2, 40, 6))
    kernels = jax.random.normal(jax.random.key(1), (3, 6, 5))
    sizes = jnp.array([[7, 0, 20], [0, 40, 0]], jnp.int32)
    got = jax.jit(jax.vmap(grouped_dot, in_axes=(0, None, 0)))(rows, kernels, sizes)
    for i in range(2):
        kept = int(sizes[i].sum())
        np.testing.assert_allclose(
            got[i, :kept], grouped_dot(rows[i], kernels, sizes[i])[:kept], rtol=1e-5
        )


def test_kernels_lower_in_a_program_of_64_bits():
    params, x, plan, weights = parts()
    with jax.enable_x64(True):
        step = jax.jit(jax.grad(lambda x: run(params, x, plan, weights).y.sum()))
        modules = [
            jax.export.export(step, platforms=(p,), disabled_checks=CHECKS)(x).mlir_module()
            for p in ("tpu", "cuda")
        ]
        assert "tpu_custom_call" in modules[0]
        both = jax.export.export(step, platforms=("tpu", "cuda", "cpu"), disabled_checks=CHECKS)(x)
        assert "tpu_custom_call" in both.mlir_module()
        np.testing.assert_allclose(jax.jit(both.call)(x), step(x), rtol=1e-5, atol=1e-6)
        wide = jax.export.export(step, platforms=("tpu", "cuda"))(x.astype(jnp.float64))
        assert "tpu_custom_call" not in wide.mlir_module()  # kernels take no float64
