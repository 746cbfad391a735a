"""Clients for the checks: requests in the binary protocol, from a few threads, to loopback."""

from __future__ import annotations

import collections
import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, Self, TypeVar

import numpy as np

INFER = "/v2/models/router/infer"


def infer_body(x: np.ndarray, *, timeout_microseconds: int = 0) -> tuple[bytes, dict[str, str]]:
    """Returns body and headers of a request that routes x f32[B, S, D]."""
    tensor = {
        "name": "hidden_states",
        "shape": list(x.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": x.nbytes},
    }
    document = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    if timeout_microseconds:
        document["parameters"]["timeout"] = timeout_microseconds
    head = json.dumps(document).encode()
    return head + x.tobytes(), {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }


class Connection:
    """One kept connection, as a client library has it."""

    def __init__(self, port: int, *, seconds: float = 60.0) -> None:
        self._port, self._seconds = port, seconds
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> int:
        """Sends a request and returns its status; 0 where no answer came."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection(
                "127.0.0.1", self._port, timeout=self._seconds
            )
        try:
            self._connection.request(method, path, body, headers)
            answer = self._connection.getresponse()
            answer.read()
            if answer.will_close:
                self.close()
            return answer.status
        except (OSError, http.client.HTTPException):
            self.close()
            return 0

    def post(self, body: bytes, headers: dict[str, str], *, client: str = "") -> int:
        """Asks the model ``router``, for a client with its own address."""
        forwarded = {"X-Forwarded-For": client} if client else {}
        return self.ask("POST", INFER, body, headers | forwarded)

    def infer(self, x: np.ndarray, *, client: str = "") -> int:
        """Routes x f32[B, S, D] and returns the status."""
        body, headers = infer_body(x)
        return self.post(body, headers, client=client)

    def close(self) -> None:
        """Closes the connection; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None


Outcome = TypeVar("Outcome", bound=Hashable)
_Returned = TypeVar("_Returned", bound=Hashable, covariant=True)


class Sender(Protocol[_Returned]):
    """What one thread of a ``Load`` sends."""

    def __call__(self) -> _Returned:
        """Sends a request and returns its outcome, which the load counts."""
        ...

    def close(self) -> None:
        """Closes its connections."""
        ...


class Load(Generic[Outcome]):
    """Requests from a few threads, as a context manager: until it is left or its time is over.

    Args:
        sender: number of a thread -> what it sends.
        threads: how many.
        seconds: the load ends by itself after this time.
        per_second: requests a second of all threads together, read before each; None: one after the
            other.
        most: ends the load after this number of requests.
        done: ends the load once it returns True; asked before each request.
    """

    def __init__(
        self,
        sender: Callable[[int], Sender[Outcome]],
        *,
        threads: int = 4,
        seconds: float = 300.0,
        per_second: Callable[[], float] | None = None,
        most: int | None = None,
        done: Callable[[], bool] = lambda: False,
    ) -> None:
        self.outcomes = collections.Counter[Outcome]()
        self._sender, self._done, self._most = sender, done, most
        self._per_second, self._seconds = per_second, seconds
        self._started, self._end = 0, 0.0
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [
            threading.Thread(target=self._send, args=(i,), daemon=True) for i in range(threads)
        ]

    @property
    def under_way(self) -> bool:
        """Whether any thread still sends."""
        return any(thread.is_alive() for thread in self._threads)

    @property
    def total(self) -> int:
        """Requests that have an outcome."""
        with self._lock:
            return sum(self.outcomes.values())

    def goes_on(self, sender: Sender[Outcome]) -> bool:
        """Whether a thread sends another request."""
        return time.monotonic() < self._end

    def run(self) -> collections.Counter[Outcome]:
        """Sends until the load ends by itself and returns the outcomes."""
        with self:
            for thread in self._threads:
                thread.join(self._seconds + 120)
        return self.outcomes

    def __enter__(self) -> Self:
        self._end = time.monotonic() + self._seconds
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _send(self, number: int) -> None:
        sender, due = self._sender(number), time.monotonic()
        while not self._stop.is_set() and self.goes_on(sender) and not self._done():
            with self._lock:
                if self._started == self._most:
                    break
                self._started += 1
            outcome = sender()
            with self._lock:
                self.outcomes[outcome] += 1
            if self._per_second is not None:
                # A load that fell behind catches up by at most a second.
                due = max(due + len(self._threads) / self._per_second(), time.monotonic() - 1.0)
                self._stop.wait(max(0.0, due - time.monotonic()))
        sender.close()


class NewInputs:
    """Sends inputs that no cache has, each from one of a hundred addresses."""

    def __init__(self, port: int, number: int, *, width: int) -> None:
        self._connection, self._number, self._width = Connection(port), number, width
        self._rng, self._step = np.random.default_rng(number), 0

    def __call__(self) -> int:
        """Sends 16 tokens and returns the status."""
        self._step += 1
        x = self._rng.standard_normal((1, 16, self._width), dtype=np.float32)
        return self._connection.infer(x, client=f"10.{self._number}.{self._step % 100}.1")

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()


class Repeats:
    """Sends one input again and again, as it is or with a last number that changes each time."""

    def __init__(
        self,
        port: int,
        x: np.ndarray,
        *,
        number: int = 0,
        changing: bool = True,
        timeout_microseconds: int = 0,
        client: str = "",
    ) -> None:
        self._connection, self._client, self._changing = Connection(port), client, changing
        body, self._headers = infer_body(x, timeout_microseconds=timeout_microseconds)
        self._body, self._number, self._step = bytearray(body), number, 0

    def __call__(self) -> int:
        """Sends the input and returns the status."""
        self._step += 1
        if self._changing:
            # Small enough to leave the routing of the other tokens as it is.
            self._body[-4:] = np.float32(1e-6 * self._step + self._number).tobytes()
        return self._connection.post(bytes(self._body), self._headers, client=self._client)

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()


@dataclasses.dataclass
class Mix:
    """Shares of a mixed load; changed while it runs."""

    per_second: float = 15.0
    repeated: float = 0.8
    malformed: float = 0.02
    nonfinite: float = 0.02
    ports: tuple[int, ...] = ()


class MixedInputs:
    """Sends repeated and new inputs to several instances in turn, some of them bad.

    Args:
        mix: shares and ports.
        number: of the thread, so that its clients are its own.
        width: D.
    """

    def __init__(self, mix: Mix, number: int, *, width: int) -> None:
        self._mix, self._number, self._width, self._step = mix, number, width, number
        # Every thread repeats the same inputs, in an order of its own.
        pool = np.random.default_rng(1)
        self._pool = [self._states(pool) for _ in range(24)]
        self._rng = np.random.default_rng(100 + number)
        self._order = self._rng.permutation(len(self._pool))
        self._connections: dict[int, Connection] = {}

    def __call__(self) -> int:
        """Sends a request and returns the status."""
        mix, kind, step = self._mix, self._rng.random(), self._step
        self._step += 1
        port = mix.ports[step % len(mix.ports)]
        connection = self._connections.setdefault(port, Connection(port))
        if kind < mix.malformed:
            # Separate clients, so that a block stops no good request.
            headers = {"Content-Type": "text/plain"}
            return connection.post(b"{", headers, client=f"10.9.{step % 4}.1")
        if self._rng.random() < mix.repeated:
            x = self._pool[self._order[step % len(self._order)]]
        else:
            x = self._states(self._rng)
            if kind < mix.malformed + mix.nonfinite:
                x[0, 0, 0] = np.nan
        return connection.infer(x, client=f"10.1.{self._number}.{step % 8}")

    def close(self) -> None:
        """Closes the connections."""
        for connection in self._connections.values():
            connection.close()

    def _states(self, rng: np.random.Generator) -> np.ndarray:
        return rng.standard_normal((2, 16, self._width), dtype=np.float32)
