"""The tools of Flax and orbax on both modules: the last table of docs/composition.md.

Each check ends without an error, or raises. All but the checkpoint are traced.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax import nnx, serialization
from flax.training.train_state import TrainState

import moe_jax
from moe_jax.nn import linen as moe_linen
from moe_jax.nn import nnx as moe_nnx

D, F = 4, 6
RULE = moe_jax.TopK(num_experts=4, k=2, balance_rate=0.1)  # its update moves a bias
X = jax.ShapeDtypeStruct((5, D), jnp.float32)
LINEN = moe_linen.MoE(RULE, d_model=D, d_ff=F, implementation="dense")


def module() -> moe_nnx.MoE:
    return moe_nnx.MoE(RULE, d_model=D, d_ff=F, implementation="dense", rngs=nnx.Rngs(0))


def variables() -> Any:
    return jax.eval_shape(lambda x: LINEN.init(jax.random.key(0), x), X)


def shape_of(y: Any) -> None:
    assert y.shape == X.shape


# --- NNX


def nnx_jit() -> None:
    shape_of(nnx.eval_shape(lambda x: nnx.jit(lambda m, x: m(x))(module(), x), X))


def nnx_grad() -> None:
    def gradients(x: Any) -> Any:
        return nnx.grad(lambda m, x: jnp.square(m(x)).sum())(module(), x)

    assert nnx.eval_shape(gradients, X)["experts"]["up"].shape == (4, D, F)


def nnx_split() -> None:
    def run(x: Any) -> Any:
        graph, params, rest = nnx.split(module(), nnx.Param, ...)
        return nnx.merge(graph, params, rest)(x)

    shape_of(nnx.eval_shape(run, X))


@nnx.vmap(in_axes=0, out_axes=0)
def _stacked(key: Any) -> moe_nnx.MoE:
    return moe_nnx.MoE(RULE, d_model=D, d_ff=F, implementation="dense", rngs=nnx.Rngs(key))


def nnx_vmap() -> None:
    def run(x: Any) -> Any:
        layers = _stacked(jax.random.split(jax.random.key(0), 2))
        return nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(layers, x)

    assert nnx.eval_shape(run, X).shape == (2, *X.shape)


def nnx_scan() -> None:
    def run(x: Any) -> Any:
        layers = _stacked(jax.random.split(jax.random.key(0), 2))
        return nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers)

    shape_of(nnx.eval_shape(run, X))


def nnx_remat() -> None:
    def run(x: Any) -> Any:
        return nnx.grad(lambda m, x: nnx.remat(lambda m, x: m(x))(m, x).sum())(module(), x)

    nnx.eval_shape(run, X)


def nnx_eval_shape() -> None:
    assert nnx.eval_shape(module).experts["up"].get_value().shape == (4, D, F)


def nnx_optimizer() -> None:
    def step(x: Any) -> Any:
        model = module()
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

        def loss_of(model: moe_nnx.MoE) -> Any:
            y, aux = model(x, return_aux=True)
            return jnp.square(y).sum(), aux

        gradients, aux = nnx.grad(loss_of, has_aux=True)(model)
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            optimizer.update(model, gradients)
        model.update_router(aux)
        return nnx.state(model, moe_nnx.RouterState)

    assert jax.tree.leaves(nnx.eval_shape(step, X))[0].shape == (4,)


def nnx_to_linen() -> None:
    layer = nnx.bridge.ToLinen(
        moe_nnx.MoE, args=(RULE,), kwargs={"d_model": D, "d_ff": F, "implementation": "dense"}
    )

    def run(x: Any) -> Any:
        return layer.apply(layer.init(jax.random.key(0), x), x)

    shape_of(jax.eval_shape(run, X))


def nnx_tabulate() -> None:
    assert "MoE" in nnx.tabulate(_held(), jnp.zeros(X.shape))


def nnx_msgpack() -> None:
    serialization.to_bytes(nnx.to_pure_dict(nnx.state(_held())))


def nnx_manager() -> None:
    graph, state = nnx.split(_held())
    del graph
    _saved_with_a_tree_of_the_user(state)


def _held() -> moe_nnx.MoE:
    """A module of zeros, so that nothing is compiled."""
    graph, state = nnx.split(nnx.eval_shape(module))
    return nnx.merge(graph, _zeros(state))


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), tree)


def _saved_with_a_tree_of_the_user(state: Any) -> None:
    tree = {"step": 3, "model": state}
    with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder) as manager:
        manager.save(0, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        restored = manager.restore(0, args=ocp.args.StandardRestore(tree))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)


# --- Linen


def linen_jit() -> None:
    shape_of(jax.eval_shape(jax.jit(LINEN.apply), variables(), X))


def linen_grad() -> None:
    def loss(variables: Any, x: Any) -> Any:
        return jnp.square(LINEN.apply(variables, x)).sum()

    jax.eval_shape(jax.grad(loss, allow_int=True), variables(), X)


def linen_vmap() -> None:
    layers = nn.vmap(
        moe_linen.MoE,
        in_axes=None,
        out_axes=0,
        axis_size=2,
        variable_axes={"params": 0, "router_state": 0},
        split_rngs={"params": True},
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(RULE, d_model=D, d_ff=F, implementation="dense")
    y = jax.eval_shape(lambda x: layers.init_with_output(jax.random.key(0), x)[0], X)
    assert y.shape == (2, *X.shape)


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        layer = moe_linen.MoE(RULE, d_model=D, d_ff=F, implementation="dense")
        return layer(x), None


def linen_scan() -> None:
    layers = nn.scan(
        _Block,
        variable_axes={"params": 0, "router_state": 0},
        split_rngs={"params": True},
        length=2,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    shape_of(jax.eval_shape(lambda x: layers.init_with_output(jax.random.key(0), x, None)[0][0], X))


def linen_remat() -> None:
    layer = nn.remat(moe_linen.MoE)(RULE, d_model=D, d_ff=F, implementation="dense")
    shape_of(jax.eval_shape(lambda x: layer.init_with_output(jax.random.key(0), x)[0], X))


def linen_tabulate() -> None:
    assert "MoE" in LINEN.tabulate(jax.random.key(0), jnp.zeros(X.shape))


def linen_train_state() -> None:
    def step(variables: Any, x: Any) -> Any:
        held, params = nn.meta.unbox(variables["router_state"]), nn.meta.unbox(variables["params"])
        state = TrainState.create(apply_fn=LINEN.apply, params=params, tx=optax.sgd(0.1))

        def loss(params: Any) -> Any:
            parts = {"params": params, "router_state": held}
            y, aux = state.apply_fn(parts, x, return_aux=True)
            return jnp.square(y).sum(), aux

        gradients, aux = jax.grad(loss, has_aux=True)(state.params)
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            state = state.apply_gradients(grads=gradients)
        parts = {"params": state.params, "router_state": held}
        return LINEN.apply(parts, aux, method="update_router", mutable=["router_state"])[1]

    assert jax.tree.leaves(jax.eval_shape(step, variables(), X))[0].shape == (4,)


def linen_msgpack() -> None:
    serialization.to_bytes(_zeros(nn.meta.unbox(variables())))


def linen_manager() -> None:
    _saved_with_a_tree_of_the_user(_zeros(nn.meta.unbox(variables())))


Check = Callable[[], None]
# By name: the check of nnx.MoE and that of linen.MoE; None where only the other has the tool.
TOOLS: dict[str, tuple[Check | None, Check | None]] = {
    "`nnx.jit`; `jit` of `apply`": (nnx_jit, linen_jit),
    "`nnx.grad`; `grad` of `apply`": (nnx_grad, linen_grad),
    "`nnx.split`, `nnx.merge`": (nnx_split, None),
    "`nnx.vmap`; `nn.vmap` with partition names": (nnx_vmap, linen_vmap),
    "`nnx.scan`; `nn.scan` over layers": (nnx_scan, linen_scan),
    "`nnx.remat`; `nn.remat`": (nnx_remat, linen_remat),
    "`nnx.eval_shape`": (nnx_eval_shape, None),
    "`nnx.Optimizer`; `TrainState`; with the update of the router": (
        nnx_optimizer,
        linen_train_state,
    ),
    "`nnx.bridge.ToLinen`": (nnx_to_linen, None),
    "`nnx.tabulate`; `tabulate`": (nnx_tabulate, linen_tabulate),
    "`flax.serialization`, msgpack": (nnx_msgpack, linen_msgpack),
    "orbax `CheckpointManager`, a tree of yours": (nnx_manager, linen_manager),
}
