"""``make verify-monitoring``: Prometheus on two running instances, with traffic and faults.

Every query of the dashboard and every recording rule must return data. Every name that a query asks for
must be in a live /metrics. Every alert is driven to fire and to clear by its cause: slow and oversized
requests, slow work that opens the circuit, tokens that all look alike, an instance that is killed.
Windows and ``for`` are divided by ``--scale`` (60: an hour is a minute); thresholds stay as they are.
Alerts that fire reach Alertmanager and its webhook.

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
from deploy.verify.check import Report, run
from deploy.verify.processes import ROOT, Programs, free_port, get, hold_ready, need, until
from deploy.verify.sample_checkpoint import WIDTH, save_sample
from deploy.verify.traffic import Load, Mix, MixedInputs, Repeats

# Settings of each instance: one place on the device makes latency easy to raise on the first, and a low
# bound on slow calls makes the circuit easy to open on the second.
INSTANCES: dict[str, dict[str, Any]] = {
    "first": dict(max_inflight=1),
    "second": dict(slow_call_seconds=0.02),
}


class Webhook:
    """The address that Alertmanager notifies; counts notices by alert and status."""

    def __init__(self) -> None:
        self.received = collections.Counter[tuple[str, str]]()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                for alert in json.loads(self.rfile.read(length))["alerts"]:
                    hook.received[(alert["labels"]["alertname"], alert["status"])] += 1
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Silent: the report says what came."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_address[1]}/"
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def delivered(self) -> set[str]:
        """Names of the alerts that arrived as firing."""
        return {name for name, status in self.received if status == "firing"}


class Prometheus:
    """A Prometheus with the shipped rules on shorter windows."""

    def __init__(
        self, programs: Programs, targets: list[int], scale: float, alertmanager: int
    ) -> None:
        folder = programs.folder
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
        words = [
            need("prometheus", "prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        programs.start("prometheus", words)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Returns the series of an expression. Raises ValueError where Prometheus refuses it."""
        words = urllib.parse.urlencode({"query": expression})
        status, body = get(f"{self.url}/api/v1/query?{words}")
        answer = json.loads(body) if status else {}
        if answer.get("status") != "success":
            raise ValueError(f"{expression}: {answer.get('error', status)}")
        return answer["data"]["result"]

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        status, body = get(f"{self.url}/api/v1/alerts")
        if status != 200:
            return set()
        alerts = json.loads(body)["data"]["alerts"]
        return {a["labels"]["alertname"] for a in alerts if a["state"] == "firing"}


def start_alertmanager(programs: Programs, hook: Webhook, scale: float) -> int:
    """Starts Alertmanager with the shipped configuration and returns its port."""
    config = yaml.safe_load((ROOT / "monitoring" / "alertmanager.yml").read_text())
    config["receivers"][0]["webhook_configs"][0]["url"] = hook.url
    file, port = programs.folder / "alertmanager.yml", free_port()
    file.write_text(promql.scaled(yaml.safe_dump(config), scale))
    words = [
        need("prometheus-alertmanager", "prometheus-alertmanager"),
        f"--config.file={file}",
        f"--storage.path={programs.folder / 'alertmanager'}",
        "--cluster.listen-address=",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    programs.start("alertmanager", words)
    return port


def check_files(folder: Path, report: Report) -> None:
    """Holds promtool and amtool on the shipped files, and that a changed rule fails its tests."""
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
    """Holds that a live /metrics has every name that dashboard, rules and documents ask for."""
    text = get(f"http://127.0.0.1:{port}/metrics")[1].decode()
    live = set(re.findall(r"^([a-z_:]+?)(?:\{| )", text, re.M))
    families = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    for who, asked in promql.used_by().items():
        names = live | families if who == "documents" else live
        report.hold(
            asked and asked <= names,
            f"names of {who} are in the live /metrics",
            f"{len(asked)} names" if asked <= names else f"missing {sorted(asked - names)}",
        )


def check_queries(prometheus: Prometheus, scale: float, report: Report) -> None:
    """Holds that every recording rule and every panel has data."""
    for name in promql.recordings():
        series = prometheus.query(name)
        report.hold(series, f"recording rule {name} has data", f"{len(series)} series")
    interval = f"{round(60_000 * 5 / scale)}ms"
    for title, query in promql.panel_queries():
        series = prometheus.query(promql.filled(query, interval=interval))
        report.hold(series, f"panel {title!r} has data", f"{len(series)} series")


class Drill:
    """Drives alerts until they fire, then heals until they clear."""

    def __init__(self, prometheus: Prometheus, report: Report) -> None:
        self._prometheus, self._report = prometheus, report

    def __call__(
        self,
        names: set[str],
        drive: Callable[[Callable[[], bool]], Any],
        heal: Callable[[Callable[[], bool]], Any],
        *,
        seconds: float = 150.0,
    ) -> None:
        """Holds that the named alerts fire after ``drive`` and clear after ``heal``.

        Both get a function that says whether the alerts have changed; they may return before that.
        """
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
    prometheus: Prometheus,
    mix: Mix,
    ports: list[int],
    easy: np.ndarray,
    restart: Callable[[], None],
    kill: Callable[[], None],
    report: Report,
) -> None:
    """Drives every alert; ``mix`` steers the steady traffic of both instances."""
    drill, (first, second) = Drill(prometheus, report), ports
    rng = np.random.default_rng(5)

    def change(**shares: Any) -> Callable[[Callable[[], bool]], None]:
        def apply(_: Callable[[], bool]) -> None:
            for name, value in shares.items():
                setattr(mix, name, value)

        return apply

    def burst(
        port: int, x: np.ndarray, *, most: int, threads: int
    ) -> Callable[[Callable[[], bool]], Any]:
        def send(number: int) -> Repeats:
            return Repeats(port, x, number=number, client="10.2.0.1")

        return lambda done: Load(send, threads=threads, most=most, done=done).run()

    wait = change()

    # Only new inputs, and only to one instance.
    drill(
        {"MoeCacheLoss", "MoeInstanceSkew"},
        change(repeated=0.0, ports=(first,)),
        change(repeated=0.8, ports=(first, second)),
    )

    # Requests of 128 MiB on the one worker of the first instance; all others wait behind them.
    huge = rng.standard_normal((512, 1024, WIDTH), dtype=np.float32)
    drill({"MoeMemorySpike", "MoeHighLatency"}, burst(first, huge, most=400, threads=3), wait)

    # Work that takes longer than the second instance's breaker calls slow: the circuit opens, and
    # until its probe succeeds requests are refused. Large requests let small ones pass, and enough
    # quick ones among them would keep the circuit closed, so the steady traffic goes elsewhere.
    large = rng.standard_normal((64, 1024, WIDTH), dtype=np.float32)
    slow_work = burst(second, large, most=1000, threads=4)

    def slow_down(done: Callable[[], bool]) -> None:
        change(ports=(first,))(done)
        slow_work(done)

    drill({"MoeHighErrorRate", "MoeCircuitOpen"}, slow_down, change(ports=(first, second)))

    # Tokens that all look like the easiest one: few experts, always the same.
    same = np.broadcast_to(easy, (32, 1024, WIDTH)).astype(np.float32)
    varied = rng.standard_normal((64, 1024, WIDTH), dtype=np.float32)
    drill(
        {"MoePoorLoadBalance", "MoeBudgetDrift"},
        burst(first, same, most=400, threads=1),
        burst(first, varied, most=2000, threads=1),
        seconds=240,
    )

    def kill_one(done: Callable[[], bool]) -> None:
        kill()
        change(ports=(first,))(done)

    def restart_it(done: Callable[[], bool]) -> None:
        restart()
        change(ports=(first, second))(done)

    drill({"MoeInstanceDown"}, kill_one, restart_it)


