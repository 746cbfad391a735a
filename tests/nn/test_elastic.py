"""Elastic budgets in a Flax model of the user's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax import Elastic, MinP, TopK
from moe_jax.nn.elastic import is_router, make_elastic, self_distillation, set_share
from moe_jax.nn.nnx import MoE
from moe_jax.nn.patching import fit_model

X = jax.random.normal(jax.random.key(0), (64, 8))


def layer(rule=None):
    rule = TopK(num_experts=8, k=4, balance_rate=1e-3) if rule is None else rule
    return MoE(rule, d_model=8, d_ff=16, rngs=nnx.Rngs(0))


def mean_k(model):
    return float(model(X, return_aux=True)[1].stats.mean_experts_per_token)


def test_a_model_is_elastic_only_while_it_draws():
    model = layer()
    before = model(X)
    make_elastic(model)
    assert model.spec.router == Elastic(num_experts=8, k=4, balance_rate=1e-3)
    np.testing.assert_allclose(model(X), before, rtol=1e-6)
    set_share(model, 1.0)
    assert mean_k(model) < 3.0
    fit_model(model, X, target_mean_k=3.0)
    assert abs(mean_k(model) - 3.0) < 0.1


def test_only_a_plain_fixed_k_becomes_elastic():
    model = layer(MinP(num_experts=8))
    with pytest.raises(ValueError, match=r"model: expected a layer with a plain fixed k"):
        make_elastic(model)
    assert isinstance(model.spec.router, MinP)


def test_routers_alone_learn_from_the_full_pass():
    model = layer()
    make_elastic(model)

    def loss(model):
        return self_distillation(model, lambda m: m(X))[1]

    optimizer = nnx.Optimizer(model, optax.sgd(1e-1), wrt=is_router)
    before = jax.tree.map(jnp.copy, model.params())
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, is_router))(model)
    optimizer.update(model, grads)
    after = model.params()
    assert np.abs(after["router"]["kernel"] - before["router"]["kernel"]).max() > 0
    jax.tree.map(np.testing.assert_array_equal, after["experts"], before["experts"])
    assert float(model.router_state.get_value().share) == 0.0
