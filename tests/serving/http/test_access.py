"""Who may ask, at each level, and what is checked before a body is read."""

import asyncio
import json
import threading
import time

import numpy as np
import pytest

from moe_jax.config import load_config
from moe_jax.serving.engine import RouterEngine
from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.app import create_app
from tests.serving.http.fuzz import ask
from tests.serving.served import SMALL, WIDTH, served, small_engine, tensor

INFER = "/v2/models/router/infer"
BODY = json.dumps({"inputs": [tensor(np.ones((1, 2, WIDTH), np.float32))]}).encode()


@pytest.fixture(scope="module")
def strict():
    with small_engine(security_level="strict", api_keys="alice,bob", admin_key="root") as engine:
        app = create_app(engine)
        yield app
        app.door.close()


def asked(app, method, path, body=b"", **headers):
    named = [(n.replace("_", "-").lower().encode(), v.encode()) for n, v in headers.items()]
    status, data = asyncio.run(ask(app, (method, path, named, body)))
    return status, json.loads(data) if data[:1] in (b"{", b"[") else data


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", INFER, {}, 401),
        ("POST", INFER, {"authorization": "Bearer mallory"}, 401),
        ("POST", INFER, {"authorization": "Basic alice"}, 401),
        ("POST", INFER, {"authorization": "Bearer alice"}, 200),
        ("POST", INFER, {"x_api_key": "bob"}, 200),
        ("GET", "/v2/models/router", {}, 401),
        ("GET", "/v2/models/router", {"authorization": "Bearer alice"}, 200),
        ("GET", "/v2/models/router/routes/0123456789abcdef", {}, 401),
        ("GET", "/metrics", {}, 401),
        ("GET", "/metrics", {"authorization": "Bearer alice"}, 401),
        ("GET", "/metrics", {"authorization": "Bearer root"}, 200),
        ("POST", "/admin/reload", {"authorization": "Bearer alice"}, 401),
        ("GET", "/v2/health/live", {}, 200),
        ("GET", "/ready", {}, 200),
    ],
)
def test_strict_asks_for_keys(strict, method, path, headers, status):
    body = BODY if path == INFER else b""
    assert asked(strict, method, path, body, **headers)[0] == status


def test_strict_is_terse(strict):
    status, told = asked(strict, "POST", INFER, b"{}", x_api_key="alice")
    assert (status, told) == (400, {"error": "malformed request", "code": "malformed"})
    assert asked(strict, "GET", "/health")[1].keys() == {"status"}
    assert "configuration" in asked(strict, "GET", "/health", authorization="Bearer root")[1]


def test_a_key_is_optional_below_strict_but_a_wrong_one_is_told():
    with small_engine(api_keys="alice") as engine:
        app = create_app(engine)
        assert asked(app, "POST", INFER, BODY)[0] == 200
        assert asked(app, "POST", INFER, BODY, x_api_key="alice")[0] == 200
        assert asked(app, "POST", INFER, BODY, x_api_key="mallory")[0] == 401
        app.door.close()


def test_limits_are_checked_before_the_body_is_read(monkeypatch):
    with small_engine() as engine:
        app = create_app(engine)

        def refuse(client, *, tokens=0, requests=1):
            raise ServingError("rate_limited", "too many requests", retry_after=2.5)

        monkeypatch.setattr(engine, "admit", refuse)

        async def receive():
            raise AssertionError("the body was read")

        sent = []

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": INFER, "query_string": b"",
            "headers": [(b"content-length", b"10")], "client": ("127.0.0.1", 1),
        }  # fmt: skip
        asyncio.run(app(scope, receive, send))
        app.door.close()
    assert sent[0]["status"] == 429
    assert (b"retry-after", b"3") in sent[0]["headers"]


def test_a_fault_of_ours_is_a_500_that_says_nothing_of_it(monkeypatch):
    with small_engine() as engine:
        app = create_app(engine)

        def broken(*args, **options):
            raise RuntimeError("secret detail")

        monkeypatch.setattr(engine, "infer", broken)
        status, told = asked(app, "POST", INFER, BODY)
        app.door.close()
    assert (status, told["code"]) == (500, "internal")
    assert "secret" not in told["error"]


