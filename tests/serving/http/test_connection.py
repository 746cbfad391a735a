"""Framing, connections and their ends, over raw sockets: RFC 9110 and 9112."""

import json
import socket
import time

import numpy as np
import pytest

from moe_jax.serving.errors import CODES
from moe_jax.serving.http import connection as bounds
from tests.serving.served import WIDTH, Served, served, small_engine, tensor

INFER = "/v2/models/router/infer"
PATIENCE = 60.0  # seconds after which a step counts as hung
BODY = json.dumps({"inputs": [tensor(np.ones((1, 2, WIDTH), np.float32))]}).encode()
GET = b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def service():
    with served(small_engine(admin_key="operator")) as started:
        yield started


class Connection:
    """A raw connection: sends bytes, reads answers."""

    def __init__(self, service: Served) -> None:
        self.sock = socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE)
        self.stream = self.sock.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def answer(self, *, head: bool = False):
        """Status, headers and body of the next answer; None at the end of the connection."""
        try:
            line = self.stream.readline()
        except ConnectionError:
            return None
        if not line:
            return None
        headers = {}
        while (text := self.stream.readline()) not in (b"\r\n", b""):
            name, _, value = text.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = b"" if head else self.stream.read(int(headers.get("content-length", 0)))
        return int(line.split()[1]), headers, body

    def ended(self) -> bool:
        return self.answer() is None


def post(headers: str, body: bytes = BODY, target: str = INFER, version: str = "1.1") -> bytes:
    return f"POST {target} HTTP/{version}\r\nHost: x\r\n{headers}\r\n".encode() + body


LENGTH = f"Content-Length: {len(BODY)}\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
CHUNK = b"%x\r\n%s\r\n" % (len(BODY), BODY)


