"""A served engine for tests: small, on a free port, in a thread of this process."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

from moe_jax.config import load_config
from moe_jax.serving.engine import RouterEngine
from moe_jax.serving.http.server import Server, bind

WIDTH = 16
SMALL: dict[str, Any] = dict(
    input_dim=WIDTH,
    buckets="8,64",
    serve_moe="on",
    security_level="minimal",
    drain_seconds=0.0,
    log_level="CRITICAL",
    max_inflight=2,
)


def small_engine(logger: Any = None, **settings: Any) -> RouterEngine:
    return RouterEngine(load_config(env={}, **{**SMALL, **settings}), logger=logger)


class Served:
    """An engine behind HTTP at ``127.0.0.1:port``."""

    def __init__(self, engine: RouterEngine, server: Server, port: int) -> None:
        self.engine, self.server, self.port = engine, server, port
        self.address = f"127.0.0.1:{port}"

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] = {},  # noqa: B006
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers with lower-case names, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            received = {name.lower(): value for name, value in response.getheaders()}
            return response.status, received, response.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, value: Any = None, **headers: str) -> tuple[int, Any]:
        body = None if value is None else json.dumps(value).encode()
        status, _, data = self.request(method, path, body, headers)
        return status, json.loads(data)


@contextlib.contextmanager
def served(engine: RouterEngine) -> Iterator[Served]:
    """Serves an engine until the end of the block, and ends it by the same path as a signal."""
    sock = bind("127.0.0.1", 0)
    server = Server(engine)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield Served(engine, server, sock.getsockname()[1])
    finally:
        server.handle_exit(15, None)
        thread.join(60)
        engine.shutdown()
    assert not thread.is_alive()


def tensor(x: Any, **more: Any) -> dict[str, Any]:
    """An input of a JSON request."""
    return {
        "name": "hidden_states",
        "shape": list(x.shape),
        "datatype": "FP32",
        "data": x.reshape(-1).tolist(),
        **more,
    }
