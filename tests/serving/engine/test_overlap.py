"""Values are checked while the device works, and nobody can tell: docs/promises.md X01, S01."""

from __future__ import annotations

import numpy as np
import pytest

from moe_jax.serving.engine import inference
from moe_jax.serving.errors import ServingError


@pytest.fixture
def watched(make_engine, monkeypatch):
    """``watched(**settings)``: an engine and the list of what happens: run, check, ran."""
    real = inference.check_values

    def make(**settings):
        engine = make_engine(**{"enable_caching": False, **settings})
        run, events, routed = engine.device.run, [], []

        def watching(snapshot, model, values, logits, meanwhile):
            events.append("run")
            routed.append(values)
            actual = run(snapshot, model, values, logits, meanwhile)
            events.append("ran")
            return actual

        def checking(*args):
            events.append("check")
            return real(*args)

        engine.device.run = watching
        monkeypatch.setattr(inference, "check_values", checking)
        return engine, events, routed

    return make


def test_sound_values_are_routed_once_and_checked_meanwhile(watched, states):
    engine, events, _ = watched()
    engine.route(states())
    assert events == ["run", "check", "ran"]


@pytest.mark.parametrize("settings", [{"security_level": "strict"}, {"nonfinite": "reject"}])
def test_values_that_may_be_refused_are_checked_before_the_device_works(watched, states, settings):
    engine, events, _ = watched(**settings)
    engine.route(states())
    assert events == ["check", "run", "ran"]
    events.clear()
    x = states()
    x[0, 0, 0] = np.nan
    with pytest.raises(ServingError, match="finite"):
        engine.route(x)
    assert events == ["check"]


@pytest.mark.parametrize("serve_moe", ["off", "auto"])
@pytest.mark.parametrize("nonfinite", ["mask", "sanitize"])
def test_what_the_check_puts_in_place_is_what_is_answered(watched, states, nonfinite, serve_moe):
    engine, events, routed = watched(nonfinite=nonfinite, serve_moe=serve_moe)
    model = "router" if serve_moe == "off" else "moe"
    x, clean = states(), states()
    x[0, 1] = np.nan
    clean[0, 1] = 0.0
    mask = None
    if nonfinite == "mask":
        mask = np.ones(x.shape[:2], bool)
        mask[0, 1] = False
    actual = engine.infer(model, x)
    assert events == ["run", "check", "ran", "run", "ran"]
    assert np.isnan(routed[0][0][1]).all()
    assert np.isfinite(routed[1][0]).all()
    assert actual.info["sanitized"]
    assert actual.info["nonfinite_tokens"] == 1
    wanted = engine.infer(model, clean, token_mask=mask)
    for name, array in wanted.arrays.items():
        assert (actual.arrays[name] == array).all(), name
    assert engine.breaker.state == "closed"


def test_a_fault_of_the_check_is_not_the_devices(watched, states, monkeypatch):
    engine, _, _ = watched()
    monkeypatch.setattr(inference, "check_values", lambda *args: 1 / 0)
    codes = []
    for _ in range(30):
        with pytest.raises(ServingError) as caught:
            engine.route(states())
        codes.append(caught.value.code)
    assert codes == ["internal"] * 30, "and never circuit_open"
    assert engine.breaker.state == "closed"
    assert engine.device.failing_seconds == 0.0
