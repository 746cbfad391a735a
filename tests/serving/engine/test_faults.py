"""Fault drills on the real engine: docs/promises.md X01-X05. Faults are injected into device work."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time

import jax
import numpy as np
import pytest

from moe_jax.serving.engine import Client
from moe_jax.serving.engine.report import WATCHDOG_SECONDS
from moe_jax.serving.errors import ServingError
from tests.serving.engine.deadlines import passing_at_work


def outcome(call) -> str:
    try:
        call()
    except ServingError as error:
        return error.code
    return "ok"


@pytest.fixture
def drill(make_engine):
    """``drill(fault, **settings)``: an engine whose device work is ``fault(run, *order)``."""

    def make(fault, *, engine=None, **settings):
        made = make_engine(engine=engine, **{"enable_caching": False, **settings})
        run = made.device.run
        made.device.run = lambda *order: fault(run, *order)
        made.mend = lambda: setattr(made.device, "run", run)
        return made

    return make


def broken(run, *order):
    raise jax.errors.JaxRuntimeError("INTERNAL: injected")


def out_of_memory(run, *order):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")


def held(release, begins=lambda: None):
    """A device that is at work until it is released."""

    def fault(run, *order):
        begins()
        assert release.wait(60.0)
        return run(*order)

    return fault


def not_finite(run, *order):
    actual = run(*order)
    return {**actual, "expert_weights": actual["expert_weights"] * np.float32(np.nan)}


@pytest.mark.parametrize("fault", [broken, out_of_memory, not_finite])
def test_a_failing_device_opens_the_circuit_and_recovers_by_itself(drill, states, clock, fault):
    engine = drill(fault)
    x = states()
    assert [outcome(lambda: engine.route(x)) for _ in range(20)] == ["device_error"] * 20
    assert outcome(lambda: engine.route(x)) == "circuit_open"
    assert engine.readiness() == (False, ["circuit_open"])
    assert engine.health_check()["status"] == "degraded"
    clock.now += 10
    assert outcome(lambda: engine.route(x)) == "device_error", "the probe fails too"
    clock.now += 10
    assert outcome(lambda: engine.route(x)) == "circuit_open", "and the wait has doubled"
    engine.mend()
    clock.now += 10
    assert outcome(lambda: engine.route(x)) == "ok"
    assert engine.breaker.state == "closed"
    assert engine.readiness() == (True, [])
    clock.now += 400
    assert engine.health_check()["status"] == "healthy"
    errors = engine.get_metrics()["errors_by_code"]
    assert errors == {"device_error": 21, "circuit_open": 2}


def test_one_bout_of_memory_is_survived_without_the_caller_noticing(drill, states, log):  # X02
    state = {"faults": 1}

    def fault(run, *order):
        if state["faults"]:
            state["faults"] -= 1
            return out_of_memory(run, *order)
        return run(*order)

    engine = drill(fault)
    result = engine.route(states())
    assert not result["production_info"]["fallback_used"]
    assert "retry" in log.events()


def no_host_memory(run, *order):
    raise MemoryError


def test_a_host_out_of_memory_is_a_503_and_no_fault_of_the_device(drill, states, log):
    tried = []

    def fault(run, *order):
        tried.append(1)
        return no_host_memory(run, *order)

    engine = drill(fault, engine={"host_fallback": True}, enable_caching=True)
    for _ in range(30):
        with pytest.raises(ServingError) as caught:
            engine.route(states())
        assert (caught.value.code, caught.value.status) == ("out_of_memory", 503)
        assert caught.value.retry_after
    assert len(tried) == 60, "tried once more, as whatever passes by itself"
    assert engine.breaker.state == "closed"
    assert engine.live()
    assert engine.get_metrics()["errors_by_code"] == {"out_of_memory": 30}
    engine.mend()
    assert outcome(lambda: engine.route(states())) == "ok"


@pytest.mark.parametrize(
    "step", ["inference.check_values", "results.Results.digest", "device.read_only"]
)
def test_memory_that_runs_out_around_the_device_is_a_503_too(
    make_engine, states, monkeypatch, step
):
    engine = make_engine()
    monkeypatch.setattr(f"moe_jax.serving.engine.{step}", lambda *args, **kw: no_host_memory(None))
    assert outcome(lambda: engine.route(states())) == "out_of_memory"
    assert engine.breaker.state == "closed"


def test_a_fault_that_is_not_transient_is_not_tried_again(drill, states):
    tried = []

    def fault(run, *order):
        tried.append(1)
        return broken(run, *order)

    engine = drill(fault)
    assert outcome(lambda: engine.route(states())) == "device_error"
    assert tried == [1]


def test_malformed_requests_leave_the_circuit_closed(make_engine, states):  # X01
    engine = make_engine()
    bad = [states()[0], states()[..., :3], states().astype(np.float64), None, "x"]
    codes = [outcome(lambda b=b: engine.route(b)) for b in bad * 200]
    assert codes == ["malformed"] * 1000
    x = states()
    x[0, 0, 0] = np.nan
    strict = make_engine(security_level="strict")
    assert [outcome(lambda: strict.route(x)) for _ in range(100)] == ["invalid_values"] * 100
    for one in (engine, strict):
        assert one.breaker.state == "closed"
        assert one.health_check()["status"] == "healthy"
        assert outcome(lambda one=one: one.route(states())) == "ok"


def test_nan_in_is_no_fault_of_the_device(make_engine, states):
    engine = make_engine(security_level="minimal", enable_caching=False)
    x = states()
    x[0, 0] = np.nan
    for _ in range(25):
        result = engine.route(x)
    assert result["production_info"]["nonfinite_tokens"] == 1
    assert not result["production_info"]["sanitized"]
    assert engine.breaker.state == "closed"


@pytest.mark.parametrize("settings", [{"security_level": "minimal"}, {"enable_validation": False}])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_no_value_that_a_client_can_send_opens_the_circuit(make_engine, states, settings, value):
    engine = make_engine(enable_caching=False, **settings)
    x = states()
    x[0] = value
    x[1, 0, ::2] = -value
    assert [outcome(lambda: engine.route(x)) for _ in range(25)] == ["ok"] * 25
    assert engine.breaker.state == "closed"


def test_a_slow_device_meets_the_deadline_and_keeps_its_place(drill, states):  # X04, X05
    release = threading.Event()
    with passing_at_work() as begins:
        engine = drill(held(release, begins), max_inflight=1, max_queue=1)
        assert outcome(lambda: engine.route(states(), timeout_seconds=60.0)) == "deadline_exceeded"
    assert engine.bulkhead.inflight == 1, "the device is still at work"
    assert outcome(lambda: engine.route(states(), timeout_seconds=0.05)) == "deadline_exceeded"
    waiting = threading.Thread(target=lambda: outcome(lambda: engine.route(states())))
    waiting.start()
    while not engine.bulkhead.pending:
        time.sleep(0.001)
    assert outcome(lambda: engine.route(states())) == "queue_full"
    assert engine.readiness() == (False, ["overloaded"])
    release.set()
    waiting.join()
    assert outcome(lambda: engine.route(states())) == "ok"
    assert engine.readiness() == (True, [])


def test_deadlines_that_pass_on_the_device_open_the_circuit(drill, states, clock):
    release = threading.Event()
    with passing_at_work() as begins:
        engine = drill(held(release, begins), max_inflight=32)
        codes = [outcome(lambda: engine.route(states(), timeout_seconds=60.0)) for _ in range(21)]
    assert codes == ["deadline_exceeded"] * 20 + ["circuit_open"]
    release.set()
    while engine.bulkhead.inflight:
        time.sleep(0.001)
    assert engine.breaker.state == "open", "what ends late says nothing"
    clock.now += 10
    assert outcome(lambda: engine.route(states())) == "ok"


def test_a_timeout_cannot_be_raised_above_the_configured_one(drill, states):
    release = threading.Event()
    engine = drill(held(release), request_timeout_seconds=0.05)
    assert outcome(lambda: engine.route(states(), timeout_seconds=60.0)) == "deadline_exceeded"
    assert outcome(lambda: engine.route(states(), timeout_seconds=0.0)) == "deadline_exceeded"
    release.set()


def test_slow_calls_open_the_circuit(drill, states):
    def fault(run, *order):
        time.sleep(0.004)
        return run(*order)

    engine = drill(fault, slow_call_seconds=0.002)
    codes = [outcome(lambda: engine.route(states())) for _ in range(21)]
    assert codes == ["ok"] * 20 + ["circuit_open"]


def test_a_stuck_device_is_no_longer_live(drill, states):
    release = threading.Event()
    with passing_at_work() as begins:
        engine = drill(held(release, begins))
        assert engine.live()
        call = functools.partial(engine.route, states(), timeout_seconds=60.0)
        assert outcome(call) == "deadline_exceeded"
    assert engine.live(), "slow is not stuck"
    [job] = engine.bulkhead._running
    job.started -= WATCHDOG_SECONDS
    assert not engine.live()
    assert engine.health_check()["status"] == "unhealthy"
    release.set()
    while engine.bulkhead.inflight:
        time.sleep(0.001)
    assert engine.live()


def test_a_fault_of_ours_is_a_500_that_tells_nothing(make_engine, states, log, monkeypatch):
    engine = make_engine()
    monkeypatch.setattr("moe_jax.serving.engine.inference.check_values", lambda *a: 1 / 0)
    with pytest.raises(ServingError) as caught:
        engine.route(states(), request_id="r-1")
    assert (caught.value.code, caught.value.status) == ("internal", 500)
    assert "r-1" in caught.value.message
    assert "division" not in caught.value.message
    assert "internal_error" in log.events()


# --- the ladder of fallbacks, X03 -----------------------------------------------------------


def test_first_fallback_a_cached_answer_of_the_same_version(drill, states):
    engine = drill(lambda run, *order: run(*order), enable_caching=True)
    x = states()
    first = engine.route(x)
    engine.device.run = lambda *order: broken(None)
    info = engine.route(x, use_cache=False)["production_info"]
    assert (info["fallback_used"], info["fallback"], info["cached"]) == (True, "cache", True)
    assert not info["degraded"]
    assert outcome(lambda: engine.route(states(seed=9), use_cache=False)) == "device_error"
    # an answer of other weights is none
    engine.served.current = dataclasses.replace(engine.snapshot, version="0" * 16)
    assert outcome(lambda: engine.route(x, use_cache=False)) == "device_error"
    assert first["production_info"]["fallback_used"] is False


def test_second_fallback_the_same_function_on_the_host(drill, states):
    engine = drill(broken, engine={"host_fallback": True})
    healthy = drill(lambda run, *order: run(*order))
    x = states()
    a, b = engine.route(x), healthy.route(x)
    assert (a["expert_indices"] == b["expert_indices"]).all()
    assert (a["expert_weights"] == b["expert_weights"]).all()
    info = a["production_info"]
    assert (info["fallback"], info["degraded"]) == ("host", False)
    for _ in range(30):
        engine.route(x)
    assert engine.breaker.state == "open", "the fallback does not hide the device from the breaker"
    assert engine.route(x)["production_info"]["fallback"] == "host"
    assert 'moe_fallback_total{kind="host"} 32.0' in engine.metrics_text().decode()


def test_last_fallback_a_plain_top_k_if_asked_for(drill, states):
    engine = drill(broken, fallback_static_top_k=True, enable_caching=True)
    x = states()
    mask = np.ones((2, 5), bool)
    mask[0, 0] = False
    for _ in range(2):
        result = engine.route(x, token_mask=mask)
        info = result["production_info"]
        assert (info["fallback"], info["degraded"], info["cached"]) == ("static_top_k", True, False)
        k = result["num_experts_per_token"]
        assert (k[mask] == 2).all()  # the middle of 1 and 4, rounded to even
        assert k[0, 0] == 0
        c = result["complexity_scores"]
        assert (k[mask] == np.clip(np.round(1 + 3 * c[mask]), 1, 4)).all()
        np.testing.assert_allclose(result["expert_weights"][mask].sum(axis=-1), 1, rtol=1e-6)
        logits = engine.route(x, True)["router_logits"].reshape(-1, 8)
        best = result["expert_indices"].reshape(-1, 4)[1, 0]
        assert best == logits[1].argmax()
    assert len(engine.cache) == 0, "what is degraded is never kept"
    plain = drill(broken)
    assert outcome(lambda: plain.route(x)) == "device_error", "off unless asked for"


# --- clients --------------------------------------------------------------------------------


def test_identical_good_requests_are_never_blocked(make_engine, states):  # L02, S06
    engine = make_engine()
    client, x = Client("key-1"), states()
    for _ in range(200):
        engine.route(x, client=client)
    assert engine.access.blocks.blocked == 0


def test_a_client_that_keeps_doing_wrong_is_blocked_for_a_while(make_engine, states, clock, log):
    engine = make_engine()
    bad, good = Client("bad"), Client("good")
    codes = [outcome(lambda: engine.route(states()[0], client=bad)) for _ in range(12)]
    assert codes == ["malformed"] * 10 + ["blocked"] * 2
    assert outcome(lambda: engine.route(states(), client=good)) == "ok"
    assert outcome(lambda: engine.route(states(), client=bad)) == "blocked"
    assert engine.get_metrics()["blocked_clients"] == 1
    assert "client_blocked" in log.events()
    clock.now += 61
    assert outcome(lambda: engine.route(states(), client=bad)) == "ok"
    # calls in process are the operator's own
    codes = [outcome(lambda: engine.route(states()[0])) for _ in range(50)]
    assert codes == ["malformed"] * 50
    assert outcome(lambda: engine.route(states())) == "ok"
