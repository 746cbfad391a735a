"""JSON log lines on standard output. They hold request ids, shapes and reasons; no tensor, no key."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


class _Stdout:
    """Writes to whatever ``sys.stdout`` is at the time."""

    def msg(self, line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    debug = info = warning = error = critical = exception = log = msg


def make_logger(level: str, environment: str) -> Any:
    """A logger of the service at ``DEBUG`` ... ``CRITICAL``; every line names the environment.

    What a transport binds by ``structlog.contextvars.bind_contextvars`` (request and trace ids) is in
    every line that is written while it answers.
    """
    return structlog.wrap_logger(
        _Stdout(),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level)),
    ).bind(environment=environment)  # bound once: the proxy would bind itself anew at every line
