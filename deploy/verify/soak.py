"""``make verify-soak``: minutes of good and bad traffic to a running service, and nothing grows.

    python -m deploy.verify.soak [--seconds 300] [--per-second 60] [--bound-mib 8]

Starts ``moe-jax serve`` and sends it, over loopback, binary and JSON requests, new and repeated, and
what goes wrong in production: malformed and oversized requests, NaN, deadlines that pass, bodies and
heads that are cut off, wrong encodings, clients with new addresses, reloads. Resident memory, open
files and threads of the service are sampled all the time.

The first third of the time is for warming up. From the second third to the last, the medians may grow
by at most ``--bound-mib`` of memory, 4 open files and 4 threads. Every request must have a status that
its kind may have: no good request is lost, no bad one gets a 500. When the clients end, their
connections must end too. The exit code is 1 if any of this does not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deploy.verify.check import Report, run
from deploy.verify.processes import Programs, free_port, get, hold_ready, until
from deploy.verify.sample_checkpoint import WIDTH
from deploy.verify.traffic import INFER, Connection, Load, Sender, infer_body

THREADS, MOST_MORE = 4, 4


@dataclasses.dataclass(frozen=True)
class Sample:
    """Resources of the service at one time."""

    seconds: float
    mib: float
    files: int
    threads: int


def growth(samples: list[Sample]) -> Sample:
    """Returns the growth from the second third of the samples to the last, median to median.

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
    """One thread's requests; each kind is a method that returns its status, 0 where no answer came."""

    def __init__(self, port: int, number: int) -> None:
        self._port, self._number, self._step = port, number, 0
        self._rng = np.random.default_rng(number)
        self._pool = [self._states() for _ in range(8)]
        self._connection = Connection(port)
        kinds, self._choice = list(KINDS), np.random.default_rng(1000 + number)
        # Each kind once, then by weight.
        self.order = [kinds[i] for i in self._choice.permutation(len(kinds))]

    def __call__(self) -> tuple[str, int]:
        """Sends a request and returns its kind and status."""
        if self.order:
            kind = self.order.pop()
        else:
            weights = np.array([weight for weight, _ in KINDS.values()])
            index = self._choice.choice(len(weights), p=weights / weights.sum())
            kind = list(KINDS)[index]
        return kind.__name__, kind(self)

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def _states(self) -> np.ndarray:
        return self._rng.standard_normal((2, 16, WIDTH), dtype=np.float32)

    def _ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self._connection.ask(method, path, body, named)

    def _stranger(self) -> str:
        """Returns a new address, so that a block stops no other request and is one more to remember."""
        self._step += 1
        return f"10.{self._number}.{self._step // 250 % 250}.{self._step % 250}"

    def _bad(self, body: bytes, **headers: str) -> int:
        return self._ask("POST", INFER, body, X_Forwarded_For=self._stranger(), **headers)

    def _raw(self, text: bytes, *, answered: bool) -> int:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=60) as sock:
                sock.sendall(text)
                answer = sock.recv(64) if answered else b""
                return int(answer.split()[1]) if answer else 0
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
        tensor = {
            "name": "hidden_states",
            "shape": list(x.shape),
            "datatype": "FP32",
            "data": x.reshape(-1).tolist(),
        }
        return json.dumps({"inputs": [tensor]}).encode()


# Kind -> its share in percent, and the statuses that it may have.
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


class MixedKinds(Load[tuple[str, int]]):
    """Traffic of a few clients that send every kind of request."""

    def __init__(self, port: int, per_second: float, *, seconds: float) -> None:
        super().__init__(
            lambda number: Client(port, number),
            threads=THREADS,
            seconds=seconds,
            per_second=lambda: per_second,
        )

    def goes_on(self, sender: Sender[tuple[str, int]]) -> bool:
        """Whether time is left, or a slow machine has not sent each kind once yet."""
        assert isinstance(sender, Client)
        return bool(sender.order) or super().goes_on(sender)

    def unexpected(self) -> list[str]:
        """Returns the kinds that had a status which they may not have, with counts."""
        allowed = {kind.__name__: statuses for kind, (_, statuses) in KINDS.items()}
        return sorted(
            f"{name} {status} x{count}"
            for (name, status), count in self.outcomes.items()
            if status not in allowed[name]
        )


