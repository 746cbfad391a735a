"""Real proxies and clients in front of the service: HAProxy, nginx, curl, Java's HttpClient.

A test whose program is not installed says so and does not run.
"""

import contextlib
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from deploy.verify.processes import free_port
from tests.serving.served import WIDTH, served, small_engine, tensor

INFER = "/v2/models/router/infer"
BODY = json.dumps({"inputs": [tensor(np.ones((1, 2, WIDTH), np.float32))]}).encode()
PATIENCE = 60.0  # seconds after which a step counts as hung


def program(name: str) -> str:
    """Path of a program; skips the test if it is not installed."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed, so this test did not run")
    return path


HAPROXY = """
global
  maxconn 100
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend f
  bind 127.0.0.1:{port}
  http-request del-header X-Forwarded-For
  http-request set-header X-Forwarded-For %[src]
  default_backend b
backend b
  server s 127.0.0.1:{upstream}
"""

NGINX = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://127.0.0.1:{upstream};
      proxy_http_version 1.1;
      proxy_request_buffering off;
      proxy_set_header Host $host;
      proxy_set_header Connection "";
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    }}
  }}
}}
"""


@contextlib.contextmanager
def running(command: list[str], port: int):
    """A proxy as a process that listens on ``port``."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None, f"{command[0]} ended"
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


def haproxy_command(folder: Path, port: int, upstream: int) -> list[str]:
    file = folder / "haproxy.cfg"
    file.write_text(HAPROXY.format(port=port, upstream=upstream))
    return [program("haproxy"), "-db", "-f", str(file)]


def nginx_command(folder: Path, port: int, upstream: int) -> list[str]:
    file = folder / "nginx.conf"
    file.write_text(NGINX.format(port=port, upstream=upstream, folder=folder))
    return [program("nginx"), "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(file)]


PROXIES = {"HAProxy": haproxy_command, "nginx": nginx_command}


@pytest.fixture(scope="module")
def service():
    """A service that trusts this machine's proxies, with a limit of three requests a minute."""
    with served(
        small_engine(
            security_level="standard",
            trusted_proxies="127.0.0.1",
            rate_limit_requests=3,
        )
    ) as started:
        yield started


@pytest.fixture(scope="module", params=PROXIES)
def proxy(request, service, tmp_path_factory):
    """The port of a proxy in front of the service."""
    port = free_port()
    command = PROXIES[request.param](tmp_path_factory.mktemp("proxy"), port, service.port)
    with running(command, port):
        yield port


def sent(port: int, data: bytes, source: str = "127.0.0.5") -> int:
    """The status of a raw request from the address ``source``, which no proxy has."""
    with socket.create_connection(
        ("127.0.0.1", port), timeout=PATIENCE, source_address=(source, 0)
    ) as sock:
        sock.sendall(data)
        with sock.makefile("rb") as stream:
            return int(stream.readline().split()[1])


def chunked(headers: str = "", trailers: str = "") -> bytes:
    head = (
        f"POST {INFER} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"
    )
    return (
        f"{head}{headers}\r\n{len(BODY):x}\r\n".encode()
        + BODY
        + f"\r\n0\r\n{trailers}\r\n".encode()
    )


@pytest.fixture
def clients(service):
    """The identities that the engine counts requests under, newest last."""
    seen: list[str] = []
    identify = service.engine.identify

    def watched(**options):
        client = identify(**options)
        seen.append(client.id)
        return client

    service.engine.identify = watched
    yield seen
    del service.engine.identify


def test_a_trailer_is_never_the_clients_address(service, proxy, clients):
    """HAProxy passes trailers on: one that names an address must not count as a header."""
    for number in range(5):
        address = f"9.9.9.{number}"
        sent(proxy, chunked(trailers=f"X-Forwarded-For: {address}\r\nX-API-Key: mallory\r\n"))
    assert clients == ["127.0.0.5"] * 5


def test_an_address_that_a_client_claims_is_not_believed(service, proxy, clients):
    for number in range(5):
        claimed = f"X-Forwarded-For: 9.9.9.{number}\r\n"
        sent(proxy, chunked(claimed * 2), source="127.0.0.6")
    assert clients == ["127.0.0.6"] * 5


def test_each_client_behind_a_proxy_has_its_own_limit(service, proxy):
    network = f"127.{proxy % 200}.{proxy // 200 % 200}"  # others than the other proxy's clients
    for host in (7, 8):
        statuses = [sent(proxy, chunked(), source=f"{network}.{host}") for _ in range(4)]
        assert statuses == [200, 200, 200, 429]


def test_reload_through_a_proxy_needs_the_key(service, proxy):
    head = "POST /admin/reload HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    body = b'{"checkpoint": "/etc"}'
    framed = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    assert sent(proxy, framed, source="127.0.0.9") == 404


# --- clients that offer HTTP/2 ------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain():
    with served(small_engine()) as started:
        yield started


@pytest.mark.parametrize(
    "body", [BODY, BODY + b" " * 2_000_000], ids=["small", "with 100-continue"]
)
def test_curl_that_offers_http_2_is_answered(plain, tmp_path, body):
    (tmp_path / "body").write_bytes(body)
    command = [
        program("curl"),
        "--http2",
        "-sS",
        "-m",
        "60",
        "-w",
        "%{http_code}",
        "-o",
        "/dev/null",
        "-H",
        "Content-Type: application/json",
        "--data-binary",
        f"@{tmp_path / 'body'}",
        f"http://{plain.address}{INFER}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (result.returncode, result.stdout) == (0, "200"), result.stderr


JAVA = """
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.file.Path;

class Ask {
  public static void main(String[] words) throws Exception {
    HttpClient client = HttpClient.newHttpClient();  // offers h2c by default
    for (int i = 0; i < 3; i++) {
      HttpRequest request = HttpRequest.newBuilder(URI.create(words[0]))
          .header("Content-Type", "application/json")
          .POST(HttpRequest.BodyPublishers.ofFile(Path.of(words[1]))).build();
      System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).statusCode());
    }
  }
}
"""


def test_javas_client_is_answered(plain, tmp_path):
    java = program("java")
    (tmp_path / "Ask.java").write_text(JAVA)
    (tmp_path / "body").write_bytes(BODY)
    command = [
        java,
        "-Xshare:auto",
        str(tmp_path / "Ask.java"),
        f"http://{plain.address}{INFER}",
        str(tmp_path / "body"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "compiler" in result.stderr:
        pytest.skip("java has no compiler module, so this test did not run")
    assert result.stdout.split() == ["200"] * 3, result.stderr
