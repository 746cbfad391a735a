"""A raw HTTP/2 client: sends frames that no library would send, and stops reading when it likes."""

from __future__ import annotations

import socket
import struct

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, END_HEADERS, ACK = 1, 4, 1
_WINDOW = 4  # SETTINGS_INITIAL_WINDOW_SIZE


class Http2:
    """One connection.

    Args:
        port: on 127.0.0.1.
        window: bytes of each answer that the server may send.
    """

    def __init__(self, port: int, *, window: int = 65_535, timeout: float = 60.0) -> None:
        self.ends: set[int] = set()
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.frame(SETTINGS, 0, 0, struct.pack(">HI", _WINDOW, window))

    def __enter__(self) -> Http2:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def frame(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        head = struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream)
        self.sock.sendall(head + payload)

    def headers(self, stream: int, pairs: list[tuple[str, str]], *, end: bool = False) -> None:
        flags = END_HEADERS | (END_STREAM if end else 0)
        self.frame(HEADERS, flags, stream, b"".join(_literal(*pair) for pair in pairs))

    def call(self, stream: int, path: str, metadata: list[tuple[str, str]] | None = None) -> None:
        """Begins a gRPC call: its headers and no message."""
        self.headers(
            stream,
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", path),
                (":authority", "x"),
                ("content-type", "application/grpc"),
                ("te", "trailers"),
                *(metadata or []),
            ],
        )

    def message(
        self, stream: int, data: bytes, *, length: int | None = None, end: bool = False
    ) -> None:
        """Sends a gRPC message, or the beginning of one that is ``length`` bytes long."""
        prefix = struct.pack(">BI", 0, len(data) if length is None else length)
        self.frame(DATA, END_STREAM if end else 0, stream, prefix + data)

    def read(self) -> tuple[int, int, int, bytes] | None:
        """The next frame: kind, flags, stream, payload; None at the end of the connection."""
        head = self._exactly(9)
        if head is None:
            return None
        size = struct.unpack(">I", b"\0" + head[:3])[0]
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        payload = self._exactly(size) or b""
        if kind == SETTINGS and not flags & ACK:
            self.frame(SETTINGS, ACK, 0)
        elif kind == PING and not flags & ACK:
            self.frame(PING, ACK, 0, payload)
        return kind, flags, stream & 0x7FFFFFFF, payload

    def ended(self, stream: int) -> bool:
        """Reads until the stream has ended. False if the connection ends before."""
        while stream not in self.ends and (frame := self.read()) is not None:
            kind, flags, number, _ = frame
            if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
                self.ends.add(number)
        return stream in self.ends

    def _exactly(self, count: int) -> bytes | None:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                return None
            data += more
        return data


def _literal(name: str, value: str) -> bytes:
    """A header field without indexing and without Huffman coding (RFC 7541, 6.2.2)."""
    return b"\0" + _string(name.encode()) + _string(value.encode())


def _string(data: bytes) -> bytes:
    assert len(data) < 127
    return bytes([len(data)]) + data