def statuses(service, data: bytes) -> tuple[list[int], bool]:
    """Statuses of the answers to ``data``, and whether the connection answers another request."""
    with Connection(service) as connection:
        connection.send(data)
        connection.send(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        results = []
        while (answer := connection.answer()) is not None:
            results.append(answer[0])
            if answer[1].get("content-type") is None:  # the answer to the second request
                return results[:-1], True
        return results, False


# --- framing ------------------------------------------------------------------------------------

KEPT = {
    "a length": (post(LENGTH), 200),
    "chunks": (post(CHUNKED, CHUNK + b"0\r\n\r\n"), 200),
    "chunks with extensions": (
        post(CHUNKED, b'%x;a=1;b="c"\r\n%s\r\n' % (len(BODY), BODY) + b"0;z\r\n\r\n"),
        200,
    ),
    "chunk sizes with zeros": (post(CHUNKED, b"000" + CHUNK + b"000\r\n\r\n"), 200),
    "trailers": (post(CHUNKED, CHUNK + b"0\r\nX-Sum: 1\r\n\r\n"), 200),
    "blank lines before a request": (b"\r\n\r\n" + GET, 200),
    "an absolute target": (GET.replace(b"/v2", b"http://x/v2"), 200),
    "an absolute target without a path": (GET.replace(b"/v2", b"http://x"), 200),
    "an empty Host": (GET.replace(b"Host: x", b"Host:"), 200),
    "an IPv6 Host": (GET.replace(b"Host: x", b"Host: [::1]:80"), 200),
    "OPTIONS": (GET.replace(b"GET", b"OPTIONS"), 405),
    "OPTIONS *": (GET.replace(b"GET /v2", b"OPTIONS *"), 405),
    "TRACE": (GET.replace(b"GET", b"TRACE"), 405),
    "DELETE": (GET.replace(b"GET", b"DELETE"), 405),
    "POST without a body": (post("", b"", "/v2"), 405),
    "POST with a body that is not read": (post(LENGTH, BODY, "/nowhere"), 404),
    "GET with a body": (GET[:-2] + LENGTH.encode() + b"\r\n" + BODY, 200),
    "an unknown expectation": (post("Expect: tea\r\n" + LENGTH), 200),
}

REFUSED = {
    # chunks
    "chunk size that is no number": (post(CHUNKED, b"zz\r\n" + BODY), 400),
    "empty chunk size": (post(CHUNKED, b"\r\n" + BODY), 400),
    "negative chunk size": (post(CHUNKED, b"-5\r\n" + BODY), 400),
    "signed chunk size": (post(CHUNKED, b"+5\r\n" + BODY), 400),
    "chunk size with 0x": (post(CHUNKED, b"0x5\r\n" + BODY), 400),
    "chunk size that overflows": (post(CHUNKED, b"f" * 17 + b"\r\n" + BODY), 400),
    "chunk longer than its size": (post(CHUNKED, b"5\r\n" + BODY), 400),
    "second chunk broken": (post(CHUNKED, CHUNK + b"zz\r\n"), 400),
    "chunk ends in a bare LF": (post(CHUNKED, b"5\n12345\n0\n\n"), 400),
    "trailer that is no header": (post(CHUNKED, CHUNK + b"0\r\nno colon\r\n\r\n"), 400),
    "trailers without end": (post(CHUNKED, CHUNK + b"0\r\n" + b"A: b\r\n" * 200_000), 400),
    "chunk extension without end": (post(CHUNKED, b"5;" + b"e" * 1_000_000), 400),
    # transfer codings
    "gzip, chunked": (post("Transfer-Encoding: gzip, chunked\r\n", CHUNK), 501),
    "gzip": (post("Transfer-Encoding: gzip\r\n"), 501),
    "identity": (post("Transfer-Encoding: identity\r\n"), 501),
    "xchunked": (post("Transfer-Encoding: xchunked\r\n", CHUNK), 501),
    "codings on two lines": (post("Transfer-Encoding: gzip\r\n" + CHUNKED, CHUNK), 501),
    "chunked twice": (post("Transfer-Encoding: chunked, chunked\r\n", CHUNK), 400),
    "chunked on two lines": (post(CHUNKED * 2, CHUNK), 400),
    "chunked over HTTP/1.0": (post(CHUNKED, CHUNK, version="1.0"), 400),
    # lengths
    "a length and chunks": (post(LENGTH + CHUNKED, CHUNK), 400),
    "chunks and a length": (post(CHUNKED + LENGTH, CHUNK), 400),
    "two lengths": (post(LENGTH + "Content-Length: 5\r\n"), 400),
    "one length twice": (post(LENGTH * 2), 400),
    "a list of lengths": (post(f"Content-Length: {len(BODY)}, {len(BODY)}\r\n"), 400),
    "a negative length": (post("Content-Length: -5\r\n"), 400),
    "a signed length": (post("Content-Length: +5\r\n"), 400),
    "a length that is no number": (post("Content-Length: 5x\r\n"), 400),
    "an empty length": (post("Content-Length:\r\n"), 400),
    "a length that overflows": (post(f"Content-Length: {2**65}\r\n"), 400),
    # heads
    "two Hosts": (GET[:-2] + b"Host: y\r\n\r\n", 400),
    "one Host twice": (GET[:-2] + b"Host: x\r\n\r\n", 400),
    "no Host": (b"GET /v2 HTTP/1.1\r\n\r\n", 400),
    "a Host that is none": (GET.replace(b"Host: x", b"Host: a b/c"), 400),
    "HTTP/1.2": (GET.replace(b"1.1", b"1.2"), 400),
    "HTTP/2.0": (GET.replace(b"1.1", b"2.0"), 505),
    "HTTP/0.9": (GET.replace(b"1.1", b"0.9"), 505),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "no version": (b"GET /v2\r\n\r\n", 505),
    "a folded header": (GET[:-2] + b"A: b\r\n c\r\n\r\n", 400),
    "NUL in a header": (GET[:-2] + b"A: b\0c\r\n\r\n", 400),
    "CR in a header": (GET[:-2] + b"A: b\rc\r\n\r\n", 400),
    "a space before the colon": (GET[:-2] + b"A : b\r\n\r\n", 400),
    "a header without a name": (GET[:-2] + b": b\r\n\r\n", 400),
    "a header without a colon": (GET[:-2] + b"A\r\n\r\n", 400),
    "many headers": (GET[:-2] + b"A: b\r\n" * 300 + b"\r\n", 431),
    "a long header": (GET[:-2] + b"A: " + b"b" * 100_000 + b"\r\n\r\n", 431),
    "a long target": (GET.replace(b"/v2", b"/" + b"v" * 100_000), 431),
    "CONNECT": (b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n", 405),
    "GET *": (GET.replace(b"/v2", b"*"), 400),
    "a target of other bytes": (GET.replace(b"/v2", b"/\xff\xfe"), 400),
    "an unknown method": (GET.replace(b"GET", b"BREW"), 400),
}


@pytest.mark.parametrize(("data", "status"), KEPT.values(), ids=KEPT)
def test_what_http_allows_is_answered_and_the_connection_kept(service, data, status):
    assert statuses(service, data) == ([status], True)


@pytest.mark.parametrize(("data", "status"), REFUSED.values(), ids=REFUSED)
def test_what_http_forbids_is_refused_and_the_connection_ends(service, data, status):
    exporter = service.server.engine.recorder.exporter
    counted = sum(exporter.value("moe_errors_total", code) for code in CODES)
    with Connection(service) as connection:
        connection.send(data)
        answer = connection.answer()
        assert answer is not None, "closed without an answer"
        got_status, headers, body = answer
        assert got_status == status, body
        assert headers["connection"] == "close"
        assert set(json.loads(body)) == {"error", "code"}
        now = sum(exporter.value("moe_errors_total", code) for code in CODES)
        assert now == counted + 1, "a refusal counts once in moe_errors_total"
        assert connection.ended()
    assert service.server.transport.account.held == 0


def test_a_broken_request_after_a_good_one_does_not_cost_the_good_one_its_answer(service):
    assert statuses(service, post(LENGTH) + b"nonsense\r\n\r\n") == ([200], False)


def test_head_is_answered_like_get_without_its_body(service):
    paths = (
        "/",
        "/v2",
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/router",
        "/v2/models/router/ready",
        "/nowhere",
        "/v2/models/router/routes/0123456789abcdef",
        INFER,
        "/admin/reload",
    )
    with Connection(service) as connection:
        for path in paths:
            expected = service.request("GET", path)[0]
            connection.send(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            answer = connection.answer(head=True)
            assert answer is not None
            assert answer[0] == expected, path


# --- upgrades and expectations ------------------------------------------------------------------

# What Java's HttpClient (11 and newer) sends first, byte by byte but for the body.
JAVA = (
    "Connection: Upgrade, HTTP2-Settings\r\n"
    "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
    "Upgrade: h2c\r\n"
    "User-Agent: Java-http-client/17.0.15\r\n"
    "Content-Type: application/json\r\n"
)


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize(
    "headers",
    [
        JAVA,
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
        "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n",
        "Connection: keep-alive, Upgrade\r\nUpgrade: TLS/1.0, HTTP/2.0\r\n",
        "Upgrade: h2c\r\n",
        "Connection: Upgrade\r\n",
    ],
    ids=["Java", "curl", "websocket", "TLS", "without Connection", "without Upgrade"],
)
def test_an_upgrade_that_is_not_spoken_is_ignored_and_the_body_read(service, headers, framing):
    framed = (LENGTH, BODY) if framing == "length" else (CHUNKED, CHUNK + b"0\r\n\r\n")
    request = post(headers + framed[0], framed[1])
    assert statuses(service, request) == ([200], True)
    assert statuses(service, request * 3) == ([200] * 3, True)
    with Connection(service) as connection:  # in pieces, as a network may deliver it
        for start in range(0, len(request), 97):
            connection.send(request[start : start + 97])
            time.sleep(0.001)
        answer = connection.answer()
        assert answer is not None
        assert answer[0] == 200, answer[2]


def test_an_upgrade_without_a_body_is_ignored(service):
    headers = b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert statuses(service, GET[:-2] + headers) == ([200], True)
    assert statuses(service, post("Upgrade: h2c\r\nConnection: upgrade, close\r\n" + LENGTH))[
        0
    ] == [200]


def test_a_client_that_waits_for_100_is_told_to_go_on_even_with_an_upgrade(service):
    with Connection(service) as connection:
        connection.send(post(JAVA + "Expect: 100-continue\r\n" + LENGTH, b""))
        answer = connection.answer()
        assert answer is not None
        assert answer[0] == 100
        connection.send(BODY)
        answer = connection.answer()
        assert answer is not None
        assert answer[0] == 200


def test_a_client_that_is_refused_is_not_told_to_go_on(service):
    for headers, status in [
        ("Content-Type: text/html\r\n" + LENGTH, 415),
        (f"Content-Length: {2**40}\r\n", 413),
    ]:
        with Connection(service) as connection:
            connection.send(post("Expect: 100-continue\r\n" + headers, b""))
            answer = connection.answer()
            assert answer is not None
            assert answer[0] == status


def test_a_client_of_http_1_0_is_never_sent_a_100(service):
    with Connection(service) as connection:
        connection.send(post("Expect: 100-continue\r\n" + LENGTH, version="1.0"))
        answer = connection.answer()
        assert answer is not None
        assert answer[0] == 200
        assert connection.ended()


# --- the end of a connection --------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch):
    """Connections that end after fractions of a second."""
    monkeypatch.setattr(bounds, "DISCARD_SECONDS", 0.3)
    monkeypatch.setattr(bounds, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(bounds, "WRITE_SECONDS", 1.0)


def ends_within(connection, seconds, data=b" "):
    """Whether the server closes while the client goes on sending."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            connection.send(data)
        except ConnectionError:
            return True
        time.sleep(0.05)
    return False


EARLY = {
    "refused at its headers": (
        post("Content-Type: text/html\r\nContent-Length: 5000\r\n", b" "),
        415,
    ),
    "not served": (post("Content-Length: 5000\r\n", b" ", "/nowhere"), 404),
    "wrong method": (post("Content-Length: 5000\r\n", b" ", "/v2"), 405),
    "wrong key": (post("Content-Length: 5000\r\n", b" ", "/admin/reload"), 401),
    "a body that nobody reads": (
        GET[:-2] + b"Content-Length: 5000\r\n\r\n ",
        200,
    ),
    "chunks that nobody reads": (post(CHUNKED, b"1\r\n \r\n", "/nowhere"), 404),
    "larger than allowed": (post(f"Content-Length: {2**40}\r\n", b" "), 413),
    "broken chunks": (post(CHUNKED, b"zz\r\n"), 400),
    "no HTTP": (b"nonsense\r\n\r\n", 400),
}


@pytest.mark.parametrize(("data", "status"), EARLY.values(), ids=EARLY)
def test_an_early_answer_ends_the_connection_whatever_arrives(service, hasty, data, status):
    with Connection(service) as connection:
        connection.send(data)
        answer = connection.answer()
        assert answer is not None
        assert answer[0] == status
        assert ends_within(connection, 10)


def test_a_body_that_comes_after_all_keeps_the_connection(service):
    with Connection(service) as connection:
        connection.send(post(LENGTH, BODY[:10], "/nowhere"))
        answer = connection.answer()
        assert answer is not None
        assert answer[0] == 404
        connection.send(BODY[10:] + GET)
        answer = connection.answer()
        assert answer is not None
        assert answer[0] == 200


def test_a_late_body_is_408_and_ends_the_connection_whatever_arrives(hasty):
    with (
        served(small_engine(request_timeout_seconds=0.3)) as service,
        Connection(service) as connection,
    ):
        connection.send(post("Content-Length: 5000\r\n", b" "))
        answer = connection.answer()
        assert answer is not None
        assert answer[0] == 408
        assert ends_within(connection, 10)


def test_blank_lines_do_not_keep_a_connection_open(service, monkeypatch):
    monkeypatch.setattr(service.server.config, "timeout_keep_alive", 0.3)
    with Connection(service) as connection:
        connection.send(GET)
        assert connection.answer() is not None
        assert ends_within(connection, 10, b"\r\n")


def test_a_slow_head_behind_a_request_that_is_answered_does_not_cost_its_answer(
    service, monkeypatch
):
    monkeypatch.setattr(bounds, "HEAD_SECONDS", 0.1)
    with Connection(service) as connection:
        connection.send(post(LENGTH) + b"GET /v2 HT")
        answer = connection.answer()
        assert answer is not None
        assert answer[0] == 200
