"""What a million tokens cost on this machine, by a running service's own metrics.

    python -m deploy.verify.token_cost [--seconds 10] [--clients 4]

Starts ``moe-jax serve`` with configs/production.json (limits lifted), sends 4 x 128 x 768 float32
requests in binary from a few connections on loopback, and reads /metrics before and after: CPU seconds
of the service per million tokens, tokens per second, resident memory. Once with inputs that are all new
and once with inputs that repeat. The clients share the machine, so tokens per second are what they
leave to the service; CPU seconds are the service's alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from deploy.verify.check import DidNotRun, Report, run
from deploy.verify.processes import ROOT, Programs, free_port, readings, wait_ready
from deploy.verify.traffic import Load, Repeats

SHAPE = (4, 128, 768)


class Timed(Repeats):
    """Repeats one input and keeps the seconds of each request that succeeded."""

    def __init__(self, port: int, number: int, times: list[float], *, repeat: bool) -> None:
        x = np.random.default_rng(number).standard_normal(SHAPE, dtype=np.float32)
        super().__init__(port, x, number=number, changing=not repeat)
        self._times = times

    def __call__(self) -> int:
        """Sends the input and returns the status."""
        start = time.perf_counter()
        status = super().__call__()
        if status == 200:
            self._times.append(time.perf_counter() - start)
        return status


def measure(port: int, seconds: float, clients: int, *, repeat: bool) -> dict[str, Any]:
    """Sends for ``seconds`` after a second of warm-up and returns a row of figures."""

    def send(seconds: float) -> list[float]:
        times: list[float] = []
        Load(
            lambda number: Timed(port, number, times, repeat=repeat),
            threads=clients,
            seconds=seconds,
        ).run()
        return times

    send(1.0)
    before, start = readings(port), time.monotonic()
    times = send(seconds)
    after, elapsed = readings(port), time.monotonic() - start

    def grown(name: str) -> float:
        return after[name] - before[name]

    tokens = grown("moe_tokens_total")
    cpu = grown("process_cpu_seconds_total")
    return {
        "inputs": "repeated" if repeat else "new",
        "requests": len(times),
        "tokens_per_second": round(tokens / elapsed),
        "cpu_seconds_per_million_tokens": round(1e6 * cpu / tokens, 3),
        "cpus_used": round(cpu / elapsed, 2),
        "p50_ms": round(1e3 * float(np.quantile(times, 0.5)), 2),
        "p95_ms": round(1e3 * float(np.quantile(times, 0.95)), 2),
        "resident_mib": round(after["process_resident_memory_bytes"] / 2**20),
    }


def verify(work: Path, report: Report, options: argparse.Namespace) -> None:
    """Prints what a million tokens cost, as lines of JSON."""
    port = free_port()
    config = json.loads((ROOT / "configs" / "production.json").read_text())
    settings = {
        **config["router_config"],
        **config["performance"],
        "security_level": "minimal",
        "environment": "production",
        "log_level": "WARNING",
        "buckets": "512",
        "drain_seconds": 0,
    }
    with Programs(work) as programs:
        process = programs.service("service", port=port, **settings)
        if not wait_ready(process, port):
            raise DidNotRun(f"the service is not ready\n{process.tail(30)}")
        for repeat in (False, True):
            row = measure(port, options.seconds, options.clients, repeat=repeat)
            report.say(json.dumps(row))
            report.hold(row["requests"], f"{row['inputs']} inputs are answered")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this check."""
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--clients", type=int, default=4, help="connections")


def main() -> int:
    """Runs the check as a command."""
    return run("token-cost", verify, add_options=add_options)


if __name__ == "__main__":
    sys.exit(main())
