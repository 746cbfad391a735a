"""``make verify-soak``: minutes of good and bad traffic to a running service, and nothing grows.

    python -m deploy.verify.soak [--seconds 300] [--per-second 60] [--bound-mib 8]

Starts ``moe-jax serve`` and sends it, over loopback, binary and JSON requests, new ones and repeated
ones, and beside them what goes wrong in production: malformed and oversized requests, NaN, deadlines
that pass, bodies and heads that are cut off, encodings that lie, clients that were never seen before,
reloads. Resident memory, open files and threads of the service are sampled all the while.

The first third of the time is for warming up. What the samples of the last third have on those of
the second, median to median, must be at most ``--bound-mib`` of memory, 4 open files and 4 threads.
Every request must have a status that its kind may have: no good one is lost, no bad one is a 500. When
the clients are gone their connections must be too. Exit code 1 if anything of it does not hold.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gzip
import http.client
import json
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deploy.verify.processes import Report, free_port, get, service, until, wait_ready
from deploy.verify.traffic import infer_body

WIDTH, THREADS, MOST_MORE = 64, 4, 4
INFER = "/v2/models/router/infer"


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the service holds at a moment."""

    seconds: float
    mib: float
    files: int
    threads: int


def growth(samples: list[Sample]) -> Sample:
    """What the last third of the samples has on the second, median to median.

    Example:
        >>> flat = [Sample(t, 100.0, 20, 9) for t in range(9)]
        >>> leaking = [Sample(t, 100.0 + t, 20 + t, 9) for t in range(9)]
        >>> growth(flat).mib, growth(leaking).mib, growth(leaking).files
        (0.0, 3.0, 3)
    """
    third = len(samples) // 3
    parts = samples[third : 2 * third], samples[2 * third :]
    medians = [
        [statistics.median(getattr(s, f.name) for s in part) for f in dataclasses.fields(Sample)]
        for part in parts
    ]
    seconds, mib, files, threads = (b - a for a, b in zip(*medians, strict=True))
    return Sample(seconds, mib, int(files), int(threads))


class Client:
    """One thread's requests, each kind by its own name. 0 is no answer, which a few kinds expect."""

    def __init__(self, port: int, number: int) -> None:
        self._port, self._number, self._step = port, number, 0
        self._rng = np.random.default_rng(number)
        self._pool = [self._states() for _ in range(8)]
        self._connection: http.client.HTTPConnection | None = None

    def _states(self) -> np.ndarray:
        return self._rng.standard_normal((2, 16, WIDTH), dtype=np.float32)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> int:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            self._connection.request(method, path, body, sent)
            answer = self._connection.getresponse()
            answer.read()
            if answer.will_close:
                self.close()
            return answer.status
        except (OSError, http.client.HTTPException):
            self.close()
            return 0

    def _stranger(self) -> str:
        """An address that nobody had before: a block is its own, and is one more to remember."""
        self._step += 1
        return f"10.{self._number}.{self._step // 250 % 250}.{self._step % 250}"

    def _bad(self, body: bytes, **headers: str) -> int:
        return self._ask("POST", INFER, body, X_Forwarded_For=self._stranger(), **headers)

    def _raw(self, text: bytes, *, answered: bool) -> int:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=60) as sock:
                sock.sendall(text)
                found = sock.recv(64) if answered else b""
                return int(found.split()[1]) if found else 0
        except OSError:
            return 0

    def new(self) -> int:
        body, headers = infer_body(self._states())
        return self._ask("POST", INFER, body, **headers)

    def repeated(self) -> int:
        body, headers = infer_body(self._pool[self._rng.integers(len(self._pool))])
        return self._ask("POST", INFER, body, **headers)

    def as_json(self) -> int:
        return self._ask("POST", INFER, self._json(self._states()))

    def packed(self) -> int:
        body = gzip.compress(self._json(self._states()), 1)
        return self._ask("POST", INFER, body, Content_Encoding="gzip", Accept_Encoding="gzip")

    def nonfinite(self) -> int:
        x = self._states()
        x[0, 0, 0] = np.nan
        body, headers = infer_body(x)
        return self._ask("POST", INFER, body, **headers)

    def late(self) -> int:
        body, headers = infer_body(self._states(), timeout_microseconds=1)
        return self._ask("POST", INFER, body, **headers)

    def looks(self) -> int:
        path = ("/metrics", "/health", "/ready", "/v2/models/router")[self._rng.integers(4)]
        return self._ask("GET", path)

    def malformed(self) -> int:
        return self._bad(b'{"inputs": [{"name": "hidden_states", "shape": [1')

    def misshapen(self) -> int:
        return self._bad(self._json(np.zeros((1, 2, 8), np.float32)))

    def oversized(self) -> int:
        return self._bad(self._json(np.zeros((40, 1, WIDTH), np.float32)))

    def mislabelled(self) -> int:
        return self._bad(b"no such thing", Content_Encoding="gzip")

    def unknown(self) -> int:
        return self._ask("POST", "/v2/models/nobody/infer", b"{}")

    def not_http(self) -> int:
        return self._raw(b"\x16\x03\x01\x02\x00\x01\r\n\r\n", answered=True)

    def cut_off_body(self) -> int:
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: {self._stranger()}\r\n"
        return self._raw(f"{head}Content-Length: 50000\r\n\r\n{{".encode() * 9, answered=False)

    def cut_off_head(self) -> int:
        return self._raw(f"POST {INFER} HTTP/1.1\r\nX: ".encode() + b"x" * 5000, answered=False)

    def reload(self) -> int:
        return self._ask("POST", "/admin/reload", b"", Authorization="Bearer operator")

    @staticmethod
    def _json(x: np.ndarray) -> bytes:
        tensor = {"name": "hidden_states", "shape": list(x.shape), "datatype": "FP32",
                  "data": x.reshape(-1).tolist()}  # fmt: skip
        return json.dumps({"inputs": [tensor]}).encode()


