"""A trained block made dynamic meets its budget, stays below the trained k, and reports its effect."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.interop import moe_block_from_hf
from moe_jax.interop.retrofit import DriftMonitor, make_dynamic, make_model_dynamic

D, F, E = 16, 24, 8


def _block(seed=0, k=4, model_type="olmoe", scale=1.0, **config):
    rng = np.random.default_rng(seed)
    shapes = {
        "gate.weight": (E, D),
        "experts.gate_up_proj": (E, 2 * F, D),
        "experts.down_proj": (E, D, F),
    }
    tensors = {n: rng.normal(size=s).astype(np.float32) * scale for n, s in shapes.items()}
    names = {"olmoe": "num_experts", "mixtral": "num_local_experts"}
    settings = {"model_type": model_type, names[model_type]: E, "num_experts_per_tok": k}
    return moe_block_from_hf(settings | config, tensors)


def _x(seed=1, tokens=2000):
    # Scales differ from token to token, as hidden states do, so that difficulty does too.
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(tokens, D)) * rng.uniform(0.2, 2, (tokens, 1))).astype(np.float32)


# Each rule once, each kind of weights (raw, renormalised) twice: a budget counts experts, not weights.
@pytest.mark.parametrize(
    ("rule", "model_type"),
    [("TopP", "olmoe"), ("MinP", "mixtral"), ("DynamicK", "olmoe"), ("ExpertThreshold", "mixtral")],
)
def test_the_budget_is_met_and_reported(rule, model_type):
    twin, report = make_dynamic(_block(model_type=model_type), _x(), target_saving=0.35, rule=rule)
    assert report.calibration_mean_k == pytest.approx(2.6, rel=0.01)
    assert report.held_out_mean_k == pytest.approx(2.6, rel=0.05)
    assert report.saving == pytest.approx(0.35, abs=0.04)
    assert sum(report.histogram) == pytest.approx(1.0)
    assert report.histogram[0] == 0
    assert twin.state.fit.describe()["token_count"] == 1600
    assert "calls saved" in report.summary()


def test_looking_beats_not_looking():
    """Top-p on a block that does not renormalise drops small weights: less change than controls."""
    _, report = make_dynamic(_block(), _x(), target_saving=0.25)
    assert report.output_change < report.lowest_control_change < report.random_control_change


def test_the_twin_keeps_parameters_and_differentiates():
    block = _block()
    twin, _ = make_dynamic(block, _x(), target_saving=0.25)
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(twin.params), jax.tree.leaves(block.params), strict=True)
    )
    grads = jax.jit(jax.grad(lambda p: (twin.apply(p, _x(tokens=20)) ** 2).sum()))(twin.params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_held_out_tokens_may_be_given():
    # 1600 and 400 tokens, as elsewhere after the split of 2000: the same compiled functions.
    x, held_out = _x(tokens=1600), _x(seed=2, tokens=400)
    _, report = make_dynamic(_block(), x, target_mean_k=2.5, held_out_x=held_out)
    assert report.held_out_mean_k == pytest.approx(2.5, rel=0.1)


def test_never_above_the_trained_k_unless_elastic():
    block = _block(k=2)
    with pytest.raises(ValueError, match="elastic"):
        make_dynamic(block, _x(), target_saving=0.2, max_k=4)
    twin, _ = make_dynamic(block, _x(), target_saving=0.2, max_k=4, elastic=True)
    assert twin.router.max_k == 4
    assert make_dynamic(block, _x(), target_saving=0.2)[0].router.max_k == 2


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({}, "one of target_mean_k and target_saving"),
        ({"target_mean_k": 2.0, "target_saving": 0.1}, "one of target_mean_k"),
        ({"target_mean_k": 4.0}, "strictly between 1 and the trained k=4"),
        ({"target_saving": 0.9}, r"target_saving: expected above 0 and below 0\.75 .*got 0\.9"),
        ({"target_saving": 1.5}, "target_saving: expected above 0.*got 1.5"),
        ({"target_saving": -0.2}, "target_saving: expected above 0.*got -0.2"),
        ({"target_saving": 0.2, "rule": "TopQ"}, "rule"),
    ],
)
def test_bad_requests_say_what_to_do(kwargs, said):
    with pytest.raises(ValueError, match=said):
        make_dynamic(_block(), _x(tokens=100), **kwargs)


def test_a_dynamic_block_is_not_made_dynamic_again():
    twin, _ = make_dynamic(_block(), _x(), target_saving=0.2)
    with pytest.raises(ValueError, match="fixed k"):
        make_dynamic(twin, _x(), target_saving=0.2)


def test_a_model_spends_its_budget_where_it_matters():
    """One block's router hardly separates its experts, so dropping costs it much; it keeps more."""
    flat = _block(seed=3)
    flat = dataclasses.replace(
        flat,
        params={**flat.params, "router": jax.tree.map(lambda p: 0.02 * p, flat.params["router"])},
    )
    blocks = {"sharp": _block(seed=4), "flat": flat}
    inputs = {name: _x() for name in blocks}
    made, reports = make_model_dynamic(blocks, inputs, target_mean_k=3.0, steps=6)
    ks = {n: reports[n].calibration_mean_k if n in reports else 4.0 for n in made}
    assert np.mean(list(ks.values())) == pytest.approx(3.0, rel=0.01)
    assert ks["flat"] > ks["sharp"]
    assert reports.calibration_mean_k == pytest.approx(np.mean(list(ks.values())))
    assert reports.saving == pytest.approx(0.25, abs=0.03)
    assert "over 2 blocks" in reports.summary()


