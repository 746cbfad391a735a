"""The service as a process: commands against it, a crowd, signals, and an end that loses no request.

One process for the whole file; the last test ends it.
"""

import asyncio
import contextlib
import http.client
import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from deploy.verify.processes import free_port
from moe_jax.cli import app
from moe_jax.serving.http.server import Server
from tests.serving.served import WIDTH, small_engine, tensor

ROOT = Path(__file__).parents[3]
INFER = "/v2/models/router/infer"
X = np.random.default_rng(0).standard_normal((2, 4, WIDTH), dtype=np.float32)
BODY = json.dumps({"inputs": [tensor(X)]}).encode()
# How long it drains is said by a second signal, not by a clock that a busy machine outruns.
DRAIN = 600
PATIENCE = 120.0  # seconds after which a step counts as hung
runner = CliRunner()


class Process:
    """``moe-jax serve`` in a process of its own."""

    def __init__(self) -> None:
        self.seen: list[dict] = []
        self.start(port=free_port())

    def start(self, port: int) -> None:
        settings = {
            "INPUT_DIM": WIDTH,
            "BUCKETS": "8,64",
            "SECURITY_LEVEL": "minimal",
            "LOG_LEVEL": "INFO",
            "DRAIN_SECONDS": DRAIN,
            "REQUEST_TIMEOUT_SECONDS": 120,
            "ADMIN_KEY": "operator",
            "MAX_INFLIGHT": 2,
            "MAX_QUEUE": 16,
        }
        env = {k: v for k, v in os.environ.items() if not k.startswith("MOE_")}
        env |= {f"MOE_{name}": str(value) for name, value in settings.items()}
        env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        env.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
        command = [sys.executable, "-m", "moe_jax.cli", "serve"]
        command += ["--port", str(port), "--grpc-port", "0"]
        self.popen = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._collect, daemon=True)
        self.reader.start()
        ports = [self.event("listening") for _ in range(2)]
        self.port = next(line["port"] for line in ports if line["protocol"] == "http")
        self.grpc_port = next(line["port"] for line in ports if line["protocol"] == "grpc")
        self.url = f"http://127.0.0.1:{self.port}"
        self.event("engine_ready")

    def _collect(self) -> None:
        stdout, lines = self.popen.stdout, self.lines
        assert stdout is not None
        for line in stdout:
            lines.put(line)

    def answer(self) -> dict:
        """What the service says of ``BODY``, without what differs from request to request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("POST", INFER, BODY, {"Content-Type": "application/json"})
            actual = json.loads(connection.getresponse().read())
        return {name: actual[name] for name in ("model_version", "outputs")}

    def event(self, name: str) -> dict:
        """The next log line of this event."""
        deadline = time.monotonic() + PATIENCE
        while True:
            line = self.lines.get(timeout=max(0.01, deadline - time.monotonic()))
            entry = json.loads(line)  # every line is JSON
            self.seen.append(entry)
            if entry["event"] == name:
                return entry

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()


def until(true, every: float = 0.01) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(every)


@pytest.fixture(scope="module")
def process():
    started = Process()
    yield started
    if started.popen.poll() is None:
        started.popen.kill()
    started.popen.wait(PATIENCE)
    assert started.popen.stdout is not None
    started.popen.stdout.close()


def test_smoke_says_yes(process):
    result = runner.invoke(app, ["smoke", process.url, "--json"])
    assert result.exit_code == 0, result.output
    assert [c["check"] for c in json.loads(result.stdout)["checks"]] == [
        "live",
        "ready",
        "health",
        "routes a batch",
        "metrics",
    ]


def test_smoke_says_no_where_nothing_answers():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # held, so that nobody else can listen there
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        result = runner.invoke(app, ["smoke", url])
        assert result.exit_code == 1
        assert result.output.count("Is it running there?") == 1  # said once, not for every check
        assert result.output.count("not tried") == 4


def test_route_asks_the_service(process, tmp_path):
    np.save(tmp_path / "x.npy", X)
    saved = tmp_path / "routing.npz"
    result = runner.invoke(
        app,
        ["route", str(tmp_path / "x.npy"), "--url", process.url, "--json", "--save", str(saved)],
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["tokens"] == 8
    assert sum(report["expert_utilization"]) == pytest.approx(1.0)
    assert sum(report["experts_per_token_histogram"]) == pytest.approx(1.0)
    with np.load(saved) as arrays:
        assert arrays["num_experts_per_token"].mean() == report["mean_experts_per_token"]
    shown = runner.invoke(app, ["route", str(tmp_path / "x.npy"), "--url", process.url])
    assert "experts used" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["smoke", "ftp://x"], "expected one such as"),
        (["smoke", "http://127.0.0.1:1/v2/"], "Leave /v2 out"),
        (["smoke", "http://127.0.0.1:1/\u00fc"], "expected one such as"),
        (["reload", "http://127.0.0.1:99999"], "expected one such as"),
        (["route", "X", "--url", "http://127.0.0.1:1"], "Is it running"),
        (["route", "X", "--url", "http://127.0.0.1:1", "--target-mean-k", "2"], "Leave them out"),
        (["serve", "--checkpoint", "/nowhere/at/all", "--port", "0"], "expected a"),
        (["serve", "--port", "70000"], "from 0 to 65535"),
        (["serve", "--config", "/nowhere.json"], "readable JSON"),
    ],
)
def test_wrong_input_is_exit_code_2_and_says_what_to_do(tmp_path, arguments, said):
    np.save(tmp_path / "x.npy", X)
    given = [str(tmp_path / "x.npy") if a == "X" else a for a in arguments]
    result = runner.invoke(app, given, env={"MOE_LOG_LEVEL": "CRITICAL"})
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())


def test_a_failed_start_says_why_once():
    result = runner.invoke(app, ["serve", "--checkpoint", "/nowhere/at/all", "--port", "0"])
    assert result.exit_code == 2, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    [failed] = [line for line in lines if line["event"] == "load_failed"]
    assert "MOE_CHECKPOINT (or --checkpoint): /nowhere/at/all" in failed["error"]
    assert "cannot start. The log line load_failed says why" in " ".join(result.stderr.split())
    assert "/nowhere" not in result.stderr


def test_a_port_that_is_taken_is_exit_code_2():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = runner.invoke(app, ["serve", "--port", port])
    assert result.exit_code == 2
    assert "another --host or --port" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "999.1.1.1"], "host: expected"),
        (["--host", "127.0.0.1", "--grpc-port", "TAKEN"], "another --host or --port"),
    ],
)
def test_an_address_of_either_transport_is_checked_before_anything_is_loaded(arguments, said):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [str(taken.getsockname()[1]) if a == "TAKEN" else a for a in arguments]
        result = runner.invoke(app, ["serve", "--port", "0", *words])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_reload_needs_the_admin_key(process):
    refused = runner.invoke(app, ["reload", process.url])
    assert refused.exit_code == 1
    assert "admin key" in " ".join(refused.stderr.split())
    wrong = ["reload", process.url, "--admin-key", "operator", "--checkpoint", "/nowhere"]
    refused = runner.invoke(app, wrong)
    assert refused.exit_code == 1
    assert "old checkpoint stays in service" in " ".join(refused.stderr.split())
    done = runner.invoke(app, ["reload", process.url, "--admin-key", "operator", "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["version"] == answer["previous"]
    done = runner.invoke(app, ["reload", process.url, "--admin-key", "operator"])
    assert f'version: "{answer["version"]}"' in done.stdout.splitlines()


def test_sighup_reloads(process):
    while not process.lines.empty():
        process.seen.append(json.loads(process.lines.get()))
    process.popen.send_signal(signal.SIGHUP)
    assert process.event("reloaded")["version"]
    assert process.get("/ready")[0] == 200


def test_grpc_serves_the_same(process):
    import tritonclient.grpc as triton

    given = triton.InferInput("hidden_states", list(X.shape), "FP32")
    given.set_data_from_numpy(X)
    with triton.InferenceServerClient(f"127.0.0.1:{process.grpc_port}") as client:
        actual = client.infer("router", [given], client_timeout=PATIENCE)
    assert actual.as_numpy("expert_indices").shape == (2, 4, 4)


def test_a_thousand_clients_at_once_are_answered_or_told_to_come_back(process):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip(f"1,000 connections need 4,096 open files, the limit here is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    message = head.encode() + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY

    async def one():
        reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
        writer.write(message)
        data = await reader.read()
        writer.close()
        await writer.wait_closed()
        head, _, body = data.partition(b"\r\n\r\n")
        return int(head.split()[1]), b"retry-after" in head, json.loads(body)

    async def crowd():
        return await asyncio.wait_for(asyncio.gather(*(one() for _ in range(1000))), PATIENCE)

    try:
        answers = asyncio.run(crowd())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(answers) == 1000
    for status, told_when, body in answers:
        assert status in (200, 503)
        assert status == 200 or (told_when and body["code"] == "queue_full")
    assert sum(status == 200 for status, _, _ in answers) >= 18  # what may wait, at the very least
    assert process.get("/ready")[0] == 200


def test_a_second_signal_skips_the_wait():
    with small_engine(drain_seconds=3600.0) as engine:
        server = Server(engine)
        server.handle_exit(signal.SIGTERM, None)
        assert asyncio.run(server.on_tick(1)) is False
        assert engine.readiness() == (False, ["draining"])
        server.handle_exit(signal.SIGTERM, None)
        assert asyncio.run(server.on_tick(2)) is True
        server.transport.close()


def test_without_a_second_signal_the_wait_ends_by_itself():
    with small_engine(drain_seconds=0.05) as engine:
        server = Server(engine)
        server.handle_exit(signal.SIGTERM, None)
        assert asyncio.run(server.on_tick(1)) is False
        until(lambda: asyncio.run(server.on_tick(2)))
        server.transport.close()


class Worker(threading.Thread):
    """A client that keeps its connection, and goes elsewhere once it is told to."""

    def __init__(self, port: int, leave: threading.Event) -> None:
        super().__init__()
        self.port, self.leave = port, leave
        self.answered, self.lost = 0, []

    def more(self, count: int) -> None:
        """Waits until so many further requests were answered, or one was lost."""
        wanted = self.answered + count
        until(lambda: self.answered >= wanted or self.lost)

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        while not self.leave.is_set():
            try:
                connection.request("POST", INFER, BODY)
                response = connection.getresponse()
                response.read()
                assert response.status == 200, response.status
                self.answered += 1
            except Exception as error:
                self.lost.append(repr(error))
                connection.close()
        connection.close()


def test_a_killed_service_started_again_on_its_port_answers_the_same(process):
    before = process.answer()
    process.popen.kill()
    assert process.popen.wait(PATIENCE) == -signal.SIGKILL
    process.reader.join(PATIENCE)
    process.popen.stdout.close()
    process.start(port=process.port)
    assert process.get("/v2/health/ready")[0] == 200
    assert process.answer() == before


def test_sigterm_under_load_loses_no_request(process):
    leave = threading.Event()
    workers = [Worker(process.port, leave) for _ in range(4)]
    for worker in workers:
        worker.start()
    # A request that is half sent when the signal comes, and whole long after the socket is closed.
    slow = socket.create_connection(("127.0.0.1", process.port), timeout=PATIENCE)
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    slow.sendall(head + BODY[:100])
    for worker in workers:
        worker.more(3)
    process.popen.send_signal(signal.SIGTERM)
    process.event("draining")
    # Not ready, and still answering: this is the time in which load balancers notice.
    status, answer = process.get("/ready")
    assert status == 503
    assert json.loads(answer)["reasons"] == ["draining"]
    for worker in workers:
        worker.more(3)
    leave.set()
    for worker in workers:
        worker.join(PATIENCE)
    assert [w.lost for w in workers] == [[]] * 4
    process.popen.send_signal(signal.SIGTERM)  # enough of waiting

    def nobody_listens() -> bool:
        try:
            socket.create_connection(("127.0.0.1", process.port), timeout=PATIENCE).close()
        except ConnectionRefusedError:
            return True
        return False

    until(nobody_listens, every=0.05)
    assert process.popen.poll() is None
    slow.sendall(BODY[100:])
    with contextlib.closing(slow), slow.makefile("rb") as stream:
        assert b" 200 " in stream.readline()
        assert b'"expert_indices"' in stream.read()
    assert process.popen.wait(PATIENCE) == 0
