"""Real programs for the checks: located or installed from Debian, run on loopback, stopped by id."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploy.verify.check import DidNotRun, Report

ROOT = Path(__file__).parents[2]


def need(program: str, package: str) -> str:
    """Returns the path of a program; as root, a missing one is installed from Debian.

    Raises:
        DidNotRun: it is missing and cannot be installed.
    """
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    located = shutil.which(program, path=path)
    if located is not None:
        return located
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise DidNotRun(f"there is no {program}; as root on Debian: apt-get install {package}")
    print(f"installing {package} for {program}", flush=True)
    # policy-rc.d keeps apt from starting the daemons that it installs.
    policy = Path("/usr/sbin/policy-rc.d")
    written = not policy.exists()
    if written:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (
            ["update", "-qq"],
            ["install", "-y", "-qq", "--no-install-recommends", package],
        ):
            done = subprocess.run(
                ["apt-get", *words], env=environment, capture_output=True, text=True, timeout=600
            )
    finally:
        if written:
            policy.unlink()
    located = shutil.which(program, path=path)
    if located is None:
        raise DidNotRun(f"apt-get install {package} did not bring {program}: {done.stderr[-300:]}")
    return located


# Below the ports that systems assign by themselves (from 32768 on Linux, 49152 elsewhere). So no
# connection and no socket that asks for port 0 takes a port between its choice and its use.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """Returns a port on loopback that no program listens on."""
    draw = random.SystemRandom()
    for _ in range(100):
        port = draw.choice(_PORTS)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(
        f"expected a free port from {_PORTS.start} to {_PORTS.stop}, got none in 100."
    )


class Process:
    """A program in the background with its output in a file."""

    def __init__(
        self,
        words: list[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.name, self.log = Path(words[0]).name, log
        with log.open("ab") as file:
            self._popen = subprocess.Popen(
                words,
                stdout=file,
                stderr=file,
                cwd=cwd,
                env=None if env is None else dict(env),
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    def ended(self) -> int | None:
        """Returns the exit code, or None while it runs."""
        return self._popen.poll()

    def signal(self, number: int) -> None:
        """Sends a signal, unless the program has ended."""
        if self.ended() is None:
            self._popen.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Returns the exit code. Raises subprocess.TimeoutExpired."""
        return self._popen.wait(seconds)

    def stop(self, seconds: float = 20.0) -> int:
        """Sends SIGTERM, after ``seconds`` SIGKILL, and returns the exit code."""
        self.signal(signal.SIGTERM)
        try:
            return self.wait(seconds)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            return self.wait(10)

    def tail(self, lines: int = 20) -> str:
        """Returns the last lines of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Programs:
    """The programs of one check. Leaving the context stops them, the last one first.

    Args:
        folder: for logs and data; each program runs in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Process] = []

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._started):
            process.stop()

    def start(self, name: str, words: list[str], env: Mapping[str, str] | None = None) -> Process:
        """Starts a program whose output goes to ``NAME.log``."""
        process = Process(words, self.folder / f"{name}.log", env=env, cwd=self.folder)
        self._started.append(process)
        return process

    def redis(self) -> str:
        """Starts Redis without a file of its data and returns its address. Raises DidNotRun."""
        port = free_port()
        program = need("redis-server", "redis-server")
        self.start("redis", [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""])
        return f"redis://127.0.0.1:{port}/0"

    def service(self, name: str, *, port: int, **settings: Any) -> Process:
        """Starts ``moe-jax serve`` on a loopback port; settings are those of ``config``."""
        words = ["-m", "moe_jax.cli", "serve", "--host", "127.0.0.1", "--port", str(port)]
        return self.start(name, [sys.executable, *words], _environment(self.folder, settings))


def _environment(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    kept = ("PATH", "HOME", "PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", "LD_LIBRARY_PATH")
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compile-cache"),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        **{name: os.environ[name] for name in kept if name in os.environ},
        **{f"MOE_{name.upper()}": str(value) for name, value in settings.items()},
    }


def get(url: str, timeout: float = 10.0) -> tuple[int, bytes]:
    """Returns status and body; status 0 where nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def until(
    true: Callable[[], Any], seconds: float, *, every: float = 0.25, alive: Process | None = None
) -> bool:
    """Waits until ``true()`` holds; False after ``seconds`` or when ``alive`` has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        if alive is not None and alive.ended() is not None:
            return False
        time.sleep(every)
    return False


def readings(port: int) -> dict[str, float]:
    """Returns the samples of a service's /metrics: name with labels -> value."""
    text = get(f"http://127.0.0.1:{port}/metrics")[1].decode()
    return {name: float(value) for name, value in re.findall(r"^([a-z_]\S*) (\S+)$", text, re.M)}


def wait_ready(process: Process, port: int, seconds: float = 180.0) -> bool:
    """Waits until the service says that it is ready; False where it ends or takes longer."""
    url = f"http://127.0.0.1:{port}/v2/health/ready"
    return until(lambda: get(url)[0] == 200, seconds, alive=process)


def hold_ready(process: Process, port: int, claim: str, report: Report) -> bool:
    """Notes whether a service becomes ready, with the end of its log where it does not."""
    if report.hold(wait_ready(process, port), claim):
        return True
    report.say(process.tail(40))
    return False