@pytest.mark.parametrize("saving", [0.02, 0.2, 0.73])
def test_the_budget_of_a_model_is_met_between_the_steps(saving):
    """Steps are whole and budgets are not: the savings are scaled to what was asked for."""
    blocks = {"a": _block(), "b": _block(seed=2)}
    _, report = make_model_dynamic(
        blocks, dict.fromkeys(blocks, _x()), target_saving=saving, steps=3
    )
    assert report.target_mean_k == pytest.approx(4 * (1 - saving))
    assert report.calibration_mean_k == pytest.approx(report.target_mean_k, rel=0.01)


def test_drift_steps_back_to_the_static_block_and_can_be_reset():
    static = _block()
    dynamic, _ = make_dynamic(static, _x(), target_saving=0.3)
    monitor = DriftMonitor(static=static, dynamic=dynamic, band=0.1, decay=0.5)
    mean = float(dynamic.route(_x(seed=5)).num_experts_per_token.mean())
    assert monitor.observe(mean)
    assert monitor.block is dynamic
    # Inputs at half the scale spread the router's probabilities: top-p then asks for more.
    drifted = float(dynamic.route(0.25 * _x(seed=5)).num_experts_per_token.mean())
    assert drifted > 1.1 * mean
    for _ in range(5):
        monitor.observe(drifted)
    assert monitor.block is static
    assert not monitor.observe(mean)
    monitor.reset()
    assert monitor.block is dynamic
    assert not monitor.observe(float("nan"))
    with pytest.raises(ValueError, match="band"):
        DriftMonitor(static=static, dynamic=dynamic, band=0.0)


def test_a_factor_on_each_experts_weight_is_kept():
    """Gemma 4: tokens that still use every expert they were trained with get the trained output."""
    rng = np.random.default_rng(3)
    shapes = {
        "router.proj.weight": (E, D),
        "router.scale": (D,),
        "router.per_expert_scale": (E,),
        "experts.gate_up_proj": (E, 2 * F, D),
        "experts.down_proj": (E, D, F),
    }
    tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    config = {"model_type": "gemma4", "hidden_size": D, "num_experts": E, "top_k_experts": 3}
    block = moe_block_from_hf(config, tensors)
    x = _x()
    twin, _ = make_dynamic(block, x, target_mean_k=2.4)
    full = np.asarray(twin.route(x).num_experts_per_token) == 3
    assert 0.2 < full.mean() < 1
    np.testing.assert_allclose(twin(x)[full], block(x)[full], rtol=1e-4, atol=1e-4)


def test_inputs_that_make_no_sense_are_refused():
    x = _x(tokens=50)
    bad = x.copy()
    bad[-1, 0] = np.nan
    with pytest.raises(ValueError, match="held_out_x: expected finite"):
        make_dynamic(_block(), bad, target_saving=0.2)
    with pytest.raises(ValueError, match="steps: expected at least 2, got 1"):
        make_model_dynamic({"a": _block()}, {"a": x}, target_saving=0.2, steps=1)
    with pytest.raises(ValueError, match=r"target_mean_k: expected above 0.*make_dynamic"):
        DriftMonitor(static=None, dynamic=None, target_mean_k=0.0)
