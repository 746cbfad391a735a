"""Reading of a request body: bounded in bytes, in time, and over all requests together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.byte_account import Lease
from moe_jax.serving.http.strict_json import malformed, shown

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

_ALIGNMENT = 64

# What uvicorn may have read of a body before it is asked for: its buffer and one read of the socket.
_READ_AHEAD = 320 * 1024


class Disconnected(Exception):
    """The client is gone, or reads nothing. Nobody waits for an answer."""


class RequestBody:
    """The body of one request.

    Args:
        declared: ``Content-Length``, or None.
        limit: most bytes.
        lease: takes the bytes before they are read. They stay taken until its owner releases it.
        json_length: ``Inference-Header-Content-Length`` as it came, or None. If it is a number, the
            bytes after the JSON lie on a 64-byte boundary of the buffer, so that binary tensors
            need no copy to be aligned.

    Raises:
        ServingError: ``malformed`` if ``declared`` is not a length; ``too_large`` if it is above
            ``limit``; ``queue_full`` if there is no room for it now.
    """

    def __init__(
        self, *, declared: str | None, limit: int, lease: Lease, json_length: str | None = None
    ) -> None:
        self._limit, self._lease = limit, lease
        self._room = limit  # bytes that may still come
        if declared is not None:
            if not (declared.isascii() and declared.isdigit()):
                raise malformed(f"Content-Length: expected a number, got {shown(declared)}.")
            if len(declared) > 18 or int(declared) > limit:
                raise _too_large(limit)
            self._room = int(declared)
            lease.check_room(self._room)  # better refused now than in the middle of the body
        is_number = json_length is not None and json_length.isascii() and json_length.isdigit()
        self._padding = -int(json_length[:9]) % _ALIGNMENT if is_number and json_length else 0

    async def read(self, receive: Receive, seconds: float) -> memoryview:
        """Returns the whole body.

        Raises:
            ServingError: ``too_large``, ``queue_full``, or ``request_timeout`` if it does not come
                within ``seconds``.
            Disconnected: the client went away.
        """
        buffer, size, taken = bytearray(self._padding), 0, 0
        try:
            async with asyncio.timeout(seconds):
                more = True
                while more:
                    ahead = size + min(self._room, _READ_AHEAD)
                    if ahead > taken:
                        self._lease.take(ahead - taken)
                        taken = ahead
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Disconnected
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    self._room -= len(chunk)
                    if self._room < 0:
                        raise _too_large(self._limit)
                    buffer += chunk
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ServingError(
                "request_timeout",
                f"the body: expected all of it within {seconds:g} seconds, got part. Send faster.",
            ) from None
        self._lease.keep(size)
        return memoryview(buffer)[self._padding :]


def _too_large(limit: int) -> ServingError:
    return ServingError(
        "too_large", f"the body: expected at most {limit} bytes, got more. Send smaller batches."
    )