def sampled(process: psutil.Process, start: float) -> Sample:
    """Returns the resources that a process holds now."""
    with process.oneshot():
        return Sample(
            seconds=time.monotonic() - start,
            mib=process.memory_info().rss / 2**20,
            files=process.num_fds(),
            threads=process.num_threads(),
        )


def table(samples: list[Sample], totals: list[int], rows: int = 10) -> list[str]:
    """Returns ``rows`` of the samples as lines."""
    lines = ["seconds  requests  memory MiB  files  threads"]
    for i in sorted({round(i) for i in np.linspace(0, len(samples) - 1, rows)}):
        s = samples[i]
        lines.append(
            f"{s.seconds:7.0f}  {totals[i]:8d}  {s.mib:10.1f}  {s.files:5d}  {s.threads:7d}"
        )
    return lines


def soak(
    folder: Path,
    report: Report,
    *,
    seconds: float,
    per_second: float,
    bound_mib: float,
    **changes: Any,
) -> list[Sample]:
    """Starts a service, sends it traffic, judges it, stops it, and returns the samples.

    Args:
        folder: for the service's log.
        report: notes what holds and what does not.
        seconds: length of the traffic.
        per_second: requests per second.
        bound_mib: largest growth of resident memory, in MiB.
        **changes: settings of the service that differ from those of the soak.
    """
    port = free_port()
    settings = {
        "input_dim": WIDTH,
        "buckets": "64",
        "serve_moe": "off",
        "cache_size": 256,
        "max_batch_size": 32,
        "security_level": "standard",
        "trusted_proxies": "127.0.0.1",
        "rate_limit_requests": 10**9,
        "rate_limit_tokens": 10**12,
        "admin_key": "operator",
        "drain_seconds": 0,
        "log_level": "WARNING",
        **changes,
    }
    with Programs(folder) as programs:
        running = programs.service("service", port=port, **settings)
        if not hold_ready(running, port, "the service is ready", report):
            return []
        process, start = psutil.Process(running.pid), time.monotonic()
        idle = sampled(process, start)
        samples, totals = [], []
        every = max(0.1, min(2.0, seconds / 60))
        with MixedKinds(port, per_second, seconds=seconds) as load:
            while load.under_way and running.ended() is None:
                time.sleep(every)
                samples.append(sampled(process, start))
                totals.append(load.total)
        report.say("\n".join(table(samples, totals)))
        judge(report, samples, load, bound_mib)
        closed = until(lambda: sampled(process, start).files <= idle.files + 1, 30)
        left = sampled(process, start).files
        report.hold(
            closed,
            "connections go with their clients",
            f"{idle.files} open files before, {left} after",
        )
        report.hold(get(f"http://127.0.0.1:{port}/ready")[0] == 200, "it is ready after all of it")
        running.signal(signal.SIGTERM)
        report.hold(running.wait(60) == 0, "and ends with 0")
    return samples


def judge(report: Report, samples: list[Sample], load: MixedKinds, bound_mib: float) -> None:
    """Notes whether every request had its status and whether anything grew."""
    more, unexpected = growth(samples), load.unexpected()
    kinds = {name for name, _ in load.outcomes}
    report.hold(len(kinds) == len(KINDS), "every kind of request was sent", f"{len(kinds)} kinds")
    report.hold(
        not unexpected,
        "every request had a status that it may have",
        ", ".join(unexpected) or f"{load.total} requests",
    )
    report.hold(
        more.mib <= bound_mib,
        f"memory grows by at most {bound_mib:g} MiB",
        f"{more.mib:+.1f} MiB in {more.seconds:.0f} s",
    )
    for name, grown in (("open files", more.files), ("threads", more.threads)):
        report.hold(grown <= MOST_MORE, f"{name} grow by at most {MOST_MORE}", f"{grown:+d}")


def verify(work: Path, report: Report, options: argparse.Namespace) -> None:
    """Minutes of good and bad traffic; nothing grows."""
    soak(
        work,
        report,
        seconds=options.seconds,
        per_second=options.per_second,
        bound_mib=options.bound_mib,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this check."""
    parser.add_argument("--seconds", type=float, default=300.0, help="length of the traffic")
    parser.add_argument("--per-second", type=float, default=60.0, help="requests per second")
    parser.add_argument("--bound-mib", type=float, default=8.0, help="largest growth of memory")


def main() -> int:
    """Runs the check as a command."""
    return run("verify-soak", verify, add_options=add_options)


if __name__ == "__main__":
    sys.exit(main())
