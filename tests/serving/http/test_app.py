"""Endpoints, statuses and headers; who may ask; bodies that are large, slow or not what they say."""

import contextlib
import dataclasses
import gzip
import json
import re
import socket
import time

import numpy as np
import pytest
import structlog

from moe_jax.serving.errors import CODES
from moe_jax.serving.http import connection as bounds
from moe_jax.serving.http.app import ROUTES
from moe_jax.serving.http.openapi import document
from tests.serving.served import WIDTH, served, small_engine, tensor

INFER = "/v2/models/router/infer"
PATIENCE = 60.0  # seconds after which a step counts as hung
BODY = json.dumps({"inputs": [tensor(np.ones((1, 2, WIDTH), np.float32))]}).encode()


@pytest.fixture(scope="module")
def service():
    with served(small_engine(admin_key="operator")) as started:
        yield started


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2", 200),
        ("GET", "/v2/health/live", 200),
        ("GET", "/v2/health/ready", 200),
        ("GET", "/v2/models/router", 200),
        ("GET", "/v2/models/router/ready", 200),
        ("GET", "/health", 200),
        ("GET", "/ready", 200),
        ("GET", "/metrics", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/", 200),
        ("GET", "/status.js", 200),
        ("GET", "/status.css", 200),
        ("HEAD", "/health", 200),
        ("GET", "/v2/models/nobody", 404),
        ("GET", "/v2/models/nobody/ready", 404),
        ("GET", "/v2/models/router/versions/9", 404),
        ("GET", "/nowhere", 404),
        ("GET", "//", 404),
        ("GET", "/v2/", 404),
        ("POST", "/v2/models/nobody/infer", 404),
        ("POST", "/v2/models/router/versions/9/infer", 404),
        ("GET", INFER, 405),
        ("PUT", INFER, 405),
        ("DELETE", "/health", 405),
        ("POST", "/v2", 405),
        ("GET", "/admin/reload", 405),
        ("POST", "/admin/reload", 401),
    ],
)
def test_every_path_and_method_has_its_status(service, method, path, status):
    body = BODY if method == "POST" else None
    got_status, headers, data = service.request(method, path, body)
    assert got_status == status
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
    assert headers["x-content-type-options"] == "nosniff"
    if status >= 400:
        assert set(json.loads(data)) == {"error", "code"}
    if status == 405:
        assert headers["allow"]


def test_health_and_readiness_say_what_they_know(service):
    status, health = service.json("GET", "/health")
    assert status == 200
    assert {"status", "uptime_seconds", "components", "configuration", "memory"} <= set(health)
    assert "operator" not in json.dumps(health)
    assert service.json("GET", "/ready") == (200, {"ready": True, "reasons": []})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Content-Type": "application/json"}, 200),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": "application/octet-stream"}, 200),
        ({"Content-Type": "text/html"}, 415),
        ({"Content-Encoding": "identity"}, 200),
        ({"Content-Encoding": "br"}, 415),
        ({"Content-Encoding": "gzip"}, 400),
        ({"Inference-Header-Content-Length": "garbage"}, 400),
        ({"Inference-Header-Content-Length": str(len(BODY))}, 200),
        ({"Inference-Header-Content-Length": str(len(BODY) + 1)}, 400),
    ],
)
def test_headers_decide_how_a_body_is_read(service, headers, status):
    got_status, answer, _ = service.request("POST", INFER, BODY, headers)
    assert got_status == status
    if status == 415:
        assert answer["accept-encoding"] == "gzip, deflate"


def test_a_header_that_comes_twice_is_refused(service):
    status, reply = raw(service, INFER, BODY, "Content-Type: application/json\r\n" * 2)
    assert (status, reply["code"]) == (400, "malformed")


