"""patch_model_with_dynamic_routing really patches: the model's own layers, in place, fitted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax.nn.nnx import DynamicMoE, MoE
from moe_jax.nn.patching import fit_model, patch_model_with_dynamic_routing

FFN = moe_jax.FeedForward()


class Model(nnx.Module):
    def __init__(self, rngs, second=MoE):
        router = moe_jax.TopK(num_experts=8, k=4, balance_rate=0.1)
        common = {"d_model": 8, "d_ff": 16, "expert_fn": FFN, "rngs": rngs}
        self.first = MoE(router, **common)
        if second is MoE:
            self.second = MoE(router, **common)
        else:
            self.second = DynamicMoE(8, **common)

    def __call__(self, x):
        return self.second(x + self.first(x))


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (40, 50, 8))


def test_every_layer_reaches_its_budget_on_its_own_inputs(x):
    model = Model(nnx.Rngs(0))
    kernel = np.asarray(model.first.params()["experts"]["up"])
    report = patch_model_with_dynamic_routing(model, calibration=x, target_mean_k=2.2)
    assert list(report) == ["first", "second"]
    for layer in report.values():
        assert (layer["trained_k"], layer["min_k"], layer["max_k"]) == (4, 1, 4)
        assert layer["fit"]["achieved_mean_k"] == pytest.approx(2.2, rel=0.01)
    assert report["first"]["fit"]["data_fingerprint"] != report["second"]["fit"]["data_fingerprint"]
    _, aux = model.first(x, return_aux=True)
    assert float(aux.stats.mean_experts_per_token) == pytest.approx(2.2, rel=0.01)
    np.testing.assert_array_equal(model.first.params()["experts"]["up"], kernel)


def test_a_share_of_the_experts_is_the_decimal_that_was_written():
    """In binary, 0.07 * 100 is more than 7 and 0.29 * 100 less than 29."""
    rule = moe_jax.TopK(num_experts=100, k=100)
    layer = MoE(rule, d_model=1, d_ff=1, expert_fn=FFN, rngs=nnx.Rngs(0))
    for percent in (1, 7, 10, 14, 28, 29, 30, 55, 56, 57, 58, 70, 100):
        share = percent / 100
        fewest = patch_model_with_dynamic_routing(nnx.clone(layer), share, 1.0)["model"]["min_k"]
        most = patch_model_with_dynamic_routing(nnx.clone(layer), 0.01, share)["model"]["max_k"]
        assert (fewest, most) == (percent, percent), share


def test_the_output_of_the_model_changes_and_jit_sees_it(x):
    model = Model(nnx.Rngs(0))
    call = nnx.jit(lambda m, x: m(x))
    before = call(model, x)
    patch_model_with_dynamic_routing(model, calibration=x, target_mean_k=2.0)
    after = call(model, x)
    assert float(jnp.abs(after - before).max()) > 1e-3
    np.testing.assert_allclose(after, model(x), rtol=1e-4, atol=1e-4)


def test_the_selection_bias_is_carried_over(x):
    model = Model(nnx.Rngs(0))
    _, aux = model.first(x, return_aux=True)
    model.first.update_router(aux)
    bias = np.asarray(model.first.router_state.get_value().expert_bias)
    assert np.abs(bias).max() > 0
    patch_model_with_dynamic_routing(model)
    np.testing.assert_array_equal(model.first.router_state.get_value().expert_bias, bias)


def test_never_above_the_trained_k_unless_elastic():
    model = Model(nnx.Rngs(0))
    assert patch_model_with_dynamic_routing(model, 0.25, 1.0)["first"]["max_k"] == 4
    model = Model(nnx.Rngs(0))
    report = patch_model_with_dynamic_routing(model, 0.25, 1.0, elastic=True)
    assert (report["first"]["min_k"], report["first"]["max_k"]) == (2, 8)


def test_a_model_that_cannot_be_patched_is_left_alone(x):
    model = Model(nnx.Rngs(0), second=DynamicMoE)
    with pytest.raises(ValueError, match=r"second: expected .* got DynamicK"):
        patch_model_with_dynamic_routing(model, calibration=x)
    assert isinstance(model.first.spec.router, moe_jax.TopK)
    with pytest.raises(ValueError, match="0 < min <= max <= 1"):
        patch_model_with_dynamic_routing(Model(nnx.Rngs(0)), 0.6, 0.5)
    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match="strictly between"):
        patch_model_with_dynamic_routing(model, calibration=x, target_mean_k=7.0)
    assert isinstance(model.first.spec.router, moe_jax.TopK)


class Born(nnx.Module):
    """Two dynamic layers and one of fixed k, called in another order than they are made."""

    def __init__(self, rngs):
        common = {"d_model": 8, "d_ff": 16, "expert_fn": FFN, "rngs": rngs}
        self.last = MoE(moe_jax.TopP(num_experts=8, max_k=4), **common)
        self.fixed = MoE(moe_jax.TopK(num_experts=8, k=2), **common)
        self.first = DynamicMoE(8, max_k=4, **common)

    def __call__(self, x):
        h = x + self.first(x)
        return self.last(h + self.fixed(h))


def test_a_model_born_dynamic_is_fitted_layer_by_layer(x):
    model = Born(nnx.Rngs(0))
    report = fit_model(model, x, target_mean_k=1.8)
    assert list(report) == ["first", "last"]
    h = x
    for name in ("first", "fixed", "last"):
        y, aux = getattr(model, name)(h, return_aux=True)
        if name in report:  # on what reaches it once the layers before it are fitted
            assert float(aux.stats.mean_experts_per_token) == pytest.approx(1.8, rel=0.01)
        h = h + y


def test_a_model_that_cannot_be_fitted_is_left_alone(x):
    model = Born(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"first: .*strictly between"):
        fit_model(model, x, target_mean_k=7.0)
    with pytest.raises(ValueError, match="last: expected to be run on the calibration data"):
        fit_model(model, x, target_mean_k=1.8, call=lambda m, x: m.fixed(m.first(x)))
    bad = x.at[0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="first: x: expected finite calibration data"):
        fit_model(model, bad, target_mean_k=1.8)
    for layer in (model.first, model.last):
        assert not layer.router_state.get_value().fit.describe()["fitted"]
    with pytest.raises(ValueError, match=r"got model \(TopK\) alone"):
        fit_model(
            MoE(moe_jax.TopK(num_experts=8, k=2), d_model=8, d_ff=16, rngs=nnx.Rngs(0)),
            x,
            target_mean_k=1.8,
        )
    with pytest.raises(ValueError, match="without any"):
        fit_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), x, target_mean_k=1.8)
    with pytest.raises(ValueError, match=r"calibration: expected data to fit target_mean_k=2"):
        patch_model_with_dynamic_routing(Model(nnx.Rngs(0)), target_mean_k=2.0)
