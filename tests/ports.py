"""A port for a program of its own that cannot be asked to take any free one."""

from __future__ import annotations

import random
import socket

# Below what systems hand out by themselves (from 32768 on Linux, 49152 elsewhere): between this
# choice and the program's own, no connection and no socket that asks for port 0 gets the same.
_RANGE = range(20_000, 32_000)


def free_port() -> int:
    """A port of the loopback on which nobody listens."""
    draw = random.SystemRandom()
    for _ in range(100):
        port = draw.choice(_RANGE)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no free port among 100 of {_RANGE.start} to {_RANGE.stop}")
