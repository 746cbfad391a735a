"""Memory is bounded: bytes are taken before they are read, and unread answers have a deadline."""

import asyncio
import gc
import gzip
import json
import socket
import threading
import time
import tracemalloc

import grpc
import numpy as np
import pytest

from moe_jax.serving.engine import Result
from moe_jax.serving.errors import ServingError
from moe_jax.serving.http import connection, grpc_server
from moe_jax.serving.http.byte_account import ByteAccount
from moe_jax.serving.http.deadlines import Deadlines
from moe_jax.serving.http.grpc_call import GrpcCall
from moe_jax.serving.http.grpc_messages import MESSAGES, SERVICE, split_raw_contents
from moe_jax.serving.http.grpc_server import GrpcServer
from tests.serving.http.http2 import Http2
from tests.serving.served import WIDTH, served, small_engine, tensor

INFER = "/v2/models/router/infer"
GRPC_INFER = f"/{SERVICE}/ModelInfer"
PATIENCE = 60.0  # seconds after which a step counts as hung
X = np.ones((1, 2, WIDTH), np.float32)
BODY = json.dumps({"inputs": [tensor(X)]}).encode()
BIG = 12 * 2**20


def until(true):
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- the account --------------------------------------------------------------------------------


def test_the_account_never_holds_more_than_its_limit():
    account, most = ByteAccount(100), []

    def work():
        for _ in range(200):
            with account.lease() as lease:
                try:
                    lease.take(30)
                except ServingError as error:
                    assert error.code == "queue_full"  # noqa: PT017
                most.append(account.held)
                lease.keep(lease.held // 2)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) <= 100
    assert account.held == 0


def test_a_taker_may_wait_for_room():
    account = ByteAccount(10)
    first, second = account.lease(), account.lease()
    first.take(10)
    with pytest.raises(ServingError, match="memory"):
        second.take(1, wait_seconds=0.01)
    waiter = threading.Thread(target=second.take, args=(5, PATIENCE))
    waiter.start()
    first.release()
    first.release()
    waiter.join(PATIENCE)
    assert account.held == 5


def test_deadlines_pass_in_order_and_cancelled_ones_never():
    deadlines, passed = Deadlines(), []
    done = threading.Event()
    deadlines.start(0.05, done.set)
    cancelled = [deadlines.start(0.01, lambda: passed.append("cancelled")) for _ in range(200)]
    deadlines.start(0.02, lambda: passed.append("second"))
    deadlines.start(0.0, lambda: passed.append("first"))
    for number in cancelled:
        deadlines.cancel(number)
    assert done.wait(PATIENCE)
    assert passed == ["first", "second"]
    deadlines.start(0.0, lambda: passed.append("after the end"))
    deadlines.close()
    assert "after the end" not in passed or passed[-1] == "after the end"


# --- HTTP ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service():
    with served(small_engine()) as started:
        yield started


def test_bytes_are_taken_before_they_are_read(service):
    app = service.server.config.loaded_app
    account, size, seen = service.server.transport.account, 2_000_000, []
    chunks = [bytes(250_000)] * (size // 250_000)

    async def receive():
        seen.append(account.held)
        read = 250_000 * len(seen)
        assert account.held >= min(size, read), "a chunk comes before its bytes are taken"
        return {"type": "http.request", "body": chunks.pop(), "more_body": bool(chunks)}

    async def send(message):
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": INFER,
        "query_string": b"",
        "headers": [(b"content-length", str(size).encode())],
        "client": ("127.0.0.1", 1),
    }
    asyncio.run(app(scope, receive, send))
    assert len(seen) == size // 250_000
    assert account.held == 0


def test_a_body_for_which_there_is_no_room_is_refused_at_its_headers(service):
    account = service.server.transport.account
    account.take(account.limit - 1000)
    try:
        with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as sock:
            head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
            sock.sendall(f"{head}Content-Length: 5000\r\n\r\n".encode())
            with sock.makefile("rb") as stream:
                assert b" 503 " in stream.readline()
        assert service.request("POST", INFER, BODY)[0] == 200
    finally:
        account.give(account.limit - 1000)


def big_answer(service, monkeypatch, size=BIG):
    """The router answers ``size`` bytes."""
    arrays = {"expert_weights": np.zeros((1, size // 4), np.float32)}
    monkeypatch.setattr(
        service.engine, "infer", lambda *a, **o: Result(arrays, {"model_version": "1"})
    )
    return json.dumps(
        {
            "inputs": [tensor(X)],
            "outputs": [{"name": "expert_weights", "parameters": {"binary_data": True}}],
        }
    ).encode()


def unread(service, body, buffer=4096):
    """A connection whose client asks and never reads."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.settimeout(PATIENCE)
    sock.connect(("127.0.0.1", service.port))
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


def test_answers_that_nobody_reads_are_in_the_account_and_have_a_deadline(service, monkeypatch):
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.5)
    account = service.server.transport.account
    body = big_answer(service, monkeypatch)
    before = len(service.server.server_state.connections)
    socks = [unread(service, body) for _ in range(20)]
    until(lambda: account.held >= 12 * BIG)
    assert account.held <= account.limit
    until(lambda: account.held == 0)
    until(lambda: len(service.server.server_state.connections) <= before)
    for sock in socks:
        sock.close()


@pytest.mark.parametrize("path", ["/openapi.json", "/status.js"])
def test_small_answers_that_nobody_reads_have_a_deadline_too(service, monkeypatch, path):
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.3)
    before = len(service.server.server_state.connections)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(PATIENCE)
    sock.connect(("127.0.0.1", service.port))
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    sock.settimeout(0.5)
    with sock:
        try:
            for _ in range(20_000):  # pipelined until the service reads no more
                sock.sendall(request)
        except OSError:
            pass
        until(lambda: len(service.server.server_state.connections) <= before)


def test_a_client_that_reads_slowly_gets_its_whole_answer(service, monkeypatch):
    monkeypatch.setattr(connection, "STALL_SECONDS", 2.0)
    body = big_answer(service, monkeypatch, 3 * 2**20)
    with unread(service, body, 2**16) as sock:
        size = 0
        sock.shutdown(socket.SHUT_WR)
        while data := sock.recv(2**17):
            size += len(data)
            time.sleep(0.005)
    assert size > 3 * 2**20
    until(lambda: service.server.transport.account.held == 0)


def test_a_client_that_reads_a_little_now_and_then_is_cut_off_in_the_end(service, monkeypatch):
    monkeypatch.setattr(connection, "WRITE_SECONDS", 0.5)
    monkeypatch.setattr(connection, "MIN_RATE", 2**30)
    body = big_answer(service, monkeypatch)
    with unread(service, body) as sock:
        size = 0
        while data := sock.recv(65536):
            size += len(data)
            time.sleep(0.02)
    assert size < BIG, "what the sockets hold, and no more"
    until(lambda: service.server.transport.account.held == 0)


def test_requests_that_wait_for_an_earlier_answer_take_little_memory(service, monkeypatch):
    """A request in the parser takes kilobytes, and 10,000 of them fit into one read of a socket."""
    release = asyncio.Event()
    transport, loop = service.server.transport, []
    connections = service.server.server_state.connections

    async def slow(*_):
        loop.append(asyncio.get_running_loop())
        await release.wait()
        return b""

    monkeypatch.setattr(transport, "aside", slow)
    request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as sock:
        sock.sendall(request * 2000)
        until(lambda: loop and any(c.pipeline for c in list(connections)))
        time.sleep(0.1)
        most = max(len(c.pipeline) for c in list(connections))
        loop[0].call_soon_threadsafe(release.set)
        with sock.makefile("rb") as stream:
            lines = (line for line in stream if line.startswith(b"HTTP/1.1 200"))
            assert sum(1 for _, _ in zip(range(2000), lines, strict=False)) == 2000
    assert 0 < most < 200


def test_an_answer_for_which_there_is_no_room_is_503(service, monkeypatch):
    monkeypatch.setattr(service.server.transport.account, "limit", BIG - 1)
    body = big_answer(service, monkeypatch)
    status, headers, answer = service.request("POST", INFER, body)
    assert (status, json.loads(answer)["code"]) == (503, "queue_full")
    assert headers["retry-after"] == "1"
    packed = gzip.compress(body)
    assert service.request("POST", INFER, packed, {"Content-Encoding": "gzip"})[0] == 503
    assert service.server.transport.account.held == 0


# --- gRPC ---------------------------------------------------------------------------------------


class Grpc:
    """A gRPC server in front of an engine."""

    def __init__(self, **settings):
        self.service = served(small_engine(**settings))
        self.http = self.service.__enter__()
        self.engine, self.transport = self.http.engine, self.http.server.transport
        self.server = GrpcServer(self.transport, "127.0.0.1", 0)
        self.server.start()
        self.port = self.server.port

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.stop(0.5).wait()
        self.service.__exit__(*error)

    def errors(self):
        return self.engine.get_metrics()["errors_by_code"]


def request(size: int = 2) -> bytes:
    message = MESSAGES["ModelInferRequest"](model_name="router")
    message.inputs.add(name="hidden_states", datatype="FP32", shape=(1, size, WIDTH))
    message.raw_input_contents.append(np.ones((1, size, WIDTH), np.float32).tobytes())
    return message.SerializeToString()


@pytest.mark.parametrize("how", ["blocked", "unauthorized", "rate_limited"])
def test_who_may_not_speak_is_refused_before_the_message_is_received(how):
    settings = {
        "blocked": {"security_level": "standard"},
        "unauthorized": {"security_level": "strict", "api_keys": "alice"},
        "rate_limited": {"security_level": "standard", "rate_limit_requests": 1},
    }
    with Grpc(**settings[how]) as server:
        client = None
        if how == "blocked":
            client = server.engine.identify(peer="127.0.0.1")
            for _ in range(10):
                server.engine.violation(client, "malformed")
        elif how == "rate_limited":
            server.engine.admit(server.engine.identify(peer="127.0.0.1"))
        with Http2(server.port) as raw:
            raw.call(1, GRPC_INFER)
            assert raw.ended(1), "it waits for a message that it will refuse"
        assert server.errors()[how] == 1
        assert server.transport.account.held == 0


def test_messages_are_taken_from_the_account_before_they_arrive_one_of_a_client_at_a_time():
    with Grpc(request_timeout_seconds=1.0) as server:
        account, limit = server.transport.account, server.transport.body_limit
        with Http2(server.port) as raw:
            for stream in (1, 3, 5, 7):
                raw.call(stream, GRPC_INFER)
                raw.message(stream, bytes(1000), length=2**20)
            until(lambda: account.held)
            assert account.held == limit
            for stream in (1, 3, 5, 7):
                assert raw.ended(stream), "a message that does not arrive has a deadline"
        until(lambda: account.held == 0)
        until(lambda: server.errors().get("request_timeout") == 1)
        assert set(server.errors()) == {"request_timeout", "queue_full"}


@pytest.mark.parametrize("method", ["ServerLive", "ServerReady", "ServerMetadata"])
def test_messages_that_hold_nothing_are_not_received(method):
    with Grpc() as server, Http2(server.port) as raw:
        raw.call(1, f"/{SERVICE}/{method}")
        assert raw.ended(1)
        assert server.transport.account.held == 0


def test_an_answer_that_a_grpc_client_does_not_read_is_in_the_account_and_has_a_deadline(
    monkeypatch,
):
    monkeypatch.setattr(grpc_server, "WRITE_SECONDS", 0.5)
    with Grpc() as server:
        account = server.transport.account
        with Http2(server.port, window=0) as raw:
            raw.call(1, GRPC_INFER)
            raw.message(1, request(), end=True)
            until(lambda: 0 < account.held < 2000)
            assert raw.ended(1)
        until(lambda: account.held == 0)


def test_a_refused_message_is_freed_at_once_and_not_by_the_collector_of_cycles():
    """The traceback of a refusal holds the frames that hold the message."""
    gc.collect()
    gc.disable()
    try:
        with Grpc(security_level="standard", rate_limit_tokens=10) as server:
            data = request(200_000)  # 12 MiB, more tokens than a client may ever send
            tracemalloc.start()
            with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                infer = channel.unary_unary(GRPC_INFER)
                for _ in range(4):
                    with pytest.raises(grpc.RpcError, match="minute"):
                        infer(data, timeout=PATIENCE)
            for _ in range(4):
                body = b" " * BIG
                assert server.http.request("POST", INFER, body)[0] == 400
            until(lambda: server.transport.account.held == 0)
            until(lambda: tracemalloc.get_traced_memory()[0] < 2 * BIG + len(data))
    finally:
        tracemalloc.stop()
        gc.enable()


def test_trailing_metadata_is_no_metadata():
    with Grpc(security_level="standard", trusted_proxies="127.0.0.1") as server:
        seen = []
        identify = server.engine.identify

        def watched(**options):
            seen.append(options)
            return identify(**options)

        server.engine.identify = watched
        with Http2(server.port) as raw:
            raw.call(1, GRPC_INFER, [("x-forwarded-for", "192.0.2.1")])
            raw.message(1, request())
            raw.headers(1, [("x-forwarded-for", "9.9.9.9"), ("x-api-key", "mallory")], end=True)
            assert raw.ended(1)
        assert [(one["forwarded_for"], one["api_key"]) for one in seen] == [("192.0.2.1", None)]


class Metadata:
    """A call's context with metadata as an older gRPC delivers it: every line of a key."""

    def __init__(self, *pairs):
        self.pairs = pairs

    def invocation_metadata(self):
        return self.pairs


def test_lines_of_a_list_in_metadata_are_joined_and_a_key_comes_once(service):
    lines = [("x-forwarded-for", line) for line in ("6.6.6.6", "192.0.2.7:52344", "127.0.0.9")]
    call = GrpcCall(service.server.transport, Metadata(*lines))  # pyright: ignore
    assert call.forwarded_for == "6.6.6.6, 192.0.2.7:52344, 127.0.0.9"
    for name in ("authorization", "x-api-key"):
        twice = Metadata((name, "a"), (name, "b"))
        with pytest.raises(ServingError, match="once"):
            GrpcCall(service.server.transport, twice)  # pyright: ignore


def test_no_line_of_metadata_hides_what_a_proxy_has_added():
    with Grpc(trusted_proxies="127.0.0.0/8") as server:
        seen = []
        identify = server.engine.identify

        def watched(**options):
            seen.append(identify(**options).id)
            return identify(**options)

        server.engine.identify = watched
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            infer = channel.unary_unary(GRPC_INFER)
            for lines in (["6.6.6.6", "192.0.2.7"], ["6.6.6.6, 192.0.2.7:52344, 127.0.0.9"]):
                metadata = [("x-forwarded-for", line) for line in lines]
                infer(request(), metadata=metadata, timeout=PATIENCE)
            with pytest.raises(grpc.RpcError) as caught:
                infer(request(), metadata=[("x-api-key", "a")] * 2, timeout=PATIENCE)
            assert caught.value.code().name == "INVALID_ARGUMENT"
        assert seen == ["192.0.2.7"] * 2


@pytest.mark.parametrize(
    "raw", [b"", b"\xff", b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x05ab", b"\x0b", b"\x3a"]
)
def test_bytes_that_are_no_message_are_left_to_the_parser(raw):
    assert split_raw_contents(raw) == (raw, [])


def test_a_message_is_split_without_a_change():
    message = MESSAGES["ModelInferRequest"].FromString(request(100))
    message.parameters["timeout"].int64_param = -1
    message.raw_input_contents.append(b"")
    data = message.SerializeToString()
    rest, raw = split_raw_contents(data)
    assert [bytes(view) for view in raw] == list(message.raw_input_contents)
    message.ClearField("raw_input_contents")
    assert MESSAGES["ModelInferRequest"].FromString(bytes(rest)) == message


def test_a_port_on_an_ipv6_address_is_served():
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 loopback on this machine, so this test did not run")
    with served(small_engine()) as service:
        server = GrpcServer(service.server.transport, "::1", 0)
        server.start()
        with grpc.insecure_channel(f"[::1]:{server.port}") as channel:
            live = channel.unary_unary(
                f"/{SERVICE}/ServerLive",
                response_deserializer=MESSAGES["ServerLiveResponse"].FromString,
            )
            assert live(b"", timeout=PATIENCE).live
        server.stop(0.5).wait()
