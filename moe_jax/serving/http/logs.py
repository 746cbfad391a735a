"""Logs: one JSON object a line on standard output, with the ids of the request that caused it.

No tensors and no keys: what is logged are names, counts, codes and times, and a traceback holds no
values of variables.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import structlog


def configure_logs(level: str, stream: TextIO | None = None) -> None:
    """Sets up logs of the process, those of other libraries included.

    Args:
        level: least severe level that is written, e.g. ``INFO``.
        stream: where to; standard output by default.
    """
    out = stream or sys.stdout
    number = logging.getLevelNamesMapping()[level]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    # Libraries are quiet: JAX's DEBUG alone is thousands of lines.
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)
