"""Compressed bodies: in, with a bound on what they become; out, when the client can read them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.strict_json import malformed, shown

ENCODINGS = ("gzip", "deflate")
"""What is read and written. ``deflate`` is the zlib format (RFC 9110, 8.4.1.2), as on Triton."""

_WINDOW = {"gzip": 31, "deflate": 15}
_STEP = 1 << 20
# Below this a compressed answer is seldom shorter, and never by much.
_WORTH_IT = 1024


def request_encoding(value: str | None) -> str | None:
    """``Content-Encoding`` as one of ``ENCODINGS``; None where the body is as it is.

    Raises:
        ServingError: ``unsupported_media_type`` for any other.

    Example:
        >>> request_encoding("GZIP"), request_encoding("identity")
        ('gzip', None)
    """
    word = (value or "").strip().lower()
    if word in ("", "identity"):
        return None
    if word not in ENCODINGS:
        raise ServingError(
            "unsupported_media_type",
            f"Content-Encoding: expected {' or '.join(ENCODINGS)}, got {shown(value)}. "
            "Send the body in one of these, or as it is.",
        )
    return word


def decompress(
    body: bytes | bytearray | memoryview,
    encoding: str,
    limit: int,
    take: Callable[[int], None] = lambda count: None,
) -> bytearray:
    """The body as it was before compression.

    Args:
        body: one compressed stream.
        encoding: one of ``ENCODINGS``.
        limit: most bytes that it may become; reading stops there.
        take: told of every further number of bytes before they are kept; may refuse.

    Raises:
        ServingError: ``too_large`` above ``limit``; ``malformed`` for what is no such stream, ends
            early, or goes on after its end.

    Example:
        >>> import gzip
        >>> bytes(decompress(gzip.compress(b"abc"), "gzip", 10))
        b'abc'
        >>> decompress(gzip.compress(bytes(1000)), "gzip", 10)
        Traceback (most recent call last):
        moe_jax.serving.errors.ServingError: the body: expected at most 10 bytes after decompression, got more.
    """  # noqa: E501 - the message is one line
    stream = zlib.decompressobj(_WINDOW[encoding])
    decoded = bytearray()
    rest: bytes | bytearray | memoryview = body
    try:
        while True:
            more = stream.decompress(rest, min(_STEP, limit + 1 - len(decoded)))
            take(len(more))
            decoded += more
            if len(decoded) > limit:
                raise ServingError(
                    "too_large",
                    f"the body: expected at most {limit} bytes after decompression, got more.",
                )
            rest = stream.unconsumed_tail
            if stream.eof or not rest:
                break
    except zlib.error:
        raise malformed(f"the body: expected {encoding}, as Content-Encoding says.") from None
    if not stream.eof:
        raise malformed(f"the body: expected a whole {encoding} stream, got part of one.")
    if stream.unused_data:
        raise malformed(f"the body: expected one {encoding} stream, got bytes after it.")
    return decoded


def response_encoding(accept: str | None) -> str | None:
    """The encoding in which to answer, by ``Accept-Encoding`` (RFC 9110, 12.5.3); None for none.

    Example:
        >>> response_encoding("deflate;q=0.5, gzip"), response_encoding("gzip;q=0, br")
        ('gzip', None)
        >>> response_encoding("*"), response_encoding(None), response_encoding("identity, gzip;q=0.5")
        ('gzip', None, None)
    """
    if not accept:
        return None
    weights: dict[str, float] = {}
    for item in accept.lower().split(",")[:32]:
        word, _, options = item.partition(";")
        name, _, value = options.partition("=")
        try:
            weight = float(value) if name.strip() == "q" else 1.0
        except ValueError:
            weight = 0.0
        weights[word.strip()] = weight
    best, chosen = weights.get("identity", 0.0), None
    for name in ENCODINGS:
        weight = weights.get(name, weights.get("*", 0.0))
        if weight > best or (chosen is None and 0 < weight == best):
            best, chosen = weight, name
    return chosen


def compress(parts: Sequence[bytes | memoryview], encoding: str) -> bytes | None:
    """The parts as one compressed body; None where it is too short to be worth it."""
    if sum(len(part) for part in parts) < _WORTH_IT:
        return None
    # Level 1: tensors hardly shrink, and the higher levels take many times as long to find out.
    stream = zlib.compressobj(1, zlib.DEFLATED, _WINDOW[encoding])
    return b"".join([*(stream.compress(part) for part in parts), stream.flush()])
