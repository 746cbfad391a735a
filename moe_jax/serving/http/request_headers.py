"""The key that a request presents, and the names under which it is followed: request and trace ids."""

from __future__ import annotations

import dataclasses
import re
import secrets

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# W3C Trace Context: version, trace id, parent id, flags, all lower-case hex.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def presented_key(authorization: str | None, api_key: str | None) -> str | None:
    """Returns the key of ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``, or None without either.

    Example:
        >>> presented_key("Bearer abc", None), presented_key(None, "abc"), presented_key("Basic", None)
        ('abc', 'abc', None)
    """
    if authorization is not None:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() == "bearer" and key.strip():
            return key.strip()
    return api_key.strip() if api_key and api_key.strip() else None


def request_id(given: str | None) -> str:
    """Returns the client's ``X-Request-Id`` if it is a plain word, and otherwise a new random id.

    Example:
        >>> request_id("abc-1"), len(request_id("bad id")), len(request_id(None))
        ('abc-1', 32, 32)
    """
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return secrets.token_hex(16)


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """A W3C trace context, as far as logs need it."""

    trace_id: str
    parent_id: str


def trace_of(traceparent: str | None) -> Trace | None:
    """The trace of a ``traceparent`` header (W3C Trace Context); None where it is missing or invalid.

    Example:
        >>> trace_of("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").parent_id
        'b7ad6b7169203331'
        >>> trace_of("00-00000000000000000000000000000000-b7ad6b7169203331-01") is None
        True
    """
    match = _TRACEPARENT.fullmatch(traceparent or "")
    if match is None:
        return None
    version, trace_id, parent_id, _, more = match.groups()
    zero = not int(trace_id, 16) or not int(parent_id, 16)
    if zero or version == "ff" or (version == "00" and more):
        return None
    return Trace(trace_id, parent_id)
