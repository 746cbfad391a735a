"""``make verify-monitoring``: a real Prometheus on two running instances, with real traffic and faults.

Every query of the dashboard and every recording rule must return data, every name that anything asks
for must be in a live /metrics, and every alert is driven to fire and to clear by what it is about: slow
and oversized requests, slow work that opens the circuit, tokens that all look alike, an instance that
is killed. Windows and ``for`` are divided by ``--scale`` (60: an hour is a minute); thresholds
stay as they are. What fires reaches a real Alertmanager and its webhook.

    python -m deploy.verify.monitoring [--scale 60]

Needs prometheus, promtool, prometheus-alertmanager and redis-server; as root they are installed from
Debian.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from deploy.verify import promql
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
from deploy.verify.traffic import Mix, Traffic, burst

WIDTH = 64
# What makes latency easy to raise on one instance and the circuit easy to open on the other.
OWN: tuple[dict[str, Any], ...] = (dict(max_inflight=1), dict(slow_call_seconds=0.02))


def make_checkpoint(folder: Path) -> tuple[Path, np.ndarray]:
    """A calibrated checkpoint, and a hidden state that uses the fewest experts."""
    import jax
    import jax.numpy as jnp

    from moe_jax.checkpoint import Checkpoint, save
    from moe_jax.config import Config, RouterConfig, build_router

    config = Config(router_config=RouterConfig(input_dim=WIDTH, max_experts=3))
    router = build_router(config)
    params = router.init(jax.random.key(0), WIDTH)
    x = jax.random.normal(jax.random.key(1), (4096, WIDTH), jnp.float32)
    state = router.fit(params, router.init_state(), x, target_mean_k=2.0)
    saved = Checkpoint(
        params={"router": params}, routers={"router": router}, states={"router": state},
        config=config,
    )  # fmt: skip
    routing = router(params, state, x)
    easiest = int(np.argmin(np.asarray(routing.num_experts_per_token)))
    return save(folder / "checkpoint", saved), np.asarray(x[easiest])


class Webhook:
    """Where Alertmanager sends: counts by alert and status."""

    def __init__(self) -> None:
        self.got = collections.Counter[tuple[str, str]]()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                for alert in json.loads(self.rfile.read(length))["alerts"]:
                    hook.got[(alert["labels"]["alertname"], alert["status"])] += 1
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Silent: the report says what came."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Prometheus:
    """A Prometheus with the shipped rules on shorter windows."""

    def __init__(self, folder: Path, targets: list[int], scale: float, alertmanager: int) -> None:
        config = yaml.safe_load((ROOT / "monitoring" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"] = [
            {"targets": [f"127.0.0.1:{port}" for port in targets]}
        ]
        config["alerting"]["alertmanagers"][0]["static_configs"] = [
            {"targets": [f"127.0.0.1:{alertmanager}"]}
        ]
        for name in config["rule_files"]:
            rules = promql.scaled_rules(ROOT / "monitoring" / name, scale, "1s")
            (folder / name).write_text(yaml.safe_dump(rules))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.process = Process(
            [
                need("prometheus", "prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            folder / "prometheus.log",
        )

    def query(self, expression: str) -> list[dict[str, Any]]:
        words = urllib.parse.urlencode({"query": expression})
        status, body = get(f"{self.url}/api/v1/query?{words}")
        told = json.loads(body) if status else {}
        if told.get("status") != "success":
            raise ValueError(f"{expression}: {told.get('error', status)}")
        return told["data"]["result"]

    def firing(self) -> set[str]:
        status, body = get(f"{self.url}/api/v1/alerts")
        if status != 200:
            return set()
        found = json.loads(body)["data"]["alerts"]
        return {a["labels"]["alertname"] for a in found if a["state"] == "firing"}


def check_files(folder: Path, report: Report) -> None:
    """promtool and amtool on the files as they are shipped, and on one rule that was changed."""
    monitoring = ROOT / "monitoring"

    def tool(*words: str, cwd: Path = monitoring) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=120)

    promtool = need("promtool", "prometheus")
    for words in (
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml", "recording-rules.yml"),
        ("test", "rules", "tests/rules_test.yml"),
    ):
        done = tool(promtool, *words)
        report.hold(done.returncode == 0, f"promtool {' '.join(words)}", done.stderr.strip()[-300:])
    done = tool(need("amtool", "prometheus-alertmanager"), "check-config", "alertmanager.yml")
    report.hold(done.returncode == 0, "amtool check-config alertmanager.yml")
    changed = folder / "changed"
    shutil.copytree(monitoring, changed)
    alerts = (changed / "alerts.yml").read_text()
    (changed / "alerts.yml").write_text(alerts.replace("> 0.05", "> 0.5"))
    done = tool(promtool, "test", "rules", "tests/rules_test.yml", cwd=changed)
    report.hold(done.returncode != 0, "a changed rule fails its tests", "5 % became 50 %")


def check_names(port: int, report: Report) -> None:
    text = get(f"http://127.0.0.1:{port}/metrics")[1].decode()
    live = set(re.findall(r"^([a-z_:]+?)(?:\{| )", text, re.M))
    families = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    for who, asked in promql.used_by().items():
        known = live | families if who == "documents" else live
        report.hold(
            asked and asked <= known, f"names of {who} are in the live /metrics",
            f"{len(asked)} names" if asked <= known else f"missing {sorted(asked - known)}",
        )  # fmt: skip


def check_queries(prometheus: Prometheus, scale: float, report: Report) -> None:
    for name in promql.recordings():
        found = prometheus.query(name)
        report.hold(found, f"recording rule {name} has data", f"{len(found)} series")
    interval = f"{round(60_000 * 5 / scale)}ms"
    for title, query in promql.panel_queries():
        found = prometheus.query(promql.filled(query, interval=interval))
        report.hold(found, f"panel {title!r} has data", f"{len(found)} series")


class Drill:
    """Drives alerts until they fire, then heals until they clear."""

    def __init__(self, prometheus: Prometheus, report: Report) -> None:
        self._prometheus, self._report = prometheus, report

    def __call__(
        self, names: set[str], drive: Callable[[Callable[[], bool]], Any],
        heal: Callable[[Callable[[], bool]], Any], *, seconds: float = 150.0,
    ) -> None:  # fmt: skip
        """``drive`` and ``heal`` get a function that says whether it is done, and may just wait."""
        start = time.monotonic()
        fired: set[str] = set()

        def all_fired() -> bool:
            fired.update(self._prometheus.firing() & names)
            return fired >= names or time.monotonic() - start > seconds

        drive(all_fired)
        until(all_fired, seconds)
        for name in sorted(names):
            self._report.hold(name in fired, f"{name} fires", f"{time.monotonic() - start:.0f} s")
        start = time.monotonic()

        def cleared() -> bool:
            return not self._prometheus.firing() & names or time.monotonic() - start > seconds

        heal(cleared)
        until(cleared, seconds)
        left = self._prometheus.firing() & names
        for name in sorted(names):
            self._report.hold(
                name in fired and name not in left,
                f"{name} clears",
                f"{time.monotonic() - start:.0f} s",
            )


def drive_alerts(
    prometheus: Prometheus, traffic: Traffic, ports: list[int], easy: np.ndarray,
    restart: Callable[[], None], kill: Callable[[], None], report: Report,
) -> None:  # fmt: skip
    drill, (first, second) = Drill(prometheus, report), ports
    rng = np.random.default_rng(5)

    def mix(**changes: Any) -> Callable[[Callable[[], bool]], None]:
        def change(_: Callable[[], bool]) -> None:
            for name, value in changes.items():
                setattr(traffic.mix, name, value)

        return change

    # Only new inputs, and only to one instance.
    drill(
        {"MoeCacheLoss", "MoeInstanceSkew"},
        mix(repeated=0.0, ports=(first,)), mix(repeated=0.8, ports=(first, second)),
    )  # fmt: skip

    # Requests of 128 MiB each on the one worker of the first instance; all others wait behind them.
    huge = rng.standard_normal((512, 1024, WIDTH), dtype=np.float32)
    drill(
        {"MoeMemorySpike", "MoeHighLatency"},
        lambda done: burst(first, huge, requests=400, threads=3, until=done),
        mix(),
    )  # fmt: skip

    # Work that takes longer than the second instance's breaker calls slow: it opens, and until its
    # probe succeeds requests are refused.
    large = rng.standard_normal((64, 1024, WIDTH), dtype=np.float32)
    drill(
        {"MoeHighErrorRate", "MoeCircuitOpen"},
        lambda done: burst(second, large, requests=1000, threads=4, until=done),
        mix(),
    )  # fmt: skip

    # Tokens that all look like the easiest one: few experts, always the same.
    same = np.broadcast_to(easy, (32, 1024, WIDTH)).astype(np.float32)
    varied = rng.standard_normal((64, 1024, WIDTH), dtype=np.float32)
    drill(
        {"MoePoorLoadBalance", "MoeBudgetDrift"},
        lambda done: burst(first, same, requests=400, threads=1, until=done),
        lambda done: burst(first, varied, requests=2000, threads=1, until=done),
        seconds=240,
    )  # fmt: skip

    def kill_one(done: Callable[[], bool]) -> None:
        kill()
        mix(ports=(first,))(done)

    def restart_it(done: Callable[[], bool]) -> None:
        restart()
        mix(ports=(first, second))(done)

    drill({"MoeInstanceDown"}, kill_one, restart_it)


def verify(folder: Path, scale: float, report: Report) -> None:
    programs = [
        need("prometheus", "prometheus"),
        need("prometheus-alertmanager", "prometheus-alertmanager"),
        need("redis-server", "redis-server"),
    ]
    check_files(folder, report)
    checkpoint, easy = make_checkpoint(folder)
    redis_port, ports = free_port(), [free_port(), free_port()]
    settings: dict[str, Any] = dict(
        checkpoint=checkpoint, input_dim=WIDTH, buckets="32,1024,8192",
        redis_url=f"redis://127.0.0.1:{redis_port}/0", prefetch="true", replicas=2,
        rate_limit_requests=10_000_000, rate_limit_tokens=10_000_000_000,
        trusted_proxies="127.0.0.0/8", drain_seconds=1,
    )  # fmt: skip
    started: list[Process] = []

    def start(process: Process) -> Process:
        started.append(process)
        return process

    try:
        redis = [programs[2], "--port", str(redis_port), "--bind", "127.0.0.1", "--save", ""]
        start(Process(redis, folder / "redis.log", cwd=folder))
        names = ("first", "second")
        instances = {
            name: start(service(folder, name, port=port, **settings, **own))
            for name, port, own in zip(names, ports, OWN, strict=True)
        }
        hook = Webhook()
        manager = yaml.safe_load((ROOT / "monitoring" / "alertmanager.yml").read_text())
        manager["receivers"][0]["webhook_configs"][0]["url"] = f"http://127.0.0.1:{hook.port}/"
        text = promql.scaled(yaml.safe_dump(manager), scale)
        (folder / "alertmanager.yml").write_text(text)
        manager_port = free_port()
        start(
            Process(
                [
                    programs[1], f"--config.file={folder / 'alertmanager.yml'}",
                    f"--storage.path={folder / 'alertmanager'}", "--cluster.listen-address=",
                    f"--web.listen-address=127.0.0.1:{manager_port}",
                ],
                folder / "alertmanager.log",
            )
        )  # fmt: skip
        for (name, process), port in zip(instances.items(), ports, strict=True):
            if not report.hold(wait_ready(process, port), f"instance {name} is ready"):
                report.say(process.tail(40))
                return
        prometheus = Prometheus(folder, ports, scale, manager_port)
        start(prometheus.process)
        with Traffic(WIDTH, Mix(ports=tuple(ports))) as traffic:
            hour = 3600 / scale
            begun = time.monotonic()
            until(lambda: time.monotonic() - begun > max(20, 600 / scale), 120)
            up = prometheus.query('up{job="dynamic-moe-router"} == 1')
            report.hold(len(up) == 2, "Prometheus scrapes both instances")
            for port in ports:
                check_names(port, report)
            check_queries(prometheus, scale, report)
            # MoeCacheLoss compares with an hour ago.
            until(lambda: time.monotonic() - begun > 1.2 * hour, 2 * hour)

            def kill() -> None:
                instances["second"].signal(signal.SIGKILL)

            def restart() -> None:
                again = start(service(folder, "second", port=ports[1], **settings, **OWN[1]))
                wait_ready(again, ports[1])

            drive_alerts(prometheus, traffic, ports, easy, restart, kill, report)
            told = dict(sorted(traffic.statuses.items()))
            report.say(f"     steady traffic by status: {told}")
        until(lambda: {n for n, s in hook.got if s == "firing"} >= set(promql.alerts()), 30)
        delivered = {name for name, status in hook.got if status == "firing"}
        report.hold(
            delivered >= set(promql.alerts()), "Alertmanager delivers every alert to its webhook",
            f"{sum(hook.got.values())} notices" if delivered >= set(promql.alerts())
            else f"missing {sorted(set(promql.alerts()) - delivered)}",
        )  # fmt: skip
    finally:
        for process in reversed(started):
            process.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description="Monitoring against real parts.")
    parser.add_argument(
        "--scale", type=float, default=60.0, help="an hour passes in 3600 / SCALE s"
    )
    parser.add_argument("--keep", action="store_true", help="keep logs and data, and say where")
    words = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report("verify-monitoring")
    folder = Path(tempfile.mkdtemp(prefix="verify-monitoring-"))
    report.say(f"windows and waits are divided by {words.scale:g}; thresholds are the shipped ones")
    try:
        verify(folder, words.scale, report)
    except DidNotRun as error:
        report.say(f"verify-monitoring DID NOT RUN: {error}")
        return 2
    finally:
        if words.keep:
            report.say(f"logs and data in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
