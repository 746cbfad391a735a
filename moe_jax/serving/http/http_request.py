"""One HTTP request as endpoints see it: its headers, its client, and the way to answer it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from urllib.parse import parse_qsl

from starlette.types import Scope, Send

from moe_jax.serving.engine import Client
from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.request_headers import presented_key, request_id
from moe_jax.serving.http.transport import TransportContext, retry_after

Parts = Sequence[bytes | memoryview]
Headers = list[tuple[bytes, bytes]]

# Parts of at most this many bytes together are cheaper to join than to send one by one.
_JOIN = 128 * 1024

# Headers that are no lists. A second line of one makes two readers disagree about the request.
_ONCE = (
    b"authorization",
    b"content-encoding",
    b"content-length",
    b"content-type",
    b"host",
    b"inference-header-content-length",
    b"x-api-key",
)


class HttpRequest:
    """One request, at ``scope["moe_request"]``.

    Args:
        transport: what all requests share.
        scope: the ASGI scope.

    Attributes:
        headers: values by lower-case name.
        body_complete: whether the whole body has been read; True for a request without a body.
        counted: whether the engine counts a refusal by itself.
        status: of the answer; 0 until it begins.
    """

    __slots__ = (
        "_client",
        "body_complete",
        "counted",
        "headers",
        "key",
        "path",
        "peer",
        "query",
        "request_id",
        "started",
        "status",
        "transport",
    )

    def __init__(self, transport: TransportContext, scope: Scope) -> None:
        self.started = time.monotonic()
        self.transport = transport
        self.headers = joined_headers(scope["headers"])
        self.path: str = scope["path"]
        query = scope.get("query_string", b"")
        self.query = dict(parse_qsl(query.decode("latin-1"))) if query else {}
        peer = scope.get("client")
        self.peer = peer[0] if peer else "unknown"
        self.counted = False
        self.key = presented_key(self.headers.get("authorization"), self.headers.get("x-api-key"))
        self.request_id = request_id(self.headers.get("x-request-id"))
        # A request has a body only if its framing says so (RFC 9112, 6.3).
        self.body_complete = (
            self.headers.get("content-length", "0") == "0"
            and "transfer-encoding" not in self.headers
        )
        self.status = 0
        self._client: Client | None = None

    def client(self) -> Client:
        """Returns the client. Raises ``unauthorized`` or ``blocked``."""
        if self._client is None:
            self._client = self.transport.engine.identify(
                api_key=self.key, peer=self.peer, forwarded_for=self.headers.get("x-forwarded-for")
            )
        return self._client

    def admitted_client(self) -> Client:
        """Returns the client, if it is not blocked; counts no request. Raises as ``client``."""
        client = self.client()
        self.transport.engine.admit(client, requests=0)
        return client

    @property
    def client_id(self) -> str:
        """The client's id in log lines: a hash of its key or an address; the peer until it is known."""
        return self.peer if self._client is None else self._client.id

    def require_admin(self) -> None:
        """Raises ``unauthorized`` or ``blocked`` unless the request presents the admin key."""
        self.transport.engine.authorize_admin(
            self.key, peer=self.peer, forwarded_for=self.headers.get("x-forwarded-for")
        )

    async def send_parts(
        self, send: Send, status: int, media_type: bytes, parts: Parts, more: Headers | None = None
    ) -> None:
        """Sends a whole answer."""
        length = sum(len(part) for part in parts)
        headers: Headers = [
            (b"content-type", media_type),
            (b"content-length", str(length).encode()),
            *(more or []),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if length <= _JOIN:
            parts = [b"".join(parts)]
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)
            await send({"type": "http.response.body", "body": part, "more_body": not last})

    async def send_error(
        self, send: Send, error: ServingError, more: Headers | None = None
    ) -> None:
        """Sends ``{"error": text, "code": word}`` with the status of the code."""
        text = {"error": self.transport.message(error), "code": error.code}
        headers = list(more or [])
        if (seconds := retry_after(error)) is not None:
            headers.append((b"retry-after", seconds.encode()))
        if error.code == "unsupported_media_type":
            headers.append((b"accept-encoding", b"gzip, deflate"))
        if error.code == "unauthorized":
            headers.append((b"www-authenticate", b"Bearer"))
        if not self._rest_is_short():
            headers.append((b"connection", b"close"))
        body = json.dumps(text, separators=(",", ":")).encode()
        await self.send_parts(send, error.status, b"application/json", [body], headers)

    def _rest_is_short(self) -> bool:
        """Returns whether the connection may go on after the rest of the body.

        A body without a declared end, or larger than any that is accepted, is not worth reading.
        """
        if self.body_complete:
            return True
        declared = self.headers.get("content-length", "")
        return (
            declared.isdigit() and len(declared) < 19 and int(declared) <= self.transport.body_limit
        )


def joined_headers(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Returns headers by lower-case name, the lines of one name joined by commas (RFC 9110, 5.3).

    Example:
        >>> joined_headers([(b"via", b"a"), (b"host", b"x"), (b"via", b"b")])
        {'via': 'a, b', 'host': 'x'}
    """
    headers: dict[str, str] = {}
    for name, value in pairs:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return headers


def repeated_header(pairs: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Returns the name of a header that must come once and comes more often, or None."""
    names = [name for name, _ in pairs]
    return next((name.decode() for name in _ONCE if names.count(name) > 1), None)
