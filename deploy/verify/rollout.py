"""``make verify-rollout``: two instances behind HAProxy, sharing a Redis, under load.

- A client's limit holds over both instances together.
- Traffic moves from blue to green and back, and SIGTERM stops each old colour while requests run. No
  request is lost.
- Another release is swapped in, and the previous one is brought back. No request is lost, and after the
  rollback routing is bit for bit as before.

    python -m deploy.verify.rollout [--keep]

Needs haproxy and redis-server; as root they are installed from Debian.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deploy.verify.check import Report, run
from deploy.verify.processes import (
    ROOT,
    Process,
    Programs,
    free_port,
    get,
    hold_ready,
    need,
    readings,
    until,
)
from deploy.verify.sample_checkpoint import WIDTH, save_sample
from deploy.verify.traffic import Connection, Load, NewInputs

LIMIT, ADMIN = 60, "verify-rollout-admin-key-of-this-run"

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
    """HAProxy with both colours behind it; its socket sets which of them get traffic."""

    def __init__(self, folder: Path, ports: dict[str, int]) -> None:
        self._folder, self.port = folder, free_port()
        self._program = need("haproxy", "haproxy")
        servers = "\n".join(f"  server {name} 127.0.0.1:{port}" for name, port in ports.items())
        text = HAPROXY.format(folder=folder, port=self.port, servers=servers)
        (folder / "haproxy.cfg").write_text(text)

    def start(self, programs: Programs) -> Process:
        """Starts it."""
        config = str(self._folder / "haproxy.cfg")
        return programs.start("haproxy", [self._program, "-db", "-f", config])

    def ask(self, command: str) -> str:
        """Sends a command to its socket and returns the answer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(self._folder / "admin.sock"))
            sock.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: sock.recv(65536), b"")).decode()

    def up(self, name: str) -> bool:
        """Whether it would send requests to a colour."""
        rows = csv.DictReader(io.StringIO(self.ask("show stat").lstrip("# ")))
        statuses = {row["svname"]: row["status"] for row in rows if row["pxname"] == "live"}
        return statuses[name] == "UP"

    def only(self, name: str, *others: str) -> bool:
        """Sends traffic to one colour once it is healthy, and none to the others."""
        self.ask(f"set server live/{name} state ready")
        if not until(lambda: self.up(name), 15):
            return False
        for other in others:
            self.ask(f"set server live/{other} state drain")
        return True


def steady(proxy: Proxy) -> Load[int]:
    """A load of many clients through the proxy, 25 requests a second."""
    return Load(lambda number: NewInputs(proxy.port, number, width=WIDTH), per_second=lambda: 25.0)


def hold_no_loss(load: Load[int], claim: str, report: Report) -> None:
    """Notes whether every request of a load was answered with 200."""
    detail = f"{load.total} requests, by status {dict(load.outcomes)}"
    report.hold(set(load.outcomes) == {200}, claim, detail)


def served(port: int) -> float:
    """Returns how many requests an instance has answered with success."""
    return readings(port).get('moe_requests_total{outcome="ok"}', 0.0)


