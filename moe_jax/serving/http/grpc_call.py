"""One gRPC call as its metadata describes it: who asks, and under which request id."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import unquote

import grpc

from moe_jax.serving.engine import Client
from moe_jax.serving.http.request_headers import presented_key, request_id
from moe_jax.serving.http.strict_json import malformed
from moe_jax.serving.http.transport import TransportContext

# Lists whose lines are joined; of any other key of metadata one line must come.
_JOINED_KEYS = frozenset({"x-forwarded-for"})
_ONCE_KEYS = frozenset({"authorization", "x-api-key"})


class GrpcCall:
    """One call: its client and its request id, from the peer's address and the metadata.

    Attributes:
        refuses: whether a refusal would be this transport's, and not the engine's.
        raw_contents: the tensors of ``ModelInfer``, as views on its message.
    """

    def __init__(self, transport: TransportContext, context: grpc.ServicerContext) -> None:
        self.transport, self.context = transport, context
        self.started = time.monotonic()
        self.raw_contents: list[memoryview] = []
        self.refuses = False
        self._client: Client | None = None
        metadata: dict[str, str] = {}
        for key, value in context.invocation_metadata() or ():
            if not isinstance(value, str):
                continue
            if key in metadata and key in _ONCE_KEYS:
                raise malformed(f"{key}: expected once, got more than once.")
            joins = key in metadata and key in _JOINED_KEYS
            metadata[key] = f"{metadata[key]}, {value}" if joins else value
        self.request_id = request_id(metadata.get("x-request-id"))
        self.forwarded_for = metadata.get("x-forwarded-for")
        self.key = presented_key(metadata.get("authorization"), metadata.get("x-api-key"))

    def client(self) -> Client:
        """Returns the client. Raises ``unauthorized`` or ``blocked``."""
        if self._client is None:
            self._client = self.transport.engine.identify(
                api_key=self.key,
                peer=peer_of(self.context.peer()),
                forwarded_for=self.forwarded_for,
            )
        return self._client

    @property
    def turn(self) -> str:
        """Whose messages arrive one at a time: the client's; the peer's until the client is known."""
        return peer_of(self.context.peer()) if self._client is None else self._client.id

    def log_facts(self) -> dict[str, Any]:
        """Returns what a log line says of every call."""
        return {
            "request_id": self.request_id,
            "client": self.turn,
            "ms": round(1e3 * (time.monotonic() - self.started), 2),
        }

    def admit(self, requests: int) -> None:
        """Admits the client, and counts ``requests`` against its limits."""
        self.transport.engine.admit(self.client(), requests=requests)
        self.refuses = requests > 0


def peer_of(text: str) -> str:
    """Returns the address in gRPC's name of a peer; "unknown" if it has none.

    Example:
        >>> peer_of("ipv4:127.0.0.1:4242"), peer_of("ipv6:%5B::1%5D:4242"), peer_of("unix:/x")
        ('127.0.0.1', '::1', 'unknown')
    """
    family, _, rest = unquote(text).partition(":")
    if family not in ("ipv4", "ipv6"):
        return "unknown"
    return rest.rpartition(":")[0].strip("[]")
