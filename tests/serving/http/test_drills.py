"""Fault drills as a client and an operator see them: over HTTP, with statuses, Retry-After, /ready,
/health and /metrics, and recovery by itself. docs/promises.md X01-X05, L03, M09-M14, H06, A01-A06.

Faults are put where device work happens; what they do inside is ``engine/test_faults.py``'s.
"""

import contextlib
import itertools
import json
import socket
import threading
import time

import jax
import numpy as np
import pytest

from moe_jax.config import load_config
from moe_jax.serving.engine import RouterEngine
from moe_jax.serving.engine.report import WATCHDOG_SECONDS
from tests.serving.engine.conftest import Clock, Log
from tests.serving.engine.deadlines import passing_at_work
from tests.serving.engine.test_reload import write
from tests.serving.redis_server import RedisServer, needs_redis, patient
from tests.serving.served import SMALL, WIDTH, served, tensor

INFER = "/v2/models/router/infer"
PATIENCE = 60.0  # seconds after which a step counts as hung


@pytest.fixture
def serve():
    """``serve(**settings)``: a service with a clock to turn and a log to read."""
    with contextlib.ExitStack() as stack:

        def start(*, host_fallback=False, **settings):
            clock, log = Clock(), Log()
            config = load_config(env={}, **{**SMALL, "enable_caching": False, **settings})
            engine = RouterEngine(config, clock=clock, logger=log, host_fallback=host_fallback)
            started = stack.enter_context(served(engine))
            started.clock, started.log = clock, log
            started.run = engine.device.run
            return started

        yield start


def spoil(service, fault):
    """Device work becomes ``fault(run, *order)``; None mends it."""
    run = service.run
    service.engine.device.run = run if fault is None else lambda *order: fault(run, *order)


def broken(run, *order):
    raise jax.errors.JaxRuntimeError("INTERNAL: injected")


def out_of_memory(run, *order):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")


def not_finite(run, *order):
    actual = run(*order)
    return {**actual, "expert_weights": actual["expert_weights"] * np.float32(np.nan)}


def states(seed=0, batch=1, sequence=2):
    return np.random.default_rng(seed).standard_normal((batch, sequence, WIDTH), dtype=np.float32)


def body(x, **parameters):
    return json.dumps({"inputs": [tensor(x)], "parameters": parameters}).encode()


def ask(service, x=None, *, client=None, **parameters):
    """Status, the word of the refusal or "ok", Retry-After, and the answer."""
    headers = {} if client is None else {"X-Forwarded-For": client}
    data = body(states() if x is None else x, **parameters)
    status, reply, answer = service.request("POST", INFER, data, headers)
    answer = json.loads(answer)
    return status, answer.get("code", "ok"), reply.get("retry-after"), answer


def outcome(*args, **options):
    return ask(*args, **options)[:3]


OK = (200, "ok", None)


def ready(service):
    status, answer = service.json("GET", "/ready")
    assert (status == 200) == answer["ready"]
    assert service.request("GET", "/v2/health/ready")[0] == status
    return status, answer["reasons"]


def health(service):
    status, answer = service.json("GET", "/health")
    assert status == 200
    return answer


def sample(service, name):
    """A sample of /metrics by its whole name."""
    lines = service.request("GET", "/metrics")[2].decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.rpartition(" ")[0] == name))


def alerts(service):
    return {alert["alert"] for alert in health(service)["alerts"]}