def verify(work: Path, report: Report, options: argparse.Namespace) -> None:
    """Monitoring against Prometheus, Alertmanager and Redis."""
    scale = options.scale
    report.say(f"windows and waits are divided by {scale:g}; thresholds are the shipped ones")
    for package in ("prometheus", "prometheus-alertmanager", "redis-server"):
        need(package, package)
    check_files(work, report)
    checkpoint, easy = save_sample(work / "checkpoint")
    ports = [free_port(), free_port()]
    with Programs(work) as programs:
        settings: dict[str, Any] = dict(
            checkpoint=checkpoint,
            input_dim=WIDTH,
            buckets="32,1024,8192",
            redis_url=programs.redis(),
            prefetch="true",
            replicas=2,
            rate_limit_requests=10_000_000,
            rate_limit_tokens=10_000_000_000,
            trusted_proxies="127.0.0.0/8",
            drain_seconds=1,
        )
        instances = {
            name: programs.service(name, port=port, **settings, **special)
            for (name, special), port in zip(INSTANCES.items(), ports, strict=True)
        }
        hook = Webhook()
        manager_port = start_alertmanager(programs, hook, scale)
        for (name, process), port in zip(instances.items(), ports, strict=True):
            if not hold_ready(process, port, f"instance {name} is ready", report):
                return
        prometheus = Prometheus(programs, ports, scale, manager_port)
        mix = Mix(ports=tuple(ports))
        steady = Load(
            lambda number: MixedInputs(mix, number, width=WIDTH),
            threads=3,
            seconds=900.0,
            per_second=lambda: mix.per_second,
        )
        with steady:
            hour = 3600 / scale
            begun = time.monotonic()
            until(lambda: time.monotonic() - begun > max(20, 600 / scale), 120)
            up = prometheus.query('up{job="dynamic-moe-router"} == 1')
            report.hold(len(up) == 2, "Prometheus scrapes both instances")
            for port in ports:
                check_names(port, report)
            check_queries(prometheus, scale, report)
            # MoeCacheLoss compares with the values of an hour before.
            until(lambda: time.monotonic() - begun > 1.2 * hour, 2 * hour)

            def kill() -> None:
                instances["second"].signal(signal.SIGKILL)

            def restart() -> None:
                port = ports[1]
                process = programs.service("second", port=port, **settings, **INSTANCES["second"])
                hold_ready(process, port, "instance second is started again", report)

            drive_alerts(prometheus, mix, ports, easy, restart, kill, report)
            report.say(f"     steady traffic by status: {dict(steady.outcomes)}")
        expected = set(promql.alerts())
        until(lambda: hook.delivered() >= expected, 30)
        missing = sorted(expected - hook.delivered())
        report.hold(
            not missing,
            "Alertmanager delivers every alert to its webhook",
            f"missing {missing}" if missing else f"{hook.received.total()} notices",
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this check."""
    parser.add_argument(
        "--scale", type=float, default=60.0, help="an hour passes in 3600 / SCALE s"
    )


def main() -> int:
    """Runs the check as a command."""
    return run("verify-monitoring", verify, add_options=add_options)


if __name__ == "__main__":
    sys.exit(main())
