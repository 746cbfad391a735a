"""Ends of the process: while it starts, with weights that are unsound, with a log that is lost."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deploy.verify.processes import free_port
from tests.serving.engine.test_reload import write
from tests.serving.served import WIDTH, tensor

ROOT = Path(__file__).parents[3]
PATIENCE = 120.0  # seconds after which a step counts as hung
BODY = json.dumps({"inputs": [tensor(np.ones((1, 4, WIDTH), np.float32))]}).encode()


@contextlib.contextmanager
def serving(stdout, **settings):
    """``moe-jax serve`` on a free port, its standard output going where the test says."""
    port = free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith("MOE_")}
    defaults = {"INPUT_DIM": WIDTH, "BUCKETS": "8", "SERVE_MOE": "off", "DRAIN_SECONDS": 0}
    env |= {f"MOE_{name}": str(value) for name, value in (defaults | settings).items()}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
    command = [sys.executable, "-m", "moe_jax.cli", "serve", "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process, port
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def asked(port: int, method: str, path: str, body: bytes | None = None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def until_answers(port: int, path: str, status: int) -> bytes:
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(ConnectionError):
            got_status, data = asked(port, "GET", path)
            if got_status == status:
                return data
        assert time.monotonic() < deadline
        time.sleep(0.05)


def terminated(process) -> tuple[int, str]:
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


@pytest.mark.parametrize("log", ["full disk", "closed pipe"])
def test_a_log_that_cannot_be_written_breaks_nothing(log):  # S4
    if log == "full disk":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    with serving(stdout, LOG_LEVEL="DEBUG") as (process, port):
        os.close(stdout)
        until_answers(port, "/ready", 200)
        infer = "/v2/models/router/infer"
        assert [asked(port, "POST", infer, BODY)[0] for _ in range(50)] == [200] * 50
        assert asked(port, "POST", infer, b"{")[0] == 400, "and not a 500"
        assert asked(port, "GET", "/nowhere")[0] == 404
        text = asked(port, "GET", "/metrics")[1].decode()
        [line] = [x for x in text.splitlines() if x.startswith("moe_log_lines_dropped_total ")]
        assert float(line.split()[1]) >= 50
        health = json.loads(asked(port, "GET", "/health")[1])
        assert health["components"]["monitoring"]["status"] == "losing_log_lines"
        code, errors = terminated(process)
    assert code == 0, errors
    assert errors.count("logs cannot be written to standard output") == 1, "the start says so"
    assert "Traceback" not in errors


def test_sigterm_while_it_warms_exits_with_0():
    # Without the compilation cache, and with large buckets, the start takes seconds.
    settings = {
        "INPUT_DIM": 512,
        "BUCKETS": "",
        "SERVE_MOE": "on",
        "REQUEST_TIMEOUT_SECONDS": 60,
    }
    codes = []
    for pause in (0.0, 0.5, 1.0):
        with serving(subprocess.PIPE, **settings) as (process, port):
            until_answers(port, "/ready", 503)
            time.sleep(pause)
            process.send_signal(signal.SIGTERM)
            out, errors = process.communicate(timeout=PATIENCE)
            codes.append(process.returncode)
            assert errors == "", "no `exception not rethrown`"
            assert '"stopped"' in out
    assert codes == [0, 0, 0]


def test_unsound_weights_are_served_by_nobody_and_a_start_says_why(tmp_path):  # S7
    path = write(tmp_path / "nan", seed=1, width=WIDTH, spoil=True)
    with serving(subprocess.PIPE, CHECKPOINT=path) as (process, port):
        deadline = time.monotonic() + PATIENCE
        while b"params_unsound" not in until_answers(port, "/ready", 503):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        status, data = asked(port, "POST", "/v2/models/router/infer", BODY)
        assert (status, json.loads(data)["code"]) == (503, "warming")
        health = json.loads(asked(port, "GET", "/health")[1])
        assert health["status"] == "unhealthy"
        assert "not finite" in health["components"]["router"]["error"]
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert '"reason": "params_unsound"' in out