def raw(service, path, body, headers):
    """Status and JSON of a request that is written by hand."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as sock:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        sock.sendall(head.encode() + body)
        return read_answer(sock)


def read_answer(sock):
    with sock.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        length = 0
        while (line := stream.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return status, json.loads(stream.read(length))


def test_ids_of_requests_come_back_and_garbage_is_replaced(service):
    _, headers, _ = service.request("GET", "/v2", headers={"X-Request-Id": "order-66"})
    assert headers["x-request-id"] == "order-66"
    _, headers, _ = service.request("GET", "/v2", headers={"X-Request-Id": "a b" * 100})
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])


def test_logs_carry_request_and_trace_ids_and_neither_keys_nor_tensors(service, monkeypatch):
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    lines: list[dict] = []
    log = structlog.wrap_logger(
        None,
        processors=[
            structlog.contextvars.merge_contextvars,
            lambda *a: lines.append(a[2]) or drop(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("debug"),
    )
    with monkeypatch.context() as patch:
        engine = service.engine
        patch.setattr(engine, "log", log)
        patch.setattr(engine, "parts", dataclasses.replace(engine.parts, log=log))
        service.request(
            "POST",
            INFER,
            BODY,
            {
                "X-Request-Id": "seen",
                "traceparent": f"00-{trace}-{parent}-01",
                "X-API-Key": "sesame",
            },
        )
        deadline = time.monotonic() + PATIENCE  # the line is written after the answer
        while not any(line["event"] == "request" for line in lines):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    line = next(entry for entry in lines if entry["event"] == "request")
    assert (line["request_id"], line["trace_id"], line["parent_id"]) == ("seen", trace, parent)
    assert (line["method"], line["path"], line["code"]) == ("POST", INFER, "ok")
    assert all(entry["request_id"] == "seen" for entry in lines)
    assert {"answered", "request"} <= {entry["event"] for entry in lines}  # engine and transport
    assert "sesame" not in str(lines)
    assert "1.0, 1.0" not in str(lines)


def drop():
    raise structlog.DropEvent


def test_a_body_above_the_limit_is_refused_before_it_is_read(service):
    limit = service.server.transport.body_limit
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as sock:
        sock.sendall(
            f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {limit + 1}\r\n\r\n".encode()
        )
        status, reply = read_answer(sock)
        assert (status, reply["code"]) == (413, "too_large")
        assert sock.recv(1) == b""  # and the connection ends: nobody waits for so much


def test_a_body_that_never_says_how_long_it_is_is_bounded_too(service, monkeypatch):
    transport = service.server.transport
    monkeypatch.setattr(transport, "body_limit", 1000)
    chunk = b"64\r\n" + b"x" * 100 + b"\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as sock:
        sock.sendall(
            f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        sock.sendall(chunk * 11)
        assert read_answer(sock)[0] == 413
    assert transport.account.held == 0


def test_a_bomb_is_bounded_by_what_it_becomes(service, monkeypatch):
    monkeypatch.setattr(service.server.transport, "body_limit", 100_000)
    bomb = gzip.compress(bytes(10_000_000))
    assert len(bomb) < 100_000
    status, _, data = service.request("POST", INFER, bomb, {"Content-Encoding": "gzip"})
    assert (status, json.loads(data)["code"]) == (413, "too_large")


def test_what_bodies_become_counts_against_the_memory_of_all(service, monkeypatch):
    account = service.server.transport.account
    monkeypatch.setattr(account, "limit", 1_000_000)
    bomb = gzip.compress(bytes(10_000_000))
    status, headers, data = service.request("POST", INFER, bomb, {"Content-Encoding": "gzip"})
    assert (status, json.loads(data)["code"]) == (503, "queue_full")
    assert headers["retry-after"] == "1"
    assert account.held == 0
    packed = gzip.compress(BODY)
    assert service.request("POST", INFER, packed, {"Content-Encoding": "gzip"})[0] == 200


def test_a_body_that_comes_too_slowly_is_cut_off_and_disturbs_nobody(service, monkeypatch):
    config, account = service.engine.config, service.server.transport.account
    hasty = dataclasses.replace(config.serving, request_timeout_seconds=1.0)
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as slow:
        with monkeypatch.context() as patch:  # for this one alone
            patch.setattr(service.engine, "config", dataclasses.replace(config, serving=hasty))
            slow.sendall(
                f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n ".encode()
            )
            deadline = time.monotonic() + PATIENCE
            while not account.held:  # it is being read
                assert time.monotonic() < deadline
                time.sleep(0.01)
        for _ in range(4):
            slow.sendall(b" ")
            assert service.request("POST", INFER, BODY)[0] == 200
        status, reply = read_answer(slow)
    assert (status, reply["code"]) == (408, "request_timeout")
    assert account.held == 0


def test_a_head_that_comes_too_slowly_is_cut_off(service, monkeypatch):
    monkeypatch.setattr(bounds, "HEAD_SECONDS", 0.5)
    with contextlib.ExitStack() as stack:  # at once, so that they wait together
        slow = []
        for sent in (b"", b"GET /v2 HT", b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: "):
            sock = socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE)
            slow.append(stack.enter_context(sock))
            sock.sendall(sent)
        assert [read_answer(sock)[0] for sock in slow] == [408] * 3


def test_a_head_that_has_no_end_is_cut_off(service):
    sent = 0
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as sock:
        sock.sendall(b"GET /v2 HTTP/1.1\r\nA: ")
        with contextlib.suppress(ConnectionError):
            while sent < 64 * 2**20:
                sock.sendall(b"x" * 65536)
                sent += 65536
    assert sent < 16 * 2**20  # what sockets hold, and no more


def test_a_client_that_closes_its_half_still_gets_its_answer(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as sock:
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n\r\n"
        sock.sendall(head.encode() + BODY)
        sock.shutdown(socket.SHUT_WR)
        assert read_answer(sock)[0] == 200
        assert sock.recv(1) == b""


def test_what_is_no_http_gets_an_answer(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        status, reply = read_answer(sock)
    assert (status, reply["code"]) == (400, "malformed")


def test_the_openapi_document_lists_the_routes_and_no_others(service):
    pages = {"/", "/status.css", "/status.js"}
    routes = {(r.path, m) for r in ROUTES for m in r.methods or () if m != "HEAD"}
    api = document(1)
    listed = {
        (path, method.upper())
        for path, item in api["paths"].items()
        for method in item
        if method in ("get", "post", "put", "delete", "patch")
    }
    assert listed == {(path, method) for path, method in routes if path not in pages}
    assert service.json("GET", "/openapi.json")[1]["paths"].keys() == api["paths"].keys()
    assert api["components"]["schemas"]["Error"]["properties"]["code"]["enum"] == list(CODES)


def test_the_status_page_is_ours_alone(service):
    _, headers, page = service.request("GET", "/")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    text = page + service.request("GET", "/status.js")[2] + service.request("GET", "/status.css")[2]
    assert b"http://" not in text
    assert b"https://" not in text
    assert b"<style" not in text
    assert b" onclick" not in text
    assert b"innerHTML" not in text
