"""``make verify-rollout``: two real instances behind a real HAProxy, sharing a real Redis, under load.

- A client's limit holds over both instances together.
- Blue to green and back, each old colour stopped by SIGTERM while requests run: none is lost.
- Another checkpoint swapped in, and the previous release brought back: none is lost, and what is served
  is bit for bit what was served before.

    python -m deploy.verify.rollout

Needs haproxy and redis-server; as root they are installed from Debian.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deploy.verify.processes import (
    ROOT,
    DidNotRun,
    Process,
    Report,
    free_port,
    get,
    need,
    service,
    until,
    wait_ready,
)
from deploy.verify.traffic import Connection, infer_body

WIDTH, LIMIT, ADMIN = 64, 60, "verify-rollout-admin-key-of-this-run"

HAPROXY = """
global
  stats socket {folder}/admin.sock mode 600 level admin
  stats timeout 30s
defaults
  mode http
  timeout connect 5s
  timeout client 75s
  timeout server 75s
frontend clients
  bind 127.0.0.1:{port}
  default_backend live
backend live
  balance roundrobin
  option httpchk GET /ready
  http-check expect status 200
  default-server check inter 500ms rise 1 fall 2
{servers}
"""


class Proxy:
    """HAProxy, told through its own socket which colours get traffic; clients stay connected."""

    def __init__(self, folder: Path, ports: dict[str, int]) -> None:
        self._folder, self.port = folder, free_port()
        self._program = need("haproxy", "haproxy")
        servers = "\n".join(f"  server {name} 127.0.0.1:{port}" for name, port in ports.items())
        text = HAPROXY.format(folder=folder, port=self.port, servers=servers)
        (folder / "haproxy.cfg").write_text(text)

    def start(self) -> Process:
        words = [self._program, "-db", "-f", str(self._folder / "haproxy.cfg")]
        return Process(words, self._folder / "haproxy.log")

    def ask(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(self._folder / "admin.sock"))
            sock.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: sock.recv(65536), b"")).decode()

    def up(self, name: str) -> bool:
        """Whether it would send requests to a colour."""
        rows = csv.DictReader(io.StringIO(self.ask("show stat").lstrip("# ")))
        found = {row["svname"]: row["status"] for row in rows if row["pxname"] == "live"}
        return found[name] == "UP"

    def only(self, name: str, *others: str) -> bool:
        """Traffic to one colour once it is healthy, and no more to the others."""
        self.ask(f"set server live/{name} state ready")
        if not until(lambda: self.up(name), 15):
            return False
        for other in others:
            self.ask(f"set server live/{other} state drain")
        return True


class Load:
    """Steady requests of many clients through the proxy; every status is kept."""

    def __init__(self, port: int, *, per_second: float = 25.0, seconds: float = 300.0) -> None:
        self.statuses = Counter[int]()
        self._port, self._pause, self._stop = port, 4 / per_second, threading.Event()
        self._end = time.monotonic() + seconds
        self._threads = [threading.Thread(target=self._send, args=(i,)) for i in range(4)]

    def _send(self, number: int) -> None:
        rng, connection, step = np.random.default_rng(number), Connection(self._port), 0
        while not self._stop.is_set() and time.monotonic() < self._end:
            x = rng.standard_normal((1, 16, WIDTH), dtype=np.float32)
            client = f"10.{number}.{step % 100}.1"
            self.statuses[connection.post(*infer_body(x), client=client)] += 1
            step += 1
            self._stop.wait(self._pause)
        connection.close()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


def served(port: int) -> float:
    """How many requests an instance has answered well."""
    text = get(f"http://127.0.0.1:{port}/metrics")[1].decode()
    found = re.search(r'^moe_requests_total\{outcome="ok"\} (\S+)', text, re.M)
    return float(found[1]) if found else 0.0


def moe_jax(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_jax.cli", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def make_exports(folder: Path) -> list[Path]:
    """Two exports of two trained routers."""
    import jax
    import jax.numpy as jnp

    from moe_jax.checkpoint import Checkpoint, archive, save
    from moe_jax.config import Config, RouterConfig, build_router

    config = Config(router_config=RouterConfig(input_dim=WIDTH, max_experts=3))
    router, made = build_router(config), []
    for seed in (0, 1):
        params = router.init(jax.random.key(seed), WIDTH)
        x = jax.random.normal(jax.random.key(9), (2048, WIDTH), jnp.float32)
        state = router.fit(params, router.init_state(), x, target_mean_k=2.0)
        saved = Checkpoint(
            params={"router": params}, routers={"router": router}, states={"router": state},
            config=config,
        )  # fmt: skip
        save(folder / f"checkpoint-{seed}", saved)
        archive.export(folder / f"export-{seed}", folder / f"checkpoint-{seed}")
        made.append(folder / f"export-{seed}")
    return made


def routed(port: int) -> dict[str, bytes]:
    """One fixed batch through the service, array by array."""
    from moe_jax.serving.http.client import Service

    x = np.random.default_rng(4).standard_normal((2, 16, WIDTH), dtype=np.float32)
    arrays, _ = Service(f"http://127.0.0.1:{port}").infer("router", {"hidden_states": x})
    return {name: array.tobytes() for name, array in arrays.items()}


def check_limits(proxy: Proxy, ports: list[int], report: Report) -> None:
    """One client through the proxy, over both instances, as fast as it can."""
    until(lambda: time.time() % 60 < 40, 30)  # not over the edge of a window
    before = [served(port) for port in ports]
    connection, statuses = Connection(proxy.port), Counter[int]()
    x = np.random.default_rng(3).standard_normal((1, 16, WIDTH), dtype=np.float32)
    for i in range(2 * LIMIT):
        x[0, 0, 0] = i
        statuses[connection.post(*infer_body(x), client="10.200.0.1")] += 1
    connection.close()
    shares = [served(port) - b for port, b in zip(ports, before, strict=True)]
    report.hold(min(shares) > 0, "both instances answered", f"{shares[0]:.0f} and {shares[1]:.0f}")
    # Ten refusals within five minutes block the client for a while: 403 instead of 429.
    report.hold(
        statuses[200] == LIMIT and set(statuses) <= {200, 429, 403},
        f"exactly {LIMIT} of {2 * LIMIT} are admitted", f"by status {dict(statuses)}",
    )  # fmt: skip


def check_colours(
    proxy: Proxy, instances: dict[str, Process], ports: dict[str, int],
    start: Callable[[str], Process], releases: Path, report: Report,
) -> None:  # fmt: skip
    """Blue to green, blue stopped; blue started anew, green to blue, green stopped."""
    with Load(proxy.port) as load:
        time.sleep(3)
        for old, new in (("blue", "green"), ("green", "blue")):
            if instances[new].ended() is not None:
                instances[new] = start(new)
                report.hold(wait_ready(instances[new], ports[new]), f"{new} is started anew")
            smoke = moe_jax(
                "smoke", f"http://127.0.0.1:{ports[new]}",
                "--checkpoint", str(releases / "current" / "checkpoint"),
            )  # fmt: skip
            report.hold(
                smoke.returncode == 0, f"{new} passes its smoke test before it has traffic",
                "" if smoke.returncode == 0 else smoke.stdout + smoke.stderr,
            )  # fmt: skip
            before = served(ports[new])
            moved = proxy.only(new, old)
            moved = moved and until(lambda b=before, n=new: served(ports[n]) > b + 20, 20)
            report.hold(moved, f"{old} -> {new}: traffic moves")
            instances[old].signal(signal.SIGTERM)
            code = instances[old].wait(60)
            report.hold(code == 0, f"{old} drains and exits with 0", f"exit code {code}")
            time.sleep(2)
    total = sum(load.statuses.values())
    report.hold(
        set(load.statuses) == {200}, "switch and rollback lose no request",
        f"{total} requests, by status {dict(load.statuses)}",
    )  # fmt: skip


def check_releases(proxy: Proxy, port: int, releases: Path, second: Path, report: Report) -> None:
    """Another release swapped in and back while requests run."""
    url = f"http://127.0.0.1:{port}"

    def step(*words: str) -> None:
        done = moe_jax(*words)
        report.hold(
            done.returncode == 0, f"moe-jax {words[0]}", (done.stdout + done.stderr).strip()[-300:]
        )

    first_answer = routed(port)
    with Load(proxy.port) as load:
        time.sleep(1)
        step("restore", str(second), "--into", str(releases))
        step("reload", url, "--admin-key", ADMIN)
        changed = routed(port)
        step("rollback", str(releases))
        step("reload", url, "--admin-key", ADMIN)
        back = routed(port)
        time.sleep(1)
    report.hold(changed != first_answer, "the second release routes otherwise")
    report.hold(back == first_answer, "after the rollback routing is bit for bit as before")
    total = sum(load.statuses.values())
    report.hold(
        set(load.statuses) == {200}, "two swaps of the checkpoint lose no request",
        f"{total} requests, by status {dict(load.statuses)}",
    )  # fmt: skip


def verify(folder: Path, report: Report) -> None:
    redis_program = need("redis-server", "redis-server")
    ports = {"blue": free_port(), "green": free_port()}
    proxy = Proxy(folder, ports)
    exports = make_exports(folder)
    releases = folder / "releases"
    told = moe_jax("restore", str(exports[0]), "--into", str(releases), "--json")
    report.hold(told.returncode == 0, "the first release is restored", told.stderr.strip())
    first = json.loads(told.stdout)["release"]
    report.say(f"     release {first}")
    redis_port = free_port()
    settings: dict[str, Any] = dict(
        checkpoint=releases / "current" / "checkpoint", input_dim=WIDTH, buckets="16,32,1024",
        redis_url=f"redis://127.0.0.1:{redis_port}/0", replicas=2, admin_key=ADMIN,
        rate_limit_requests=LIMIT, trusted_proxies="127.0.0.0/8", drain_seconds=2,
    )  # fmt: skip
    started: list[Process] = []

    def start(name: str) -> Process:
        process = service(folder, name, port=ports[name], **settings)
        started.append(process)
        return process

    try:
        words = [redis_program, "--port", str(redis_port), "--bind", "127.0.0.1", "--save", ""]
        started.append(Process(words, folder / "redis.log", cwd=folder))
        instances = {name: start(name) for name in ports}
        for name, process in instances.items():
            if not report.hold(wait_ready(process, ports[name]), f"{name} is ready"):
                report.say(process.tail(40))
                return
        haproxy = proxy.start()
        started.append(haproxy)
        url = f"http://127.0.0.1:{proxy.port}/v2/health/ready"
        both = until(lambda: get(url)[0] == 200 and all(map(proxy.up, ports)), 15)
        if not report.hold(both, "HAProxy answers for both"):
            report.say(haproxy.tail())
            return
        check_limits(proxy, list(ports.values()), report)
        report.hold(proxy.only("blue", "green"), "all traffic goes to blue")
        check_colours(proxy, instances, ports, start, releases, report)
        check_releases(proxy, ports["blue"], releases, exports[1], report)
    finally:
        for process in reversed(started):
            process.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description="Two instances behind HAProxy, under load.")
    parser.add_argument("--keep", action="store_true", help="keep the logs, and say where")
    words = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report("verify-rollout")
    folder = Path(tempfile.mkdtemp(prefix="verify-rollout-"))
    try:
        verify(folder, report)
    except DidNotRun as error:
        report.say(f"verify-rollout DID NOT RUN: {error}")
        return 2
    finally:
        if words.keep:
            report.say(f"logs in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
