"""The service as a process: configuration, logs, engine, HTTP and gRPC, in this order."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import structlog

from moe_jax.config import load_config
from moe_jax.serving.engine import RouterEngine
from moe_jax.serving.http.logs import configure_logs
from moe_jax.serving.http.server import Server, bind, serve

_log = structlog.get_logger("moe_jax.server")


def run(*, config_file: Path | None, grpc_port: int | None = None, **settings: Any) -> None:
    """Serves until a signal. Blocks; call it on the main thread.

    Args:
        config_file: JSON file, or None.
        grpc_port: serves gRPC there too; None does not.
        **settings: settings that win over environment and file; None where not given.

    Raises:
        ConfigError: a setting that is wrong.
        OSError: an address that is taken.
    """
    config = load_config(config_file, **settings)
    configure_logs(config.log_level)
    host, port = config.serving.host, config.serving.port
    # Taken before minutes are spent on warming up; connections are refused until it listens.
    sock = bind(host, port)
    with RouterEngine(config) as engine:
        server = Server(engine)
        stopped: list[threading.Event] = []
        if grpc_port is not None:
            from moe_jax.serving.http.grpc_server import GrpcServer

            grpc = GrpcServer(server.door, f"{host}:{grpc_port}")
            grpc.start()
            seconds = config.serving.request_timeout_seconds
            server.on_stop = lambda: stopped.append(grpc.stop(seconds))
            _log.info("listening", host=host, port=grpc.port, protocol="grpc")
        serve(server, sock)
        for event in stopped:
            event.wait()