def until(true):
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# --- the device ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [broken, out_of_memory, not_finite])
def test_a_failing_device_is_503_until_a_probe_finds_it_well(serve, fault):
    service = serve()
    spoil(service, fault)
    assert [outcome(service) for _ in range(20)] == [(503, "device_error", "1")] * 20
    assert outcome(service) == (503, "circuit_open", "10")
    service.clock.now += 4
    assert outcome(service) == (503, "circuit_open", "6")
    assert ready(service) == (503, ["circuit_open"])
    assert service.request("GET", "/ready")[1]["retry-after"] == "1"
    assert service.request("GET", "/v2/health/live")[0] == 200, "a restart would not help"
    health_report = health(service)
    assert health_report["status"] == "degraded"
    assert health_report["components"]["circuit_breaker"]["state"] == "open"
    assert sample(service, 'moe_circuit_state{state="open"}') == 1
    assert sample(service, 'moe_errors_total{code="device_error"}') == 20
    assert sample(service, 'moe_requests_total{outcome="unavailable"}') == 22
    service.clock.now += 6
    assert outcome(service)[1] == "device_error", "the probe finds it as it was"
    assert outcome(service) == (503, "circuit_open", "20"), "and the wait has doubled"
    spoil(service, None)
    service.clock.now += 20
    assert outcome(service) == OK
    assert ready(service) == (200, [])
    assert sample(service, 'moe_circuit_state{state="closed"}') == 1
    service.clock.now += 400
    assert health(service)["status"] == "healthy"


def test_one_bout_of_memory_is_not_the_clients_affair(serve):
    service, left = serve(), [1]

    def once(run, *order):
        return out_of_memory(run) if left and left.pop() else run(*order)

    spoil(service, once)
    status, _, _, answer = ask(service)
    assert status == 200
    assert answer["parameters"]["fallback_used"] is False
    assert "retry" in service.log.events()


def test_fallbacks_are_flagged_in_the_answer_and_in_metrics(serve):
    for kind, options in (
        ("host", {"host_fallback": True}),
        ("static_top_k", {"fallback_static_top_k": True}),
    ):
        service = serve(**options)
        spoil(service, broken)
        status, _, _, answer = ask(service)
        assert status == 200
        parameters = answer["parameters"]
        assert (parameters["fallback_used"], parameters["fallback"]) == (True, kind)
        assert parameters["degraded"] == (kind == "static_top_k")
        assert sample(service, f'moe_fallback_total{{kind="{kind}"}}') == 1


def test_a_slow_device_is_504_and_keeps_its_place_until_it_is_done(serve):
    service = serve(max_inflight=1, max_queue=1)
    release = threading.Event()
    with passing_at_work() as begins:

        def slow(run, *order):
            begins()
            assert release.wait(PATIENCE)
            return run(*order)

        spoil(service, slow)
        assert outcome(service, timeout=30_000_000) == (504, "deadline_exceeded", None)
    assert sample(service, "moe_inflight_requests") == 1
    waiting: list[tuple] = []
    second = threading.Thread(target=lambda: waiting.append(outcome(service)))
    second.start()
    until(lambda: service.engine.bulkhead.pending)
    assert outcome(service) == (503, "queue_full", "1")
    assert ready(service) == (503, ["overloaded"])
    assert service.request("GET", "/v2/health/live")[0] == 200
    spoil(service, None)
    release.set()
    second.join(PATIENCE)
    assert waiting == [OK]
    assert ready(service) == (200, [])
    assert outcome(service) == OK


def test_one_thread_answers_a_request_and_is_left_at_the_services_deadline(serve):
    service = serve(request_timeout_seconds=0.3)
    release, threads = threading.Event(), []

    def device(run, *order):
        threads.append(threading.current_thread().name)
        if len(threads) > 1:
            assert release.wait(PATIENCE)
        return run(*order)

    spoil(service, device)
    assert outcome(service) == OK
    assert outcome(service) == (504, "deadline_exceeded", None)
    assert all(name.startswith("moe-infer") for name in threads), "no hand-over to a second thread"
    assert sample(service, "moe_inflight_requests") == 1, "the device is still at work"
    assert sample(service, 'moe_errors_total{code="deadline_exceeded"}') == 1, "counted at once"
    assert sample(service, 'moe_requests_total{outcome="error"}') == 1
    release.set()
    until(lambda: not service.engine.bulkhead.inflight)
    assert outcome(service) == OK
    assert sample(service, 'moe_errors_total{code="deadline_exceeded"}') == 1, "and only once"
    assert sample(service, 'moe_requests_total{outcome="ok"}') == 2, "a late answer is none"


def test_a_timeout_that_has_passed_on_arrival_is_504(serve):
    service = serve()
    assert outcome(service, timeout=1) == (504, "deadline_exceeded", None)
    assert service.engine.breaker.state == "closed"
    assert outcome(service) == OK


