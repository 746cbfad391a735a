"""Clients for the checks: requests in the binary protocol, in threads, to loopback, bounded."""

from __future__ import annotations

import collections
import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Callable

import numpy as np


def infer_body(x: np.ndarray, *, timeout_microseconds: int = 0) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request to route x f32[B, S, D]."""
    tensor = {
        "name": "hidden_states", "shape": list(x.shape), "datatype": "FP32",
        "parameters": {"binary_data_size": x.nbytes},
    }  # fmt: skip
    asked = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    if timeout_microseconds:
        asked["parameters"]["timeout"] = timeout_microseconds
    head = json.dumps(asked).encode()
    return head + x.tobytes(), {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }


class Connection:
    """One kept connection, as a client library has it."""

    def __init__(self, port: int, *, seconds: float = 60.0) -> None:
        self._make: Callable[[], http.client.HTTPConnection] = lambda: http.client.HTTPConnection(
            "127.0.0.1", port, timeout=seconds
        )
        self._connection: http.client.HTTPConnection | None = None

    def post(self, body: bytes, headers: dict[str, str], *, client: str = "") -> int:
        """The status; 0 where no answer came."""
        sent = dict(headers)
        if client:
            sent["X-Forwarded-For"] = client
        if self._connection is None:
            self._connection = self._make()
        try:
            self._connection.request("POST", "/v2/models/router/infer", body, sent)
            answer = self._connection.getresponse()
            answer.read()
            if answer.will_close:
                self.close()
            return answer.status
        except (OSError, http.client.HTTPException):
            self.close()
            return 0

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


@dataclasses.dataclass
class Mix:
    """What the steady traffic is made of; changed while it runs."""

    per_second: float = 15.0
    repeated: float = 0.8
    malformed: float = 0.02
    nonfinite: float = 0.02
    ports: tuple[int, ...] = ()


class Traffic:
    """Steady traffic from a few threads until stopped: repeated and new inputs, some of them bad.

    Args:
        width: D.
        mix: what it is made of.
        seconds: it stops by itself after so long.
    """

    def __init__(self, width: int, mix: Mix, *, seconds: float = 900.0, threads: int = 3) -> None:
        self.mix, self.statuses = mix, collections.Counter[int]()
        self._width, self._end, self._count = width, time.monotonic() + seconds, threads
        self._stop = threading.Event()
        rng = np.random.default_rng(1)
        self._pool = [self._one(rng) for _ in range(24)]
        self._threads = [
            threading.Thread(target=self._send, args=(i,), daemon=True) for i in range(threads)
        ]

    def _one(self, rng: np.random.Generator) -> np.ndarray:
        return rng.standard_normal((2, 16, self._width), dtype=np.float32)

    def _send(self, number: int) -> None:
        rng = np.random.default_rng(100 + number)
        connections: dict[int, Connection] = {}
        step, order = number, rng.permutation(len(self._pool))
        while not self._stop.is_set() and time.monotonic() < self._end:
            mix = self.mix
            port = mix.ports[step % len(mix.ports)]
            connection = connections.setdefault(port, Connection(port))
            kind = rng.random()
            if kind < mix.malformed:
                # Clients of their own, so that their blocks are theirs alone.
                client = f"10.9.{step % 4}.1"
                self.statuses[
                    connection.post(b"{", {"Content-Type": "text/plain"}, client=client)
                ] += 1
            else:
                if rng.random() < mix.repeated:
                    x = self._pool[order[step % len(order)]]
                else:
                    x = self._one(rng)
                    if kind < mix.malformed + mix.nonfinite:
                        x[0, 0, 0] = np.nan
                client = f"10.1.{number}.{step % 8}"
                self.statuses[connection.post(*infer_body(x), client=client)] += 1
            step += 1
            self._stop.wait(self._count / mix.per_second)
        for connection in connections.values():
            connection.close()

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)


def burst(
    port: int, x: np.ndarray, *, requests: int, threads: int = 4, timeout_microseconds: int = 0,
    until: Callable[[], bool] = lambda: False, client: str = "10.2.0.1",
) -> collections.Counter[int]:  # fmt: skip
    """At most so many requests with x from several threads; stops early once ``until`` holds."""
    body, headers = infer_body(x, timeout_microseconds=timeout_microseconds)
    statuses, left, lock = collections.Counter[int](), [requests], threading.Lock()

    def send(number: int) -> None:
        connection = Connection(port)
        # Each body its own, so that no cache answers.
        own, at = bytearray(body), len(body) - 4
        while not until():
            with lock:
                if left[0] <= 0:
                    break
                left[0] -= 1
                noise = np.float32(1e-6 * left[0] + number).tobytes()
            own[at:] = noise
            statuses[connection.post(bytes(own), headers, client=client)] += 1
        connection.close()

    running = [threading.Thread(target=send, args=(i,), daemon=True) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(120)
    return statuses
