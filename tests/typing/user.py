"""A user's file, for tests/test_types.py: pyright checks it in strict mode. It is never run."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_type, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import moe_jax
from moe_jax.interop import MoEBlock, RetrofitReport, make_dynamic
from moe_jax.nn import linen as moe_linen
from moe_jax.nn.nnx import DynamicMoE, MoE
from moe_jax.routers import BiasState
from moe_jax.routers.dynamic_k import DynamicKState

router = moe_jax.DynamicK(num_experts=8, min_k=1, max_k=3)
expert_fn = moe_jax.FeedForward(activation="silu", gated=True)
params = moe_jax.init_moe_layer(router, expert_fn, jax.random.key(0), d_model=16, d_ff=32)
x = jnp.ones((4, 16))

# States of rules: through init, fit and update.
state = router.init_state()
assert_type(state, DynamicKState)
assert_type(state.thresholds, jax.Array)
assert_type(moe_jax.TopK(num_experts=8, k=2).init_state(), BiasState)
assert_type(router.fit(params["router"], state, x, target_mean_k=2.0), DynamicKState)

# The pure functions.
y, aux = moe_jax.moe_layer(router, expert_fn, params, state, x)
assert_type(y, jax.Array)
assert_type(aux, moe_jax.LayerAux)
assert_type(aux.stats.tokens_per_expert, jax.Array)
assert_type(router.update(state, aux.stats), DynamicKState)
assert_type(router(params["router"], state, x), moe_jax.Routing)
loss, parts = moe_jax.aux_loss(aux.routing, moe_jax.LossWeights(load_balancing=0.01))
assert_type(loss, jax.Array)
assert_type(parts, dict[str, jax.Array])


def route(x: jax.Array) -> moe_jax.Routing:
    return router(params["router"], state, x)


# pyright sees no types through jax.jit, so a user states them again.
routing = cast(Callable[[jax.Array], moe_jax.Routing], jax.jit(route))(x)
assert_type(routing.expert_indices, jax.Array)
assert_type(routing.num_experts_per_token, jax.Array)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fixed = MoE(moe_jax.TopK(num_experts=8, k=2), d_model=16, d_ff=32, rngs=rngs)
        self.dynamic = DynamicMoE(8, expert_fn, 1, 3, d_model=16, d_ff=32, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, moe_jax.LayerAux]:
        hidden = self.fixed(x)
        assert_type(hidden, jax.Array)
        y, aux = self.dynamic(hidden, return_aux=True)
        assert_type(y, jax.Array)
        assert_type(aux, moe_jax.LayerAux)
        self.dynamic.update_router(aux)
        return y, aux


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = moe_linen.MoE(moe_jax.TopK(num_experts=8, k=2), d_model=16, d_ff=32)(x)
        assert_type(hidden, jax.Array)
        y, aux = moe_linen.DynamicMoE(8, expert_fn, 1, 3, d_model=16, d_ff=32)(
            hidden, return_aux=True
        )
        assert_type(y, jax.Array)
        assert_type(aux, moe_jax.LayerAux)
        return y


def retrofit(block: MoEBlock, x: jax.Array) -> jax.Array:
    dynamic, report = make_dynamic(block, x, target_mean_k=2.0)
    assert_type(report, RetrofitReport)
    assert_type(dynamic(x, return_aux=True), tuple[jax.Array, moe_jax.LayerAux])
    return dynamic(x)