def test_deadlines_that_pass_at_work_open_the_circuit(serve):
    service = serve(max_inflight=32)
    release = threading.Event()
    with passing_at_work() as begins:

        def slow(run, *order):
            begins()
            assert release.wait(PATIENCE)
            return run(*order)

        spoil(service, slow)
        late = [outcome(service, timeout=30_000_000) for _ in range(20)]
        assert late == [(504, "deadline_exceeded", None)] * 20
        assert outcome(service) == (503, "circuit_open", "10")
    spoil(service, None)
    release.set()
    until(lambda: not service.engine.bulkhead.inflight)
    service.clock.now += 10
    assert outcome(service) == OK
    assert ready(service) == (200, [])


def test_a_stuck_device_fails_liveness_and_only_that_restarts(serve):
    service = serve()
    release = threading.Event()
    with passing_at_work() as begins:

        def stuck(run, *order):
            begins()
            assert release.wait(PATIENCE)
            return run(*order)

        spoil(service, stuck)
        assert outcome(service, timeout=30_000_000)[:2] == (504, "deadline_exceeded")
    assert service.request("GET", "/v2/health/live")[0] == 200, "slow is not stuck"
    [job] = service.engine.bulkhead._running
    job.started -= WATCHDOG_SECONDS
    assert service.request("GET", "/v2/health/live")[0] == 503
    status, answer = service.json("GET", "/health")
    assert (status, answer["status"]) == (503, "unhealthy")
    release.set()
    until(lambda: service.request("GET", "/v2/health/live")[0] == 200)


def test_an_engine_that_was_shut_down_sends_clients_elsewhere(serve):
    service = serve()
    assert outcome(service) == OK
    service.engine.shutdown()
    assert outcome(service) == (503, "draining", "1")
    assert ready(service) == (503, ["draining"])


# --- the five alerts ----------------------------------------------------------------------------


def test_alerts_of_load_errors_and_circuit_fire_and_clear(serve):  # A01-A06
    service = serve()
    one = states(0, 1, 1)  # one token over and over: few experts, all the load
    assert [outcome(service, one) for _ in range(30)] == [OK] * 30
    assert alerts(service) == {"poor_load_balance"}
    spoil(service, broken)
    codes = [outcome(service, one)[1] for _ in range(31)]
    assert codes == ["device_error"] * 30 + ["circuit_open"]  # half of the last calls
    assert alerts(service) == {"poor_load_balance", "high_error_rate", "circuit_open"}
    assert health(service)["status"] == "degraded"
    spoil(service, None)
    service.clock.now += 400  # the window passes, the breaker allows a probe
    assert [outcome(service, states(seed, 4, 16)) for seed in range(30)] == [OK] * 30
    assert alerts(service) == set()
    assert health(service)["status"] == "healthy"
    seen = {(event, facts.get("alert")) for _, event, facts in service.log.lines}
    for name in ("poor_load_balance", "high_error_rate", "circuit_open"):
        assert {("alert_fired", name), ("alert_cleared", name)} <= seen


def test_the_alert_of_latency_fires_and_clears(serve):
    service = serve(max_inflight=4)
    slow = threading.Semaphore(3)

    def sluggish(run, *order):
        if slow.acquire(blocking=False):
            time.sleep(0.6)
        return run(*order)

    spoil(service, sluggish)
    at_once = [threading.Thread(target=outcome, args=(service, states(s, 2, 8))) for s in range(3)]
    for thread in at_once:
        thread.start()
    for thread in at_once:
        thread.join(PATIENCE)
    assert alerts(service) == set(), "a few requests say nothing"
    for seed in range(3, 20):
        assert outcome(service, states(seed, 2, 8)) == OK
    assert "high_latency" in alerts(service)
    service.clock.now += 400
    # One of many may be slow on a busy machine; most are not.
    for seed in range(60):
        assert outcome(service, states(seed, 2, 8)) == OK
    assert alerts(service) == set()


