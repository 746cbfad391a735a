"""One HTTP/1.1 connection: uvicorn's protocol, with bounds on the head of a request.

uvicorn bounds neither how long the first head may take nor how long it may be, so a client could
hold connections for ever, or fill memory with one endless header.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0
"""Longest time from the first byte of a request, or from the connection, to the end of its head."""

HEAD_BYTES = 64 * 1024
"""Most bytes of a request line and headers."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with ``HEAD_SECONDS`` and ``HEAD_BYTES`` kept."""

    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        before = self._in_head
        super().data_received(data)
        if before and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._refuse(431, b"too_large", b"the headers are too large")

    def eof_received(self) -> bool | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        # A client that has said all it had to say, and closed its half, still waits for the answer.
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return None
        self.cycle.keep_alive = False
        return True

    def _wait_for_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_is_late(self) -> None:
        self._timer = None
        self._refuse(408, b"request_timeout", b"the request did not arrive in time")

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, b"malformed", b"not an HTTP request")

    def _refuse(self, status: int, code: bytes, text: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:  # else an answer is under way
            body = b'{"error":"%s","code":"%s"}' % (text, code)
            self.transport.write(
                b"HTTP/1.1 %d \r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%s" % (status, len(body), body)
            )
        self.transport.close()