def test_more_requests_than_may_wait_are_told_to_come_back():
    with small_engine(max_inflight=1, max_queue=1) as engine:
        app = create_app(engine)
        door = app.door
        assert door.capacity == 2
        block = threading.Event()

        async def crowd():
            tasks = [asyncio.create_task(door.work(block.wait)) for _ in range(2)]
            await asyncio.sleep(0)
            status, data = await ask(app, ("POST", INFER, [], BODY))
            block.set()
            await asyncio.gather(*tasks)
            return status, json.loads(data)["code"]

        assert asyncio.run(crowd()) == (503, "queue_full")
        assert asked(app, "POST", INFER, BODY)[0] == 200
        door.close()


def statuses(app, count, body=BODY, **headers):
    return [asked(app, "POST", INFER, body, **headers)[0] for _ in range(count)]


def test_limits_and_blocks_act_over_http():
    with small_engine(
        security_level="standard", rate_limit_requests=5, trusted_proxies="127.0.0.1"
    ) as engine:
        app = create_app(engine)
        # The proxy is trusted, so each client behind it is one of its own.
        assert statuses(app, 7, x_forwarded_for="192.0.2.1") == [200] * 5 + [429] * 2
        assert statuses(app, 1, x_forwarded_for="192.0.2.2") == [200]
        named = [(b"x-forwarded-for", b"192.0.2.1")]
        status, data = asyncio.run(ask(app, ("POST", INFER, named, BODY)))
        assert (status, json.loads(data)["code"]) == (429, "rate_limited")
        # Ten violations are a block, which even a good request meets.
        assert statuses(app, 9, x_forwarded_for="192.0.2.1")[-1] == 403
        assert asked(app, "GET", "/ready", x_forwarded_for="192.0.2.1")[0] == 200
        assert statuses(app, 1, x_forwarded_for="192.0.2.3") == [200]
        app.door.close()


def test_malformed_requests_are_counted_and_block_and_good_ones_never_do():
    with small_engine(security_level="standard") as engine:
        app = create_app(engine)
        assert statuses(app, 60) == [200] * 60
        assert statuses(app, 10, b"{}") == [400] * 10
        assert statuses(app, 1) == [403]
        counted = engine.get_metrics()["errors_by_code"]
        assert counted == {"malformed": 10, "blocked": 1}
        app.door.close()


def test_tokens_are_limited_once_the_size_is_known():
    with small_engine(security_level="standard", rate_limit_tokens=5) as engine:
        app = create_app(engine)
        assert statuses(app, 3) == [200, 200, 429]  # two tokens each
        app.door.close()


def test_nobody_is_a_new_client_by_claiming_another_address():
    with served(small_engine(security_level="standard", rate_limit_requests=2)) as service:
        found = [
            service.request("POST", INFER, BODY, {"X-Forwarded-For": f"192.0.2.{i}"})[0]
            for i in range(4)
        ]
    assert found == [200, 200, 429, 429]


@pytest.mark.parametrize("header", [None, "x_forwarded_for", "forwarded", "via", "origin"])
def test_without_an_admin_key_only_the_machine_itself_may_reload(header):
    with small_engine() as engine:
        app = create_app(engine)
        headers = {} if header is None else {header: "192.0.2.1"}
        wanted = 200 if header is None else 401
        assert asked(app, "POST", "/admin/reload", **headers)[0] == wanted
        app.door.close()


def test_while_it_warms_up_probes_are_answered_and_requests_told_to_come_back(monkeypatch):
    loading = threading.Event()

    def load(*args):
        loading.wait(60)
        raise ValueError("no such weights")

    monkeypatch.setattr("moe_jax.serving.engine.served.load_weights", load)
    with RouterEngine(load_config(env={}, **SMALL), background=True) as engine:
        app = create_app(engine)
        assert asked(app, "GET", "/v2/health/live")[0] == 200
        assert asked(app, "GET", "/health")[0] == 200
        assert asked(app, "GET", "/metrics")[0] == 200
        assert asked(app, "GET", "/ready") == (503, {"ready": False, "reasons": ["warming"]})
        assert asked(app, "GET", "/v2/models/router")[0] == 503
        status, told = asked(app, "POST", INFER, BODY)
        assert (status, told["code"]) == (503, "warming")
        loading.set()
        deadline = time.monotonic() + 60
        while engine.load_error is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert asked(app, "GET", "/ready")[1]["reasons"] == ["params_missing"]
        app.door.close()
