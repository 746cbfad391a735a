"""Errors of the service: one table of codes and one exception.

A client error is never a 5xx; only ``internal`` means a bug of the service.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CODES: Mapping[str, int] = MappingProxyType(
    {
        "malformed": 400,
        "unauthorized": 401,
        "blocked": 403,
        "not_found": 404,
        "method_not_allowed": 405,
        "request_timeout": 408,
        "too_large": 413,
        "unsupported_media_type": 415,
        "invalid_values": 422,
        "rate_limited": 429,
        "internal": 500,
        "queue_full": 503,
        "circuit_open": 503,
        "draining": 503,
        "warming": 503,
        "device_error": 503,
        "out_of_memory": 503,
        "deadline_exceeded": 504,
    }
)
"""HTTP status of each error code. No code is defined anywhere else."""


class ServingError(Exception):
    """Raised instead of an answer to a request.

    Attributes:
        code: a word of ``CODES``.
        status: its HTTP status.
        message: what was expected, what came, what to do. Holds no tensor and no key.
        retry_after: seconds after which the same request may succeed, or None.

    Example:
        >>> error = ServingError("rate_limited", "too many requests", retry_after=2.5)
        >>> error.status, error.retry_after, str(error)
        (429, 2.5, 'too many requests')
    """

    def __init__(self, code: str, message: str, *, retry_after: float | None = None) -> None:
        if code not in CODES:
            raise ValueError(f"code: expected one of {', '.join(CODES)}, got {code!r}.")
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        """The HTTP status of the code."""
        return CODES[self.code]

    def __reduce__(self):
        return (_rebuilt, (self.code, self.message, self.retry_after))


def out_of_memory() -> ServingError:
    """Returns the error for a request that the host has no memory for now.

    Too little memory is a state of the host, as a full queue is, and no bug of the service.
    """
    return ServingError(
        "out_of_memory",
        "the service has no memory for this request now. Try again as Retry-After says, or send "
        "smaller batches.",
        retry_after=1.0,
    )


def _rebuilt(code: str, message: str, retry_after: float | None) -> ServingError:
    return ServingError(code, message, retry_after=retry_after)