def test_the_alert_of_memory_fires_and_clears(serve):
    service = serve()
    held, system = service.server.transport.account, service.engine.system
    # The bodies that are held are real; what they are compared with is small, not a process's.
    system._read = lambda: (10_000 + held.held, 0.0)
    system._history.clear()
    for _ in range(3):
        system.sample()
    assert alerts(service) == set()
    data = body(states()) + b" " * 20_000
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as sock:
        sock.sendall(head.encode() + data[:-1])
        until(lambda: held.held == len(data))
        system.sample()
        assert alerts(service) == {"memory_spike"}
        assert health(service)["status"] == "degraded"
        sock.sendall(data[-1:])
        with sock.makefile("rb") as stream:
            assert b" 200 " in stream.readline()
    until(lambda: not held.held)
    system.sample()
    assert alerts(service) == set()
    assert health(service)["status"] == "healthy"


# --- Redis --------------------------------------------------------------------------------------


@needs_redis
def test_redis_killed_and_back_under_two_replicas(serve, tmp_path, monkeypatch):  # L03, K02
    patient(monkeypatch)
    redis = RedisServer(tmp_path)
    options = dict(
        redis_url=redis.url,
        security_level="standard",
        rate_limit_requests=10,
        trusted_proxies="127.0.0.1",
        enable_caching=True,
    )
    replicas = one, two = serve(**options), serve(**options)
    new = itertools.count(100)  # inputs that no cache has seen

    def cached(service, seed, client):
        status, _, _, answer = ask(service, states(seed), client=client)
        assert status == 200
        return answer["parameters"]["cached"]

    def admitted(client):
        """How many requests of a client each replica takes before it refuses one."""
        counts = []
        for service in replicas:
            taken = 0
            while (actual := ask(service, states(next(new), 4, 16), client=client))[0] == 200:
                taken += 1
            assert actual[:2] == (429, "rate_limited")
            assert int(actual[2]) >= 1
            counts.append(taken)
        return counts

    try:
        assert not cached(one, 1, "192.0.2.1")
        assert cached(two, 1, "192.0.2.1"), "what one has answered the other has"
        assert admitted("192.0.2.2") == [10, 0], "the limit is the sum"
        assert [health(r)["status"] for r in replicas] == ["healthy"] * 2

        redis.kill()
        for service in replicas:
            assert not cached(service, 2, "192.0.2.3"), "answers go on"
            assert cached(service, 2, "192.0.2.3"), "from this process's memory"
            assert ready(service) == (200, [])
        assert admitted("192.0.2.4") == [10, 10], "limits go on, each for itself"
        for service in replicas:
            health_report = health(service)
            assert health_report["status"] == "degraded"
            assert health_report["components"]["cache"]["status"] == "redis_lost"
            assert health_report["components"]["rate_limiter"]["status"] == "redis_lost"
            assert service.log.events().count("redis_lost") == 2, "once for each use of it"

        redis.start()
        for service in replicas:
            service.clock.now += 3
        assert not cached(one, 5, "192.0.2.5")
        assert cached(two, 5, "192.0.2.5")
        assert admitted("192.0.2.6") == [10, 0]
        assert [health(r)["status"] for r in replicas] == ["healthy"] * 2
    finally:
        redis.kill()


# --- checkpoints --------------------------------------------------------------------------------


def test_a_corrupt_checkpoint_is_refused_and_the_old_one_serves_on(serve, tmp_path):  # B07
    good, bad = (write(tmp_path / name, seed=seed) for name, seed in (("good", 1), ("bad", 2)))
    array = max((tmp_path / "bad" / "arrays").rglob("d/*"), key=lambda f: f.stat().st_size)
    damaged = bytearray(array.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    array.write_bytes(damaged)
    service = serve(admin_key="operator", serve_moe="off", reload_folder=str(tmp_path))
    admin = {"Authorization": "Bearer operator"}
    status, answer = service.json("POST", "/admin/reload", {"checkpoint": good}, **admin)
    assert status == 200
    version = answer["version"]
    status, answer = service.json("POST", "/admin/reload", {"checkpoint": bad}, **admin)
    assert (status, answer["code"]) == (422, "invalid_values")
    assert "old checkpoint stays in service" in answer["error"]
    assert ask(service)[3]["model_version"] == version
    assert ready(service) == (200, [])
    assert health(service)["components"]["router"]["version"] == version
