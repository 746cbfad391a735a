"""Real programs for the checks: found or installed from Debian, started on loopback, stopped by id."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class DidNotRun(Exception):
    """A tool that a check needs is not here and cannot be installed."""


@dataclasses.dataclass
class Report:
    """What was shown, what failed, what was skipped and why; printed as it comes."""

    title: str
    failed: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    passed: int = 0

    def hold(self, true: Any, what: str, detail: str = "") -> bool:
        """Notes that something holds, or that it does not."""
        if true:
            self.passed += 1
        else:
            self.failed.append(what)
        self.say(f"{'ok  ' if true else 'FAIL'} {what}{': ' + detail if detail else ''}")
        return bool(true)

    def skip(self, what: str, reason: str) -> None:
        self.skipped.append(what)
        self.say(f"SKIP {what}: {reason}")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def finish(self) -> int:
        """Prints the sum and returns the exit code."""
        self.say(
            f"{self.title}: {self.passed} held, {len(self.failed)} failed, "
            f"{len(self.skipped)} skipped"
        )
        for what in self.failed:
            self.say(f"  failed: {what}")
        return 1 if self.failed else 0


def need(program: str, package: str) -> str:
    """The path of a program; as root it is installed from Debian where it is missing.

    Raises:
        DidNotRun: it is missing and cannot be installed.
    """
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is not None:
        return found
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise DidNotRun(f"there is no {program}; as root on Debian: apt-get install {package}")
    print(f"installing {package} for {program}", flush=True)
    # policy-rc.d keeps apt from starting the daemons that it installs.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
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
        if ours:
            policy.unlink()
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise DidNotRun(f"apt-get install {package} did not bring {program}: {done.stderr[-300:]}")
    return found


# Below what systems hand out by themselves (from 32768 on Linux, 49152 elsewhere): between a choice
# and a program's own use of it, no connection and no socket that asks for port 0 gets the same.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """A port on loopback that nobody listens on, for a program that must be told one."""
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
        self, words: list[str], log: Path, *, env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:  # fmt: skip
        self.name, self.log = Path(words[0]).name, log
        with log.open("ab") as file:
            self._popen = subprocess.Popen(
                words, stdout=file, stderr=file, cwd=cwd,
                env=None if env is None else dict(env),
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._popen.pid

    def ended(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._popen.poll()

    def signal(self, number: int) -> None:
        if self.ended() is None:
            self._popen.send_signal(number)

    def wait(self, seconds: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        return self._popen.wait(seconds)

    def stop(self, seconds: float = 20.0) -> int:
        """SIGTERM, and SIGKILL where that does not help."""
        self.signal(signal.SIGTERM)
        try:
            return self.wait(seconds)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            return self.wait(10)

    def tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def running(*processes: Process) -> Iterator[None]:
    """Stops them at the end, the last first."""
    try:
        yield
    finally:
        for process in reversed(processes):
            process.stop()


def get(url: str, timeout: float = 10.0) -> tuple[int, bytes]:
    """Status and body; status 0 where nothing answers."""
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
    """Waits until something holds; False after so many seconds or when the process has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        if alive is not None and alive.ended() is not None:
            return False
        time.sleep(every)
    return False


def service(folder: Path, name: str, *, port: int, **settings: Any) -> Process:
    """``moe-jax serve`` on a loopback port; every setting by its own name."""
    kept = ("PATH", "HOME", "PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", "LD_LIBRARY_PATH")
    environment = {word: os.environ[word] for word in kept if word in os.environ}
    environment |= {
        "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compile-cache"))
    environment.setdefault("PYTHONPATH", str(ROOT))
    environment |= {f"MOE_{word.upper()}": str(value) for word, value in settings.items()}
    return Process(
        [sys.executable, "-m", "moe_jax.cli", "serve", "--host", "127.0.0.1", "--port", str(port)],
        folder / f"{name}.log", env=environment, cwd=folder,
    )  # fmt: skip


def wait_ready(process: Process, port: int, seconds: float = 180.0) -> bool:
    """Until the service says that it is ready."""
    url = f"http://127.0.0.1:{port}/v2/health/ready"
    return until(lambda: get(url)[0] == 200, seconds, alive=process)
