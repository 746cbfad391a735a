"""The service over HTTP against a bare ASGI application that echoes the same body, plus the route.

Servers run in processes of their own; clients are threads here that write prepared bytes to kept
connections, so that what is timed is the server. Every round takes the floor, the cases and the bare
jitted route in turns.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np

CASES = ("binary off", "binary hit", "binary miss", "json off")
_PATH = "/v2/models/router/infer"
Make = Callable[[int], bytes | bytearray]


# --- servers, in processes of their own -------------------------------------------------------


def _echo_server(tell: Connection) -> None:
    import uvicorn

    from moe_jax.serving.http.server import bind

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        answer = bytes(body) if scope["path"] == "/echo" else b"{}"
        length = str(len(answer)).encode()
        headers = [(b"content-type", b"application/octet-stream"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    sock = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        app, http="httptools", loop="asyncio", lifespan="off", log_config=None, access_log=False
    )
    tell.send(sock.getsockname()[1])
    uvicorn.Server(config).run(sockets=[sock])


def _our_server(tell: Connection, settings: dict[str, Any]) -> None:
    from moe_jax.config import load_config
    from moe_jax.serving.engine import RouterEngine
    from moe_jax.serving.http.server import Server, bind

    sock = bind("127.0.0.1", 0)
    with RouterEngine(load_config(env={}, **settings)) as engine:
        server = Server(engine)
        tell.send(sock.getsockname()[1])
        server.run(sockets=[sock])


@contextlib.contextmanager
def _process(target: Callable[..., None], *args: Any) -> Iterator[int]:
    """Yields the port of a server while its process runs."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(sender, *args), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(120):
            raise RuntimeError("bench: expected the server to start within 120 s, it did not.")
        port = receiver.recv()
        _wait(port)
        yield port
    finally:
        receiver.close()
        process.terminate()
        process.join(30)


