"""A real Redis of a test's own, to be killed and brought back."""

from __future__ import annotations

import shutil
import subprocess
import time

import pytest

from deploy.verify.processes import free_port
from moe_jax.serving.admission import limiter
from moe_jax.serving.cache import redis_store

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None,
    reason="redis-server is not installed: the drills with a real Redis did not run",
)


class RedisServer:
    """A Redis of our own on a free port, without persistence."""

    def __init__(self, folder) -> None:
        self.port = free_port()
        self._folder = folder
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        import redis

        self._process = subprocess.Popen(
            [
                "redis-server",
                "--port",
                str(self.port),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
                "--dir",
                str(self._folder),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 60
        with redis.Redis.from_url(self.url) as client:
            while True:
                assert self._process.poll() is None, "redis-server ended"
                assert time.monotonic() < end, "redis-server did not start"
                try:
                    assert client.info()["process_id"] == self._process.pid
                    return
                except redis.ConnectionError:
                    time.sleep(0.02)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is slow to answer, which is not what the drills mean by a lost Redis."""
    monkeypatch.setattr(limiter, "_REDIS_TIMEOUT", 60.0)
    monkeypatch.setattr(redis_store, "_TIMEOUT", 60.0)
