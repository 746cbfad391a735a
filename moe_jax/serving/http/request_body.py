"""Reading a request body: bounded in bytes, in time, and over all requests together."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.strict_json import malformed, shown

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

_ALIGNMENT = 64


class Disconnected(Exception):
    """The client went away before its request was complete. There is nobody to answer."""


class Buffers:
    """Bytes that all bodies being read and served hold together, from any thread.

    Args:
        limit: most bytes at once; what goes beyond it is refused with ``queue_full``.

    Example:
        >>> buffers = Buffers(10)
        >>> with buffers.lease() as take:
        ...     take(4), buffers.held
        (None, 4)
        >>> buffers.held
        0
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        with self._lock:
            if self.held + count <= self.limit:
                self.held += count
                return
        raise ServingError(
            "queue_full",
            "the service holds as many request bodies as it may. Try again soon.",
            retry_after=1.0,
        )

    def give(self, count: int) -> None:
        with self._lock:
            self.held -= count

    @contextlib.contextmanager
    def lease(self) -> Iterator[Callable[[int], None]]:
        """A function that takes bytes; they are given back at the end of the block."""
        taken = [0]

        def take(count: int) -> None:
            self.take(count)
            taken[0] += count

        try:
            yield take
        finally:
            self.give(taken[0])


class Body:
    """The body of one request, from its headers until it is answered.

    Used as a context manager: what it held of ``buffers`` is given back at the end.

    Args:
        declared: ``Content-Length``, or None.
        limit: most bytes.
        buffers: shared account.
        json_length: ``Inference-Header-Content-Length`` as it came, or None. Where it is a number,
            the bytes after so many lie on a 64-byte boundary of the buffer, so that binary tensors
            need no copy to be aligned.

    Raises:
        ServingError: ``malformed`` for a length that is none; ``too_large`` for one above ``limit``.
    """

    def __init__(
        self, *, declared: str | None, limit: int, buffers: Buffers, json_length: str | None = None
    ) -> None:
        self.limit, self.buffers = limit, buffers
        self.complete = False
        if declared is not None:
            if not (declared.isascii() and declared.isdigit()):
                raise malformed(f"Content-Length: expected a number, got {shown(declared)}.")
            if len(declared) > 18 or int(declared) > limit:
                raise _too_large(limit)
        known = json_length is not None and json_length.isascii() and json_length.isdigit()
        self.padding = -int(json_length[:9]) % _ALIGNMENT if known and json_length else 0
        self._buffer = bytearray(self.padding)

    async def read(self, receive: Receive, seconds: float) -> memoryview:
        """The whole body.

        Raises:
            ServingError: ``too_large``, ``queue_full``, or ``request_timeout`` where it did not come
                within ``seconds``.
            Disconnected: the client went away.
        """
        buffer, room = self._buffer, self.limit
        try:
            async with asyncio.timeout(seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Disconnected
                    chunk = message.get("body", b"")
                    room -= len(chunk)
                    if room < 0:
                        raise _too_large(self.limit)
                    self.buffers.take(len(chunk))
                    buffer += chunk
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ServingError(
                "request_timeout",
                f"the body: expected all of it within {seconds:g} seconds, got part. Send faster.",
            ) from None
        self.complete = True
        return memoryview(buffer)[self.padding :]

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        self.buffers.give(len(self._buffer) - self.padding)


def _too_large(limit: int) -> ServingError:
    return ServingError(
        "too_large", f"the body: expected at most {limit} bytes, got more. Send smaller batches."
    )
