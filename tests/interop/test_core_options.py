"""Options of Gate, Scoring and TopK that published families need: each against numpy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routers import TopK, router_from_json
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring

T, D, E, K = 12, 16, 8, 3
X = jax.random.normal(jax.random.key(1), (T, D), jnp.float32)


@pytest.mark.parametrize("p", [1.0, 2.0, 0.5])
def test_p_norm(p):
    router = TopK(num_experts=E, k=K, scoring=Scoring(norm="p", norm_p=p))
    params = router.init(jax.random.key(0), D)

    def best_weight(params):
        weights = router(params, router.init_state(), X).combine_weights
        return weights[:, 0].sum(), weights

    grad, weights = jax.jit(jax.grad(best_weight, has_aux=True))(params)
    w = np.asarray(weights, np.float64)
    np.testing.assert_allclose((w**p).sum(axis=1), 1.0, rtol=1e-5)
    assert np.isfinite(grad["kernel"]).all()
    assert np.abs(grad["kernel"]).max() > 0


def test_p_norm_of_no_used_slot_is_finite():
    scoring = Scoring(norm="p", norm_p=2.0)
    keep = jnp.zeros((1, K), bool)
    weigh = lambda s: scoring.weights(s, keep, min_k=2).sum()  # noqa: E731
    value, grad = jax.value_and_grad(weigh)(jnp.zeros((1, K), jnp.float32))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_gate_normalises_its_input():
    gate = Gate(input_norm_eps=1e-6, multiplier=0.25)
    params = gate.init(jax.random.key(0), d_model=D, num_experts=E)
    assert params["input_scale"].shape == (D,)
    params = {**params, "input_scale": jnp.arange(1.0, D + 1)}
    x = np.asarray(X, np.float64)
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * np.arange(1.0, D + 1)
    want = 0.25 * normed @ np.asarray(params["kernel"], np.float64)
    np.testing.assert_allclose(gate(params, X), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gate(params, 7.0 * X), want, rtol=1e-4, atol=1e-5)


def test_expert_scale_multiplies_final_weights():
    plain = TopK(num_experts=E, k=K, scoring=Scoring(norm="sum"))
    scaled = dataclasses.replace(plain, use_expert_scale=True)
    params = scaled.init(jax.random.key(0), D)
    params["expert_scale"] = jnp.arange(1.0, E + 1)
    a = jax.jit(plain)(params, plain.init_state(), X)
    b = jax.jit(scaled)(params, scaled.init_state(), X)
    np.testing.assert_array_equal(a.expert_indices, b.expert_indices)
    want = np.asarray(a.combine_weights) * (np.asarray(a.expert_indices) + np.float32(1))
    np.testing.assert_allclose(b.combine_weights, want, rtol=1e-6)
    assert router_from_json(scaled.to_json()) == scaled


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Scoring(norm="p", norm_p=0.0), "norm_p"),
        (lambda: Gate(input_norm_eps=-1.0), "input_norm_eps"),
    ],
)
def test_refused_by_name(make, name):
    with pytest.raises(ValueError, match=name):
        make()
