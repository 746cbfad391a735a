"""What a million tokens cost on this machine, by a running service's own metrics.

    python -m deploy.verify.capacity [--seconds 10] [--clients 4]

Starts ``moe-jax serve`` with configs/production.json (limits lifted), sends 4 x 128 x 768 float32
requests in binary from a few connections on loopback, and reads /metrics before and after: CPU seconds
of the service a million tokens, tokens a second, resident memory. Once with inputs that are all new and
once with inputs that repeat. The clients share the machine, so tokens a second are what is left for the
service; CPU seconds are its own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from deploy.verify.processes import ROOT, free_port, get, service, wait_ready
from deploy.verify.traffic import Connection, infer_body

SHAPE = (4, 128, 768)


def readings(port: int) -> dict[str, float]:
    text = get(f"http://127.0.0.1:{port}/metrics")[1].decode()
    return {
        name: float(value)
        for name, value in re.findall(r"^([a-z_]+)(?:\{outcome=\"ok\"\})? (\S+)$", text, re.M)
    }


def load(port: int, seconds: float, clients: int, *, repeat: bool) -> list[float]:
    """Sends for so long; seconds of each request that was answered."""
    end, times, lock = time.monotonic() + seconds, list[float](), threading.Lock()

    def send(number: int) -> None:
        rng, connection = np.random.default_rng(number), Connection(port)
        body, headers = infer_body(rng.standard_normal(SHAPE, dtype=np.float32))
        own, step = bytearray(body), 0
        while time.monotonic() < end:
            if not repeat:
                own[-4:] = np.float32(1e-4 * step).tobytes()
            start = time.perf_counter()
            status = connection.post(bytes(own), headers)
            if status == 200:
                with lock:
                    times.append(time.perf_counter() - start)
            step += 1
        connection.close()

    threads = [threading.Thread(target=send, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 60)
    return times


def measure(port: int, seconds: float, clients: int, *, repeat: bool) -> dict[str, Any]:
    load(port, 1.0, clients, repeat=repeat)
    before, start = readings(port), time.monotonic()
    times = load(port, seconds, clients, repeat=repeat)
    after, elapsed = readings(port), time.monotonic() - start
    tokens = after["moe_tokens_total"] - before["moe_tokens_total"]
    cpu = after["process_cpu_seconds_total"] - before["process_cpu_seconds_total"]
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


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost of a million tokens.")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=4)
    words = parser.parse_args()
    port = free_port()
    config = json.loads((ROOT / "configs" / "production.json").read_text())
    settings = {
        **config["router_config"], **config["performance"],
        "security_level": "minimal", "environment": "production", "log_level": "WARNING",
        "buckets": "512", "drain_seconds": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="capacity-") as folder:
        process = service(Path(folder), "service", port=port, **settings)
        try:
            if not wait_ready(process, port):
                print(process.tail(30), file=sys.stderr)
                return 2
            for repeat in (False, True):
                print(json.dumps(measure(port, words.seconds, words.clients, repeat=repeat)))
        finally:
            process.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
