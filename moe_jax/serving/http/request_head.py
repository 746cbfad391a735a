"""Which heads of HTTP/1.1 requests are refused beyond what the parser refuses, as functions of bytes.

The parser accepts heads that proxies and servers read in different ways. Where two readers disagree
about the end of a request, one client can put a request of its own into another's connection.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import httptools

Headers = Sequence[tuple[bytes, bytes]]  # names in lower case

_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
# Connection-specific fields of an upgrade, which go when it is ignored (RFC 9113, 3.1).
_UPGRADE_FIELDS = frozenset({b"upgrade", b"http2-settings"})


class HeadError(Exception):
    """A head is refused, with this status, error code and message."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status, self.code, self.text = status, code, text


def check_version(version: str) -> None:
    """Raises HeadError unless the version of HTTP is 1.0 or 1.1."""
    if version not in ("1.0", "1.1"):
        raise HeadError(505, "malformed", "expected HTTP/1.1")


def check_head(version: str, method: bytes, headers: Headers) -> None:
    """Raises HeadError for hosts, transfer codings and methods that this service does not take.

    Example:
        >>> check_head("1.1", b"GET", [(b"host", b"a"), (b"host", b"b")])
        Traceback (most recent call last):
            ...
        moe_jax.serving.http.request_head.HeadError: expected one Host header
    """
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (version == "1.1" and not hosts):
        raise HeadError(400, "malformed", "expected one Host header")
    if hosts and not _HOST.fullmatch(hosts[0].strip()):
        raise HeadError(400, "malformed", "expected a host and port in the Host header")
    codings = b",".join(v for name, v in headers if name == b"transfer-encoding").lower()
    words = [word.strip() for word in codings.split(b",")] if codings else []
    if words.count(b"chunked") > 1 or (words and version == "1.0"):
        raise HeadError(400, "malformed", "expected Transfer-Encoding: chunked, once")
    if words and words != [b"chunked"]:
        # The body would be read as if it were not encoded (RFC 9112, 6.1).
        raise HeadError(501, "malformed", "expected Transfer-Encoding: chunked")
    if method == b"CONNECT":
        raise HeadError(405, "method_not_allowed", "this service is no proxy")


def path_of_target(method: bytes, target: bytes) -> bytes:
    """Returns path and query of a request target, which may be a whole URL.

    Example:
        >>> path_of_target(b"GET", b"http://router.example?a=1")
        b'/?a=1'
    """
    if target == b"*" and method == b"OPTIONS":
        return b"/"
    if target.startswith(b"/"):
        return target
    # An absolute-form target without a path means "/" (RFC 9112, 3.2).
    parsed = httptools.parse_url(target)
    if parsed.host is None:
        raise HeadError(400, "malformed", "expected a path as the target")
    query = b"?" + parsed.query if parsed.query else b""
    return (parsed.path or b"/") + query


def head_without_upgrade(method: bytes, target: bytes, headers: Headers) -> bytes:
    """Returns the head of the same request without its offer of an upgrade.

    Example:
        >>> headers = [(b"host", b"a"), (b"connection", b"Upgrade, close"), (b"upgrade", b"h2c")]
        >>> head_without_upgrade(b"GET", b"/", headers)
        b'GET / HTTP/1.1\\r\\nhost: a\\r\\nconnection: close\\r\\n\\r\\n'
    """
    lines = [b"%s %s HTTP/1.1" % (method, target)]
    for name, value in headers:
        if name in _UPGRADE_FIELDS:
            continue
        if name == b"connection":
            words = [word.strip() for word in value.split(b",")]
            value = b", ".join(w for w in words if w.lower() not in _UPGRADE_FIELDS)
        lines.append(name + b": " + value)
    return b"\r\n".join(lines) + b"\r\n\r\n"
