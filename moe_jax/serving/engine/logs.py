"""JSON log lines. They hold request ids, shapes and reasons; no tensor, no key.

A service writes them to standard output, where collectors look; an engine inside somebody's program to
standard error, since standard output is the program's own.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


class _Stream:
    """Writes to whatever ``sys.stdout`` or ``sys.stderr`` is at the time."""

    def __init__(self, name: str) -> None:
        self._name = name

    def msg(self, line: str) -> None:
        stream = getattr(sys, self._name)
        stream.write(line + "\n")
        stream.flush()

    debug = info = warning = error = critical = exception = log = msg


def make_logger(level: str, environment: str, *, stream: str = "stderr") -> Any:
    """A logger at ``DEBUG`` ... ``CRITICAL`` to ``stdout`` or ``stderr``; lines name the environment.

    What a transport binds by ``structlog.contextvars.bind_contextvars`` (request and trace ids) is in
    every line that is written while it answers.
    """
    return structlog.wrap_logger(
        _Stream(stream),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level)),
    ).bind(environment=environment)  # bound once: the proxy would bind itself anew at every line