def moe_jax(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs a ``moe-jax`` command."""
    return subprocess.run(
        [sys.executable, "-m", "moe_jax.cli", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def make_exports(folder: Path) -> list[Path]:
    """Returns two exports, of two routers with different weights."""
    from moe_jax.checkpoint import archive

    exports = []
    for seed in (0, 1):
        checkpoint, _ = save_sample(folder / f"checkpoint-{seed}", seed=seed)
        exports.append(folder / f"export-{seed}")
        archive.export(exports[-1], checkpoint)
    return exports


def routed(port: int) -> dict[str, bytes]:
    """Routes one fixed batch through the service and returns the bytes of each array."""
    from moe_jax.serving.http.client import Service

    x = np.random.default_rng(4).standard_normal((2, 16, WIDTH), dtype=np.float32)
    arrays, _ = Service(f"http://127.0.0.1:{port}").infer("router", {"hidden_states": x})
    return {name: array.tobytes() for name, array in arrays.items()}


def check_limits(proxy: Proxy, ports: list[int], report: Report) -> None:
    """One client sends through the proxy, over both instances, as fast as it can."""
    until(lambda: time.time() % 60 < 40, 30)  # all requests fall into one window of a minute
    before = [served(port) for port in ports]
    connection, statuses = Connection(proxy.port), Counter[int]()
    x = np.random.default_rng(3).standard_normal((1, 16, WIDTH), dtype=np.float32)
    for i in range(2 * LIMIT):
        x[0, 0, 0] = i
        statuses[connection.infer(x, client="10.200.0.1")] += 1
    connection.close()
    shares = [served(port) - b for port, b in zip(ports, before, strict=True)]
    report.hold(min(shares) > 0, "both instances answered", f"{shares[0]:.0f} and {shares[1]:.0f}")
    # Ten refusals within five minutes block the client: 403 instead of 429.
    report.hold(
        statuses[200] == LIMIT and set(statuses) <= {200, 429, 403},
        f"exactly {LIMIT} of {2 * LIMIT} are admitted",
        f"by status {dict(statuses)}",
    )


def check_colours(
    proxy: Proxy,
    instances: dict[str, Process],
    ports: dict[str, int],
    start: Callable[[str], Process],
    releases: Path,
    report: Report,
) -> None:
    """Moves traffic to green and stops blue, starts blue again, moves back and stops green."""
    with steady(proxy) as load:
        time.sleep(3)
        for old, new in (("blue", "green"), ("green", "blue")):
            if instances[new].ended() is not None:
                instances[new] = start(new)
                hold_ready(instances[new], ports[new], f"{new} is started again", report)
            url, checkpoint = f"http://127.0.0.1:{ports[new]}", releases / "current" / "checkpoint"
            smoke = moe_jax("smoke", url, "--checkpoint", str(checkpoint))
            report.hold(
                smoke.returncode == 0,
                f"{new} passes its smoke test before it has traffic",
                "" if smoke.returncode == 0 else smoke.stdout + smoke.stderr,
            )
            before = served(ports[new])
            moved = proxy.only(new, old)
            moved = moved and until(lambda b=before, n=new: served(ports[n]) > b + 20, 20)
            report.hold(moved, f"{old} -> {new}: traffic moves")
            instances[old].signal(signal.SIGTERM)
            code = instances[old].wait(60)
            report.hold(code == 0, f"{old} drains and exits with 0", f"exit code {code}")
            time.sleep(2)
    hold_no_loss(load, "switch and rollback lose no request", report)


def check_releases(proxy: Proxy, port: int, releases: Path, second: Path, report: Report) -> None:
    """Swaps another release in and back while requests run."""
    url = f"http://127.0.0.1:{port}"

    def step(*words: str) -> None:
        done = moe_jax(*words)
        report.hold(
            done.returncode == 0, f"moe-jax {words[0]}", (done.stdout + done.stderr).strip()[-300:]
        )

    first_answer = routed(port)
    with steady(proxy) as load:
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
    hold_no_loss(load, "two swaps of the checkpoint lose no request", report)


def verify(work: Path, report: Report, options: argparse.Namespace) -> None:
    """Two instances behind HAProxy, under load."""
    need("redis-server", "redis-server")
    ports = {"blue": free_port(), "green": free_port()}
    proxy = Proxy(work, ports)
    exports = make_exports(work)
    releases = work / "releases"
    restored = moe_jax("restore", str(exports[0]), "--into", str(releases), "--json")
    report.hold(restored.returncode == 0, "the first release is restored", restored.stderr.strip())
    report.say(f"     release {json.loads(restored.stdout)['release']}")
    with Programs(work) as programs:
        settings: dict[str, Any] = dict(
            checkpoint=releases / "current" / "checkpoint",
            input_dim=WIDTH,
            buckets="16,32,1024",
            redis_url=programs.redis(),
            replicas=2,
            admin_key=ADMIN,
            rate_limit_requests=LIMIT,
            trusted_proxies="127.0.0.0/8",
            drain_seconds=2,
        )

        def start(name: str) -> Process:
            return programs.service(name, port=ports[name], **settings)

        instances = {name: start(name) for name in ports}
        for name, process in instances.items():
            if not hold_ready(process, ports[name], f"{name} is ready", report):
                return
        haproxy = proxy.start(programs)
        url = f"http://127.0.0.1:{proxy.port}/v2/health/ready"
        both = until(lambda: get(url)[0] == 200 and all(map(proxy.up, ports)), 15)
        if not report.hold(both, "HAProxy answers for both"):
            report.say(haproxy.tail())
            return
        check_limits(proxy, list(ports.values()), report)
        report.hold(proxy.only("blue", "green"), "all traffic goes to blue")
        check_colours(proxy, instances, ports, start, releases, report)
        check_releases(proxy, ports["blue"], releases, exports[1], report)


def main() -> int:
    """Runs the check as a command."""
    return run("verify-rollout", verify)


if __name__ == "__main__":
    sys.exit(main())
