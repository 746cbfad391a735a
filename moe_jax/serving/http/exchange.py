"""One request and its answer: names, headers, errors, one line in the log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from urllib.parse import parse_qsl

import structlog
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_jax.serving.engine import Client
from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.client_address import presented_key, request_id, trace_of
from moe_jax.serving.http.door import Door, retry_after
from moe_jax.serving.http.request_body import Disconnected

Parts = Sequence[bytes | memoryview]
Pairs = list[tuple[bytes, bytes]]

# What Prometheus and Kubernetes ask every few seconds is no news.
_QUIET = frozenset(
    {"/health", "/ready", "/metrics", "/v2/health/live", "/v2/health/ready", "/status.json"}
)
_PASSED_ON = ("x-forwarded-for", "forwarded", "via", "x-real-ip", "origin", "referer")
# Fewer parts than this many bytes are cheaper to join than to send one by one.
_JOIN = 128 * 1024
_STATUS_CODES = {404: "not_found", 405: "method_not_allowed"}


class Exchange:
    """One request as endpoints see it, at ``scope["exchange"]``."""

    __slots__ = (
        "_client", "body_complete", "counted", "door", "headers", "key", "path", "peer", "query",
        "request_id", "started", "status",
    )  # fmt: skip

    def __init__(self, door: Door, scope: Scope) -> None:
        self.started = time.monotonic()
        self.door = door
        self.headers = _joined(scope["headers"])
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
        """Who asks. Raises ``unauthorized``."""
        if self._client is None:
            self._client = self.door.engine.identify(
                api_key=self.key, peer=self.peer, forwarded_for=self.headers.get("x-forwarded-for")
            )
        return self._client

    @property
    def client_id(self) -> str:
        """For the log: a hash of the key or an address, once it is known who asks."""
        return self.peer if self._client is None else self._client.id

    def require_admin(self) -> None:
        """Raises ``unauthorized`` unless the operator asks."""
        # What comes through a proxy, or from a page in a browser, is not the machine's own.
        passed_on = any(name in self.headers for name in _PASSED_ON)
        self.door.require_admin(None if passed_on else self.peer, self.key)

    async def send_parts(
        self,
        send: Send,
        status: int,
        kind: bytes,
        parts: Parts,
        more: Pairs = [],  # noqa: B006
    ) -> None:
        """Sends a whole answer."""
        length = sum(len(part) for part in parts)
        headers: Pairs = [
            (b"content-type", kind), (b"content-length", str(length).encode()), *more
        ]  # fmt: skip
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if length <= _JOIN:
            parts = [b"".join(parts)]
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)
            await send({"type": "http.response.body", "body": part, "more_body": not last})

    async def send_error(self, send: Send, error: ServingError, more: Pairs = []) -> None:  # noqa: B006
        """``{"error": text, "code": word}`` with the status of the code."""
        text = {"error": self.door.told(error), "code": error.code}
        headers = list(more)
        if (seconds := retry_after(error)) is not None:
            headers.append((b"retry-after", seconds.encode()))
        if error.code == "unsupported_media_type":
            headers.append((b"accept-encoding", b"gzip, deflate"))
        if error.code == "unauthorized":
            headers.append((b"www-authenticate", b"Bearer"))
        if not self._worth_draining():
            headers.append((b"connection", b"close"))
        body = json.dumps(text, separators=(",", ":")).encode()
        await self.send_parts(send, error.status, b"application/json", [body], headers)

    def _worth_draining(self) -> bool:
        """Whether the rest of the body may still come in, to be thrown away.

        A client that is cut off while it sends often never sees why. One whose body has no end that
        we know, or is larger than we take, is cut off all the same.
        """
        if self.body_complete:
            return True
        declared = self.headers.get("content-length", "")
        return declared.isdigit() and len(declared) < 19 and \
            int(declared) <= self.door.body_limit  # fmt: skip


def _joined(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Returns headers by lower-case name, the lines of one name joined by commas (RFC 9110, 5.3)."""
    headers: dict[str, str] = {}
    for name, value in pairs:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return headers


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


def _duplicated(scope: Scope) -> str | None:
    names = [name for name, _ in scope["headers"]]
    return next((n.decode() for n in _ONCE if names.count(n) > 1), None)


class Envelope:
    """The outermost layer: every request gets an id, every fault an answer, every answer its headers.

    Args:
        app: the routes.
        door: what they share.
    """

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
                return
            await send({"type": "websocket.close", "code": 1003})
            return
        log = self.door.engine.log
        exchange = Exchange(self.door, scope)
        scope["exchange"] = exchange
        scope["app"] = self  # by which Starlette's router knows that its errors are handled
        own = [
            (b"x-request-id", exchange.request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"cache-control", b"no-store"),
        ]
        if self.door.draining:
            # Clients with a pool of connections open the next one elsewhere.
            own.append((b"connection", b"close"))

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                named = {name for name, _ in message["headers"]}
                extra = [pair for pair in own if pair[0] not in named]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        names = {"request_id": exchange.request_id}
        if (trace := trace_of(exchange.headers.get("traceparent"))) is not None:
            names |= {"trace_id": trace.trace_id, "parent_id": trace.parent_id}
        code = "ok"
        with structlog.contextvars.bound_contextvars(**names):
            try:
                if (twice := _duplicated(scope)) is not None:
                    raise ServingError("malformed", f"{twice}: expected once, got more than once.")
                await self.app(scope, receive, answer)
            except ServingError as error:
                code = error.code
                await exchange.send_error(answer, error)
            except HTTPException as error:
                code = _STATUS_CODES.get(error.status_code, "malformed")
                more = [(k.lower().encode(), v.encode()) for k, v in (error.headers or {}).items()]
                text = f"{scope['method']} {exchange.path[:100]}: {error.detail}."
                await exchange.send_error(answer, ServingError(code, text), more)
            except Disconnected:
                code = "disconnected"
            except Exception:
                code = "internal"
                log.exception("failed", path=exchange.path[:200])
                if exchange.status:
                    raise
                wrong = ServingError(
                    "internal", "an internal error, which is in the service's log."
                )
                await exchange.send_error(answer, wrong)
            level = log.debug if exchange.path in _QUIET else log.info
            level(
                "request",
                method=scope["method"],
                path=exchange.path[:200],
                status=exchange.status,
                code=code,
                client=exchange.client_id,
                ms=round(1e3 * (time.monotonic() - exchange.started), 2),
            )
