"""One HTTP/1.1 connection: uvicorn's protocol, strict about framing and bounded in every state.

uvicorn bounds neither how long a head may take nor how long it may be, loses the body of a request
that offers an upgrade, takes trailers for headers, and waits for ever for a client that does not
read. Each state of a connection has a deadline here:

| state | deadline |
|---|---|
| head of a request | ``HEAD_SECONDS`` |
| body | the application's, ``MOE_REQUEST_TIMEOUT_SECONDS`` |
| body of a request that is answered already | ``DISCARD_SECONDS`` |
| answer | ``STALL_SECONDS`` for each piece; ``MIN_RATE`` after ``WRITE_SECONDS`` |
| idle | uvicorn's ``timeout_keep_alive`` |
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.request_body import Disconnected
from moe_jax.serving.http.request_head import (
    HeadError,
    check_head,
    check_version,
    head_without_upgrade,
    path_of_target,
)
from moe_jax.serving.http.strict_json import malformed

HEAD_SECONDS = 10.0
"""Longest time from the first byte of a request, or from the connection, to the end of its head."""

HEAD_BYTES = 64 * 1024
"""Most bytes of a request line and headers, of trailers, or of the extensions of one chunk."""

HEAD_LINES = 256
"""Most header lines of a request."""

DISCARD_SECONDS = 5.0
"""How long the rest of a body is still taken, and thrown away, after an early answer. A client that
is cut off while it sends often never sees the answer."""

STALL_SECONDS = 10.0
"""Longest time in which a client reads next to nothing of its answer: less than one piece of it."""

WRITE_SECONDS = 30.0
"""Time after which a client must have read its answer at ``MIN_RATE`` on average."""

MIN_RATE = 128 * 1024
"""Bytes per second."""

# An answer is handed to the transport in pieces, so that no more than one waits there unaccounted.
_PIECE = 128 * 1024
_PARSED_AT_ONCE = 4 * 1024


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with strict framing and a deadline for each state.

    Args:
        refused: called with the refusal of a request that does not reach the application. Other
            arguments are uvicorn's.
    """

    def __init__(
        self, *args: Any, refused: Callable[[ServingError], None] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._refused = refused

    _timer: asyncio.TimerHandle | None = None
    _flush_timer: asyncio.TimerHandle | None = None
    _in_head = True
    _in_body = False
    _ignores_upgrade = False
    _stopped = False
    _ends = False
    _head_bytes = 0
    _unframed_bytes = 0
    _unparsed = b""
    _body_left = 0
    _broken_cycle: RequestResponseCycle | None = None
    _is_silent = True

    # --- events of the transport

    def connection_made(self, transport: Any) -> None:
        """Starts the deadline of the first request's head."""
        super().connection_made(transport)
        self._set_timer(HEAD_SECONDS, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timers."""
        self._stop_timer()
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Keeps what has come and parses as much as can be answered soon."""
        # uvicorn restarts the clock of an idle connection at every byte. A blank line, which may
        # precede a request, would then keep the connection open, so it is left to on_message_begin.
        self._unframed_bytes += len(data)
        self._is_silent = False
        if self._stopped:
            if self._unframed_bytes > 16 * HEAD_BYTES:
                self._close()
            return
        self._unparsed = self._unparsed + data if self._unparsed else data
        self._parse()

    def _parse(self) -> None:
        """Parses what has come, as far as the requests in it can be answered soon.

        A request in the parser takes a hundred times the memory of its bytes. Of the many that may
        stand in one read, only those of the next few kilobytes become requests at once.
        """
        data, at = self._unparsed, 0
        self._unparsed = b""
        while at < len(data) and not self._stopped:
            if self.pipeline:
                self._unparsed = data[at:]
                self.flow.pause_reading()
                return
            size = max(_PARSED_AT_ONCE, self._body_left)
            part = data if not at and size >= len(data) else data[at : at + size]
            try:
                self.parser.feed_data(part)
                at += len(part)
            except httptools.HttpParserUpgrade as upgrade:
                at += upgrade.args[0]
                self._restart_without_upgrade()
            except httptools.HttpParserError:
                if not self._stopped:
                    self._framing_is_broken("the request is not valid HTTP/1.1")
                return
        if self._unframed_bytes > HEAD_BYTES and not self._stopped:
            if self._in_head:
                self._refuse(431, "too_large", "the headers are too large")
            elif self._in_body:
                self._framing_is_broken("the trailers or chunk extensions are too large")

    def eof_received(self) -> bool | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Keeps the connection open for an answer that a half-closed client waits for."""
        # A client may close its half of the connection once its request is complete, and still wait
        # for the answer.
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return None
        self.cycle.keep_alive = False
        return True

    # --- events of the parser

    def on_message_begin(self) -> None:
        """Starts the account of a request's head."""
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._in_head, self._in_body, self._body_left = True, False, 0
        self._head_bytes = self._unframed_bytes = 0
        if self._timer is None:
            self._set_timer(HEAD_SECONDS, self._head_is_late)

    def on_url(self, url: bytes) -> None:
        """Counts the target towards the head."""
        super().on_url(url)
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Counts and keeps a header; drops a trailer."""
        # After the head come trailers, which are never merged into the headers (RFC 9110, 6.5.1):
        # a proxy that sets or removes a header does not look at trailers.
        if self._in_head:
            self._head_bytes += len(name) + len(value) + 4
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Checks the head and begins the body."""
        self._stop_timer()
        self._check_head()
        self._in_head, self._in_body = False, True
        self._unframed_bytes = 0
        if self.parser.should_upgrade():
            # The parser skips the body of such a request; see _restart_without_upgrade.
            self._ignores_upgrade = True
            return
        lengths = [value for name, value in self.headers if name == b"content-length"]
        self._body_left = int(lengths[0]) if lengths else 0  # the parser has checked it
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Passes a piece of the body on."""
        self._unframed_bytes = 0
        self._body_left -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Ends the request; one that was answered early frees the connection."""
        if self._ignores_upgrade:
            return
        self._in_body = False
        super().on_message_complete()
        if self.cycle.response_complete:  # the rest of a body that was answered early has come
            self._stop_timer()
            if self._ends:
                self._close()
            else:
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

    def _check_head(self) -> None:
        """Refuses a head that is too large, or that HTTP/1.1 forbids and the parser accepts."""
        version, method = self.parser.get_http_version(), self.parser.get_method()
        try:
            check_version(version)
            if self._head_bytes > HEAD_BYTES or len(self.headers) > HEAD_LINES:
                raise HeadError(431, "too_large", "the headers are too large")
            check_head(version, method, self.headers)
            if version == "1.0":  # RFC 9110, 10.1.1: such a client cannot read a 100 answer
                self.expect_100_continue = False
            self.url = path_of_target(method, self.url)
        except HeadError as refusal:
            self._refuse(refusal.status, refusal.code, refusal.text)
            raise  # stops the parser; `_parse` sees that the refusal has been sent

    def _restart_without_upgrade(self) -> None:
        """Reads a request that offers an upgrade as if it did not (RFC 9110, 7.8).

        The parser takes whatever follows such a head for another protocol. Java's HttpClient and
        ``curl --http2`` offer ``h2c`` with their first request and send its body as usual.
        """
        self._ignores_upgrade = False
        head = head_without_upgrade(self.parser.get_method(), self.url, self.headers)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(head)

    # --- answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def bounded(scope: Any, receive: Any, send: Any) -> None:
            writer = _Writer(self, cycle, send)

            async def receive_valid() -> Any:
                message = None if self._broken_cycle is cycle else await receive()
                if self._broken_cycle is cycle:
                    raise malformed(
                        "the body: expected chunks as HTTP/1.1 frames them, got something else."
                    )
                return message

            await app(scope, receive_valid, writer.send)

        super()._start_asgi_task(cycle, bounded)

    def on_response_complete(self) -> None:
        """Continues with the next request, or ends the connection."""
        super().on_response_complete()
        if self._unparsed and not self.pipeline:
            self.loop.call_soon(self._parse)
        if self.transport.is_closing():
            self._abort_if_unread()
            return
        if self.cycle.response_complete and self._in_body:  # answered before its body has come
            self._unset_keepalive_if_required()
            if self._ends:
                self.transport.write_eof()
            self._set_timer(DISCARD_SECONDS, self._close)
        elif self._ends:
            self._close()
        self._watch_flush(self.transport.get_write_buffer_size())

    def timeout_keep_alive_handler(self) -> None:
        """Closes a connection that was idle for too long."""
        self._close()

    def answer_starts(self, cycle: RequestResponseCycle) -> None:
        """Called when the head of an answer is written.

        If it ends the connection before the body has come, uvicorn would close at once, and the
        kernel would reset the connection, often before the client has read the answer.
        """
        if not cycle.keep_alive and cycle is self.cycle and self._in_body:
            cycle.keep_alive, self._ends = True, True

    async def drained(self, cycle: RequestResponseCycle, seconds: float) -> None:
        """Waits until the client has read most of what is written; cuts it off if it does not.

        Raises:
            Disconnected: it did not.
        """
        try:
            async with asyncio.timeout(min(STALL_SECONDS, seconds)):
                await self.flow.drain()
        except TimeoutError:
            self.transport.abort()
            cycle.disconnected = True
            raise Disconnected from None

    def _watch_flush(self, before: int) -> None:
        """Cuts off a client that does not read the last bytes of its answer."""
        if self._flush_timer is not None or not before:
            return

        def check() -> None:
            self._flush_timer = None
            left = self.transport.get_write_buffer_size()
            if left and left > before - MIN_RATE // 8:
                self.transport.abort()
            else:
                self._watch_flush(left)

        self._flush_timer = self.loop.call_later(STALL_SECONDS, check)

    # --- ends

    def _set_timer(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, then)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_is_late(self) -> None:
        self._timer = None
        if self.flow.read_paused:  # it waits for the answer to an earlier request
            self._set_timer(HEAD_SECONDS, self._head_is_late)
            return
        self._refuse(408, "request_timeout", "the request did not arrive in time")

    def _framing_is_broken(self, text: str) -> None:
        """Ends the connection, with an answer if the request has none: nobody knows where the next
        request begins."""
        cycle = self.cycle
        if not self._in_body or cycle is None:
            self._refuse(400, "malformed", text)
        elif cycle.response_complete:
            self._stopped = True
            self._close()
        else:
            # The application waits for the body, and answers as it answers other faults.
            self._stopped, self._broken_cycle, cycle.keep_alive = True, cycle, False
            cycle.message_event.set()

    def _refuse(self, status: int, code: str, text: str) -> None:
        """Answers a request that does not reach the application, and ends the connection."""
        self._stopped = True
        self._stop_timer()
        self._unset_keepalive_if_required()
        # A connection that never sent a byte, as browsers open ahead, made no request.
        if self._refused is not None and not self._is_silent:
            self._refused(ServingError(code, text))
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # An earlier request of the connection is not answered yet; the answer ends it.
            self.cycle.keep_alive = False
            return
        body = b'{"error":"%s","code":"%s"}' % (text.encode(), code.encode())
        self.transport.write(
            STATUS_LINE[status] + b"content-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%s" % (len(body), body)
        )
        self.transport.write_eof()
        self._set_timer(DISCARD_SECONDS, self._close)

    def _close(self) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.close()
            self._abort_if_unread()

    def _abort_if_unread(self) -> None:
        # A transport that is closed still waits, for ever, until the client has read everything.
        if self.transport.get_write_buffer_size():
            self.loop.call_later(STALL_SECONDS, self.transport.abort)


class _Writer:
    """Sends one answer in pieces, no faster than the client reads it.

    Args:
        protocol: the connection.
        cycle: the request and its answer.
        send: uvicorn's, which hands all that it gets to the transport.
    """

    __slots__ = ("cycle", "protocol", "sent", "started", "write")

    def __init__(self, protocol: BoundedProtocol, cycle: RequestResponseCycle, send: Any) -> None:
        self.protocol, self.cycle, self.write = protocol, cycle, send
        self.started, self.sent = 0.0, 0

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.started = self.protocol.loop.time()
            await self._drain()
            await self.write(message)
            self.protocol.answer_starts(self.cycle)
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if len(body) <= _PIECE:
            await self._piece(body, more)
            return
        view = memoryview(body)
        for start in range(0, len(view), _PIECE):
            await self._piece(view[start : start + _PIECE], more or start + _PIECE < len(view))

    async def _piece(self, body: Any, more: bool) -> None:
        await self._drain()
        await self.write({"type": "http.response.body", "body": body, "more_body": more})
        self.sent += len(body)
        if not more:
            # The caller releases the memory of the answer when this returns.
            await self._drain()

    async def _drain(self) -> None:
        protocol = self.protocol
        if protocol.flow.write_paused and not self.cycle.disconnected:
            allowed = WRITE_SECONDS + self.sent / MIN_RATE
            left = self.started + allowed - protocol.loop.time()
            await protocol.drained(self.cycle, max(left, 0.0))
