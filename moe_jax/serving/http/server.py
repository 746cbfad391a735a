"""The process: a socket, uvicorn, signals, and an end that loses no request."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from moe_jax.serving.engine import RouterEngine
from moe_jax.serving.http.app import create_app
from moe_jax.serving.http.connection import BoundedProtocol

_BACKLOG = 2048
# Longer than the usual 60 s of load balancers: the side that closes an idle connection first should
# be the one that would open the next.
_KEEP_ALIVE_SECONDS = 75
_GRACE_SECONDS = 5.0


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address and does not listen yet. Raises ValueError that says which."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named: asyncio turns off Nagle's delay, 40 ms an answer, for TCP sockets only.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ValueError(
            f"{host}:{port}: expected an address to listen on, got {error.strerror or error}. "
            "Stop what listens there, or give another --host or --port."
        ) from error
    sock.setblocking(False)
    return sock


class Server(uvicorn.Server):
    """uvicorn that drains.

    On SIGTERM or SIGINT readiness turns to no first, requests are answered for another
    ``drain_seconds`` while load balancers notice, then the socket closes, what is in flight ends,
    and the process exits with 0. A second signal skips the wait. SIGHUP reloads the checkpoint.

    Args:
        engine: what answers.
        on_stop: called once when the socket closes; other transports stop with it.
    """

    def __init__(self, engine: RouterEngine, on_stop: Callable[[], None] = lambda: None) -> None:
        self.engine, self.on_stop = engine, on_stop
        app = create_app(engine)
        self.transport = app.transport
        self._signals = 0
        self._drain_until: float | None = None
        self._asked_to_reload = False
        self._tasks: set[asyncio.Task[None]] = set()
        # What uvicorn would print for every line of garbage, the client has been told.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(BoundedProtocol, refused=engine.recorder.refused),  # pyright: ignore[reportArgumentType]
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                # Else uvicorn believes X-Forwarded-For from this machine, whoever is configured.
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(
                    engine.config.serving.request_timeout_seconds + _GRACE_SECONDS
                ),
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes SIGTERM or SIGINT; ``on_tick`` acts on it."""
        # A signal handler runs between any two lines: it takes no lock, it only leaves a note.
        self._signals += 1

    def ask_to_reload(self, sig: int, frame: FrameType | None) -> None:
        """Notes SIGHUP; ``on_tick`` acts on it."""
        self._asked_to_reload = True

    async def on_tick(self, counter: int) -> bool:
        """Acts on noted signals; returns whether the process is to end."""
        if self._asked_to_reload:
            self._asked_to_reload = False
            task = asyncio.create_task(self._reload())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._signals and self._drain_until is None:
            seconds = self.engine.config.serving.drain_seconds
            self._drain_until = time.monotonic() + seconds
            self.transport.draining = True
            self.engine.begin_drain()
        if self.engine.cannot_start:
            self.should_exit = True  # it would never be ready; the process says why and ends
        if self._drain_until is not None and (
            self._signals > 1 or time.monotonic() >= self._drain_until
        ):
            self.should_exit = True
        return await super().on_tick(counter)

    async def _reload(self) -> None:
        # Whatever goes wrong, the engine has logged it and the old checkpoint serves on.
        with contextlib.suppress(Exception):
            await self.transport.aside(self.engine.reload)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops the other transports and closes the sockets."""
        self.on_stop()
        await super().shutdown(sockets)


def serve(server: Server, sock: socket.socket) -> None:
    """Serves until a signal, then drains. Blocks; call it on the main thread.

    Args:
        server: what serves.
        sock: from ``bind``.
    """
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, server.ask_to_reload)
    host, port = sock.getsockname()[:2]
    server.engine.log.info("listening", host=host, port=port, protocol="http")
    server.run(sockets=[sock])