def _wait(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


# --- clients ----------------------------------------------------------------------------------


class _Caller:
    """One connection that is kept open between requests."""

    def __init__(self, port: int) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(1 << 20)

    def __call__(self, message: bytes | bytearray) -> None:
        self._sock.sendall(message)
        view, have, need = memoryview(self._buffer), 0, None
        while need is None or have < need:
            # What is past the head is only counted: nothing of the answer is kept.
            got = self._sock.recv_into(view[min(have, 65536) :])
            if got == 0:
                raise ConnectionError("bench: the server closed the connection")
            have += got
            if need is None and (end := self._buffer.find(b"\r\n\r\n", 0, have)) >= 0:
                head = bytes(self._buffer[:end]).lower()
                if b" 200 " not in head[:16]:
                    raise RuntimeError(f"bench: {bytes(self._buffer[:500])!r}")
                need = end + 4 + int(head.split(b"content-length:")[1].split(b"\r\n")[0])

    def close(self) -> None:
        self._sock.close()


def _load(port: int, make: Make, clients: int, seconds: float) -> tuple[float, float]:
    """Seconds a request by the wall clock, and median latency, of so many clients at once."""
    latencies: list[list[float]] = [[] for _ in range(clients)]
    failed: list[BaseException] = []
    start_together = threading.Barrier(clients)
    begun = [0.0] * clients

    def run(i: int) -> None:
        caller = _Caller(port)
        try:
            caller(make(i))
            start_together.wait()
            begun[i] = time.perf_counter()
            number = 0
            while (before := time.perf_counter()) < begun[i] + seconds or number < 3:
                message = make(i + clients * (number + 1))
                before = time.perf_counter()
                caller(message)
                latencies[i].append(time.perf_counter() - before)
                number += 1
        except BaseException as error:
            failed.append(error)
            start_together.abort()
        finally:
            caller.close()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    wall = time.perf_counter() - min(begun)
    every = [seconds for each in latencies for seconds in each]
    return wall / len(every), statistics.median(every)


def _message(path: str, head: bytes, data: bytes, binary: bool) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: bench", f"Content-Length: {len(head) + len(data)}"]
    if binary:
        lines.append(f"Inference-Header-Content-Length: {len(head)}")
    return "\r\n".join([*lines, "", ""]).encode() + head + data


def _requests(x: np.ndarray) -> tuple[dict[str, Make], bytes]:
    """Returns what each case sends, by the number of the request, and the body for the floor."""
    tensor: dict[str, Any] = {"name": "hidden_states", "shape": list(x.shape), "datatype": "FP32"}
    text = json.dumps({"inputs": [tensor | {"data": x.reshape(-1).tolist()}]}).encode()
    tensor["parameters"] = {"binary_data_size": x.nbytes}
    asked = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    head, data = json.dumps(asked).encode(), x.tobytes()
    binary = _message(_PATH, head, data, True)
    as_json = _message(_PATH, text, b"", False)
    start = len(binary) - len(data)
    lock, count = threading.Lock(), [0]

    def fresh(_: int) -> bytearray:
        message = bytearray(binary)
        with lock:
            count[0] += 1
            struct.pack_into("<f", message, start, float(count[0]))
        return message

    makers: dict[str, Make] = {
        "binary off": lambda _: binary,
        "binary hit": lambda _: binary,
        "binary miss": fresh,
        "json off": lambda _: as_json,
    }
    return makers, head + data


# --- the measurement --------------------------------------------------------------------------


def bench_http(
    *,
    shape: Sequence[int] = (4, 128, 768),
    experts: int = 8,
    max_k: int = 4,
    clients: Sequence[int] = (1, 8),
    rounds: int = 5,
    seconds: float = 0.4,
    progress: Callable[[str], None] = lambda label: None,
) -> list[dict[str, Any]]:
    """Returns one row for each case and number of clients.

    ``ratio`` is seconds a request over those of the bare echo of the same body plus the bare jitted
    route with its copy to the host; ``ratio_sink`` the same over an application that reads the body
    and answers two bytes. ``times_json`` is throughput over that of JSON without a cache.

    Args:
        shape: B, S, D of the float32 tensor.
        experts, max_k: of the router.
        clients: how many at once.
        rounds: 5 or more for figures to quote.
        seconds: of load a case and round.
    """
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    makers, body = _requests(x)
    route = _bare_route(x, experts, max_k)
    settings = dict(
        input_dim=shape[2],
        num_experts=experts,
        max_experts=max_k,
        security_level="minimal",
        buckets=str(shape[0] * shape[1]),
        log_level="ERROR",
        drain_seconds=0.0,
        serve_moe="off",
    )
    with contextlib.ExitStack() as stack:
        progress("starting three servers")
        floor = stack.enter_context(_process(_echo_server))
        off = stack.enter_context(_process(_our_server, settings | {"enable_caching": False}))
        on = stack.enter_context(_process(_our_server, settings))
        echo = _message("/echo", body, b"", False)
        sink = _message("/sink", body, b"", False)
        rows = []
        for count in clients:
            taken: dict[str, list[tuple[float, float]]] = {}

            def take(name: str, port: int, make: Make, c: int, into: Any = taken) -> None:
                into.setdefault(name, []).append(_load(port, make, c, seconds))

            for i in range(rounds + 1):  # the first warms up
                progress(f"{count} clients, round {i} of {rounds}")
                if i == 1:
                    taken.clear()
                take("echo", floor, lambda _: echo, count)
                take("sink", floor, lambda _: sink, count)
                timings = [_timed(route) for _ in range(15)]
                taken.setdefault("route", []).append((statistics.median(timings), 0.0))
                for case in CASES:
                    take(case, off if case.endswith("off") else on, makers[case], count)
            rows += summarise(taken, count)
    return rows


def summarise(taken: dict[str, list[tuple[float, float]]], count: int) -> list[dict[str, Any]]:
    """Returns the rows of ``bench_http`` for one number of clients.

    Args:
        taken: for each of ``CASES``, ``echo``, ``sink`` and ``route``, round by round, the seconds
            per request under load and the median latency in seconds.
        count: clients.
    """

    def ratios(case: str, base: str) -> list[float]:
        return [
            sample[0] / (floor[0] + route[0])
            for sample, floor, route in zip(taken[case], taken[base], taken["route"], strict=True)
        ]

    rows: list[dict[str, Any]] = []
    for case in CASES:
        over = [j[0] / sample[0] for j, sample in zip(taken["json off"], taken[case], strict=True)]
        rows.append(
            {
                "case": case,
                "clients": count,
                "ratio": round(statistics.median(ratios(case, "echo")), 3),
                "ratio_sink": round(statistics.median(ratios(case, "sink")), 3),
                "times_json": round(statistics.median(over), 3),
                "ms": round(1e3 * statistics.median(t for _, t in taken[case]), 3),
                "requests_per_second": round(1 / statistics.median(t for t, _ in taken[case]), 1),
                "echo_ms": round(1e3 * statistics.median(t for t, _ in taken["echo"]), 3),
                "sink_ms": round(1e3 * statistics.median(t for t, _ in taken["sink"]), 3),
                "route_ms": round(1e3 * statistics.median(t for t, _ in taken["route"]), 3),
            }
        )
    return rows


def _timed(thunk: Callable[[], Any]) -> float:
    start = time.perf_counter()
    thunk()
    return time.perf_counter() - start


def _bare_route(x: np.ndarray, experts: int, max_k: int) -> Callable[[], Any]:
    """Returns the same rule, jitted, from a numpy array to numpy arrays."""
    from moe_jax.config import build_router, load_config

    router = build_router(
        load_config(env={}, input_dim=x.shape[-1], num_experts=experts, max_experts=max_k)
    )
    params, state = router.init(jax.random.key(0), x.shape[-1]), router.init_state()
    flat = x.reshape(-1, x.shape[-1])

    @jax.jit
    def step(x: jax.Array) -> Any:
        routing = router(params, state, x)
        return routing.expert_indices, routing.combine_weights, routing.num_experts_per_token  # type: ignore[union-attr]

    return lambda: jax.device_get(step(flat))
