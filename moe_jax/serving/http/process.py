"""The service as a process: configuration, logs, engine, HTTP and gRPC, in this order."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from moe_jax.config import load_config
from moe_jax.serving.engine import RouterEngine, make_logger
from moe_jax.serving.http.server import Server, bind, serve

_MOST_FILES = 65_536


def _allow_many_connections() -> None:
    """Raises the limit of open files: each connection is one, and the usual limit is 1,024."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def run(*, config_file: Path | None, grpc_port: int | None = None, **settings: Any) -> None:
    """Serves until a signal. Blocks; call it on the main thread.

    Args:
        config_file: JSON file, or None.
        grpc_port: port of gRPC; None serves HTTP only.
        **settings: settings that win over environment and file; None leaves one to them.

    Raises:
        ConfigError: a setting is wrong.
        ValueError: an address is taken or does not exist, or the weights cannot be served.
    """
    config = load_config(config_file, **settings)
    _allow_many_connections()
    host, port = config.serving.host, config.serving.port
    # Taken before minutes are spent on warming up; connections are refused until it listens.
    sock = bind(host, port)
    if grpc_port:
        try:
            bind(host, grpc_port).close()  # gRPC itself listens only once there is an engine
        except ValueError:
            sock.close()
            raise
    log = make_logger(config.log_level, config.environment, stream="stdout")
    with RouterEngine(config, background=True, logger=log) as engine:
        server = Server(engine)
        stopped: list[threading.Event] = []
        if grpc_port is not None:
            from moe_jax.serving.http.grpc_server import GrpcServer

            grpc = GrpcServer(server.transport, host, grpc_port)
            grpc.start()
            seconds = config.serving.request_timeout_seconds
            server.on_stop = lambda: stopped.append(grpc.stop(seconds))
            engine.log.info("listening", host=host, port=grpc.port, protocol="grpc")
        serve(server, sock)
        for event in stopped:
            event.wait()
        ended = engine.shutdown()
        if engine.cannot_start:
            in_log = config.log_level != "CRITICAL" and not engine.parts.log_failure
            raise ValueError(
                "the service cannot start. The log line load_failed says why."
                if in_log
                else engine.load_error
            )
    if not ended:
        # A thread is still in XLA's code: compiling, or waiting for a device that hangs. The end of
        # the interpreter under it would crash the process. Logs are written through, so nothing is
        # lost by leaving at once.
        os._exit(0)
