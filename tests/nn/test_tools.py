"""Flax's own tools on our modules: serialisation, tabulate, display, nn.vmap, sharded init."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, serialization

import moe_jax
from moe_jax.nn import linen as moe_linen
from moe_jax.nn import nnx as moe_nnx
from moe_jax.nn.patching import patch_model_with_dynamic_routing
from moe_jax.parallel import sharding

E, D, F = 8, 8, 16
X = jax.random.normal(jax.random.key(0), (12, D))


def dynamic(most: int = 3, seed: int = 0):
    return moe_nnx.DynamicMoE(E, max_k=most, d_model=D, d_ff=F, rngs=nnx.Rngs(seed))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


def pure(model):
    return nnx.to_pure_dict(nnx.state(model))


def test_msgpack_restores_an_nnx_model_with_its_fitted_router():
    model, other = dynamic(), dynamic(seed=1)
    model.fit_router(X, target_mean_k=2.0)
    state = nnx.state(other)
    restored = serialization.from_bytes(pure(other), serialization.to_bytes(pure(model)))
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(other, state)
    same(pure(other), pure(model))
    assert other.router_state.get_value().fit.describe()["fitted"]


def test_msgpack_restores_linen_variables():
    layer = moe_linen.DynamicMoE(E, d_model=D, d_ff=F)
    variables, other = (layer.init(jax.random.key(seed), X) for seed in (0, 1))
    same(serialization.from_bytes(other, serialization.to_bytes(variables)), variables)


def test_a_restore_into_another_model_says_what_to_do_first():
    data = serialization.to_bytes(pure(dynamic()))
    with pytest.raises(ValueError, match=r"thresholds: expected \[3\], got \[2\]\. Restore into"):
        serialization.from_bytes(pure(dynamic(most=4)), data)
    trained = moe_nnx.MoE(moe_jax.TopK(num_experts=E, k=3), d_model=D, d_ff=F, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"written under another rule.*patch_model_with_dynamic_r"):
        serialization.from_bytes(pure(trained), data)
    patch_model_with_dynamic_routing(trained, 0.125, 0.375)  # 1 to 3 of 8
    serialization.from_bytes(pure(trained), data)


def test_patching_runs_a_model_that_takes_more_than_one_input():
    class Model(nnx.Module):
        def __init__(self):
            router = moe_jax.TopK(num_experts=E, k=3)
            self.moe = moe_nnx.MoE(router, d_model=D, d_ff=F, rngs=nnx.Rngs(0))

        def __call__(self, x, positions):
            return self.moe(x + positions)

    model = Model()
    report = patch_model_with_dynamic_routing(
        model, calibration=(X, X), target_mean_k=2.0, call=lambda model, pair: model(*pair)
    )
    assert report["moe"]["fit"]["token_count"] == len(X)


def test_tabulate_and_display_leave_the_module_as_it_was():
    for module in (
        dynamic(),
        moe_nnx.Router(moe_jax.TopK(num_experts=E, k=2), D, rngs=nnx.Rngs(0)),
    ):
        before = jax.tree.leaves(module(X))[0]
        table = nnx.tabulate(module, X)
        assert type(module).__name__ in table
        assert "Total Parameters" in table
        nnx.display(module)
        np.testing.assert_array_equal(jax.tree.leaves(module(X))[0], before)


def test_linen_vmap_stacks_layers_with_partition_metadata():
    stacked = nn.vmap(
        moe_linen.MoE,
        in_axes=0,
        out_axes=0,
        variable_axes={"params": 0, "router_state": 0},
        split_rngs={"params": True},
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(moe_jax.TopK(num_experts=E, k=2), d_model=D, d_ff=F)
    x = jnp.stack([X, -X])
    variables = jax.jit(stacked.init)(jax.random.key(0), x)
    names = variables["params"]["experts"]["up"].names
    assert names == ("layers", "expert", "embed", "mlp")
    y = jax.jit(stacked.apply)(variables, x)
    layer = moe_linen.MoE(moe_jax.TopK(num_experts=E, k=2), d_model=D, d_ff=F)
    second = jax.tree.map(lambda leaf: leaf[1], nn.meta.unbox(variables))
    np.testing.assert_allclose(y[1], layer.apply(second, x[1]), atol=1e-6)


def test_nnx_modules_are_made_on_a_mesh():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    @nnx.jit
    def make():
        model = dynamic()
        state = nnx.state(model)
        specs = sharding.shardings(sharding.param_specs(state, mesh), mesh)
        nnx.update(model, jax.lax.with_sharding_constraint(state, specs))
        return model

    model = make()
    assert isinstance(model.experts["up"].get_value().sharding, jax.sharding.NamedSharding)
    for a, b in zip(jax.tree.leaves(pure(model)), jax.tree.leaves(pure(dynamic())), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