# Kind -> how often among a hundred, and the statuses that it may have.
KINDS: dict[Callable[[Client], int], tuple[float, set[int]]] = {
    Client.new: (25, {200}),
    Client.repeated: (25, {200}),
    Client.as_json: (8, {200}),
    Client.packed: (4, {200}),
    Client.nonfinite: (3, {200}),
    Client.looks: (6, {200}),
    Client.late: (4, {504}),
    Client.malformed: (5, {400}),
    Client.misshapen: (4, {400}),
    Client.oversized: (4, {413}),
    Client.mislabelled: (3, {400}),
    Client.unknown: (2, {404}),
    Client.not_http: (2, {400}),
    Client.cut_off_body: (2.5, {0}),
    Client.cut_off_head: (2, {0}),
    Client.reload: (0.5, {200}),
}


class Load:
    """The traffic of a few clients until stopped; what each kind was answered."""

    def __init__(self, port: int, per_second: float, *, seconds: float) -> None:
        self.seen = collections.Counter[tuple[str, int]]()
        self._pause, self._port = THREADS / per_second, port
        self._end, self._stop = time.monotonic() + seconds, threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._send, args=(i,)) for i in range(THREADS)]

    def _send(self, number: int) -> None:
        client, rng = Client(self._port, number), np.random.default_rng(1000 + number)
        kinds = list(KINDS)
        weights = np.array([KINDS[kind][0] for kind in kinds])
        order = [*rng.permutation(len(kinds))]  # each once, then by weight
        due = time.monotonic()
        # A slow machine takes longer to have sent each once.
        while not self._stop.is_set() and (order or time.monotonic() < self._end):
            chosen = order.pop() if order else rng.choice(len(kinds), p=weights / weights.sum())
            kind = kinds[chosen]
            status = kind(client)
            with self._lock:
                self.seen[kind.__name__, status] += 1
            due = max(due + self._pause, time.monotonic() - 1.0)
            self._stop.wait(max(0.0, due - time.monotonic()))
        client.close()

    @property
    def under_way(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    @property
    def total(self) -> int:
        with self._lock:
            return sum(self.seen.values())

    def unexpected(self) -> list[str]:
        """Kinds that had a status which they may not have."""
        allowed = {kind.__name__: statuses for kind, (_, statuses) in KINDS.items()}
        return sorted(
            f"{name} {status} x{count}"
            for (name, status), count in self.seen.items()
            if status not in allowed[name]
        )

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def sampled(process: psutil.Process, start: float) -> Sample:
    with process.oneshot():
        return Sample(
            time.monotonic() - start, process.memory_info().rss / 2**20, process.num_fds(),
            process.num_threads(),
        )  # fmt: skip


def table(samples: list[Sample], totals: list[int], rows: int = 10) -> list[str]:
    """Some of the samples, one a line."""
    told = ["seconds  requests  memory MiB  files  threads"]
    for i in sorted({round(i) for i in np.linspace(0, len(samples) - 1, rows)}):
        s = samples[i]
        told.append(
            f"{s.seconds:7.0f}  {totals[i]:8d}  {s.mib:10.1f}  {s.files:5d}  {s.threads:7d}"
        )
    return told


def soak(
    folder: Path, report: Report, *, seconds: float, per_second: float, bound_mib: float,
    **settings: Any,
) -> list[Sample]:  # fmt: skip
    """Starts a service, soaks it, judges it, and stops it.

    Args:
        folder: for its log.
        report: where what holds and what does not is told.
        seconds, per_second: how long, and how many requests a second.
        bound_mib: most growth of resident memory.
        **settings: of the service, over those of the soak.
    """
    port = free_port()
    settings = {
        "input_dim": WIDTH, "buckets": "64", "serve_moe": "off", "cache_size": 256,
        "max_batch_size": 32, "security_level": "standard", "trusted_proxies": "127.0.0.1",
        "rate_limit_requests": 10**9, "rate_limit_tokens": 10**12, "admin_key": "operator",
        "drain_seconds": 0, "log_level": "WARNING", **settings,
    }  # fmt: skip
    running = service(folder, "service", port=port, **settings)
    try:
        if not report.hold(wait_ready(running, port), "the service is ready"):
            report.say(running.tail(30))
            return []
        process, start = psutil.Process(running.pid), time.monotonic()
        idle = sampled(process, start)
        samples, totals = [], []
        every = max(0.1, min(2.0, seconds / 60))
        with Load(port, per_second, seconds=seconds) as load:
            while load.under_way and running.ended() is None:
                time.sleep(every)
                samples.append(sampled(process, start))
                totals.append(load.total)
        report.say("\n".join(table(samples, totals)))
        judge(report, samples, load, bound_mib)
        gone = until(lambda: sampled(process, start).files <= idle.files + 1, 30)
        left = sampled(process, start).files
        report.hold(
            gone,
            "connections go with their clients",
            f"{idle.files} open files before, {left} after",
        )
        report.hold(get(f"http://127.0.0.1:{port}/ready")[0] == 200, "it is ready after all of it")
        running.signal(signal.SIGTERM)
        report.hold(running.wait(60) == 0, "and ends with 0")
    finally:
        running.stop()
    return samples


def judge(report: Report, samples: list[Sample], load: Load, bound_mib: float) -> None:
    more, unexpected = growth(samples), load.unexpected()
    kinds = {name for name, _ in load.seen}
    report.hold(len(kinds) == len(KINDS), "every kind of request was sent", f"{len(kinds)} kinds")
    report.hold(
        not unexpected, "every request had a status that it may have",
        ", ".join(unexpected) or f"{load.total} requests",
    )  # fmt: skip
    report.hold(
        more.mib <= bound_mib, f"memory grows by at most {bound_mib:g} MiB",
        f"{more.mib:+.1f} MiB in {more.seconds:.0f} s",
    )  # fmt: skip
    for name, grown in (("open files", more.files), ("threads", more.threads)):
        report.hold(grown <= MOST_MORE, f"{name} grow by at most {MOST_MORE}", f"{grown:+d}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Minutes of good and bad traffic; nothing grows.")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--per-second", type=float, default=60.0)
    parser.add_argument("--bound-mib", type=float, default=8.0)
    words = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report("verify-soak")
    folder = Path(tempfile.mkdtemp(prefix="verify-soak-"))
    try:
        soak(
            folder, report, seconds=words.seconds, per_second=words.per_second,
            bound_mib=words.bound_mib,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
