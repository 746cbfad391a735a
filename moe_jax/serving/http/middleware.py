"""The outermost layer of the ASGI application: request ids, error responses, and log lines."""

from __future__ import annotations

import time

import structlog
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.http_request import HttpRequest, repeated_header
from moe_jax.serving.http.request_body import Disconnected
from moe_jax.serving.http.request_headers import trace_of
from moe_jax.serving.http.transport import TransportContext, as_serving_error

# Prometheus and Kubernetes request these paths every few seconds, so they are logged at debug level.
_QUIET = frozenset({"/health", "/ready", "/metrics", "/v2/health/live", "/v2/health/ready"})
MOST_REASON = 500
"""Most characters of a refusal's message in a log line."""
_STATUS_CODES = {404: "not_found", 405: "method_not_allowed"}


class RequestMiddleware:
    """Gives every request an id, every error a response, and every response the common headers.

    Args:
        app: the routes.
        transport: the state that the routes share.
    """

    def __init__(self, app: ASGIApp, transport: TransportContext) -> None:
        self.app, self.transport = app, transport

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
                return
            await send({"type": "websocket.close", "code": 1003})
            return
        request = HttpRequest(self.transport, scope)
        scope["moe_request"] = request
        # With "app" in the scope, Starlette's router raises HTTPException for an unknown path or
        # method instead of sending a plain-text response. `_answered` turns it into an error body.
        scope["app"] = self
        common = [
            (b"x-request-id", request.request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"cache-control", b"no-store"),
        ]
        if self.transport.draining:
            # Clients with a connection pool then open their next connection to another replica.
            common.append((b"connection", b"close"))

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                request.status = message["status"]
                names = {name for name, _ in message["headers"]}
                added = [pair for pair in common if pair[0] not in names]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        names = {"request_id": request.request_id}
        if (trace := trace_of(request.headers.get("traceparent"))) is not None:
            names |= {"trace_id": trace.trace_id, "parent_id": trace.parent_id}
        with structlog.contextvars.bound_contextvars(**names):
            code, refusal = await self._answered(scope, receive, answer, request)
            # Under strict the client learns only the code, so the log is where the reason is.
            reason = {} if refusal is None else {"error": refusal[:MOST_REASON]}
            log = self.transport.engine.log
            (log.debug if request.path in _QUIET else log.info)(
                "request",
                method=scope["method"],
                path=request.path[:200],
                status=request.status,
                code=code,
                **reason,
                client=request.client_id,
                ms=round(1e3 * (time.monotonic() - request.started), 2),
            )

    async def _answered(
        self, scope: Scope, receive: Receive, send: Send, request: HttpRequest
    ) -> tuple[str, str | None]:
        """Answers a request and returns, for its log line, the code and the message of a refusal."""
        try:
            if (name := repeated_header(scope["headers"])) is not None:
                refusal = ServingError("malformed", f"{name}: expected once, got more than once.")
                self.transport.engine.recorder.refused(refusal)
                raise refusal
            await self.app(scope, receive, send)
        except HTTPException as error:
            code = _STATUS_CODES.get(error.status_code, "malformed")
            more = [(k.lower().encode(), v.encode()) for k, v in (error.headers or {}).items()]
            text = f"{scope['method']} {request.path[:100]}: {error.detail}."
            refusal = ServingError(code, text)
            self.transport.engine.recorder.refused(refusal)
            await request.send_error(send, refusal, more)
            return code, text
        except Disconnected:
            return "disconnected", None
        except Exception as error:
            if request.status:  # the response has begun; uvicorn closes the connection
                self.transport.engine.log.exception("failed", path=request.path[:200])
                raise
            return await self._refuse(error, send, request)
        return "ok", None

    async def _refuse(self, error: Exception, send: Send, request: HttpRequest) -> tuple[str, str]:
        """Sends the response to an error and returns its code and its message.

        This is a separate function so that the frame that catches the error binds no second name to
        it. Such a name would form a cycle of error, traceback and frame, which holds the request's
        body in memory until the garbage collector runs.
        """
        refusal = as_serving_error(error)
        if refusal is None:
            self.transport.engine.log.exception("failed", path=request.path[:200])
            refusal = ServingError("internal", "an internal error. The service's log describes it.")
        await request.send_error(send, refusal)
        return refusal.code, refusal.message
