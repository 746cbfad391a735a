"""JSON log lines. They hold request ids, shapes and reasons; no tensor, no key.

A service writes them to standard output, where collectors look. An engine inside another program writes
them to standard error, because standard output belongs to that program.

Logging never breaks or holds up an answer. A line that cannot be written, because the disk is full,
the reader has gone, or it does not read, is dropped and counted (``moe_log_lines_dropped_total``).
"""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
import time
from typing import Any

import structlog

# How long one line waits for a reader that does not read.
_PATIENCE_SECONDS = 0.2
# A pipe that is ready for writing takes at least this many bytes at once without blocking.
_CHUNK = getattr(select, "PIPE_BUF", 512)


class LineStream:
    """Writes lines to ``sys.stdout`` or ``sys.stderr``, looked up at each line: programs replace them.

    Args:
        name: ``stdout`` or ``stderr``.

    Attributes:
        dropped: lines that could not be written.
        failure: why the last line could not be written; "" if it was.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._stalled = False
        self._torn = False  # the last line was written in part
        self.dropped = 0
        self.failure = ""

    def msg(self, line: str) -> None:
        """Writes a line. Raises nothing."""
        with self._lock:
            try:
                self._write(line)
            except Exception as error:  # a full disk, a closed pipe, a closed or replaced stream
                self.dropped += 1
                first, self.failure = not self.failure, _reason(error)
            else:
                self.failure = ""
                return
        if first:
            self._report_outage()

    debug = info = warning = error = critical = exception = log = msg

    def _write(self, line: str) -> None:
        stream = getattr(sys, self._name)
        if stream is None:
            raise OSError("it is closed")
        try:
            descriptor = stream.fileno()
        except (OSError, ValueError):  # a stream in memory, as in a test or a notebook
            stream.write(line + "\n")
            stream.flush()
            return
        # Not through the stream's buffer: bytes that it cannot write would stay in it, and fail once
        # more when the interpreter flushes it at exit, which turns exit code 0 into 120.
        data = (line + "\n").encode("utf-8", "backslashreplace")
        if self._torn:
            data = b"\n" + data
        end = time.monotonic() + (0.0 if self._stalled else _PATIENCE_SECONDS)
        at = 0
        try:
            while at < len(data):
                self._await_room(descriptor, end)
                at += os.write(descriptor, data[at : at + _CHUNK])
        finally:
            if at:
                self._torn = at < len(data)

    def _await_room(self, descriptor: int, end: float) -> None:
        if not hasattr(select, "poll"):  # Windows; writing to a pipe may then block
            return
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        self._stalled = not poll.poll(max(end - time.monotonic(), 0.0) * 1000)
        if self._stalled:
            raise TimeoutError("its reader does not read")

    def _report_outage(self) -> None:
        """Reports on standard error, once for each outage, that lines are lost."""
        if self._name == "stderr":
            return
        try:
            sys.stderr.write(
                f"logs cannot be written to standard output ({self.failure}). Lines are dropped and "
                "counted in moe_log_lines_dropped_total until it can be written again.\n"
            )
            sys.stderr.flush()
        except Exception:  # nobody is left to be informed
            return


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return str(text) or type(error).__name__


def stream_of(logger: Any) -> LineStream | None:
    """Returns the stream that a logger of ``make_logger`` writes to; None for another logger."""
    stream = getattr(logger, "stream", None)
    return stream if isinstance(stream, LineStream) else None


def make_logger(level: str, environment: str, *, stream: str = "stderr") -> Any:
    """Returns a structlog logger that writes JSON lines.

    What a transport binds by ``structlog.contextvars.bind_contextvars`` (request and trace ids) is in
    every line that is written while it answers.

    Args:
        level: ``DEBUG`` ... ``CRITICAL``; lines below it are not written.
        environment: named in each line.
        stream: ``stdout`` or ``stderr``.
    """
    filtering: type = structlog.make_filtering_bound_logger(getattr(logging, level))

    class Logger(filtering):
        @property
        def stream(self) -> LineStream:
            return self._logger

    return structlog.wrap_logger(
        LineStream(stream),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=Logger,
    ).bind(environment=environment)  # bound once: the proxy would bind itself anew at every line
